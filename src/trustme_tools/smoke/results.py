# SPDX-License-Identifier: Apache-2.0
"""Test results, for any CI: JUnit XML, and the JSON of OpenEmbedded's test framework.

JUnit: `testsuites/testsuite/testcase`, as pytest writes and CI servers read it. OpenEmbedded: a document
{result id: {"configuration": {…}, "result": {test id: {"status", "duration", "log"}}}}, which `resulttool`
reads from files called testresults.json (openembedded-core: meta/lib/oeqa/core/runner.py,
scripts/lib/resulttool/resultutils.py). Times are in seconds.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Final

from trustme_tools import publish
from trustme_tools.errors import ToolError

Configuration = Mapping[str, Any]
OEQA_NAME: Final = "testresults.json"
_JUNIT_LIMIT: Final = 256 * 1024 * 1024


class Status(Enum):
    """How a test case ended; the values are OpenEmbedded's."""

    PASSED = "PASSED"
    FAILED = "FAILED"
    ERROR = "ERROR"
    SKIPPED = "SKIPPED"
    EXPECTED_FAILURE = "EXPECTEDFAIL"

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self not in {Status.FAILED, Status.ERROR}


@dataclass(frozen=True, slots=True)
class Case:
    """One test case: `group` and `name` are its dotted id; `log` says why it failed or was skipped."""

    group: str
    name: str
    status: Status
    seconds: float = 0.0
    log: str = ""

    @property
    def id(self) -> str:
        """The dotted id."""
        return f"{self.group}.{self.name}"


_ELEMENTS: Final = {Status.FAILED: "failure", Status.ERROR: "error", Status.SKIPPED: "skipped"}


def junit(suite: str, cases: Sequence[Case], started: datetime) -> bytes:
    """Return cases as JUnit XML; the first line of a log is its message."""
    root = ET.Element("testsuites")
    count = {status: sum(case.status is status for case in cases) for status in Status}
    element = ET.SubElement(
        root,
        "testsuite",
        name=suite,
        tests=str(len(cases)),
        failures=str(count[Status.FAILED]),
        errors=str(count[Status.ERROR]),
        skipped=str(count[Status.SKIPPED]),
        time=f"{sum(case.seconds for case in cases):.3f}",
        timestamp=started.isoformat(timespec="seconds"),
    )
    for case in cases:
        entry = ET.SubElement(
            element, "testcase", classname=case.group, name=case.name, time=f"{case.seconds:.3f}"
        )
        log = printable(case.log)
        if kind := _ELEMENTS.get(case.status):
            ET.SubElement(entry, kind, message=log.partition("\n")[0]).text = log
        elif log:
            ET.SubElement(entry, "system-out").text = log
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'.encode()


def printable(text: str) -> str:
    """Take away what is no text: consoles say anything, and XML 1.0 allows no control characters."""
    return "".join(each if each.isprintable() or each in "\n\t" else "?" for each in text)


def read_junit(path: Path) -> list[Case]:
    """Return the cases of a JUnit file, pytest's for one; ToolError("bad-junit")."""
    try:
        with path.open("rb") as file:
            text = file.read(_JUNIT_LIMIT).decode("utf-8")
        if "<!DOCTYPE" in text:
            raise ValueError("it has a document type")
        root = ET.fromstring(text)  # noqa: S314 - our own test run's, and nothing can be expanded
        return [_case(element) for element in root.iter("testcase")]
    except (ValueError, ET.ParseError) as exc:
        raise ToolError(
            f"{path} is not a JUnit file", "run the tests again", code="bad-junit", evidence=str(exc)
        ) from exc


def _case(element: ET.Element) -> Case:
    status, log = Status.PASSED, ""
    for child in element:
        kind = next((status for status, name in _ELEMENTS.items() if name == child.tag), None)
        if kind is None or not status.good:
            continue
        # pytest reports an expected failure as one kind of skipping.
        status = Status.EXPECTED_FAILURE if child.get("type") == "pytest.xfail" else kind
        log = child.text or child.get("message") or ""
    return Case(
        element.get("classname", ""), element.get("name", ""), status, float(element.get("time", "0")), log
    )


def configuration(manifest: Mapping[str, Any], started: datetime) -> dict[str, Any]:
    """Return what `resulttool` files results under, from an image directory's manifest."""
    return {
        "TEST_TYPE": "runtime",
        "MACHINE": str(manifest.get("machine") or manifest.get("hardware") or "unknown"),
        "DISTRO": "trustme",
        "IMAGE_BASENAME": str(manifest.get("image", "unknown")),
        "IMAGE_PKGTYPE": "deb" if manifest.get("builder") == "reference" else "ipk",
        "STARTTIME": f"{started:%Y%m%d%H%M%S}",
        "LAYERS": {},
    }


def oeqa(cases: Iterable[Case], configuration: Configuration) -> dict[str, Any]:
    """Return the document of one run."""
    keys = ("TEST_TYPE", "IMAGE_BASENAME", "MACHINE", "STARTTIME")
    result: dict[str, dict[str, Any]] = {}
    for case in cases:
        result[case.id] = entry = {"status": case.status.value, "duration": round(case.seconds, 3)}
        if case.log:
            entry["log"] = printable(case.log)
    name = "_".join(configuration[key] for key in keys)
    return {name: {"configuration": dict(configuration), "result": result}}


def write_oeqa(path: Path, document: Mapping[str, Any]) -> None:
    """Add a run to the file at `path`, which may hold other runs; ToolError("bad-results")."""
    before: Any = {}
    if path.exists():
        try:
            before = json.loads(path.read_bytes())
        except ValueError as exc:
            raise _bad_results(path, str(exc)) from exc
        if not isinstance(before, dict):
            raise _bad_results(path, type(before).__name__)
    write(path, json.dumps({**before, **document}, indent=1, sort_keys=True).encode() + b"\n")


def write(path: Path, data: bytes) -> None:
    """Replace a results file, in a directory that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    publish.write_atomic(path, data)


def _bad_results(path: Path, evidence: str) -> ToolError:
    return ToolError(
        f"{path} holds something else than test results",
        "name another file",
        code="bad-results",
        evidence=evidence,
    )
