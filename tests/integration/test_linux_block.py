# SPDX-License-Identifier: Apache-2.0
"""Loop devices, partitions and uevents of the running kernel."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.disks import MIB, run
from trustme_init.errors import DeviceRefusal
from trustme_init.linux import block, loop, uevent

pytestmark = pytest.mark.root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"".join(bytes([number]) * MIB for number in range(8)))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[loop.Loop]:
    fd = os.open(image, os.O_RDWR)
    with loop.attach(fd, read_only=False) as device:
        os.close(fd)
        yield device


def attach(image: Path, flags: int = os.O_RDWR, **options: int) -> loop.Loop:
    fd = os.open(image, flags)
    try:
        return loop.attach(fd, **options)  # type: ignore[arg-type]  # bools are ints
    finally:
        os.close(fd)


def test_offset_size_and_backing(image: Path) -> None:
    with attach(image, offset=2 * MIB, size=MIB) as device:
        assert block.device_size(device.fd) == MIB
        assert block.sector_size(device.fd) == 512
        assert block.is_read_only(device.fd)
        assert os.pread(device.fd, 1, 0) + os.pread(device.fd, 1, MIB - 1) == b"\2\2"
        facts = device.backing()
        assert (facts.device, facts.inode) == (image.stat().st_dev, image.stat().st_ino)
        assert (facts.offset, facts.size_limit) == (2 * MIB, MIB)
        assert facts.flags & loop.LO_FLAGS_READ_ONLY
        assert facts.flags & loop.LO_FLAGS_AUTOCLEAR


def test_read_only_by_default_and_by_descriptor(image: Path) -> None:
    with attach(image) as device, pytest.raises(OSError):
        os.write(os.open(device.path, os.O_RDWR), b"x")
    with attach(image, os.O_RDONLY, read_only=False) as device:
        assert block.is_read_only(device.fd)
    with attach(image, read_only=False) as device:
        assert not block.is_read_only(device.fd)
        os.pwrite(device.fd, b"x" * 512, 0)
        os.fsync(device.fd)
    assert image.read_bytes()[:2] == b"xx"


def test_autoclear_and_detach(image: Path) -> None:
    device = attach(image)
    path = device.path
    device.close()
    device.close()
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError) as caught:
        loop.backing_of(fd, path)
    assert caught.value.errno == errno.ENXIO
    os.close(fd)
    with attach(image, autoclear=False) as device:
        device.detach()


def test_sector_size_of_4096(image: Path) -> None:
    with attach(image, block_size=4096) as device:
        assert block.sector_size(device.fd) == 4096


def test_a_bad_descriptor_is_an_error() -> None:
    with pytest.raises(OSError):
        loop.attach(9999)


def kernel(disk: loop.Loop) -> block.KernelBlockLayer:
    return block.KernelBlockLayer(timeout=0.2)


def test_loop_devices_are_no_disks(disk: loop.Loop) -> None:
    assert disk.path not in kernel(disk).disks()
    assert [path for path in kernel(disk).disks() if not path.is_block_device()] == []


def test_a_partition_the_kernel_does_not_know_is_announced(disk: loop.Loop) -> None:
    path = kernel(disk).partition_device(disk.path, 3, 2 * MIB, MIB)
    try:
        assert path == Path(f"{disk.path}p3")
        fd = os.open(path, os.O_RDONLY)
        assert block.device_size(fd) == MIB
        assert os.pread(fd, 1, 0) == b"\2"
        os.close(fd)
        assert kernel(disk).partition_device(disk.path, 3, 2 * MIB, MIB) == path, "found, not announced"
        with pytest.raises(DeviceRefusal) as caught:
            kernel(disk).partition_device(disk.path, 4, 2 * MIB, 2 * MIB)
        assert caught.value.code == "partition-node-missing"
        assert f"{disk.path.name}p3 at {2 * MIB}+{MIB}" in caught.value.evidence
        with pytest.raises(DeviceRefusal):
            kernel(disk).partition_device(disk.path, 3, 2 * MIB, 2 * MIB)
    finally:
        block.blkpg_del_partition(disk.fd, 3)


def test_settling_tolerates_what_the_kernel_will_not_scan(disk: loop.Loop) -> None:
    kernel(disk).settle(disk.path)
    path = kernel(disk).partition_device(disk.path, 1, MIB, MIB)
    run("mkfs.ext4", "-q", "-F", path)
    fd = os.open(path, os.O_RDONLY | os.O_EXCL)  # in use
    kernel(disk).settle(disk.path)
    os.close(fd)
    try:
        block.blkpg_del_partition(disk.fd, 1)
    except OSError as exc:
        assert exc.errno == errno.ENXIO, "the scan above dropped it"  # noqa: PT017 - either is right


def test_a_partition_outside_the_disk_is_missing(disk: loop.Loop) -> None:
    with pytest.raises(DeviceRefusal):
        kernel(disk).partition_device(disk.path, 1, 7 * MIB, 2 * MIB)


def sys_of(disk: loop.Loop) -> Path:
    return Path("/sys/class/block") / disk.path.name


def test_a_real_uevent_arrives(disk: loop.Loop) -> None:
    with uevent.UeventSocket() as events:
        assert not os.get_inheritable(events.fileno())
        uevent.trigger(sys_of(disk), "change")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            event = events.read(5)
            if event and event.env.get("DEVNAME") == disk.path.name:
                break
        assert event
        assert (event.action, event.subsystem) == ("change", "block")
        assert event.devpath == f"/devices/virtual/block/{disk.path.name}"


def test_reading_does_not_wait_unless_told() -> None:
    with uevent.UeventSocket() as events:
        while events.read() is not None:
            pass


def test_what_another_process_sends_is_not_believed(disk: loop.Loop) -> None:
    import socket

    message = b"add@/x\0ACTION=add\0DEVPATH=/x\0SUBSYSTEM=forged\0"
    with uevent.UeventSocket() as events:
        port = events._socket.getsockname()[0]
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, uevent.NETLINK_KOBJECT_UEVENT) as forger:
            forger.bind((0, 0))
            forger.sendto(message, (port, 0))
            forger.sendto(message, (0, uevent.KERNEL_GROUP))
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            event = events.read(0.05)
            assert event is None or event.subsystem != "forged"


def test_waiting_ends_with_the_event_or_with_the_time(disk: loop.Loop, tmp_path: Path) -> None:
    flag = tmp_path / "flag"

    def look() -> str | None:
        return "found" if flag.exists() else None

    def later() -> None:
        flag.touch()
        uevent.trigger(sys_of(disk), "change")

    timer = threading.Timer(0.1, later)
    timer.start()
    started = time.monotonic()
    assert uevent.wait_until(look, 10, subsystem="block") == "found"
    assert time.monotonic() - started < 5
    timer.join()
    flag.unlink()
    assert uevent.wait_until(look, 0.05, subsystem="block") is None
    flag.touch()
    assert uevent.wait_until(look, 0) == "found"


def test_events_of_other_subsystems_cause_no_look(disk: loop.Loop) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        uevent.trigger(sys_of(disk), "change")

    assert uevent.wait_until(look, 0.2, subsystem="tpm") is None
    assert looks == 2
