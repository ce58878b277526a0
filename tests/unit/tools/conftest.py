# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.directory import PkiDirectory


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    directory: Path = tmp_path_factory.mktemp("tools") / "pki"
    return create(directory, algorithm=Algorithm.P384, development=True)
