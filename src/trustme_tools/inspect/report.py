# SPDX-License-Identifier: Apache-2.0
"""The boot report (`/run/trustme/boot.json`), checked by version and shown to people.

Keys that are not known are kept and shown; a version that is not known is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from trustme_tools.errors import ToolError

REPORT_KIND: Final = "trustme.boot-report"
REPORT_VERSION: Final = 1
_BAR_WIDTH: Final = 40
_LOOK: Final = 64
_LONGEST: Final = 10**9
"""ms; no boot takes eleven days."""
_KNOWN: Final = frozenset(
    {"kind", "version", "result", "development", "manager_starts", "stages", "firmware", "anchors", "refusal"}
)


def is_json(path: Path) -> bool:
    """Whether the file begins as a JSON object does."""
    with path.open("rb") as file:
        return file.read(_LOOK).lstrip().startswith(b"{")


def parse(data: bytes) -> dict[str, Any]:
    """Parse a report; ToolError("not-a-report", "report-version")."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise _not_a_report(str(exc)) from exc
    if not isinstance(document, dict) or document.get("kind", REPORT_KIND) != REPORT_KIND:
        raise _not_a_report("no boot report by its kind")
    version = document.get("version")
    if version != REPORT_VERSION:
        raise ToolError(
            f"the boot report has version {version!r}, this program reads {REPORT_VERSION}",
            "use the `trustme` of the same release as the device",
            code="report-version",
        )
    if not isinstance(document.get("stages"), list):
        raise _not_a_report("no list of stages")
    return document


def text(report: dict[str, Any]) -> str:
    """Return the report for people: the stages as bars, the facts below."""
    lines = [f"boot {_line(report.get('result', 'of unknown result'))}"]
    if report.get("development"):
        lines[0] += " (development build)"
    stages = [stage for stage in report["stages"] if isinstance(stage, dict)]
    times = [_number(stage.get("ms")) for stage in stages]
    longest = max(times, default=0.0)
    for stage, ms in zip(stages, times, strict=True):
        bar = "█" * round(_BAR_WIDTH * ms / longest) if longest else ""
        lines.append(f"  {_line(stage.get('name', '?')):12} {ms:9.1f} ms  {bar}".rstrip())
    lines.append(f"  {'sum':12} {sum(times):9.1f} ms")
    for name in ("firmware", "anchors"):
        if name in report:
            lines += _fact(name, report[name])
    for name, value in report.items():
        if name not in _KNOWN:
            lines += _fact(name, value)
    if report.get("refusal"):
        lines += _fact("refusal", report["refusal"])
    return "\n".join(lines)


def _fact(name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{_line(name)}:", *(f"  {_line(key)}: {_line(item)}" for key, item in value.items())]
    if isinstance(value, list):
        return [f"{_line(name)}:", *(f"  {_item(item)}" for item in value)]
    return [f"{_line(name)}: {_line(value)}"]


def _item(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_line(key)} {_line(item)}" for key, item in value.items())
    return _line(value)


def _line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: Any) -> float:
    """Return a duration, ms; 0 for what cannot be one."""
    return float(value) if isinstance(value, int | float) and 0 <= value < _LONGEST else 0.0


def _not_a_report(evidence: str) -> ToolError:
    return ToolError(
        "this is not a boot report",
        "name a copy of the device's /run/trustme/boot.json",
        code="not-a-report",
        evidence=evidence,
    )
