# SPDX-License-Identifier: Apache-2.0
"""What a compartment is to be: plain values, judged here once, before anything is opened or created.

Rules:
- What a mount of a GuestOS becomes is one table, `_KINDS`, keyed by its type; what is not in it is refused.
- Writable and lasting is only what is encrypted and authenticated; the core has no such volumes, because at
  its start no token can be asked for a key.
- Exactly one volume is at "/", and none inside what the manager itself mounts (/proc, /sys, /dev, /run).
- Nothing is taken from the manager's environment.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from trustme_init.compartments.confine import CORE_CAPABILITIES
from trustme_init.compartments.devices import Devices
from trustme_init.compartments.devices import from_container as devices_of
from trustme_init.compartments.network import Network
from trustme_init.compartments.network import from_container as network_of
from trustme_init.compartments.volumes import FILE_SYSTEM, OpenVolume, VolumeRequest
from trustme_init.errors import CompartmentRefusal
from trustme_init.trust.guestos import MountType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trustme_init.machine import Machine
    from trustme_init.policy import Policy
    from trustme_init.proto.container_pb2 import ContainerConfig
    from trustme_init.proto.guestos_pb2 import GuestOSConfig, GuestOSMount
    from trustme_init.trust.guestos import VerifiedGuestOs, VerityImage

CORE_UUID: Final = "00000000-0000-0000-0000-000000000000"
CORE_NAME: Final = "core0"
UID_BASE: Final = 524288
UID_COUNT: Final = 65536
MIB: Final = 1024 * 1024

IMAGE_FILE_SYSTEMS: Final = ("squashfs", "erofs")
"""Read-only by design, and idmappable."""
RESERVED: Final = ("/proc", "/sys", "/dev", "/run")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_CPUS: Final = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?){0,63}", re.ASCII)
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class VolumeKind(enum.Enum):
    """How a volume is made."""

    VERIFIED = "verified image, read-only"
    OVERLAY = "verified image under a tmpfs overlay"
    OVERLAY_READ_ONLY = "verified image over what is at its mount point, read-only"
    TMPFS = "empty tmpfs"
    ENCRYPTED = "encrypted ext4"
    ENCRYPTED_OVERLAY = "encrypted ext4 as the writable layer over what is at its mount point"
    FILE = "verified file, read-only"
    FILE_COPY = "private, passing copy of a verified file"


READ_ONLY_KINDS: Final = frozenset({VolumeKind.VERIFIED, VolumeKind.OVERLAY_READ_ONLY})
DEVICE_KINDS: Final = frozenset({VolumeKind.ENCRYPTED, VolumeKind.ENCRYPTED_OVERLAY})
FILE_KINDS: Final = frozenset({VolumeKind.FILE, VolumeKind.FILE_COPY})

FILE_LIMIT: Final = 16 * MIB
"""Bytes of a file that is bound into a container: its copy is memory."""
VOLUME_MIN: Final = 10
"""MiB of an encrypted volume: the format's own least size, and twice what ext4's journal takes."""


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A file of a GuestOS whose content is named by a signed SHA-256."""

    image_file: str
    """Plain name; the file is `<image_file>.img`."""
    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """One mount of the compartment."""

    kind: VolumeKind
    mount_point: PurePosixPath
    size: int
    """Limit of the tmpfs (or of the overlay's upper layer), or size of the volume, in bytes; 0 where nothing
    can be written."""
    image: VerityImage | None = None
    """Of the kinds that show a verified image."""
    device: Path | None = None
    """Of the encrypted kinds: the mapped block device with their file system."""
    file: VerifiedFile | None = None
    """Of the file kinds."""


