# SPDX-License-Identifier: Apache-2.0
"""Which block device may be overwritten: what the kernel says about it, and what speaks against it.

Rules:
- Only a whole disk, with nothing of it in use: no mount, swap, device mapper, RAID or other holder on it or
  on a partition of it, and not the disk that the running system is on. None of this can be overridden.
- The kernel's exclusive claim (O_EXCL on a block device, open(2)) has the last word: it also knows what
  another mount namespace uses. It is held, with a BSD lock that keeps udev away, until the end.
- A device is known by its number, size, serial and `diskseq` (which changes with the medium); all of these
  must be the same before the question to the operator and after the answer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from trustme_init.linux import block
from trustme_tools.errors import ToolError
from trustme_tools.flash.extents import Extent

SYSTEM_MOUNTS: Final = frozenset({"/", "/boot", "/boot/efi", "/efi", "/usr", "/var", "/etc", "/home", "/nix"})
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


class Use(NamedTuple):
    """Something that uses a disk: `kind` is mount, swap, or holder; `what` names it."""

    kind: str
    what: str
    by: str
    """The kernel's name of the disk or partition that is used."""


@dataclass(frozen=True, slots=True)
class Disk:
    """What the kernel says about a block device. Sizes in bytes."""

    name: str
    number: int
    """As st_rdev."""
    size: int
    sector_size: int
    model: str
    serial: str
    sequence: str
    """`diskseq`: another one after each change of the medium; empty before Linux 5.15."""
    read_only: bool
    is_partition: bool
    stacked: bool
    """Made by device mapper or RAID of other disks."""
    partitions: tuple[Extent, ...]
    uses: tuple[Use, ...]

    @property
    def identity(self) -> tuple[int, int, str, str]:
        """What must not change between question and write."""
        return self.number, self.size, self.serial, self.sequence

    def __str__(self) -> str:
        serial = f"serial {self.serial}" if self.serial else "no serial number"
        return f"{self.name}: {self.model or 'unknown model'}, {serial}, {self.size / 1e9:.2f} GB"


