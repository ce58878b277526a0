# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.boot.report import REPORT_VERSION, BootReport
from trustme_init.errors import TrustRefusal
from trustme_tools.errors import ToolError
from trustme_tools.inspect import report

REPORT = {
    "kind": "trustme.boot-report",
    "version": 1,
    "result": "running",
    "stages": [{"name": "early", "ms": 10.0}, {"name": "core", "ms": 40.0}],
    "firmware": {"secure_boot": True},
    "anchors": [{"subject": "CN=a", "sha256": "00"}],
    "mode": {"value": "provisioning", "why": "never completed"},
    "novelty": 7,
}


def test_report_is_readable() -> None:
    text = report.text(report.parse(json.dumps(REPORT).encode()))
    for part in (
        "boot running",
        "sum",
        "50.0 ms",
        "secure_boot: true",
        "subject CN=a",
        "value: provis",
        "novelty: 7",
    ):
        assert part in text
    early, core = (line for line in text.splitlines() if "█" in line)
    assert early.count("█") * 4 == core.count("█")


def test_what_the_device_writes_is_read() -> None:
    assert report.REPORT_VERSION == REPORT_VERSION
    written = BootReport(facts={"mode": {"value": "operational"}})
    written.stage("early", 1.0, 2.0)
    written.refused("core", TrustRefusal("bad-signature", "cause", evidence="e", remedy="r"))
    text = report.text(report.parse(json.dumps(written.as_dict()).encode()))
    assert "code: bad-signature" in text
    assert "stage: core" in text


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions_are_refused(version: Any) -> None:
    with pytest.raises(ToolError) as refused:
        report.parse(json.dumps(REPORT | {"version": version}).encode())
    assert refused.value.code == "report-version"


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"kind": "other", "version": 1}', '{"version": 1}'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ToolError) as refused:
        report.parse(text.encode())
    assert refused.value.code == "not-a-report"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*REPORT, "refusal", "x"]), JSON))
def test_any_report_can_be_shown(content: dict[str, Any]) -> None:
    document = {"stages": [], **content, "kind": "trustme.boot-report", "version": 1}
    if isinstance(document["stages"], list):
        assert report.text(report.parse(json.dumps(document).encode()))
    else:
        with pytest.raises(ToolError):
            report.parse(json.dumps(document).encode())


@pytest.mark.parametrize("ms", ["1e999", "Infinity", "NaN", "-1", "1" + "0" * 400, '"x"', "[]"])
def test_durations_that_are_none_are_shown_as_zero(ms: str) -> None:
    shown = report.text(report.parse(f'{{"version": 1, "stages": [{{"name": "a", "ms": {ms}}}]}}'.encode()))
    assert "a                  0.0 ms" in shown
