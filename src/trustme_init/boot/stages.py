# SPDX-License-Identifier: Apache-2.0
"""The boot, in the order it happens: a table of stages, each a function of explicit facts.

Every stage returns a small immutable fact or raises a Refusal. What a refusal leads to stands beside the
stage in the table; `manager.py` walks the table, times it and applies that. Nothing else knows the order.
"""

from __future__ import annotations

# No dataclasses and no enum here: PID 1 imports this module before its first line (design decision 9).
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from trustme_init.boot.core import CoreFact
    from trustme_init.boot.device import Device, HandoffFact
    from trustme_init.boot.devices import DevicesFact
    from trustme_init.boot.platform import PlatformFact
    from trustme_init.boot.storage import StorageFact
    from trustme_init.machine import Machine
    from trustme_init.policy import Policy
    from trustme_init.provisioning.mode import ModeFact


class Facts:
    """What is known so far. Reading a fact before its stage has run is a programming error."""

    def __init__(self, machine: Machine, policy: Policy, make_device: Callable[[], Device]) -> None:
        self.machine = machine
        self.policy = policy
        self._make_device = make_device
        self._device: Device | None = None
        self.known: dict[str, Any] = {}

    @property
    def device(self) -> Device:
        """What serves the control interface; made at first use, for its imports are those of the hand-off."""
        if self._device is None:
            self._device = self._make_device()
        return self._device

    @property
    def devices(self) -> DevicesFact:
        """What `devices` found."""
        fact: DevicesFact = self.known["devices"]
        return fact

    @property
    def platform(self) -> PlatformFact:
        """What the firmware reports, and the anchors that follow."""
        fact: PlatformFact = self.known["platform"]
        return fact

    @property
    def storage(self) -> StorageFact:
        """Where store and data are mounted."""
        fact: StorageFact = self.known["storage"]
        return fact

    @property
    def mode(self) -> ModeFact:
        """Provisioning or operational, and why."""
        fact: ModeFact = self.known["mode"]
        return fact

    @property
    def core(self) -> CoreFact:
        """The verified core GuestOS."""
        fact: CoreFact = self.known["core"]
        return fact

    @property
    def handoff(self) -> HandoffFact:
        """The started core compartment."""
        fact: HandoffFact = self.known["handoff"]
        return fact


SCREEN_AND_REBOOT: Final = "show the failure screen for 10 s, then reboot"


class Stage(NamedTuple):
    """One line of the boot: `run` returns the stage's fact or raises a Refusal."""

    name: str
    run: Callable[[Facts], Any]
    on_refusal: str = SCREEN_AND_REBOOT


def _devices(facts: Facts) -> DevicesFact:
    from trustme_init.boot import devices

    return devices.wait(facts.machine, facts.policy)


def _platform(facts: Facts) -> PlatformFact:
    from trustme_init.boot import platform

    return platform.read(facts.machine.efivars, facts.policy)


def _storage(facts: Facts) -> StorageFact:
    from trustme_init.boot import storage

    return storage.open_volumes(facts.machine, facts.devices.store, facts.devices.measurer)


def _mode(facts: Facts) -> ModeFact:
    from trustme_init.boot import mode

    return mode.decide(facts.machine, facts.storage, facts.devices.measurer)


def _core(facts: Facts) -> CoreFact:
    from datetime import UTC, datetime

    from trustme_init.boot import core

    verified = core.verify(
        facts.storage.store, facts.policy, facts.platform.anchors, rtc=datetime.now(tz=UTC)
    )
    core.measure(
        facts.machine,
        facts.devices.measurer,
        core.measurements(verified, facts.platform, facts.mode, development=facts.policy.development),
    )
    return verified


def _handoff(facts: Facts) -> HandoffFact:
    return facts.device.hand_over(facts.core, facts.mode)


EARLY: Final = "early"
"""The first stage's name; PID 1 runs it itself (`early.py`), once, before there is a manager."""

STAGES: Final = (
    Stage("devices", _devices),
    Stage("platform", _platform),
    Stage("storage", _storage),
    Stage("mode", _mode),
    Stage("core", _core),
    Stage("handoff", _handoff),
)


def on_refusal(name: str) -> str:
    """Return what a refusal leads to in a stage, or in what comes before and after the table."""
    return next((stage.on_refusal for stage in STAGES if stage.name == name), SCREEN_AND_REBOOT)


STAGE_COUNT: Final = len(STAGES) + 1


def stage_line(number: int, name: str, took_ms: float) -> str:
    """Return the console line of a finished stage."""
    return f"stage {number}/{STAGE_COUNT} {name} {took_ms:.0f} ms"
