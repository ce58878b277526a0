# SPDX-License-Identifier: Apache-2.0
"""The boot when something breaks in the middle of it: the manager, a tool, the TPM, or PID 1's own calls."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.sandbox import HERE, RUNNING, Boot, Device, Factory
from tests.integration.software_tpm import SoftwareTpm
from trustme_init.boot.device import CONTAINER_LOG_LIMIT
from trustme_init.control.client import ControlClient
from trustme_init.errors import DeviceRefusal
from trustme_init.linux import uevent
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.tpm import measure
from trustme_init.tpm.measure import PCR, Measurement, Measurer

pytestmark = pytest.mark.root
Make = Callable[..., Device]
STAGES = ("devices", "platform", "storage", "mode", "core", "handoff")


def faulty(device: Make, *faults: dict[str, Any], **options: Any) -> Device:
    """Return a device with these faults (see adversary_init.py)."""
    return device(init=(sys.executable, HERE / "adversary_init.py", json.dumps(faults)), **options)


def replayed(boot: Boot) -> str:
    """Return the PCR that the measurement log implies; its numbering must be whole."""
    value = bytes(32)
    for number, line in enumerate(boot.path("/run/trustme/measurements.cel").read_text().splitlines()):
        record = json.loads(line)
        assert record["recnum"] == number
        digest = hashlib.sha256(json.dumps(record["content"], sort_keys=True).encode()).digest()
        value = hashlib.sha256(value + digest).digest()
    return value.hex()


def children(boot: Boot) -> list[str]:
    """Return the command lines of PID 1's children."""
    init = boot.init_pid()
    found = Path(f"/proc/{init}/task/{init}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in found]


# The manager dies


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_manager_killed_at_any_stage_is_replaced_by_one_that_boots(
    device: Make, stage: str, when: str
) -> None:
    target = faulty(device, {"at": f"stage:{stage}", "do": "kill", "when": when})
    with target.boot() as boot:
        boot.wait_running()
        assert sum("manager ended unexpectedly (killed by SIGKILL)" in line for line in boot.lines) == 1
        report = boot.report
        assert [entry["name"] for entry in report["stages"]] == ["early", *STAGES]
        assert report["result"] == "running"
        assert report["refusal"] is None
        mounts = boot.path("/proc/1/mountinfo").read_text().splitlines()
        points = [line.split()[4] for line in mounts]
        for point in (report["storage"]["store"], report["storage"]["data"]):
            assert points.count(point) == 1
        # Whatever ran twice was measured twice, and the log says so.
        assert boot.tpm.pcr(PCR) == replayed(boot)
        left = children(boot)
        assert len(left) <= 2, left  # the manager, and the core if it is not the manager's own
        assert boot.ask(Request.GET_CONTAINER_STATUS).container_status


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "place",
    [
        "trustme_init.storage.repartition:apply",
        "trustme_init.storage.volumes:move_mount",
        "trustme_init.compartments.hostside:mount_image",
        "trustme_init.compartments.start:_map_ids",
        "trustme_init.compartments.start:_check_alive",
        "trustme_init.compartments.lifecycle:Compartment._record",
        "trustme_init.boot.device:write_atomic",
    ],
)
def test_a_manager_killed_in_the_middle_of_a_stage_is_replaced_by_one_that_boots(
    device: Make, place: str, when: str
) -> None:
    with faulty(device, {"at": place, "do": "kill", "when": when}).boot() as boot:
        boot.wait_running()
        assert sum("manager ended unexpectedly" in line for line in boot.lines) == 1
        assert not any("REFUSED" in line for line in boot.lines)
        assert boot.report["result"] == "running"
        assert len([line for line in boot.processes().values() if "cservice" in line]) == 1
        assert len(children(boot)) <= 2
        assert boot.ask(Request.REBOOT_DEVICE).response == Reply.CMD_OK
        assert boot.wait_end() == signal.SIGHUP
        assert not any("REFUSED" in line for line in boot.lines)


def test_a_manager_killed_between_extending_and_logging_shows_in_the_register(device: Make) -> None:
    # The register then holds more than the log: a verifier refuses, and the next boot heals it.
    target = faulty(device, {"at": "trustme_init.tpm.measure:_append", "do": "kill"})
    with target.boot() as boot:
        boot.wait_running()
        assert boot.tpm.pcr(PCR) != replayed(boot)
        assert any("manager ended unexpectedly" in line for line in boot.lines)


