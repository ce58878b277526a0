# SPDX-License-Identifier: Apache-2.0
"""A container's network: what its configuration asks for, and how it gets it. Loopback only by default.

- Each `vnet_configs` is a pair of virtual interfaces: one end in the container, the other in the core
  container, as in the original. Nobody but the core hears a container; that the core forwards nothing is a
  setting of its network namespace, which it cannot change.
- With `configure` both ends get addresses of a /30 of their own (see `addresses`), and the container a route
  by way of the first such pair. Neither side can change any of it: neither has net_admin.
- Each `net_ifaces` is a physical interface of the device, by name or by MAC address. The kernel gives it back
  when the container's network namespace ends. One that is not there now is passed over, and said.
"""

from __future__ import annotations

import ipaddress
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.process import process_start_time

if TYPE_CHECKING:
    from trustme_init.compartments.start import Running
    from trustme_init.machine import NetworkBackend
    from trustme_init.proto.container_pb2 import ContainerConfig

NETWORK: Final = ipaddress.IPv4Network("172.23.0.0/16")
PREFIX: Final = 30
SLOTS: Final = 255
"""Containers that can have addresses: the third octet is the container's slot, from 1 on."""
PAIRS: Final = 64
"""Pairs of one container: the blocks of four addresses in its octet."""
_INTERFACE_LIMIT: Final = 15


@dataclass(frozen=True, slots=True)
class Pair:
    """A virtual interface of the container and its end in the core."""

    name: str
    outer_name: str
    mac: str | None
    addresses: tuple[str, str] | None
    """Of the core's end and of the container's, /30; None to leave both without."""


@dataclass(frozen=True, slots=True)
class Network:
    """What a container gets besides loopback."""

    pairs: tuple[Pair, ...] = ()
    physical: tuple[str, ...] = ()
    """Names or MAC addresses of interfaces of the device."""


def addresses(slot: int, index: int) -> tuple[str, str]:
    """Return the core's and the container's address of pair `index` (from 0) of the container in `slot`.

    The first pair of slot 1 has 172.23.1.1 and 172.23.1.2. CompartmentRefusal("network-full").
    """
    if not 0 < slot < SLOTS or not 0 <= index < PAIRS:
        raise CompartmentRefusal(
            "network-full",
            "there is no block of addresses left for this interface",
            evidence=f"container {slot} of {SLOTS - 1}, interface {index + 1} of {PAIRS}",
            remedy="remove containers, or set `configure: false`",
        )
    first = NETWORK.network_address + 256 * slot + 4 * index
    return str(first + 1), str(first + 2)


def from_container(config: ContainerConfig, slot: int) -> Network:
    """Return the network that a verified configuration asks for. `slot` is of its range of user ids.

    CompartmentRefusal: "network-full", "network-filter-unsupported", "network-malformed".
    """
    filtered = [each.netif for each in config.net_ifaces if each.mac_filter]
    if filtered:
        raise CompartmentRefusal(
            "network-filter-unsupported",
            "this version cannot filter what a physical interface receives",
            evidence=", ".join(filtered),
            remedy="take mac_filter out of the configuration, and filter outside of the device",
        )
    pairs = []
    for index, virtual in enumerate(config.vnet_configs):
        outer = virtual.if_rootns_name or f"r_{slot}_{index}"
        for name in (virtual.if_name, outer):
            if name == "lo" or len(name) > _INTERFACE_LIMIT:
                raise _malformed(name)
        if virtual.if_mac and int(virtual.if_mac[:2], 16) & 1:
            raise _malformed(virtual.if_mac)  # of a group, not of an interface
        pairs.append(
            Pair(
                virtual.if_name,
                outer,
                virtual.if_mac.lower() or None,
                addresses(slot, index) if virtual.configure else None,
            )
        )
    if len({pair.outer_name for pair in pairs}) < len(pairs):
        raise _malformed(", ".join(pair.outer_name for pair in pairs))
    return Network(tuple(pairs), tuple(each.netif for each in config.net_ifaces))


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, by its number and start time."""

    pid: int
    start_time: int

    def namespace(self) -> int:
        """Open its network namespace; ProcessLookupError if the number is another's by now."""
        fd = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The descriptor first: if the start time fits afterwards, it fitted when it was opened.
            if process_start_time(self.pid) != self.start_time:
                raise ProcessLookupError
        except BaseException:
            os.close(fd)
            raise
        return fd


def attach(network: Network, container: Identity, core: Identity | None, helper: NetworkBackend) -> list[str]:
    """Give a new container its network, before its init runs; return which physical interfaces are not there.

    CompartmentRefusal: "network-peer-missing" (no core runs), "network-failed".
    """
    if not network.pairs and not network.physical:
        return []
    with ExitStack() as opened:
        namespaces = []
        try:
            for process in (container, core):
                if process is not None:
                    fd = process.namespace()
                    opened.callback(os.close, fd)
                    namespaces.append(fd)
        except OSError as exc:
            raise _no_peer() from exc
        if network.pairs and len(namespaces) < 2:
            raise _no_peer()
        route = next((pair.addresses[0] for pair in network.pairs if pair.addresses), None)
        for pair in network.pairs:
            helper.call(
                "pair",
                namespaces,
                name=pair.name,
                outer_name=pair.outer_name,
                mac=pair.mac,
                addresses=pair.addresses,
                prefix=PREFIX,
                route=route if pair.addresses and pair.addresses[0] == route else None,
            )
        return [
            name for name in network.physical if not helper.call("move-in", namespaces[:1], interface=name)
        ]


def move(running: Running, interface: str, helper: NetworkBackend, *, into: bool) -> bool:
    """Move an interface between base system and a container that runs; False if there is none of that name.

    CompartmentRefusal("network-failed", "network-peer-missing").
    """
    try:
        namespace = Identity(running.pid, running.start_time).namespace()
    except OSError as exc:
        raise _no_peer() from exc
    try:
        return bool(helper.call("move-in" if into else "move-out", [namespace], interface=interface))
    finally:
        os.close(namespace)


def names(init: int) -> list[str]:
    """Return the interfaces that the process `init` sees, from the kernel's own list.

    The process must be an unreaped child, or its number could mean another one.
    """
    lines = Path(f"/proc/{init}/net/dev").read_text().splitlines()[2:]
    return [line.partition(":")[0].strip() for line in lines]


def _no_peer() -> CompartmentRefusal:
    return CompartmentRefusal(
        "network-peer-missing",
        "one side of the container's network is not there",
        remedy="start the container when the core container runs",
    )


def _malformed(value: str) -> CompartmentRefusal:
    return CompartmentRefusal(
        "network-malformed",
        "an interface of the container's configuration is not possible",
        evidence=ascii(value),
        remedy="give every interface a name of its own, and the address of one interface",
    )