@dataclass(frozen=True, slots=True)
class CompartmentSpec:
    """Everything `start` needs to know."""

    uuid: str
    name: str
    hostname: str
    volumes: tuple[VolumeSpec, ...]
    """The root first, then parents before children."""
    argv: tuple[str, ...]
    env: tuple[str, ...]
    """KEY=value, exactly what init gets."""
    memory_max: int
    """Bytes."""
    pids_max: int
    socket_dir: Path
    """Host directory that appears read-only at /run/socket."""
    console: Path | None = None
    """Terminal for fds 0-2; without one stdin is /dev/null and the rest goes to `log`."""
    log: Path | None = None
    uid_base: int = UID_BASE
    uid_count: int = UID_COUNT
    capabilities: frozenset[str] = CORE_CAPABILITIES
    no_new_privs: bool = True
    cpus: str = ""
    """Processors as a list ("0-1,3"), empty for all."""
    cpu_percent: int = 0
    """Of one processor; 0 for no limit but fairness."""
    delegated: bool = False
    """May make cgroups of its own below its group."""
    time_namespace: bool = False
    """Its boot-time and monotonic clocks begin with it."""
    strict_calls: bool = False
    """No system call but those that programs of a container need."""
    network: Network = field(default_factory=Network)
    """Besides loopback."""
    devices: Devices = field(default_factory=Devices)
    """Besides what is harmless."""

    def __post_init__(self) -> None:
        if not _UUID.fullmatch(self.uuid):
            raise _malformed("uuid", self.uuid)
        for key in (self.name, self.hostname):
            if not _NAME.fullmatch(key):
                raise _malformed("name", key)
        if not self.argv or not self.argv[0].startswith("/"):
            raise _malformed("init_path", " ".join(self.argv))
        if any("\0" in text for text in (*self.argv, *self.env)):
            raise _malformed("init_param or init_env", "NUL")
        keys = [entry.partition("=")[0] for entry in self.env if "=" in entry]
        if len(set(keys)) != len(self.env) or "" in keys:
            raise _malformed("init_env", " ".join(self.env))
        if self.cpus and not _CPUS.fullmatch(self.cpus):
            raise _malformed("assign_cpus", self.cpus)
        if self.uid_base < UID_COUNT or self.uid_count < 1:
            raise _malformed("uid range", f"{self.uid_base}+{self.uid_count}")
        _check_volumes(self.volumes)


def from_guestos(verified: VerifiedGuestOs, policy: Policy, machine: Machine) -> CompartmentSpec:
    """Return the core compartment of a verified GuestOS; see `from_config`."""
    return from_config(verified.config, verified.images, policy, machine)


def from_config(
    config: GuestOSConfig, images: Sequence[VerityImage], policy: Policy, machine: Machine
) -> CompartmentSpec:
    """Return the core compartment of a configuration that was verified, and of its verified images.

    Limits and console come from the signed policy, the rest from the signed configuration.
    CompartmentRefusal: "mount-type-unsupported", "fs-type-unsupported", "mount-point-reserved",
    "spec-malformed".
    """
    return CompartmentSpec(
        uuid=CORE_UUID,
        name=CORE_NAME,
        hostname=CORE_NAME,
        volumes=_volumes(config, images, {}, policy.core_memory_max),
        argv=(config.init_path, *config.init_param),
        env=tuple(config.init_env),
        memory_max=policy.core_memory_max,
        pids_max=policy.core_pids_max,
        socket_dir=machine.compartments / CORE_UUID / "socket",
        console=policy.core_console or machine.core_console,
        log=machine.compartment_log_dir / f"{CORE_NAME}.log",
    )


@dataclass(frozen=True, slots=True)
class Guest:
    """A container beside the core: who it is, and its two configurations, both judged already."""

    uuid: str
    uid_base: int
    """First user id of its range, which is its own and UID_COUNT long."""
    container: ContainerConfig
    guest_os: GuestOSConfig
    images: tuple[VerityImage, ...]
    pids_max: int
    """Processes and threads, from the signed policy."""


def volume_requests(guest_os: GuestOSConfig, container: ContainerConfig) -> tuple[VolumeRequest, ...]:
    """Return the encrypted volumes that a container needs, and how large each is to be.

    The size is the container's (`image_sizes`, MB), else the GuestOS's (`def_size`, MB).
    CompartmentRefusal: "volume-size-out-of-range", and of `from_guest` those for mounts.
    """
    asked = {each.image_name: each.image_size for each in container.image_sizes}
    requests = []
    for mount in guest_os.mounts:
        if _kind(mount) not in DEVICE_KINDS:
            continue
        mib, highest = mount.def_size, max(mount.max_size, mount.def_size)
        if mount.image_file in asked:
            mib = asked[mount.image_file]
        if not VOLUME_MIN <= mib <= highest:
            raise CompartmentRefusal(
                "volume-size-out-of-range",
                "a volume of this size is not possible",
                evidence=f"{mount.image_file}: {mib} MB, possible {VOLUME_MIN} to {highest}",
                remedy="correct image_sizes in the container's configuration",
            )
        requests.append(VolumeRequest(mount.image_file, mib * MIB))
    return tuple(requests)


