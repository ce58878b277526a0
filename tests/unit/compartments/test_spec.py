# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import text_format

from trustme_init.compartments.confine import CORE_CAPABILITIES, check_names
from trustme_init.compartments.spec import (
    CORE_UUID,
    MIB,
    UID_BASE,
    CompartmentSpec,
    VolumeKind,
    VolumeSpec,
    from_config,
)
from trustme_init.errors import CompartmentRefusal
from trustme_init.machine import Machine
from trustme_init.proto.guestos_pb2 import GuestOSConfig
from trustme_init.trust.guestos import MountType, VerityImage

POLICY: Any = SimpleNamespace(core_memory_max=128 * MIB, core_pids_max=256, core_console=None)
"""What is used of a policy; its file format is not this room's affair."""
CORE = """
name: "trustme-coreos" hardware: "x86" version: 1 description { en: "core" }
init_path: "/sbin/cservice" init_param: "init" init_env: "container=trustme" init_env: "A=b=c"
mounts { image_file: "data" mount_point: "/data" fs_type: "tmpfs" mount_type: EMPTY def_size: 12 }
mounts { image_file: "root" mount_point: "/" fs_type: "squashfs" mount_type: SHARED_RW def_size: 64 }
"""


def machine(tmp_path: Path) -> Machine:
    nothing: Any = object()
    return Machine(run=tmp_path, block=nothing, verity=nothing, controllers=nothing)


def image(mount_point: str = "/", kind: MountType = MountType.SHARED_RW) -> VerityImage:
    return VerityImage("root", mount_point, "squashfs", kind, 4096, b"r" * 32, b"s" * 32)


def core(tmp_path: Path, text: str = CORE, *images: VerityImage) -> CompartmentSpec:
    config = text_format.Parse(text, GuestOSConfig())
    return from_config(config, images or (image(),), POLICY, machine(tmp_path))


def refusal(tmp_path: Path, text: str, *images: VerityImage) -> str:
    with pytest.raises(CompartmentRefusal) as caught:
        core(tmp_path, text, *images)
    return caught.value.code


def test_the_core_of_a_configuration(tmp_path: Path) -> None:
    spec = core(tmp_path)
    assert spec.argv == ("/sbin/cservice", "init")
    assert spec.env == ("container=trustme", "A=b=c")
    assert (spec.memory_max, spec.pids_max) == (128 * MIB, 256)
    assert spec.no_new_privs
    assert spec.capabilities == CORE_CAPABILITIES
    assert spec.socket_dir == tmp_path / "compartments" / CORE_UUID / "socket"
    root, data = spec.volumes
    assert (root.kind, str(root.mount_point), root.size) == (VolumeKind.OVERLAY, "/", 64 * MIB)
    assert root.image == image()
    assert (data.kind, str(data.mount_point), data.size) == (VolumeKind.TMPFS, "/data", 12 * MIB)


def test_a_tmpfs_never_takes_more_than_half_of_the_memory(tmp_path: Path) -> None:
    spec = core(tmp_path, CORE.replace("def_size: 64", ""))  # the message's default is 1024 MiB
    assert spec.volumes[0].size == 64 * MIB


def test_shared_is_read_only(tmp_path: Path) -> None:
    spec = core(tmp_path, CORE.replace("SHARED_RW", "SHARED"), image(kind=MountType.SHARED))
    assert (spec.volumes[0].kind, spec.volumes[0].size) == (VolumeKind.VERIFIED, 0)


@pytest.mark.parametrize(
    "kind", sorted(set(MountType) - {MountType.SHARED, MountType.SHARED_RW, MountType.EMPTY})
)
def test_every_other_mount_type_is_refused(tmp_path: Path, kind: MountType) -> None:
    text = (
        CORE + f'mounts {{ image_file: "x" mount_point: "/x" fs_type: "squashfs" mount_type: {kind.name} }}'
    )
    assert refusal(tmp_path, text, image(), image("/x", kind)) == "mount-type-unsupported"


def test_an_encrypted_empty_volume_is_not_silently_a_tmpfs(tmp_path: Path) -> None:
    assert refusal(tmp_path, CORE.replace('"tmpfs"', '"ext4"')) == "mount-type-unsupported"


@pytest.mark.parametrize("place", ["/proc", "/proc/sys", "/sys/fs", "/dev", "/run", "/run/socket"])
def test_the_managers_mount_points_are_reserved(tmp_path: Path, place: str) -> None:
    assert refusal(tmp_path, CORE.replace('"/data"', f'"{place}"')) == "mount-point-reserved"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('"squashfs"', '"ext4"', "fs-type-unsupported"),
        ('"/data"', '"/"', "mount-type-unsupported"),
        ("def_size: 64", "def_size: 0", "spec-malformed"),  # a tmpfs of size 0 has no limit
        ("def_size: 12", "def_size: 0", "spec-malformed"),
        ('"/data"', '"/a/../../b"', "spec-malformed"),
        ('"/data"', '"data"', "spec-malformed"),
        ('"/"', '"/other"', "spec-malformed"),
        ('"/sbin/cservice"', '"sbin/cservice"', "spec-malformed"),
        ('"A=b=c"', '"container=again"', "spec-malformed"),
        ('"A=b=c"', '"A"', "spec-malformed"),
        ('"A=b=c"', '"=x"', "spec-malformed"),
        ('"A=b=c"', '"A=\\000"', "spec-malformed"),
        ('"init"', '"a\\000b"', "spec-malformed"),
    ],
)
def test_a_malformed_configuration_is_refused(tmp_path: Path, old: str, new: str, code: str) -> None:
    assert refusal(tmp_path, CORE.replace(old, new)) == code


def test_a_volume_without_its_verified_image_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, CORE, image("/elsewhere")) == "spec-malformed"


@pytest.mark.parametrize(
    "change",
    [
        {"uuid": "../../etc"},
        {"uuid": CORE_UUID + "\n"},
        {"name": "../x"},
        {"name": ""},
        {"hostname": "a b"},
        {"argv": ()},
        {"volumes": ()},
        {"uid_base": 0},
        {"uid_count": 0},
    ],
)
def test_a_specification_is_judged_however_it_was_made(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(CompartmentRefusal) as caught:
        dataclasses.replace(core(tmp_path), **change)
    assert caught.value.code == "spec-malformed"


def test_two_volumes_at_one_place_are_refused(tmp_path: Path) -> None:
    spec = core(tmp_path)
    twice = VolumeSpec(VolumeKind.TMPFS, PurePosixPath("/data"), MIB)
    with pytest.raises(CompartmentRefusal):
        dataclasses.replace(spec, volumes=(*spec.volumes, twice))


def test_the_id_range_is_no_host_users() -> None:
    assert UID_BASE >= 65536
    assert datetime.now(tz=UTC).year >= 2026


def test_capability_names_are_checked() -> None:
    check_names(CORE_CAPABILITIES)
    with pytest.raises(CompartmentRefusal) as caught:
        check_names(frozenset({"chown", "omnipotence"}))
    assert caught.value.code == "capability-unknown"
    assert not CORE_CAPABILITIES & {"sys_admin", "sys_ptrace", "sys_module", "net_admin", "mknod", "setfcap"}
