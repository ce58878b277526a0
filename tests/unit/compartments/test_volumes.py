# SPDX-License-Identifier: Apache-2.0
"""The rules about a container's volumes, over a layer whose devices are plain files."""

from __future__ import annotations

import errno
import hmac
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trustme_init.compartments.volume_layer import DeviceMapperLayer, journal_size
from trustme_init.compartments.volume_ledger import LEDGER, Ledger, VolumeKeys
from trustme_init.compartments.volumes import BLOCK, FileVolumes, VolumeRequest, prefix
from trustme_init.errors import StorageRefusal

A = "0badc0de-0000-4000-8000-00000000000a"
B = "0badc0de-0000-4000-8000-00000000000b"
KEY = bytes(range(96))
OTHER_KEY = bytes(reversed(range(96)))
SIZE = 4 * BLOCK
DATA = VolumeRequest("data", SIZE)
LOGS = VolumeRequest("logs", SIZE)


@dataclass
class FileLayer:
    """A block of superblock, made of the keys, before the content."""

    home: Path
    made: list[str] = field(default_factory=list)
    devices: dict[str, Path] = field(default_factory=dict)
    fail_at: str = ""
    error: int = errno.EIO

    def file_size(self, size: int) -> int:
        return size + BLOCK

    def make(self, name: str, file: int, size: int, keys: VolumeKeys) -> Path:
        self.made.append(name)
        os.pwrite(file, superblock(keys), 0)
        return self.open(name, file, size, keys)

    def superblock(self, file: int) -> bytes:
        return os.pread(file, BLOCK, 0)

    def open(self, name: str, file: int, size: int, keys: VolumeKeys) -> Path:
        if self.fail_at and name.endswith(self.fail_at):
            raise OSError(self.error, "as the test wants", name)
        assert os.fstat(file).st_size == size + BLOCK
        assert self.superblock(file) == superblock(keys)
        device = self.home / name
        device.write_bytes(b"x" * BLOCK)
        self.devices[name] = device
        return device

    def remove(self, prefix: str, *, deferred: bool) -> None:
        for name in [name for name in self.devices if name.startswith(prefix)]:
            self.devices.pop(name).unlink()


def superblock(keys: VolumeKeys) -> bytes:
    secret = keys.encryption + keys.authentication + keys.journal
    return hmac.digest(secret, b"superblock", "sha256").ljust(BLOCK, b"\0")


@dataclass
class Rig:
    """Two containers' directories, and what was formatted."""

    home: Path
    formatted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layer = FileLayer(self.home / "dev")
        self.layer.home.mkdir()
        self.volumes = FileVolumes(self.layer, make_file_system=self._format)
        for uuid in (A, B):
            self.directory(uuid).mkdir()

    def _format(self, device: Path) -> None:
        self.formatted.append(device.name)

    def directory(self, uuid: str) -> Path:
        return self.home / uuid

    def file(self, name: str = "data", uuid: str = A) -> Path:
        return self.directory(uuid) / f"{name}.img"

    def prepare(self, uuid: str = A, key: bytes = KEY) -> None:
        self.volumes.prepare(uuid, self.directory(uuid), key)

    def open(self, *requests: VolumeRequest, uuid: str = A, key: bytes = KEY) -> list[Path]:
        opened = self.volumes.open(uuid, self.directory(uuid), requests, key)
        assert [volume.name for volume in opened] == [request.name for request in requests]
        return [volume.device for volume in opened]

    def made(self, *requests: VolumeRequest, uuid: str = A, key: bytes = KEY) -> None:
        """Make volumes and close them again."""
        self.prepare(uuid, key)
        self.open(*requests, uuid=uuid, key=key)
        self.volumes.release(uuid)
        self.formatted.clear()
        self.layer.made.clear()

    def content(self) -> dict[str, bytes]:
        files = [path for uuid in (A, B) for path in self.directory(uuid).rglob("*")]
        return {str(path): path.read_bytes() for path in files if path.is_file() and not path.is_symlink()}

    def refusal(self, *requests: VolumeRequest, uuid: str = A, key: bytes = KEY) -> str:
        """Return the code of a refused opening that changed nothing and left nothing open."""
        before = self.content()
        with pytest.raises(StorageRefusal) as caught:
            self.open(*requests, uuid=uuid, key=key)
        assert self.content() == before
        assert self.layer.devices == {}
        assert self.formatted == self.layer.made == []
        assert key.hex() not in str(caught.value.as_dict())
        return caught.value.code


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_volume_is_made_once_and_opened_ever_after(rig: Rig) -> None:
    rig.prepare()
    assert rig.open(DATA, LOGS) == [rig.layer.home / f"{prefix(A)}{name}" for name in ("data", "logs")]
    rig.volumes.release(A)
    assert rig.layer.devices == {}
    rig.open(DATA, LOGS)
    assert rig.formatted == rig.layer.made == [f"{prefix(A)}data", f"{prefix(A)}logs"]


