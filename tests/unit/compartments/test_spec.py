# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
    Guest,
    VerifiedFile,
    VolumeKind,
    VolumeSpec,
    from_config,
    from_guest,
    volume_requests,
)
from trustme_init.compartments.volumes import OpenVolume, VolumeRequest
from trustme_init.errors import CompartmentRefusal
from trustme_init.machine import Machine
from trustme_init.proto.container_pb2 import ContainerConfig
from trustme_init.proto.guestos_pb2 import GuestOSConfig
from trustme_init.trust.guestos import MountType, VerityImage

POLICY: Any = SimpleNamespace(core_memory_max=128 * MIB, core_pids_max=256, core_console=None)
"""What is used of a policy; its file format is not this room's affair."""
GUEST_UUID = "0badc0de-0000-4000-8000-00000000000a"
SIZES = 'image_sizes {{ image_name: "x" image_size: {} }}'
CORE = """
name: "trustme-coreos" hardware: "x86" version: 1 description { en: "core" }
init_path: "/sbin/cservice" init_param: "init" init_env: "container=trustme" init_env: "A=b=c"
mounts { image_file: "data" mount_point: "/data" fs_type: "tmpfs" mount_type: EMPTY def_size: 12 }
mounts { image_file: "root" mount_point: "/" fs_type: "squashfs" mount_type: SHARED_RW def_size: 64 }
"""


def machine(tmp_path: Path) -> Machine:
    nothing: Any = object()
    return Machine(run=tmp_path, block=nothing, verity=nothing, volumes=nothing, controllers=nothing)


def image(mount_point: str = "/", kind: MountType = MountType.SHARED_RW) -> VerityImage:
    return VerityImage("root", mount_point, "squashfs", kind, 4096, b"r" * 32, b"s" * 32)


def core(tmp_path: Path, text: str = CORE, *images: VerityImage) -> CompartmentSpec:
    config = text_format.Parse(text, GuestOSConfig())
    return from_config(config, images or (image(),), POLICY, machine(tmp_path))


def refusal(tmp_path: Path, text: str, *images: VerityImage) -> str:
    with pytest.raises(CompartmentRefusal) as caught:
        core(tmp_path, text, *images)
    return caught.value.code


def mount(
    kind: MountType,
    *,
    name: str = "x",
    place: str = "/x",
    fs_type: str = "squashfs",
    more: str = "",
) -> str:
    """Return one more mount for a configuration."""
    size = "" if "image_size" in more else "image_size: 4096"
    return (
        f'mounts {{ image_file: "{name}" mount_point: "{place}" fs_type: "{fs_type}"'
        f" mount_type: {kind.name} {size} {more} }}"
    )


def guest(
    tmp_path: Path,
    text: str,
    container: str = "",
    *,
    images: Sequence[VerityImage] = (),
    opened: Sequence[OpenVolume] = (),
) -> CompartmentSpec:
    who = Guest(
        GUEST_UUID,
        2 * UID_BASE,
        text_format.Parse(f'name: "web" guest_os: "x" color: 0 {container}', ContainerConfig()),
        text_format.Parse(text, GuestOSConfig()),
        tuple(images) or (image(),),
        pids_max=300,
    )
    return from_guest(who, opened, machine(tmp_path))


def test_a_guest_may_have_as_many_processes_as_the_policy_says(tmp_path: Path) -> None:
    assert guest(tmp_path, CORE).pids_max == 300


def guest_refusal(tmp_path: Path, text: str, *, opened: Sequence[OpenVolume] = ()) -> str:
    with pytest.raises(CompartmentRefusal) as caught:
        guest(tmp_path, text, opened=opened)
    return caught.value.code


def requests(text: str, container: str = "") -> tuple[VolumeRequest, ...]:
    return volume_requests(
        text_format.Parse(text, GuestOSConfig()),
        text_format.Parse(f'name: "web" guest_os: "x" color: 0 {container}', ContainerConfig()),
    )


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


@pytest.mark.parametrize("kind", [MountType.DEVICE, MountType.DEVICE_RW, MountType.COPY])
def test_mount_types_that_are_not_offered_are_refused(tmp_path: Path, kind: MountType) -> None:
    assert refusal(tmp_path, CORE + mount(kind)) == "mount-type-unsupported"
    assert guest_refusal(tmp_path, CORE + mount(kind)) == "mount-type-unsupported"


def test_flash_is_refused_because_of_the_interface_that_is_missing(tmp_path: Path) -> None:
    assert guest_refusal(tmp_path, CORE + mount(MountType.FLASH)) == "update-interface-missing"


@pytest.mark.parametrize("kind", [MountType.EMPTY, MountType.OVERLAY_RW])
def test_what_must_be_encrypted_is_never_silently_something_else(tmp_path: Path, kind: MountType) -> None:
    text = CORE + mount(kind, fs_type="ext4")
    assert refusal(tmp_path, text) == "volume-not-open"
    assert guest_refusal(tmp_path, text) == "volume-not-open"
    assert guest_refusal(tmp_path, text, opened=[OpenVolume("other", Path("/dev/dm-0"))]) == "volume-not-open"


@pytest.mark.parametrize(
    ("kind", "fs_type"),
    [
        (MountType.EMPTY, "btrfs"),
        (MountType.OVERLAY_RW, "tmpfs"),
        (MountType.OVERLAY_RW, "squashfs"),
        (MountType.OVERLAY_RO, "ext4"),
        (MountType.SHARED, "ext4"),
    ],
)
def test_a_kind_of_mount_has_its_file_systems(tmp_path: Path, kind: MountType, fs_type: str) -> None:
    assert guest_refusal(tmp_path, CORE + mount(kind, fs_type=fs_type)) == "fs-type-unsupported"


