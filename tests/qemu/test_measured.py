# SPDX-License-Identifier: Apache-2.0
"""What the firmware and we measured, against what a real boot left in the TPM's registers."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.qemu.agent import Agent
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.images import ImageDirectory
from trustme_tools.machine.vm import VirtualMachine

READ_REGISTERS = """
value = {}
for number in range(24):
    with open(f"/sys/class/tpm/tpm0/pcr-sha256/{number}") as file:
        value[str(number)] = file.read().strip().lower()
"""
READ_EVENT_LOG = """
import base64, os, sys
from trustme_init.linux.mount import mount, umount
os.makedirs("/run/securityfs", exist_ok=True)
mount("securityfs", "/run/securityfs", "securityfs", 0, "")
with open("/run/securityfs/tpm0/binary_bios_measurements", "rb") as file:
    value = base64.b64encode(file.read()).decode()
umount("/run/securityfs")
"""
READ_OUR_LOG = "value = open('/run/trustme/measurements.cel').read()"


def test_row20_our_log_replays_to_our_register(inside: tuple[VirtualMachine, Agent]) -> None:
    _, agent = inside
    value = bytes(32)
    events = []
    for line in agent.run(READ_OUR_LOG).splitlines():
        content = json.loads(line)["content"]
        events.append(content["event"])
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
        value = hashlib.sha256(value + digest).digest()
    assert events == ["build", "mode", "core-anchors", "core-config", "core-image"]
    assert agent.run(READ_REGISTERS)["13"] == value.hex()


def test_the_firmware_log_replays_to_the_firmware_registers(
    inside: tuple[VirtualMachine, Agent], tmp_path: Path
) -> None:
    import base64

    _, agent = inside
    registers = agent.run(READ_REGISTERS)
    log = tmp_path / "event-log"
    log.write_bytes(base64.b64decode(agent.run(READ_EVENT_LOG, 60)))
    text = subprocess.run(["tpm2_eventlog", log], check=True, capture_output=True, text=True).stdout
    replayed = re.search(r"^pcrs:\n(?:.*\n)*?  sha256:\n((?:    \d+ *: 0x[0-9a-f]+\n)+)", text, re.MULTILINE)
    assert replayed is not None, text[-2000:]
    seen = {}
    for line in replayed[1].splitlines():
        number, _, digest = line.strip().partition(":")
        seen[number.strip()] = digest.strip().removeprefix("0x")
    # 4: the boot image, 7: the Secure Boot state and keys, 11: the parts of the UKI.
    assert {"0", "1", "2", "3", "4", "5", "7", "11"} <= set(seen)
    for number, digest in seen.items():
        assert registers[number] == digest, f"PCR {number}"
    # One boot application was started, and it was measured: the UKI.
    assert text.count("EV_EFI_BOOT_SERVICES_APPLICATION") == 1


def test_row17_a_clock_at_1970_is_not_believed(
    machines: Callable[..., VirtualMachine], image: ImageDirectory, enrolled: Firmware
) -> None:
    from tests.qemu.conftest import boot_report, wait_for_core_shell

    machine = machines(image.disk, enrolled, clock="1970-01-01T00:00:00")
    assert machine.wait_boot().kind == "running"
    wait_for_core_shell(machine)
    clock = boot_report(machine)["clock"]
    # The chip keeps two digits of the year: firmware and kernel make 1970 or 2070 of it, neither is believed.
    assert clock["rtc"][2:10] == "70-01-01"
    assert clock["why"] in {"rtc-before-floor", "rtc-implausible"}
    assert clock["at"].startswith(image.manifest["build_date"][:10])


CHANGE_IMAGE = """
import fcntl, os, struct
# Where the verified image lies on the disk: FIBMAP gives a block number of the mounted store.
directory = "/run/trustme/store/operatingsystems"
(stem,) = [name for name in os.listdir(directory) if os.path.isdir(f"{directory}/{name}")]
path = f"{directory}/{stem}/root.img"
with open(path, "rb") as file:
    size = os.fstat(file.fileno()).st_size
    unit = os.statvfs(path).f_bsize
    block = int(size * POSITION) // unit
    (physical,) = struct.unpack("i", fcntl.ioctl(file, 1, struct.pack("i", block)))
number = os.major(os.stat(directory).st_dev), os.minor(os.stat(directory).st_dev)
partition = os.path.basename(os.readlink(f"/sys/dev/block/{number[0]}:{number[1]}"))
fd = os.open(f"/dev/{partition}", os.O_RDWR)
before = os.pread(fd, unit, physical * unit)
os.pwrite(fd, bytes(byte ^ 0xFF for byte in before), physical * unit)
os.fsync(fd)
os.close(fd)
with open("/proc/sys/vm/drop_caches", "w") as file:
    file.write("3")
value = [partition, block, physical]
"""


def test_row01_an_image_changed_under_the_running_core_is_an_error_not_content(
    inside: tuple[VirtualMachine, Agent],
) -> None:
    machine, agent = inside
    digest = "find /usr /etc -xdev -type f -exec sha256sum {} + > /tmp/sums; echo $?"
    assert machine.core.run(digest, 120).output.strip().endswith("0")
    agent.run("open('/proc/sys/vm/drop_caches', 'w').write('3')")
    for position in (0.2, 0.4, 0.6, 0.8):
        agent.run(CHANGE_IMAGE.replace("POSITION", str(position)))
    # Every file is either what it was or unreadable; no byte of the change is ever delivered.
    check = machine.core.run("sha256sum -c /tmp/sums 2>&1 | grep -v ': OK$'", 120).output
    unreadable = set(re.findall(r"can't read '(.+)': Input/output error", check))
    assert unreadable
    assert set(re.findall(r"^(.+): FAILED", check, re.MULTILINE)) == unreadable


def test_row14_the_core_reaches_neither_the_mapper_nor_the_disk(
    inside: tuple[VirtualMachine, Agent],
) -> None:
    machine, agent = inside
    (mapping,) = agent.run(
        "import os\nvalue = [n for n in os.listdir('/sys/class/block') if n.startswith('dm-')]"
    )
    name = agent.run(f"value = open('/sys/class/block/{mapping}/dm/name').read().strip()")
    assert name.startswith("trustme-")
    assert agent.run(f"value = open('/sys/class/block/{mapping}/ro').read().strip()") == "1"
    for path in ("/dev/mapper/control", f"/dev/{mapping}", "/dev/vda", "/dev/loop0"):
        assert machine.core.run(f"ls {path}").code != 0
    for node in ("mknod /tmp/x b 253 0", "mknod /tmp/x c 10 236"):
        assert machine.core.run(node).code != 0
