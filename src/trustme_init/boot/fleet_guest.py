# SPDX-License-Identifier: Apache-2.0
"""One container beside the core, from the start of its init to its end, as the manager sees it.

What a later manager needs to adopt it is in `/run/trustme/compartments/<uuid>/guest.json`: what the vault
opened, which has no secret in it, written before init is forked, in a directory that only root can write.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trustme_init.compartments import lifecycle
from trustme_init.compartments.lifecycle import KILL_TIMEOUT, STOP_TIMEOUT, Compartment, State
from trustme_init.compartments.spec import CompartmentSpec, Guest, from_guest
from trustme_init.compartments.volumes import OpenVolume
from trustme_init.containers.config import parse
from trustme_init.control.server import ControlServer
from trustme_init.control.service import ServiceCallbacks, ServiceServer
from trustme_init.errors import CompartmentRefusal, Refusal
from trustme_init.linux.files import write_atomic
from trustme_init.trust.guestos import images_of, parse_config
from trustme_init.trust.selection import GuestOsId, parse_stem

if TYPE_CHECKING:
    from trustme_init.control.dispatch import Dispatcher
    from trustme_init.control.loop import Loop, Timer
    from trustme_init.control.throttle import Log
    from trustme_init.machine import Machine
    from trustme_init.proto.container_pb2 import ContainerConfig
    from trustme_init.proto.guestos_pb2 import GuestOSConfig

CONTROL_SOCKET: Final = "cml-control"
SERVICE_SOCKET: Final = "cml-service"
GUEST_FILE: Final = "guest.json"
_FILE_LIMIT: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Opened:
    """What the vault opened for a start."""

    uuid: str
    uid_base: int
    config: ContainerConfig
    guest_os: GuestOsId
    guest_os_config: GuestOSConfig
    volumes: tuple[OpenVolume, ...]

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> Opened:
        """Read the result of "container-open"; both texts in it were verified by the vault."""
        stem = parse_stem(result["guest_os"])
        if stem is None:
            raise _lost(result["uuid"], "the name of its GuestOS")
        return cls(
            uuid=result["uuid"],
            uid_base=result["uid_base"],
            config=parse(base64.b64decode(result["config"])),
            guest_os=stem,
            guest_os_config=parse_config(base64.b64decode(result["guest_os_config"])),
            volumes=tuple(OpenVolume(name, Path(device)) for name, device in result["volumes"]),
        )

    def spec(self, machine: Machine, pids_max: int) -> CompartmentSpec:
        """Return the compartment; refusals as `from_guest`."""
        guest = Guest(
            self.uuid,
            self.uid_base,
            self.config,
            self.guest_os_config,
            images_of(self.guest_os_config.mounts),
            pids_max,
        )
        return from_guest(guest, self.volumes, machine)


@dataclass(frozen=True, slots=True)
class Around:
    """What every running container needs of the manager."""

    loop: Loop
    machine: Machine
    dispatcher: Dispatcher
    start_timeout: float
    """Seconds from init's first instruction to BOOT_COMPLETED."""
    pids_max: int
    """Processes and threads of each."""
    log: Log


