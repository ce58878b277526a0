# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path

import pytest

from trustme_tools import tooling
from trustme_tools.errors import MissingToolError

ROOT = Path(__file__).parents[3]
ALWAYS_THERE = {"coreutils", "tar"}


def test_every_program_is_known_and_its_package_is_set_up() -> None:
    sources = [path.read_text() for path in (ROOT / "src/trustme_tools").rglob("*.py")]
    used = {name for text in sources for name in re.findall(r'\b(?:run|find|Child)\(\s*"([^"]+)"', text)}
    assert {"mke2fs", "mcopy", "sbsign", "swtpm"} <= used
    assert used - set(tooling.PACKAGES) == {"virt-fw-vars"}
    set_up = set(re.findall(r"[\w.+-]+", (ROOT / "scripts/setup").read_text()))
    assert set(tooling.PACKAGES.values()) - set_up <= ALWAYS_THERE


def test_administrators_programs_are_found_by_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    script = "command -v mke2fs; echo $CHOSEN"
    output = tooling.run("sh", ["-c", script], purpose="look", environment={"CHOSEN": "word"})
    assert re.fullmatch(r"(/usr)?/sbin/mke2fs\nword\n", output.decode())


@pytest.mark.parametrize(
    ("program", "remedy"), [("sbsign", "apt-get install sbsigntool"), ("ukify", "make setup")]
)
def test_a_missing_program_names_its_package(program: str, remedy: str) -> None:
    assert remedy in MissingToolError(program, tooling.PACKAGES.get(program)).remedy
