# SPDX-License-Identifier: Apache-2.0
"""A container's interfaces, clocks and nothing else's: with real namespaces and netlink."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.compartment_kit import UUID, Bench, busybox_root, wait_for
from trustme_init.compartments import network
from trustme_init.compartments.lifecycle import Compartment, clear
from trustme_init.compartments.netlink import NetworkHelper
from trustme_init.compartments.network import Network, Pair
from trustme_init.compartments.spec import CORE_UUID, CompartmentSpec
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.process import CLONE_NEWNET, process_start_time, setns, unshare

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

MAC = "02:00:00:00:00:11"
FIRST = Pair("eth0", "r_1_0", MAC, network.addresses(1, 0))


@pytest.fixture
def base() -> Iterator[None]:
    """A network namespace that stands for the base system's: the host's own stays as it is."""
    host = os.open("/proc/self/ns/net", os.O_RDONLY)
    unshare(CLONE_NEWNET)
    yield
    setns(host, CLONE_NEWNET)
    os.close(host)


@pytest.fixture
def bench(base: None, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    helper = made.machine.network
    assert isinstance(helper, NetworkHelper)
    helper.close()


def sleeper(bench: Bench) -> CompartmentSpec:
    root = bench.work / "root"
    if not root.exists():
        busybox_root(root, "")
    return bench.spec(bench.image(root), argv=("/bin/busybox", "sleep", "1000"))


@pytest.fixture
def core(bench: Bench) -> Iterator[int]:
    """A stand-in for the core container, on record as it; returns its init."""
    process = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
    mine = Path("/proc/self/ns/net").readlink()
    wait_for(lambda: Path(f"/proc/{process.pid}/ns/net").readlink() != mine)
    record = bench.machine.compartments / CORE_UUID / "state.json"
    record.parent.mkdir(parents=True)
    started = process_start_time(process.pid)
    record.write_text(
        f'{{"version": 1, "state": 4, "pid": {process.pid}, "start_time": {started},'
        ' "started_at": 1.0, "cgroup": "/"}'
    )
    yield process.pid
    process.kill()
    process.wait()


def ip(pid: int, *words: str) -> str:
    return subprocess.run(
        ["nsenter", "-t", str(pid), "-n", "ip", "-o", *words], check=True, capture_output=True, text=True
    ).stdout


def init_of(compartment: Compartment) -> int:
    assert compartment.running is not None
    return compartment.running.pid


def children() -> set[int]:
    """Return our child processes; other tests may have left some that are ending."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_loopback_only_by_default_and_no_helper(bench: Bench) -> None:
    before = children()
    with bench.running(sleeper(bench)) as compartment:
        assert network.names(init_of(compartment)) == ["lo"]
        assert children() - before == {init_of(compartment)}


