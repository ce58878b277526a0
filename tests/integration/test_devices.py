# SPDX-License-Identifier: Apache-2.0
"""The device allow-list: programs as the kernel takes them, and compartments under them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.compartment_kit import UUID, Bench, busybox_root, unified
from trustme_init.compartments.devices import Devices
from trustme_init.compartments.lifecycle import Compartment
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.bpf import DeviceRule, attach

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

NULL, ZERO, FULL = ("c", 1, 3), ("c", 1, 5), ("c", 1, 7)


@pytest.fixture
def group() -> Iterator[Path]:
    place = unified() / f"trustme-devices-{os.getpid()}"
    place.mkdir()
    yield place
    place.rmdir()


def under(group: Path, rules: list[DeviceRule], script: str) -> str:
    """Return what a script says that runs under these rules."""
    fd = os.open(group, os.O_RDONLY)
    try:
        attach(fd, rules)
    finally:
        os.close(fd)
    whole = f"echo $$ > {group}/cgroup.procs; exec 2>&1; {script}"
    return subprocess.run(["/bin/sh", "-c", whole], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], "no no no"),
        ([DeviceRule(*NULL), DeviceRule(*ZERO)], "yes yes no"),
        ([DeviceRule("c", 1, None)], "yes yes yes"),
        ([DeviceRule("c", None, 5)], "no yes no"),
        ([DeviceRule("c", None, None)], "yes yes yes"),
        ([DeviceRule("b", 1, 3)], "no no no"),
        ([DeviceRule("b", 8, 0), DeviceRule("c", 1, 7)], "no no yes"),
        ([DeviceRule(*NULL, "w"), DeviceRule(*ZERO, "r")], "no yes no"),
    ],
)
def test_row25_a_program_allows_what_its_rules_name_and_no_more(
    group: Path, rules: list[DeviceRule], expected: str
) -> None:
    script = "".join(f"(: < /dev/{name}) 2>&- && echo yes || echo no;" for name in ("null", "zero", "full"))
    assert under(group, rules, script).split() == expected.split()


@pytest.mark.parametrize(
    ("access", "read", "write", "both"), [("r", 1, 0, 0), ("w", 0, 1, 0), ("rw", 1, 1, 1)]
)
def test_access_is_allowed_by_its_kind(group: Path, access: str, read: int, write: int, both: int) -> None:
    script = "".join(f"({what} /dev/zero) 2>&- && echo 1 || echo 0;" for what in (": <", ": >", ": <>"))
    assert under(group, [DeviceRule(*ZERO, access)], script).split() == [str(read), str(write), str(both)]


def test_rules_replace_those_before_and_many_are_possible(group: Path) -> None:
    many = [DeviceRule("c", 200 + number, None) for number in range(150)]
    script = "(: < /dev/zero) 2>&- && echo 1 || echo 0"
    assert under(group, [*many, DeviceRule(*ZERO)], script) == "1\n"
    assert under(group, many, script) == "0\n"


def test_mknod_is_an_access_too(group: Path, tmp_path: Path) -> None:
    script = f"mknod {tmp_path}/zero c 1 5 2>&- && echo 1 || echo 0"
    assert under(group, [DeviceRule(*ZERO)], script) == "0\n"
    assert under(group, [DeviceRule(*ZERO, "rwm")], script) == "1\n"


# Compartments


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


PROBE = """
for name in null zero full random urandom tty ptmx; do (: < /dev/$name) 2>&- && echo "$name opens"; done
"""


def test_a_compartment_opens_what_is_harmless(bench: Bench) -> None:
    said = bench.facts(PROBE)
    opened = [line.split()[0] for line in said.splitlines() if line.endswith(" opens")]
    assert opened == ["null", "zero", "full", "random", "urandom", "ptmx"]  # tty: it has no terminal


def test_row14_a_node_that_comes_in_by_other_means_does_not_open(bench: Bench) -> None:
    """It meets the filter, not only its own absence; what the configuration asks for passes."""
    root = busybox_root(bench.work / "root", "")
    spec = bench.spec(bench.image(root), argv=("/bin/busybox", "sleep", "1000"))
    for allowed, opens in (((), False), ((DeviceRule("c", 10, 235),), True)):
        with bench.running(replace(spec, devices=Devices(allowed))) as compartment:
            assert compartment.running is not None
            procs = compartment.running.cgroup.path / "cgroup.procs"
            script = f"echo $$ > {procs}; exec dd if=/dev/autofs of=/dev/null bs=1 count=0"
            done = subprocess.run(["/bin/sh", "-c", script], check=False, capture_output=True)
            assert (done.returncode == 0) is opens, done.stderr


def test_a_device_of_the_configuration_is_there_and_its_own(bench: Bench) -> None:
    named = DeviceRule("c", 10, 235)  # autofs: every kernel that tests run on has it
    absent = DeviceRule("c", 42, 42)
    script = "b stat -c '%n %t:%T %u %a' /dev/autofs; (: < /dev/autofs) && echo opens; b ls /dev"
    spec = bench.spec(bench.image(busybox_root(bench.work / "root", script)))
    with bench.running(replace(spec, devices=Devices((named, absent)))):
        said = bench.output()
    assert "/dev/autofs a:eb 0 600" in said
    assert "opens" in said
    # The base system's own node is what it was.
    assert Path("/dev/autofs").stat().st_uid == 0
    assert stat.S_ISCHR(Path("/dev/autofs").stat().st_mode)


def test_an_assigned_device_is_nobody_elses_meanwhile(bench: Bench) -> None:
    autofs = DeviceRule("c", 10, 235)
    root = busybox_root(bench.work / "root", "")
    spec = bench.spec(bench.image(root), argv=("/bin/busybox", "sleep", "1000"))
    other = replace(spec, uuid=UUID[:-4] + "ffff", uid_base=spec.uid_base + 65536)
    shared, alone = Devices((autofs,)), Devices((autofs,), (autofs,))
    cases = ((alone, shared, True), (shared, alone, True), (alone, alone, True), (shared, shared, False))
    for first, second, refused in cases:
        with bench.running(replace(spec, devices=first)), bench.directory() as directory:
            candidate = Compartment(replace(other, devices=second), bench.machine)
            if refused:
                with pytest.raises(CompartmentRefusal) as caught:
                    candidate.start(directory)
                assert caught.value.code == "device-assigned"
            else:
                candidate.start(directory)
                candidate.kill()
                assert candidate.wait(10)
                candidate.ended()
