# SPDX-License-Identifier: Apache-2.0
"""Options of the whole test run; pytest wants them here, whichever part is run."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trustme", "virtual machines")
    group.addoption(
        "--image-dir",
        type=Path,
        help="image directory for tests/qemu, of any builder (default: build the reference image)",
    )
    group.addoption(
        "--artifacts",
        type=Path,
        default=Path("build/test-artifacts"),
        help="where console logs of failed tests go (default: %(default)s)",
    )
