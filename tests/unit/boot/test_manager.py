# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from trustme_init.boot import manager, stages
from trustme_init.boot.console import Console
from trustme_init.boot.pid1 import EXIT_POWER_OFF, EXIT_REFUSED
from trustme_init.boot.report import BootReport
from trustme_init.errors import TrustRefusal
from trustme_init.machine import Machine


@pytest.fixture
def walk(tmp_path: Path) -> manager._Walk:
    machine = Machine(run=tmp_path)
    return manager._Walk(machine, Console(tmp_path / "console"), BootReport(), (0.0, 0.0), stage="core")


def test_every_policy_of_the_table_is_known_to_the_manager() -> None:
    assert {stage.on_refusal for stage in stages.STAGES} <= set(manager.AFTER_REFUSAL)
    assert stages.on_refusal("resume") in manager.AFTER_REFUSAL


def test_a_refusal_leads_where_the_stage_table_says(
    walk: manager._Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = TrustRefusal("bad-signature", "why")
    assert walk.refuse(refusal) == EXIT_REFUSED
    other = [
        stage._replace(on_refusal="power off") if stage.name == "core" else stage for stage in stages.STAGES
    ]
    monkeypatch.setattr(stages, "STAGES", tuple(other))
    monkeypatch.setitem(manager.AFTER_REFUSAL, "power off", EXIT_POWER_OFF)
    assert walk.refuse(refusal) == EXIT_POWER_OFF
