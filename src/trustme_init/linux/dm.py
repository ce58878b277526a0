# SPDX-License-Identifier: Apache-2.0
"""Device mapper ioctls, as far as the device needs them (include/uapi/linux/dm-ioctl.h, version 4).

There is no udev on the device: devtmpfs makes /dev/dm-N when a mapping is first resumed, and nothing ever
makes /dev/mapper/NAME. Devices are named to the kernel as MAJOR:MINOR, so that no path is looked up twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from trustme_init.linux.block import decode_device

if TYPE_CHECKING:
    from collections.abc import Sequence


# _IOWR(0xfd, nr, struct dm_ioctl)
DM_VERSION: Final = 0xC138FD00
DM_LIST_DEVICES: Final = 0xC138FD02
DM_DEV_CREATE: Final = 0xC138FD03
DM_DEV_REMOVE: Final = 0xC138FD04
DM_DEV_SUSPEND: Final = 0xC138FD06
DM_DEV_STATUS: Final = 0xC138FD07
DM_TABLE_LOAD: Final = 0xC138FD09
DM_TABLE_STATUS: Final = 0xC138FD0C

DM_READONLY_FLAG: Final = 1 << 0
DM_SUSPEND_FLAG: Final = 1 << 1
DM_STATUS_TABLE_FLAG: Final = 1 << 4
DM_ACTIVE_PRESENT_FLAG: Final = 1 << 5
DM_INACTIVE_PRESENT_FLAG: Final = 1 << 6
DM_BUFFER_FULL_FLAG: Final = 1 << 8
DM_SECURE_DATA_FLAG: Final = 1 << 15
DM_DEFERRED_REMOVE: Final = 1 << 17

SECTOR: Final = 512
"""Unit of every length in a table, whatever the devices' own sector size."""
SUPERBLOCK_BLOCKS: Final = 1
"""Blocks before the hash tree in an image that veritysetup made: its superblock."""

_VERSION: Final = (4, 0, 0)
# version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name, uuid,
# data[7]
_IOCTL: Final = struct.Struct("=3I3Ii3IQ128s129s7s")
# dev, next; then the name, NUL-terminated
_NAME_ENTRY: Final = struct.Struct("=QI")
# sector_start, length, status, next, target_type
_SPEC: Final = struct.Struct("=QQiI16s")
NAME_LIMIT: Final = 127
"""Bytes of a mapping's name."""
_UUID_LIMIT: Final = 128
_REPLY_SIZE: Final = 16 * 1024
_LIST_SIZE: Final = 256 * 1024
"""Room for the names of well over a thousand mappings."""


class Status(NamedTuple):
    """State of a mapping."""

    device: int
    """As st_rdev of its node."""
    open_count: int
    flags: int

    @property
    def active(self) -> bool:
        """A table is live: reads are served."""
        return bool(self.flags & DM_ACTIVE_PRESENT_FLAG) and not self.flags & DM_SUSPEND_FLAG

    @property
    def read_only(self) -> bool:
        """The mapping refuses writes."""
        return bool(self.flags & DM_READONLY_FLAG)


class Target(NamedTuple):
    """One line of a table; start and length in 512-byte sectors."""

    start: int
    length: int
    type: str
    parameters: str


