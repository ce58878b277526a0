# SPDX-License-Identifier: Apache-2.0
"""Opening, reading and replacing files without being led astray by names or sizes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from trustme_init.linux.syscalls import SYS_openat2, libc, syscall

if TYPE_CHECKING:
    from pathlib import Path

AT_FDCWD: Final = -100

# include/uapi/linux/openat2.h
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10
RESOLVE_CACHED: Final = 0x20

# include/uapi/linux/magic.h
EXT4_SUPER_MAGIC: Final = 0xEF53
TMPFS_MAGIC: Final = 0x01021994
CGROUP2_SUPER_MAGIC: Final = 0x63677270
EFIVARFS_MAGIC: Final = 0xDE5E81E4

_CHUNK: Final = 1024 * 1024


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def openat2(
    path: str | Path,
    flags: int,
    *,
    dirfd: int = AT_FDCWD,
    mode: int = 0,
    resolve: int = RESOLVE_NO_SYMLINKS,
) -> int:
    """Open `path` relative to `dirfd` and return a close-on-exec descriptor (openat2(2)).

    No component may be a symbolic link unless `resolve` says otherwise. Unlike open(2), the kernel refuses
    unknown flags, and a `mode` without O_CREAT or O_TMPFILE. Raises OSError naming `path`.
    """
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=mode, resolve=resolve)
    while True:
        try:
            return syscall(
                SYS_openat2, dirfd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how), filename=path
            )
        except InterruptedError:
            continue
        except BlockingIOError:
            # EAGAIN: a rename or mount raced with the check of ".."; openat2(2) asks the caller to retry.
            if not resolve & (RESOLVE_BENEATH | RESOLVE_IN_ROOT) or resolve & RESOLVE_CACHED:
                raise


def read_limited(fd: int, limit: int) -> bytes:
    """Return everything from the current offset of `fd` to its end, at most `limit` bytes.

    Raises OSError(EFBIG) if there is more. The size is found by reading: what stat says may be wrong (procfs,
    sysfs, a file that grows).
    """
    parts: list[bytes] = []
    left = limit + 1
    while left > 0:
        part = os.read(fd, min(left, _CHUNK))
        if not part:
            return b"".join(parts)
        parts.append(part)
        left -= len(part)
    raise OSError(errno.EFBIG, f"larger than {limit} bytes", f"fd {fd}")


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file that no symbolic link leads to, at most `limit` bytes.

    Raises OSError: EINVAL for anything but a regular file, and as `openat2` and `read_limited`.
    """
    # O_NONBLOCK: a FIFO of that name must be refused, not waited for.
    fd = openat2(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return read_limited(fd, limit)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, mode: int) -> None:
    """Make `path` hold `data`: after any power cut its old or its new content, after return the new.

    The new file is written beside (`.<name>.new`), synced, renamed, and the directory synced. It has exactly
    `mode` from before its first byte is written, whatever the umask. A left-over of an interrupted write is
    replaced. Writers of one path must not run at the same time.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        beside = f".{path.name}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(beside, flags, mode, dir_fd=directory)
        try:
            os.fchmod(fd, mode)
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    finally:
        os.close(directory)


def sync_directory(path: Path) -> None:
    """Make what was created, renamed or removed in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, however often write(2) stops short."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class StatFs(NamedTuple):
    """What a file system is and how full; sizes in bytes."""

    type: int
    """f_type, one of the *_MAGIC constants."""
    block_size: int
    size: int
    available: int
    flags: int
    """ST_* flags of the mount."""


class _StatFs(ctypes.Structure):
    # struct statfs of 64-bit Linux (asm-generic/statfs.h): 120 bytes
    _fields_ = (
        ("f_type", ctypes.c_long),
        ("f_bsize", ctypes.c_long),
        ("f_blocks", ctypes.c_uint64),
        ("f_bfree", ctypes.c_uint64),
        ("f_bavail", ctypes.c_uint64),
        ("f_files", ctypes.c_uint64),
        ("f_ffree", ctypes.c_uint64),
        ("f_fsid", ctypes.c_int * 2),
        ("f_namelen", ctypes.c_long),
        ("f_frsize", ctypes.c_long),
        ("f_flags", ctypes.c_long),
        ("f_spare", ctypes.c_long * 4),
    )


def statfs(path: str | Path) -> StatFs:
    """Return facts of the file system that holds `path` (statfs(2)); unlike os.statvfs with its type."""
    buffer = _StatFs()
    if libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    unit = buffer.f_frsize or buffer.f_bsize
    return StatFs(
        type=buffer.f_type & 0xFFFFFFFF,
        block_size=buffer.f_bsize,
        size=buffer.f_blocks * unit,
        available=buffer.f_bavail * unit,
        flags=buffer.f_flags,
    )
