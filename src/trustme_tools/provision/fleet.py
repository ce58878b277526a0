# SPDX-License-Identifier: Apache-2.0
"""Several devices in one run: as many at once as was asked for, each in a thread of its own from end to end.

A device that fails stops no other. What all have in common (the plan, the device CA) is only read; what keeps
them apart (`identity.Registry`) is shared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trustme_tools.errors import UsageError
from trustme_tools.machine.console import Terminal
from trustme_tools.machine.firmware import Firmware
from trustme_tools.provision.console import ConsoleTransport
from trustme_tools.provision.device import Device
from trustme_tools.provision.identity import Registry
from trustme_tools.provision.plan import Plan
from trustme_tools.provision.records import Records
from trustme_tools.provision.report import Report
from trustme_tools.provision.settings import TargetSettings
from trustme_tools.provision.simulate import SimulatedDevice
from trustme_tools.provision.transport import CommandTransport, Transport, UnixTransport
from trustme_tools.provision.walk import Tell, Walk


@dataclass(frozen=True, slots=True)
class Target:
    """A device and how to open a way to it; the way is opened, used and closed in one thread."""

    settings: TargetSettings
    open: Callable[[], AbstractContextManager[Transport]]


def real(settings: TargetSettings) -> Target:
    """Return the target that the settings file or the command line describes."""

    @contextmanager
    def way() -> Iterator[Transport]:
        if settings.command is not None:
            yield CommandTransport(settings.command)
        elif settings.unix is not None:
            yield UnixTransport(settings.unix)
        elif (path := settings.console) is not None:
            yield ConsoleTransport(lambda: Terminal(path, lambda: True))

    return Target(settings, way)


def named(text: str) -> TargetSettings:
    """Return the target of a word on the command line, `unix:PATH` or `console:PATH`."""
    kind, _, path = text.partition(":")
    if kind not in {"unix", "console"} or not path:
        raise UsageError(
            f"there is no target {text}",
            "name one of the settings file's targets, unix:PATH or console:PATH",
            code="no-target",
        )
    return TargetSettings(
        name=text,
        command=None,
        unix=Path(path) if kind == "unix" else None,
        console=Path(path) if kind == "console" else None,
        uuid=None,
        endorsement_key=None,
        token=None,
        own_token=False,
    )


def simulated(name: str, disk: Path, firmware: Firmware, state: Path) -> Target:
    """Return a target that is a virtual machine; it lives as long as its walk."""

    @contextmanager
    def way() -> Iterator[Transport]:
        with SimulatedDevice(name, disk, firmware, state) as device:
            yield ConsoleTransport(device.terminal)
            device.switch_off()

    return Target(
        TargetSettings(
            name=name,
            command=None,
            unix=None,
            console=None,
            uuid=None,
            endorsement_key=None,
            token=None,
            own_token=False,
        ),
        way,
    )


def provision(plan: Plan, targets: Sequence[Target], *, parallel: int, tell: Tell) -> list[Report]:
    """Provision all targets, `parallel` at once; return their reports in order.

    Reports that are good are kept in the records directory. One at once is the calling thread itself.
    """
    registry, stop = Registry(), threading.Event()

    def one(target: Target) -> Report:
        with target.open() as transport:
            report = Walk(plan, target.settings, Device(transport), registry, tell=tell, stop=stop).run()
        _keep(plan, report)
        return report

    if parallel == 1:
        return [one(target) for target in targets]
    with ThreadPoolExecutor(max_workers=parallel, thread_name_prefix="provision") as pool:
        waiting: list[Future[Report]] = [pool.submit(one, target) for target in targets]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _keep(plan: Plan, report: Report) -> None:
    """Keep a good report; one that only looked at a completed device replaces none."""
    records = Records(plan.settings.records)
    if report.good and (not report.looked_only or records.report(str(report.device_uuid)) is None):
        records.keep_report(report)
