# SPDX-License-Identifier: Apache-2.0
"""The mount calls, old and new, with kernel constants named as in the kernel (include/uapi/linux/mount.h).

Every function raises OSError with strerror and the path or file system it was about.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from trustme_init.linux.syscalls import (
    SYS_fsconfig,
    SYS_fsmount,
    SYS_fsopen,
    SYS_mount,
    SYS_mount_setattr,
    SYS_move_mount,
    SYS_open_tree,
    SYS_pivot_root,
    SYS_umount2,
    syscall,
)

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_NOATIME: Final = 1024
MS_BIND: Final = 4096
MS_MOVE: Final = 8192
MS_REC: Final = 16384
MS_UNBINDABLE: Final = 1 << 17
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20
MS_RELATIME: Final = 1 << 21

MNT_FORCE: Final = 1
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

MOUNT_ATTR_RDONLY: Final = 0x01
MOUNT_ATTR_NOSUID: Final = 0x02
MOUNT_ATTR_NODEV: Final = 0x04
MOUNT_ATTR_NOEXEC: Final = 0x08
MOUNT_ATTR__ATIME: Final = 0x70
MOUNT_ATTR_RELATIME: Final = 0x00
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_IDMAP: Final = 0x100000
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x200000

_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_MESSAGE_LIMIT: Final = 1024


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount(source: str | None, target: str, fstype: str | None, flags: int = 0, data: str = "") -> None:
    """Make a classic mount, bind, move or propagation change (MS_*)."""
    syscall(
        SYS_mount,
        os.fsencode(source) if source is not None else None,
        os.fsencode(target),
        os.fsencode(fstype) if fstype is not None else None,
        flags,
        data.encode() if data else None,
        filename=target,
    )


def umount(target: str, flags: int = 0) -> None:
    """Call umount2(2); a symbolic link as last component is never followed."""
    syscall(SYS_umount2, os.fsencode(target), flags | UMOUNT_NOFOLLOW, filename=target)


def pivot_root(new_root: str, put_old: str) -> None:
    """Swap the root mount (pivot_root(2)). The current root must not be the kernel's rootfs (EINVAL)."""
    syscall(SYS_pivot_root, os.fsencode(new_root), os.fsencode(put_old), filename=new_root)


def fsopen_mount(
    fstype: str,
    *,
    source: str | None = None,
    options: Mapping[str, str | None] | None = None,
    attrs: int = 0,
) -> int:
    """Create a file system instance and return it as a detached mount (close-on-exec descriptor).

    `options` are its parameters; a value of None makes a flag ("ro"). `attrs` are MOUNT_ATTR_*. Nothing is
    attached to any tree: closing the descriptor unmounts. The kernel's own message, if there is one, becomes
    part of the error text.
    """
    context = syscall(SYS_fsopen, fstype.encode(), _FSOPEN_CLOEXEC, filename=fstype)
    try:
        parameters: dict[str, str | None] = {} if source is None else {"source": source}
        parameters.update(options or {})
        for key, value in parameters.items():
            command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
            encoded = None if value is None else os.fsencode(value)
            _told(context, fstype, SYS_fsconfig, command, key.encode(), encoded, 0)
        _told(context, fstype, SYS_fsconfig, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _told(context, fstype, SYS_fsmount, _FSMOUNT_CLOEXEC, attrs)
    finally:
        os.close(context)


def _told(context: int, fstype: str, number: int, *args: int | bytes | None) -> int:
    """Make a call on a file system context; put what the context logged into the error."""
    try:
        return syscall(number, context, *args, filename=fstype)
    except OSError as exc:
        # Reading a context without a message gives ENODATA, and never waits.
        try:
            message = os.read(context, _MESSAGE_LIMIT).decode(errors="replace").strip()
        except OSError:
            raise exc from None
        raise OSError(exc.errno, f"{exc.strerror} ({message})", fstype) from exc


def open_tree(path: str | Path, *, dirfd: int = AT_FDCWD, recursive: bool = False, clone: bool = True) -> int:
    """Return a descriptor of the mount at `path`; with `clone` a detached copy (a bind mount yet to attach).

    An empty path means `dirfd` itself.
    """
    flags = os.O_CLOEXEC | (_OPEN_TREE_CLONE if clone else 0) | (AT_RECURSIVE if recursive else 0)
    if not os.fspath(path):
        flags |= AT_EMPTY_PATH
    return syscall(SYS_open_tree, dirfd, os.fsencode(path), flags, filename=path)


def move_mount(fd: int, target: str | Path, *, dirfd: int = AT_FDCWD) -> None:
    """Attach the (detached) mount `fd` at `target`; an empty target means the place that `dirfd` is open at.

    The last form looks no path up, so nothing can be put in its way.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH
    if not os.fspath(target):
        flags |= _MOVE_MOUNT_T_EMPTY_PATH
    syscall(SYS_move_mount, fd, b"", dirfd, os.fsencode(target), flags, filename=target)


def mount_setattr(
    fd: int,
    *,
    set_: int = 0,
    clear: int = 0,
    userns_fd: int | None = None,
    recursive: bool = False,
    propagation: int = 0,
) -> None:
    """Change MOUNT_ATTR_* and propagation (MS_PRIVATE, …) of the mount that `fd` is open at.

    With `userns_fd` it becomes an idmapped mount: ids of the file system appear mapped by that namespace.
    Only a detached mount can be idmapped.
    """
    attr = _MountAttr(attr_set=set_, attr_clr=clear, propagation=propagation)
    if userns_fd is not None:
        attr.attr_set |= MOUNT_ATTR_IDMAP
        attr.userns_fd = userns_fd
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    syscall(
        SYS_mount_setattr,
        fd,
        b"",
        flags,
        ctypes.byref(attr),
        ctypes.sizeof(attr),
        filename=f"mount fd {fd}",
    )


def children_of_root(mountinfo: str) -> list[str]:
    """Return the mount points directly below the root mount of a mountinfo file (proc(5)), topmost last.

    OSError(EPROTO) if it has no root mount.
    """
    rows = [line.split(" ") for line in mountinfo.splitlines()]
    roots = [row[0] for row in rows if len(row) > 4 and row[4] == "/"]
    if not roots:
        raise OSError(errno.EPROTO, "no mount at /", "mountinfo")
    return [_unescape(row[4]) for row in rows if row[1] == roots[0] and row[4] != "/"]


def _unescape(path: str) -> str:
    """Undo the octal escapes that the kernel uses for blanks in mountinfo."""
    for blank in ("\t", "\n", " "):
        path = path.replace(f"\\{ord(blank):03o}", blank)
    return path.replace("\\134", "\\")
