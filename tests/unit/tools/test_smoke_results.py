# SPDX-License-Identifier: Apache-2.0
"""Results as JUnit XML and as OpenEmbedded's JSON, and the way from one to the other."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trustme_tools.errors import ToolError
from trustme_tools.smoke import results
from trustme_tools.smoke.results import Case, Status

STARTED = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
MANIFEST = {"image": "trustme-base", "hardware": "x86", "builder": "reference"}
CASES = [
    Case("trustme.smoke", "first_boot", Status.PASSED, 30.25, "RUNNING"),
    Case("trustme.smoke", "token", Status.FAILED, 1.5, "no (why)\n\nthe \x1b[31mconsole\x00 & <this>\ud800"),
    Case("trustme.smoke", "verdict", Status.SKIPPED, 0.0, "an earlier step failed"),
]


def test_junit() -> None:
    root = ET.fromstring(results.junit("trustme.smoke", CASES, STARTED))  # noqa: S314 - our own
    suite = root[0]
    assert root.tag == "testsuites"
    counts = [suite.get(key) for key in ("tests", "failures", "errors", "skipped", "time")]
    assert counts == ["3", "1", "0", "1", "31.750"]
    assert suite.get("timestamp") == "2026-02-03T04:05:06+00:00"
    passed, failed, skipped = suite
    assert (passed.get("classname"), passed.get("name"), passed.get("time")) == (
        *("trustme.smoke", "first_boot"),
        "30.250",
    )
    assert failed[0].tag == "failure"
    assert failed[0].get("message") == "no (why)"
    assert failed[0].text == "no (why)\n\nthe ?[31mconsole? & <this>?"
    assert skipped[0].tag == "skipped"


def test_junit_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_bytes(results.junit("trustme.smoke", CASES, STARTED))
    read = results.read_junit(path)
    assert [(case.id, case.status, case.seconds) for case in read] == [
        (case.id, case.status, case.seconds) for case in CASES
    ]
    assert read[1].log.startswith("no (why)")


def test_pytests_junit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.qemu.test_core" name="test_a[x]" time="1.25"/>'
        '<testcase classname="c" name="xfail"><skipped type="pytest.xfail" message="known"/></testcase>'
        '<testcase classname="c" name="skip"><skipped type="pytest.skip" message="n">why</skipped></testcase>'
        '<testcase classname="c" name="both"><failure message="f">text</failure><error>e</error></testcase>'
        '<testcase classname="c" name="error"><error message="e"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = {case.name: (case.status, case.log) for case in results.read_junit(path)}
    assert found == {
        "test_a[x]": (Status.PASSED, ""),
        "xfail": (Status.EXPECTED_FAILURE, "known"),
        "skip": (Status.SKIPPED, "why"),
        "both": (Status.FAILED, "text"),
        "error": (Status.ERROR, "e"),
    }


@pytest.mark.parametrize("text", ["", "<a", '<!DOCTYPE a [<!ENTITY b "c">]><a/>', "\udcff"])
def test_what_is_no_junit(tmp_path: Path, text: str) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ToolError) as caught:
        results.read_junit(path)
    assert caught.value.code == "bad-junit"


def test_openembeddeds_json(tmp_path: Path) -> None:
    path = tmp_path / "deep/testresults.json"
    configuration = results.configuration(MANIFEST, STARTED)
    results.write_oeqa(path, results.oeqa(CASES, configuration))
    document = json.loads(path.read_text())
    run = document["runtime_trustme-base_x86_20260203040506"]
    # resulttool takes a file for nothing else than its configuration.
    assert {"TEST_TYPE", "DISTRO", "MACHINE", "IMAGE_BASENAME", "IMAGE_PKGTYPE"} <= run[
        "configuration"
    ].keys()
    assert run["configuration"]["IMAGE_PKGTYPE"] == "deb"
    assert run["result"]["trustme.smoke.first_boot"] == {
        "status": "PASSED",
        "duration": 30.25,
        "log": "RUNNING",
    }
    assert run["result"]["trustme.smoke.token"]["status"] == "FAILED"


def test_a_run_is_added_to_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "testresults.json"
    for second in (1, 2):
        configuration = results.configuration(MANIFEST, STARTED.replace(second=second))
        results.write_oeqa(path, results.oeqa(CASES, configuration))
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("text", ["not json", "[]"])
def test_a_file_that_holds_something_else_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "testresults.json"
    path.write_text(text)
    with pytest.raises(ToolError) as caught:
        results.write_oeqa(path, {})
    assert caught.value.code == "bad-results"
    assert path.read_text() == text


def test_yoctos_manifest_names_a_machine() -> None:
    manifest = MANIFEST | {"machine": "qemux86-64", "builder": "yocto"}
    configuration = results.configuration(manifest, STARTED)
    assert (configuration["MACHINE"], configuration["IMAGE_PKGTYPE"]) == ("qemux86-64", "ipk")
