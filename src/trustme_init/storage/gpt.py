# SPDX-License-Identifier: Apache-2.0
"""GUID partition tables (UEFI 2.10, section 5.3), read and judged; never written here.

Rules:
- Nothing of a table is used unless the CRCs of its header and of its entries fit, it lies where it says, all
  its numbers are within the disk and partitions neither overlap nor leave the usable area.
- The primary table (LBA 1) is used if sound, else the backup in the last LBA. This is what the kernel does
  when started with `gpt`; its other source for the backup, the primary's own pointer, is no evidence once the
  primary is unsound.
- Sizes are bounded before anything is read or allocated for them.

`ReadAt` is `(offset, size) -> bytes`: the parser itself opens nothing.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NamedTuple
from uuid import UUID

ReadAt = Callable[[int, int], bytes]

SIGNATURE: Final = b"EFI PART"
REVISION: Final = 0x00010000
HEADER_SIZE_MIN: Final = 92
ENTRY_SIZE_MIN: Final = 128
ENTRY_SIZE_MAX: Final = 4096
ENTRIES_SIZE_MAX: Final = 256 * 1024
"""Bytes of the entry array; the usual one (128 entries of 128 bytes) has 16 KiB."""
SECTOR_SIZES: Final = (512, 1024, 2048, 4096)

# signature, revision, header size, CRC, reserved, my LBA, alternate LBA, first usable, last usable, disk
# GUID, entries LBA, entry count, entry size, entries CRC
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
# type GUID, unique GUID, first LBA, last LBA, attributes, name (UTF-16LE)
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")


class TableError(ValueError):
    """One copy of a table is not to be used; says why."""


class NoTableError(TableError):
    """There is no sign of a GPT where one would be: another kind of disk, or an empty one."""


class Partition(NamedTuple):
    """One used entry; LBAs are inclusive and in units of the table's sector size."""

    number: int
    """1-based position in the array, as the kernel counts."""
    type_guid: UUID
    unique_guid: UUID
    first_lba: int
    last_lba: int
    name: str
    attributes: int

    @property
    def sectors(self) -> int:
        """Length in sectors."""
        return self.last_lba - self.first_lba + 1


class Extent(NamedTuple):
    """A run of sectors, inclusive."""

    first_lba: int
    last_lba: int

    @property
    def sectors(self) -> int:
        """Length in sectors."""
        return self.last_lba - self.first_lba + 1


