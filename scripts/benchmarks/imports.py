# SPDX-License-Identifier: Apache-2.0
"""What each part of the boot imports first, and what that costs (`-X importtime` on a compiled copy)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

_BOOT: Final = (
    ("pid1", ("boot.pid1", "boot.console")),
    ("machine", ("machine", "linux.block", "linux.cgroup", "compartments.verity")),
    ("manager", ("boot.manager",)),
    ("devices", ("boot.devices",)),
    ("platform", ("boot.platform",)),
    ("storage", ("boot.storage",)),
    ("mode", ("provisioning.marker",)),
    ("core", ("boot.core",)),
    ("handoff", ("boot.device", "compartments.rootfs", "compartments.child")),
)
_TPM_CHILD: Final = (("devices", ("boot.devices",)), ("TPM child", ()))
_LINE: Final = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)")
_MARK: Final = "@ "
LISTED: Final = 8


def measure(copy: Path, count: int = 3) -> dict[str, Any]:
    """Return part of the boot → modules first imported there, their cost in ms, and the dearest of them."""
    boot = [_trace(copy, _BOOT) for _ in range(count)]
    # In the child of its own that drives the TPM.
    child = [_trace(copy, _TPM_CHILD, last="import tpm2_pytss") for _ in range(count)]
    best = {part: min((run[part] for run in boot), key=_cost) for part, _ in _BOOT}
    best["TPM child"] = min((run["TPM child"] for run in child), key=_cost)
    return best


def _cost(part: dict[str, Any]) -> float:
    return float(part["ms"])


def _trace(copy: Path, parts: tuple[tuple[str, tuple[str, ...]], ...], last: str = "") -> dict[str, Any]:
    lines = [f"import sys; sys.path.insert(0, {str(copy / 'src')!r})"]
    for part, modules in parts:
        lines.append(f"print({_MARK + part!r}, file=sys.stderr)")
        lines += [f"import trustme_init.{module}" for module in modules]
    done = subprocess.run(
        [sys.executable, "-I", "-X", "importtime", "-c", "\n".join([*lines, last])],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.defpath},
    )
    found: dict[str, list[tuple[str, int]]] = {"interpreter": []}
    part = "interpreter"
    for line in done.stderr.splitlines():
        if line.startswith(_MARK):
            part = line.removeprefix(_MARK)
            found[part] = []
        elif match := _LINE.match(line):
            found[part].append((match[4], int(match[1])))
    return {part: _describe(entries) for part, entries in found.items()}


def _describe(entries: list[tuple[str, int]]) -> dict[str, Any]:
    dearest = sorted(entries, key=lambda entry: entry[1], reverse=True)[:LISTED]
    return {
        "ms": round(sum(microseconds for _, microseconds in entries) / 1000, 1),
        "modules": len(entries),
        "dearest_ms": {name: round(microseconds / 1000, 2) for name, microseconds in dearest},
    }
