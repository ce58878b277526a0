# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[3] / "src"
# dataclasses bring `inspect` in; errors, machine and policy need those anyway.
FORBIDDEN = {"argparse", "asyncio", "json", "logging", "subprocess", "tempfile", "cryptography"}


def loaded(module: str) -> set[str]:
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import {module}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-I", "-c", code], text=True).split())


def test_the_server_keeps_within_the_import_budget() -> None:
    modules = loaded("trustme_init.control.server, trustme_init.control.service")
    assert not modules & FORBIDDEN
    assert not {name for name in modules if name.startswith("trustme_init.control.cli")}
    assert "trustme_init.control.client" not in modules


def test_the_command_needs_only_python_and_protobuf() -> None:
    modules = loaded("trustme_init.control.cli.main")
    ours = {name for name in modules if name.startswith("trustme_init.")}
    assert ours <= {
        name
        for name in ours
        if name.startswith(("trustme_init.control", "trustme_init.proto")) or name == "trustme_init.errors"
    }
    assert not {"trustme_init.control.dispatch", "trustme_init.control.transport"} & ours
    assert not {name.partition(".")[0] for name in modules} & {
        "cryptography",
        "pyroute2",
        "prctl",
        "tpm2_pytss",
    }
