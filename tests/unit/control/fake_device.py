# SPDX-License-Identifier: Apache-2.0
"""A device that the control interface can be tried on, here and in tests/integration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trustme_init.compartments.lifecycle import Compartment
from trustme_init.compartments.netlink import NetworkHelper
from trustme_init.control.installing import GuestOsPush, Heard, InstallEvent
from trustme_init.control.loop import Loop
from trustme_init.control.state import Answered, ContainerView, DeviceStatsView, GuestOsView, LogFile
from trustme_init.errors import ControlRefusal, Refusal
from trustme_init.guestos.pieces import Piece
from trustme_init.proto import container_pb2
from trustme_init.proto.guestos_pb2 import GuestOSConfig, GuestOSMount, I18NString
from trustme_init.provisioning.mode import Mode

CORE_UUID = "00000000-0000-0000-0000-000000000000"
GUEST_UUID = "11111111-2222-3333-4444-555555555555"
SERVICE_UUID = "99999999-2222-3333-4444-555555555555"

CORE = ContainerView(
    uuid=CORE_UUID,
    name="core0",
    state=container_pb2.RUNNING,
    guest_os="trustme-coreos",
    created=1_790_000_000,
    uptime=3725,
    guestos_version=7,
    ram_limit=512,
)
GUEST = ContainerView(
    uuid=GUEST_UUID, name="guest", state=container_pb2.STOPPED, guest_os="exampleos", created=1_790_000_001
)
SERVICE = ContainerView(
    uuid=SERVICE_UUID,
    name="TPM2D",
    state=container_pb2.RUNNING,
    guest_os="",
    created=0,
    system_service=True,
)
COREOS = GuestOSConfig(
    name="trustme-coreos",
    hardware="x86",
    version=7,
    description=I18NString(en="the core container"),
    mounts=[
        GuestOSMount(
            image_file="root", mount_point="/", fs_type="squashfs", mount_type=GuestOSMount.SHARED_RW
        )
    ],
)


@dataclass
class FakeInstallations:
    """Implements Installing; whoever pushes hears `events` at once."""

    events: list[InstallEvent] = field(default_factory=list)
    pushed: list[GuestOsPush] = field(default_factory=list)
    pieces: list[tuple[str, Piece]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refusal: Refusal | None = None
    heard: Heard | None = None

    def push(self, push: GuestOsPush, caller: int, heard: Heard) -> None:
        self.pushed.append(push)
        self.heard = heard
        os.close(caller)
        for event in self.events:
            heard(event)

    def piece(self, stem: str, piece: Piece, caller: int, done: Callable[[Refusal | None], None]) -> None:
        self.pieces.append((stem, piece))
        done(self.refusal)

    def remove(self, name: str, done: Answered) -> None:
        self.removed.append(name)
        done({}, self.refusal)


@dataclass
class FakeGuests:
    """Implements Containers; what is asked for has the outcome that the test has put there, or succeeds."""

    outcomes: dict[str, dict[str, Any] | Refusal] = field(default_factory=dict)
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def when_known(self, done: Callable[[], None]) -> None:
        done()

    def _do(self, done: Answered, *asked: Any) -> None:
        self.asked.append(asked)
        outcome = self.outcomes.get(asked[0], {})
        if isinstance(outcome, Refusal):
            done({}, outcome)
        else:
            done(outcome, None)

    def create(self, config: bytes, signature: bytes, certificate: bytes, done: Answered) -> None:
        self._do(done, "create", config, signature, certificate)

    def update(self, uuid: str, parts: tuple[bytes, bytes, bytes], done: Answered) -> None:
        self._do(done, "update", uuid, *parts)

    def remove(self, uuid: str, done: Answered) -> None:
        self._do(done, "remove", uuid)

    def wipe(self, uuid: str, done: Answered) -> None:
        self._do(done, "wipe", uuid)

    def start(self, uuid: str, pin: str | None, done: Answered) -> None:
        self._do(done, "start", uuid, pin)

    def stop(self, uuid: str, pin: str | None, done: Answered) -> None:
        self._do(done, "stop", uuid, pin)

    def change_pin(self, uuid: str, pin: str, new_pin: str, done: Answered) -> None:
        self._do(done, "change_pin", uuid, pin, new_pin)

    def reload(self, done: Answered) -> None:
        self._do(done, "reload")


@dataclass
class FakeDevice:
    """Implements DeviceState; every answer can be replaced, every effect is recorded."""

    current_mode: Mode = Mode.PROVISIONING
    views: list[ContainerView] = field(default_factory=lambda: [CORE, GUEST, SERVICE])
    guestos: list[GuestOSConfig] = field(default_factory=lambda: [COREOS])
    log_files: list[LogFile] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    reboots: int = 0
    failure: Exception | None = None
    answers: dict[str, dict[str, Any] | Refusal] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str | bytes]]] = field(default_factory=list)
    held: list[Answered] | None = None
    installations: FakeInstallations = field(default_factory=FakeInstallations)
    guests: FakeGuests = field(default_factory=FakeGuests)
    compartments: dict[str, Compartment] = field(default_factory=dict)
    own_loop: Loop | None = None
    helper: NetworkHelper = field(default_factory=NetworkHelper)

    def mode(self) -> Mode:
        return self.current_mode

    def containers(self) -> Sequence[ContainerView]:
        if self.failure is not None:
            raise self.failure
        return self.views

    def container(self, uuid: str) -> ContainerView | None:
        return next((view for view in self.views if view.uuid == uuid), None)

    def compartment(self, uuid: str) -> Compartment | None:
        return self.compartments.get(uuid)

    @property
    def loop(self) -> Loop:
        if self.own_loop is None:
            self.own_loop = Loop()
        return self.own_loop

    @property
    def network(self) -> NetworkHelper:
        return self.helper

    def guestos_list(self) -> Sequence[GuestOsView]:
        return [GuestOsView(config) for config in self.guestos]

    def logs(self) -> Sequence[LogFile]:
        return self.log_files

    def remove_logs(self, names: Sequence[str]) -> None:
        self.removed.extend(names)

    def stats(self) -> DeviceStatsView:
        return DeviceStatsView(1000, 400, 600, mem_total=1 << 30)

    def vault(self, operation: str, arguments: Mapping[str, str | bytes], done: Answered) -> None:
        """Answer at once with what the test has put there, or keep the question until the test does."""
        self.asked.append((operation, dict(arguments)))
        if self.held is not None:
            self.held.append(done)
            return
        answer = self.answers.get(operation, ControlRefusal("not-prepared", "nothing is prepared"))
        if isinstance(answer, Refusal):
            done({}, answer)
        else:
            done(answer, None)

    def request_reboot(self) -> None:
        self.reboots += 1
