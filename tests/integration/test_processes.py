# SPDX-License-Identifier: Apache-2.0
"""What is started for a virtual machine ends with whoever started it, however that ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTER = """
import sys, time
from pathlib import Path
from trustme_tools.machine.tpm import Tpm
work = Path(sys.argv[1])
print(Tpm(work / "state", work).child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_no_process_behind(tmp_path: Path, number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, tmp_path],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        text=True,
    ) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        pidfd = os.pidfd_open(child)
        try:
            starter.send_signal(number)
            assert select.select([pidfd], [], [], 10)[0], "swtpm outlived the process that started it"
        finally:
            os.close(pidfd)
