# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trustme_init.boot.pid1 import BACK_OFF, MAX_FAILURES, STABLE_AFTER, RestartPolicy

SRC = Path(__file__).resolve().parents[3] / "src"


def test_three_failures_in_a_row_end_it() -> None:
    policy = RestartPolicy()
    assert policy.after(1.0) == BACK_OFF[0]
    assert policy.after(1.0) == BACK_OFF[1]
    assert policy.after(1.0) is None


def test_a_manager_that_ran_well_starts_the_count_anew() -> None:
    policy = RestartPolicy()
    for _ in range(10 * MAX_FAILURES):
        assert policy.after(1.0) is not None
        assert policy.after(STABLE_AFTER) is not None


def test_pid1_imports_the_standard_library_and_the_kernel_room_only() -> None:
    # Decision 7: what PID 1 executes before there is a manager.
    code = (
        "import sys; before = set(sys.modules); import trustme_init.boot.pid1;"
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(SRC)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    ours = {name for name in out if name.startswith("trustme_init")}
    assert ours <= {
        "trustme_init",
        "trustme_init.boot",
        "trustme_init.boot.console",
        "trustme_init.boot.early",
        "trustme_init.boot.pid1",
        "trustme_init.boot.stages",
        "trustme_init.errors",
        "trustme_init.linux",
        "trustme_init.linux.mount",
        "trustme_init.linux.process",
        "trustme_init.linux.syscalls",
    }
    others = {name.partition(".")[0] for name in out if not name.startswith("trustme_init")}
    assert others <= set(sys.stdlib_module_names)
    # Heavy or needless in PID 1: each is a deliberate absence.
    assert not others & {
        "json",
        "socket",
        "subprocess",
        "dataclasses",
        "inspect",
        "tomllib",
        "selectors",
    }