def test_what_stays_in_the_store_is_not_mounted(tmp_path: Path) -> None:
    assert guest(tmp_path, CORE + mount(MountType.STORE_ONLY)).volumes == guest(tmp_path, CORE).volumes


def test_every_kind_of_mount_of_a_guest(tmp_path: Path) -> None:
    text = CORE + "".join(
        (
            mount(MountType.SHARED, name="usr", place="/usr"),
            mount(MountType.OVERLAY_RO, name="opt", place="/opt"),
            mount(MountType.OVERLAY_RW, name="etc", place="/etc", fs_type="ext4"),
            mount(MountType.EMPTY, name="srv", place="/srv/x", fs_type="ext4"),
            mount(MountType.BIND_FILE, name="motd", place="/etc/motd", more=f'image_sha2_256: "{"ab" * 32}"'),
            mount(MountType.BIND_FILE_RW, name="conf", place="/etc/c", more=f'image_sha2_256: "{"cd" * 32}"'),
        )
    )
    images = (image(), image("/usr", MountType.SHARED), image("/opt", MountType.OVERLAY_RO))
    opened = [OpenVolume("etc", Path("/dev/dm-1")), OpenVolume("srv", Path("/dev/dm-2"))]
    spec = guest(tmp_path, text, images=images, opened=opened)
    assert [(str(volume.mount_point), volume.kind, volume.device) for volume in spec.volumes] == [
        ("/", VolumeKind.OVERLAY, None),
        ("/data", VolumeKind.TMPFS, None),
        ("/usr", VolumeKind.VERIFIED, None),
        ("/opt", VolumeKind.OVERLAY_READ_ONLY, None),
        ("/etc", VolumeKind.ENCRYPTED_OVERLAY, Path("/dev/dm-1")),
        ("/srv/x", VolumeKind.ENCRYPTED, Path("/dev/dm-2")),
        ("/etc/motd", VolumeKind.FILE, None),
        ("/etc/c", VolumeKind.FILE_COPY, None),
    ]
    assert spec.volumes[6].file == VerifiedFile("motd", 4096, b"\xab" * 32)
    assert [volume.image for volume in spec.volumes[2:4]] == [*images[1:]]


def test_a_read_only_overlay_at_the_root_is_just_the_image(tmp_path: Path) -> None:
    text = CORE.replace("SHARED_RW", "OVERLAY_RO")
    assert guest(tmp_path, text).volumes[0].kind is VolumeKind.VERIFIED


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (f'image_verity_sha256: "{"ab" * 32}"', "content-hash-missing"),
        (f'image_sha2_256: "{"ab" * 32}" image_size: {16 * MIB + 1}', "file-too-large"),
    ],
)
def test_a_single_file_is_small_and_has_a_hash(tmp_path: Path, more: str, code: str) -> None:
    assert guest_refusal(tmp_path, CORE + mount(MountType.BIND_FILE, more=more)) == code


def test_who_a_guest_is(tmp_path: Path) -> None:
    spec = guest(tmp_path, CORE, 'init_env: "A=own" init_env: "B=c" ram_limit: 64')
    assert (spec.uuid, spec.name, spec.hostname, spec.uid_base) == (GUEST_UUID, "web", "web", 2 * UID_BASE)
    assert spec.argv == ("/sbin/cservice", "init")
    assert spec.env == ("container=trustme", "A=own", "B=c")
    assert spec.memory_max == 64 * MIB
    assert spec.socket_dir == tmp_path / "compartments" / GUEST_UUID / "socket"
    assert spec.console is None
    assert spec.no_new_privs
    # Half of it at most for each file system in memory.
    assert {volume.size for volume in spec.volumes} == {12 * MIB, 32 * MIB}


def test_the_guestos_says_how_much_memory_if_the_container_does_not(tmp_path: Path) -> None:
    assert guest(tmp_path, CORE + "def_ram_limit: 96").memory_max == 96 * MIB


@pytest.mark.parametrize(
    ("asked", "size"),
    [("", 32), ('image_sizes { image_name: "x" image_size: 16 }', 16), (SIZES.format(40), 40)],
)
def test_a_volume_is_as_large_as_the_container_or_else_the_guestos_says(asked: str, size: int) -> None:
    assert requests(
        CORE + mount(MountType.EMPTY, fs_type="ext4", more="def_size: 32 max_size: 40"), asked
    ) == (VolumeRequest("x", size * MIB),)


@pytest.mark.parametrize("size", [0, 9, 41, 2**63])
def test_a_volume_has_a_possible_size(size: int) -> None:
    text = CORE + mount(MountType.EMPTY, fs_type="ext4", more="def_size: 32 max_size: 40")
    with pytest.raises(CompartmentRefusal, match="volume-size-out-of-range"):
        requests(text, SIZES.format(size))


def test_only_encrypted_volumes_are_asked_of_the_vault() -> None:
    assert requests(CORE + mount(MountType.SHARED) + mount(MountType.STORE_ONLY)) == ()
    text = CORE + mount(MountType.OVERLAY_RW, name="b", fs_type="ext4")
    assert [each.name for each in requests(text + mount(MountType.EMPTY, name="a", fs_type="ext4"))] == [
        "b",
        "a",
    ]


@pytest.mark.parametrize("place", ["/proc", "/proc/sys", "/sys/fs", "/dev", "/run", "/run/socket"])
def test_the_managers_mount_points_are_reserved(tmp_path: Path, place: str) -> None:
    assert refusal(tmp_path, CORE.replace('"/data"', f'"{place}"')) == "mount-point-reserved"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('"squashfs"', '"ext4"', "fs-type-unsupported"),
        ('"/data"', '"/"', "spec-malformed"),
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
