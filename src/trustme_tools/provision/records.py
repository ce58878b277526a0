# SPDX-License-Identifier: Apache-2.0
"""The records directory: for each device, by its UUID, certificate chain and report. Nothing secret."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trustme_tools import publish
from trustme_tools.provision.report import KIND, VERSION, Report

_LIMIT: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Records:
    """Reads and writes below `directory`, which is made when something is kept."""

    directory: Path

    def chain(self, uuid: str) -> bytes | None:
        """Return the certificate chain (PEM) of a device, unjudged; None if there is none."""
        return _read(self.directory / f"{uuid}.cert")

    def keep_chain(self, uuid: str, chain: bytes) -> None:
        """Replace the certificate chain of a device; it is durable on return."""
        self._keep(f"{uuid}.cert", chain)

    def report(self, uuid: str) -> dict[str, Any] | None:
        """Return the JSON form of a device's report; None if there is none, or it cannot be read."""
        try:
            document = json.loads(_read(self.directory / f"{uuid}.json") or b"")
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict) or (document.get("kind"), document.get("version")) != (
            KIND,
            VERSION,
        ):
            return None
        return document

    def keep_report(self, report: Report) -> None:
        """Replace the report of a device; it is durable on return."""
        text = json.dumps(report.as_dict(), indent=2)
        self._keep(f"{report.device_uuid}.json", text.encode() + b"\n")

    def _keep(self, name: str, data: bytes) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        publish.write_atomic(self.directory / name, data)


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_LIMIT)
    except FileNotFoundError:
        return None
