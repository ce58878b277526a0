# SPDX-License-Identifier: Apache-2.0
"""A software TPM 2.0 (swtpm) for one virtual machine."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from trustme_tools.machine.processes import Child, wait_for_path
from trustme_tools.tooling import run

STATE_FILE: Final = "tpm2-00.permall"
MARKER: Final = "manufactured"


def manufacture(state: Path) -> None:
    """Make a new TPM in `state`: SHA-256 bank on, no certificates. Nothing happens if one is there."""
    state.mkdir(parents=True, exist_ok=True)
    if (state / STATE_FILE).exists():
        return
    run(
        "swtpm_setup",
        ["--tpm2", "--tpmstate", state, "--pcr-banks", "sha256", "--createek", "--ecc", "--lock-nvram"],
        purpose="make a TPM",
    )


class Tpm:
    """A running swtpm; QEMU connects to `socket` and the TPM ends with QEMU or with us."""

    def __init__(self, state: Path, work: Path) -> None:
        manufacture(state)
        self.state = state
        self.socket = work / "tpm.sock"
        self.socket.unlink(missing_ok=True)
        self.child = Child(
            "swtpm",
            [
                *("socket", "--tpm2", "--tpmstate", f"dir={state},mode=0600"),
                *("--ctrl", f"type=unixio,path={self.socket},mode=0600", "--terminate"),
            ],
            work / "swtpm.log",
        )
        wait_for_path(self.socket, self.child)
