# SPDX-License-Identifier: Apache-2.0
"""The store (signed GuestOSes, read-only) and the data volume (made on first boot).

Rules:
- The store is the one partition, of all disks, that has the store's type and name. None or two is a refusal.
- Only a partition named `trustme-data.new` is ever formatted; the rename to `trustme-data` is the commit
  point. Both copies of the partition table say `trustme-data` before the volume is first used: a later loss
  of either copy can then never make it look unfinished.
- Sound volumes are opened without running any tool and without writing to the partition table.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from uuid import UUID

from trustme_init.errors import DeviceRefusal, StorageRefusal
from trustme_init.linux import block
from trustme_init.linux.mount import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    fsopen_mount,
    move_mount,
)
from trustme_init.storage import gpt, layout, repartition

if TYPE_CHECKING:
    from trustme_init.machine import Machine

_STRICT: Final = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
_ST_STRICT: Final = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
_REWRITE: Final = "write the image to the disk again"


@dataclass(frozen=True, slots=True)
class StorePartition:
    """Where the store is; offsets in bytes from the start of `disk`."""

    disk: Path
    number: int
    first_byte: int
    size_bytes: int
    unique_guid: UUID


@dataclass(frozen=True, slots=True)
class MountedData:
    """The data volume in use."""

    path: Path
    created: bool
    """It was made by this boot: a first boot, or the first one that came to its end."""
    repaired: bool = False
    """One copy of the partition table was damaged or stale and has been written again."""


class DataVolume(Protocol):
    """What holds everything that changes on a device."""

    def exists(self, disk: Path) -> bool:
        """Return whether `disk` has a complete data volume."""
        ...

    def open_or_create(self, disk: Path) -> MountedData:
        """Mount the data volume of `disk`, making it first where there is none."""
        ...


class Step(IntEnum):
    """What `PlainExt4DataVolume` does on a first boot, in order.

    A power cut before, in or after any is safe.
    """

    TABLE_ONE_COPY = 1
    """The partition, named `.new`, is in the copy of the table that is not in use."""
    TABLE_BOTH_COPIES = 2
    NODE = 3
    FORMAT = 4
    SYNC = 5
    COMMIT_ONE_COPY = 6
    COMMIT_BOTH_COPIES = 7
    MOUNT = 8


def read_table(disk: Path) -> gpt.Table:
    """Return the partition table of a disk. Raises gpt.TableError, OSError."""
    with _opened(disk, os.O_RDONLY) as fd:
        return _table(fd)


def find_store(machine: Machine) -> StorePartition:
    """Find the one store partition.

    Raises StorageRefusal: "store-missing", "store-ambiguous", or "partition-table-damaged" where none was
    found and some disk's table could not be read.
    """
    found: list[StorePartition] = []
    seen: list[str] = []
    damaged: list[str] = []
    for disk in machine.block.disks():
        try:
            table = read_table(disk)
        except gpt.NoTableError:
            seen.append(f"{disk}: no GPT")
        except (gpt.TableError, OSError) as exc:
            damaged.append(f"{disk}: {exc}")
        else:
            names = ", ".join(ascii(each.name) for each in table.partitions)
            seen.append(f"{disk}: {names or 'no partitions'}")
            found += [
                StorePartition(
                    disk, each.number, table.first_byte(each), table.size_bytes(each), each.unique_guid
                )
                for each in table.partitions
                if (each.type_guid, each.name) == (layout.STORE_TYPE, layout.STORE_NAME)
            ]
    if len(found) == 1:
        return found[0]
    if found:
        raise StorageRefusal(
            "store-ambiguous",
            f"{len(found)} partitions claim to be {layout.STORE_NAME}",
            evidence=", ".join(f"{each.disk} partition {each.number}" for each in found),
            remedy="remove the disk that does not belong to this device",
        )
    if damaged:
        raise StorageRefusal(
            "partition-table-damaged",
            "no store was found, and a disk's partition table is damaged",
            evidence="; ".join(damaged),
            remedy=_REWRITE,
        )
    raise StorageRefusal(
        "store-missing",
        f"no disk has a partition {layout.STORE_NAME} of type {layout.STORE_TYPE}",
        evidence="; ".join(seen) or "no disks",
        remedy=f"{_REWRITE}; check that the disk's driver is in the boot image",
    )


def mount_store(machine: Machine, store: StorePartition) -> Path:
    """Mount the store read-only and return where; done already, it is only checked.

    A clean file system is not written to. One whose last writer was cut off has its journal replayed, so no
    `noload`: without the replay an update that was reported durable could vanish again, and half of another
    one be seen. Where the device itself is read-only the kernel cannot replay and refuses, and so do we. What
    is read is verified file by file in any case.

    Raises StorageRefusal: "store-damaged", "mount-point-busy"; DeviceRefusal: "partition-node-missing",
    "filesystem-unsupported".
    """
    node = machine.block.partition_device(store.disk, store.number, store.first_byte, store.size_bytes)
    _mount(
        node,
        machine.store,
        attributes=_STRICT | MOUNT_ATTR_NOSYMFOLLOW | MOUNT_ATTR_RDONLY,
        damaged=lambda evidence: StorageRefusal(
            "store-damaged", "the store partition cannot be mounted", evidence=evidence, remedy=_REWRITE
        ),
    )
    return machine.store


def _no_step(_: Step) -> None:
    pass


class PlainExt4DataVolume:
    """An unencrypted ext4 partition in the free space of the store's disk.

    `run` runs sfdisk and mkfs.ext4. `before` is called with each step of a creation before it is done: tests
    raise from either to cut the power there; nothing can be skipped by them.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        run: repartition.Runner = repartition.run_tool,
        before: Callable[[Step], None] = _no_step,
    ) -> None:
        self._machine = machine
        self._run = run
        self._before = before

    def exists(self, disk: Path) -> bool:
        """Return whether `disk` has a complete data volume.

        Raises StorageRefusal: "partition-table-damaged", "data-volume-ambiguous", "data-volume-foreign".
        """
        partition = _data_partition(disk, _read(disk))
        return partition is not None and partition.name == layout.DATA_NAME

    def open_or_create(self, disk: Path) -> MountedData:
        """Mount the data volume of `disk`; make it if there is none or its making was cut short.

        Raises StorageRefusal: "data-volume-ambiguous", "data-volume-foreign", "data-volume-damaged" (complete
        but not to be mounted: never formatted), "no-space-for-data-volume", "partition-table-damaged",
        "disk-not-writable", "storage-tool-failed", "partition-table-unexpected", "mount-point-busy";
        DeviceRefusal as `mount_store`.
        """
        table = _read(disk)
        repaired = not table.copies_agree
        partition = _data_partition(disk, table)
        created = partition is None or partition.name == layout.DATA_NAME_NEW
        if created or repaired:
            with _writable(disk) as fd:
                if partition is None:
                    table = self._append(fd, disk, table)
                elif repaired:
                    table = self._name(fd, table, partition, partition.name)
                if created:
                    table = self._make(fd, disk, table)
                partition = _data_partition(disk, table)
        if partition is None or partition.name != layout.DATA_NAME:
            raise AssertionError("a data volume that is not complete must never be mounted")
        node = self._node(disk, table, partition)
        self._before(Step.MOUNT)
        _mount(
            node,
            self._machine.data,
            attributes=_STRICT,
            damaged=lambda evidence: StorageRefusal(
                "data-volume-damaged",
                "the data volume cannot be mounted; it is left as it is",
                evidence=evidence,
                remedy="repair it from a rescue system (e2fsck), or wipe the device to start anew",
            ),
        )
        return MountedData(self._machine.data, created, repaired)

    def _append(self, fd: int, disk: Path, table: gpt.Table) -> gpt.Table:
        extent = _largest_free(table)
        if extent is None:
            raise StorageRefusal(
                "no-space-for-data-volume",
                f"less than {layout.DATA_SIZE_MIN // layout.MIB} MiB in one piece are free on the disk",
                evidence=f"{disk}: free "
                + (
                    ", ".join(f"{e.sectors * table.sector_size} bytes" for e in table.free_extents())
                    or "nothing"
                ),
                remedy="use a larger disk",
            )
        new, writes = repartition.plan_append(
            fd, table, extent, kind=layout.DATA_TYPE, name=layout.DATA_NAME_NEW, run=self._run
        )
        self._before(Step.TABLE_ONE_COPY)
        repartition.apply(fd, writes[0])
        self._before(Step.TABLE_BOTH_COPIES)
        repartition.apply(fd, writes[1])
        return new

    def _make(self, fd: int, disk: Path, table: gpt.Table) -> gpt.Table:
        """Format the unfinished partition, then commit it."""
        partition = _data_partition(disk, table)
        if partition is None or partition.name != layout.DATA_NAME_NEW or not table.copies_agree:
            raise AssertionError("only a partition that both copies call unfinished is ever formatted")
        self._before(Step.NODE)
        self._machine.block.settle(disk)
        node = self._node(disk, table, partition)
        self._before(Step.FORMAT)
        # Inode tables are zeroed by the kernel later (their checksums make that safe), which a large disk
        # needs to be quick; the journal is zeroed now, as it must not hold an older file system's
        # transactions.
        features = "lazy_itable_init=1,lazy_journal_init=0,discard"
        self._run(
            [
                "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "1", "-O", "metadata_csum,64bit",
                "-L", layout.DATA_NAME, "-E", features, str(node),
            ],
            "",
            (),
        )  # fmt: skip
        self._before(Step.SYNC)
        with _opened(node, os.O_RDWR) as volume:
            os.fsync(volume)
        return self._name(fd, table, partition, layout.DATA_NAME)

    def _name(self, fd: int, table: gpt.Table, partition: gpt.Partition, name: str) -> gpt.Table:
        new, writes = repartition.plan_rename(fd, table, partition.number, name, self._run)
        self._before(Step.COMMIT_ONE_COPY)
        repartition.apply(fd, writes[0])
        self._before(Step.COMMIT_BOTH_COPIES)
        repartition.apply(fd, writes[1])
        return new

    def _node(self, disk: Path, table: gpt.Table, partition: gpt.Partition) -> Path:
        return self._machine.block.partition_device(
            disk, partition.number, table.first_byte(partition), table.size_bytes(partition)
        )


