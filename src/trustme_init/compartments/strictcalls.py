# SPDX-License-Identifier: Apache-2.0
"""The system calls of containers beside the core: an allow-list, in effect that of container runtimes.

Allowed are all calls up to the newest that was looked at, without those that administer a machine, name
foreign memory or processes, or make namespaces and mounts. Most of these would fail anyway; here they do so
before the kernel has run any code for them. Numbers are those of arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from trustme_init.compartments.callfilter import RULES
from trustme_init.linux.seccomp import Argument, Rule

_STRICT_NUMBERS: Final = {
    "x86_64": {
        "uselib": 134,
        "personality": 135,
        "ustat": 136,
        "sysfs": 139,
        "vhangup": 153,
        "modify_ldt": 154,
        "pivot_root": 155,
        "_sysctl": 156,
        "acct": 163,
        "settimeofday": 164,
        "mount": 165,
        "umount2": 166,
        "swapon": 167,
        "swapoff": 168,
        "iopl": 172,
        "ioperm": 173,
        "create_module": 174,
        "init_module": 175,
        "delete_module": 176,
        "get_kernel_syms": 177,
        "query_module": 178,
        "quotactl": 179,
        "nfsservctl": 180,
        "lookup_dcookie": 212,
        "clock_settime": 227,
        "mbind": 237,
        "set_mempolicy": 238,
        "get_mempolicy": 239,
        "kexec_load": 246,
        "migrate_pages": 256,
        "unshare": 272,
        "move_pages": 279,
        "name_to_handle_at": 303,
        "clock_adjtime": 305,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "kcmp": 312,
        "finit_module": 313,
        "kexec_file_load": 320,
    },
    "aarch64": {
        "lookup_dcookie": 18,
        "umount2": 39,
        "mount": 40,
        "pivot_root": 41,
        "nfsservctl": 42,
        "vhangup": 58,
        "quotactl": 60,
        "acct": 89,
        "personality": 92,
        "unshare": 97,
        "kexec_load": 104,
        "init_module": 105,
        "delete_module": 106,
        "clock_settime": 112,
        "settimeofday": 170,
        "swapon": 224,
        "swapoff": 225,
        "mbind": 235,
        "get_mempolicy": 236,
        "set_mempolicy": 237,
        "migrate_pages": 238,
        "move_pages": 239,
        "name_to_handle_at": 264,
        "clock_adjtime": 266,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "kcmp": 272,
        "finit_module": 273,
        "kexec_file_load": 294,
    },
}
STRICT_DENIED: Final = {
    **_STRICT_NUMBERS[os.uname().machine],
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "memfd_secret": 447,
    "process_mrelease": 448,
    "set_mempolicy_home_node": 450,
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
}
HIGHEST: Final = 466
"""removexattrat (Linux 6.13), the newest call that was looked at."""

PERSONALITIES: Final = frozenset({0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF})
"""Linux as it is, 32-bit addresses, old release numbers, and to ask: none that weakens memory protection."""

STRICT_RULES: Final = (
    *RULES,
    *(Rule(number, errno.EPERM) for name, number in STRICT_DENIED.items() if name != "personality"),
    Rule(
        STRICT_DENIED["personality"],
        errno.EPERM,
        (Argument(0, PERSONALITIES, inside=False),),
    ),
)
