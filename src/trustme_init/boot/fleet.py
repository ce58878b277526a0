# SPDX-License-Identifier: Apache-2.0
"""The containers beside the core, as the manager has them: which there are, which run, what is asked of them.

The vault judges and opens; this module keeps what the vault said, starts what it opened, and watches. Rules:
- Of one container one thing happens at a time: while the vault opens it, it is STARTING and nothing else is
  begun with it.
- Whatever fails on the way to a running container gives its volumes back.
- A container that runs keeps the configuration that it was started with; a new one counts from its end on.
- A manager that is started anew adopts what runs, and clears away what does not any more.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from trustme_init.boot.fleet_guest import Around, Opened, RunningGuest, clear, left_over, read_left_over
from trustme_init.compartments.lifecycle import State
from trustme_init.compartments.spec import CORE_UUID
from trustme_init.containers.config import parse
from trustme_init.control.state import Answered, ContainerView
from trustme_init.errors import CompartmentRefusal, ControlRefusal, Refusal
from trustme_init.guestos.store import GuestOsStore
from trustme_init.proto import container_pb2 as proto
from trustme_init.provisioning.layout import Layout

if TYPE_CHECKING:
    from trustme_init.compartments.lifecycle import Compartment
    from trustme_init.trust.selection import GuestOsId

REBOOTED: Final = -1
"""Exit status of an init that called reboot(2): the kernel sends SIGHUP (SIGINT for halt and power-off)."""


class AskVault(Protocol):
    """`Device.vault`."""

    def __call__(self, operation: str, arguments: Mapping[str, str | bytes], done: Answered) -> None:
        """Have the operation done; `done` is called once."""
        ...


@dataclass(slots=True)
class _Known:
    """A container that there is."""

    said: Mapping[str, Any]
    """By the vault; of the configuration that counts now."""
    config: proto.ContainerConfig | None
    """None of one that has a problem."""
    opening: bool = False
    """The vault was asked to open it."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """What waits for its end."""


class Fleet:
    """Implements `control.state.Containers`."""

    def __init__(self, around: Around, vault: AskVault) -> None:
        self._around = around
        self._vault = vault
        self._store = GuestOsStore(Layout(around.machine.data).home)
        self._known: dict[str, _Known] = {}
        self._running: dict[str, RunningGuest] = {}
        self._loaded = False
        self._waiting: list[Callable[[], None]] = []
        self._all_ended: Callable[[], None] | None = None
        self._going_down = False

    # Which containers there are

    def when_known(self, done: Callable[[], None]) -> None:
        """Call `done` as soon as the vault has said which containers there are."""
        if self._loaded:
            done()
            return
        self._waiting.append(done)
        if len(self._waiting) == 1:
            self._load(lambda _result, _refusal: None)

    def _load(self, done: Answered) -> None:
        self._vault("containers", {}, partial(self._listed, done))

    def _listed(self, done: Answered, result: Mapping[str, Any], refusal: Refusal | None) -> None:
        if refusal is not None:
            self._around.log(f"containers: {refusal}")
            self._load_ended(done, refusal)
            return
        found: dict[str, _Known] = {}
        self._describe(list(result["containers"]), found, done)

    def _describe(self, uuids: list[str], found: dict[str, _Known], done: Answered) -> None:
        """Ask for one after the other: what is said of all could be too long for one message."""
        if not uuids:
            for uuid, known in found.items():
                self._remember(uuid, known.said)
            for uuid in self._known.keys() - found.keys():
                if uuid not in self._running and not self._known[uuid].opening:
                    del self._known[uuid]
            self._loaded = True
            self._load_ended(done, None)
            return
        uuid, *rest = uuids

        def described(said: Mapping[str, Any], refusal: Refusal | None) -> None:
            if refusal is None:
                found[uuid] = _Known(said, None)
            else:
                self._around.log(f"container {uuid}: {refusal}")
            self._describe(rest, found, done)

        self._vault("container", {"uuid": uuid}, described)

    def _load_ended(self, done: Answered, refusal: Refusal | None) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each()
        done({}, refusal)

    def _remember(self, uuid: str, said: Mapping[str, Any]) -> None:
        """Take over what the vault says of a container; of one that runs, its configuration later."""
        known = self._known.get(uuid)
        if known is not None and uuid in self._running:
            known.at_end.append(partial(self._remember, uuid, said))
            known.said = {**known.said, "token": said.get("token", "")}
            return
        config = None
        if said["problem"] is None:
            config = parse(base64.b64decode(said["config"]))
        if known is None:
            self._known[uuid] = _Known(said, config)
        else:
            known.said, known.config = said, config

    def views(self) -> Sequence[ContainerView]:
        """Return all containers, oldest first."""
        ordered = sorted(self._known.items(), key=lambda item: (item[1].said["created"], item[0]))
        return [self._view(uuid, known) for uuid, known in ordered]

    def _view(self, uuid: str, known: _Known) -> ContainerView:
        running = self._running.get(uuid)
        config = known.config
        if running is not None:
            state, started = running.compartment.state, running.compartment.started_at
        else:
            state, started = (State.STARTING if known.opening else State.STOPPED), 0.0
        encrypted = running is not None and bool(running.opened.volumes)
        problem = known.said["problem"]
        return ContainerView(
            uuid=uuid,
            name=config.name if config is not None else uuid,
            state=proto.ContainerState.ValueType(state),
            guest_os=config.guest_os if config is not None else "",
            created=known.said["created"],
            uptime=int(time.clock_gettime(time.CLOCK_BOOTTIME) - started) if started else 0,
            trust=proto.ContainerTrust.ValueType(known.said.get("trust", proto.UNSIGNED)),
            cryptfs_mode=proto.INTEGRITY_ENCRYPT if encrypted else proto.NOT_IMPLEMENTED,
            config=config,
            needs_pin=bool(known.said.get("needs_pin")),
            problem=f"{problem['code']}: {problem['cause']} ({problem['evidence']})" if problem else "",
            token=known.said.get("token", ""),
        )

    def compartment(self, uuid: str) -> Compartment | None:
        """Return the compartment of a container that runs."""
        running = self._running.get(uuid)
        return running.compartment if running is not None else None

    def guestos_running(self) -> Iterable[GuestOsId]:
        """Return the versions that containers run now."""
        return [running.opened.guest_os for running in self._running.values()]

    # A boot, a new manager, a reboot

    def begin(self) -> None:
        """Find out what there is, and start what starts by itself; the core runs."""
        self.when_known(self._autostart)

    def _autostart(self) -> None:
        for uuid, known in list(self._known.items()):
            config = known.config
            if config is not None and config.allow_autostart and not known.said["needs_pin"]:
                self.start(uuid, None, partial(self._autostarted, uuid))

    def _autostarted(self, uuid: str, _result: Mapping[str, Any], refusal: Refusal | None) -> None:
        if refusal is not None and refusal.code != "container-running":
            self._around.log(f"container {uuid} does not start by itself: {refusal}")

    def resume(self) -> None:
        """Adopt what an earlier manager of this boot started, and clear away what has ended since."""
        machine = self._around.machine
        for uuid in left_over(machine, CORE_UUID):
            opened = read_left_over(uuid, machine)
            running = None if opened is None else RunningGuest(opened, self._around, self._ended)
            if running is not None and running.adopt():
                self._running[uuid] = running
                continue
            self._around.log(f"container {uuid} ended while no manager was there")
            try:
                clear(uuid, machine)
            except CompartmentRefusal as refusal:
                self._around.log(f"container {uuid}: {refusal}")
        self.when_known(self._release_others)

    def _release_others(self) -> None:
        """Give back the volumes that the earlier manager had opened and not come to start."""
        for uuid in self._known.keys() - self._running.keys():
            self._release(uuid)

    def stop_all(self, done: Callable[[], None]) -> None:
        """Stop every container, and start none any more; `done` is called when none runs."""
        self._all_ended = done
        self._going_down = True
        for running in list(self._running.values()):
            try:
                running.stop()
            except Refusal as refusal:
                self._around.log(f"container {running.uuid}: {refusal}")
                running.kill()
        self._all_ended_perhaps()

    def _all_ended_perhaps(self) -> None:
        if self._all_ended is not None and not self._running:
            done, self._all_ended = self._all_ended, None
            done()

    # What is asked of one

    def create(self, config: bytes, signature: bytes, certificate: bytes, done: Answered) -> None:
        """Create a container."""
        arguments = {"config": config, "signature": signature, "certificate": certificate}
        self._vault("container-create", arguments, partial(self._changed, done))

    def update(self, uuid: str, parts: tuple[bytes, bytes, bytes], done: Answered) -> None:
        """Replace a container's configuration."""
        config, signature, certificate = parts
        arguments: dict[str, str | bytes] = {"uuid": uuid, "config": config}
        arguments |= {"signature": signature, "certificate": certificate}
        self._vault("container-update", arguments, partial(self._changed, done))

    def change_pin(self, uuid: str, pin: str, new_pin: str, done: Answered) -> None:
        """Change the PIN of a container's token."""
        arguments = {"uuid": uuid, "pin": pin, "new_pin": new_pin}
        self._vault(
            "container-change-pin", arguments, partial(self._pin_tried, uuid, partial(self._changed, done))
        )

    def _changed(self, done: Answered, said: Mapping[str, Any], refusal: Refusal | None) -> None:
        if refusal is None:
            self._remember(said["uuid"], said)
        done(said, refusal)

    def _pin_tried(self, uuid: str, done: Answered, said: Mapping[str, Any], refusal: Refusal | None) -> None:
        """Take note of how the token stands now, before whoever asked can ask about that."""

        def told(now: Mapping[str, Any], _: Refusal | None) -> None:
            known = self._known.get(uuid)
            if known is not None and "token" in now:
                known.said = {**known.said, "token": now["token"]}
            done(said, refusal)

        if refusal is None:
            told(said, None)
        elif refusal.code.startswith("token-"):
            self._vault("container", {"uuid": uuid}, told)
        else:
            done(said, refusal)

    def reload(self, done: Answered) -> None:
        """Ask the vault anew for everything."""
        self._load(done)

    def remove(self, uuid: str, done: Answered) -> None:
        """Kill a container if it runs, and remove it."""
        if self._refused_if_opening(uuid, done):
            return
        running = self._running.get(uuid)
        if running is not None:
            self._known[uuid].at_end.append(lambda: self.remove(uuid, done))
            running.kill()
            return
        self._release(uuid)
        self._vault("container-remove", {"uuid": uuid}, partial(self._removed, uuid, done))

    def _removed(self, uuid: str, done: Answered, result: Mapping[str, Any], refusal: Refusal | None) -> None:
        if refusal is None:
            self._known.pop(uuid, None)
            with suppress(OSError):
                (self._around.machine.compartment_log_dir / f"{uuid}.log").unlink(missing_ok=True)
        done(result, refusal)

    def wipe(self, uuid: str, done: Answered) -> None:
        """Remove the data of a container that does not run."""
        if self._refused_if_opening(uuid, done):
            return
        if uuid in self._running:
            done({}, _busy("container-running", "the container runs", "stop it first"))
            return
        self._release(uuid)
        self._vault("container-wipe", {"uuid": uuid}, done)

    def _refused_if_opening(self, uuid: str, done: Answered) -> bool:
        known = self._known.get(uuid)
        if known is None:
            done({}, _unknown(uuid))
            return True
        if known.opening:
            done({}, _busy("container-running", "the container is being started", "wait, or stop it"))
            return True
        return False

    # Starting

    def start(self, uuid: str, pin: str | None, done: Answered) -> None:
        """Have a container opened, then start it."""
        if self._refused_if_opening(uuid, done):
            return
        if uuid in self._running:
            done({}, _busy("container-running", "the container runs already", ""))
            return
        if self._going_down:
            done({}, _busy("device-going-down", "the device is about to reboot", "start it after that"))
            return
        self._known[uuid].opening = True
        arguments = {"uuid": uuid} if pin is None else {"uuid": uuid, "pin": pin}
        opened = partial(self._opened, uuid, done)
        self._vault("container-open", arguments, partial(self._pin_tried, uuid, opened))

    def _opened(self, uuid: str, done: Answered, result: Mapping[str, Any], refusal: Refusal | None) -> None:
        self._known[uuid].opening = False
        if refusal is None and self._going_down:
            refusal = _busy("device-going-down", "the device is about to reboot", "start it after that")
            self._release(uuid)
        if refusal is None:
            try:
                self._run(result)
            except Refusal as exc:
                self._around.log(f"container {uuid}: {exc}")
                self._release(uuid)
                refusal = exc
        done({}, refusal)

    def _run(self, result: Mapping[str, Any]) -> None:
        opened = Opened.from_result(result)
        running = RunningGuest(opened, self._around, self._ended)
        directory = self._store.directory(opened.guest_os)
        try:
            running.start(directory, result)
        finally:
            os.close(directory)
        self._running[opened.uuid] = running

    def _release(self, uuid: str) -> None:
        try:
            self._around.machine.volumes.release(uuid)
        except Refusal as refusal:
            self._around.log(f"container {uuid}: {refusal}")

    # Stopping

    def stop(self, uuid: str, pin: str | None, done: Answered) -> None:
        """Begin to stop a container, once its PIN was checked."""
        known = self._known.get(uuid)
        if known is None:
            done({}, _unknown(uuid))
        elif self._stoppable(uuid) is None:
            done({}, _not_running())
        elif known.said.get("needs_pin"):
            arguments = {"uuid": uuid} if pin is None else {"uuid": uuid, "pin": pin}
            checked = partial(self._may_stop, uuid, done)
            self._vault("container-check-pin", arguments, partial(self._pin_tried, uuid, checked))
        else:
            self._may_stop(uuid, done, {}, None)

    def _may_stop(
        self, uuid: str, done: Answered, _result: Mapping[str, Any], refusal: Refusal | None
    ) -> None:
        running = self._stoppable(uuid)  # it may have ended meanwhile
        if refusal is None and running is None:
            refusal = _not_running()
        if refusal is None and running is not None:
            try:
                running.stop()
            except Refusal as exc:
                refusal = exc
        done({}, refusal)

    def _stoppable(self, uuid: str) -> RunningGuest | None:
        running = self._running.get(uuid)
        stopping = running is not None and running.compartment.state in (State.SHUTDOWN, State.ZOMBIE)
        return None if stopping else running

    def _ended(self, running: RunningGuest) -> None:
        """Nothing of a container is left; do what waited for that."""
        uuid = running.uuid
        self._running.pop(uuid, None)
        self._release(uuid)
        known = self._known.get(uuid)
        waiting = known.at_end if known is not None else []
        if known is not None:
            known.at_end = []
        for each in waiting:
            each()
        if running.compartment.exit_status == REBOOTED and uuid in self._known and not self._going_down:
            self.start(uuid, None, partial(self._autostarted, uuid))
        self._all_ended_perhaps()


def _unknown(uuid: str) -> ControlRefusal:
    return ControlRefusal(
        "container-unknown",
        "there is no such container",
        evidence=ascii(uuid)[1:-1][:64],
        remedy="`control list` shows those that there are",
    )


def _not_running() -> ControlRefusal:
    return _busy("container-not-running", "the container does not run", "")


def _busy(code: str, cause: str, remedy: str) -> ControlRefusal:
    return ControlRefusal(code, cause, remedy=remedy)