def _read(disk: Path) -> gpt.Table:
    try:
        return read_table(disk)
    except (gpt.TableError, OSError) as exc:
        raise StorageRefusal(
            "partition-table-damaged",
            "the partition table of the store's disk cannot be read",
            evidence=f"{disk}: {exc}",
            remedy=_REWRITE,
        ) from exc


def _data_partition(disk: Path, table: gpt.Table) -> gpt.Partition | None:
    names = {layout.DATA_NAME, layout.DATA_NAME_NEW}
    found = [each for each in table.partitions if each.type_guid == layout.DATA_TYPE or each.name in names]
    if not found:
        return None
    evidence = ", ".join(f"{disk} partition {each.number} {each.name!a}" for each in found)
    if len(found) > 1:
        raise StorageRefusal(
            "data-volume-ambiguous",
            f"{len(found)} partitions claim to be the data volume",
            evidence=evidence,
            remedy="delete the one that does not belong to this device",
        )
    if found[0].type_guid != layout.DATA_TYPE or found[0].name not in names:
        raise StorageRefusal(
            "data-volume-foreign",
            "a partition has the data volume's name or its type, but not both",
            evidence=f"{evidence}, type {found[0].type_guid}",
            remedy="delete or rename this partition",
        )
    return found[0]


def _largest_free(table: gpt.Table) -> gpt.Extent | None:
    """Return the largest aligned free piece, if it is large enough."""
    unit = layout.ALIGNMENT // table.sector_size
    best: gpt.Extent | None = None
    for free in table.free_extents():
        start = -(-free.first_lba // unit) * unit
        end = (free.last_lba + 1) // unit * unit
        sectors = end - start
        if sectors * table.sector_size >= layout.DATA_SIZE_MIN and (best is None or sectors > best.sectors):
            best = gpt.Extent(start, end - 1)
    return best


def _table(fd: int) -> gpt.Table:
    size = block.sector_size(fd)
    return gpt.load(repartition.read_at(fd), sectors=block.device_size(fd) // size, sector_size=size)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _writable(disk: Path) -> Iterator[int]:
    try:
        with _opened(disk, os.O_RDWR) as fd:
            yield fd
    except OSError as exc:
        raise _not_writable(f"{disk}: {exc.strerror}") from exc


def _not_writable(evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "disk-not-writable",
        "the disk cannot be written to",
        evidence=evidence,
        remedy="remove its write protection; if it has none, replace the disk",
    )


def _mount(node: Path, target: Path, *, attributes: int, damaged: Callable[[str], StorageRefusal]) -> None:
    read_only = bool(attributes & MOUNT_ATTR_RDONLY)
    target.mkdir(parents=True, exist_ok=True)
    if target.is_mount():
        _check_mounted(node, target, read_only=read_only)
        return
    options: dict[str, str | None] = {"errors": "remount-ro"}
    if read_only:
        # The attribute is the mount's alone; without this the file system itself would be open for writing.
        options["ro"] = None
    try:
        fd = fsopen_mount("ext4", source=str(node), options=options, attrs=attributes)
    except OSError as exc:
        evidence = f"{node}: {exc.strerror}"
        if exc.errno == errno.ENODEV:
            raise DeviceRefusal(
                "filesystem-unsupported",
                "the kernel has no ext4",
                evidence=evidence,
                remedy="add ext4 to the kernel or its module to the boot image",
            ) from exc
        if exc.errno in {errno.ENOENT, errno.ENXIO, errno.ENOTBLK}:
            raise DeviceRefusal(
                "partition-node-missing",
                "a partition's device node is gone",
                evidence=evidence,
                remedy="check the disk's connection",
            ) from exc
        if exc.errno in {errno.EROFS, errno.EACCES} and not read_only:
            raise _not_writable(evidence) from exc
        raise damaged(evidence) from exc
    try:
        move_mount(fd, target)
    finally:
        os.close(fd)


def _check_mounted(node: Path, target: Path, *, read_only: bool) -> None:
    """Accept what an earlier run of the manager mounted, if it is exactly that."""
    flags = os.statvfs(target).f_flag
    same = target.stat().st_dev == node.stat().st_rdev
    strict = flags & _ST_STRICT == _ST_STRICT
    if not same or not strict or bool(flags & os.ST_RDONLY) != read_only:
        raise StorageRefusal(
            "mount-point-busy",
            f"something else is mounted at {target}",
            evidence=f"device {target.stat().st_dev:#x}, flags {flags:#x}, wanted {node}",
            remedy="restart the device",
        )
