# SPDX-License-Identifier: Apache-2.0
"""The boot report: `/run/trustme/boot.json`, written anew after every stage.

Versioned JSON. Readers ignore keys they do not know; a change of meaning raises `REPORT_VERSION`.
Times are milliseconds of CLOCK_BOOTTIME.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trustme_init.errors import Refusal
from trustme_init.linux.files import write_atomic

REPORT_VERSION: Final = 1
RESULT_BOOTING: Final = "booting"
RESULT_STARTED: Final = "started"
"""The core compartment exists; a manager that finds this adopts it instead of booting."""
RESULT_RUNNING: Final = "running"
RESULT_REFUSED: Final = "refused"


@dataclass(slots=True)
class BootReport:
    """What happened so far in this boot; `result` is one of the RESULT_* values."""

    result: str = RESULT_BOOTING
    development: bool | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    refusal: dict[str, str] | None = None
    manager_starts: int = 0

    def stage(self, name: str, started_ms: float, took_ms: float) -> None:
        """Record a finished stage."""
        self.stages.append({"name": name, "started_ms": round(started_ms, 1), "ms": round(took_ms, 1)})

    def refused(self, stage: str, refusal: Refusal) -> None:
        """Record why the boot ended."""
        self.result = RESULT_REFUSED
        self.refusal = {"stage": stage, **refusal.as_dict()}

    def write(self, path: Path) -> None:
        """Replace the report on disk atomically."""
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomic(path, json.dumps(self.as_dict(), indent=1).encode(), 0o644)

    def as_dict(self) -> dict[str, Any]:
        """Return the report's JSON form."""
        return {
            "kind": "trustme.boot-report",
            "version": REPORT_VERSION,
            "result": self.result,
            "development": self.development,
            "manager_starts": self.manager_starts,
            "stages": self.stages,
            **self.facts,
            "refusal": self.refusal,
        }

    @classmethod
    def read(cls, path: Path) -> BootReport | None:
        """Return what an earlier manager of this boot wrote; None when it wrote nothing usable."""
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(document, dict) or document.get("version") != REPORT_VERSION:
            return None
        own = {"kind", "version", "result", "development", "manager_starts", "stages", "refusal"}
        return cls(
            result=document.get("result", RESULT_BOOTING),
            development=document.get("development"),
            stages=document.get("stages", []),
            facts={key: value for key, value in document.items() if key not in own},
            refusal=document.get("refusal"),
            manager_starts=document.get("manager_starts", 0),
        )
