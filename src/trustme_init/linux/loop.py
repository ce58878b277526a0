# SPDX-License-Identifier: Apache-2.0
"""Loop devices: a block device made of an open file (include/uapi/linux/loop.h)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from trustme_init.linux.block import decode_device

if TYPE_CHECKING:
    from types import TracebackType

LOOP_CLR_FD: Final = 0x4C01
LOOP_GET_STATUS64: Final = 0x4C05
LOOP_CONFIGURE: Final = 0x4C0A
LOOP_CTL_GET_FREE: Final = 0x4C82

LO_FLAGS_READ_ONLY: Final = 1
LO_FLAGS_AUTOCLEAR: Final = 4
LO_FLAGS_PARTSCAN: Final = 8
LO_FLAGS_DIRECT_IO: Final = 16

# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt type, encrypt key size,
# flags; file name, crypt name, encrypt key; init
_INFO64: Final = struct.Struct("=5Q4I64s64s32s2Q")
_CONFIG_HEAD: Final = struct.Struct("=II")
_CONFIG_RESERVED: Final = bytes(64)

_ATTEMPTS: Final = 64
"""How often the race for a free device may be lost: every loss means that somebody else got one."""


class Backing(NamedTuple):
    """What the kernel says a loop device is made of; offset and limit in bytes, limit 0 = to the end."""

    device: int
    inode: int
    offset: int
    size_limit: int
    flags: int


class Loop:
    """An attached loop device; with autoclear it goes away with its last user, this object included."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def backing(self) -> Backing:
        """Ask the kernel which file this is; st_dev and st_ino identify it. Raises OSError."""
        return backing_of(self.fd, self.path)

    def detach(self) -> None:
        """Take the file away now, or as soon as the last user is gone. Raises OSError."""
        _ioctl(self.fd, LOOP_CLR_FD, 0, self.path)

    def close(self) -> None:
        """Drop our hold. Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def attach(
    fd: int,
    *,
    offset: int = 0,
    size: int = 0,
    read_only: bool = True,
    direct_io: bool = False,
    autoclear: bool = True,
    block_size: int = 0,
    dev: Path = Path("/dev"),
) -> Loop:
    """Make a block device of the open file `fd`, from byte `offset` for `size` bytes (0 = to its end).

    One ioctl configures everything (LOOP_CONFIGURE, Linux 5.8): there is no instant at which the device is
    writable or has another offset. Also read-only if `fd` is not open for writing. `block_size` is the
    logical sector size (0 = the kernel's choice). Raises OSError.
    """
    flags = LO_FLAGS_AUTOCLEAR * autoclear | LO_FLAGS_READ_ONLY * read_only | LO_FLAGS_DIRECT_IO * direct_io
    info = _INFO64.pack(0, 0, 0, offset, size, 0, 0, 0, flags, b"", b"", b"", 0, 0)
    config = _CONFIG_HEAD.pack(fd, block_size) + info + _CONFIG_RESERVED
    control_path = dev / "loop-control"
    control = os.open(control_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            path = dev / f"loop{_ioctl(control, LOOP_CTL_GET_FREE, 0, control_path)}"
            device = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            try:
                _ioctl(device, LOOP_CONFIGURE, config, path)
            except OSError as exc:
                os.close(device)
                # Between "this one is free" and here another process may have taken it.
                if exc.errno != errno.EBUSY:
                    raise
            else:
                return Loop(path, device)
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, f"lost the race for a free loop device {_ATTEMPTS} times", str(control_path))


def backing_of(fd: int, path: Path) -> Backing:
    """Return what the loop device open as `fd` is made of; OSError(ENXIO) if it has no file."""
    buffer = bytearray(_INFO64.size)
    _ioctl(fd, LOOP_GET_STATUS64, buffer, path)
    device, inode, _, offset, limit, _, _, _, flags, *_ = _INFO64.unpack(buffer)
    return Backing(decode_device(device), inode, offset, limit, flags)


def _ioctl(fd: int, request: int, argument: int | bytes | bytearray, path: Path) -> int:
    try:
        result = fcntl.ioctl(fd, request, argument)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    return result if isinstance(result, int) else 0