def from_guest(guest: Guest, opened: Sequence[OpenVolume], machine: Machine) -> CompartmentSpec:
    """Return a container's compartment; `opened` are the volumes of `volume_requests`, open.

    CompartmentRefusal: "mount-type-unsupported", "fs-type-unsupported", "update-interface-missing" (FLASH),
    "content-hash-missing", "file-too-large", "mount-point-reserved", "volume-not-open", "spec-malformed",
    and those of `network.from_container` and `devices.from_container`.
    """
    container, guest_os = guest.container, guest.guest_os
    memory_max = (container.ram_limit or guest_os.def_ram_limit) * MIB
    devices = {volume.name: volume.device for volume in opened}
    return CompartmentSpec(
        uuid=guest.uuid,
        name=container.name,
        hostname=container.name,
        volumes=_volumes(guest_os, guest.images, devices, memory_max),
        argv=(guest_os.init_path, *guest_os.init_param),
        env=_environment(guest_os.init_env, container.init_env),
        memory_max=memory_max,
        pids_max=guest.pids_max,
        socket_dir=machine.compartments / guest.uuid / "socket",
        log=machine.compartment_log_dir / f"{guest.uuid}.log",
        uid_base=guest.uid_base,
        cpus=container.assign_cpus,
        delegated=True,
        time_namespace=True,
        strict_calls=True,
        devices=devices_of(container),
        network=network_of(container, (guest.uid_base - UID_BASE) // UID_COUNT),
    )


def _environment(*layers: Iterable[str]) -> tuple[str, ...]:
    """Join lists of KEY=value; of one key the last one counts."""
    found: dict[str, str] = {}
    for layer in layers:
        found |= {entry.partition("=")[0]: entry for entry in layer}
    return tuple(found.values())


_KINDS: Final = {
    MountType.SHARED: VolumeKind.VERIFIED,
    MountType.SHARED_RW: VolumeKind.OVERLAY,
    MountType.OVERLAY_RO: VolumeKind.OVERLAY_READ_ONLY,
    MountType.OVERLAY_RW: VolumeKind.ENCRYPTED_OVERLAY,
    MountType.EMPTY: VolumeKind.ENCRYPTED,
    MountType.BIND_FILE: VolumeKind.FILE,
    MountType.BIND_FILE_RW: VolumeKind.FILE_COPY,
}
"""EMPTY is a tmpfs where its fs_type says so. STORE_ONLY is nothing."""
_FILE_SYSTEMS: Final = {
    **dict.fromkeys((VolumeKind.VERIFIED, VolumeKind.OVERLAY), IMAGE_FILE_SYSTEMS),
    VolumeKind.OVERLAY_READ_ONLY: IMAGE_FILE_SYSTEMS,
    **dict.fromkeys(DEVICE_KINDS, (FILE_SYSTEM,)),
}
"""A verified image must be read-only by design. What is not listed needs none."""


def _kind(mount: GuestOSMount) -> VolumeKind | None:
    """Return what a mount becomes, None for what stays in the store."""
    kind = MountType(mount.mount_type)
    evidence = f"{mount.mount_point}: type {kind.name}, {mount.fs_type}"
    if kind is MountType.STORE_ONLY:
        return None
    if kind is MountType.FLASH:
        raise CompartmentRefusal(
            "update-interface-missing",
            "the GuestOS wants to write to the boot medium, and this version has no interface for that",
            evidence=evidence,
            remedy="take the FLASH mount out of the GuestOS; install base system updates as an image",
        )
    if kind not in _KINDS:
        raise CompartmentRefusal(
            "mount-type-unsupported",
            "the GuestOS asks for a kind of mount that this version does not offer",
            evidence=evidence,
            remedy=f"use one of {', '.join(each.name for each in _KINDS)}",
        )
    if kind is MountType.EMPTY and mount.fs_type == "tmpfs":
        return VolumeKind.TMPFS
    made = _KINDS[kind]
    allowed = _FILE_SYSTEMS.get(made)
    if allowed is not None and mount.fs_type not in allowed:
        raise CompartmentRefusal(
            "fs-type-unsupported",
            "this kind of mount cannot have this file system",
            evidence=evidence,
            remedy=f"use {' or '.join(allowed)}",
        )
    return made


def _volumes(
    config: GuestOSConfig, images: Sequence[VerityImage], devices: Mapping[str, Path], memory_max: int
) -> tuple[VolumeSpec, ...]:
    """Return the root first, then parents before children; mounts of the same place in their order."""
    verity = {image.mount_point: image for image in images}
    volumes = [
        _volume(kind, mount, verity.get(mount.mount_point), devices, memory_max)
        for mount in config.mounts
        if (kind := _kind(mount)) is not None
    ]
    return tuple(sorted(volumes, key=lambda volume: len(volume.mount_point.parts)))


def _volume(
    kind: VolumeKind,
    mount: GuestOSMount,
    image: VerityImage | None,
    devices: Mapping[str, Path],
    memory_max: int,
) -> VolumeSpec:
    place = PurePosixPath(mount.mount_point)
    if kind in DEVICE_KINDS:
        device = devices.get(mount.image_file)
        if device is None:
            raise CompartmentRefusal(
                "volume-not-open",
                "an encrypted volume of the compartment is not open",
                evidence=f"{mount.mount_point}: {mount.image_file}",
                remedy="only containers with a key can have encrypted volumes; the core has none",
            )
        return VolumeSpec(kind, place, 0, device=device)
    if kind in FILE_KINDS:
        return VolumeSpec(kind, place, 0, file=_file(mount))
    # All of it is memory of the compartment: a full overlay must not be able to take what init needs.
    size = min(mount.def_size * MIB, memory_max // 2)
    if kind is VolumeKind.TMPFS:
        return VolumeSpec(kind, place, size)
    if image is None:
        raise _malformed("mounts", f"{mount.mount_point} has no verified image")
    if kind is VolumeKind.OVERLAY_READ_ONLY and place == PurePosixPath("/"):
        kind = VolumeKind.VERIFIED  # nothing is below the root
    return VolumeSpec(kind, place, size if kind is VolumeKind.OVERLAY else 0, image)


def _file(mount: GuestOSMount) -> VerifiedFile:
    if not mount.image_sha2_256:
        raise CompartmentRefusal(
            "content-hash-missing",
            "a single file must be signed with its SHA-256",
            evidence=f"{mount.mount_point}: {mount.image_file}",
            remedy="give its image_sha2_256 in the GuestOS configuration",
        )
    if mount.image_size > FILE_LIMIT:
        raise CompartmentRefusal(
            "file-too-large",
            "a single file that a container is given is copied to memory",
            evidence=f"{mount.image_file}: {mount.image_size} bytes, at most {FILE_LIMIT}",
            remedy="put large files into an image of their own",
        )
    return VerifiedFile(mount.image_file, mount.image_size, bytes.fromhex(mount.image_sha2_256))


def _check_volumes(volumes: Sequence[VolumeSpec]) -> None:
    places = [volume.mount_point for volume in volumes]
    if not places or places[0] != PurePosixPath("/") or len(set(places)) != len(places):
        raise _malformed("mounts", ", ".join(map(str, places)) or "none")
    for volume in volumes:
        # To tmpfs, 0 means without a limit.
        if volume.size < 1 and volume.kind in {VolumeKind.TMPFS, VolumeKind.OVERLAY}:
            raise _malformed("mounts", f"{volume.mount_point} has no size")
    for place in places[1:]:
        if not place.is_absolute() or ".." in place.parts:
            raise _malformed("mounts", str(place))
        if any(place.is_relative_to(reserved) for reserved in RESERVED):
            raise CompartmentRefusal(
                "mount-point-reserved",
                "a GuestOS cannot mount over what the manager provides",
                evidence=str(place),
                remedy=f"choose a mount point outside {', '.join(RESERVED)}",
            )


def _malformed(key: str, value: str) -> CompartmentRefusal:
    return CompartmentRefusal(
        "spec-malformed",
        f"the compartment's {key} is not acceptable",
        evidence=ascii(value),
        remedy="correct the GuestOS configuration and sign it again",
    )
