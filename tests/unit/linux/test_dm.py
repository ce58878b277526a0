# SPDX-License-Identifier: Apache-2.0
"""Device-mapper messages against bytes that a C program over <linux/dm-ioctl.h> printed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.linux import dm

# Offset -> bytes; all else is zero. sizeof(struct dm_ioctl) = 312, offsets: dev 40, name 48, uuid 176.
CREATE = {0: "04", 13: "40", 16: "3801", 48: "636f72652d726f6f74", 176: "54525553544d452d31323334"}
LOAD = {
    0: "04", 13: "40", 16: "3801", 20: "01", 28: "01", 48: "636f72652d726f6f74", 321: "80", 332: "a8",
    336: "766572697479",
    352: "3120373a3120373a32203430393620343039362034303936203120736861323536203030303130323033303430353036303"
    "73038303930613062306330643065306631303131313231333134313531363137313831393161316231633164316531662061"
    "616262203120726573746172745f6f6e5f636f7272757074696f6e",
}  # fmt: skip
REMOVE = {0: "04", 13: "40", 16: "3801", 30: "02", 48: "636f72652d726f6f74"}
# What the kernel answers to DM_TABLE_STATUS of a two-target mapping, device 253:300; 402 bytes are valid.
REPLY = {
    0: "04", 4: "30", 12: "9201", 16: "3801", 20: "02", 24: "01", 28: "31", 40: "2cfd10", 48: "74776f",
    320: "08", 332: "30", 336: "6c696e656172", 352: "3120373a31", 360: "08", 368: "08", 380: "60",
    384: "766572697479", 400: "56",
}  # fmt: skip

TABLE = dm.VerityTable(
    root_hash=bytes(range(32)), salt=b"\xaa\xbb", data_blocks=4096, options=("restart_on_corruption",)
)


def image(sparse: dict[int, str], size: int = 16384) -> bytes:
    buffer = bytearray(size)
    for offset, text in sparse.items():
        raw = bytes.fromhex(text)
        buffer[offset : offset + len(raw)] = raw
    return bytes(buffer)


def test_request_numbers_are_the_kernels() -> None:
    numbers = [
        dm.DM_VERSION, dm.DM_LIST_DEVICES, dm.DM_DEV_CREATE, dm.DM_DEV_REMOVE, dm.DM_DEV_SUSPEND,
        dm.DM_DEV_STATUS, dm.DM_TABLE_LOAD, dm.DM_TABLE_STATUS,
    ]  # fmt: skip
    assert numbers == [0xC138FD00 | number for number in (0, 2, 3, 4, 6, 7, 9, 12)]


def test_golden_create() -> None:
    assert dm.pack("core-root", uuid="TRUSTME-1234") == image(CREATE)


def test_golden_table_load() -> None:
    line = TABLE.line(os.makedev(7, 1), os.makedev(7, 2))
    target = dm.Target(0, TABLE.sectors, "verity", line)
    assert dm.pack("core-root", flags=dm.DM_READONLY_FLAG, targets=[target]) == image(LOAD)


def test_golden_deferred_remove() -> None:
    assert dm.pack("core-root", flags=dm.DM_DEFERRED_REMOVE) == image(REMOVE)


def test_golden_reply() -> None:
    raw = image(REPLY)
    reply = dm.unpack(raw)
    assert (reply.device, reply.open_count) == (os.makedev(253, 300), 1)
    assert reply.flags & dm.DM_READONLY_FLAG
    assert dm.unpack_targets(raw) == (dm.Target(0, 8, "linear", "1 7:1"), dm.Target(8, 8, "verity", "V"))


def list_reply(*names: str) -> bytes:
    """Lay out what the kernel answers to DM_LIST_DEVICES: struct dm_name_list, each 8-byte aligned."""
    body = b""
    for at, name in enumerate(names):
        size = -(-(12 + len(name) + 1) // 8) * 8
        following = size if at < len(names) - 1 else 0
        body += (struct.pack("<QI", 0xFD00 + at, following) + name.encode()).ljust(size, b"\0")
    head = image({0: "04", 16: "3801"}, 312)
    return head[:12] + (312 + len(body)).to_bytes(4, "little") + head[16:] + body


def test_the_list_of_names() -> None:
    names = ["a", "trustme-x:integrity", "bb"]
    assert dm.unpack_names(list_reply(*names)) == names
    assert dm.unpack_names(list_reply()) == []


@given(st.binary(min_size=60, max_size=60), st.integers(0, 60))
def test_a_broken_list_never_reads_outside(noise: bytes, kept: int) -> None:
    raw = list_reply("one", "two-and-more")[: 312 + kept] + noise[kept:]
    with contextlib.suppress(OSError):
        assert all(len(name) <= 4 * len(raw) for name in dm.unpack_names(raw))


def test_no_salt_and_no_options() -> None:
    table = dm.VerityTable(root_hash=b"\x01" * 32, salt=b"", data_blocks=8)
    assert table.sectors == 64
    assert table.line(os.makedev(259, 3), os.makedev(7, 300)) == (
        f"1 259:3 7:300 4096 4096 8 1 sha256 {'01' * 32} -"
    )


@pytest.mark.parametrize("name", ["x" * 128, "a\0b", "ä"])
def test_a_name_that_does_not_fit_is_an_error(name: str) -> None:
    with pytest.raises(ValueError):
        dm.pack(name)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**40), st.integers(1, 2**40),
            st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200),
        ),
        max_size=4,
    )
)  # fmt: skip
def test_specs_are_aligned_and_chained(wanted: list[tuple[int, int, str]]) -> None:
    raw = dm.pack("n", targets=[dm.Target(start, length, "verity", text) for start, length, text in wanted])
    position = 312
    for start, length, text in wanted:
        assert position % 8 == 0
        got_start, got_length, _, following, kind = struct.unpack_from("<QQiI16s", raw, position)
        assert (got_start, got_length, kind) == (start, length, b"verity".ljust(16, b"\0"))
        assert raw[position + 40 :].startswith(text.encode() + b"\0")
        position += following
    assert position <= struct.unpack_from("<I", raw, 12)[0] == len(raw)


@given(st.binary(min_size=402, max_size=402), st.integers(0, 400))
def test_a_broken_reply_never_reads_outside(noise: bytes, kept: int) -> None:
    raw = image(REPLY, 402)[:kept] + noise[kept:]
    raw = raw[:20] + (int.from_bytes(raw[20:24], "little") % 64).to_bytes(4, "little") + raw[24:]
    with contextlib.suppress(OSError):
        dm.unpack_targets(raw)


@dataclass
class FakeMapper:
    """The kernel's side, as far as order and flags matter."""

    device: int
    fail_at: int = 0
    live_flags: int = dm.DM_ACTIVE_PRESENT_FLAG | dm.DM_READONLY_FLAG
    calls: list[tuple[int, int]] = field(default_factory=list)
    buffers: list[bytearray] = field(default_factory=list)
    seen: bytes = b""

    def ioctl(self, _fd: int, request: int, buffer: bytearray) -> int:
        flags = struct.unpack_from("<I", buffer, 28)[0]
        self.calls.append((request, flags))
        self.buffers.append(buffer)
        self.seen += bytes(buffer)
        if request == self.fail_at:
            raise OSError(errno.EINVAL, "Invalid argument")
        encoded = (self.device & 0xFF) | (os.major(self.device) << 8)
        struct.pack_into("<I", buffer, 28, self.live_flags)
        struct.pack_into("<Q", buffer, 40, encoded)
        return 0


