# SPDX-License-Identifier: Apache-2.0
"""The GPT parser against tables made by sfdisk and sgdisk, and against everything else."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustme_init.storage import gpt, layout
from trustme_init.storage.repartition import read_at

SECTORS = 64 * 2048
Fields = dict[str, int]
LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
DISK = UUID("11111111-2222-3333-4444-555555555555")


def run(*argv: str | Path, text: str = "") -> str:
    done = subprocess.run(
        [str(arg) for arg in argv],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blank(path: Path, sectors: int = SECTORS) -> Path:
    with path.open("wb") as file:
        file.truncate(sectors * 512)
    return path


def load_file(path: Path) -> gpt.Table:
    fd = os.open(path, os.O_RDONLY)
    try:
        return gpt.load(read_at(fd), sectors=path.stat().st_size // 512, sector_size=512)
    finally:
        os.close(fd)


def entry(kind: UUID, first: int, last: int, name: str = "") -> bytes:
    text = name.encode("utf-16-le")
    return struct.pack("<16s16sQQQ72s", kind.bytes_le, DISK.bytes_le, first, last, 0, text)


def header(lba: int, alternate: int, entries_lba: int, entries: bytes, other: Fields | None = None) -> bytes:
    """A header by the letter of UEFI 2.10 table 5.5, any of its fields replaceable."""
    fields = {
        "revision": 0x10000, "size": 92, "my_lba": lba, "alternate": alternate, "first": 34,
        "last": SECTORS - 34, "entries_lba": entries_lba, "count": len(entries) // 128, "entry_size": 128,
        "entries_crc": zlib.crc32(entries),
    } | (other or {})  # fmt: skip
    names = ("first", "last")
    body = struct.pack("<8sIIIIQQ", b"EFI PART", fields["revision"], fields["size"], 0, 0,
                       fields["my_lba"], fields["alternate"])  # fmt: skip
    body += struct.pack("<QQ", *(fields[name] for name in names)) + DISK.bytes_le
    body += struct.pack(
        "<QIII", *(fields[name] for name in ("entries_lba", "count", "entry_size", "entries_crc"))
    )
    size = min(max(fields["size"], 16), 512)
    crc = zlib.crc32(body.ljust(512, b"\0")[:size])
    return (body[:16] + struct.pack("<I", fields.get("crc", crc)) + body[20:]).ljust(512, b"\0")


class Disk:
    """A sparse disk in memory, and proof of where the parser looks."""

    def __init__(
        self, *entries: bytes, primary: bool = True, backup: bool = True, other: Fields | None = None
    ) -> None:
        self.sectors: dict[int, bytes] = {}
        self.reads = 0
        array = b"".join(entries).ljust(128 * 128, b"\0")
        last = SECTORS - 1
        if primary:
            self.put(2, array)
            self.put(1, header(1, last, 2, array, other))
        if backup:
            self.put(last - 32, array)
            self.put(last, header(last, 1, last - 32, array))

    def put(self, lba: int, data: bytes) -> None:
        for offset in range(0, len(data), 512):
            self.sectors[lba + offset // 512] = data[offset : offset + 512]

    def read(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= SECTORS * 512
        self.reads += size
        first, end = offset // 512, -(-(offset + size) // 512)
        data = b"".join(self.sectors.get(lba, bytes(512)) for lba in range(first, end))
        return data[offset % 512 :][:size]

    def load(self) -> gpt.Table:
        return gpt.load(self.read, sectors=SECTORS, sector_size=512)


# --- independent tools -------------------------------------------------------------------------------------


def assert_like_sfdisk(image: Path, table: gpt.Table) -> None:
    told = json.loads(run("sfdisk", "--json", image))["partitiontable"]
    assert UUID(told["id"]) == table.header.disk_guid
    assert [
        (
            int(each["node"].removeprefix(str(image))), UUID(each["type"]), UUID(each["uuid"]), each["start"],
            each["start"] + each["size"] - 1, each.get("name", ""),
        )
        for each in told.get("partitions", [])
    ] == [
        (each.number, each.type_guid, each.unique_guid, each.first_lba, each.last_lba, each.name)
        for each in sorted(table.partitions, key=lambda each: each.number)
    ]  # fmt: skip


def test_a_table_made_by_sfdisk(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk")
    run(
        "sfdisk", "--quiet", image,
        text="label: gpt\n"
        f'start=2048, size=8MiB, type={layout.ESP_TYPE}, name="boot"\n'
        f'size=16MiB, type={layout.STORE_TYPE}, name="trustme-store"\n'
        f'size=4MiB, type={layout.DATA_TYPE}, name="Größe"\n',
    )  # fmt: skip
    table = load_file(image)
    assert_like_sfdisk(image, table)
    assert table.copies_agree
    assert [each.name for each in table.partitions] == [
        "boot",
        "trustme-store",
        "Größe",
    ]
    rows = run("sfdisk", "--list-free", "--quiet", image).splitlines()[1:]
    ends = [(free.first_lba, free.last_lba) for free in table.free_extents() if free.sectors >= 2048]
    assert [(int(row.split()[0]), int(row.split()[1])) for row in rows] == ends


def test_a_table_made_by_sgdisk(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk")
    run(
        "sgdisk", "-n", "5:4096:8191", "-c", "5:five", "-t", f"5:{layout.STORE_TYPE}", "-A", "5:set:60",
        "-n", "2:10240:+1M", "-c", f"2:{'n' * 36}", image,
    )  # fmt: skip
    table = load_file(image)
    assert_like_sfdisk(image, table)
    assert [(each.number, each.attributes) for each in table.partitions] == [(2, 0), (5, 1 << 60)]
    assert table.partitions[0].name == "n" * 36
    assert table.copies_agree


def test_a_backup_made_by_sgdisk_stands_in(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk")
    run("sgdisk", "-n", "1:2048:+4M", "-c", "1:only", image)
    whole = load_file(image)
    with image.open("r+b") as file:
        file.seek(512)
        file.write(bytes(33 * 512))
    table = load_file(image)
    assert table.is_backup
    assert not table.copies_agree
    assert table.partitions == whole.partitions


# --- judgement ---------------------------------------------------------------------------------------------

ONE = entry(LINUX, 2048, 4095, "one")


def test_our_own_tables_are_sound() -> None:
    table = Disk(ONE, bytes(128), entry(LINUX, 4096, 4096)).load()
    assert table.copies_agree
    assert [(each.number, each.sectors) for each in table.partitions] == [(1, 2048), (3, 1)]
    assert (table.first_byte(table.partitions[0]), table.size_bytes(table.partitions[0])) == (
        1 << 20,
        1 << 20,
    )


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"crc": 1}, "header CRC"),
        ({"entries_crc": 1}, "entries CRC"),
        ({"my_lba": 2}, "says it is in 2"),
        ({"revision": 0x20000}, "revision"),
        ({"size": 91}, "header size"),
        ({"size": 513}, "header size"),
        ({"entry_size": 127}, "entry size"),
        ({"entry_size": 192}, "entry size"),
        ({"entry_size": 64}, "entry size"),
        ({"entry_size": 8192}, "entry size"),
        ({"count": 0}, "entries of"),
        ({"count": 2**32 - 1}, "entries of"),
        ({"count": 2**31}, "entries of"),
        ({"count": 2049}, "entries of"),
        ({"first": 1}, "usable area"),
        ({"first": 50, "last": 49}, "usable area"),
        ({"last": SECTORS - 1}, "usable area"),
        ({"last": 2**64 - 1}, "usable area"),
        ({"entries_lba": 1}, "overlap header"),
        ({"entries_lba": 0}, "overlap header"),
        ({"entries_lba": 3}, "overlap header"),
        ({"entries_lba": 2**64 - 1}, "overlap header"),
        ({"entries_lba": SECTORS - 33}, "overlap header"),
    ],
)
def test_an_unsound_header_is_not_used(other: Fields, reason: str) -> None:
    disk = Disk(ONE, other=other)
    table = disk.load()
    assert table.is_backup
    assert reason in table.primary_error
    with pytest.raises(gpt.TableError, match=reason):
        Disk(ONE, backup=False, other=other).load()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([entry(LINUX, 33, 40)], "leaves the usable"),
        ([entry(LINUX, 40, SECTORS - 33)], "leaves the usable"),
        ([entry(LINUX, 41, 40)], "leaves the usable"),
        ([entry(LINUX, 40, 2**64 - 1)], "leaves the usable"),
        ([entry(LINUX, 100, 200), entry(LINUX, 200, 300)], "overlap"),
        ([entry(LINUX, 100, 400), entry(LINUX, 200, 300)], "overlap"),
    ],
)
def test_unsound_entries_are_not_used(entries: list[bytes], reason: str) -> None:
    with pytest.raises(gpt.TableError, match=reason):
        Disk(*entries).load()


def test_no_table_and_a_damaged_table_are_told_apart() -> None:
    with pytest.raises(gpt.NoTableError):
        Disk(primary=False, backup=False).load()
    with pytest.raises(gpt.TableError) as caught:
        Disk(ONE, backup=False, other={"crc": 1}).load()
    assert not isinstance(caught.value, gpt.NoTableError)


@pytest.mark.parametrize(("sectors", "size"), [(5, 512), (0, 512), (SECTORS, 520), (SECTORS, 0)])
def test_what_is_no_disk_for_a_table(sectors: int, size: int) -> None:
    with pytest.raises(gpt.NoTableError):
        gpt.load(Disk(ONE).read, sectors=sectors, sector_size=size)


def test_the_primary_decides_and_the_difference_is_told() -> None:
    disk = Disk(ONE)
    other = Disk(entry(LINUX, 2048, 4095, "other"))
    disk.sectors |= {lba: data for lba, data in other.sectors.items() if lba > SECTORS // 2}
    table = disk.load()
    assert [each.name for each in table.partitions] == ["one"]
    assert not table.copies_agree
    assert "differs" in table.backup_error


def test_a_backup_that_points_elsewhere_is_no_mirror() -> None:
    disk = Disk(ONE)
    last = SECTORS - 1
    array = disk.read((last - 32) * 512, 32 * 512)
    disk.put(last, header(last, 7, last - 32, array))
    assert not disk.load().copies_agree


def test_half_a_surrogate_pair_is_no_name_of_ours() -> None:
    raw = bytearray(entry(LINUX, 2048, 4095, "trustme-store"))
    raw[56 + 26 : 56 + 28] = b"\x00\xd8"
    assert Disk(bytes(raw)).load().partitions[0].name != "trustme-store"


def test_free_extents_reach_the_end_of_a_disk_that_grew() -> None:
    table = Disk(ONE, entry(LINUX, 5000, 5999)).load()
    assert [tuple(each) for each in table.free_extents()] == [(34, 2047), (4096, 4999), (6000, SECTORS - 34)]
    grown = replace(table, sectors=SECTORS + 1000)
    assert grown.free_extents()[-1].last_lba == SECTORS + 1000 - 34


@settings(max_examples=300)
@given(st.data())
def test_any_flipped_byte_of_one_copy_changes_nothing(data: st.DataObject) -> None:
    disk = Disk(ONE, entry(LINUX, 4096, 9999, "two"))
    whole = disk.load()
    lba = data.draw(st.sampled_from([1, 2, 33, SECTORS - 1, SECTORS - 33, SECTORS - 2]))
    # Bytes of a header's sector behind the header (offset 92) belong to nobody.
    offset = data.draw(st.integers(0, 91 if lba in {1, SECTORS - 1} else 511))
    raw = bytearray(disk.read(lba * 512, 512))
    raw[offset] ^= data.draw(st.integers(1, 255))
    disk.put(lba, bytes(raw))
    table = disk.load()
    assert table.partitions == whole.partitions
    assert not table.copies_agree
    assert table.is_backup is (lba < 100)


@settings(max_examples=300)
@given(st.binary(max_size=600), st.binary(max_size=600), st.sampled_from([b"", b"EFI PART"]))
def test_garbage_is_refused_within_bounds(first: bytes, last: bytes, prefix: bytes) -> None:
    disk = Disk(primary=False, backup=False)
    disk.put(1, (prefix + first).ljust(1024, b"\0")[:1024])
    disk.put(SECTORS - 1, (prefix + last).ljust(512, b"\0")[:512])
    with pytest.raises(gpt.TableError):
        disk.load()
    assert disk.reads <= 2 * (512 + gpt.ENTRIES_SIZE_MAX)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.integers(0, 200), st.integers(0, limit), st.integers(SECTORS - 200, SECTORS))
            for name, limit in (
                ("my_lba", 2**64 - 1), ("alternate", 2**64 - 1), ("first", 2**64 - 1), ("last", 2**64 - 1),
                ("entries_lba", 2**64 - 1), ("count", 2**32 - 1), ("entry_size", 2**32 - 1),
                ("size", 2**32 - 1), ("entries_crc", 2**32 - 1),
            )
        },
    )
)  # fmt: skip
def test_any_header_with_a_good_crc_is_sound_or_refused(fields: Fields) -> None:
    disk = Disk(ONE, backup=False, other=fields)
    try:
        table = disk.load()
    except gpt.TableError:
        return
    finally:
        assert disk.reads <= 2 * (512 + gpt.ENTRIES_SIZE_MAX)
    for partition in table.partitions:
        assert 2 <= partition.first_lba <= partition.last_lba < SECTORS - 1


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(34, SECTORS - 34), st.integers(1, 4000)), max_size=12))
def test_partitions_and_free_extents_tile_the_usable_area(wanted: list[tuple[int, int]]) -> None:
    runs: list[tuple[int, int]] = []
    for first, length in sorted(wanted):
        if first + length - 1 <= SECTORS - 34 and (not runs or first > runs[-1][1]):
            runs.append((first, first + length - 1))
    table = Disk(*(entry(LINUX, *each) for each in reversed(runs))).load()
    pieces = sorted([*runs, *(tuple(each) for each in table.free_extents())])
    assert pieces[0][0] == 34
    assert pieces[-1][1] == SECTORS - 34
    assert all(left[1] + 1 == right[0] for left, right in pairwise(pieces))