def look(number: int, *, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> Disk:
    """Return what the kernel says of the block device `number` (st_rdev). Raises OSError if it is gone."""
    directory = (sysfs / f"dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    children = sorted(entry for entry in directory.iterdir() if (entry / "partition").exists())
    return Disk(
        name=directory.name,
        number=number,
        size=int(_read(directory / "size")) * block.SECTOR,
        sector_size=int(_read(directory / "queue/logical_block_size") or block.SECTOR),
        model=" ".join(filter(None, (_read(directory / f"device/{each}") for each in ("vendor", "model"))))
        or _read(directory / "device/name"),
        serial=_read(directory / "serial") or _read(directory / "device/serial") or _read(directory / "wwid"),
        sequence=_read(directory / "diskseq"),
        read_only=_read(directory / "ro") == "1",
        is_partition=(directory / "partition").exists(),
        stacked=any((directory / kind).exists() for kind in ("dm", "md")),
        partitions=tuple(
            Extent(*(int(_read(child / each)) * block.SECTOR for each in ("start", "size")))
            for child in children
        ),
        uses=tuple(_uses(directory, children, sysfs, proc)),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _uses(directory: Path, children: list[Path], sysfs: Path, proc: Path) -> Iterator[Use]:
    """Yield what uses the disk, its partitions, and whatever is stacked upon them."""
    mounts, swaps = list(_mounts(proc)), list(_swaps(proc))
    waiting, seen = [(entry, entry.name) for entry in (directory, *children)], set[str]()
    while waiting:
        entry, below = waiting.pop(0)
        if entry.name in seen:
            continue
        seen.add(entry.name)
        number = _read(entry / "dev")
        yield from (Use("mount", where, below) for device, where in mounts if device == number)
        yield from (Use("swap", path, below) for device, path in swaps if device == number)
        for holder in sorted((entry / "holders").glob("*")):
            stacked = (sysfs / "class/block" / holder.name).resolve()
            name = _read(stacked / "dm/name")
            yield Use("holder", f"{holder.name} ({name})" if name else holder.name, below)
            waiting.append((stacked, below))


def _mounts(proc: Path) -> Iterator[tuple[str, str]]:
    """Yield (MAJOR:MINOR, mount point); see proc_pid_mountinfo(5)."""
    # Not splitlines(): the kernel escapes a newline in a name, but not all that Unicode calls a line's end.
    for line in filter(None, _read(proc / "self/mountinfo").split("\n")):
        fields, _, source = line.partition(" - ")
        words = fields.split(" ")
        where = _unescaped(words[4])
        yield words[2], where
        # btrfs and others show an anonymous number; the source then names one of the devices.
        if (number := _number(_unescaped(source.split(" ")[1]))) not in {"", words[2]}:
            yield number, where


def _swaps(proc: Path) -> Iterator[tuple[str, str]]:
    for line in _read(proc / "swaps").split("\n")[1:]:
        path = _unescaped(line.split()[0])
        yield _number(path), path


def _number(path: str) -> str:
    try:
        found = Path(path).stat() if path.startswith("/") else None
    except OSError:
        return ""
    if found is None or not stat.S_ISBLK(found.st_mode):
        return ""
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def judge(disk: Disk) -> None:
    """Refuse a device that must not be overwritten.

    ToolError: "not-a-disk", "system-disk", "device-mounted", "device-in-use", "device-read-only".
    """
    if disk.is_partition or disk.stacked:
        raise ToolError(
            f"{disk.name} is not a disk, but {'a part' if disk.is_partition else 'made'} of others",
            "name the whole disk: the image brings its own partitions",
            code="not-a-disk",
            evidence=str(disk),
        )
    mounts = [use for use in disk.uses if use.kind == "mount"]
    if system := [use for use in mounts if use.what in SYSTEM_MOUNTS]:
        raise ToolError(
            f"{disk.name} is the disk that this system runs from",
            "name another device",
            code="system-disk",
            evidence=_shown(system),
        )
    if mounts:
        raise ToolError(
            f"{disk.name} is mounted",
            "see that it is the right device, then unmount it",
            code="device-mounted",
            evidence=_shown(mounts),
        )
    if disk.uses:
        raise _in_use(disk.name, _shown(list(disk.uses)))
    if disk.read_only:
        raise ToolError(
            f"{disk.name} is write-protected",
            "look for the card's switch, or use another one",
            code="device-read-only",
            evidence=str(disk),
        )


def _shown(uses: list[Use]) -> str:
    return ", ".join(f"{use.by}: {use.kind} {use.what}" for use in uses)


def _in_use(name: str, evidence: str) -> ToolError:
    return ToolError(
        f"{name} is in use",
        "see that it is the right device, then end what uses it (swapoff, dmsetup, mdadm, losetup)",
        code="device-in-use",
        evidence=evidence,
    )


def changed(name: str, evidence: str) -> ToolError:
    """Return the error of a device that is not the one that was looked at."""
    return ToolError(
        f"{name} is not the device any more that it was a moment ago",
        "look what is plugged in, and begin again; nothing was written",
        code="device-changed",
        evidence=evidence,
    )


@contextmanager
def claimed(path: Path) -> Iterator[tuple[int, Disk]]:
    """Judge the block device at `path` and yield it, open for writing and claimed, with what it is.

    ToolError as `judge`, "not-a-block-device", "device-in-use", "device-changed".
    """
    # Links (/dev/disk/by-id/…) are followed once; what they lead to must stay what it is.
    node = path.resolve(strict=True)
    number = _block_number(node)
    disk = look(number)
    judge(disk)
    fd = _open_exclusive(node, disk)
    try:
        if os.fstat(fd).st_rdev != number:
            raise changed(disk.name, f"{node} leads to another device")
        check_same(disk, path)
        yield fd, disk
    finally:
        os.close(fd)


def check_same(disk: Disk, path: Path) -> None:
    """ToolError("device-changed") unless `path` still leads to `disk`, with the same medium."""
    try:
        number = _block_number(path.resolve(strict=True))
        now = look(number)
    except (OSError, ToolError, ValueError) as exc:
        raise changed(disk.name, str(exc)) from exc
    if now.identity != disk.identity:
        raise changed(disk.name, f"it was {disk}; {path} is now {now}")


def _block_number(node: Path) -> int:
    found = node.lstat()
    if not stat.S_ISBLK(found.st_mode):
        raise ToolError(
            f"{node} is not a block device",
            "name a disk, like /dev/sdX; for a plain file in a disk's place add --file",
            code="not-a-block-device",
        )
    return found.st_rdev


def _open_exclusive(node: Path, disk: Disk) -> int:
    try:
        fd = os.open(node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        raise _in_use(
            disk.name, "the kernel does not give it away; perhaps it is mounted in another mount namespace"
        ) from exc
    try:
        # systemd-udevd leaves a locked disk alone (systemd: "Locking Block Device Access").
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(fd)
        if exc.errno != errno.EWOULDBLOCK:
            raise
        raise _in_use(disk.name, "another program has locked it") from exc
    return fd
