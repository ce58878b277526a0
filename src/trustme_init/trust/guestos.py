# SPDX-License-Identifier: Apache-2.0
"""From the three files of a GuestOS to a configuration that may be acted upon.

Rules:
- Sizes, then the signer's chain, then the signature over the raw bytes, then revocation of those bytes, and
  only then the parser: no byte is interpreted that no anchor vouches for.
- What is signed is still held to a strict form: the signer may err, and every name here becomes a path, a
  mount or an argument of something privileged.
- An identity is one: the name and version the files are filed under are those in the signed text, and the
  hardware is this device's. A configuration is not good for another name, version or machine.
- Content is named by hash. Mounted images have a dm-verity root hash; other files from the store have a
  SHA-256; `image_sha1` is carried and never used. The root file system is always a verified image.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from trustme_init.errors import TrustRefusal
from trustme_init.trust.selection import NAME_PATTERN, GuestOsId
from trustme_init.trust.verity import BLOCK_SIZE, SALT_LIMIT, VerityParameters, with_superblock_salt

if TYPE_CHECKING:
    from trustme_init.proto.guestos_pb2 import GuestOSConfig, GuestOSMount
    from trustme_init.trust.anchors import AnchorSet, Revocations
    from trustme_init.trust.chain import VerifiedSigner

CONFIG_LIMIT: Final = 256 * 1024
"""Bytes of a configuration. Upstream ones have 1-4 KiB; the rest is room for an icon."""
IMAGE_LIMIT: Final = 2**40
"""Bytes of an image: 1 TiB, far below where any product of sizes leaves 64 bits."""
MOUNT_LIMIT: Final = 64
ENTRY_LIMIT: Final = 256
"""Entries of `init_param` and of `init_env`."""
TEXT_LIMIT: Final = 4096
"""Characters of a path, an argument or a description (PATH_MAX)."""

_NAME: Final = re.compile(NAME_PATTERN)
_IMAGE_FILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FS_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SALT: Final = re.compile(rf"(?:[0-9a-f]{{2}}){{0,{SALT_LIMIT}}}")
_ENVIRONMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_REMEDY: Final = "correct the configuration and sign it again (`trustme guestos sign`)"


class MountType(IntEnum):
    """GuestOSMount.Type, importable without protobuf."""

    SHARED = 1
    DEVICE = 2
    DEVICE_RW = 3
    EMPTY = 4
    COPY = 5
    FLASH = 6
    OVERLAY_RO = 7
    SHARED_RW = 8
    OVERLAY_RW = 9
    BIND_FILE = 10
    BIND_FILE_RW = 11
    STORE_ONLY = 12


VERITY_TYPES: Final = frozenset({MountType.SHARED, MountType.SHARED_RW, MountType.OVERLAY_RO})
"""Mounted read-only from the store (a writable layer above does not change that): dm-verity, always."""
HASHED_TYPES: Final = frozenset(
    {MountType.COPY, MountType.FLASH, MountType.BIND_FILE, MountType.BIND_FILE_RW, MountType.STORE_ONLY}
)
"""Taken from the store in another way: a SHA-256 of the file, or a dm-verity root hash."""


@dataclass(frozen=True, slots=True)
class VerityImage:
    """A mount whose content is named by a signed dm-verity root hash. Sizes in bytes."""

    image_file: str
    """Plain name; the files are `<image_file>.img` and `<image_file>.hash.img`."""
    mount_point: str
    fs_type: str
    mount_type: MountType
    data_size: int
    root_hash: bytes
    salt: bytes | None
    """None if the configuration does not sign it: then the superblock is asked, see `parameters`."""

    def parameters(self, superblock: bytes | None = None) -> VerityParameters:
        """Return what dm-verity is told; `superblock` (512 bytes) is used only if the salt is not signed.

        TrustRefusal: "salt-missing", "bad-superblock", "superblock-mismatch".
        """
        if self.salt is not None:
            return VerityParameters(self.root_hash, self.salt, self.data_size // BLOCK_SIZE)
        if superblock is None:
            raise TrustRefusal(
                "salt-missing",
                "the configuration does not sign the salt of an image, and there is no superblock",
                evidence=self.image_file,
                remedy=_REMEDY,
            )
        return with_superblock_salt(superblock, root_hash=self.root_hash, data_size=self.data_size)


@dataclass(frozen=True, slots=True)
class VerifiedGuestOs:
    """A configuration that an anchor vouches for, and that is well-formed."""

    guest_os: GuestOsId
    config: GuestOSConfig
    """The parsed message, for what this module does not interpret; treat as read-only."""
    images: tuple[VerityImage, ...]
    """The entries of `mounts` that have a root hash, in order."""
    setup_images: tuple[VerityImage, ...]
    """Likewise of `mounts_setup`: another root file system, never to be mixed with `images`."""
    signer: VerifiedSigner
    config_digest: bytes
    """SHA-256 of the raw configuration: what is measured."""


def verify_guestos(
    config: bytes,
    signature: bytes,
    certificate: bytes,
    anchors: AnchorSet,
    *,
    at: datetime,
    hardware: str,
    file_stem: str | None,
) -> VerifiedGuestOs:
    """Judge the bytes of a GuestOS's `.conf`, `.sig` and `.cert`.

    `file_stem` is what the files are called without suffix, `<name>-<version>`; None only where there are no
    files yet (a pushed configuration).
    TrustRefusal: "config-size", those of `verify_chain` and `verify_signature`, "config-revoked",
    "image-revoked", "bad-config" (evidence: the field), "wrong-hardware", "wrong-identity".
    """
    from trustme_init.trust.certificate import load
    from trustme_init.trust.chain import verify_chain
    from trustme_init.trust.signature import verify_signature

    if not 0 < len(config) <= CONFIG_LIMIT:
        raise TrustRefusal(
            "config-size",
            "the configuration is empty or too large",
            evidence=f"{len(config)} bytes, at most {CONFIG_LIMIT}",
            remedy=_REMEDY,
        )
    signer = verify_chain(certificate, anchors, at=at)
    verify_signature(load(signer.leaf_der), signature, config)
    digest = hashlib.sha256(config).digest()
    if anchors.revocations.lists_digest(digest):
        raise TrustRefusal(
            "config-revoked",
            "the configuration is revoked in dbx",
            evidence=f"sha256 {digest.hex()}",
            remedy="install a newer version of the GuestOS",
        )
    message = parse_config(config)
    guest_os = GuestOsId(message.name, message.version)
    if file_stem is not None and guest_os.stem != file_stem:
        raise TrustRefusal(
            "wrong-identity",
            "the configuration is filed under another name or version than it is signed for",
            evidence=f"filed as {ascii(file_stem)[1:-1][:100]}, signed as {guest_os.stem}",
            remedy="copy the GuestOS to the store again, under its own name",
        )
    if message.hardware != hardware:
        raise TrustRefusal(
            "wrong-hardware",
            "the configuration is for other hardware",
            evidence=f"configuration {message.hardware}, device {hardware}",
            remedy="install the GuestOS that was built for this hardware",
        )
    _refuse_revoked([*message.mounts, *message.mounts_setup], anchors.revocations)
    return VerifiedGuestOs(
        guest_os=guest_os,
        config=message,
        images=images_of(message.mounts),
        setup_images=images_of(message.mounts_setup),
        signer=signer,
        config_digest=digest,
    )


def parse_config(config: bytes) -> GuestOSConfig:
    """Parse and validate a configuration **whose signature has been verified**; "bad-config" otherwise."""
    from trustme_init.proto.guestos_pb2 import GuestOSConfig
    from trustme_init.trust.textform import parse

    message = GuestOSConfig()
    try:
        parse(config, message)
    except ValueError as exc:
        raise _bad(str(exc)) from exc
    if not message.IsInitialized():
        raise _bad("a required field is missing")
    _validate(message)
    return message


def _validate(message: GuestOSConfig) -> None:
    _match("name", message.name, _NAME)
    _match("hardware", message.hardware, _NAME)
    if not message.version:
        raise _bad("version: 0")
    _path("init_path", message.init_path)
    _texts("init_param", message.init_param)
    _texts("init_env", message.init_env)
    for entry in message.init_env:
        _match("init_env", entry, _ENVIRONMENT)
    _unique("init_env", (entry.partition("=")[0] for entry in message.init_env))
    description = message.description, message.description_long
    for field in (text for each in description for text in (each.en, each.de, each.fr)):
        _text("description", field)
    for name in ("upstream_version", "build_date", "update_base_url"):
        value = getattr(message, name)
        _text(name, value)
        if not value.isprintable():
            raise _bad(f"{name}: {value!r}")
    _mounts("mounts", message.mounts)
    if message.mounts_setup:
        _mounts("mounts_setup", message.mounts_setup)


def _mounts(field: str, mounts: Sequence[GuestOSMount]) -> None:
    """Validate one list of mounts, and normalise their mount points in place."""
    if len(mounts) > MOUNT_LIMIT:
        raise _bad(f"{field}: {len(mounts)} entries, at most {MOUNT_LIMIT}")
    points = []
    root = None
    for mount in mounts:
        kind = MountType(mount.mount_type)
        _mount(f"{field} {ascii(mount.image_file)[:100]}", mount)
        _content(f"{field} {mount.image_file}", mount, kind)
        if kind is MountType.STORE_ONLY:
            continue
        points.append(mount.mount_point)
        if mount.mount_point == "/":
            root = kind
    _unique(f"{field}.mount_point", points)
    _unique(f"{field}.image_file", (mount.image_file for mount in mounts))
    if root not in VERITY_TYPES:
        raise _bad(f"{field}: exactly one image with a root hash must be mounted at /")


def _mount(field: str, mount: GuestOSMount) -> None:
    """Validate what becomes a name, a path or an option."""
    _match(f"{field}.image_file", mount.image_file, _IMAGE_FILE)
    if mount.image_file.endswith(".hash"):
        raise _bad(f"{field}.image_file: its image would be another one's hash tree")
    if len(mount.mount_point) > 1:
        # Upstream writes "/data/"; one trailing slash means nothing.
        mount.mount_point = mount.mount_point.removesuffix("/")
    _path(f"{field}.mount_point", mount.mount_point)
    _match(f"{field}.fs_type", mount.fs_type, _FS_TYPE)
    _text(f"{field}.mount_data", mount.mount_data)


def _content(field: str, mount: GuestOSMount, kind: MountType) -> None:
    """Validate what names the content of an image: hashes, salt and size."""
    for name in ("image_verity_sha256", "image_sha2_256"):
        if mount.HasField(name):
            _match(f"{field}.{name}", getattr(mount, name), _SHA256)
    has_root_hash = mount.HasField("image_verity_sha256")
    if kind in VERITY_TYPES and not has_root_hash:
        raise _bad(f"{field}: no image_verity_sha256")
    if kind in HASHED_TYPES and not (has_root_hash or mount.HasField("image_sha2_256")):
        raise _bad(f"{field}: neither image_verity_sha256 nor image_sha2_256")
    if mount.HasField("verity_salt"):
        _match(f"{field}.verity_salt", mount.verity_salt, _SALT)
        if not has_root_hash:
            raise _bad(f"{field}: verity_salt without image_verity_sha256")
    if kind in VERITY_TYPES | HASHED_TYPES or has_root_hash or mount.HasField("image_size"):
        _size(field, mount.image_size, BLOCK_SIZE if has_root_hash else 1)


def _size(field: str, size: int, unit: int) -> None:
    if not 0 < size <= IMAGE_LIMIT or size % unit:
        raise _bad(f"{field}.image_size: {size} is no multiple of {unit} up to {IMAGE_LIMIT}")


def images_of(mounts: Iterable[GuestOSMount]) -> tuple[VerityImage, ...]:
    """Return the verity images among the mounts of a **verified** configuration, in order."""
    return tuple(_image(mount) for mount in mounts if mount.HasField("image_verity_sha256"))


def _image(mount: GuestOSMount) -> VerityImage:
    return VerityImage(
        image_file=mount.image_file,
        mount_point=mount.mount_point,
        fs_type=mount.fs_type,
        mount_type=MountType(mount.mount_type),
        data_size=mount.image_size,
        root_hash=bytes.fromhex(mount.image_verity_sha256),
        salt=bytes.fromhex(mount.verity_salt) if mount.HasField("verity_salt") else None,
    )


def _refuse_revoked(mounts: Iterable[GuestOSMount], revocations: Revocations) -> None:
    for mount in mounts:
        for digest in (mount.image_verity_sha256, mount.image_sha2_256):
            if digest and revocations.lists_digest(bytes.fromhex(digest)):
                raise TrustRefusal(
                    "image-revoked",
                    "an image is revoked in dbx",
                    evidence=f"{mount.image_file}: {digest}",
                    remedy="install a newer version of the GuestOS",
                )


def _match(field: str, value: str, pattern: re.Pattern[str]) -> None:
    if not pattern.fullmatch(value):
        raise _bad(f"{field}: {ascii(value)[:100]}")


def _text(field: str, value: str) -> None:
    if len(value) > TEXT_LIMIT or "\0" in value:
        raise _bad(f"{field}: too long, or has a NUL")


def _texts(field: str, values: Sequence[str]) -> None:
    if len(values) > ENTRY_LIMIT:
        raise _bad(f"{field}: {len(values)} entries, at most {ENTRY_LIMIT}")
    for value in values:
        _text(field, value)


def _path(field: str, value: str) -> None:
    """Accept `/` and absolute paths of plain, printable components."""
    _text(field, value)
    if value == "/":
        return
    parts = value.removeprefix("/").split("/")
    if not value.startswith("/") or not value.isprintable() or not {"", ".", ".."}.isdisjoint(parts):
        raise _bad(f"{field}: {ascii(value)[:100]} is no absolute, normalised path")


def _unique(field: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise _bad(f"{field}: {ascii(value)[:100]} twice")
        seen.add(value)


def _bad(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "bad-config",
        "the signed GuestOS configuration is not acceptable",
        evidence=evidence[:400],
        remedy=_REMEDY,
    )
