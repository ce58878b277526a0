# SPDX-License-Identifier: Apache-2.0
"""Small GuestOSes for compartment tests: a busybox root whose init is a shell script given by the test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.integration.adapters import NoControllers, UserspaceVerity
from trustme_init.compartments.lifecycle import Compartment, clear
from trustme_init.compartments.spec import CompartmentSpec, VolumeKind, VolumeSpec
from trustme_init.machine import Machine, VerityBackend
from trustme_init.trust.guestos import MountType, VerityImage

UUID = f"0badc0de-0000-4000-8000-{os.getpid():012x}"
"""Of this run: the host's cgroups are shared with whoever else runs these tests."""
MIB = 1024 * 1024
DONE = "== done =="
INIT = """#!/bin/sh
export PATH=/bin
b() {{ /bin/busybox "$@"; }}
{script}
echo '{done}'
exec /bin/busybox sleep 1000
"""
DIRECTORIES = ("bin", "sbin", "proc", "sys", "dev", "run", "tmp", "data", "etc", "root")


def unified() -> Path:
    """Return where the host has cgroup version 2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise AssertionError("the host has no cgroup2 mount")


def busybox_root(directory: Path, script: str) -> Path:
    """Make a root directory whose /sbin/init runs `script`, prints DONE and stays."""
    for name in DIRECTORIES:
        (directory / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", directory / "bin/busybox")
    (directory / "bin/sh").symlink_to("busybox")
    init = directory / "sbin/init"
    init.write_text(INIT.format(script=script, done=DONE))
    init.chmod(0o755)
    return directory


@dataclass
class Bench:
    """A machine for compartments: every path in a temporary directory, the host's cgroup2."""

    work: Path
    verity: VerityBackend = field(default_factory=UserspaceVerity)

    def __post_init__(self) -> None:
        self.images = self.work / "images"
        self.images.mkdir()
        self.machine = Machine(
            cgroup_root=unified(),
            run=self.work / "run",
            verity=self.verity,
            controllers=NoControllers(),
        )
        self.log = self.machine.log_dir / "test.log"

    def image(
        self,
        root: Path,
        *,
        name: str = "root",
        mount_point: str = "/",
        fs_type: str = "squashfs",
        mount_type: MountType = MountType.SHARED_RW,
    ) -> VerityImage:
        """Pack a directory; the root hash and salt are veritysetup's."""
        data, tree = self.images / f"{name}.img", self.images / f"{name}.hash.img"
        if fs_type == "squashfs":
            pack: list[str | Path] = [
                "mksquashfs",
                root,
                data,
                "-all-root",
                "-noappend",
                "-quiet",
                "-no-progress",
            ]
        else:
            pack = ["mkfs.erofs", "--all-root", "--quiet", data, root]
        subprocess.run(pack, check=True, capture_output=True)
        os.truncate(data, -(-data.stat().st_size // 4096) * 4096)
        told = subprocess.run(
            ["veritysetup", "format", data, tree], check=True, capture_output=True, text=True
        ).stdout
        found = dict(re.findall(r"^(Root hash|Salt):\s+([0-9a-f]+)$", told, re.MULTILINE))
        return VerityImage(
            image_file=name,
            mount_point=mount_point,
            fs_type=fs_type,
            mount_type=mount_type,
            data_size=data.stat().st_size,
            root_hash=bytes.fromhex(found["Root hash"]),
            salt=bytes.fromhex(found["Salt"]),
        )

    def spec(
        self,
        root: VerityImage,
        *more: VolumeSpec,
        argv: Sequence[str] = ("/sbin/init", "init"),
        env: Sequence[str] = ("container=trustme",),
        console: Path | None = None,
        kind: VolumeKind = VolumeKind.OVERLAY,
    ) -> CompartmentSpec:
        """Return a compartment with this root."""
        return CompartmentSpec(
            uuid=UUID,
            name="test",
            hostname="test",
            volumes=(VolumeSpec(kind, PurePosixPath("/"), 8 * MIB, root), *more),
            argv=tuple(argv),
            env=tuple(env),
            memory_max=256 * MIB,
            pids_max=64,
            socket_dir=self.machine.compartments / UUID / "socket",
            console=console,
            log=self.log,
        )

    @contextmanager
    def directory(self) -> Iterator[int]:
        """Open the images' directory as the boot does."""
        fd = os.open(self.images, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def running(self, spec: CompartmentSpec) -> Iterator[Compartment]:
        """Start a compartment, and leave nothing of it."""
        compartment = Compartment(spec, self.machine)
        try:
            with self.directory() as directory:
                compartment.start(directory)
            yield compartment
        finally:
            self.end(compartment)

    def end(self, compartment: Compartment) -> None:
        """Kill whatever still runs."""
        if compartment.running is not None:
            compartment.kill()
            assert compartment.wait(10)
            compartment.ended()
        clear(UUID, self.machine)
        parent = self.machine.cgroup_root / "trustme"
        if parent.exists() and not any(item.is_dir() for item in parent.iterdir()):
            parent.rmdir()

    def output(self, until: str = DONE) -> str:
        """Return the log once `until` is in it."""
        wait_for(lambda: self.log.exists() and until in self.log.read_text())
        return self.log.read_text()

    def facts(self, script: str) -> str:
        """Run `script` as the init of a fresh compartment and return what it printed."""
        spec = self.spec(self.image(busybox_root(self.work / "root", script)))
        with self.running(spec):
            return self.output()


def wait_for(condition: Callable[[], bool], timeout: float = 10) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def section(text: str, name: str) -> list[str]:
    """Return the lines between `== name ==` and the next such line."""
    lines = text.splitlines()
    start = lines.index(f"== {name} ==") + 1
    end = next(at for at in range(start, len(lines)) if lines[at].startswith("== "))
    return lines[start:end]
