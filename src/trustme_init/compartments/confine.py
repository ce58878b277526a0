# SPDX-License-Identifier: Apache-2.0
"""What a compartment's init may do: capabilities, limits, signals. Called in its process before exec.

The only module that imports `prctl` (python-prctl, under the GPL version 3), and it does so late.

No capability but the eight below, no way to get more (no_new_privs, no nested user namespace), no device but
/dev's handful, and none of the system calls of `callfilter`.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from typing import Final

from trustme_init.compartments.callfilter import RULES
from trustme_init.compartments.strictcalls import HIGHEST, STRICT_RULES
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.process import bounding_set, default_signal, drop_bounding
from trustme_init.linux.seccomp import install

CORE_CAPABILITIES: Final = frozenset(
    {
        "chown",  # its own files, of which it may make for any of its 65536 users
        "dac_override",  # root reads and writes what its services own
        "fowner",  # likewise for modes and times
        "fsetid",  # keep set-group-ID directories when it changes them
        "kill",  # end services that run as another user at shutdown
        "setgid",  # start services as another user
        "setuid",  # likewise
        "net_bind_service",  # ports below 1024 of its own network namespace
    }
)
"""Allow-list for root of the core container. All of them only reach what its user namespace owns.

Left out on purpose, each with what it would open even inside a user namespace: sys_admin (mount, unmount the
masks), sys_resource (lift its own limits), net_admin and net_raw (netfilter and packet sockets, the usual
way to a kernel bug), sys_chroot, sys_ptrace, mknod, setfcap, setpcap, sys_boot, syslog, bpf, perfmon.
"""

_LIBRARY_SIGNALS: Final = (32, 33)
_DUMPABLE_NO: Final = 0
_NOFILE: Final = (1024, 65536)
_MEMLOCK: Final = 8 * 1024 * 1024
_NO_LIMIT: Final = resource.RLIM_INFINITY


def check_names(capabilities: frozenset[str]) -> None:
    """CompartmentRefusal("capability-unknown") for a name python-prctl does not know."""
    import prctl

    unknown = sorted(name for name in capabilities if not hasattr(prctl, f"CAP_{name.upper()}"))
    if unknown:
        raise CompartmentRefusal(
            "capability-unknown",
            "the compartment asks for a capability that does not exist",
            evidence=", ".join(unknown),
            remedy="use names of capabilities(7) in lower case, without CAP_",
        )


def hide_memory() -> None:
    """Make the process undumpable: the manager's memory, which it still is, cannot be read or traced.

    exec makes the program of the container dumpable again.
    """
    import prctl

    prctl.set_dumpable(_DUMPABLE_NO)


def reset_signals() -> None:
    """Give every signal its default action and block none: exec keeps what is ignored or blocked.

    The first two real-time signals belong to the C library, whose calls refuse them; its posix_spawn
    leaves them ignored, so they are asked of the kernel.
    """
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    for internal in _LIBRARY_SIGNALS:
        default_signal(internal)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def limit_resources() -> None:
    """Lower the resource limits that exec would hand on; none is raised above what the manager has."""
    for kind, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, *_NOFILE),
        (resource.RLIMIT_MEMLOCK, _MEMLOCK, _MEMLOCK),
        (resource.RLIMIT_MSGQUEUE, 819200, 819200),
        (resource.RLIMIT_NICE, 0, 0),
        (resource.RLIMIT_RTPRIO, 0, 0),
    ):
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != _NO_LIMIT:
            soft, hard = min(soft, ceiling), min(hard, ceiling)  # noqa: PLW2901 - the row, lowered
        resource.setrlimit(kind, (soft, hard))


def drop_privileges(capabilities: frozenset[str], *, no_new_privs: bool) -> None:
    """Bound the capabilities for good. Raises OSError(EPERM) if the result is not exactly what was asked for.

    exec by root gives the bounding set and nothing else: the inheritable set is emptied, and with it the
    kernel empties the ambient set.
    """
    import prctl

    keep = {getattr(prctl, f"CAP_{name.upper()}") for name in capabilities}
    prctl.capbset.limit(*keep)
    prctl.cap_inheritable.limit()
    if no_new_privs:
        prctl.set_no_new_privs(1)
    # The library knows the capabilities of its own time; the kernel may have more, so the kernel is asked.
    left = bounding_set()
    for number in left - keep:
        drop_bounding(number)
    left = bounding_set()
    if not left <= keep or bool(prctl.get_no_new_privs()) < no_new_privs:
        raise OSError(errno.EPERM, f"capabilities {sorted(left - keep)} could not be dropped", "prctl")


def filter_calls(*, strict: bool) -> None:
    """Refuse the system calls of `callfilter` from here on. OSError if the kernel has no such filters."""
    if strict:
        install(STRICT_RULES, highest=HIGHEST)
    else:
        install(RULES)


def new_session() -> None:
    """Leave the manager's session and terminal, and its file mode mask."""
    os.setsid()
    os.umask(0o022)
