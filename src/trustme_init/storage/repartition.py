# SPDX-License-Identifier: Apache-2.0
"""Changing a partition table so that a power cut at any instant leaves the old or the new one.

sfdisk decides what the new table is, but it never sees the disk: it writes both copies without a barrier in
between, so a cut could tear both. It works on a scratch file that holds the table's sectors only; the result
is judged by our parser, must differ from the old table in what was asked for and in nothing else, and is then
copied to the disk, one copy after the other, each synced. The copy that is in use is written last: while it
is torn, the other one is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from trustme_init.errors import StorageRefusal
from trustme_init.linux import loop
from trustme_init.storage import gpt

if TYPE_CHECKING:
    from uuid import UUID

Runner = Callable[[Sequence[str], str, Sequence[int]], None]
"""`(argv, standard input, inherited descriptors)`; StorageRefusal("storage-tool-failed") on failure."""
TOOL_TIMEOUT: Final = 600.0
"""Seconds; formatting a large slow disk is the longest."""
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_SAID_LIMIT: Final = 500
_SFDISK: Final = (
    "sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe=never", "--wipe-partitions=never",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CopyWrite:
    """All sectors of one copy of the new table: (byte offset, content)."""

    pieces: tuple[tuple[int, bytes], ...]


def run_tool(argv: Sequence[str], text: str = "", inherit: Sequence[int] = ()) -> None:
    """Run a disk tool with a fixed environment; what it says last becomes the refusal's evidence."""
    import subprocess  # late: a normal boot runs no tool

    try:
        done = subprocess.run(
            argv,
            input=text.encode(),
            pass_fds=inherit,
            env=_ENVIRONMENT,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=TOOL_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise _tool_failed(argv[0], str(exc)) from exc
    if done.returncode:
        said = done.stderr.decode("utf-8", "backslashreplace").strip()[-_SAID_LIMIT:]
        raise _tool_failed(argv[0], f"exit {done.returncode}: {said}")


def _tool_failed(tool: str, evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "storage-tool-failed",
        f"{tool} could not do its work",
        evidence=evidence.replace("\n", " / "),
        remedy="check the disk and that the boot image holds this tool",
    )


def read_at(fd: int) -> gpt.ReadAt:
    """Return a function that reads exactly `size` bytes at `offset` of `fd`, or raises TableError."""

    def read(offset: int, size: int) -> bytes:
        data = os.pread(fd, size, offset)
        while len(data) < size:
            part = os.pread(fd, size - len(data), offset + len(data))
            if not part:
                raise gpt.TableError(f"the disk ends before byte {offset + size}")
            data += part
        return data

    return read


def plan_append(
    disk: int, table: gpt.Table, extent: gpt.Extent, *, kind: UUID, name: str, run: Runner
) -> tuple[gpt.Table, tuple[CopyWrite, CopyWrite]]:
    """Plan one more partition in `extent` of the disk open as `disk`."""
    script = f'start={extent.first_lba}, size={extent.sectors}, type={kind}, name="{name}"\n'
    new, writes = _plan(disk, table, _Edit(("--append",), (), script), run)
    added = [each for each in new.partitions if each not in table.partitions]
    kept = [each for each in new.partitions if each in table.partitions]
    got = [(each.type_guid, each.name, each.first_lba, each.last_lba) for each in added]
    if kept != list(table.partitions) or got != [(kind, name, *extent)]:
        raise _unexpected(f"asked for {name} at {extent.first_lba}..{extent.last_lba}, got {added}")
    return new, writes


def plan_rename(
    disk: int, table: gpt.Table, number: int, name: str, run: Runner
) -> tuple[gpt.Table, tuple[CopyWrite, CopyWrite]]:
    """Plan that partition `number` shall be called `name` in both copies, whatever the copies say now."""
    new, writes = _plan(disk, table, _Edit(("--part-label",), (str(number), name)), run)
    wanted = tuple(each._replace(name=name) if each.number == number else each for each in table.partitions)
    if new.partitions != wanted:
        raise _unexpected(f"asked for {number} = {name}, got {new.partitions}")
    return new, writes


class _Edit(NamedTuple):
    """What sfdisk is asked for."""

    option: tuple[str, ...]
    arguments: tuple[str, ...]
    """After the device's name."""
    script: str = ""


def _plan(
    disk: int, table: gpt.Table, edit: _Edit, run: Runner
) -> tuple[gpt.Table, tuple[CopyWrite, CopyWrite]]:
    size = table.sector_size
    read_disk = read_at(disk)
    scratch = os.memfd_create("partition-table", os.MFD_CLOEXEC)
    try:
        os.truncate(scratch, table.sectors * size)
        # Only the copy in use: the other one must have no say in the result. LBA 0 is the protective MBR,
        # without which sfdisk takes the disk for an empty one.
        entries = table.header.entries_sectors(size)
        for lba, count in ((0, 1), (table.header.my_lba, 1), (table.header.entries_lba, entries)):
            os.pwrite(scratch, read_disk(lba * size, count * size), lba * size)
        with _named(scratch, size) as (path, inherit):
            run([*_SFDISK, *edit.option, path, *edit.arguments], edit.script, inherit)
        read = read_at(scratch)
        primary = gpt.load_copy(read, 1, sectors=table.sectors, sector_size=size)
        backup = gpt.load_copy(read, table.sectors - 1, sectors=table.sectors, sector_size=size)
        if not gpt.mirrors(primary, backup) or primary.header.disk_guid != table.header.disk_guid:
            raise _unexpected("the copies differ")
        # The protective MBR changes only where the disk has grown since its image was made.
        mbr = (0,) if read(0, size) != read_disk(0, size) else ()
        writes = _copy_write(read, backup, ()), _copy_write(read, primary, mbr)
    except gpt.TableError as exc:
        raise _unexpected(str(exc)) from exc
    finally:
        os.close(scratch)
    return primary, writes if not table.is_backup else (writes[1], writes[0])


@contextmanager
def _named(scratch: int, sector_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give the scratch file a name for sfdisk, and the descriptors it must inherit."""
    if sector_size == 512:
        yield f"/proc/self/fd/{scratch}", (scratch,)
        return
    # sfdisk takes every file for a disk of 512-byte sectors; a loop device can say otherwise.
    with loop.attach(scratch, read_only=False, block_size=sector_size) as device:
        yield str(device.path), ()
        os.fsync(device.fd)


def _copy_write(read: gpt.ReadAt, copy: gpt.Table, more: tuple[int, ...]) -> CopyWrite:
    size, header = copy.sector_size, copy.header
    runs = [
        (header.entries_lba, header.entries_sectors(size)),
        (header.my_lba, 1),
        *((lba, 1) for lba in more),
    ]
    return CopyWrite(tuple((lba * size, read(lba * size, count * size)) for lba, count in runs))


def apply(disk: int, write: CopyWrite) -> None:
    """Write one copy to the disk open as `disk`; durable on return. Raises OSError."""
    for offset, data in write.pieces:
        if os.pwrite(disk, data, offset) != len(data):
            raise OSError(f"short write at byte {offset}")
    os.fsync(disk)


def _unexpected(evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "partition-table-unexpected",
        "sfdisk made another partition table than it was asked for; nothing was written",
        evidence=evidence,
        remedy="write the image to the disk again; if this stays, report the sfdisk version",
    )
