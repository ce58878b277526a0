# SPDX-License-Identifier: Apache-2.0
"""The smoke test: boot, provision, reboot, verdict; each step a test case.

The same on a virtual machine and on a board in a lab: everything goes over the core container's console. What
comes after a step that failed is skipped, by name.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from trustme_init.errors import Refusal
from trustme_init.provisioning.mode import FROM_TPM
from trustme_tools.errors import ToolError, UsageError, from_os_error
from trustme_tools.machine.images import ImageDirectory
from trustme_tools.provision import fleet, plan, settings
from trustme_tools.provision.console import ConsoleTransport
from trustme_tools.provision.report import Report
from trustme_tools.provision.settings import Settings
from trustme_tools.smoke.results import Case, Status
from trustme_tools.smoke.subject import Subject, boot_id

GROUP: Final = "trustme.smoke"
PROVISIONING: Final = ("prepared", "anchors", "certificate", "token", "completion", "closed_door")
"""The steps of `provision.walk`, by name."""
CASES: Final = ("first_boot", *PROVISIONING, "second_boot", "verdict", "switched_off")
_TARGET: Final = "console:smoke"

Tell = Callable[[str], None]


def development_settings(image: ImageDirectory, directory: Path) -> Settings:
    """Return settings for an image whose private keys are in its directory; the PIN is made up.

    `directory` takes the settings file, PIN and records. UsageError("no-settings").
    """
    if not image.manifest.get("development"):
        raise UsageError(
            "the keys that sign for a device of this image are not in its directory",
            "give the settings file of your provisioning station: --settings FILE",
            code="no-settings",
            evidence=f"{image.path}: not a development build",
        )
    pin = directory / "pin"
    pin.touch(mode=0o600)
    pin.write_text(f"{secrets.token_urlsafe(12)}\n")
    document = {
        "version": 1,
        "guest_anchors": [str(image.pki / "guestos_subca.cert")],
        "device_anchors": [str(image.pki / "device_subca.cert")],
        "device_ca": {"pki": str(image.pki)},
        "token": {"pin": "file:pin"},
        "development_builds": "allow",
        "completion": "reboot",
    }
    # JSON is YAML.
    path = directory / "station.yml"
    path.write_text(json.dumps(document))
    return settings.load(path)


class Smoke:
    """One run. Secrets are asked for, and files read, before the device is touched."""

    def __init__(self, subject: Subject, read: Settings, tell: Tell) -> None:
        self._subject = subject
        self._tell = tell
        self._settings = read
        self._transport = ConsoleTransport(subject.terminal)
        self._target = fleet.Target(fleet.named(_TARGET), lambda: nullcontext(self._transport))
        self._plan = plan.load(read, (self._target.settings,))
        self._first = ""
        self.cases: list[Case] = []

    @property
    def passed(self) -> bool:
        """Whether all went well."""
        return len(self.cases) == len(CASES) and all(case.status.good for case in self.cases)

    def run(self) -> Sequence[Case]:
        """Run all steps and return them; nothing that the device does is raised."""
        self._step("first_boot", self._boot)
        report = self._provision() if self._unbroken else Report(_TARGET)
        for name in PROVISIONING[len(self.cases) - 1 :]:
            self._skip(name)
        self._step("second_boot", self._boot_again)
        self._step("verdict", lambda: self._judge(report))
        self._step("switched_off", self._subject.switch_off)
        return self.cases

    @property
    def _unbroken(self) -> bool:
        return all(case.status.good for case in self.cases)

    def _step(self, name: str, do: Callable[[], str]) -> None:
        if not self._unbroken:
            self._skip(name)
            return
        started = time.monotonic()
        try:
            status, log = Status.PASSED, do()
        except (ToolError, Refusal) as exc:
            status, log = Status.FAILED, self._failure(exc.as_dict())
        except OSError as exc:
            status, log = Status.FAILED, self._failure(from_os_error(exc).as_dict())
        self._add(name, status, time.monotonic() - started, log)

    def _skip(self, name: str) -> None:
        self._add(name, Status.SKIPPED, 0.0, "an earlier step failed")

    def _add(self, name: str, status: Status, seconds: float, log: str) -> None:
        self.cases.append(Case(GROUP, name, status, seconds, log))
        self._tell(f"{status.value:8} {name:14} {seconds:7.1f} s  {log.partition(chr(10))[0]}")

    def _failure(self, error: dict[str, str]) -> str:
        lines = [f"{error['cause']} ({error['code']})"]
        lines += [f"{name}: {error[name]}" for name in ("evidence", "remedy") if error.get(name)]
        return "\n".join([*lines, "", "end of the console:", self._subject.tail()])

    # Steps

    def _boot(self) -> str:
        how = self._subject.switch_on()
        self._first = boot_id(self._subject)
        return how

    def _provision(self) -> Report:
        """Walk through provisioning, and make each of its steps a case."""
        started = time.monotonic()
        (report,) = fleet.provision(self._plan, [self._target], parallel=1, tell=lambda _: None)
        done = {step.name.replace(" ", "_"): step for step in report.steps}
        for name in PROVISIONING:
            if (step := done.get(name)) is not None:
                detail = f"{step.outcome}{f', {step.detail}' if step.detail else ''}"
                self._add(name, Status.PASSED, step.seconds, detail)
            elif report.looked_only and not report.error:
                self._add(name, Status.SKIPPED, 0.0, "the device was provisioned before")
            elif report.error is not None and self._unbroken:
                rest = time.monotonic() - started - sum(each.seconds for each in report.steps)
                self._add(name, Status.FAILED, rest, self._failure(report.error))
        return report

    def _boot_again(self) -> str:
        again = boot_id(self._subject)
        if again == self._first and self._settings.completion == "reboot":
            raise ToolError("the device has not booted again", code="no-reboot", evidence=f"boot {again}")
        return f"boot {again}, the first was {self._first}"

    def _judge(self, report: Report) -> str:
        """ToolError("not-as-asked") unless the device is as the settings want it."""
        wrong = [*report.mismatches]
        wrong += [] if report.good else ["it is not provisioned, or its door is open"]
        if report.marker != FROM_TPM and not self._settings.software_keys:
            wrong.append(f"marker: {report.marker}")
        if report.error is not None:
            wrong.append(f"{report.error['cause']} ({report.error['code']})")
        if wrong:
            raise ToolError("the device is not as asked for", code="not-as-asked", evidence="; ".join(wrong))
        return f"device {report.device_uuid} is provisioned, marker: {report.marker}, the door is closed"