@pytest.fixture
def mapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMapper:
    (tmp_path / "mapper").mkdir()
    (tmp_path / "mapper/control").touch()
    fake = FakeMapper(os.makedev(253, 5))
    monkeypatch.setattr(fcntl, "ioctl", fake.ioctl)
    return fake


def create(dev: Path) -> dm.Mapping:
    return dm.create_verity("n", "u", data_dev=1793, hash_dev=1794, table=TABLE, dev=dev)


@pytest.mark.root
def test_a_mapping_is_created_loaded_and_resumed_read_only(mapper: FakeMapper, tmp_path: Path) -> None:
    os.mknod(tmp_path / "dm-5", 0o60600, mapper.device)
    assert create(tmp_path) == dm.Mapping("n", tmp_path / "dm-5", mapper.device)
    assert mapper.calls == [
        (dm.DM_DEV_CREATE, 0),
        (dm.DM_TABLE_LOAD, dm.DM_READONLY_FLAG),
        (dm.DM_DEV_SUSPEND, dm.DM_READONLY_FLAG),
        (dm.DM_DEV_STATUS, 0),
    ]


@pytest.mark.root
@pytest.mark.parametrize("fail_at", [0, dm.DM_TABLE_LOAD])
def test_row29_a_table_with_keys_is_marked_and_wiped(
    mapper: FakeMapper, tmp_path: Path, fail_at: int
) -> None:
    os.mknod(tmp_path / "dm-5", 0o60600, mapper.device)
    mapper.live_flags = dm.DM_ACTIVE_PRESENT_FLAG | dm.DM_SECURE_DATA_FLAG
    mapper.fail_at = fail_at
    target = dm.Target(0, 8, "crypt", "aes-xts-plain64 c0ffee 0 7:0 0")
    with pytest.raises(OSError) if fail_at else contextlib.nullcontext():
        dm.create("n", "u", target, secret=True, dev=tmp_path)
    assert (dm.DM_TABLE_LOAD, dm.DM_SECURE_DATA_FLAG) in mapper.calls
    assert b"c0ffee" in mapper.seen
    assert not any(b"c0ffee" in buffer for buffer in mapper.buffers)


