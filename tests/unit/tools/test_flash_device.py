# SPDX-License-Identifier: Apache-2.0
"""What the kernel says about a disk, and what of it forbids to overwrite it; on made-up sysfs trees.

test_flash in tests/integration does it with real devices; here are those that a test host does not have.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from trustme_tools.errors import ToolError
from trustme_tools.flash import device
from trustme_tools.flash.device import Disk, Use, judge, look
from trustme_tools.flash.extents import Extent

NUMBER = os.makedev(8, 16)


class Machine:
    """The sysfs and proc of a machine with a USB disk `sdb` of two partitions."""

    def __init__(self, root: Path) -> None:
        self.sysfs = root / "sys"
        self.proc = root / "proc"
        self.disk = self.block("sdb", "8:16", size=62333952)
        for attribute, text in {"vendor": "Sand  ", "model": "Ultra Fit       ", "serial": "4C53"}.items():
            self.write(self.disk / f"device/{attribute}", text)
        self.part(1, start=2048, size=327680)
        self.part(2, start=329728, size=524288)
        self.write(self.proc / "self/mountinfo", "21 1 8:1 / / rw - ext4 /dev/sda1 rw")
        self.write(self.proc / "swaps", "Filename Type Size Used Priority")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def block(self, name: str, number: str, *, size: int, below: Path | None = None) -> Path:
        directory = (below or self.sysfs / "devices/block") / name
        texts = {"dev": number, "size": str(size), "ro": "0", "diskseq": "7"}
        for attribute, text in texts.items():
            self.write(directory / attribute, text)
        self.write(directory / "queue/logical_block_size", "512")
        (directory / "holders").mkdir()
        for link in (self.sysfs / "dev/block" / number, self.sysfs / "class/block" / name):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(directory)
        return directory

    def part(self, number: int, *, start: int, size: int) -> Path:
        directory = self.block(f"sdb{number}", f"8:{16 + number}", size=size, below=self.disk)
        self.write(directory / "partition", str(number))
        self.write(directory / "start", str(start))
        return directory

    def stack(self, upon: Path, name: str, number: str, kind: str) -> Path:
        """Put a device-mapper or RAID device upon another."""
        directory = self.block(name, number, size=1000)
        self.write(directory / f"{kind}/name", f"name-of-{name}")
        (upon / "holders" / name).symlink_to(directory)
        return directory

    def mount(self, number: str, where: str, source: str = "none") -> None:
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write(f"99 1 {number} / {where} rw shared:1 - ext4 {source} rw\n")

    def look(self, number: int = NUMBER) -> Disk:
        return look(number, sysfs=self.sysfs, proc=self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def refusal(disk: Disk) -> ToolError:
    with pytest.raises(ToolError) as caught:
        judge(disk)
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value


def test_a_disk_nobody_uses(machine: Machine) -> None:
    disk = machine.look()
    assert (disk.name, disk.model, disk.serial, disk.size) == ("sdb", "Sand Ultra Fit", "4C53", 31914983424)
    assert disk.partitions == (Extent(1048576, 167772160), Extent(168820736, 268435456))
    assert str(disk) == "sdb: Sand Ultra Fit, serial 4C53, 31.91 GB"
    judge(disk)


def test_a_mounted_disk_or_partition(machine: Machine) -> None:
    machine.mount("8:18", r"/media/with\040space")
    error = refusal(machine.look())
    assert error.code == "device-mounted"
    assert error.evidence == "sdb2: mount /media/with space"
    machine.mount("8:16", "/media/a\u2028b")
    assert "sdb: mount /media/a\u2028b" in refusal(machine.look()).evidence


@pytest.mark.parametrize("where", sorted(device.SYSTEM_MOUNTS))
def test_the_systems_own_disk(machine: Machine, where: str) -> None:
    machine.mount("8:18", where)
    assert refusal(machine.look()).code == "system-disk"


def test_the_systems_disk_below_encryption_and_volumes(machine: Machine) -> None:
    crypt = machine.stack(machine.disk / "sdb2", "dm-0", "253:0", "dm")
    machine.stack(crypt, "dm-1", "253:1", "dm")
    machine.mount("253:1", "/")
    error = refusal(machine.look())
    assert (error.code, error.evidence) == ("system-disk", "sdb2: mount /")


@pytest.mark.parametrize(("name", "kind"), [("dm-0", "dm"), ("md127", "md"), ("bcache0", "bcache")])
def test_whatever_holds_a_partition(machine: Machine, name: str, kind: str) -> None:
    machine.stack(machine.disk / "sdb2", name, "253:0", kind)
    error = refusal(machine.look())
    assert error.code == "device-in-use"
    assert f"sdb2: holder {name}" in error.evidence


def test_whatever_holds_the_disk(machine: Machine) -> None:
    machine.stack(machine.disk, "dm-0", "253:0", "dm")
    error = refusal(machine.look())
    assert (error.code, error.evidence) == ("device-in-use", "sdb: holder dm-0 (name-of-dm-0)")


def test_a_part_of_a_disk_and_what_is_made_of_disks(machine: Machine) -> None:
    assert refusal(machine.look(os.makedev(8, 17))).code == "not-a-disk"
    machine.stack(machine.disk, "md0", "9:0", "md")
    assert refusal(machine.look(os.makedev(9, 0))).code == "not-a-disk"


def test_a_write_protected_card(machine: Machine) -> None:
    machine.write(machine.disk / "ro", "1")
    assert refusal(machine.look()).code == "device-read-only"


def test_swap_is_in_use(machine: Machine) -> None:
    in_use = replace(machine.look(), uses=(Use("swap", "/dev/sdb2", "sdb2"),))
    assert refusal(in_use).code == "device-in-use"


@pytest.mark.parametrize(
    ("attribute", "text"), [("size", "1000"), ("diskseq", "8"), ("device/serial", "other")]
)
def test_another_medium_is_another_device(machine: Machine, attribute: str, text: str) -> None:
    before = machine.look()
    assert machine.look().identity == before.identity
    machine.write(machine.disk / attribute, text)
    assert machine.look().identity != before.identity
