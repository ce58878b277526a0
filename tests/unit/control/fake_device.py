# SPDX-License-Identifier: Apache-2.0
"""A device that the control interface can be tried on, here and in tests/integration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trustme_init.control.state import Answered, ContainerView, DeviceStatsView, GuestOsView, LogFile
from trustme_init.errors import ControlRefusal, Refusal
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

    def mode(self) -> Mode:
        return self.current_mode

    def containers(self) -> Sequence[ContainerView]:
        if self.failure is not None:
            raise self.failure
        return self.views

    def container(self, uuid: str) -> ContainerView | None:
        return next((view for view in self.views if view.uuid == uuid), None)

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