class RunningGuest:
    """See the module. `on_end(guest)` is called once, when nothing of it is left."""

    def __init__(self, opened: Opened, around: Around, on_end: Callable[[RunningGuest], None]) -> None:
        self.opened = opened
        self._around = around
        self._on_end = on_end
        self.compartment = Compartment(opened.spec(around.machine, around.pids_max), around.machine)
        self._service: ServiceServer | None = None
        self._control: ControlServer | None = None
        self._deadline: Timer | None = None

    @property
    def uuid(self) -> str:
        """The container's."""
        return self.opened.uuid

    def start(self, directory: int, result: Mapping[str, Any]) -> None:
        """Start it from the open directory of its images; `result` is what `opened` was read from.

        Refusals as `compartments.start`, and those of sockets; nothing of it is left then.
        """
        home = self._home
        try:
            home.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_atomic(home / GUEST_FILE, json.dumps(dict(result)).encode(), 0o600)
            self._serve()
            self.compartment.start(directory)
        except OSError as exc:
            self._clean_up()
            raise CompartmentRefusal(
                "guest-unprepared",
                "the container cannot be given its place",
                evidence=f"{exc.filename}: {exc.strerror}",
                remedy="read the device's log; restart the device if it stays",
            ) from exc
        except BaseException:
            self._clean_up()
            raise
        self._watch()

    def adopt(self) -> bool:
        """Take over what an earlier manager started; False if it is not there any more."""
        if not self.compartment.adopt():
            return False
        self._serve()
        self._watch()
        return True

    def _serve(self) -> None:
        """Bind its sockets before it exists, so that its first connection finds them."""
        spec, around = self.compartment.spec, self._around
        spec.socket_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._service = ServiceServer(
            around.loop,
            spec.socket_dir / SERVICE_SOCKET,
            ServiceCallbacks(
                boot_completed=self._booted,
                name=lambda: spec.name,
                dns=lambda: self.opened.config.dns_server,
            ),
            uid=spec.uid_base,
            gid=spec.uid_base,
            log=around.log,
        )
        if self.opened.guest_os_config.feature_install_guest:
            self._control = ControlServer(
                around.loop,
                spec.socket_dir / CONTROL_SOCKET,
                around.dispatcher,
                uid=spec.uid_base,
                gid=spec.uid_base,
                privileged=False,
                log=around.log,
            )

    def _watch(self) -> None:
        running = self.compartment.running
        if running is None:
            raise _lost(self.uuid, "its init")
        self._around.loop.add_reader(running.pidfd, self._ended)
        if self.compartment.state is State.SHUTDOWN:
            self._within(STOP_TIMEOUT, self._expired)
            if self._service is not None:
                self._service.shutdown()  # told to the first who connects; twice does no harm
        elif self.compartment.state is State.BOOTING:
            self._within(self._around.start_timeout, self._start_timed_out)

    # What happens to it

    def _booted(self) -> None:
        if self.compartment.state in (State.BOOTING, State.RUNNING):
            self.compartment.booted()
            self._clear_deadline()

    def _start_timed_out(self) -> None:
        self._around.log(
            f"container {self.uuid}: start-timeout: no BOOT_COMPLETED in {self._around.start_timeout:.0f} s"
        )
        self.kill()

    def stop(self) -> None:
        """Tell it to shut down, and see to it that it ends. CompartmentRefusal: as `Compartment.stop`."""
        service = self._service
        if service is None or self.compartment.state is State.SHUTDOWN:
            return
        self._within(
            STOP_TIMEOUT, self._expired
        )  # first: whatever becomes of the request, the stop has an end
        self._within(self.compartment.stop(service.shutdown), self._expired)

    def _expired(self) -> None:
        self.kill()

    def kill(self) -> None:
        """End it without a word; what cannot be killed waits inside the kernel, and is tried again."""
        self._within(KILL_TIMEOUT, self.kill)
        try:
            self.compartment.kill()
        except Refusal as refusal:
            self._around.log(f"container {self.uuid}: {refusal}")

    def _ended(self) -> None:
        running = self.compartment.running
        if running is None:
            return
        self._around.loop.remove(running.pidfd)
        try:
            status = self.compartment.ended()
        except Refusal as refusal:
            # ZOMBIE: some process of it waits inside the kernel.
            self._around.log(f"container {self.uuid}: {refusal}")
            self._within(KILL_TIMEOUT, self._ended)
            return
        self._around.log(f"container {self.uuid} ended, status {'unknown' if status is None else status}")
        self._clean_up()
        self._on_end(self)

    def _within(self, seconds: float, what: Callable[[], None]) -> None:
        self._clear_deadline()
        self._deadline = self._around.loop.call_later(seconds, what)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _clean_up(self) -> None:
        self._clear_deadline()
        for server in (self._service, self._control):
            if server is not None:
                server.close()
        self._service = self._control = None
        remove_home(self._home)

    @property
    def _home(self) -> Path:
        return self._around.machine.compartments / self.uuid


def left_over(machine: Machine, but: str) -> list[str]:
    """Return the UUIDs of the containers that an earlier manager had begun to start, without the core's."""
    return sorted(
        path.parent.name for path in machine.compartments.glob(f"*/{GUEST_FILE}") if path.parent.name != but
    )


def read_left_over(uuid: str, machine: Machine) -> Opened | None:
    """Return what was opened for a container of an earlier manager; None if that cannot be said any more."""
    try:
        with (machine.compartments / uuid / GUEST_FILE).open("rb") as file:
            return Opened.from_result(json.loads(file.read(_FILE_LIMIT)))
    except (OSError, ValueError, KeyError, TypeError, Refusal):
        return None


def clear(uuid: str, machine: Machine) -> None:
    """Remove all that is left of a container that nobody can adopt. Refusals as `lifecycle.clear`."""
    lifecycle.clear(uuid, machine)
    remove_home(machine.compartments / uuid)


def remove_home(path: Path) -> None:
    """Remove a container's directory below /run."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def _lost(uuid: str, what: str) -> CompartmentRefusal:
    return CompartmentRefusal(
        "guest-lost",
        "something that belongs to a container is not there any more",
        evidence=f"{uuid}: {what}",
        remedy="start the container again",
    )