@dataclass(frozen=True, slots=True)
class Header:
    """A header whose own CRC and numbers are sound; its entries are not judged yet."""

    my_lba: int
    alternate_lba: int
    first_usable_lba: int
    last_usable_lba: int
    disk_guid: UUID
    entries_lba: int
    entry_count: int
    entry_size: int
    entries_crc: int

    @property
    def entries_size(self) -> int:
        """Bytes of the entry array."""
        return self.entry_count * self.entry_size

    def entries_sectors(self, sector_size: int) -> int:
        """Sectors that the entry array takes."""
        return -(-self.entries_size // sector_size)


@dataclass(frozen=True, slots=True)
class Table:
    """A sound table."""

    header: Header
    partitions: tuple[Partition, ...]
    sector_size: int
    sectors: int
    """Length of the disk."""
    primary_error: str = ""
    """Why the primary copy is not used or cannot be relied upon; empty if it is this one."""
    backup_error: str = ""
    """Why the backup copy is no copy of this; empty if it is one."""

    @property
    def is_backup(self) -> bool:
        """Whether this was read from the backup copy."""
        return bool(self.primary_error)

    @property
    def copies_agree(self) -> bool:
        """Whether losing either copy would lose nothing."""
        return not self.primary_error and not self.backup_error

    def first_byte(self, partition: Partition) -> int:
        """Byte at which a partition starts."""
        return partition.first_lba * self.sector_size

    def size_bytes(self, partition: Partition) -> int:
        """Bytes of a partition."""
        return partition.sectors * self.sector_size

    def free_extents(self) -> tuple[Extent, ...]:
        """Return the runs of sectors no partition uses, in order.

        They reach to the end of the disk even where the table does not yet: an image written onto a larger
        disk has its backup in the middle, and every partitioning tool moves that on its next write.
        """
        last_usable = max(
            self.header.last_usable_lba,
            self.sectors - 2 - self.header.entries_sectors(self.sector_size),
        )
        free: list[Extent] = []
        start = self.header.first_usable_lba
        for partition in sorted(self.partitions, key=lambda each: each.first_lba):
            if partition.first_lba > start:
                free.append(Extent(start, partition.first_lba - 1))
            start = partition.last_lba + 1
        if start <= last_usable:
            free.append(Extent(start, last_usable))
        return tuple(free)


def load(read: ReadAt, *, sectors: int, sector_size: int) -> Table:
    """Read and judge the table of a disk of `sectors` sectors.

    Raises NoTableError if neither place holds anything like a GPT, TableError (naming both reasons) if no
    copy is sound, and OSError as `read` does.
    """
    if sector_size not in SECTOR_SIZES:
        raise NoTableError(f"sector size {sector_size} is not one of {SECTOR_SIZES}")
    if sectors < 6:
        raise NoTableError(f"a disk of {sectors} sectors has no room for a partition table")
    last = sectors - 1
    copies: list[Table | None] = []
    errors: list[TableError | None] = []
    for lba in (1, last):
        try:
            copies.append(load_copy(read, lba, sectors=sectors, sector_size=sector_size))
            errors.append(None)
        except TableError as exc:
            copies.append(None)
            errors.append(exc)
    primary, backup = copies
    if primary is not None:
        error = errors[1] or ("" if backup and mirrors(primary, backup) else "differs from the primary")
        return replace(primary, backup_error=str(error))
    if backup is not None:
        return replace(backup, primary_error=str(errors[0]))
    kind = NoTableError if all(isinstance(error, NoTableError) for error in errors) else TableError
    raise kind(f"primary: {errors[0]}; backup: {errors[1]}")


def load_copy(read: ReadAt, lba: int, *, sectors: int, sector_size: int) -> Table:
    """Read and judge the one copy whose header is in `lba`: 1 or the last. Raises TableError."""
    header = parse_header(read(lba * sector_size, sector_size), lba=lba, last_lba=sectors - 1)
    partitions = parse_entries(read(header.entries_lba * sector_size, header.entries_size), header)
    return Table(header, partitions, sector_size, sectors)


def mirrors(primary: Table, backup: Table) -> bool:
    """Whether two copies say the same and point at one another."""
    as_primary = replace(
        backup.header,
        my_lba=backup.header.alternate_lba,
        alternate_lba=backup.header.my_lba,
        entries_lba=primary.header.entries_lba,
    )
    return as_primary == primary.header and backup.partitions == primary.partitions


def parse_header(sector: bytes, *, lba: int, last_lba: int) -> Header:
    """Judge one header: `sector` is the whole sector at `lba` of a disk that ends with `last_lba`."""
    if len(sector) < HEADER_SIZE_MIN or sector[: len(SIGNATURE)] != SIGNATURE:
        raise NoTableError(f"no GPT signature in LBA {lba}")
    (
        _, revision, size, crc, _, my_lba, alternate, first, last, disk_guid,
        entries_lba, entry_count, entry_size, entries_crc,
    ) = _HEADER.unpack_from(sector)  # fmt: skip
    if revision != REVISION:
        raise TableError(f"revision {revision:#x} is not {REVISION:#x}")
    if not HEADER_SIZE_MIN <= size <= len(sector):
        raise TableError(f"header size {size} is outside {HEADER_SIZE_MIN}..{len(sector)}")
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:size]) != crc:
        raise TableError("header CRC does not fit")
    if my_lba != lba:
        raise TableError(f"header in LBA {lba} says it is in {my_lba}")
    if entry_size & (entry_size - 1) or not ENTRY_SIZE_MIN <= entry_size <= ENTRY_SIZE_MAX:
        raise TableError(f"entry size {entry_size} is not a power of 2 in {ENTRY_SIZE_MIN}..{ENTRY_SIZE_MAX}")
    if not 0 < entry_count * entry_size <= ENTRIES_SIZE_MAX:
        raise TableError(f"{entry_count} entries of {entry_size} bytes, limit {ENTRIES_SIZE_MAX} bytes")
    header = Header(
        my_lba=my_lba,
        alternate_lba=alternate,
        first_usable_lba=first,
        last_usable_lba=last,
        disk_guid=UUID(bytes_le=disk_guid),
        entries_lba=entries_lba,
        entry_count=entry_count,
        entry_size=entry_size,
        entries_crc=entries_crc,
    )
    entries_end = entries_lba + header.entries_sectors(len(sector)) - 1
    if not 2 <= first <= last < last_lba:
        raise TableError(f"usable area {first}..{last} is not inside 2..{last_lba - 1}")
    before = lba < entries_lba <= entries_end < first
    behind = last < entries_lba <= entries_end < lba
    if not (before if lba == 1 else behind):
        raise TableError(f"entries in {entries_lba}..{entries_end} overlap header or usable area")
    return header


def parse_entries(data: bytes, header: Header) -> tuple[Partition, ...]:
    """Judge the entry array of a sound header; used entries only, in order of number."""
    if len(data) != header.entries_size:
        raise TableError(f"{len(data)} bytes of entries, not {header.entries_size}")
    if zlib.crc32(data) != header.entries_crc:
        raise TableError("entries CRC does not fit")
    partitions: list[Partition] = []
    for index in range(header.entry_count):
        kind, unique, first, last, attributes, name = _ENTRY.unpack_from(data, index * header.entry_size)
        if not any(kind):
            continue
        number = index + 1
        if not header.first_usable_lba <= first <= last <= header.last_usable_lba:
            raise TableError(f"partition {number} at {first}..{last} leaves the usable area")
        partitions.append(
            Partition(
                number, UUID(bytes_le=kind), UUID(bytes_le=unique), first, last, _text(name), attributes
            )
        )
    by_start = sorted(partitions, key=lambda each: each.first_lba)
    for left, right in pairwise(by_start):
        if right.first_lba <= left.last_lba:
            raise TableError(f"partitions {left.number} and {right.number} overlap")
    return tuple(partitions)


def _text(name: bytes) -> str:
    # Half a surrogate pair is legal to the format; it must not be equal to any name we look for, nor raise.
    return name.decode("utf-16-le", "replace").partition("\0")[0]
