# SPDX-License-Identifier: Apache-2.0
"""Disks and partitions as the kernel presents them in sysfs and /dev.

Rules of `KernelBlockLayer`:
- A disk is a block device with hardware behind it: never a partition, and nothing of
  /sys/devices/virtual/block (loop, ram, zram, dm, md, nbd). A disk image inside a container image can thus
  never be taken for a disk.
- A partition is found by where it starts and how long it is, never by its number or name alone.
- Nothing sleeps or polls: what is missing is awaited by uevents, within a time limit.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Final, NamedTuple

from trustme_init.errors import DeviceRefusal
from trustme_init.linux import uevent

# include/uapi/linux/fs.h, include/uapi/linux/blkpg.h
BLKROGET: Final = 0x125E
BLKRRPART: Final = 0x125F
BLKSSZGET: Final = 0x1268
BLKPG: Final = 0x1269
BLKGETSIZE64: Final = 0x80081272
BLKPG_ADD_PARTITION: Final = 1
BLKPG_DEL_PARTITION: Final = 2

SECTOR: Final = 512
"""sysfs counts in these, whatever the disk's own sector size."""
PARTITION_TIMEOUT: Final = 10.0
"""Seconds for a partition's node to appear; the kernel makes it within a few milliseconds of the disk's."""

# start, length, pno, devname, volname
_BLKPG_PARTITION: Final = struct.Struct("=qqi64s64s4x")


class Node(NamedTuple):
    """A block device in sysfs."""

    name: str
    device: int
    """As st_rdev."""
    start: int
    """First byte on its disk; 0 for a disk."""
    size: int
    number: int
    """Partition number; 0 for a disk."""
    virtual: bool
    hidden: bool


def decode_device(encoded: int) -> int:
    """Translate the kernel's huge_encode_dev (include/linux/kdev_t.h) to what os.stat calls st_dev."""
    return os.makedev((encoded & 0xFFF00) >> 8, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00))


def device_size(fd: int) -> int:
    """Return the size in bytes of the block device open as `fd`. Raises OSError."""
    buffer = bytearray(8)
    fcntl.ioctl(fd, BLKGETSIZE64, buffer)
    return int.from_bytes(buffer, "little")


def sector_size(fd: int) -> int:
    """Return the logical sector size in bytes, the unit of a partition table's addresses. Raises OSError."""
    buffer = bytearray(4)
    fcntl.ioctl(fd, BLKSSZGET, buffer)
    return int.from_bytes(buffer, "little")


def is_read_only(fd: int) -> bool:
    """Whether the kernel refuses to write to the block device open as `fd`. Raises OSError."""
    buffer = bytearray(4)
    fcntl.ioctl(fd, BLKROGET, buffer)
    return any(buffer)


def reread_partitions(fd: int) -> None:
    """Make the kernel read the table again. OSError(EBUSY) while a partition of the disk is in use."""
    fcntl.ioctl(fd, BLKRRPART, 0)


def blkpg_add_partition(fd: int, number: int, first_byte: int, size: int) -> None:
    """Tell the kernel of one partition, in bytes. OSError(EBUSY) if it overlaps one the kernel has."""
    _blkpg(fd, BLKPG_ADD_PARTITION, number, first_byte, size)


def blkpg_del_partition(fd: int, number: int) -> None:
    """Make the kernel forget one partition. OSError: EBUSY while in use, ENXIO if there is none."""
    _blkpg(fd, BLKPG_DEL_PARTITION, number, 0, 0)


def _blkpg(fd: int, operation: int, number: int, first_byte: int, size: int) -> None:
    import ctypes  # late: only a partition the kernel has not found itself needs it

    class Argument(ctypes.Structure):
        # struct blkpg_ioctl_arg holds a pointer, so struct.pack alone cannot make it
        _fields_ = (
            ("op", ctypes.c_int),
            ("flags", ctypes.c_int),
            ("datalen", ctypes.c_int),
            ("data", ctypes.c_void_p),
        )

    partition = ctypes.create_string_buffer(_BLKPG_PARTITION.pack(first_byte, size, number, b"", b""))
    argument = Argument(operation, 0, _BLKPG_PARTITION.size, ctypes.addressof(partition))
    fcntl.ioctl(fd, BLKPG, bytes(argument))


