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
from typing import Any, Protocol

from trustme_init.errors import Refusal
from trustme_init.proto import container_pb2 as container
from trustme_init.proto.guestos_pb2 import GuestOSConfig
from trustme_init.provisioning.mode import Mode


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
