# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration import sandbox
from tests.unit.tokens.conftest import few_rounds  # noqa: F401 - a fixture, for the tests of tokens here


@pytest.fixture(scope="session")
def factory(tmp_path_factory: pytest.TempPathFactory) -> sandbox.Factory:
    """Development keys and a signed core GuestOS, made once."""
    return sandbox.Factory.make(tmp_path_factory.mktemp("factory"))


@pytest.fixture
def device(factory: sandbox.Factory, tmp_path: Path) -> Callable[..., sandbox.Device]:
    """Make devices; each has its own disk, firmware variables and TPM."""

    def make(name: str = "device", **options: Any) -> sandbox.Device:
        return sandbox.Device(factory, tmp_path / name, **options)

    return make