def test_a_pair_joins_container_and_core(bench: Bench, core: int) -> None:
    plain = Pair("eth1", "other", None, None)
    spec = replace(sleeper(bench), network=Network((FIRST, plain)))
    with bench.running(spec) as compartment:
        pid = init_of(compartment)
        assert network.names(pid) == ["lo", "eth0", "eth1"]
        assert {"r_1_0", "other"} <= set(network.names(core))
        inside, outside = ip(pid, "addr"), ip(core, "addr")
        assert "172.23.1.2/30" in inside
        assert "172.23.1.1/30" in outside
        assert "inet " not in "\n".join(line for line in inside.splitlines() if " eth1 " in line)
        assert MAC in ip(pid, "link", "show", "eth0")
        assert ip(pid, "route").startswith("default via 172.23.1.1 dev eth0")
        assert len(re.findall(r"eth[01]@\S+ <\S*,UP[,>]", ip(pid, "link"))) == 2
        # It carries packets.
        program = (
            "import socket; s = socket.create_server(('172.23.1.1', 7)); print(1, flush=True);"
            "s.accept()[0].send(b'hi')"
        )
        server = subprocess.Popen(
            ["nsenter", "-t", str(core), "-n", "python3", "-c", program], stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        server.stdout.readline()
        said = subprocess.run(
            ["nsenter", "-t", str(pid), "-a", "/bin/busybox", "nc", "172.23.1.1", "7"],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        ).stdout
        assert said == b"hi"
        server.wait()
        server.stdout.close()
    # The base system never had any of it, and with the container both ends are gone.
    assert network.names(os.getpid()) == ["lo"]
    wait_for(lambda: network.names(core) == ["lo"])


def test_row25_a_container_cannot_change_its_network(bench: Bench, core: int) -> None:
    script = """
    try() { if "$@" >/dev/null 2>&1; then echo "DONE $*"; fi; }
    try b ip link set eth0 down; try b ip addr add 10.0.0.1/8 dev eth0; try b ip route del default
    try b ip link set eth0 address 02:00:00:00:00:99; try b ip link set eth0 netns 1
    """
    spec = bench.spec(bench.image(busybox_root(bench.work / "root", script)))
    with bench.running(replace(spec, network=Network((FIRST,)))):
        assert "DONE" not in bench.output()


def test_without_a_core_there_is_no_pair_and_nothing_is_left(bench: Bench) -> None:
    with pytest.raises(CompartmentRefusal) as caught, bench.directory() as directory:
        Compartment(replace(sleeper(bench), network=Network((FIRST,))), bench.machine).start(directory)
    assert caught.value.code == "network-peer-missing"
    assert not (bench.machine.cgroup_root / "trustme" / UUID).exists()


def test_a_core_that_is_another_process_by_now_is_none(bench: Bench, core: int) -> None:
    record = bench.machine.compartments / CORE_UUID / "state.json"
    record.write_text(record.read_text().replace('"start_time": ', '"start_time": 1'))
    with pytest.raises(CompartmentRefusal) as caught, bench.directory() as directory:
        Compartment(replace(sleeper(bench), network=Network((FIRST,))), bench.machine).start(directory)
    assert caught.value.code == "network-peer-missing"


def test_what_the_kernel_refuses_is_said_and_nothing_is_left(bench: Bench, core: int) -> None:
    taken = replace(sleeper(bench), network=Network((replace(FIRST, outer_name="lo"),)))
    with pytest.raises(CompartmentRefusal) as caught, bench.directory() as directory:
        Compartment(taken, bench.machine).start(directory)
    assert (caught.value.code, caught.value.evidence) == ("network-failed", "pair: File exists")
    clear(UUID, bench.machine)
    # The next one is served by the same helper.
    with bench.running(replace(sleeper(bench), network=Network((FIRST,)))) as compartment:
        assert network.names(init_of(compartment)) == ["lo", "eth0"]


@pytest.mark.parametrize("by", ["name", "mac"])
def test_an_interface_of_the_device_is_moved_in_and_out(bench: Bench, by: str) -> None:
    subprocess.run(["ip", "link", "add", "lan7", "address", MAC, "type", "ifb"], check=True)
    wanted = Network(physical=(MAC.upper() if by == "mac" else "lan7", "absent0", "02:00:00:00:00:77"))
    with bench.running(replace(sleeper(bench), network=wanted)) as compartment:
        running = compartment.running
        assert running is not None
        assert running.absent == ("absent0", "02:00:00:00:00:77")
        assert network.names(running.pid) == ["lo", "lan7"]
        assert network.names(os.getpid()) == ["lo"]
        assert ",UP" in ip(running.pid, "link", "show", "lan7")
        assert network.move(running, "lan7", bench.machine.network, into=False)
        assert network.names(os.getpid()) == ["lo", "lan7"]
        assert not network.move(running, "lan7", bench.machine.network, into=False)
        assert not network.move(running, "lo", bench.machine.network, into=False)
        assert not network.move(running, "lo", bench.machine.network, into=True)
        assert network.move(running, "lan7", bench.machine.network, into=True)
        assert network.names(running.pid) == ["lo", "lan7"]


def test_row23_the_helper_holds_nothing_of_the_manager(bench: Bench, core: int) -> None:
    held, other = socket.socketpair()
    with held, other, bench.running(replace(sleeper(bench), network=Network((FIRST,)))):
        helper = bench.machine.network
        assert isinstance(helper, NetworkHelper)
        links = {str(link.readlink()).partition(":")[0] for link in Path(f"/proc/{helper._pid}/fd").iterdir()}
        assert len(list(Path(f"/proc/{helper._pid}/fd").iterdir())) <= 9
        assert f"socket:[{os.fstat(held.fileno()).st_ino}]" not in links


def test_a_dead_helper_is_replaced(bench: Bench, core: int) -> None:
    helper = bench.machine.network
    assert isinstance(helper, NetworkHelper)
    spec = replace(sleeper(bench), network=Network((FIRST,)))
    with bench.running(spec):
        os.kill(helper._pid, 9)
    with pytest.raises(CompartmentRefusal), bench.directory() as directory:
        Compartment(spec, bench.machine).start(directory)
    wait_for(lambda: "r_1_0" not in network.names(core))
    with bench.running(spec) as compartment:
        assert network.names(init_of(compartment)) == ["lo", "eth0"]


def test_a_containers_clocks_begin_with_it(bench: Bench) -> None:
    script = "b cat /proc/uptime; b cat /proc/self/timens_offsets"
    spec = bench.spec(bench.image(busybox_root(bench.work / "root", script)))
    with bench.running(replace(spec, time_namespace=True)) as compartment:
        uptime = float(bench.output().split()[0])
        assert uptime < time.clock_gettime(time.CLOCK_BOOTTIME) / 2
        pid = init_of(compartment)
        assert Path(f"/proc/{pid}/ns/time").readlink() != Path("/proc/self/ns/time").readlink()
