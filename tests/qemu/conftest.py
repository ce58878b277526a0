# SPDX-License-Identifier: Apache-2.0
"""Virtual machines for tests: one cold boot is saved, and most tests go on from there in a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.qemu import agent as agents
from trustme_tools.image import build, disk, packages, uki
from trustme_tools.image.cache import Cache, default_root
from trustme_tools.machine import firmware, images
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.images import ImageDirectory
from trustme_tools.machine.vm import Outcome, SavedState, VirtualMachine
from trustme_tools.pki.directory import PkiDirectory

HERE = Path(__file__).parent
PREPARED = r"device \S+ is ready to be provisioned"
PASSED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.qemu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture(scope="session")
def cache() -> Cache:
    return Cache(default_root())


@pytest.fixture(scope="session")
def image(
    request: pytest.FixtureRequest, cache: Cache, tmp_path_factory: pytest.TempPathFactory
) -> ImageDirectory:
    """The image under test: --image-dir, or the reference image built now."""
    given: Path | None = request.config.getoption("--image-dir")
    if given is None:
        given = tmp_path_factory.mktemp("image") / "image"
        build.build_image(given, cache=cache, options=build.Options())
    return images.load(given)


@pytest.fixture(scope="session")
def pki(image: ImageDirectory) -> PkiDirectory:
    return PkiDirectory(image.pki)


@pytest.fixture(scope="session")
def enrolled(image: ImageDirectory, cache: Cache) -> Firmware:
    """Firmware with the image's keys and Secure Boot on."""
    return firmware.prepare(cache, image.pki)


@dataclass(frozen=True)
class ColdBoot:
    """What the session's first boot showed, and the state it was saved in."""

    outcome: Outcome
    boot_log: str
    serial_log: str
    report: dict[str, Any]
    saved: SavedState
    disk: Path


def boot_report(machine: VirtualMachine) -> dict[str, Any]:
    """Fetch the boot report as the core container can."""
    answer = machine.core.run("control retrieve_logs /tmp/logs >&2 && cat /tmp/logs/boot.json", 60)
    assert answer.code == 0, answer.output
    report: dict[str, Any] = json.loads(answer.output[answer.output.index("{") :])
    return report


def wait_for_core_shell(machine: VirtualMachine) -> None:
    machine.core.send("\r")
    machine.core.expect(r"core:\S* ?# ", 30)


def _cold_boot(disk_image: Path, enrolled: Firmware, directory: Path, *, agent: bool) -> ColdBoot:
    with VirtualMachine(disk_image, enrolled, spare_console=agent, name="cold") as machine:
        outcome = machine.wait_boot()
        if outcome.kind != "running":
            pytest.fail(
                f"the cold boot ended with {outcome}\n{machine.boot.text}\n{machine.serial.text[-2000:]}"
            )
        # Not before the vault is done: every test that starts from this state would do its work again.
        machine.wait_log(PREPARED, 180)
        wait_for_core_shell(machine)
        report = boot_report(machine)
        logs = machine.boot.text, machine.serial.text
        # The terminal is let go of first: the saved machine has nobody attached.
        machine.core.drain()
        saved = machine.save(directory / "saved")
    return ColdBoot(outcome, *logs, report, saved, disk_image)


@pytest.fixture(scope="session")
def cold_boot(
    image: ImageDirectory, enrolled: Firmware, tmp_path_factory: pytest.TempPathFactory
) -> ColdBoot:
    """The first boot of a new device, to RUNNING."""
    return _cold_boot(image.disk, enrolled, tmp_path_factory.mktemp("cold"), agent=False)


@pytest.fixture(scope="session")
def cold_boot_with_agent(
    image: ImageDirectory,
    enrolled: Firmware,
    pki: PkiDirectory,
    cache: Cache,
    tmp_path_factory: pytest.TempPathFactory,
) -> ColdBoot:
    """Likewise, with the test agent beside PID 1."""
    directory = tmp_path_factory.mktemp("agent")
    tree = packages.fetch(cache, "base-packages", packages.BASE)
    agents.add_to(tree, image.uki, directory / "unsigned.efi")
    uki.sign(
        directory / "unsigned.efi",
        directory / "signed.efi",
        key_pem=pki.key_pem(build.UKI_SIGNER),
        certificate=pki.certificate_path(build.UKI_SIGNER),
    )
    disk.copy(image.disk, directory / "disk.img")
    disk.replace_esp_file(directory / "disk.img", directory / "signed.efi")
    return _cold_boot(directory / "disk.img", enrolled, directory, agent=True)


@pytest.fixture
def machines(request: pytest.FixtureRequest) -> Iterator[Callable[..., VirtualMachine]]:
    """Start machines that end with the test; their consoles are kept when it fails."""
    started: list[VirtualMachine] = []

    def start(*arguments: Any, **options: Any) -> VirtualMachine:
        machine = VirtualMachine(*arguments, name=f"vm{len(started)}", **options)
        started.append(machine)
        machine.start()
        return machine

    yield start
    for machine in started:
        if not request.node.stash.get(PASSED, False):
            machine.keep_logs(request.config.getoption("--artifacts") / request.node.name)
        machine.close()


@pytest.fixture
def running(
    machines: Callable[..., VirtualMachine], cold_boot: ColdBoot, enrolled: Firmware
) -> VirtualMachine:
    """A device whose core container runs, from the saved state."""
    machine = machines(cold_boot.disk, enrolled, saved=cold_boot.saved)
    machine.core.send("\r")
    return machine


@pytest.fixture
def inside(
    machines: Callable[..., VirtualMachine], cold_boot_with_agent: ColdBoot, enrolled: Firmware
) -> Iterator[tuple[VirtualMachine, agents.Agent]]:
    """A running device with the agent in its base system."""
    machine = machines(
        cold_boot_with_agent.disk, enrolled, saved=cold_boot_with_agent.saved, spare_console=True
    )
    machine.core.send("\r")
    agent = agents.Agent(machine.spare_socket)
    yield machine, agent
    agent.close()
