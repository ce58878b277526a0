# SPDX-License-Identifier: Apache-2.0
"""The one door to system calls that Python has no function for.

Numbers below 424 differ between architectures; from 424 on the kernel gives new calls one number everywhere
(arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_NUMBERS: Final[Mapping[str, Mapping[str, int]]] = {
    "x86_64": {
        "rt_sigaction": 13,
        "clone": 56,
        "capget": 125,
        "capset": 126,
        "pivot_root": 155,
        "prctl": 157,
        "mount": 165,
        "umount2": 166,
        "reboot": 169,
        "sethostname": 170,
        "delete_module": 176,
        "unshare": 272,
        "setns": 308,
        "syncfs": 306,
        "finit_module": 313,
        "seccomp": 317,
        "bpf": 321,
    },
    "aarch64": {
        "rt_sigaction": 134,
        "clone": 220,
        "capget": 90,
        "capset": 91,
        "pivot_root": 41,
        "prctl": 167,
        "mount": 40,
        "umount2": 39,
        "reboot": 142,
        "sethostname": 161,
        "delete_module": 106,
        "unshare": 97,
        "setns": 268,
        "syncfs": 267,
        "finit_module": 273,
        "seccomp": 277,
        "bpf": 280,
    },
}

_MACHINE: Final = os.uname().machine
if _MACHINE not in _NUMBERS:
    raise ImportError(f"no system call numbers for {_MACHINE}: known are {', '.join(_NUMBERS)}")
_NR: Final = _NUMBERS[_MACHINE]

SYS_rt_sigaction: Final = _NR["rt_sigaction"]
SYS_clone: Final = _NR["clone"]
SYS_capget: Final = _NR["capget"]
SYS_capset: Final = _NR["capset"]
SYS_pivot_root: Final = _NR["pivot_root"]
SYS_prctl: Final = _NR["prctl"]
SYS_mount: Final = _NR["mount"]
SYS_umount2: Final = _NR["umount2"]
SYS_reboot: Final = _NR["reboot"]
SYS_sethostname: Final = _NR["sethostname"]
SYS_delete_module: Final = _NR["delete_module"]
SYS_unshare: Final = _NR["unshare"]
SYS_setns: Final = _NR["setns"]
SYS_syncfs: Final = _NR["syncfs"]
SYS_finit_module: Final = _NR["finit_module"]
SYS_seccomp: Final = _NR["seccomp"]
SYS_bpf: Final = _NR["bpf"]

SYS_pidfd_send_signal: Final = 424
SYS_open_tree: Final = 428
SYS_move_mount: Final = 429
SYS_fsopen: Final = 430
SYS_fsconfig: Final = 431
SYS_fsmount: Final = 432
SYS_fspick: Final = 433
SYS_pidfd_open: Final = 434
SYS_clone3: Final = 435
SYS_close_range: Final = 436
SYS_openat2: Final = 437
SYS_pidfd_getfd: Final = 438
SYS_mount_setattr: Final = 442
SYS_statmount: Final = 457

libc: Final = ctypes.CDLL(None, use_errno=True)
"""The C library; functions called on it must declare `restype` and check `ctypes.get_errno()` themselves."""

_syscall: Final = libc.syscall
_syscall.restype = ctypes.c_long


def syscall(nr: int, *args: Any, filename: str | bytes | Path | None = None) -> int:
    """Make one system call and return its (non-negative) result.

    Arguments: int (a descriptor, flags or length), bytes (a C string or read-only buffer), None (NULL), or
    anything ctypes passes as a pointer (`byref(...)`, arrays). Raises OSError with the errno's own subclass;
    `filename` is what it shall name. EINTR is not retried: only the caller knows whether that is right.
    """
    # A plain int would travel as a 32-bit C int through a variadic call, its upper half undefined.
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result: int = _syscall(ctypes.c_long(nr), *words)
    if result == -1:
        errno = ctypes.get_errno()
        if filename is None:
            raise OSError(errno, os.strerror(errno))
        raise OSError(errno, os.strerror(errno), os.fsdecode(filename))
    return result