def test_a_volume_that_comes_with_an_update_is_made_beside_the_others(rig: Rig) -> None:
    rig.made(DATA)
    rig.open(DATA, LOGS)
    assert rig.formatted == [f"{prefix(A)}logs"]


def test_without_volumes_there_is_nothing_to_do(rig: Rig) -> None:
    assert rig.open(key=b"") == []
    assert rig.content() == {}


def test_files_are_sparse_and_private_whatever_the_umask(rig: Rig) -> None:
    before = os.umask(0)
    try:
        rig.made(VolumeRequest("data", 2**30))
    finally:
        os.umask(before)
    status = rig.file().stat()
    assert (status.st_size, status.st_mode & 0o777) == (2**30 + BLOCK, 0o600)
    assert status.st_blocks * 512 < 1024 * 1024
    assert (rig.directory(A) / LEDGER).stat().st_mode & 0o777 == 0o600


def test_row11_a_lost_key_never_leads_to_new_volumes(rig: Rig) -> None:
    rig.made(DATA)
    before = rig.content()
    for gone in ((), (rig.file(),), (rig.directory(A) / LEDGER,)):
        for path in gone:
            path.rename(rig.home / "aside")
        with pytest.raises(StorageRefusal) as caught:
            rig.prepare(key=OTHER_KEY)
        assert caught.value.code == "volume-key-lost"
        for path in gone:
            (rig.home / "aside").rename(path)
    assert rig.content() == before


def test_a_key_that_was_not_made_durable_can_be_replaced(rig: Rig) -> None:
    rig.prepare(key=OTHER_KEY)
    rig.prepare()
    rig.open(DATA)


def test_row11_the_wrong_key_is_told_from_damage(rig: Rig) -> None:
    rig.made(DATA)
    assert rig.refusal(DATA, key=OTHER_KEY) == "volume-key-wrong"
    assert rig.refusal(DATA, key=KEY[:-1]) == "volume-key-malformed"
    assert rig.refusal(DATA, key=KEY + b"\0") == "volume-key-malformed"


def test_row11_a_lost_ledger_is_a_refusal(rig: Rig) -> None:
    rig.made(DATA)
    (rig.directory(A) / LEDGER).unlink()
    assert rig.refusal(DATA) == "volume-ledger-missing"


def test_row11_a_lost_file_is_a_refusal(rig: Rig) -> None:
    rig.made(DATA, LOGS)
    rig.file("logs").unlink()
    assert rig.refusal(DATA, LOGS) == "volume-missing"


def test_a_lost_directory_is_a_refusal(rig: Rig) -> None:
    rig.made(DATA)
    shutil.move(rig.directory(A), rig.home / "aside")
    assert rig.refusal(DATA) == "volume-ledger-missing"


@pytest.mark.parametrize("size", [SIZE - BLOCK, SIZE + BLOCK, 2**40])
def test_another_size_is_a_refusal(rig: Rig, size: int) -> None:
    rig.made(DATA)
    assert rig.refusal(VolumeRequest("data", size)) == "volume-size-changed"


@pytest.mark.parametrize("size", [0, 1, BLOCK, SIZE, SIZE + BLOCK - 1, SIZE + BLOCK + 1, SIZE + 2 * BLOCK])
def test_row10_a_file_of_another_length_is_a_refusal(rig: Rig, size: int) -> None:
    rig.made(DATA)
    os.truncate(rig.file(), size)
    assert rig.refusal(DATA) == "volume-size-changed"


@pytest.mark.parametrize("place", [0, 8, 9, 20, 511, 512, BLOCK - 1])
def test_row10_a_changed_superblock_is_refused_before_it_is_used(rig: Rig, place: int) -> None:
    rig.made(DATA)
    flip(rig.file(), place)
    assert rig.refusal(DATA) == "volume-superblock-damaged"


def test_row10_a_superblock_of_zeros_is_not_a_new_volume(rig: Rig) -> None:
    rig.made(DATA)
    rig.file().write_bytes(bytes(SIZE + BLOCK))
    assert rig.refusal(DATA) == "volume-superblock-damaged"


def test_row11_files_that_changed_places_do_not_fit(rig: Rig) -> None:
    rig.made(DATA, LOGS)
    swap(rig.file("data"), rig.file("logs"))
    assert rig.refusal(DATA, LOGS) == "volume-superblock-damaged"


def test_row11_files_of_another_container_do_not_fit(rig: Rig) -> None:
    # One key for both: that is how it would look if a key had been imported twice.
    for uuid in (A, B):
        rig.made(DATA, uuid=uuid)
    swap(rig.file(), rig.file(uuid=B))
    assert rig.refusal(DATA) == "volume-superblock-damaged"
    swap(rig.directory(A) / LEDGER, rig.directory(B) / LEDGER)
    assert rig.refusal(DATA) == "volume-key-wrong"


