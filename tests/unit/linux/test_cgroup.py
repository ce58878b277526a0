# SPDX-License-Identifier: Apache-2.0
"""Control files on an ordinary file system; the kernel's own are in tests/integration/test_compartment.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.cgroup import Cgroup, KernelControllers, Limits, parse_flat


def hierarchy(path: Path, controllers: str, enabled: str = "") -> Path:
    (path / "cgroup.controllers").write_text(controllers)
    (path / "cgroup.subtree_control").write_text(enabled)
    return path


def test_the_required_controllers_are_delegated(tmp_path: Path) -> None:
    KernelControllers().enable(hierarchy(tmp_path, "hugetlb memory pids\n"))
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_row34_a_compartment_of_many_processes_competes_for_the_processor_as_one(tmp_path: Path) -> None:
    """Of the processor and of the disk alike; and where there is a cpuset, it can be kept to some."""
    KernelControllers().enable(hierarchy(tmp_path, "cpuset cpu io memory pids rdma\n"))
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids +cpu +cpuset +io"


def test_what_is_delegated_is_left_alone(tmp_path: Path) -> None:
    KernelControllers().enable(hierarchy(tmp_path, "memory pids\n", "memory pids\n"))
    assert (tmp_path / "cgroup.subtree_control").read_text() == "memory pids\n"


@pytest.mark.parametrize("offered", ["", "memory", "pids cpu", "memory_x pids"])
def test_a_missing_controller_is_refused_by_name(tmp_path: Path, offered: str) -> None:
    with pytest.raises(CompartmentRefusal) as caught:
        KernelControllers().enable(hierarchy(tmp_path, offered))
    assert caught.value.code == "controller-missing"
    assert "missing" in caught.value.evidence
    assert (tmp_path / "cgroup.subtree_control").read_text() == ""


def test_no_cgroup2_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompartmentRefusal) as caught:
        KernelControllers().enable(tmp_path)
    assert caught.value.code == "controller-missing"


@pytest.mark.parametrize("swap", [True, False])
def test_limits_are_written_and_swap_only_where_there_is_some(tmp_path: Path, *, swap: bool) -> None:
    names = ["memory.max", "memory.oom.group", "pids.max", *(["memory.swap.max"] if swap else [])]
    for name in names:
        (tmp_path / name).touch()
    KernelControllers().limit(tmp_path, Limits(1 << 28, 64))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    wanted = {"memory.max": str(1 << 28), "memory.oom.group": "1", "pids.max": "64", "memory.swap.max": "0"}
    assert found == {name: wanted[name] for name in names}


def test_processors_are_limited_where_the_configuration_says_so(tmp_path: Path) -> None:
    for name in ("memory.max", "memory.oom.group", "pids.max", "cpu.max", "cpuset.cpus"):
        (tmp_path / name).touch()
    KernelControllers().limit(tmp_path, Limits(1 << 28, 64, cpus="0-1,3", cpu_percent=150))
    assert (tmp_path / "cpu.max").read_text() == "150000 100000"
    assert (tmp_path / "cpuset.cpus").read_text() == "0-1,3"


@pytest.mark.parametrize(
    ("limits", "name"), [({"cpus": "0"}, "cpuset.cpus"), ({"cpu_percent": 5}, "cpu.max")]
)
def test_a_limit_without_its_controller_is_refused_by_name(
    tmp_path: Path, limits: dict[str, Any], name: str
) -> None:
    for present in ("memory.max", "memory.oom.group", "pids.max"):
        (tmp_path / present).touch()
    with pytest.raises(CompartmentRefusal) as caught:
        KernelControllers().limit(tmp_path, Limits(1, 1, **limits))
    assert caught.value.code == "controller-missing"
    assert caught.value.evidence.startswith(name)


def test_a_limit_that_cannot_be_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompartmentRefusal) as caught:
        KernelControllers().limit(tmp_path, Limits(1, 1))
    assert caught.value.code == "limit-failed"


def test_membership_includes_groups_below(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "cgroup.procs").write_text("12\n")
    (tmp_path / "below/cgroup.procs").write_text("34\n56\n")
    group = Cgroup(tmp_path)
    assert [group.contains(pid) for pid in (12, 34, 56, 1, 3)] == [True, True, True, False, False]
    assert not Cgroup(tmp_path / "missing").contains(12)


@given(st.text())
def test_any_flat_file_is_parsed(text: str) -> None:
    assert all(isinstance(value, int) for value in parse_flat(text).values())


def test_flat_files() -> None:
    assert parse_flat("populated 1\nfrozen 0\n") == {"populated": 1, "frozen": 0}