def test_a_manager_killed_while_reporting_running_still_gets_there(device: Make) -> None:
    target = faulty(
        device,
        {"at": "trustme_init.compartments.lifecycle:Compartment.booted", "do": "kill", "when": "after"},
    )
    with target.boot() as boot:
        boot.wait_running()
        boot.wait_for("manager resumed")
        assert boot.report["result"] == "running"


def test_a_reboot_goes_on_after_the_manager_was_killed_in_it(device: Make) -> None:
    target = device(policy={"start_timeout": 2})
    with target.boot() as boot:
        boot.wait_running()
        core = boot.core_pid()
        os.kill(core, signal.SIGSTOP)
        assert boot.ask(Request.REBOOT_DEVICE).response == Reply.CMD_OK
        boot.wait_for("reboot requested")
        os.kill(boot.manager_pid(), signal.SIGKILL)
        boot.wait_for("manager resumed")
        time.sleep(2.5)  # longer than a start may take: a stop is no start
        os.kill(core, signal.SIGCONT)
        assert boot.wait_end() == signal.SIGHUP
        assert not any("REFUSED" in line for line in boot.lines)
        boot.wait_for("core container stopped", 1)


def test_what_a_dead_manager_was_running_does_not_outlive_it(device: Make, tmp_path: Path) -> None:
    # Two mkfs of the same partition at once, the first one ending after the second: a corrupt data volume.
    real, marker, tool = tmp_path / "real/mkfs.ext4", tmp_path / "first", tmp_path / "tool"
    real.parent.mkdir()
    shutil.copy(Path("/usr/sbin/mkfs.ext4").resolve(), real)
    tool.write_text(
        f'#!/bin/bash\nif [ ! -e {marker} ]; then echo $$ > {marker}; sleep 600; fi\nexec {real} "$@"\n'
    )
    tool.chmod(0o755)
    fault = {"at": f"file:{Path('/usr/sbin/mkfs.ext4').resolve()}", "source": str(tool)}
    with faulty(device, fault).boot() as boot:
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.01)
        os.kill(boot.manager_pid(), signal.SIGKILL)
        boot.wait_running()
        assert not [line for line in boot.processes().values() if "mkfs" in line or "sleep" in line]


def test_a_manager_killed_by_a_nameless_signal(device: Make) -> None:
    with faulty(device, {"at": "stage:platform", "do": "kill", "signal": 40}).boot() as boot:
        boot.wait_running()
        boot.wait_for("manager ended unexpectedly .killed by signal 40", 1)


# The unexpected


@pytest.mark.parametrize("error", ["value-error", "os-error"])
@pytest.mark.parametrize("stage", STAGES)
def test_row13_the_unexpected_in_a_stage_is_a_screen_that_names_it(
    device: Make, stage: str, error: str
) -> None:
    with faulty(device, {"at": f"stage:{stage}", "do": error, "always": True}).boot() as boot:
        assert boot.refusal() == "unexpected-failure"
        boot.wait_for(f"REFUSED stage={stage} code=unexpected-failure", 1)
        assert not any("manager ended" in line for line in boot.lines)
        evidence = boot.wait_for("evidence: ", 1)
        assert "strike" in evidence  # where
        assert boot.report["refusal"]["stage"] == stage
        assert "Traceback" in boot.path("/run/trustme/log/boot.log").read_text()


@pytest.mark.parametrize("error", ["value-error", "os-error"])
def test_the_unexpected_after_the_hand_off_costs_the_manager_and_not_the_core(
    device: Make, error: str
) -> None:
    with faulty(device, {"at": "trustme_init.control.loop:Loop.turn", "do": error}).boot() as boot:
        boot.wait_for("manager ended unexpectedly")
        boot.wait_for("manager resumed")
        boot.wait_running()
        assert not any("REFUSED" in line for line in boot.lines)


