# SPDX-License-Identifier: Apache-2.0
"""What happens in the compartment's own processes, from the fork to exec.

Two processes: the *builder* makes the namespaces and forks *init* into the new PID namespace. Plain fork
twice rather than one clone3: CPython's own locks and the C library's caches are only put right after a
fork that they know of. Nothing here returns: every way out is exec or `_exit`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
import termios
from pathlib import Path
from typing import Final, NoReturn

from trustme_init.compartments import confine, rootfs
from trustme_init.compartments.hostside import HostSide
from trustme_init.compartments.report import Sender
from trustme_init.compartments.spec import CompartmentSpec
from trustme_init.linux.mount import (
    MNT_DETACH,
    MS_PRIVATE,
    MS_REC,
    children_of_root,
    mount,
    move_mount,
    umount,
)
from trustme_init.linux.process import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWTIME,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    CLOSE_RANGE_CLOEXEC,
    close_range,
    unshare,
)

NAMESPACES: Final = (
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWCGROUP | CLONE_NEWPID
)

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_IFREQ: Final = struct.Struct("16sh22x")
_FAILED: Final = 127


def build(spec: CompartmentSpec, host: HostSide, report: Sender, go: int) -> NoReturn:
    """Be the builder. `go` is the pipe on which the manager lets each stretch begin."""
    status = _FAILED
    try:
        confine.reset_signals()
        confine.hide_memory()
        _await(go, report, "cgroup")
        _leave_host(host, report)
        report.step = "namespaces"
        # Whoever makes a user namespace is charged for what is used in it (inotify, signals, locked memory):
        # were that root, a compartment could use up what the manager and every other compartment may have.
        os.seteuid(spec.uid_base)
        confine.hide_memory()
        unshare(NAMESPACES | (CLONE_NEWTIME if spec.time_namespace else 0))
        report.send("unshared")
        _await(go, report, "id maps")
        # Until here this was the machine's root without a mapping; from here on it is the compartment's.
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        confine.hide_memory()
        report.step = "fork"
        pid = os.fork()
        if pid == 0:
            _init(spec, host, report, go)
        # Not reaped before the manager has its pidfd: until then the number cannot be given to another.
        report.send("init", str(pid))
        _await(go, report, "pidfd")
        status = 0
    except BaseException as exc:  # noqa: BLE001 - a fork of the manager must never unwind into its code
        _tell(report, exc)
    finally:
        os._exit(status)


def _await(go: int, report: Sender, what: str) -> None:
    report.step = what
    if not os.read(go, 1):
        os._exit(_FAILED)  # the manager gave up and knows why


def _tell(report: Sender, exc: BaseException) -> None:
    try:
        report.failed(exc)
    except OSError:
        os._exit(_FAILED)  # the manager is gone


def _leave_host(host: HostSide, report: Sender) -> None:
    """Shed the host's mounts and make the stage the root directory, still as the machine's root.

    Done in a mount namespace of the machine's user namespace, so that mounts can be shed at all; in the
    copy that the next unshare makes, each is locked. Without it the compartment would keep every file
    system of the host alive that is mounted now, however invisibly.
    """
    report.step = "oom score"
    Path("/proc/self/oom_score_adj").write_text("0")
    report.step = "leave the host's mounts"
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    for path in reversed(children_of_root(Path("/proc/self/mountinfo").read_text())):
        _detach_all(path)
    report.step = "stage"
    move_mount(host.stage, "/")
    os.fchdir(host.stage)
    os.chroot(".")
    move_mount(host.proc, "/proc")
    move_mount(host.sys, "/sys")


def _detach_all(path: str) -> None:
    """Detach every mount stacked at `path`, with all below."""
    while True:
        try:
            umount(path, MNT_DETACH)
        except OSError as exc:
            if exc.errno == errno.EINVAL:  # nothing is mounted there any more
                return
            raise


def _init(spec: CompartmentSpec, host: HostSide, report: Sender, go: int) -> NoReturn:
    try:
        # Until the manager knows us: if this fails early, somebody must be there to reap it.
        _await(go, report, "pidfd")
        report.step = "session"
        confine.new_session()
        report.step = "hostname"
        socket.sethostname(spec.hostname)
        report.step = "loopback"
        _loopback_up()
        report.step = "mount"
        root = rootfs.build(spec, host)
        report.step = "init"
        rootfs.check_init(root, spec.argv[0])
        report.step = "pivot_root"
        rootfs.enter(root)
        report.step = "console"
        _standard_descriptors(host)
        report.step = "confine"
        confine.limit_resources()
        confine.drop_privileges(spec.capabilities, no_new_privs=spec.no_new_privs)
        report.step = "call filter"
        confine.filter_calls(strict=spec.strict_calls)
        report.step = "exec"
        environment = dict(entry.split("=", 1) for entry in spec.env)
        # The report pipe among them: its end is the news that exec succeeded.
        close_range(3, flags=CLOSE_RANGE_CLOEXEC)
        os.execve(spec.argv[0], spec.argv, environment)  # noqa: S606 - what all of this is for
    except BaseException as exc:  # noqa: BLE001 - a fork of the manager must never unwind into its code
        _tell(report, exc)
    finally:
        os._exit(_FAILED)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        request = _IFREQ.pack(b"lo", 0)
        _, flags = _IFREQ.unpack(fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))


def _standard_descriptors(host: HostSide) -> None:
    """Open fds 0-2 inside the new root, so that not even their paths lead out."""
    if host.console is not None:
        terminal = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        wanted = (terminal, terminal, terminal)
    else:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        output = null if host.log is None else host.log
        wanted = (null, output, output)
    # Copies above 2 first: a source may itself be one of the numbers that are about to be replaced.
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in wanted]
    for number, fd in enumerate(copies):
        os.dup2(fd, number)


def block_signals() -> set[signal.Signals | int]:
    """Block all signals around the fork: a handler of the manager must not run in the child."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))
