# SPDX-License-Identifier: Apache-2.0
"""Whether hardware virtualisation works here: found out by running a machine, not by looking at a file."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Final

from trustme_tools.machine.processes import Child

KVM_DEVICE: Final = Path("/dev/kvm")
PROBE_TIME: Final = 5.0
PROGRAM: Final = "qemu-system-x86_64"


@functools.cache
def choose() -> str:
    """Return "kvm" or "tcg"; TRUSTME_ACCEL overrides."""
    if chosen := os.environ.get("TRUSTME_ACCEL"):
        return chosen
    return "kvm" if os.access(KVM_DEVICE, os.R_OK | os.W_OK) and _bios_speaks() else "tcg"


def _bios_speaks() -> bool:
    """Start a machine like ours, without a disk, under KVM and wait for the first byte its BIOS writes.

    Like ours matters: nested hypervisors often run a plain machine but have no system management mode,
    which keeps the firmware's variables safe, or miss processor features.
    """
    with tempfile.TemporaryDirectory(prefix="trustme-kvm-") as name:
        output = Path(name) / "bios"
        child = Child(
            PROGRAM,
            [
                *("-accel", "kvm", "-machine", "q35,smm=on", "-cpu", "max", "-m", "32"),
                *("-nodefaults", "-display", "none", "-chardev", f"file,id=bios,path={output}"),
                *("-device", "isa-debugcon,iobase=0x402,chardev=bios"),
            ],
            Path(name) / "log",
        )
        try:
            deadline = time.monotonic() + PROBE_TIME
            while child.running and time.monotonic() < deadline:
                if output.exists() and output.stat().st_size:
                    return True
                time.sleep(0.02)
            return False
        finally:
            child.kill()
