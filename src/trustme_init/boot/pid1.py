# SPDX-License-Identifier: Apache-2.0
"""PID 1: mounts, starts the manager, reaps everything, restarts it, reboots. Nothing else.

It parses no byte that comes from outside and imports the standard library only (and our own `linux`
room, which does the same). The manager is a fork of it, so a restart costs neither an interpreter start
nor a second copy of what is shared. It must never end: the kernel would panic instead of showing why.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from trustme_init.boot import early
from trustme_init.boot.console import REBOOT_DELAY, Console, boottime_ms
from trustme_init.boot.stages import EARLY, stage_line
from trustme_init.errors import DeviceRefusal
from trustme_init.linux.mount import MNT_DETACH, umount
from trustme_init.linux.process import RB_AUTOBOOT, RB_POWER_OFF, reboot, set_dumpable

if TYPE_CHECKING:
    from trustme_init.machine import Machine

EXIT_REBOOT: Final = 90
EXIT_POWER_OFF: Final = 91
EXIT_REFUSED: Final = 92
"""The manager showed a failure screen; PID 1 waits and reboots."""

MAX_FAILURES: Final = 3
STABLE_AFTER: Final = 60.0
"""Seconds after which a running manager is considered well, and its earlier failures forgotten."""
BACK_OFF: Final = (0.0, 0.2, 1.0)
TERM_GRACE: Final = 5.0
MANAGER_OOM_SCORE: Final = "-900"


class RestartPolicy:
    """When a dead manager is started again."""

    def __init__(self) -> None:
        self.failures = 0

    def after(self, ran_for: float) -> float | None:
        """Return the seconds to wait before the next start, None when it failed too often in a row."""
        self.failures = 1 if ran_for >= STABLE_AFTER else self.failures + 1
        if self.failures >= MAX_FAILURES:
            return None
        return BACK_OFF[min(self.failures, len(BACK_OFF)) - 1]


def main() -> NoReturn:
    """Entry of `/init`."""
    run(_production_machine, Console(Path("/dev/console")))


def _production_machine() -> Machine:
    from trustme_init.machine import Machine

    return Machine()


def run(make_machine: Callable[[], Machine], console: Console) -> NoReturn:
    """Be PID 1 of this machine (or of a test's PID namespace); ends in reboot(2), never returns.

    `make_machine` is called after the early mounts, so that its imports do not delay the first line.
    """
    started = boottime_ms()
    # Imports make many objects and no garbage: looking for it costs 4 % of the CPU until the hand-off.
    gc.disable()
    early.own_environment()
    # Blocked, not ignored: sigtimedwait collects them, and a child starts with a clean slate.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
    status = EXIT_REFUSED
    volumes: tuple[Path, ...] = ()
    try:
        took = _begin(console, started)
        machine = make_machine()
        volumes = (machine.data, machine.store)
        machine.run.mkdir(mode=0o755, parents=True, exist_ok=True)
        console.log_to(machine.log_dir / "boot.log")
        status = _supervise(machine, console, started, took)
    except DeviceRefusal as refusal:
        console.refusal(EARLY, refusal)
    except Exception as exc:  # noqa: BLE001 - what leaves PID 1 is a kernel panic, without a reason
        console.refusal(
            "init",
            DeviceRefusal(
                "init-failed",
                "PID 1 met something that it was not made for",
                evidence=console.trace(exc),
                remedy="report this with the log of this boot; flash a known good image if it persists",
            ),
        )
    _end(volumes, RB_POWER_OFF if status == EXIT_POWER_OFF else RB_AUTOBOOT, _delay(status))


def _begin(console: Console, started: float) -> float:
    """Do the first stage; return how long it took."""
    try:
        early.mount_kernel_filesystems(early.EARLY_MOUNTS)
        early.quieten_console()
    except OSError as exc:
        raise DeviceRefusal(
            "early-mounts-failed",
            "a kernel file system cannot be mounted",
            evidence=f"{exc.filename}: {exc.strerror}",
            remedy="the kernel of this base system lacks a required option; flash a complete image",
        ) from exc
    took = boottime_ms() - started
    console.line(stage_line(1, EARLY, took))
    return took


def _delay(status: int) -> float:
    return REBOOT_DELAY if status not in (EXIT_REBOOT, EXIT_POWER_OFF) else 0


def _supervise(machine: Machine, console: Console, started: float, took: float) -> int:
    """Keep a manager running; return the exit code that ends this boot."""
    policy = RestartPolicy()
    while True:
        born = time.monotonic()
        manager = os.fork()
        if manager == 0:
            _become_manager(machine, console, started, took)
        gc.enable()
        status = os.waitstatus_to_exitcode(_reap_until(manager))
        if status in (EXIT_REBOOT, EXIT_POWER_OFF, EXIT_REFUSED):
            return status
        console.line(f"manager ended unexpectedly ({_describe(status)})")
        wait = policy.after(time.monotonic() - born)
        if wait is None:
            console.refusal(
                "manager",
                DeviceRefusal(
                    "manager-failed",
                    f"the manager ended {MAX_FAILURES} times in a row",
                    evidence=f"last: {_describe(status)}",
                    remedy="read the log of the last boot; flash a known good image if it persists",
                ),
            )
            return EXIT_REFUSED
        if not _end_group(manager):
            console.refusal(
                "manager",
                DeviceRefusal(
                    "manager-remains",
                    "something that the ended manager had started does not end",
                    evidence=f"process group {manager} outlived SIGKILL by {TERM_GRACE:.0f} s",
                    remedy="check the disk and the TPM: it waits inside a driver",
                ),
            )
            return EXIT_REFUSED
        _reap_for(wait)


def _describe(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-status}"


def _end_group(manager: int) -> bool:
    """End what a dead manager was still running; return whether all of it is gone.

    A tool that formats a partition must not go on beside that of the next manager. The core container is in
    a session of its own and stays.
    """
    deadline = time.monotonic() + TERM_GRACE
    while True:
        try:
            os.killpg(manager, signal.SIGKILL)
        except ProcessLookupError:
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        # What it leaves are our children now, and a zombie still belongs to the group.
        if not os.waitpid(-1, os.WNOHANG)[0]:
            signal.sigtimedwait({signal.SIGCHLD}, left)


def _become_manager(machine: Machine, console: Console, started: float, took: float) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)  # what it starts and leaves behind is then found by this number
        _prefer_to_live()
        set_dumpable(enabled=False)  # PINs pass through its memory
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        from trustme_init.boot import manager

        status = manager.run(machine, console, early=(started, took))
    except BaseException as exc:  # noqa: BLE001 - the child of PID 1 must never unwind into PID 1's code
        console.line(f"manager: {console.trace(exc)}")
    finally:
        os._exit(status)


def _prefer_to_live() -> None:
    """When memory is short, the kernel shall look elsewhere first; a compartment's init undoes this."""
    try:
        Path("/proc/self/oom_score_adj").write_text(MANAGER_OOM_SCORE)
    except OSError:
        return  # without CAP_SYS_RESOURCE, as in some test hosts: no reason not to boot


def _reap_until(pid: int) -> int:
    """Reap whatever ends until `pid` does; return its wait status."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return status


def _reap_for(seconds: float) -> None:
    """Reap for a while."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        left = deadline - time.monotonic()
        if left <= 0:
            return
        signal.sigtimedwait({signal.SIGCHLD}, left)


def _end(volumes: tuple[Path, ...], command: int, delay: float) -> NoReturn:
    """Wait, end every process, write everything back, and leave."""
    _reap_for(delay)
    for number, grace in ((signal.SIGTERM, TERM_GRACE), (signal.SIGKILL, 1.0)):
        try:
            os.kill(-1, number)
        except OSError:  # nobody is left
            break
        _reap_children(grace)
    os.sync()
    for path in volumes:
        for flags in (0, MNT_DETACH):
            try:
                umount(str(path), flags)
            except OSError:
                continue
            break
    os.sync()
    while True:
        try:
            reboot(command)
        except OSError:
            command = RB_AUTOBOOT
        # In a PID namespace the kernel ends us with a signal; on a device nothing comes back.
        _reap_for(REBOOT_DELAY)


def _reap_children(grace: float) -> None:
    """Reap until no child is left or `grace` seconds have passed."""
    deadline = time.monotonic() + grace
    while (left := deadline - time.monotonic()) > 0:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if ended == 0:
            signal.sigtimedwait({signal.SIGCHLD}, left)
