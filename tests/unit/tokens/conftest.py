# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.unit.tokens import kit
from trustme_init.tokens import softtoken


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of anything but what a guess costs."""
    monkeypatch.setattr(softtoken, "ROUNDS", kit.FEW)
