# SPDX-License-Identifier: Apache-2.0
"""What a compartment is to be: plain values, judged here once, before anything is opened or created.

Rules:
- Of the mount types of a GuestOS three run: SHARED, SHARED_RW and EMPTY on tmpfs. Others are refused.
- Exactly one volume is at "/", and none inside what the manager itself mounts (/proc, /sys, /dev, /run).
- Nothing is taken from the manager's environment.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from trustme_init.compartments.confine import CORE_CAPABILITIES
from trustme_init.errors import CompartmentRefusal
from trustme_init.trust.guestos import MountType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trustme_init.machine import Machine
    from trustme_init.policy import Policy
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
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class VolumeKind(enum.Enum):
    """How a volume is made."""

    VERIFIED = "verified image, read-only"
    OVERLAY = "verified image under a tmpfs overlay"
    TMPFS = "empty tmpfs"


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """One mount of the compartment."""

    kind: VolumeKind
    mount_point: PurePosixPath
    size: int
    """Limit of the tmpfs (or of the overlay's upper layer) in bytes; 0 for a read-only image."""
    image: VerityImage | None = None
    """None for a tmpfs."""


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
    verity = {image.mount_point: image for image in images}
    volumes = [
        _volume(mount, verity.get(mount.mount_point), policy.core_memory_max) for mount in config.mounts
    ]
    return CompartmentSpec(
        uuid=CORE_UUID,
        name=CORE_NAME,
        hostname=CORE_NAME,
        volumes=tuple(sorted(volumes, key=lambda volume: len(volume.mount_point.parts))),
        argv=(config.init_path, *config.init_param),
        env=tuple(config.init_env),
        memory_max=policy.core_memory_max,
        pids_max=policy.core_pids_max,
        socket_dir=machine.compartments / CORE_UUID / "socket",
        console=policy.core_console or machine.core_console,
        log=machine.compartment_log_dir / f"{CORE_NAME}.log",
    )


def _volume(mount: GuestOSMount, image: VerityImage | None, memory_max: int) -> VolumeSpec:
    kind, mount_point, fs_type = MountType(mount.mount_type), mount.mount_point, mount.fs_type
    place = PurePosixPath(mount_point)
    # All of it is memory of the compartment: a full overlay must not be able to take what init needs.
    size = min(mount.def_size * MIB, memory_max // 2)
    if kind == MountType.EMPTY and fs_type == "tmpfs" and place != PurePosixPath("/"):
        return VolumeSpec(VolumeKind.TMPFS, place, size)
    if kind not in (MountType.SHARED, MountType.SHARED_RW):
        raise CompartmentRefusal(
            "mount-type-unsupported",
            "the GuestOS asks for a kind of mount that this version does not offer",
            evidence=f"{mount_point}: type {kind}, {fs_type}",
            remedy="use SHARED, SHARED_RW, or EMPTY with tmpfs",
        )
    if fs_type not in IMAGE_FILE_SYSTEMS:
        raise CompartmentRefusal(
            "fs-type-unsupported",
            "a verified image must be of a read-only file system",
            evidence=f"{mount_point}: {fs_type}",
            remedy=f"build the image as {' or '.join(IMAGE_FILE_SYSTEMS)}",
        )
    if image is None:
        raise _malformed("mounts", f"{mount_point} has no verified image")
    if kind == MountType.SHARED:
        return VolumeSpec(VolumeKind.VERIFIED, place, 0, image)
    return VolumeSpec(VolumeKind.OVERLAY, place, size, image)


def _check_volumes(volumes: Sequence[VolumeSpec]) -> None:
    places = [volume.mount_point for volume in volumes]
    if not places or places[0] != PurePosixPath("/") or len(set(places)) != len(places):
        raise _malformed("mounts", ", ".join(map(str, places)) or "none")
    for volume in volumes:
        if volume.size < 1 and volume.kind is not VolumeKind.VERIFIED:  # to tmpfs, 0 means without a limit
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
