# SPDX-License-Identifier: Apache-2.0
"""`trustme provision` over the core console of a real boot: one walk, one reboot, and the closed door."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.qemu.conftest import ColdBoot
from trustme_init.control.cli.verbs import VERBS
from trustme_init.control.gate import GATE, PROVISIONING
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.images import ImageDirectory
from trustme_tools.machine.vm import VirtualMachine
from trustme_tools.provision import fleet, plan, settings
from trustme_tools.provision.console import ConsoleTransport
from trustme_tools.provision.report import Report
from trustme_tools.provision.simulate import SimulatedDevice
from trustme_tools.provision.transport import Scratch, Word

PIN = "canary-pin-4711"
NOWHERE = "00000000-0000-0000-0000-00000000dead"
FILE = b"anything"
CLOSED: dict[str, tuple[Word, ...]] = {
    "ca_register": (FILE,),
    "localca_register": (FILE,),
    "device_ca_register": (FILE,),
    "lifecycle_ca_register": (FILE,),
    "ca_remove": ("00000000",),
    "pull_csr": (Scratch.FILE,),
    "push_cert": (FILE,),
    "activate_credential": (FILE, FILE, Scratch.FILE),
    "token_create": (),
    "token_replace": (FILE,),
    "token_remove": ("--yes",),
    "set_provisioned": (),
    "reload": (),
    "remove_guestos": ("none",),
    "wipe_device": ("--yes",),
}
"""The verbs of provisioning that need no container, with arguments that would do nothing."""


@pytest.fixture
def device(
    machines: Callable[..., VirtualMachine], cold_boot: ColdBoot, enrolled: Firmware, tmp_path: Path
) -> Iterator[SimulatedDevice]:
    """A device in its first boot; it boots again by itself after a reboot."""
    state = tmp_path / "state"
    with SimulatedDevice("device", cold_boot.disk, enrolled, state) as simulated:
        simulated.adopt(machines(cold_boot.disk, enrolled, saved=cold_boot.saved, state=state))
        yield simulated


def provision(image: ImageDirectory, transport: ConsoleTransport, directory: Path) -> Report:
    """Provision the development image as its operator would."""
    pin = directory / "pin"
    pin.touch(mode=0o600)
    pin.write_text(f"{PIN}\n")
    path = directory / "station.yml"
    document = {
        "version": 1,
        "guest_anchors": [str(image.pki / "guestos_subca.cert")],
        "device_anchors": [str(image.pki / "device_subca.cert")],
        "device_ca": {"pki": str(image.pki)},
        "token": {"pin": "file:pin"},
        "development_builds": "allow",
        "completion": "reboot",
    }
    path.write_text(json.dumps(document))
    target = fleet.Target(fleet.named("console:machine"), lambda: nullcontext(transport))
    read = settings.load(path)
    (report,) = fleet.provision(plan.load(read, (target.settings,)), [target], parallel=1, tell=print)
    return report


def test_row29_a_device_is_provisioned_over_its_console_and_the_door_closes(
    device: SimulatedDevice, image: ImageDirectory, tmp_path: Path
) -> None:
    transport = ConsoleTransport(device.terminal)
    report = provision(image, transport, tmp_path)
    assert report.error is None, report
    assert report.good
    assert report.marker == "TPM NV index"
    assert report.token["default_pin"] is False, "the published PIN was changed"
    assert report.development
    assert not [text for text in report.unproven if "AK and EK" in text]

    # It has booted anew by now.
    machine = device.machine
    assert "trustme: stage 7/7" in machine.boot.text
    assert PIN not in (machine.work / "core.log").read_text(errors="replace")
    shown = transport.control(["get_provisioned"], stdin=b"", timeout=60)
    assert shown.stdout == b"The device is provisioned (operational mode).\n"
    assert {*CLOSED} <= {verb.name for verb in VERBS}
    for verb, words in CLOSED.items():
        answer = transport.control([verb, *words], stdin=b"1\n1\n", timeout=60)
        assert answer.code == 4, (verb, answer)
    status = json.loads(transport.control(["--json", "token_status"], stdin=b"", timeout=60).stdout)
    assert status["reply"]["token"]["kind"] == "softtoken", "a closed command did something"
    transport.close()


def test_every_command_of_provisioning_is_tried() -> None:
    """A new command that is closed in operation must be tried above, or need a container."""
    containers = ("CONTAINER_", "REMOVE_CONTAINER")
    names = [Request.Command.Name(rule.command) for rule in GATE if rule.privileged == PROVISIONING]  # type: ignore[arg-type]  # the rows hold these very values
    assert len([name for name in names if not name.startswith(containers)]) == len(CLOSED)
