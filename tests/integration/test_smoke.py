# SPDX-License-Identifier: Apache-2.0
"""`trustme smoke` on devices booted natively, each a board behind a console; and what resulttool says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.sandbox import Device, Factory
from tests.integration.test_tools_provision import console_of
from trustme_tools.cli import main
from trustme_tools.smoke import walk

pytestmark = pytest.mark.root
Make = Callable[..., Device]
PIN = "canary-pin-4711"
LAYERS = "TRUSTME_YOCTO_LAYERS"
"""A folder with openembedded-core in it, as a checkout or bare."""
CORE_COMMIT = "ef022bf82d79015802309d14c28b13373ebe53f5"

# What stands between a board and us, in the place of socat or labgrid-client.
BRIDGE = """\
import os, socket, sys, threading
way = socket.socket(socket.AF_UNIX)
way.connect(sys.argv[1])
def there():
    while data := os.read(0, 65536):
        way.sendall(data)
threading.Thread(target=there, daemon=True).start()
while data := way.recv(65536):
    os.write(1, data)
"""


class Lab:
    """An image directory, a settings file, and the results of a run."""

    def __init__(self, directory: Path, factory: Factory, capfd: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.console = directory / "console"
        self._capfd = capfd
        self.image = directory / "image"
        self.image.mkdir(parents=True)
        for name in ("trustme-base.img", "trustme-base.efi"):
            (self.image / name).touch()
        (self.image / "pki").symlink_to(factory.pki.path)
        self.manifest(development=True)
        pin = directory / "pin"
        pin.touch(mode=0o600)
        pin.write_text(f"{PIN}\n")
        self.settings: dict[str, Any] = {
            "version": 1,
            "guest_anchors": [str(factory.pki.certificate_path("guestos_subca"))],
            "device_anchors": [str(factory.pki.certificate_path("device_subca"))],
            "device_ca": {"pki": str(factory.pki.path)},
            "token": {"pin": "file:pin"},
            "wait": 60,
        }

    def manifest(self, **facts: Any) -> None:
        document = {"version": 1, "image": "trustme-base", "hardware": "x86", "builder": "reference"}
        (self.image / "manifest.json").write_text(json.dumps(document | facts))

    def smoke(self, *words: str, **changes: Any) -> tuple[int, dict[str, str], str]:
        """Run; return the exit code, the status of each case, and the whole output."""
        path = self.directory / "station.yml"
        path.write_text(json.dumps(self.settings | changes))
        places = {"--settings": path, "--junit": self.junit, "--oeqa": self.oeqa}
        options = [str(word) for pair in places.items() for word in pair]
        self._capfd.readouterr()
        code = main.main(["smoke", "--json", str(self.image), *options, *words])
        out, err = self._capfd.readouterr()
        result = json.loads(out)["result"]
        assert (code == 0) == result["passed"]
        assert [case["name"] for case in result["cases"]] == list(walk.CASES)
        return code, {case["name"]: case["status"] for case in result["cases"]}, out + err

    @property
    def junit(self) -> Path:
        return self.directory / "smoke.xml"

    @property
    def oeqa(self) -> Path:
        return self.directory / "testresults.json"

    def suite(self) -> ET.Element:
        return ET.parse(self.junit).getroot()[0]  # noqa: S314 - our own

    @property
    def way(self) -> tuple[str, str]:
        return "--console", str(self.console)


@pytest.fixture
def lab(tmp_path: Path, factory: Factory, capfd: pytest.CaptureFixture[str]) -> Lab:
    return Lab(tmp_path / "lab", factory, capfd)


def failed(statuses: dict[str, str], name: str) -> None:
    """Everything before `name` passed, everything behind it was not tried."""
    names = list(walk.CASES)
    position = names.index(name)
    expected = ["PASSED"] * position + ["FAILED"] + ["SKIPPED"] * (len(names) - position - 1)
    assert statuses == dict(zip(names, expected, strict=True))


def test_row29_a_board_behind_a_program_is_provisioned(device: Make, lab: Lab) -> None:
    command = shlex.join([sys.executable, "-Ic", BRIDGE, str(lab.console)])
    with device(with_core_console=True).boot() as boot, console_of(boot, lab.console) as written:
        boot.wait_prepared()
        code, statuses, said = lab.smoke("--console-command", command)
        assert code == 0, said
        assert {*statuses.values()} == {"PASSED"}
        kept = [lab.junit.read_bytes(), lab.oeqa.read_bytes(), said.encode(), *written]
        assert not [text for text in kept if PIN.encode() in text]

        # Once more: it is looked at, and nothing is done to it.
        code, statuses, said = lab.smoke(*lab.way)
        assert code == 0, said
        assert [name for name, status in statuses.items() if status == "SKIPPED"] == [
            *("anchors", "certificate", "token", "completion")
        ]
    assert len(json.loads(lab.oeqa.read_text())) in {1, 2}, "two runs in one second have one name"


def test_a_device_that_is_not_as_asked_for(device: Make, lab: Lab, tmp_path: Path) -> None:
    """A board that was completed before, with an anchor that the settings do not name."""
    with device(with_core_console=True).boot() as boot, console_of(boot, lab.console):
        boot.wait_prepared()
        assert lab.smoke(*lab.way)[0] == 0
        code, statuses, _ = lab.smoke(*lab.way, guest_anchors=lab.settings["device_anchors"])
        assert (code, statuses["verdict"], statuses["switched_off"]) == (1, "FAILED", "SKIPPED")
        log = {case.get("name"): case for case in lab.suite()}["verdict"][0].text or ""
        assert "not-as-asked" in log
        assert "guest anchor" in log


def test_a_step_that_fails_shows_the_console(device: Make, lab: Lab) -> None:
    target = device(with_core_console=True, policy={"development": "true"})
    with target.boot() as boot, console_of(boot, lab.console):
        boot.wait_prepared()
        code, statuses, _ = lab.smoke(*lab.way)
        assert code == 1
        failed(statuses, "prepared")
    suite = lab.suite()
    assert [suite.get(key) for key in ("tests", "failures", "skipped")] == ["10", "1", "8"]
    failure = suite[1][0]
    assert failure.tag == "failure"
    assert "development-build" in (failure.get("message") or "")
    assert "end of the console:" in (failure.text or "")
    assert "stty raw -echo" in (failure.text or "")


def test_nobody_answers(lab: Lab) -> None:
    code, statuses, said = lab.smoke(*lab.way, "--timeout", "0")
    assert code == 1
    failed(statuses, "first_boot")
    assert "not-booted" in said
    code, statuses, said = lab.smoke("--console-command", "sh -c 'exit 3'", "--timeout", "0")
    failed(statuses, "first_boot")
    code, statuses, said = lab.smoke("--console-command", "never-there", "--timeout", "0")
    failed(statuses, "first_boot")


def test_a_release_image_needs_a_stations_settings(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    lab.manifest(development=False)
    assert main.main(["smoke", str(lab.image), *lab.way]) == 2
    assert "--settings FILE" in capfd.readouterr().err
    assert main.main(["smoke", str(lab.image), "--console-command", ""]) == 2
    assert main.main(["smoke", str(lab.directory)]) == 1


@pytest.fixture
def resulttool(tmp_path: Path) -> list[str | Path]:
    """The command, from openembedded-core's own sources."""
    if not (given := os.environ.get(LAYERS)):
        pytest.skip(f"{LAYERS} does not name a folder with openembedded-core")
    names = ("openembedded-core", "openembedded+openembedded-core/repo")
    core = next(path for name in names if (path := Path(given, name)).exists())
    sources = tmp_path / "core"
    sources.mkdir()
    archive = subprocess.run(
        ["git", "-c", "safe.directory=*", "archive", CORE_COMMIT, "scripts", "meta/lib"],
        cwd=core,
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "-x"], input=archive.stdout, cwd=sources, check=True)
    return [sys.executable, sources / "scripts/resulttool"]


def test_resulttool_reads_the_results(lab: Lab, resulttool: list[str | Path], tmp_path: Path) -> None:
    lab.smoke(*lab.way, "--timeout", "0")
    merged = tmp_path / "merged"
    merged.mkdir()
    subprocess.run([*resulttool, "merge", lab.oeqa, merged], check=True, capture_output=True)
    (found,) = merged.rglob("testresults.json")
    (run,) = json.loads(found.read_text()).values()
    assert run["result"]["trustme.smoke.first_boot"]["status"] == "FAILED"
    assert run["configuration"]["MACHINE"] == "x86"
    junit = tmp_path / "resulttool.xml"
    subprocess.run([*resulttool, "junit", "-j", junit, lab.oeqa], check=True, capture_output=True)
    assert "first_boot" in junit.read_text()
