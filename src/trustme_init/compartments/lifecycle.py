# SPDX-License-Identifier: Apache-2.0
"""A compartment's life: states, what may follow what, stopping, and being found again after a crash.

Synchronous and without threads: the manager's loop watches `running.pidfd`, keeps the deadlines this module
names, and calls `booted`, `expired` and `ended`. What must survive the manager is in
/run/trustme/compartments/<uuid>/state.json, written before a change is told to anybody.
"""

from __future__ import annotations

import enum
import json
import os
import re
import select
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trustme_init.compartments.devices import on_record
from trustme_init.compartments.start import Running, cgroup_of, exit_status, start
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.cgroup import EventsWatch
from trustme_init.linux.files import write_atomic
from trustme_init.linux.process import pidfd_open, process_start_time, set_child_subreaper

if TYPE_CHECKING:
    from trustme_init.compartments.spec import CompartmentSpec
    from trustme_init.machine import Machine

STOP_TIMEOUT: Final = 45.0
"""Seconds between SHUTDOWN and SIGKILL (interop section 2.10, step 7)."""
KILL_TIMEOUT: Final = 5.0
STATE_VERSION: Final = 1
STATE_LIMIT: Final = 64 * 1024
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class State(enum.IntEnum):
    """ContainerState (container.proto), the same numbers, without protobuf's import."""

    STOPPED = 1
    STARTING = 2
    BOOTING = 3
    RUNNING = 4
    FREEZING = 5
    FROZEN = 6
    ZOMBIE = 7
    SHUTDOWN = 8
    SETUP = 9
    REBOOTING = 10


TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.STOPPED: frozenset({State.STARTING}),
    State.STARTING: frozenset({State.BOOTING, State.SETUP, State.STOPPED}),
    State.BOOTING: frozenset({State.RUNNING, State.SHUTDOWN, State.STOPPED, State.ZOMBIE, State.REBOOTING}),
    State.RUNNING: frozenset({State.FREEZING, State.SHUTDOWN, State.STOPPED, State.ZOMBIE, State.REBOOTING}),
    State.SETUP: frozenset({State.SHUTDOWN, State.STOPPED, State.ZOMBIE}),
    State.FREEZING: frozenset({State.FROZEN, State.RUNNING, State.STOPPED, State.ZOMBIE}),
    State.FROZEN: frozenset({State.RUNNING, State.STOPPED, State.ZOMBIE}),
    State.SHUTDOWN: frozenset({State.STOPPED, State.ZOMBIE}),
    State.REBOOTING: frozenset({State.STARTING, State.STOPPED, State.ZOMBIE}),
    # Init has ended and something of it cannot be removed: only a successful clean-up leads out.
    State.ZOMBIE: frozenset({State.STOPPED}),
}


