# SPDX-License-Identifier: Apache-2.0
"""Build a GuestOS: images with their hash trees, the signed configuration, the layout of the store.

    STORE/operatingsystems/NAME-VERSION.conf|.sig|.cert
    STORE/operatingsystems/NAME-VERSION/IMAGE.img|IMAGE.hash.img

The directory comes first and the configuration last: a device only sees what has a configuration.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Final

from google.protobuf import text_format

from trustme_init.proto.guestos_pb2 import GuestOSConfig, GuestOSMount, I18NString
from trustme_init.trust.guestos import parse_config
from trustme_tools.errors import ToolError, UsageError
from trustme_tools.guestos import content, images
from trustme_tools.guestos.images import ImageId
from trustme_tools.guestos.recipe import Recipe
from trustme_tools.guestos.signing import Signer, signed
from trustme_tools.publish import PUBLIC, refuse_existing, staged_directory, write_atomic

STORE_DIRECTORY: Final = "operatingsystems"
MIB: Final = 1024 * 1024
VERSION_LIMIT: Final = 2**64 - 1
EPOCH_LIMIT: Final = 2**32 - 1
"""Seconds; a squashfs keeps times in 32 bits."""
_VERITY_TYPES: Final = frozenset({GuestOSMount.SHARED, GuestOSMount.SHARED_RW, GuestOSMount.OVERLAY_RW})


@dataclass(frozen=True, slots=True)
class BuiltGuestOs:
    """What was written, and what identifies it."""

    name: str
    version: int
    config_path: Path
    image_directory: Path
    root_hashes: Mapping[str, str]
    """Image name to root hash (hex)."""
    config_digest: str
    """SHA-256 (hex) of the configuration's bytes, as the boot report shows it."""


def source_date_epoch(environment: Mapping[str, str] = os.environ) -> int:
    """Return SOURCE_DATE_EPOCH, or the current time where it is not set. Seconds."""
    value = environment.get("SOURCE_DATE_EPOCH")
    if value is None:
        return int(time.time())
    if not value.isascii() or not value.isdigit() or int(value) > EPOCH_LIMIT:
        raise UsageError(
            f"SOURCE_DATE_EPOCH is {value!r}",
            f"set it to seconds since 1970, at most {EPOCH_LIMIT}",
            code="bad-epoch",
        )
    return int(value)


def version_from_epoch(epoch: int) -> int:
    """Return the version of a build made at `epoch`: YYYYMMDDHHMMSS (UTC), as GyroidOS counts."""
    return int(f"{datetime.fromtimestamp(epoch, UTC):%Y%m%d%H%M%S}")


def build_guestos(
    recipe: Recipe,
    root: Path,
    store: Path,
    *,
    signer: Signer,
    version: int | None = None,
    epoch: int | None = None,
    sources: Mapping[str, Path] | None = None,
    size_limit: int | None = None,
    allow_expired: bool = False,
    force: bool = False,
    progress: Callable[[str], None] = lambda _text: None,
) -> BuiltGuestOs:
    """Build the GuestOS of `recipe` into `store`.

    `root` becomes the image at "/"; `sources` gives directory (or ready image file) of other images by
    name. `epoch` (seconds, default SOURCE_DATE_EPOCH or now) is every time stamp in the images, and the
    default of `version`. `size_limit`: bytes of all images and hash trees together. ToolError("exists")
    unless `force`, "no-init", "guestos-too-large", and those of `signed`; nothing of a failed build stays.
    """
    moment = source_date_epoch() if epoch is None else epoch
    number = version_from_epoch(moment) if version is None else version
    if not 0 < number <= VERSION_LIMIT:
        raise UsageError(
            f"version {number} is not a positive 64-bit number", "choose another", code="bad-version"
        )
    places = {"": root, **(sources or {})}
    _check_sources(recipe, places)
    label = f"{recipe.name}-{number}"
    config_path = store / STORE_DIRECTORY / f"{label}.conf"
    image_directory = store / STORE_DIRECTORY / label
    refuse_existing(config_path, force=force)
    _require_init(recipe, places)
    config = _config(recipe, number, moment)
    with staged_directory(image_directory, force=force) as staging:
        for mount in recipe.mounts:
            message = config.mounts.add()
            message.CopyFrom(mount.message())
            if mount.has_image:
                progress(f"making image {mount.image_file} ({mount.fs_type}) of {label}")
                source = places["" if mount.mount_point == "/" else mount.image_file]
                identity = ImageId(recipe.name, number, mount.image_file)
                _add_image(message, source, staging, identity, moment)
        _require_size(label, staging, size_limit)
        data = text_format.MessageToString(config).encode()
        # What the device would refuse is never signed.
        parse_config(data)
        signature, chain = signed(signer, data, allow_expired=allow_expired)
        # While files are exchanged there is no configuration: the old GuestOS, none, the new one.
        config_path.unlink(missing_ok=True)
    write_signed(config_path, data, signature, chain)
    return BuiltGuestOs(
        name=recipe.name,
        version=number,
        config_path=config_path,
        image_directory=image_directory,
        root_hashes={
            mount.image_file: mount.image_verity_sha256
            for mount in config.mounts
            if mount.HasField("image_verity_sha256")
        },
        config_digest=hashlib.sha256(data).hexdigest(),
    )