def test_pid1_that_cannot_fork_shows_the_screen_and_reboots(device: Make) -> None:
    with faulty(device, {"at": "os:fork", "do": "os-error"}).boot() as boot:
        assert boot.refusal() == "init-failed"
        boot.wait_for("evidence: .*Resource temporarily unavailable", 1)
        assert boot.wait_end(20) == signal.SIGHUP


def test_pid1_that_meets_the_unexpected_shows_the_screen_and_reboots(device: Make) -> None:
    with faulty(device, {"at": "trustme_init.boot.pid1:_describe", "do": "value-error"}).boot() as boot:
        boot.wait_running()
        os.kill(boot.manager_pid(), signal.SIGKILL)
        assert boot.refusal() == "init-failed"
        assert boot.wait_end(20) == signal.SIGHUP


# The core does harm


def test_a_core_that_survives_sigkill_cannot_keep_the_device_from_rebooting(device: Make) -> None:
    target = faulty(
        device,
        {"at": "trustme_init.compartments.lifecycle:STOP_TIMEOUT", "do": "set", "value": 1},
        {"at": "trustme_init.linux.cgroup:Cgroup.kill", "do": "nothing", "always": True},
    )
    with target.boot() as boot:
        boot.wait_running()
        os.kill(boot.core_pid(), signal.SIGSTOP)
        assert boot.ask(Request.REBOOT_DEVICE).response == Reply.CMD_OK
        assert boot.wait_end(30) == signal.SIGHUP
        boot.wait_for("does not end", 1)


def test_row34_a_core_that_floods_its_log_fills_nothing_but_that(
    device: Make, factory: Factory, tmp_path: Path
) -> None:
    root = shutil.copytree(factory.root, tmp_path / "root", symlinks=True)
    init = root / "usr/sbin/cservice"
    flood = (
        "\nimport os\ntry:\n    for _ in range(64):\n        os.write(1, b'x' * 1048576)\n"
        "except OSError:\n    pass\n"
    )
    head, _, body = init.read_text().partition("\n")
    init.write_text(f"{head}{flood}{body}")
    store = tmp_path / "flooding"
    factory.build_core(store, version=10, root=root)
    target = device()
    target.make_disk(store)
    with target.boot() as boot:
        boot.wait_running()
        logs = {
            path.name: path.stat().st_blocks * 512 for path in boot.path("/run/trustme").rglob("core0.log")
        }
        assert list(logs) == ["core0.log"]
        assert 0 < logs["core0.log"] <= CONTAINER_LOG_LIMIT
        names = set()
        with boot.control() as control:
            names = log_names(control)
        assert {"core0.log", "boot.log", "boot.json", "measurements.cel"} <= names


def log_names(control: ControlClient) -> set[str]:
    """Ask for all logs; return their names."""
    control.send(Request(command=Request.GET_LAST_LOG))
    names = set()
    while (reply := control.receive()).code != Reply.RESPONSE:
        names.add(reply.log_message.name)
    return names


# The TPM


EVENTS = (Measurement("mode", "provisioning"),)


@pytest.fixture
def tpm(tmp_path: Path) -> SoftwareTpm:
    return SoftwareTpm(tmp_path)


def test_row05_a_tpm_with_only_a_sha1_bank_is_refused(device: Make) -> None:
    target = device()
    with SoftwareTpm(target.directory) as tpm:
        subprocess.run(
            ["tpm2_pcrallocate", "-T", tpm.tcti, "sha1:all+sha256:none+sha384:none+sha512:none"],
            check=True,
            capture_output=True,
        )
        # The allocation is for the next start, and only after an orderly end of this one.
        subprocess.run(["tpm2_shutdown", "-T", tpm.tcti, "-c"], check=True)
    with target.boot() as boot:
        assert boot.refusal() == "tpm-no-bank"
        assert not any("cservice" in line for line in boot.processes().values())


def test_a_tpm_that_never_answers_delays_the_boot_by_the_time_limit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "REPLY_TIMEOUT", 0.5)
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as control:
        for server, name in ((silent, path), (control, f"{path}.ctrl")):
            server.bind(str(name))
            server.listen()
        signal.alarm(20)  # a hang fails the test instead of the run
        started = time.monotonic()
        with pytest.raises(DeviceRefusal) as caught, Measurer(f"swtpm:path={path}") as measurer:
            measurer.extend(EVENTS, tmp_path / "cel")
        signal.alarm(0)
        assert caught.value.code == "tpm-failed"
        assert time.monotonic() - started < 10


