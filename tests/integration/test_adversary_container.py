# SPDX-License-Identifier: Apache-2.0
"""What a hostile container tries on the kernel, on its log and on the manager that serves it."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.compartment_kit import Bench, busybox_root, section
from trustme_init.linux.syscalls import libc

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

HERE = Path(__file__).resolve().parent


def compile_probe(root: Path) -> None:
    subprocess.run(["gcc", "-static", "-O1", "-o", root / "bin/probe", HERE / "probe.c"], check=True)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """errno of each call of probe.c, made as root of a compartment."""
    return probe(Bench(tmp_path_factory.mktemp("probe")), strict=False)


@pytest.fixture(scope="module")
def strictly_probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The same in a container beside the core."""
    return probe(Bench(tmp_path_factory.mktemp("strict")), strict=True)


def probe(bench: Bench, *, strict: bool) -> dict[str, int]:
    root = busybox_root(
        bench.work / "root",
        "echo '== status =='; b grep Seccomp: /proc/self/status\n"
        "echo '== probe =='; /bin/probe; echo '== end =='",
    )
    compile_probe(root)
    with bench.running(replace(bench.spec(bench.image(root)), strict_calls=strict)):
        text = bench.output()
    lines = [*section(text, "probe"), *section(text, "status")]
    return {name.rstrip(":"): int(value) for name, value in map(str.split, lines)}


def test_row25_a_container_runs_under_a_system_call_filter(probed: dict[str, int]) -> None:
    assert probed["Seccomp"] == 2


@pytest.mark.parametrize(
    "name",
    [
        "add_key",
        "request_key",
        "keyctl",
        "syslog",
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "open_by_handle_at",
        "TIOCSETD",
        "TIOCSTI",
        "TIOCLINUX",
        "TIOCSETD-high",
    ],
)
def test_row25_calls_past_namespaces_and_limits_are_refused(probed: dict[str, int], name: str) -> None:
    assert probed[name] == errno.EPERM


@pytest.mark.parametrize("name", ["AF_ALG", "AF_VSOCK", "AF_VSOCK-high", "AF_PACKET"])
def test_row25_only_sockets_of_its_own_network_can_be_made(probed: dict[str, int], name: str) -> None:
    assert probed[name] == errno.EAFNOSUPPORT


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other architectures have no second set of calls")
@pytest.mark.parametrize("name", ["x32", "i386"])
def test_row25_no_other_set_of_calls_goes_round_the_filter(probed: dict[str, int], name: str) -> None:
    assert probed[name] == errno.ENOSYS


@pytest.mark.parametrize("name", ["SO_LINGER", "SO_LINGER-high"])
def test_row34_no_descriptor_of_a_container_can_make_the_manager_wait_when_it_closes_it(
    probed: dict[str, int], name: str
) -> None:
    assert probed[name] == errno.EPERM


def test_row25_other_containers_are_under_an_allow_list(
    probed: dict[str, int], strictly_probed: dict[str, int]
) -> None:
    strict = {name for name in probed if name.startswith("strict-")}
    assert {probed[name] for name in strict} == {0}
    assert {strictly_probed[name] for name in strict} == {errno.EPERM}
    assert len(strict) == 4
    # And under all that the core is under.
    assert {name: strictly_probed[name] for name in probed.keys() - strict} == {
        name: probed[name] for name in probed.keys() - strict
    }


def test_the_filter_leaves_what_programs_live_by(probed: dict[str, int]) -> None:
    assert {name: value for name, value in probed.items() if name.startswith("ok-") and value} == {}


def test_row34_what_a_container_uses_up_is_not_the_managers(tmp_path: Path) -> None:
    """The kernel counts inotify instances, signals and the like per user, up through all user namespaces."""
    bench = Bench(tmp_path)
    root = busybox_root(tmp_path / "root", "/bin/probe inotify")
    compile_probe(root)
    with bench.running(bench.spec(bench.image(root))):
        taken = int(bench.output("inotify ").split()[-1])
        assert taken >= 64
        mine = libc.inotify_init1(os.O_CLOEXEC)
        assert mine >= 0, f"nothing left after the container took {taken}"
        os.close(mine)
