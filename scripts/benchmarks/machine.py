# SPDX-License-Identifier: Apache-2.0
"""The part that needs a kernel with device mapper, or firmware: boots of an image in virtual machines.

One machine at a time, and none while another QEMU runs here: two would measure each other.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format

from trustme_init.boot.stages import STAGE_COUNT
from trustme_init.proto.guestos_pb2 import GuestOSConfig
from trustme_tools.errors import ToolError
from trustme_tools.guestos.build import sign_config
from trustme_tools.guestos.images import ImageId, file_sha256, format_verity
from trustme_tools.guestos.signing import pki_signer
from trustme_tools.image import disk
from trustme_tools.image.cache import Cache, default_root
from trustme_tools.machine import acceleration, firmware, images
from trustme_tools.machine.vm import VirtualMachine
from trustme_tools.pki.directory import PkiDirectory

MIB: Final = 1024 * 1024
SIZES_MIB: Final = (16, 256, 2048)
"""Sizes of the core image whose start is compared; the smallest is the image's own if that is larger."""
_STORE_SPARE: Final = 384 * MIB
"""Room in the store for the hash tree (0.8 %) and ext4's own tables."""
IDLE_TIMEOUT: Final = 1800.0
SHELL_TIMEOUT: Final = 60.0


def sizes(image: Path) -> dict[str, int]:
    """Return bytes of the UKI and of the archives in it."""
    loaded = images.load(image)
    parts = loaded.manifest.get("initramfs", {})
    return {
        "uki": loaded.uki.stat().st_size,
        **{f"initramfs_{name}": int(part["size"]) for name, part in parts.items()},
    }


def boot(image: Path) -> dict[str, Any]:
    """Boot the image twice, as a new device and again; return the second boot's times."""
    loaded = images.load(image)
    with tempfile.TemporaryDirectory(prefix="trustme-bench-") as name:
        state = Path(name)
        first = _boot(loaded.disk, loaded.pki, state)
        second = _boot(loaded.disk, loaded.pki, state)
    return {"accelerator": acceleration.choose(), **second, "first_boot_ms": first["times_ms"]}


def verified_start(image: Path) -> dict[str, Any]:
    """Boot core images of several sizes; return what the hand-off took for each, ms."""
    loaded = images.load(image)
    runs = []
    for mib in SIZES_MIB:
        with tempfile.TemporaryDirectory(prefix="trustme-bench-", dir=image.resolve().parent) as name:
            work = Path(name)
            padded = work / images.DISK
            size = _pad_core(loaded, padded, mib * MIB, work)
            times = _boot(padded, loaded.pki, work / "state")
        runs.append(
            {
                "mib": size // MIB,
                "images_ms": times["handoff_phases_ms"]["images"],
                "handoff_ms": times["stages_ms"]["handoff"],
                "core_ms": times["stages_ms"]["core"],
            }
        )
    return {"accelerator": acceleration.choose(), "runs": runs}


def _pad_core(loaded: images.ImageDirectory, target: Path, size: int, work: Path) -> int:
    """Make a disk whose core image has `size` bytes (a hole at its end); return the image's size."""
    store = work / "store"
    disk.read_store(loaded.disk, store)
    core = loaded.manifest["core"]
    config_path = next(store.rglob(f"{core['name']}-{core['version']}.conf"))
    config = text_format.Parse(config_path.read_text(), GuestOSConfig())
    mount = next(entry for entry in config.mounts if entry.HasField("image_verity_sha256"))
    directory = config_path.with_suffix("")
    data, hashes = (directory / f"{mount.image_file}{suffix}" for suffix in (".img", ".hash.img"))
    size = max(size, data.stat().st_size)
    with data.open("r+b") as file:
        file.truncate(size)
    hashes.unlink()
    identity = ImageId(config.name, config.version, mount.image_file)
    mount.image_verity_sha256 = format_verity(data, hashes, identity).hex()
    mount.verity_salt = identity.salt().hex()
    mount.image_size = size
    mount.image_sha2_256 = file_sha256(data)
    config_path.write_text(text_format.MessageToString(config))
    sign_config(config_path, pki_signer(PkiDirectory(loaded.pki)))
    disk.create(target, loaded.uki, store, store_size=size + _STORE_SPARE)
    shutil.rmtree(store)
    return size


def _boot(image: Path, pki: Path, state: Path) -> dict[str, Any]:
    """Boot to RUNNING; return times from the boot report, which counts from the kernel's start."""
    prepared = firmware.prepare(Cache(default_root()), pki)
    with _alone(), VirtualMachine(image, prepared, state=state) as machine:
        outcome = machine.wait_boot()
        if outcome.kind != "running":
            raise ToolError(f"the machine ended as {outcome.kind}", code="no-boot", evidence=outcome.detail)
        report = _report(machine)
        machine.core.run("sync")
    stages = {stage["name"]: stage for stage in report["stages"]}
    if len(stages) != STAGE_COUNT:
        raise ToolError("the boot report lacks stages", code="no-boot", evidence=", ".join(stages))
    ends = {name: stage["started_ms"] + stage["ms"] for name, stage in stages.items()}
    return {
        "times_ms": {
            "PID 1 begins": stages["early"]["started_ms"],
            "first stage line": ends["early"],
            "mode decided": ends["mode"],
            "core exec": ends["handoff"],
            "RUNNING": report["running_ms"],
        },
        "stages_ms": {name: stage["ms"] for name, stage in stages.items()},
        "handoff_phases_ms": report["handoff"]["phases_ms"],
        "power_on_to_running_s": round(outcome.seconds, 1),
    }


def _report(machine: VirtualMachine) -> dict[str, Any]:
    """Fetch the boot report as a person would: `control` on the core container's console."""
    machine.core.send("\r")
    machine.core.expect(r"core:\S* ?# ", SHELL_TIMEOUT)
    answer = machine.core.run("control retrieve_logs /tmp/logs >&2 && cat /tmp/logs/boot.json", SHELL_TIMEOUT)
    if answer.code or "{" not in answer.output:
        raise ToolError("the core's console gave no report", code="no-report", evidence=answer.output[-400:])
    report: dict[str, Any] = json.loads(answer.output[answer.output.index("{") :])
    return report


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other QEMU runs on this machine."""
    deadline = time.monotonic() + IDLE_TIMEOUT
    said = False
    while _other_machines():
        if time.monotonic() > deadline:
            raise ToolError("another QEMU does not end", "run the benchmark later", code="busy")
        if not said:
            print("bench: waiting for another QEMU to end", file=sys.stderr)
            said = True
        time.sleep(1)
    yield


def _other_machines() -> bool:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name = (entry / "comm").read_text()
        except OSError:
            continue
        if name.startswith("qemu-system"):
            return True
    return False
