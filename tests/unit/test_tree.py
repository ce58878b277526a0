# SPDX-License-Identifier: Apache-2.0
"""Rules about the tree itself: headers, module size, who may import whom."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for path in (ROOT / "src").rglob("*.py") if not path.name.endswith("_pb2.py"))
# design.md, "Rooms": a room may import only what stands left of it, itself, and the common modules.
ALLOWED = {
    "linux": set(),
    "firmware": set(),
    "proto": set(),
    "storage": {"linux"},
    "trust": {"firmware", "proto"},
    "tpm": {"linux", "firmware"},
    "tokens": {"linux", "tpm"},
    "guestos": {"linux", "trust", "proto"},
    "compartments": {"linux", "firmware", "tpm", "trust", "tokens", "proto", "storage"},
    "containers": {"guestos", "linux", "tpm", "trust", "tokens", "proto", "compartments"},
    "provisioning": {
        "containers",
        "guestos",
        "linux",
        "firmware",
        "tpm",
        "trust",
        "tokens",
        "proto",
        "storage",
    },
    "control": {
        "containers",
        "guestos",
        "linux",
        "firmware",
        "tpm",
        "trust",
        "tokens",
        "proto",
        "compartments",
        "provisioning",
    },
}
PID1_MODULES = ("boot/pid1.py", "boot/early.py", "boot/console.py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_every_module_is_labelled_and_readable(path: Path) -> None:
    text = path.read_text()
    if path.name == "__init__.py":
        assert text == ""
        return
    assert "# SPDX-License-Identifier: Apache-2.0" in text.splitlines()[:2]
    assert len(text.splitlines()) <= 520


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT / "src").parts
    names = imported(path)
    if parts[0] == "trustme_init":
        assert not any(name.startswith("trustme_tools") for name in names)
    if parts[0] != "trustme_init" or parts[1] not in ALLOWED:
        return
    rooms = {name.split(".")[1] for name in names if name.startswith("trustme_init.")}
    others = {room for room in rooms if (ROOT / "src/trustme_init" / room).is_dir()} - {parts[1]}
    assert others <= ALLOWED[parts[1]]


def test_only_one_module_uses_the_gpl_library() -> None:
    users = [path.name for path in SOURCES if any(name.split(".")[0] == "prctl" for name in imported(path))]
    assert users == ["confine.py"]


def test_no_machine_path_or_session_tool_in_the_tree() -> None:
    tracked = subprocess.run(
        ["git", "grep", "-lE", "/work/|/root/\\.pyenv|farm-bench", "--", ":!tests/unit/test_tree.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tracked.stdout == ""
