# SPDX-License-Identifier: Apache-2.0
"""Lasting volumes and single files in a running compartment, over loop devices that encrypt nothing.

What encryption and authentication are worth is shown in tests/qemu/test_volumes.py.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from tests.integration.adapters import PlainLayer
from tests.integration.compartment_kit import DONE, MIB, UUID, Bench, busybox_root, wait_for
from tests.integration.test_compartment import KINDS, attached_loops, refused
from trustme_init.compartments.spec import CompartmentSpec, VerifiedFile, VolumeKind, VolumeSpec
from trustme_init.compartments.volumes import FileVolumes, VolumeRequest
from trustme_init.errors import StorageRefusal
from trustme_init.trust.guestos import MountType

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

KEY = bytes(range(96))
SIZE = 10 * MIB


class VolumeBench(Bench):
    """A bench whose compartment has lasting volumes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.volumes = FileVolumes(PlainLayer())
        self.machine = replace(self.machine, volumes=self.volumes)
        self.container = self.work / UUID
        self.container.mkdir()
        self.volumes.prepare(UUID, self.container, KEY)

    def opened(self, kind: VolumeKind, name: str, place: str) -> VolumeSpec:
        """Open a volume as the vault does before a start."""
        (volume,) = self.volumes.open(UUID, self.container, [VolumeRequest(name, SIZE)], KEY)
        return VolumeSpec(kind, PurePosixPath(place), 0, device=volume.device)

    def signed_file(self, content: bytes, name: str = "motd") -> VerifiedFile:
        """Put a file into the store."""
        (self.images / f"{name}.img").write_bytes(content)
        return VerifiedFile(name, len(content), hashlib.sha256(content).digest())

    def lines(self, spec: CompartmentSpec) -> list[str]:
        """Start it, return what it printed, end it, and see that no device stays."""
        with self.running(spec):
            lines = self.output().splitlines()
        self.log.unlink()
        wait_for(lambda: not attached_loops(self.work))
        return lines

    @contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """Look into a volume's file system from the host."""
        place = self.work / "mnt"
        place.mkdir()
        (volume,) = self.volumes.open(UUID, self.container, [VolumeRequest(name, SIZE)], KEY)
        subprocess.run(["mount", "-t", "ext4", volume.device, place], check=True)
        self.volumes.release(UUID)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
            place.rmdir()
            wait_for(lambda: not attached_loops(self.work))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[VolumeBench]:
    bench = VolumeBench(tmp_path)
    yield bench
    bench.volumes.release(UUID)


MOUNT = "b grep ' %s ' /proc/self/mounts\n"


def test_a_volume_keeps_its_content_over_starts(bench: VolumeBench) -> None:
    script = """
b cat /data/word 2>/dev/null || echo first
echo kept > /data/word; b chown 1000:1000 /data/word; b sync
b stat -c 'owner %u:%g %a' /data /data/word
"""
    image = bench.image(busybox_root(bench.work / "root", script + MOUNT % "/data"))
    seen = []
    for _ in range(2):
        lines = bench.lines(bench.spec(image, bench.opened(VolumeKind.ENCRYPTED, "data", "/data")))
        seen.append(lines[0])
        assert "owner 0:0 755" in lines
        assert "owner 1000:1000 644" in lines
        device, _, kind, options, *_ = lines[-2].split()
        assert kind == "ext4"
        assert {"rw", "nosuid", "nodev", "noatime"} <= set(options.split(","))
        assert device.startswith("/dev/loop")
    assert seen == ["first", "kept"]
    with bench.mounted("data") as place:
        # On the disk ids are those of the container: whatever range it gets next, they stay its own.
        status = (place / "word").stat()
        assert (status.st_uid, status.st_gid) == (1000, 1000)


