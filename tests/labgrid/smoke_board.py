# SPDX-License-Identifier: Apache-2.0
"""The smoke test on a board of a lab; run by hand or by the lab's CI, with labgrid's pytest plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trustme_tools.machine import images
from trustme_tools.smoke.subject import Board
from trustme_tools.smoke.walk import Smoke, development_settings

BOOT_TIME = 240.0


def test_smoke(strategy: Any, env: Any, tmp_path: Path) -> None:
    image = images.load(Path(env.config.get_image_path("base")))
    strategy.transition("on")
    smoke = Smoke(Board(strategy.terminal, timeout=BOOT_TIME), development_settings(image, tmp_path), print)
    smoke.run()
    assert smoke.passed, "\n".join(f"{case.name}: {case.log}" for case in smoke.cases if not case.status.good)