def test_why_the_tpm_cannot_be_used_is_in_the_evidence(tmp_path: Path) -> None:
    for pause in (0.0, 2.0):
        with Measurer("swtpm:path=/nobody") as measurer:
            time.sleep(pause)
            with pytest.raises(DeviceRefusal) as caught:
                measurer.extend(EVENTS, tmp_path / "cel")
        assert "TSS2" in caught.value.evidence or "tcti" in caught.value.evidence.lower()


def test_row18_a_digest_that_is_not_the_events_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tpm: SoftwareTpm
) -> None:
    digests = [{"hashAlg": "sha256", "digest": "00" * 32}]
    monkeypatch.setattr(measure, "_extend", lambda *_: {"digests": digests})
    with tpm, pytest.raises(DeviceRefusal) as caught, Measurer(tpm.tcti) as measurer:
        measurer.extend(EVENTS, tmp_path / "cel")
    assert caught.value.code == "tpm-failed"
    assert not (tmp_path / "cel").exists()


@pytest.mark.parametrize("reply", [[], "x", {}, {"digests": 5}, {"digests": [{"hashAlg": "sha256"}]}])
def test_row19_a_reply_of_another_form_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tpm: SoftwareTpm, reply: Any
) -> None:
    monkeypatch.setattr(measure, "_extend", lambda *_: reply)
    with tpm, pytest.raises(DeviceRefusal), Measurer(tpm.tcti) as measurer:
        measurer.extend(EVENTS, tmp_path / "cel")


def test_a_log_that_cannot_be_written_is_a_refusal_with_that_reason(tmp_path: Path, tpm: SoftwareTpm) -> None:
    with tpm, pytest.raises(DeviceRefusal) as caught, Measurer(tpm.tcti) as measurer:
        measurer.extend(EVENTS, tmp_path)
    assert caught.value.code == "measurement-log-unwritable"


# Devices


def test_a_storm_of_events_does_not_move_the_time_limit(device: Make) -> None:
    target = device()
    target.make_disk()
    subprocess.run(["sfdisk", "-q", "--delete", target.disk, "2"], check=True)
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            uevent.trigger(Path("/sys/class/mem/null"))

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        with target.boot() as boot:
            assert boot.refusal(10) == "store-missing"
    finally:
        stop.set()
        thread.join()


def test_the_manager_is_the_last_to_be_killed_for_memory_and_the_core_is_not(device: Make) -> None:
    if subprocess.run(
        ["sh", "-c", "echo -900 >/proc/self/oom_score_adj"], check=False, stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("this host lets nobody lower an OOM score")
    with device().boot() as boot:
        boot.wait_for(RUNNING)
        assert int(Path(f"/proc/{boot.manager_pid()}/oom_score_adj").read_text()) < 0
        assert int(Path(f"/proc/{boot.core_pid()}/oom_score_adj").read_text()) == 0


def test_row15_the_manager_has_no_environment_but_its_own(
    device: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel makes variables of its command line's words; the sandbox's PID 1 gets the test run's instead.
    monkeypatch.setenv("TSS2_FAPICONF", "/run/evil.json")
    monkeypatch.setenv("MKE2FS_CONFIG", "/run/evil.conf")
    with faulty(device, {"at": "stage:devices", "do": "show-environment"}).boot() as boot:
        assert boot.refusal() == "unexpected-failure"
        (evidence,) = [line for line in boot.lines if "evidence:" in line]
        assert "ValueError: PATH" in evidence
        assert "TSS2_FAPICONF" not in evidence
        assert "MKE2FS_CONFIG" not in evidence


def test_a_power_off_is_a_power_off(device: Make) -> None:
    # No command asks for one yet (WIPE_DEVICE will): the manager is made to, and PID 1 must do it.
    fault = {"at": "trustme_init.boot.device:REBOOT", "do": "set", "value": "power-off"}
    with faulty(device, fault).boot() as boot:
        boot.wait_running()
        boot.ask(Request.REBOOT_DEVICE)
        assert boot.wait_end() == signal.SIGINT
