# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trustme_init.boot import early


def test_row15_tools_inherit_nothing_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    code = "import os; print(sorted(os.environ))"
    for name in ("LD_PRELOAD", "PYTHONPATH", "MKE2FS_CONFIG", "TSS2_LOG", "trustme.development"):
        monkeypatch.setitem(os.environ, name, "x")
    early.own_environment()
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, env=os.environ
    ).stdout
    # Our own list; Python may add its locale.
    assert set(eval(shown)) <= {"PATH", "TSS2_LOG", "LC_CTYPE"}  # noqa: S307
    assert os.environ["PATH"] == early.TOOL_PATH
    assert os.environ["TSS2_LOG"] == "all+none", "the TPM library writes nothing to the console"


def test_a_kernel_without_sysrq_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_self: object, _text: str) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "write_text", absent)
    kept = os.dup(0)
    try:
        early.quieten_console()
        assert os.readlink("/proc/self/fd/0") == "/dev/null"  # noqa: PTH115 - a magic link, read as text
    finally:
        os.dup2(kept, 0)
        os.close(kept)
