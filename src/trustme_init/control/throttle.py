# SPDX-License-Identifier: Apache-2.0
"""Log lines about what clients do: made visible, and so few that the log stays the device's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from trustme_init.control.sanitise import visible

Log = Callable[[str], None]

LOG_LINES: Final = 20
LOG_SECONDS: Final = 10.0
"""At most LOG_LINES in LOG_SECONDS from one source; how many were left out is said afterwards."""


class ThrottledLog:
    """Passes lines on to `log`, each after `name`, within the limits above."""

    def __init__(self, log: Log, name: str) -> None:
        self._log = log
        self._name = name
        self._since = 0.0
        self._count = 0

    def __call__(self, text: str) -> None:
        """Log one line, or count it."""
        now = time.monotonic()
        if now - self._since >= LOG_SECONDS:
            if self._count > LOG_LINES:
                self._log(f"{self._name}: {self._count - LOG_LINES} more lines not shown")
            self._since, self._count = now, 0
        self._count += 1
        if self._count <= LOG_LINES:
            self._log(f"{self._name}: {visible(text)}")
