# SPDX-License-Identifier: Apache-2.0
"""What only a boot from power-on can show."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.qemu.agent import Agent
from tests.qemu.conftest import PREPARED, ColdBoot, boot_report, wait_for_core_shell
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.images import ImageDirectory
from trustme_tools.machine.vm import VirtualMachine

STAGES = ["early", "devices", "platform", "storage", "mode", "core", "handoff"]


def test_a_new_device_reaches_running_under_secure_boot(cold_boot: ColdBoot) -> None:
    lines = re.findall(r"^trustme: stage (\d)/7 (\w+) (\d+) ms$", cold_boot.boot_log, re.MULTILINE)
    assert [name for _, name, _ in lines] == STAGES
    assert [int(number) for number, _, _ in lines] == [1, 2, 3, 4, 5, 6, 7]
    *firmware_and_stages, running, prepared = cold_boot.boot_log.rstrip().splitlines()
    assert running == "trustme: core container RUNNING"
    assert re.fullmatch(f"trustme: {PREPARED}", prepared)
    assert all(re.match(r"BdsDxe: |trustme: |$", line) for line in firmware_and_stages), "nobody else speaks"
    assert "Kernel panic" not in cold_boot.serial_log + cold_boot.boot_log


def test_the_boot_report_says_what_the_firmware_enforced(cold_boot: ColdBoot, image: ImageDirectory) -> None:
    report = cold_boot.report
    assert report["result"] == "running"
    assert report["firmware"]["secure_boot"] is True
    assert report["firmware"]["setup_mode"] is False
    assert report["tpm"] is True
    assert [anchor["purpose"] for anchor in report["anchors"]] == ["core"]
    assert report["mode"]["value"] == "provisioning"
    assert report["storage"]["created"] is True
    core = image.manifest["core"]
    assert report["core"]["config_sha256"] == core["config_sha256"]
    assert report["core"]["images"] == core["root_hashes"]


def test_row28_boots_on_a_processor_without_rdrand_and_without_a_random_device(
    machines: Callable[..., VirtualMachine], image: ImageDirectory, enrolled: Firmware
) -> None:
    machine = machines(image.disk, enrolled, cpu="qemu64", random_device=False)
    assert machine.wait_boot().kind == "running"


def test_row15_words_on_the_command_line_are_no_door(
    machines: Callable[..., VirtualMachine], image: ImageDirectory, enrolled: Firmware
) -> None:
    # The boot stub appends this to the signed command line: the one way in for words that nobody signed.
    words = (
        "PYTHONPATH=/run PYTHONINSPECT=1 PYTHONSTARTUP=/dev/console PYTHONHOME=/run LD_PRELOAD=/run/x.so "
        "trustme.development=1 trustme.allow_insecure_boot=1 single emergency -i"
    )
    machine = machines(image.disk, enrolled, oem_strings=[f"io.systemd.stub.kernel-cmdline-extra={words}"])
    assert machine.wait_boot().kind == "running"
    wait_for_core_shell(machine)
    assert words in machine.core.run("cat /proc/cmdline").output
    environment = machine.core.run("cat /proc/1/environ | tr '\\0' '\\n'").output
    assert "PYTHON" not in environment
    assert "LD_PRELOAD" not in environment
    assert boot_report(machine)["firmware"]["secure_boot"] is True


def test_data_survives_a_power_cut_and_a_second_boot(
    machines: Callable[..., VirtualMachine], cold_boot: ColdBoot, enrolled: Firmware, tmp_path: Path
) -> None:
    # The saved disk is what a power cut at that instant leaves: nothing was written back or unmounted.
    state = tmp_path / "state"
    state.mkdir()
    for name in ("disk.qcow2", "vars.fd"):
        shutil.copy(cold_boot.saved.directory / name, state / name)
    machine = machines(cold_boot.disk, enrolled, state=state)
    assert machine.wait_boot().kind == "running"
    wait_for_core_shell(machine)
    assert boot_report(machine)["storage"]["created"] is False


def test_no_program_needs_a_shell(inside: tuple[VirtualMachine, Agent]) -> None:
    _, agent = inside
    found = agent.run(
        "import os\nvalue = [f'{d}/{n}' for d in ('/usr/bin', '/usr/sbin') for n in os.listdir(d)\n"
        "         if n in ('sh', 'bash', 'dash', 'busybox', 'ash', 'login', 'getty')]"
    )
    assert found == []