@pytest.mark.parametrize("step", [dm.DM_TABLE_LOAD, dm.DM_DEV_SUSPEND, dm.DM_DEV_STATUS])
def test_a_failing_step_leaves_no_mapping(mapper: FakeMapper, tmp_path: Path, step: int) -> None:
    mapper.fail_at = step
    with pytest.raises(OSError) as caught:
        create(tmp_path)
    assert caught.value.errno == errno.EINVAL
    assert mapper.calls[-1][0] == dm.DM_DEV_REMOVE


def test_a_name_in_use_is_not_removed(mapper: FakeMapper, tmp_path: Path) -> None:
    mapper.fail_at = dm.DM_DEV_CREATE
    with pytest.raises(OSError):
        create(tmp_path)
    assert [request for request, _ in mapper.calls] == [dm.DM_DEV_CREATE]


@pytest.mark.parametrize("flags", [dm.DM_ACTIVE_PRESENT_FLAG, dm.DM_READONLY_FLAG, 0x23, 0])
def test_a_mapping_that_is_not_live_and_read_only_is_given_up(
    mapper: FakeMapper, tmp_path: Path, flags: int
) -> None:
    mapper.live_flags = flags
    with pytest.raises(OSError) as caught:
        create(tmp_path)
    assert caught.value.errno == errno.EIO
    assert mapper.calls[-1][0] == dm.DM_DEV_REMOVE


def test_a_node_that_is_something_else_is_refused(mapper: FakeMapper, tmp_path: Path) -> None:
    (tmp_path / "dm-5").write_text("not a device")
    with pytest.raises(OSError) as caught:
        create(tmp_path)
    assert caught.value.errno == errno.ENODEV
    assert mapper.calls[-1][0] == dm.DM_DEV_REMOVE


def test_deferred_removal(mapper: FakeMapper, tmp_path: Path) -> None:
    dm.remove("n", deferred=True, dev=tmp_path)
    assert mapper.calls == [(dm.DM_DEV_REMOVE, dm.DM_DEFERRED_REMOVE)]


def test_a_reply_that_did_not_fit_is_an_error(mapper: FakeMapper, tmp_path: Path) -> None:
    mapper.live_flags = dm.DM_BUFFER_FULL_FLAG
    with pytest.raises(OSError) as caught:
        dm.live_table("n", dev=tmp_path)
    assert caught.value.errno == errno.EOVERFLOW


def test_without_a_device_mapper(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        create(tmp_path)
