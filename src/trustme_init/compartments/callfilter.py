# SPDX-License-Identifier: Apache-2.0
"""System calls that no compartment may make: doors past its namespaces and limits that need no capability.

A short deny list, and all that the core is under. Each entry says what it would open. What capabilities,
namespaces and cgroups already stop is not repeated. Other containers are under `strictcalls` as well.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from trustme_init.linux.seccomp import Argument, Rule

# arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
_NUMBERS: Final = {
    "x86_64": {
        "ioctl": 16,
        "socket": 41,
        "setsockopt": 54,
        "syslog": 103,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "perf_event_open": 298,
        "open_by_handle_at": 304,
        "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        "ioctl": 29,
        "socket": 198,
        "setsockopt": 208,
        "syslog": 116,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "perf_event_open": 241,
        "open_by_handle_at": 265,
        "bpf": 280,
        "userfaultfd": 282,
    },
}
_NUMBER: Final = _NUMBERS[os.uname().machine]

DENIED: Final = {
    # No namespace has keys: the manager's session keyring is inherited, and what each of 65536 users may
    # keep in the kernel is in no memory limit.
    "add_key": _NUMBER["add_key"],
    "request_key": _NUMBER["request_key"],
    "keyctl": _NUMBER["keyctl"],
    # The kernel log is the machine's, and only a sysctl that not every kernel has set hides it.
    "syslog": _NUMBER["syslog"],
    # Large parts of the kernel, often broken. io_uring also makes the calls below without being seen here.
    "bpf": _NUMBER["bpf"],
    "perf_event_open": _NUMBER["perf_event_open"],
    "userfaultfd": _NUMBER["userfaultfd"],
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    # Opens files by number instead of by a path below the root.
    "open_by_handle_at": _NUMBER["open_by_handle_at"],
}

SOCKET_FAMILIES: Final = frozenset({socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK})
"""Others are not bound to a network namespace (AF_VSOCK reaches the hypervisor), or load rare modules."""

_TIOCSTI: Final = 0x5412
_TIOCLINUX: Final = 0x541C
_TIOCSETD: Final = 0x5423
TERMINAL_REQUESTS: Final = frozenset({_TIOCSTI, _TIOCLINUX, _TIOCSETD})
"""Type for others on a terminal, paste its selection, load a line discipline."""

RULES: Final = (
    *(Rule(number, errno.EPERM) for number in DENIED.values()),
    Rule(_NUMBER["socket"], errno.EAFNOSUPPORT, (Argument(0, SOCKET_FAMILIES, inside=False),)),
    Rule(_NUMBER["ioctl"], errno.EPERM, (Argument(1, TERMINAL_REQUESTS),)),
    # Whoever closes a lingering connection last waits for its peer. A descriptor sent to the manager over
    # its own socket is closed by the manager, which would serve nobody for as long as the sender likes.
    Rule(
        _NUMBER["setsockopt"],
        errno.EPERM,
        (Argument(1, frozenset({socket.SOL_SOCKET})), Argument(2, frozenset({socket.SO_LINGER}))),
    ),
)
