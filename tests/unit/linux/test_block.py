# SPDX-License-Identifier: Apache-2.0
"""Which of a made-up sysfs's block devices are disks, and how partitions are matched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.errors import DeviceRefusal
from trustme_init.linux import block


def add(sysfs: Path, where: str, dev: str, size: int = 8, **attributes: str) -> None:
    directory = sysfs / "devices" / where
    directory.mkdir(parents=True)
    for name, value in {"dev": dev, "size": str(size), **attributes}.items():
        (directory / name).write_text(f"{value}\n")
    classes = sysfs / "class/block"
    classes.mkdir(parents=True, exist_ok=True)
    (classes / directory.name).symlink_to(directory)


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    add(tmp_path, "pci0/virtio1/block/vdb", "254:16")
    add(tmp_path, "pci0/virtio1/block/vda", "254:0")
    add(tmp_path, "pci0/virtio1/block/vda/vda1", "254:1", partition="1", start="2048")
    add(tmp_path, "pci0/cciss/block/cciss!c0d0", "104:0")
    add(tmp_path, "virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:0")
    add(tmp_path, "pci0/nvme/nvme0c0n1", "0:0", hidden="1")
    add(tmp_path, "pci0/ata1/block/sr0", "11:0", size=0)
    for name, dev in (
        ("loop0", "7:0"),
        ("ram0", "1:0"),
        ("zram0", "252:0"),
        ("dm-0", "253:0"),
        ("md0", "9:0"),
    ):
        add(tmp_path, f"virtual/block/{name}", dev)
    return tmp_path


def layer(sysfs: Path) -> block.KernelBlockLayer:
    return block.KernelBlockLayer(sysfs=sysfs, dev=sysfs / "dev", timeout=0.01)


def test_disks_are_what_has_hardware_and_a_medium(sysfs: Path) -> None:
    assert layer(sysfs).disks() == [sysfs / "dev" / name for name in ("cciss/c0d0", "nvme0n1", "vda", "vdb")]
    assert layer(sysfs / "none").disks() == []


def test_a_partition_without_the_right_node_is_missing(sysfs: Path) -> None:
    (sysfs / "dev").mkdir()
    (sysfs / "dev/vda").touch()
    (sysfs / "dev/vda1").touch()  # there, but no block device
    for number, start, size in ((1, 2048, 8), (2, 2048, 8), (1, 2049, 8), (1, 2048, 9)):
        with pytest.raises(DeviceRefusal) as caught:
            layer(sysfs).partition_device(sysfs / "dev/vda", number, start * 512, size * 512)
        assert caught.value.code == "partition-node-missing"


@pytest.mark.root
def test_a_partition_is_matched_by_place_and_its_node_by_number(sysfs: Path) -> None:
    (sysfs / "dev").mkdir()
    (sysfs / "dev/vda").touch()
    node = sysfs / "dev/vda1"
    os.mknod(node, 0o60600, os.makedev(254, 1))
    assert layer(sysfs).partition_device(sysfs / "dev/vda", 1, 2048 * 512, 8 * 512) == node
    node.unlink()
    os.mknod(node, 0o60600, os.makedev(254, 2))
    with pytest.raises(DeviceRefusal):
        layer(sysfs).partition_device(sysfs / "dev/vda", 1, 2048 * 512, 8 * 512)


def test_a_disk_that_is_gone(sysfs: Path) -> None:
    with pytest.raises(DeviceRefusal) as caught:
        layer(sysfs).settle(sysfs / "dev/vda")
    assert caught.value.code == "partition-table-not-read"


@given(st.integers(0, 2**12 - 1), st.integers(0, 2**20 - 1))
def test_device_numbers_translate(major: int, minor: int) -> None:
    # new_encode_dev of include/linux/kdev_t.h
    encoded = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    assert block.decode_device(encoded) == os.makedev(major, minor)