@pytest.mark.parametrize(
    ("mount_type", "kind"),
    [(MountType.SHARED, VolumeKind.VERIFIED), (MountType.SHARED_RW, VolumeKind.OVERLAY)],
    ids=["over-an-image", "over-an-overlay"],
)
def test_an_overlay_lasts_and_shows_what_is_below(
    bench: VolumeBench, mount_type: MountType, kind: VolumeKind
) -> None:
    script = """
echo "list $(b ls /etc | b tr '\n' ' ')"
b cat /etc/changed
echo new > /etc/made; echo changed > /etc/changed; b rm -f /etc/removed; b mkdir -p /etc/dir/below
b stat -c 'top %u:%g %a' /etc
"""
    root = busybox_root(bench.work / "root", script + MOUNT % "/etc")
    for name in ("changed", "removed", "same"):
        (root / "etc" / name).write_text("original\n")
    (root / "etc").chmod(0o750)
    image = bench.image(root, mount_type=mount_type)

    def start() -> list[str]:
        volume = bench.opened(VolumeKind.ENCRYPTED_OVERLAY, "etc", "/etc")
        return bench.lines(bench.spec(image, volume, kind=kind))

    assert start()[:2] == ["list changed removed same ", "original"]
    lines = start()
    assert lines[:2] == ["list changed dir made same ", "changed"]
    assert "top 0:0 750" in lines
    assert {"rw", "nosuid", "nodev"} <= set(lines[-2].split()[3].split(","))


def test_an_image_is_laid_read_only_over_what_is_there(bench: VolumeBench) -> None:
    script = """
echo "list $(b ls /etc | b tr '\\n' ' ') $(b cat /etc/both)"
b touch /etc/x 2>/dev/null || echo read-only
"""
    root = busybox_root(bench.work / "root", script + MOUNT % "/etc")
    feature = bench.work / "feature"
    feature.mkdir()
    for directory, names in ((root / "etc", ("base", "both")), (feature, ("both", "feature"))):
        for name in names:
            (directory / name).write_text(f"{directory.name}\n")
    over = bench.image(feature, name="feature", mount_point="/etc", mount_type=MountType.OVERLAY_RO)
    volume = VolumeSpec(VolumeKind.OVERLAY_READ_ONLY, PurePosixPath("/etc"), 0, over)
    lines = bench.lines(bench.spec(bench.image(root), volume))
    assert lines[:2] == ["list base both feature  feature", "read-only"]
    assert {"ro", "nosuid", "nodev"} <= set(lines[-2].split()[3].split(","))


def test_single_files_are_verified_copies(bench: VolumeBench) -> None:
    script = """
b cat /etc/motd /data/new
echo x 2>/dev/null >> /etc/motd || echo read-only
echo more >> /data/new && b cat /data/new
b dd if=/dev/zero of=/data/new bs=4k count=16 2>/dev/null; b stat -c 'size %s' /data/new
b rm /etc/motd 2>/dev/null || echo busy
b stat -c 'owner %u:%g %a' /etc/motd
"""
    root = busybox_root(bench.work / "root", script)
    (root / "etc/motd").write_text("of the image\n")
    file = bench.signed_file(b"signed\n")
    spec = bench.spec(
        bench.image(root),
        VolumeSpec(VolumeKind.FILE, PurePosixPath("/etc/motd"), 0, file=file),
        VolumeSpec(VolumeKind.FILE_COPY, PurePosixPath("/data/new"), 0, file=file),
    )
    for _ in range(2):  # what the container wrote to its copy is gone with it
        assert bench.lines(spec) == [
            "signed",
            "signed",
            "read-only",
            "signed",
            "more",
            "size 4096",
            "busy",
            "owner 0:0 644",
            DONE,
        ]
    assert (bench.images / "motd.img").read_bytes() == b"signed\n"


def test_row01_a_single_file_is_what_was_hashed(bench: VolumeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer changes the store's file as soon as it was read."""
    from trustme_init.compartments import hostside, images

    genuine = images.mount_file

    def then_change(file: VerifiedFile, directory: int) -> int:
        mount = genuine(file, directory)
        (bench.images / "motd.img").write_bytes(b"EVIL!!\n")
        return mount

    monkeypatch.setattr(hostside, "mount_file", then_change)
    image = bench.image(busybox_root(bench.work / "root", "b cat /etc/motd"))
    file = bench.signed_file(b"signed\n")
    volume = VolumeSpec(VolumeKind.FILE, PurePosixPath("/etc/motd"), 0, file=file)
    assert bench.lines(bench.spec(image, volume)) == ["signed", DONE]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda path: path.write_bytes(b"sIgned\n"), "image-hash-mismatch"),
        (lambda path: path.write_bytes(b"signed\n\n"), "image-size-mismatch"),
        (lambda path: path.write_bytes(b"signed"), "image-size-mismatch"),
        (lambda path: path.write_bytes(b""), "image-size-mismatch"),
        (lambda path: path.unlink(), "image-unreadable"),
        (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "image-unreadable"),
        (lambda path: [path.unlink(), subprocess.run(["mkfifo", path], check=True)], "image-unreadable"),
    ],
    ids=["content", "longer", "shorter", "empty", "gone", "link", "fifo"],
)
def test_row01_a_changed_single_file_is_refused(
    bench: VolumeBench, change: Callable[[Path], object], code: str
) -> None:
    file = bench.signed_file(b"signed\n")
    volume = VolumeSpec(VolumeKind.FILE, PurePosixPath("/etc/motd"), 0, file=file)
    spec = bench.spec(bench.image(busybox_root(bench.work / "root", "")), volume)
    change(bench.images / "motd.img")
    assert refused(bench, spec).code == code


