# SPDX-License-Identifier: Apache-2.0
"""What the control handlers may know and ask of the device: the manager implements `DeviceState`.

All calls are synchronous and short (no I/O that can wait on a peer): they run between two turns of the loop.
What takes longer is given to the vault, which answers later.
Any of them may raise a Refusal; the client then gets CMD_FAILED and the log gets the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trustme_init.control.installing import Installing
from trustme_init.errors import Refusal
from trustme_init.proto import container_pb2 as container
from trustme_init.proto.guestos_pb2 import GuestOSConfig
from trustme_init.provisioning.mode import Mode

if TYPE_CHECKING:
    from trustme_init.compartments.lifecycle import Compartment
    from trustme_init.control.loop import Loop
    from trustme_init.machine import NetworkBackend


@dataclass(frozen=True, slots=True)
class ContainerView:
    """One container as ContainerStatus and ContainerConfig show it."""

    uuid: str
    name: str
    state: container.ContainerState.ValueType
    guest_os: str
    created: int
    """Seconds since the epoch."""
    uptime: int = 0
    """Seconds since its init was started; 0 when it is not running."""
    trust: container.ContainerTrust.ValueType = container.SIGNED
    cryptfs_mode: container.CryptfsMode.ValueType = container.NOT_IMPLEMENTED
    type: container.ContainerType.ValueType = container.CONTAINER
    system_service: bool = False
    """Shown only when asked for by UUID or with `system_services`."""
    guestos_version: int | None = None
    ram_limit: int = 0
    """MiB; 0 is no limit."""
    token_type: container.ContainerTokenType.ValueType = container.NONE
    init_env: Sequence[str] = ()
    config: container.ContainerConfig | None = None
    """The signed configuration where there is one: sent instead of what the fields above imply."""
    needs_pin: bool = False
    problem: str = ""
    """Why it cannot be started; empty for one in order."""
    token: str = ""
    """What protects its key, and how that stands."""


@dataclass(frozen=True, slots=True)
class GuestOsView:
    """One verified GuestOS: its parsed configuration."""

    config: GuestOSConfig


@dataclass(frozen=True, slots=True)
class DeviceStatsView:
    """Sizes in bytes; None where there is nothing to measure."""

    disk_system: int
    disk_system_free: int
    disk_system_used: int
    disk_containers: int | None = None
    disk_containers_free: int | None = None
    disk_containers_used: int | None = None
    mem_total: int | None = None
    mem_free: int | None = None
    mem_available: int | None = None


@dataclass(frozen=True, slots=True)
class LogFile:
    """One log: a file that is read while it is sent, or bytes at hand."""

    name: str
    source: Path | bytes


Answered = Callable[[Mapping[str, Any], Refusal | None], None]
"""Takes what the vault returned, and why it returned nothing."""


class Containers(Protocol):
    """The containers beside the core. What is asked for takes time: `done` is called once, later or at once.

    Every `done` may get ControlRefusal("container-unknown"), and what the vault refuses.
    """

    def when_known(self, done: Callable[[], None]) -> None:
        """Call `done` as soon as it is known which containers there are: at once, but after a boot."""
        ...

    def create(self, config: bytes, signature: bytes, certificate: bytes, done: Answered) -> None:
        """Create a container; the result says of it what `containers.operations` says."""
        ...

    def update(self, uuid: str, parts: tuple[bytes, bytes, bytes], done: Answered) -> None:
        """Replace its configuration (text, signature, certificate): when it runs, from its end on."""
        ...

    def remove(self, uuid: str, done: Answered) -> None:
        """Kill it if it runs, and remove it with its data."""
        ...

    def wipe(self, uuid: str, done: Answered) -> None:
        """Remove the data of a container that does not run (ControlRefusal "container-running")."""
        ...

    def start(self, uuid: str, pin: str | None, done: Answered) -> None:
        """Start it; `done` is called when its init has been executed. ControlRefusal "container-running"."""
        ...

    def stop(self, uuid: str, pin: str | None, done: Answered) -> None:
        """Begin to stop it; `done` is called when that has begun. ControlRefusal "container-not-running"."""
        ...

    def change_pin(self, uuid: str, pin: str, new_pin: str, done: Answered) -> None:
        """Change the PIN of its token, or set the first one."""
        ...

    def reload(self, done: Answered) -> None:
        """Read everything anew."""
        ...


class DeviceState(Protocol):
    """The device as the control interface sees it."""

    def mode(self) -> Mode:
        """Return the mode that gates commands now."""
        ...

    def containers(self) -> Sequence[ContainerView]:
        """Return all containers in a stable order, c0 first, system services included."""
        ...

    def container(self, uuid: str) -> ContainerView | None:
        """Return one container, None when there is none with this UUID."""
        ...

    def compartment(self, uuid: str) -> Compartment | None:
        """Return the compartment of a container, running or not; None when there is no such container."""
        ...

    @property
    def loop(self) -> Loop:
        """The loop that all of this runs in."""
        ...

    @property
    def network(self) -> NetworkBackend:
        """What moves interfaces."""
        ...

    @property
    def installations(self) -> Installing:
        """What installs and removes GuestOSes."""
        ...

    @property
    def guests(self) -> Containers:
        """The containers beside the core, for what changes them."""
        ...

    def guestos_list(self) -> Sequence[GuestOsView]:
        """Return the verified GuestOSes of the device, every version."""
        ...

    def logs(self) -> Sequence[LogFile]:
        """Return the logs as they are now."""
        ...

    def remove_logs(self, names: Sequence[str]) -> None:
        """Remove logs that a client has received in full, by `LogFile.name`."""
        ...

    def stats(self) -> DeviceStatsView:
        """Return disk and memory figures."""
        ...

    def vault(self, operation: str, arguments: Mapping[str, str | bytes], done: Answered) -> None:
        """Have one of `provisioning.service.OPERATIONS` done; `done` is called once, later or at once."""
        ...

    def request_reboot(self) -> None:
        """Begin an orderly reboot and return at once; called after the client has its reply."""
        ...