@pytest.mark.parametrize(
    "put", [lambda path: path.write_bytes(b"x"), lambda path: path.symlink_to("data.img")]
)
def test_row11_a_file_that_nobody_knows_is_not_taken_for_a_new_volume(
    rig: Rig, put: Callable[[Path], object]
) -> None:
    rig.made(DATA)
    put(rig.file("logs"))
    assert rig.refusal(DATA, LOGS) == "volume-foreign"


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_row11_only_a_regular_file_is_opened(rig: Rig, kind: str) -> None:
    rig.made(DATA)
    path = rig.file()
    path.rename(rig.home / "aside")
    if kind == "link":
        path.symlink_to(rig.home / "aside")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert rig.refusal(DATA) == "volume-missing"


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row10_any_change_of_the_ledger_is_refused(rig: Rig, data: st.DataObject) -> None:
    ledger = rig.directory(A) / LEDGER
    if not ledger.exists():
        rig.made(DATA)
    good = ledger.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[place] ^= data.draw(st.integers(1, 255))
    cut = good[: data.draw(st.integers(0, len(good) - 1))]
    for bad in (bytes(changed), cut, good + b"\n", bytes(70_000)):
        ledger.write_bytes(bad)
        assert rig.refusal(DATA) in {"volume-ledger-damaged", "volume-key-wrong"}
    ledger.write_bytes(good)
    rig.open(DATA)
    rig.volumes.release(A)


def test_a_ledger_of_a_later_version_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Written by a system whose derivation is the same and whose document is not.
    monkeypatch.setattr(
        "trustme_init.compartments.volume_ledger._body", lambda _: json.dumps({"version": 2}).encode()
    )
    rig.prepare()
    assert rig.refusal(DATA) == "volume-ledger-damaged"


@pytest.mark.parametrize("step", ["make", "format", "complete"])
def test_a_making_that_was_cut_short_is_done_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rig.prepare()
    with monkeypatch.context() as cut:

        def power_off(*_: object) -> None:
            raise KeyboardInterrupt

        if step == "make":
            cut.setattr(rig.layer, "make", power_off)
        elif step == "format":
            cut.setattr(rig.volumes, "_make_file_system", power_off)
        else:
            cut.setattr(Ledger, "complete", power_off)
        with pytest.raises(KeyboardInterrupt):
            rig.open(DATA)
    assert rig.layer.devices == {}
    salt = Ledger.load(rig.directory(A), A, KEY).entries["data"].salt
    rig.open(DATA)
    entry = Ledger.load(rig.directory(A), A, KEY).entries["data"]
    assert entry.ready
    assert entry.salt != salt  # no key is ever used for two makings


def test_row07_no_two_volumes_share_key_material(tmp_path: Path) -> None:
    found: list[bytes] = []
    for number, (uuid, key) in enumerate([(A, KEY), (B, KEY), (A, OTHER_KEY)]):
        directory = tmp_path / str(number)
        directory.mkdir()
        ledger = Ledger.create(directory, uuid, key)
        for name in ("data", "logs"):
            for _ in range(2):
                keys = ledger.keys(name, ledger.begin(name, SIZE))
                found += [keys.encryption[:32], keys.encryption[32:], keys.authentication, keys.journal]
    assert {len(key) for key in found} == {32}
    assert len(set(found)) == len(found) == 48
    assert not {KEY[at : at + 32] for at in range(65)} & set(found)


def test_row29_keys_have_no_text_form(rig: Rig) -> None:
    ledger = Ledger.create(rig.directory(A), A, KEY)
    keys = ledger.keys("data", ledger.begin("data", SIZE))
    assert keys.encryption.hex() not in repr(keys)
    assert repr(keys.encryption) not in repr(keys)
    assert KEY[:16] not in (rig.directory(A) / LEDGER).read_bytes()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errno.ENOSPC, "volume-not-writable"),
        (errno.EROFS, "volume-not-writable"),
        (errno.EBUSY, "volume-busy"),
        (errno.EINVAL, "volume-unavailable"),
    ],
)
def test_what_the_kernel_refuses_has_a_name_and_leaves_nothing_open(rig: Rig, error: int, code: str) -> None:
    rig.made(DATA, LOGS)
    rig.layer.fail_at, rig.layer.error = "logs", error
    assert rig.refusal(DATA, LOGS) == code


def test_a_full_disk_leaves_no_half_volume_that_would_count(rig: Rig) -> None:
    rig.prepare()
    rig.layer.fail_at, rig.layer.error = "data", errno.ENOSPC
    with pytest.raises(StorageRefusal, match="volume-not-writable"):
        rig.open(DATA)
    rig.layer.fail_at = ""
    rig.open(DATA)


@given(st.integers(2, 2**22))
def test_a_file_has_room_for_tags_journal_and_superblock(blocks: int) -> None:
    size = blocks * BLOCK
    more = DeviceMapperLayer().file_size(size) - size
    assert more >= blocks * 32 + journal_size(size) + 4096
    assert more <= blocks * 32 + 2 * 1024 * 1024 + journal_size(size)
    assert journal_size(size) % 512 == 0


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