@pytest.mark.parametrize("kind", [*KINDS, "directory"])
@pytest.mark.parametrize("place", ["etc/motd", "etc"])
def test_row24_a_hostile_place_of_a_single_file_is_refused(bench: VolumeBench, place: str, kind: str) -> None:
    if (place, kind) in {("etc/motd", "file"), ("etc", "directory")}:
        return  # that is what it should be
    root = busybox_root(bench.work / "root", "")
    if place == "etc":
        (root / "etc").rmdir()
    {**KINDS, "directory": Path.mkdir}[kind](root / place)
    volume = VolumeSpec(VolumeKind.FILE, PurePosixPath("/etc/motd"), 0, file=bench.signed_file(b"signed\n"))
    refusal = refused(bench, bench.spec(bench.image(root), volume))
    assert refusal.code == "mount-point-unsafe"
    assert refusal.evidence.startswith(f"/{place}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_row24_a_hostile_place_of_a_lasting_overlay_is_refused(bench: VolumeBench, kind: str) -> None:
    root = busybox_root(bench.work / "root", "")
    (root / "etc").rmdir()
    KINDS[kind](root / "etc")
    spec = bench.spec(bench.image(root), bench.opened(VolumeKind.ENCRYPTED_OVERLAY, "etc", "/etc"))
    refusal = refused(bench, spec)
    assert refusal.code == "mount-point-unsafe"


def test_a_failed_start_gives_the_devices_up(bench: VolumeBench) -> None:
    volume = bench.opened(VolumeKind.ENCRYPTED, "data", "/data")
    spec = bench.spec(bench.image(busybox_root(bench.work / "root", "")), volume)
    tree = bench.images / "root.hash.img"
    tree.write_bytes(bytes(tree.stat().st_size))
    assert attached_loops(bench.work)
    assert refused(bench, spec).code == "verity-mismatch"


def test_row11_a_file_system_that_cannot_be_mounted_is_left_as_it_is(bench: VolumeBench) -> None:
    bench.opened(VolumeKind.ENCRYPTED, "data", "/data")
    bench.volumes.release(UUID)
    file = bench.container / "data.img"
    with file.open("r+b") as stream:
        stream.seek(4096 + 1024)
        stream.write(bytes(1024))
    before = file.read_bytes()
    image = bench.image(busybox_root(bench.work / "root", ""))
    spec = bench.spec(image, bench.opened(VolumeKind.ENCRYPTED, "data", "/data"))
    refusal = refused(bench, spec)
    assert (type(refusal), refusal.code) == (StorageRefusal, "volume-not-mountable")
    assert file.read_bytes() == before


def test_a_volume_in_use_is_not_opened_twice(bench: VolumeBench) -> None:
    image = bench.image(busybox_root(bench.work / "root", ""))
    with bench.running(bench.spec(image, bench.opened(VolumeKind.ENCRYPTED, "data", "/data"))):
        bench.output()
        with pytest.raises(StorageRefusal, match="volume-busy"):
            bench.opened(VolumeKind.ENCRYPTED, "data", "/data")


def test_a_new_volume_is_sparse_and_its_owner_sees_all_of_it(bench: VolumeBench) -> None:
    bench.opened(VolumeKind.ENCRYPTED, "data", "/data")
    status = (bench.container / "data.img").stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == SIZE + 4096
    assert status.st_blocks * 512 < SIZE * 3 // 4
    bench.volumes.release(UUID)
    with bench.mounted("data") as place:
        figures = os.statvfs(place)
        # No part is kept for root, who is the container's own; the rest is ext4's for its own accounts.
        assert figures.f_bavail * figures.f_frsize > SIZE // 2
        assert figures.f_favail > 1000