class Compartment:
    """One compartment and the state it is in. `on_change(compartment)` is called after each transition."""

    def __init__(
        self,
        spec: CompartmentSpec,
        machine: Machine,
        *,
        on_change: Callable[[Compartment], None] = lambda _: None,
    ) -> None:
        self.spec = spec
        self.running: Running | None = None
        self.state = State.STOPPED
        self.exit_status: int | None = None
        """Of the last init: code, or minus the signal; None if unknown."""
        self.started_at = 0.0
        """CLOCK_BOOTTIME in seconds, 0 when it is not running."""
        self._machine = machine
        self._on_change = on_change

    def start(self, directory: int) -> Running:
        """Start it from the open directory of its images; BOOTING afterwards, STOPPED after a refusal."""
        self._become(State.STARTING)
        try:
            self.running = start(self.spec, self._machine, directory)
        except BaseException:
            self._become(State.STOPPED)
            raise
        self.started_at = _boottime()
        self._become(State.BOOTING)
        return self.running

    def adopt(self) -> bool:
        """Take over what an earlier manager started; False (and STOPPED) if it is not there any more.

        The state is as recorded, so RUNNING stays RUNNING: init says BOOT_COMPLETED again when it reconnects.
        """
        record = read_state(self.spec.uuid, self._machine)
        found = adopt(self.spec.uuid, self._machine)
        if record is None or found is None:
            return False
        set_child_subreaper(enabled=True)
        self.running = found
        self.state = State(record["state"])
        self.started_at = float(record["started_at"])
        self._on_change(self)
        if self.state is State.FREEZING:
            self.thaw()  # whoever wanted it frozen is gone with the manager that was asked
        return True

    def booted(self) -> None:
        """BOOT_COMPLETED arrived. Repetitions (after a manager restart) change nothing."""
        if self.state is State.BOOTING:
            self._become(State.RUNNING)

    def stop(self, shutdown: Callable[[], bool]) -> float:
        """Begin to stop it; return after how many seconds `expired` is due, 0 if it was killed at once.

        `shutdown` sends SHUTDOWN on the service connection and returns whether there was one.
        """
        if self.running is None or self.state is State.SHUTDOWN:
            return 0.0
        if self.state in (State.FREEZING, State.FROZEN):
            self.thaw()  # to shut down in an orderly way it must run
        self._become(State.SHUTDOWN)
        if shutdown():
            return STOP_TIMEOUT
        self.kill()
        return 0.0

    def freeze(self) -> EventsWatch:
        """Begin to stop all of its processes; FREEZING afterwards.

        The caller waits on what is returned, calls `frozen` at each change, `thaw` if that takes too long.
        """
        if self.running is None:
            raise _not_allowed(self.state, State.FREEZING)
        watch = EventsWatch(self.running.cgroup)
        try:
            self._become(State.FREEZING)
            self._set_frozen(frozen=True)
        except BaseException:
            watch.close()
            raise
        return watch

    def frozen(self, events: Mapping[str, int]) -> bool:
        """Take note of `cgroup.events`; whether it is FROZEN now."""
        if self.state is State.FREEZING and events.get("frozen"):
            self._become(State.FROZEN)
        return self.state is State.FROZEN

    def thaw(self) -> None:
        """Let its processes go on; RUNNING afterwards."""
        if self.running is None or self.state not in (State.FREEZING, State.FROZEN):
            raise _not_allowed(self.state, State.RUNNING)
        self._set_frozen(frozen=False)
        self._become(State.RUNNING)

    def _set_frozen(self, *, frozen: bool) -> None:
        if self.running is not None:
            try:
                self.running.cgroup.freeze(frozen=frozen)
            except OSError as exc:
                raise _refusal("freeze-failed", "the compartment cannot be frozen or thawed", exc) from exc

    def expired(self) -> None:
        """The deadline of `stop` has passed."""
        if self.running is not None:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to every process; `ended` follows by way of the pidfd."""
        if self.running is not None:
            try:
                self.running.cgroup.kill()
            except OSError as exc:
                raise _refusal("kill-failed", "the compartment cannot be killed", exc) from exc

    def ended(self) -> int | None:
        """Clean up after init has ended (the pidfd became readable); return its exit status.

        CompartmentRefusal("cleanup-failed"), and ZOMBIE, if a process or the cgroup remains.
        """
        running = self.running
        if running is None:
            return self.exit_status
        with suppress(BlockingIOError):
            self.exit_status = exit_status(running.pidfd)
        try:
            # The PID namespace died with its init; whatever else is in the group is on its way out.
            if running.cgroup.path.exists():
                running.cgroup.kill()
                running.cgroup.wait_empty(KILL_TIMEOUT)
                running.cgroup.remove()
        except OSError as exc:
            if self.state is not State.ZOMBIE:
                self._become(State.ZOMBIE)
            raise _refusal("cleanup-failed", "a part of the compartment cannot be removed", exc) from exc
        os.close(running.pidfd)
        self.running = None
        self.started_at = 0.0
        self._become(State.STOPPED)
        return self.exit_status

    def wait(self, timeout: float) -> bool:
        """Wait until init has ended; for those without a loop. Return whether it has."""
        if self.running is None:
            return True
        poll = select.poll()
        poll.register(self.running.pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def _become(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise _not_allowed(self.state, state)
        self.state = state
        self._record()
        self._on_change(self)

    def _record(self) -> None:
        path = _state_path(self.spec.uuid, self._machine)
        running = self.running
        if self.state is State.STOPPED or running is None:
            path.unlink(missing_ok=True)
            return
        record = {
            "version": STATE_VERSION,
            "uuid": self.spec.uuid,
            "name": self.spec.name,
            "state": int(self.state),
            "pid": running.pid,
            "start_time": running.start_time,
            "cgroup": str(running.cgroup.path),
            "started_at": self.started_at,
            **on_record(self.spec),
        }
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomic(path, json.dumps(record).encode(), 0o600)


def read_state(uuid: str, machine: Machine) -> dict[str, Any] | None:
    """Return the record of a compartment, None if there is none that makes sense."""
    if not _UUID.fullmatch(uuid):
        return None
    try:
        with _state_path(uuid, machine).open("rb") as file:
            record = json.loads(file.read(STATE_LIMIT))
    except (OSError, ValueError):
        return None
    wanted = {"version": int, "state": int, "pid": int, "start_time": int, "started_at": float, "cgroup": str}
    if not isinstance(record, dict) or any(type(record.get(key)) is not kind for key, kind in wanted.items()):
        return None
    if record["version"] != STATE_VERSION or record["state"] not in set(State) or record["pid"] < 1:
        return None
    return record


def adopt(uuid: str, machine: Machine) -> Running | None:
    """Find the running init that is on record: the same process (pid and start time), in its own cgroup."""
    record = read_state(uuid, machine)
    if record is None:
        return None
    group = cgroup_of(uuid, machine)
    if record["cgroup"] != str(group.path):
        return None
    pid: int = record["pid"]
    try:
        # The descriptor first: if the start time fits afterwards, it fitted when the descriptor was taken.
        pidfd = pidfd_open(pid)
    except OSError:
        return None
    try:
        if process_start_time(pid) == record["start_time"] and group.contains(pid):
            return Running(uuid, pid, pidfd, record["start_time"], group)
    except OSError:
        pass
    os.close(pidfd)
    return None


def clear(uuid: str, machine: Machine) -> None:
    """Remove what an earlier manager left and nobody can adopt: processes, cgroup, record.

    CompartmentRefusal("cleanup-failed") if a process does not die.
    """
    group = cgroup_of(uuid, machine)
    try:
        if group.path.exists():
            group.kill()
            group.wait_empty(KILL_TIMEOUT)
            group.remove()
        _state_path(uuid, machine).unlink(missing_ok=True)
    except OSError as exc:
        raise _refusal("cleanup-failed", "what an earlier manager left cannot be removed", exc) from exc


def _state_path(uuid: str, machine: Machine) -> Path:
    return machine.compartments / uuid / "state.json"


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _not_allowed(present: State, wanted: State) -> CompartmentRefusal:
    return CompartmentRefusal(
        "transition-not-allowed",
        "the compartment is not in a state for this",
        evidence=f"{present.name} to {wanted.name}",
        remedy="wait until it has started or stopped",
    )


def _refusal(code: str, cause: str, exc: OSError) -> CompartmentRefusal:
    return CompartmentRefusal(
        code,
        cause,
        evidence=f"{exc.filename}: {exc.strerror}",
        remedy="reboot the device: a process that survives SIGKILL waits inside the kernel",
    )
