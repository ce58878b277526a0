# SPDX-License-Identifier: Apache-2.0
"""A running core container, seen from inside it and (by the test agent) from the base system."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.qemu.agent import Agent
from tests.qemu.conftest import ColdBoot
from trustme_tools.machine.vm import VirtualMachine

CORE = "00000000-0000-0000-0000-000000000000"


def control(machine: VirtualMachine, *words: str) -> dict[str, Any]:
    """Run `control --json` in the core container and return its envelope."""
    answer = machine.core.run(f"control --json {' '.join(words)}", 60)
    assert answer.code == 0, answer.output
    envelope: dict[str, Any] = json.loads(answer.output)
    assert envelope["ok"] is True
    return envelope


def shell(machine: VirtualMachine, command: str) -> str:
    answer = machine.core.run(command)
    assert answer.code == 0, answer.output
    return answer.output.strip()


def test_control_lists_the_core_as_running(running: VirtualMachine) -> None:
    (core,) = control(running, "list")["reply"]["container_status"]
    assert (core["uuid"], core["name"], core["state"]) == (CORE, "core0", "RUNNING")
    assert core["trust_level"] == "SIGNED"


def test_a_new_device_is_not_provisioned(running: VirtualMachine) -> None:
    assert control(running, "get_provisioned")["reply"]["device_is_provisioned"] is False


def test_the_core_guestos_is_listed_with_its_version(running: VirtualMachine, cold_boot: ColdBoot) -> None:
    (core,) = control(running, "list_guestos")["reply"]["guestos_configs"]
    assert core["version"] == cold_boot.report["core"]["version"]


def test_the_core_is_isolated(running: VirtualMachine) -> None:
    first = shell(running, "cat /proc/self/uid_map").split()
    assert int(first[1]) >= 65536, "root of the container is root of the device"
    assert shell(running, "cat /proc/1/comm") == "cservice"
    assert int(shell(running, "ls -d /proc/[0-9]* | wc -l")) < 10
    status = dict(
        line.split(":\t")
        for line in shell(running, "grep -E '^(CapBnd|NoNewPrivs)' /proc/self/status").splitlines()
    )
    capabilities = int(status["CapBnd"], 16)
    for number, name in ((16, "SYS_MODULE"), (17, "SYS_RAWIO"), (21, "SYS_ADMIN"), (22, "SYS_BOOT")):
        assert not capabilities >> number & 1, name
    assert status["NoNewPrivs"] == "1"
    assert shell(running, "ls /dev | grep -cE '^(vd|sd|dm-|tpm|mem|kmsg|loop)' || true") == "0"
    assert shell(running, "cat /sys/fs/cgroup/memory.max") != "max"
    assert shell(running, "cat /sys/fs/cgroup/pids.max") != "max"
    assert shell(running, "ls /sys/class/net") == "lo"
    assert shell(running, "ls /sys/firmware | wc -l") == "0"


def test_the_core_cannot_undo_its_confinement(running: VirtualMachine) -> None:
    for command in (
        "mount -t proc none /tmp",
        "mount -o remount,rw /sys",
        "mknod /tmp/disk b 254 0",
        "dmesg",
        "echo b > /proc/sysrq-trigger",
        "hostname other",
        "umount /run/socket",
    ):
        answer = running.core.run(command)
        assert answer.code != 0, f"{command}: {answer.output}"


def test_row25_the_core_has_the_kernel_load_nothing(inside: tuple[VirtualMachine, Agent]) -> None:
    machine, agent = inside
    assert agent.run("value = open('/proc/sys/kernel/modprobe').read()").strip() == ""
    loaded = "value = sorted(line.split()[0] for line in open('/proc/modules'))"
    before = agent.run(loaded)
    # Named by number, the kernel would look for net-pf-2-proto-132 (SCTP) or a netlink family of its own.
    machine.core.run('python3 -c "import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)"')
    assert agent.run(loaded) == before


def test_the_core_is_under_a_call_filter(running: VirtualMachine) -> None:
    assert shell(running, "grep '^Seccomp:' /proc/self/status").split() == ["Seccomp:", "2"]
    asked = 'python3 -c "import socket; socket.socket(40, socket.SOCK_STREAM)"'
    answer = running.core.run(asked)
    assert answer.code != 0
    assert "OSError" in answer.output or "Error" in answer.output


def test_reboot_goes_down_in_order(running: VirtualMachine) -> None:
    running.core.send("control reboot\r")
    running.wait_off(60)
    assert "Kernel panic" not in running.serial.text + running.boot.text


def test_the_core_outlives_the_manager(inside: tuple[VirtualMachine, Agent]) -> None:
    machine, agent = inside
    before = shell(machine, "cat /proc/1/stat").split()[21]
    killed = agent.run(FIND_MANAGER + "os.kill(manager, 9)\nvalue = manager")
    started = time.monotonic()
    deadline = started + 30
    while machine.core.run("control list", 30).code != 0:
        assert time.monotonic() < deadline, "control does not answer again"
    assert agent.run(FIND_MANAGER + "value = manager") != killed
    assert shell(machine, "cat /proc/1/stat").split()[21] == before, "the core was started anew"
    (core,) = control(machine, "list")["reply"]["container_status"]
    assert core["state"] == "RUNNING"


# The manager is the child of PID 1 that is a Python process of /init and no agent.
FIND_MANAGER = """
import os
def ppid(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
def is_init(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"/init" in file.read()
children = [int(p) for p in os.listdir("/proc") if p.isdigit() and ppid(p) == 1]
(manager,) = [p for p in children if is_init(p) and p != os.getpid()]
"""
