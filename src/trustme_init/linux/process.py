# SPDX-License-Identifier: Apache-2.0
"""Processes, namespaces and power: what the `os` module lacks or has only since Python 3.12."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Final

from trustme_init.linux.syscalls import (
    SYS_close_range,
    SYS_prctl,
    SYS_reboot,
    SYS_rt_sigaction,
    SYS_setns,
    SYS_unshare,
    syscall,
)

CLONE_NEWTIME: Final = 0x00000080
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

CLOSE_RANGE_UNSHARE: Final = 1 << 1
CLOSE_RANGE_CLOEXEC: Final = 1 << 2
LAST_FD: Final = 0xFFFFFFFF

# include/uapi/linux/reboot.h
RB_AUTOBOOT: Final = 0x01234567
RB_HALT_SYSTEM: Final = 0xCDEF0123
RB_POWER_OFF: Final = 0x4321FEDC
RB_DISABLE_CAD: Final = 0
_REBOOT_MAGIC1: Final = 0xFEE1DEAD
_REBOOT_MAGIC2: Final = 672274793

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NO_NEW_PRIVS: Final = 38


def unshare(flags: int) -> None:
    """Give the caller new namespaces (CLONE_NEW*). CLONE_NEWPID is for its next child, not for itself."""
    syscall(SYS_unshare, flags, filename=f"unshare {flags:#x}")


def setns(fd: int, flags: int) -> None:
    """Enter the namespace(s) that `fd` (a namespace file or a pidfd) names."""
    syscall(SYS_setns, fd, flags, filename=f"setns {flags:#x}")


def pidfd_open(pid: int) -> int:
    """Return a close-on-exec descriptor of a process: readable when it has ended."""
    return os.pidfd_open(pid)


def pidfd_send_signal(fd: int, sig: int) -> None:
    """Send a signal to exactly the process that `fd` names; ProcessLookupError if it is gone."""
    signal.pidfd_send_signal(fd, sig)


def process_start_time(pid: int, *, proc: Path = Path("/proc")) -> int:
    """Return when a process was started, in clock ticks since boot (proc(5), field 22).

    With its pid this is a process's identity. ProcessLookupError if there is none.
    """
    try:
        text = (proc / str(pid) / "stat").read_bytes()
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), str(pid)) from None
    return parse_start_time(text)


def parse_start_time(stat: bytes) -> int:
    """Return field 22 of a stat file. The command name (field 2) may hold anything, also ") 1 2"."""
    fields = stat.rpartition(b")")[2].split()
    if len(fields) < 20:
        raise OSError(errno.EPROTO, "stat file too short", "stat")
    return int(fields[19])


def close_range(first: int, last: int = LAST_FD, flags: int = 0) -> None:
    """Close the descriptors first..last, or with CLOSE_RANGE_CLOEXEC mark them to be closed by exec."""
    syscall(SYS_close_range, first, last, flags, filename=f"close_range {first}")


def set_child_subreaper(*, enabled: bool) -> None:
    """Whether orphaned descendants become children of the calling process (not inherited by fork)."""
    syscall(SYS_prctl, _PR_SET_CHILD_SUBREAPER, int(enabled), 0, 0, 0, filename="PR_SET_CHILD_SUBREAPER")


def set_dumpable(*, enabled: bool) -> None:
    """Whether the process leaves core dumps, and may be traced or its memory read by others of its user."""
    syscall(SYS_prctl, _PR_SET_DUMPABLE, int(enabled), 0, 0, 0, filename="PR_SET_DUMPABLE")


def set_parent_death_signal(number: int) -> None:
    """Have the calling process get a signal when its parent ends; a change of its user ids undoes it."""
    syscall(SYS_prctl, _PR_SET_PDEATHSIG, number, 0, 0, 0, filename="PR_SET_PDEATHSIG")


def forbid_new_privileges() -> None:
    """Make sure that no exec of the calling process, or of a descendant, gains anything."""
    syscall(SYS_prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, filename="PR_SET_NO_NEW_PRIVS")


def bounding_set() -> set[int]:
    """Return the numbers of the capabilities in the bounding set, also of those no library knows yet."""
    found: set[int] = set()
    for number in range(64):
        try:
            if syscall(SYS_prctl, _PR_CAPBSET_READ, number, 0, 0, 0):
                found.add(number)
        except OSError:
            break
    return found


def drop_bounding(capability: int) -> None:
    """Take a capability out of the bounding set for good."""
    syscall(SYS_prctl, _PR_CAPBSET_DROP, capability, 0, 0, 0, filename=f"PR_CAPBSET_DROP {capability}")


def reboot(command: int) -> None:
    """End this boot (RB_*). Nothing is synced. In a PID namespace it ends that namespace instead."""
    syscall(SYS_reboot, _REBOOT_MAGIC1, _REBOOT_MAGIC2, command, None, filename="reboot")


def default_signal(number: int) -> None:
    """Give a signal its default action past the C library, which keeps two for itself (rt_sigaction(2))."""
    # struct kernel_sigaction: SIG_DFL, no flags, no restorer, an empty 64-bit mask; all zero.
    syscall(SYS_rt_sigaction, number, bytes(32), None, 8)