def read_node(directory: Path) -> Node | None:
    """Return the facts of one /sys/class/block entry; None if it vanishes meanwhile."""
    try:
        real = directory.resolve(strict=True)
        major, _, minor = _attribute(real, "dev").partition(":")
        return Node(
            name=directory.name,
            device=os.makedev(int(major), int(minor)),
            start=int(_attribute(real, "start", "0")) * SECTOR,
            size=int(_attribute(real, "size")) * SECTOR,
            number=int(_attribute(real, "partition", "0")),
            virtual=real.parts[-3:-1] == ("virtual", "block"),
            hidden=_attribute(real, "hidden", "0") != "0",
        )
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _attribute(directory: Path, name: str, default: str | None = None) -> str:
    try:
        return (directory / name).read_text("ascii").strip()
    except FileNotFoundError:
        if default is None:
            raise
        return default


class KernelBlockLayer:
    """The machine's real disks (`machine.BlockLayer`)."""

    def __init__(
        self,
        *,
        sysfs: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        timeout: float = PARTITION_TIMEOUT,
    ) -> None:
        self._block = sysfs / "class" / "block"
        self._dev = dev
        self._timeout = timeout

    def disks(self) -> list[Path]:
        """Return the nodes of all disks with a medium, by name."""
        found: list[Path] = []
        for entry in self._entries(self._block):
            node = read_node(entry)
            if node and not node.number and not node.virtual and not node.hidden and node.size:
                found.append(self._node_path(node))
        return found

    def partition_device(self, disk: Path, number: int, first_byte: int, size_bytes: int) -> Path:
        """Return the node of the partition at these bytes of `disk`, checked to be that device.

        A partition the kernel does not know is told to it (BLKPG): it refuses to read a changed table again
        while another partition of the disk is mounted. DeviceRefusal("partition-node-missing") after the time
        limit, naming what the kernel has instead.
        """
        wanted = (number, first_byte, size_bytes)

        def look() -> Path | None:
            for node in self._partitions(disk):
                if (node.number, node.start, node.size) == wanted:
                    path = self._node_path(node)
                    return path if _is_block_device(path, node.device) else None
            return None

        try:
            found = look()
            if found is None:
                self._announce(disk, *wanted)
                found = uevent.wait_until(look, self._timeout, subsystem="block")
        except OSError as exc:
            raise self._missing(disk, number, f"{exc.strerror}: {exc.filename or disk}") from exc
        if found is None:
            has = ", ".join(f"{node.name} at {node.start}+{node.size}" for node in self._partitions(disk))
            raise self._missing(disk, number, f"wanted {first_byte}+{size_bytes}, kernel has {has or 'none'}")
        return found

    def settle(self, disk: Path) -> None:
        """Make the kernel read the table of `disk` again, as far as partitions in use allow."""
        try:
            fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
            try:
                reread_partitions(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            # EBUSY: a partition is mounted; EINVAL: a disk the kernel never scans. `partition_device` then
            # announces what it needs by itself.
            if exc.errno not in {errno.EBUSY, errno.EINVAL}:
                raise DeviceRefusal(
                    "partition-table-not-read",
                    "the kernel does not read a changed partition table again",
                    evidence=f"{disk}: {exc.strerror}",
                    remedy="check the disk",
                ) from exc

    def _announce(self, disk: Path, number: int, first_byte: int, size: int) -> None:
        fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
        try:
            blkpg_add_partition(fd, number, first_byte, size)
        except OSError as exc:
            # EBUSY: the kernel has something there; if it is the right thing, it is only its node that is
            # late.
            if exc.errno != errno.EBUSY:
                raise
        finally:
            os.close(fd)

    def _partitions(self, disk: Path) -> list[Node]:
        nodes = (read_node(entry) for entry in self._entries(self._block / disk.name))
        return [node for node in nodes if node and node.number]

    def _node_path(self, node: Node) -> Path:
        # sysfs writes "!" where a node's name has "/" (cciss!c0d0)
        return self._dev / node.name.replace("!", "/")

    @staticmethod
    def _entries(directory: Path) -> list[Path]:
        try:
            return sorted(entry for entry in directory.iterdir() if (entry / "dev").exists())
        except FileNotFoundError:
            return []

    @staticmethod
    def _missing(disk: Path, number: int, evidence: str) -> DeviceRefusal:
        return DeviceRefusal(
            "partition-node-missing",
            f"partition {number} of {disk} has no device node",
            evidence=evidence,
            remedy="boot with the `gpt` kernel parameter; check that the disk's driver is in the boot image",
        )


def _is_block_device(path: Path, device: int) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == device
