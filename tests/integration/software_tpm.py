# SPDX-License-Identifier: Apache-2.0
"""A swtpm process for one test; it dies with the test run, however that ends."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """For `preexec_fn`: be killed when the test process goes away."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class SoftwareTpm:
    """swtpm on a unix socket below `directory`; state persists there between uses."""

    def __init__(self, directory: Path) -> None:
        self._state = directory / "tpm"
        self._state.mkdir(exist_ok=True)
        self._socket = directory / "swtpm.sock"
        self.tcti = f"swtpm:path={self._socket}"

    def __enter__(self) -> Self:
        log = os.open(self._state.parent / "swtpm.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._process = subprocess.Popen(
            [
                "swtpm",
                "socket",
                "--tpm2",
                f"--tpmstate=dir={self._state}",
                f"--server=type=unixio,path={self._socket}",
                f"--ctrl=type=unixio,path={self._socket}.ctrl",
                "--flags=not-need-init,startup-clear",
                "--log=level=0",
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call; the test process has no threads here
        )
        os.close(log)  # it gets a line each time somebody disconnects
        while not self._accepts():
            assert self._process.poll() is None, "swtpm did not start"
            select.select([], [], [], 0.01)
        return self

    def _accepts(self) -> bool:
        """Between bind(2) and listen(2) the socket is there and refuses connections."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._socket))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._socket.unlink(missing_ok=True)

    def pcr(self, number: int) -> str:
        """Return a PCR of the SHA-256 bank as tpm2-tools read it."""
        out = subprocess.run(
            ["tpm2_pcrread", "-T", self.tcti, f"sha256:{number}"], check=True, capture_output=True, text=True
        ).stdout
        return out.rpartition("0x")[2].strip().lower()
