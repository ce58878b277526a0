# SPDX-License-Identifier: Apache-2.0
"""Start a compartment: the manager's side.

Order: verify and open everything (hostside), make the cgroup, fork the builder, put it into the cgroup,
map its ids and the verified images, take a pidfd of its init, wait for exec. Whatever fails, in whichever
process, arrives here as a Refusal, and nothing is left: no process, cgroup, mount, device or descriptor.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.compartments import child, confine, devices, network
from trustme_init.compartments.hostside import gather
from trustme_init.compartments.report import Receiver, Sender
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.cgroup import Cgroup, Limits
from trustme_init.linux.mount import mount_setattr
from trustme_init.linux.process import pidfd_open, process_start_time, set_child_subreaper

if TYPE_CHECKING:
    from trustme_init.compartments.hostside import HostSide
    from trustme_init.compartments.spec import CompartmentSpec
    from trustme_init.machine import Machine

START_TIMEOUT: Final = 20.0
"""Seconds from fork to exec: some 30 ms natively; the rest is for emulators."""
CGROUP_PARENT: Final = "trustme"
_KILL_TIMEOUT: Final = 5.0
_REMEDY: Final = "check the kernel's namespace and cgroup options"


@dataclass(frozen=True, slots=True)
class Running:
    """A compartment's init. The owner closes `pidfd`; it is readable when init has ended."""

    uuid: str
    pid: int
    pidfd: int
    start_time: int
    """Clock ticks since boot: with the pid, its identity."""
    cgroup: Cgroup
    phases: dict[str, float] = field(default_factory=dict)
    """Milliseconds of each phase of the start; empty after an adoption."""
    absent: tuple[str, ...] = ()
    """Physical interfaces that it was to get and that were not there."""


class _Clock:
    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.monotonic()

    def phase(self, name: str) -> None:
        now = time.monotonic()
        self.phases[name] = round((now - self._last) * 1000, 2)
        self._last = now


def cgroup_of(uuid: str, machine: Machine) -> Cgroup:
    """Return the group that a compartment runs in (it need not exist)."""
    return Cgroup(machine.cgroup_root / CGROUP_PARENT / uuid)


def start(spec: CompartmentSpec, machine: Machine, directory: int) -> Running:
    """Start a compartment and return when its init has been executed.

    `directory` is an open descriptor of the folder with the GuestOS's images; it stays the caller's.
    The calling process becomes a child subreaper, so that it is init's parent and can wait for it.

    Raises CompartmentRefusal ("already-running", "controller-missing", "step-failed" with the step and the
    kernel's answer as evidence, "init-ended", "start-timeout", "mount-point-unsafe", …) or TrustRefusal
    ("image-unreadable", "image-size-mismatch", "verity-mismatch").
    """
    clock = _Clock()
    confine.check_names(spec.capabilities)
    devices.check_exclusive(spec, machine)
    if spec.network != network.Network():
        machine.network.warm()  # ready when it is needed
    with ExitStack() as opened:
        host = gather(spec, machine, directory, opened)
        clock.phase("images")
        try:
            with ExitStack() as undo:
                group = _make_cgroup(spec, machine, undo)
                clock.phase("cgroup")
                running = _fork_and_follow(spec, machine, (host, group, clock), (opened, undo))
                undo.pop_all()
        except OSError as exc:
            raise CompartmentRefusal(
                "step-failed",
                "a step of the compartment's start failed",
                evidence=f"{exc.filename}: {exc.strerror}",
                remedy=_REMEDY,
            ) from exc
    return running


def _make_cgroup(spec: CompartmentSpec, machine: Machine, undo: ExitStack) -> Cgroup:
    group = cgroup_of(spec.uuid, machine)
    parent = group.path.parent
    machine.controllers.enable(machine.cgroup_root)
    Cgroup(parent).create()
    machine.controllers.enable(parent)
    group.create()
    if group.populated:
        raise CompartmentRefusal(
            "already-running",
            "the compartment's cgroup has processes in it",
            evidence=str(group.path),
            remedy="stop the compartment first",
        )
    undo.callback(group.remove)
    limits = Limits(spec.memory_max, spec.pids_max, spec.cpus, spec.cpu_percent)
    machine.controllers.limit(group.path, limits)
    devices.restrict(group, spec)
    if spec.delegated:
        group.delegate(spec.uid_base)
    return group


def _fork_and_follow(
    spec: CompartmentSpec,
    machine: Machine,
    built: tuple[HostSide, Cgroup, _Clock],
    stacks: tuple[ExitStack, ExitStack],
) -> Running:
    host, group, clock = built
    opened, undo = stacks
    set_child_subreaper(enabled=True)
    family: list[int] = []
    report_fd, go = _fork(spec, host, opened)
    family.append(go.pid)
    undo.callback(_kill_and_reap, group, family)
    report = Receiver(report_fd, START_TIMEOUT)
    group.add(go.pid)
    go.next()
    report.expect("unshared")
    clock.phase("namespaces")
    _map_ids(spec, host, go.pid)
    go.next()
    pid = _number(report.expect("init"))
    family.append(pid)
    pidfd = pidfd_open(pid)
    undo.callback(os.close, pidfd)
    started = process_start_time(pid)
    clock.phase("init forked")
    absent = network.attach(spec.network, network.Identity(pid, started), _core(machine), machine.network)
    clock.phase("network")
    go.next(2)
    os.waitpid(go.pid, 0)
    family.remove(go.pid)
    report.expect_end()
    _check_alive(pid, pidfd)
    clock.phase("exec")
    return Running(spec.uuid, pid, pidfd, started, group, clock.phases, tuple(absent))