def write_signed(config_path: Path, data: bytes, signature: bytes, chain: bytes) -> None:
    """Write X.sig, X.cert and, last, X.conf."""
    write_atomic(config_path.with_name(f"{config_path.stem}.sig"), signature)
    write_atomic(config_path.with_name(f"{config_path.stem}.cert"), chain)
    write_atomic(config_path, data)


def sign_config(config_path: Path, signer: Signer, *, allow_expired: bool = False) -> None:
    """Sign an existing configuration again; its bytes do not change. Refusal("bad-config"), `signed`."""
    data = config_path.read_bytes()
    # What the device would refuse is never signed.
    parse_config(data)
    signature, chain = signed(signer, data, allow_expired=allow_expired)
    write_atomic(config_path.with_name(f"{config_path.stem}.sig"), signature)
    write_atomic(config_path.with_name(f"{config_path.stem}.cert"), chain)


def _add_image(message: GuestOSMount, source: Path, staging: Path, identity: ImageId, epoch: int) -> None:
    """Make the image and its hash tree in `staging` and enter what identifies them into `message`."""
    image = staging / f"{identity.image}.img"
    images.make_file_system(source, image, message.fs_type, identity, source_date_epoch=epoch)
    image.chmod(PUBLIC)
    message.image_size = image.stat().st_size
    message.image_sha2_256 = images.file_sha256(image)
    if message.mount_type in _VERITY_TYPES:
        hashes = staging / f"{identity.image}.hash.img"
        message.image_verity_sha256 = images.format_verity(image, hashes, identity).hex()
        message.verity_salt = identity.salt().hex()
        hashes.chmod(PUBLIC)


def _config(recipe: Recipe, version: int, epoch: int) -> GuestOSConfig:
    """Return the configuration without its mounts."""
    config = GuestOSConfig(
        name=recipe.name,
        hardware=recipe.hardware,
        version=version,
        init_path=recipe.init_path,
        init_param=recipe.init_param,
        init_env=recipe.init_env,
        description=I18NString(en=recipe.description),
        build_date=f"{datetime.fromtimestamp(epoch, UTC):%Y-%m-%dT%H:%M:%SZ}",
    )
    for name in ("min_ram_limit", "def_ram_limit", "upstream_version", "update_base_url"):
        value = getattr(recipe, name)
        if value is not None:
            setattr(config, name, value)
    return config


def _require_init(recipe: Recipe, places: Mapping[str, Path]) -> None:
    """Refuse a GuestOS that cannot start: its first program must be in one of the images."""
    path = PurePosixPath(recipe.init_path)
    # The mount that covers the path; the one at / covers every path.
    mount = max(
        (mount for mount in recipe.mounts if path.is_relative_to(mount.mount_point)),
        key=lambda mount: len(PurePosixPath(mount.mount_point).parts),
    )
    if mount.has_image and mount.fs_type not in images.FILE_SYSTEMS:
        return  # a ready image; what is in it, only its maker knows
    place = places.get("" if mount.mount_point == "/" else mount.image_file)
    if place is not None and not place.is_dir():
        return  # refused with its reason when the image is to be made of it
    found = place and content.find_file(place, str(path.relative_to(mount.mount_point)))
    if found is None or not found.stat().st_mode & 0o111:
        raise ToolError(
            f"the GuestOS {recipe.name} has no program {recipe.init_path} to start"
            if found is None
            else f"{recipe.init_path}, which the GuestOS {recipe.name} starts, is not executable",
            "put the program there, or name another one: init_path in guestos.toml",
            code="no-init",
            evidence=f"looked in {place}" if place else f"{mount.mount_point} is an empty {mount.fs_type}",
        )


def _require_size(label: str, staging: Path, limit: int | None) -> None:
    sizes = {path.name: path.stat().st_size for path in staging.iterdir()}
    if limit is not None and sum(sizes.values()) > limit:
        parts = ", ".join(f"{name} {size / MIB:.1f}" for name, size in sorted(sizes.items()))
        raise ToolError(
            f"the GuestOS {label} has {sum(sizes.values()) / MIB:.1f} MiB, more than {limit / MIB:.1f}",
            "leave something out of it, or raise the limit (--size-limit; GUESTOS_SIZE_LIMIT in Yocto)",
            code="guestos-too-large",
            evidence=f"MiB: {parts}",
        )


def _check_sources(recipe: Recipe, places: Mapping[str, Path]) -> None:
    needed = {mount.image_file for mount in recipe.mounts if mount.has_image and mount.mount_point != "/"}
    given = set(places) - {""}
    for names, what in ((needed - given, "has no source"), (given - needed, "is not in the recipe")):
        if names:
            raise UsageError(
                f"the image {min(names)} {what}",
                "give --image NAME=PATH for every image of the recipe but the one mounted at /",
                code="image-sources",
            )
