# SPDX-License-Identifier: Apache-2.0
"""The manager: walks the stage table, then runs the device until it is rebooted.

It may die at any time. PID 1 then forks another one, which finds the report of its predecessor: before the
hand-off it begins again from a clean slate; after it, the running core container is adopted and served.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from trustme_init.boot import stages
from trustme_init.boot.console import Console, boottime_ms
from trustme_init.boot.pid1 import EXIT_POWER_OFF, EXIT_REBOOT, EXIT_REFUSED
from trustme_init.boot.report import RESULT_BOOTING, RESULT_RUNNING, RESULT_STARTED, BootReport
from trustme_init.errors import DeviceRefusal, Refusal
from trustme_init.policy import load

if TYPE_CHECKING:
    from trustme_init.boot.device import Device
    from trustme_init.machine import Machine
    from trustme_init.policy import Policy

AFTER_REFUSAL: Final = {stages.SCREEN_AND_REBOOT: EXIT_REFUSED}
"""What PID 1 is told for each failure policy of the stage table; it waits, then reboots."""


def run(machine: Machine, console: Console, *, early: tuple[float, float]) -> int:
    """Boot or resume, then serve; return the exit code that tells PID 1 what to do."""
    report = BootReport.read(machine.report) or BootReport()
    report.manager_starts += 1
    walk = _Walk(machine, console, report, early)
    try:
        return walk.run()
    except Refusal as refusal:
        return walk.refuse(refusal)
    except Exception as exc:
        # Every room turns its own failures into refusals; what gets here is still a failure with a name. Once
        # the core runs it is no reason to end it: PID 1 starts another manager, which adopts the core.
        if walk.serving:
            raise
        return walk.refuse(
            DeviceRefusal(
                "unexpected-failure",
                "this stage met something that it was not made for",
                evidence=console.trace(exc),
                remedy="report this with the log of this boot",
            )
        )


@dataclass(slots=True)
class _Walk:
    """One manager's life: which stage it is in, and what it writes down."""

    machine: Machine
    console: Console
    report: BootReport
    early: tuple[float, float]
    stage: str = stages.EARLY
    serving: bool = False

    def run(self) -> int:
        resuming = self.report.result in (RESULT_STARTED, RESULT_RUNNING)
        policy = load(self.machine.policy)
        self._introduce(policy)
        if resuming:
            self.stage = "resume"
            device = self._device(policy)
            device.resume()
            self.report.write(self.machine.report)
            self.console.line(f"manager resumed (start {self.report.manager_starts})")
        else:
            device = self._boot(policy)
        self.stage, self.serving = "core", True
        gc.freeze()
        gc.enable()  # PID 1 switched it off for the boot
        return {"reboot": EXIT_REBOOT, "power-off": EXIT_POWER_OFF}[device.serve()]

    def _introduce(self, policy: Policy) -> None:
        self.report.development = policy.development
        if self.report.manager_starts == 1:
            self.report.stage(stages.EARLY, *self.early)
            if policy.development:
                self.console.line("DEVELOPMENT BUILD: its keys are public, never put it into service")

    def _device(self, policy: Policy) -> Device:
        from trustme_init.boot.device import Device

        return Device(self.machine, policy, self.console, self.report)

    def _boot(self, policy: Policy) -> Device:
        if self.report.manager_starts > 1:
            from trustme_init.boot.device import clean_slate

            clean_slate(self.machine)
            del self.report.stages[1:]
            self.report.result, self.report.refusal = RESULT_BOOTING, None
        facts = stages.Facts(self.machine, policy, partial(self._device, policy))
        for number, stage in enumerate(stages.STAGES, start=2):
            self.stage = stage.name
            started = boottime_ms()
            fact = stage.run(facts)
            took = boottime_ms() - started
            facts.known[stage.name] = fact
            self.report.stage(stage.name, started, took)
            self.report.facts.update(fact.as_dict())
            self.report.write(self.machine.report)
            self.console.line(stages.stage_line(number, stage.name, took))
        return facts.device

    def refuse(self, refusal: Refusal) -> int:
        """Record the refusal, show the screen, and return what the stage's policy tells PID 1."""
        self.report.refused(self.stage, refusal)
        try:
            self.report.write(self.machine.report)
        except OSError as exc:
            self.console.note(f"the boot report cannot be written: {exc.strerror}")
        self.console.refusal(self.stage, refusal)
        return AFTER_REFUSAL[stages.on_refusal(self.stage)]