def _clocks_from_now() -> str:
    """Let the clocks that count from the boot begin with the container (time_namespaces(7)).

    How long the device has been up is none of its business.
    """
    clocks = (("monotonic", time.CLOCK_MONOTONIC), ("boottime", time.CLOCK_BOOTTIME))
    return "".join(f"{name} -{int(time.clock_gettime(clock))} 0\n" for name, clock in clocks)


def _core(machine: Machine) -> network.Identity | None:
    """Return the core's init as it is on record, which is where containers are connected to."""
    from trustme_init.compartments.lifecycle import read_state
    from trustme_init.compartments.spec import CORE_UUID

    record = read_state(CORE_UUID, machine)
    return None if record is None else network.Identity(record["pid"], record["start_time"])


@dataclass(frozen=True, slots=True)
class _Go:
    """The pipe on which the builder, and then init too, wait before their next stretch: a byte for each."""

    pid: int
    fd: int

    def next(self, processes: int = 1) -> None:
        # If the builder is gone, what it said about that is in the report pipe and worth more than EPIPE.
        with suppress(BrokenPipeError):
            os.write(self.fd, b"." * processes)


def _fork(spec: CompartmentSpec, host: HostSide, opened: ExitStack) -> tuple[int, _Go]:
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    go_read, go_write = os.pipe2(os.O_CLOEXEC)
    for fd in (report_read, go_write):
        opened.callback(os.close, fd)
    mask = child.block_signals()
    try:
        pid = os.fork()
        if pid == 0:
            # Else the two would keep each other's pipe open, and no end of file would ever be seen.
            os.close(report_read)
            os.close(go_write)
            child.build(spec, host, Sender(report_write), go_read)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(report_write)
        os.close(go_read)
    return report_read, _Go(pid, go_write)


def _map_ids(spec: CompartmentSpec, host: HostSide, builder: int) -> None:
    """Write the builder's id maps and map the verified images by them.

    The builder is our unreaped child, so its number in /proc can mean nobody else.
    """
    process = Path(f"/proc/{builder}")
    for name in ("uid_map", "gid_map"):
        (process / name).write_text(f"0 {spec.uid_base} {spec.uid_count}\n")
    if spec.time_namespace:
        (process / "timens_offsets").write_text(_clocks_from_now())
    user_namespace = os.open(process / "ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _, fd in host.volumes:
            if fd is not None:
                mount_setattr(fd, userns_fd=user_namespace)
    finally:
        os.close(user_namespace)


def _number(words: list[str]) -> int:
    if len(words) != 1 or not words[0].isdigit():
        raise CompartmentRefusal("step-failed", "the builder reported no process", evidence=ascii(words))
    return int(words[0])


def _check_alive(pid: int, pidfd: int) -> None:
    """Refuse if init has already ended: it was killed before exec, or its program does not stay.

    The end of the report pipe is seen in both cases, and in the second before the process counts as ended.
    But a process gives its memory up before its descriptors: without an executable it is on its way out.
    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        Path(f"/proc/{pid}/exe").stat()
        ended = bool(poll.poll(0))
    except OSError:
        ended = True
    if ended:
        poll.poll(_KILL_TIMEOUT * 1000)
        try:
            status = exit_status(pidfd, os.WNOWAIT)  # its number stays its own until the clean-up
        except BlockingIOError:
            status = None
        raise CompartmentRefusal(
            "init-ended",
            "the compartment's init ended at once",
            evidence="status unknown" if status is None else f"status {status}",
            remedy="see the compartment's log; check that its interpreter and libraries are in the image",
        )


def exit_status(pidfd: int, options: int = 0) -> int | None:
    """Reap an ended init: its exit code, or minus the signal that killed it; None if it is not our child.

    It is PID 1's child after a crash of the manager that started it. BlockingIOError if it still runs.
    """
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | options)
    except ChildProcessError:
        return None
    if result is None:
        raise BlockingIOError(errno.EAGAIN, "still runs", f"pidfd {pidfd}")
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _kill_and_reap(group: Cgroup, family: list[int]) -> None:
    """End every process of a failed start and leave no zombie.

    `family` is the builder and, as soon as it has a number, init. Before that it waits for us, alive, and so
    is among the group's processes: whatever happens, each of the two is known here.
    """
    known = dict.fromkeys([*family, *group.pids()])
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may have failed before it was put into the group
    group.kill()
    group.wait_empty(_KILL_TIMEOUT)
    # The builder comes first: when it is reaped, init has become our child.
    for pid in known:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
