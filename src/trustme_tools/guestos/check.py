# SPDX-License-Identifier: Apache-2.0
"""Judge a GuestOS with the device's own code, and read every block of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.firmware.secureboot import parse_database
from trustme_init.proto.guestos_pb2 import GuestOSConfig, GuestOSMount
from trustme_init.trust.anchors import AnchorSet, Purpose, Revocations, anchor_set
from trustme_init.trust.guestos import VerifiedGuestOs, parse_config, verify_guestos
from trustme_init.trust.verity import SUPERBLOCK_SIZE
from trustme_tools.errors import ToolError
from trustme_tools.guestos import images
from trustme_tools.uefi.keys import load_certificate

_FILE_LIMIT: Final = 1024 * 1024
"""Bytes read of .conf, .sig and .cert; the device's own limits are lower and judge the content."""


def anchors_from(
    certificates: Sequence[Path], dbx: bytes = b"", *, purpose: Purpose = Purpose.CORE
) -> AnchorSet:
    """Return anchors as the device builds them of db (the first certificate of each file) and dbx."""
    ders = [load_certificate(path).public_bytes(Encoding.DER) for path in certificates]
    revocations = Revocations.from_dbx(parse_database(dbx))
    return anchor_set(purpose, ders, revocations, source="the anchors given")


def verify(
    config_path: Path,
    anchors: AnchorSet,
    *,
    at: datetime,
    hardware: str | None = None,
    progress: Callable[[str], None] = lambda _text: None,
) -> VerifiedGuestOs:
    """Verify configuration, signature, chain and every image of a GuestOS in a store.

    `hardware` is the device's; without it the configuration's own is taken. Refusals of the device's code
    pass through; ToolError("image-missing", "image-damaged", "file-unreadable").
    """
    config, signature, certificate = (
        _read(config_path.with_name(f"{config_path.stem}.{suffix}")) for suffix in ("conf", "sig", "cert")
    )
    # Only to name the hardware: verify_guestos parses again, after the signature.
    stated = hardware if hardware is not None else parse_config(config).hardware
    verified = verify_guestos(
        config, signature, certificate, anchors, at=at, hardware=stated, file_stem=config_path.stem
    )
    directory = config_path.with_name(config_path.stem)
    by_name = {image.image_file: image for image in (*verified.images, *verified.setup_images)}
    for mount in (*verified.config.mounts, *verified.config.mounts_setup):
        if not (mount.HasField("image_verity_sha256") or mount.HasField("image_sha2_256")):
            continue
        progress(f"reading image {mount.image_file}")
        data = directory / f"{mount.image_file}.img"
        _check_file(data, mount)
        if mount.image_file in by_name:
            hashes = directory / f"{mount.image_file}.hash.img"
            _require(hashes)
            parameters = by_name[mount.image_file].parameters(_read(hashes)[:SUPERBLOCK_SIZE])
            images.verify_verity(data, hashes, parameters.root_hash.hex(), parameters.salt.hex())
    return verified


def describe(config: GuestOSConfig) -> dict[str, Any]:
    """Return what a person wants to know of a configuration; nothing in it is verified."""
    return {
        "name": config.name,
        "version": config.version,
        "hardware": config.hardware,
        "description": config.description.en,
        "build_date": config.build_date,
        "init": [config.init_path, *config.init_param],
        "init_env": list(config.init_env),
        "mounts": [
            {
                "image_file": mount.image_file,
                "mount_point": mount.mount_point,
                "fs_type": mount.fs_type,
                "mount_type": GuestOSMount.Type.Name(mount.mount_type),
                "image_size": mount.image_size,
                "root_hash": mount.image_verity_sha256,
                "salt": mount.verity_salt,
                "sha256": mount.image_sha2_256,
            }
            for mount in config.mounts
        ],
    }


def text(facts: dict[str, Any]) -> str:
    """Return the facts of `describe` for people."""
    lines = [
        f"{facts['name']} version {facts['version']} for {facts['hardware']}: {facts['description']}",
        f"  built {facts['build_date'] or 'at an unknown time'}, starts {' '.join(facts['init'])}",
    ]
    for mount in facts["mounts"]:
        size = f"{mount['image_size'] / 2**20:.1f} MiB" if mount["image_size"] else ""
        lines.append(
            f"  {mount['mount_point']:10} {mount['mount_type']:10} {mount['fs_type']:9} "
            f"{mount['image_file']} {size}".rstrip()
        )
        if mount["root_hash"]:
            lines.append(f"             root hash {mount['root_hash']}")
    return "\n".join(lines)


def load_config(path: Path) -> GuestOSConfig:
    """Parse a configuration file for showing; Refusal("bad-config") if it is not well-formed."""
    return parse_config(_read(path))


def _check_file(path: Path, mount: GuestOSMount) -> None:
    _require(path)
    size = path.stat().st_size
    if size != mount.image_size:
        raise _damaged(path, f"{size} bytes, signed: {mount.image_size}")
    if mount.HasField("image_sha2_256"):
        digest = images.file_sha256(path)
        if digest != mount.image_sha2_256:
            raise _damaged(path, f"sha256 {digest}, signed: {mount.image_sha2_256}")


def _require(path: Path) -> None:
    if not path.is_file():
        raise ToolError(f"{path} is missing", "copy it to its place", code="image-missing")


def _damaged(path: Path, evidence: str) -> ToolError:
    return ToolError(
        f"{path} is not what is signed",
        "copy the image again, or build it again",
        code="image-damaged",
        evidence=evidence,
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_LIMIT)
    except OSError as exc:
        raise ToolError(
            f"{path} cannot be read: {exc.strerror}",
            "name a configuration in a store; .sig and .cert lie beside it",
            code="file-unreadable",
        ) from exc
