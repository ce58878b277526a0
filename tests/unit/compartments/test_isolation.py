# SPDX-License-Identifier: Apache-2.0
"""What a container's configuration becomes: interfaces with addresses, and devices."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from trustme_init.compartments import devices, network
from trustme_init.compartments.devices import Devices
from trustme_init.compartments.network import PAIRS, SLOTS, Network, Pair
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.bpf import DeviceRule
from trustme_init.proto.container_pb2 import ContainerConfig, ContainerPnetConfig, ContainerVnetConfig


def config(**fields: Any) -> ContainerConfig:
    return ContainerConfig(name="c", guest_os="exampleos", **fields)


def virtual(name: str, **fields: Any) -> ContainerVnetConfig:
    return ContainerVnetConfig(if_name=name, **{"configure": True, **fields})


def code(refused: pytest.ExceptionInfo[CompartmentRefusal]) -> str:
    return refused.value.code


def test_nothing_is_asked_for_and_nothing_is_given() -> None:
    assert network.from_container(config(), 1) == Network()
    assert devices.from_container(config()) == Devices()


def test_interfaces_have_names_addresses_and_a_mac() -> None:
    asked = config(
        vnet_configs=[
            virtual("eth0", if_mac="02:00:00:00:00:AA"),
            virtual("eth1", if_rootns_name="outside", configure=False),
        ],
        net_ifaces=[ContainerPnetConfig(netif="lan7")],
    )
    assert network.from_container(asked, 3) == Network(
        (
            Pair("eth0", "r_3_0", "02:00:00:00:00:aa", ("172.23.3.1", "172.23.3.2")),
            Pair("eth1", "outside", None, None),
        ),
        ("lan7",),
    )


def test_no_two_interfaces_share_a_block_of_addresses() -> None:
    seen = set()
    for slot in range(1, SLOTS):
        for index in range(PAIRS):
            pair = network.addresses(slot, index)
            blocks = {ipaddress.IPv4Interface(f"{address}/{network.PREFIX}").network for address in pair}
            assert len(blocks) == 1
            (block,) = blocks
            assert block.subnet_of(network.NETWORK)
            assert {ipaddress.ip_address(address) for address in pair} == set(block.hosts())
            seen.add(block)
    assert len(seen) == (SLOTS - 1) * PAIRS


@pytest.mark.parametrize(("slot", "index"), [(0, 0), (SLOTS, 0), (1, PAIRS), (-1, 0)])
def test_addresses_end(slot: int, index: int) -> None:
    with pytest.raises(CompartmentRefusal) as caught:
        network.addresses(slot, index)
    assert code(caught) == "network-full"


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"vnet_configs": [virtual("lo")]}, "network-malformed"),
        ({"vnet_configs": [virtual("a", if_rootns_name="lo")]}, "network-malformed"),
        ({"vnet_configs": [virtual("sixteencharacter")]}, "network-malformed"),
        ({"vnet_configs": [virtual("a", if_mac="01:00:5e:00:00:01")]}, "network-malformed"),
        (
            {"vnet_configs": [virtual("a", if_rootns_name="x"), virtual("b", if_rootns_name="x")]},
            "network-malformed",
        ),
        (
            {"net_ifaces": [ContainerPnetConfig(netif="lan7", mac_filter=["02:00:00:00:00:01"])]},
            "network-filter-unsupported",
        ),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], refused: str) -> None:
    with pytest.raises(CompartmentRefusal) as caught:
        network.from_container(config(**asked), 1)
    assert code(caught) == refused


def test_devices_are_allowed_or_assigned_and_never_made() -> None:
    found = devices.from_container(config(allow_dev=["c 42:42 rwm", "c 43:* r"], assign_dev=["c 4:1 rwm"]))
    assigned = DeviceRule("c", 4, 1, "rw")
    assert found == Devices(
        (DeviceRule("c", 42, 42, "rw"), DeviceRule("c", 43, None, "r"), assigned), (assigned,)
    )


@pytest.mark.parametrize(
    "rule",
    [
        "a *:* rwm",
        "c *:* r",
        "b 8:0 r",
        "b 8:* rwm",
        "c 1:1 r",
        "c 1:2 r",
        "c 1:4 rw",
        "c 1:11 r",
        "c 1:* r",
        "c 10:224 rw",
        "c 10:236 rw",
        "c 10:237 rw",
        "c 10:* rw",
    ],
)
@pytest.mark.parametrize("field", ["allow_dev", "assign_dev"])
def test_row14_what_is_the_machine_is_no_containers_whoever_signed_it(field: str, rule: str) -> None:
    with pytest.raises(CompartmentRefusal) as caught:
        devices.from_container(config(**{field: [rule]}))
    assert code(caught) == "device-forbidden"
