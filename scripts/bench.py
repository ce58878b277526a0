# SPDX-License-Identifier: Apache-2.0
"""Measure the boot path and the control interface (`make bench`); results as JSON, and a table.

The native part boots the product in the tests' sandbox (design decision 8), compiled as it is shipped. What
is missing there, the device mapper, is measured in a virtual machine. On a busy machine look at `min`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from scripts.benchmarks import imports, machine, native, provisioning, targets  # noqa: E402 - a script finds its own tree first
from trustme_tools.errors import ToolError  # noqa: E402

RESULT_VERSION: Final = 1


def main() -> int:
    """Run what was asked for; 0 even if a target is missed: a loaded machine is no failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--boots", type=int, default=7, help="native boots after the first (default 7)")
    parser.add_argument(
        "--image-dir", type=Path, default=ROOT / "build/image", help="image to measure in a VM"
    )
    parser.add_argument(
        "--no-vm", action="store_true", help="leave out everything that needs a virtual machine"
    )
    parser.add_argument("--no-native", action="store_true", help="leave out the native boots")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "kind": "trustme.bench",
        "version": RESULT_VERSION,
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "host": {
            "kernel": platform.release(),
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "load_before": os.getloadavg()[0],
        },
        "skipped": [],
    }
    if options.no_native:
        results["skipped"].append("native boots, imports, control, memory (--no-native)")
    else:
        _native(results, options.boots)
    _machine(results, options.image_dir, with_vm=not options.no_vm)
    results["host"]["load_after"] = os.getloadavg()[0]
    results["targets"] = targets.judge(results)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(targets.render(results))
    return 0


def _native(results: dict[str, Any], boots: int) -> None:
    with tempfile.TemporaryDirectory(prefix="trustme-bench-") as name:
        directory = Path(name)
        copy = native.compiled_copy(directory / "copy")
        results["first_byte_ms"] = native.summary(native.first_byte(copy, 15))
        results["imports"] = imports.measure(copy)
        print(f"bench: {boots + 1} native boots", file=sys.stderr)
        results["native"] = native.boots(directory, copy, boots)
        print("bench: provisioning", file=sys.stderr)
        results["provisioning"] = provisioning.measure(directory / "provisioning")


def _machine(results: dict[str, Any], image: Path, *, with_vm: bool) -> None:
    if not (image / "manifest.json").exists():
        results["skipped"].append(f"sizes, VM boot, verified start (no image in {image}; `make image`)")
        return
    results["sizes"] = machine.sizes(image)
    parts: tuple[tuple[str, Callable[[Path], dict[str, Any]]], ...] = (
        ("machine", machine.boot),
        ("verified_start", machine.verified_start),
    )
    for name, measure in parts:
        if not with_vm:
            results["skipped"].append(f"{name} (--no-vm)")
            continue
        print(f"bench: {name}", file=sys.stderr)
        try:
            results[name] = measure(image)
        except ToolError as error:
            results["skipped"].append(f"{name}: {error} ({error.evidence})")
            print(f"bench: {name} skipped: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
