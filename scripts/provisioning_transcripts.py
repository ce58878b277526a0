# SPDX-License-Identifier: Apache-2.0
"""Run the commands of docs/provisioning.md against booted devices and write down what they answer.

`make docs-provisioning` (root: it boots the product natively, in the tests' sandbox). The document is its own
script; a test runs it and compares. What differs from run to run has a placeholder of the same shape:
digests, UUIDs, dates, durations.

    <!-- file: NAME -->          the fenced block that follows is a file on the provisioning station
    <!-- console: DEVICE -->     the fenced block that follows is the boot console of a device's first boot
    <!-- transcript: DEVICE -->  the fenced block that follows is a session: `$ ` at the station, `core:~# `
                                 in DEVICE's core container; both see the same working directory

A DEVICE is new when it is first named. The words of its name decide what it is: "development" build, or not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.integration.sandbox import Boot, Device, Factory  # noqa: E402 - a script finds its own tree first

DOCUMENT: Final = ROOT / "docs/provisioning.md"
PROMPTS: Final = ("$ ", "core:~# ")
_BLOCK: Final = re.compile(
    r"(<!-- (?P<kind>file|console|transcript): (?P<name>[\w.-]+) -->\n```\w*\n)(?P<body>.*?)(^```$)",
    re.DOTALL | re.MULTILINE,
)
_SOCKET: Final = "/run/trustme/compartments/00000000-0000-0000-0000-000000000000/socket/cml-control"
_NIL: Final = "00000000-0000-0000-0000-000000000000"
_DEVELOPMENT: Final = {
    "development": "true",
    "self_provisioning": "true",
    "require": json.dumps(["device-certificate", "token"]),
}


class Placeholders:
    """Names for what is different every time: the same thing has the same name wherever it is shown."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._uuids: dict[str, str] = {}

    def put(self, text: str) -> str:
        """Return `text` with placeholders."""
        text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", self._uuid, text)
        text = re.sub(r"(?<![0-9a-f])([0-9a-f]{64}|[0-9a-f]{16})(?![0-9a-f])", self._digest, text)
        text = re.sub(r"\b20\d\d-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?", "2030-01-01", text)
        text = re.sub(r"\b\d+ ms\b", "N ms", text)
        return re.sub(r"/proc/\d+/root", "/device", text)

    def _uuid(self, match: re.Match[str]) -> str:
        if match[0] == _NIL:
            return _NIL
        letter = "abcdef"[len(self._uuids) % 6]
        shape = f"{letter * 8}-{letter * 4}-4{letter * 3}-8{letter * 3}-{letter * 12}"
        return self._uuids.setdefault(match[0], shape)

    def _digest(self, match: re.Match[str]) -> str:
        # A short form is the beginning of a long one.
        start = match[0][:16]
        number = self._digests.setdefault(start, f"{len(self._digests) + 10:02d}")
        return (number * 32)[: len(match[0])]


class Scene:
    """The provisioning station and the devices of the document."""

    def __init__(self, directory: Path, held: ExitStack) -> None:
        self._held = held
        self._directory = directory
        self._factory = Factory.make(directory / "factory")
        self._devices: dict[str, Device] = {}
        self._boots: dict[str, tuple[Boot, ExitStack]] = {}
        self.placeholders = Placeholders()
        self.station = directory / "station"
        self._programs = directory / "bin"
        self.station.mkdir()
        self._programs.mkdir()
        shutil.copytree(self._factory.pki.path, self.station / "pki")
        self._program("trustme", "trustme_tools.cli.main")

    def write_file(self, name: str, body: str) -> str:
        """Put a file of the document on the station; what is called like a secret is its owner's alone."""
        path = self.station / name
        path.touch(mode=0o600)
        path.write_text(body)
        return body

    def console(self, name: str, _body: str) -> str:
        """Return what the first boot of a device showed."""
        lines = self._boot(name).lines
        last = next(number for number, line in enumerate(lines) if "ready to be provisioned" in line)
        return self.placeholders.put("".join(f"{line}\n" for line in lines[: last + 1]))

    def transcript(self, name: str, body: str) -> str:
        """Run the commands of a session and return it with what they answer now."""
        shown = []
        for line in body.splitlines():
            prompt = next((each for each in PROMPTS if line.startswith(each)), None)
            if prompt is None:
                continue
            command = line.removeprefix(prompt)
            self._boot(name)
            shown += [line, *self._run(name, command).splitlines()]
            if command.startswith("control reboot"):
                boot, running = self._boots.pop(name)
                boot.wait_end(60)
                running.close()
        return "".join(f"{line}\n" for line in shown)

    def _run(self, name: str, command: str) -> str:
        path = self._boot(name).path(_SOCKET)
        link = self.station / "device.socket"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        self._program("control", "trustme_init.control.cli.main", f"-s {path}")
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.station,
            env={**os.environ, "PATH": f"{self._programs}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return self.placeholders.put(done.stdout)

    def _boot(self, name: str) -> Boot:
        """Return the running device, booting it if it is off."""
        if name not in self._boots:
            first = name not in self._devices
            if first:
                policy = _DEVELOPMENT if "development" in name else {}
                self._devices[name] = Device(self._factory, self._directory / name, policy=policy)
            running = self._held.enter_context(ExitStack())
            boot = running.enter_context(self._devices[name].boot())
            self._boots[name] = boot, running
            boot.wait_running()
            if first:
                boot.wait_prepared()
        return self._boots[name][0]

    def _program(self, name: str, module: str, options: str = "") -> None:
        path = self._programs / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} {options} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def render(text: str) -> str:
    """Return the document with every block as it is today."""
    with tempfile.TemporaryDirectory(prefix="trustme-docs-") as name, ExitStack() as held:
        scene = Scene(Path(name), held)
        make = {"file": scene.write_file, "console": scene.console, "transcript": scene.transcript}
        return _BLOCK.sub(
            lambda block: f"{block[1]}{make[block['kind']](block['name'], block['body'])}{block[5]}", text
        )


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text()))
    print(DOCUMENT.relative_to(ROOT))