@dataclass(frozen=True, slots=True)
class VerityTable:
    """The parameters of a dm-verity target without its devices.

    Documentation/admin-guide/device-mapper/verity.rst of the kernel.
    """

    root_hash: bytes
    salt: bytes
    data_blocks: int
    data_block_size: int = 4096
    hash_block_size: int = 4096
    hash_start_block: int = SUPERBLOCK_BLOCKS
    algorithm: str = "sha256"
    version: int = 1
    options: tuple[str, ...] = ()
    """Optional words, e.g. ("restart_on_corruption",) or ("panic_on_corruption",)."""

    @property
    def sectors(self) -> int:
        """Length of the mapping in 512-byte sectors."""
        return self.data_blocks * (self.data_block_size // SECTOR)

    def line(self, data_device: int, hash_device: int) -> str:
        """Return the target's parameters; the devices as st_rdev."""
        words = [
            str(self.version),
            _device_word(data_device),
            _device_word(hash_device),
            str(self.data_block_size),
            str(self.hash_block_size),
            str(self.data_blocks),
            str(self.hash_start_block),
            self.algorithm,
            self.root_hash.hex(),
            self.salt.hex() or "-",
        ]
        if self.options:
            words += [str(len(self.options)), *self.options]
        return " ".join(words)


class Mapping(NamedTuple):
    """A live device-mapper device."""

    name: str
    path: Path
    device: int
    """As st_rdev."""


def create_verity(
    name: str, uuid: str, *, data_dev: int, hash_dev: int, table: VerityTable, dev: Path = Path("/dev")
) -> Mapping:
    """Create, load and start a read-only verity mapping; nothing is left behind if a step fails.

    `data_dev` and `hash_dev` are device numbers (st_rdev): the caller holds both devices open, so they cannot
    be reused for something else meanwhile. Raises OSError: EBUSY (name or UUID exists), EINVAL (the
    kernel dislikes the table), ENODEV or ENOENT (no device mapper), EIO.
    """
    target = Target(0, table.sectors, "verity", table.line(data_dev, hash_dev))
    return create(name, uuid, target, read_only=True, dev=dev)


def create(
    name: str,
    uuid: str,
    target: Target,
    *,
    read_only: bool = False,
    secret: bool = False,
    dev: Path = Path("/dev"),
) -> Mapping:
    """Create, load and start a mapping of one target; nothing is left behind if a step fails.

    With `secret` the table has keys in it: the message is wiped, here and in the kernel, once it is read.
    Raises OSError as `create_verity`.
    """
    with _Control(dev) as control:
        created = control.call(DM_DEV_CREATE, name, uuid=uuid)
        mode = DM_READONLY_FLAG if read_only else 0
        try:
            secrecy = DM_SECURE_DATA_FLAG if secret else 0
            control.call(DM_TABLE_LOAD, name, flags=mode | secrecy, targets=(target,))
            # "Suspend" without the flag means resume: the loaded table goes live, devtmpfs makes the node.
            control.call(DM_DEV_SUSPEND, name, flags=mode)
            status = control.status(name)
            if status.device != created.device or not status.active or status.read_only != read_only:
                raise OSError(errno.EIO, f"mapping is not live as asked (flags {status.flags:#x})", name)
            return Mapping(name, node(status.device, dev), status.device)
        except BaseException:
            with contextlib.suppress(OSError):  # the first failure is the one to tell
                control.call(DM_DEV_REMOVE, name)
            raise


def remove(name: str, *, deferred: bool = False, dev: Path = Path("/dev")) -> None:
    """Remove a mapping; `deferred`: as soon as its last user is gone. Raises OSError (EBUSY, ENXIO)."""
    with _Control(dev) as control:
        control.call(DM_DEV_REMOVE, name, flags=DM_DEFERRED_REMOVE if deferred else 0)


def names(*, dev: Path = Path("/dev")) -> list[str]:
    """Return the names of all mappings. Raises OSError."""
    with _Control(dev) as control:
        return unpack_names(control.call(DM_LIST_DEVICES, "", room=_LIST_SIZE).raw)


def status(name: str, *, dev: Path = Path("/dev")) -> Status:
    """Return the state of a mapping; OSError(ENXIO) if there is none of that name."""
    with _Control(dev) as control:
        return control.status(name)


def live_table(name: str, *, dev: Path = Path("/dev")) -> tuple[Target, ...]:
    """Return the table that now serves reads. Raises OSError."""
    return _targets(name, DM_STATUS_TABLE_FLAG, dev)


def verity_is_sound(name: str, *, dev: Path = Path("/dev")) -> bool:
    """Whether a verity mapping has met no corrupt block yet ("V", else "C"). Raises OSError."""
    return [target.parameters for target in _targets(name, 0, dev)] == ["V"]


def _targets(name: str, flags: int, dev: Path) -> tuple[Target, ...]:
    with _Control(dev) as control:
        reply = control.call(DM_TABLE_STATUS, name, flags=flags)
    return unpack_targets(reply.raw)


def node(device: int, dev: Path = Path("/dev")) -> Path:
    """Return the node of a mapping, having checked that it is that device and no other. Raises OSError."""
    path = dev / f"dm-{os.minor(device)}"
    found = path.lstat()
    if not stat.S_ISBLK(found.st_mode) or found.st_rdev != device:
        raise OSError(errno.ENODEV, f"is not block device {_device_word(device)}", str(path))
    return path


class Reply(NamedTuple):
    """What the kernel wrote back; `raw` is left out where it may hold keys."""

    device: int
    open_count: int
    flags: int
    raw: bytes


def pack(
    name: str, *, uuid: str = "", flags: int = 0, targets: Sequence[Target] = (), room: int = _REPLY_SIZE
) -> bytearray:
    """Return the buffer of one ioctl: header, then target specs, and `room` bytes at least for the reply.

    ValueError if a text does not fit.
    """
    body = b"".join(map(_pack_target, targets))
    size = max(_IOCTL.size + len(body), room)
    header = _IOCTL.pack(
        *_VERSION,
        size,
        _IOCTL.size,
        len(targets),
        0,
        flags,
        0,
        0,
        0,
        _text(name, NAME_LIMIT),
        _text(uuid, _UUID_LIMIT),
        b"",
    )
    return bytearray((header + body).ljust(size, b"\0"))


def unpack(buffer: bytes | bytearray) -> Reply:
    """Read a reply's header; the device number is translated to the C library's encoding."""
    _, _, _, _, _, _, opened, flags, _, _, device, *_ = _IOCTL.unpack_from(buffer)
    raw = b"" if flags & DM_SECURE_DATA_FLAG else bytes(buffer)
    return Reply(decode_device(device), opened, flags, raw)


def unpack_targets(buffer: bytes) -> tuple[Target, ...]:
    """Read the specs of a DM_TABLE_STATUS reply. OSError(EPROTO) if they point outside of it."""
    _, _, _, size, start, count, *_ = _IOCTL.unpack_from(buffer)
    end = min(size, len(buffer))
    targets: list[Target] = []
    position = start
    for _ in range(count):
        if not _IOCTL.size <= position <= end - _SPEC.size:
            raise OSError(errno.EPROTO, "device-mapper reply points outside itself")
        first, length, _, following, kind = _SPEC.unpack_from(buffer, position)
        text_end = buffer.find(b"\0", position + _SPEC.size, end)
        if text_end < 0:
            raise OSError(errno.EPROTO, "device-mapper reply is not terminated")
        text = buffer[position + _SPEC.size : text_end].decode("ascii", "backslashreplace")
        targets.append(Target(first, length, kind.rstrip(b"\0").decode("ascii", "backslashreplace"), text))
        # Unlike on the way in, `next` of a reply counts from the first spec.
        position = start + following
    return tuple(targets)


def unpack_names(buffer: bytes) -> list[str]:
    """Read a DM_LIST_DEVICES reply. OSError(EPROTO) if it points outside of itself."""
    _, _, _, size, start, *_ = _IOCTL.unpack_from(buffer)
    end = min(size, len(buffer))
    found: list[str] = []
    position = start
    if size == start:  # there is none
        return found
    while True:
        if not _IOCTL.size <= position <= end - _NAME_ENTRY.size:
            raise OSError(errno.EPROTO, "device-mapper reply points outside itself")
        _, following = _NAME_ENTRY.unpack_from(buffer, position)
        text_end = buffer.find(b"\0", position + _NAME_ENTRY.size, end)
        if text_end < 0:
            raise OSError(errno.EPROTO, "device-mapper reply is not terminated")
        found.append(buffer[position + _NAME_ENTRY.size : text_end].decode("ascii", "backslashreplace"))
        if not following:
            return found
        position += following


def _pack_target(target: Target) -> bytes:
    text = target.parameters.encode("ascii") + b"\0"
    # Specs must start at multiples of 8; `next` counts from the start of this spec.
    room = -(-len(text) // 8) * 8
    spec = _SPEC.pack(target.start, target.length, 0, _SPEC.size + room, _text(target.type, 15))
    return spec + text.ljust(room, b"\0")


def _text(value: str, limit: int) -> bytes:
    encoded = value.encode("ascii")
    if len(encoded) > limit or b"\0" in encoded:
        raise ValueError(f"device-mapper text of {len(encoded)} bytes, at most {limit} and no NUL: {value!r}")
    return encoded


def _device_word(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


class _Control:
    """/dev/mapper/control, open for one operation."""

    def __init__(self, dev: Path) -> None:
        self._path = dev / "mapper" / "control"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def call(
        self,
        request: int,
        name: str,
        *,
        uuid: str = "",
        flags: int = 0,
        targets: Sequence[Target] = (),
        room: int = _REPLY_SIZE,
    ) -> Reply:
        buffer = pack(name, uuid=uuid, flags=flags, targets=targets, room=room)
        try:
            fcntl.ioctl(self._fd, request, buffer)
            reply = unpack(buffer)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, f"device-mapper {name}") from exc
        finally:
            if flags & DM_SECURE_DATA_FLAG:
                buffer[:] = bytes(len(buffer))
        if reply.flags & DM_BUFFER_FULL_FLAG:
            raise OSError(errno.EOVERFLOW, f"device-mapper reply exceeds {room} bytes", name)
        return reply

    def status(self, name: str) -> Status:
        reply = self.call(DM_DEV_STATUS, name)
        return Status(reply.device, reply.open_count, reply.flags)
