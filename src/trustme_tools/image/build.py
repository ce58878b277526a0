# SPDX-License-Identifier: Apache-2.0
"""Build the reference image directory, the same four things that a Yocto build deploys.

trustme-base.img   raw disk     trustme-base.efi   the signed UKI
pki/               certificates manifest.json      what they are made of

Beside the disk lies its block map, trustme-base.img.bmap, for whoever writes it to a medium.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from trustme_init import policy as device_policy
from trustme_tools.cli.verbs import progress
from trustme_tools.errors import ToolError, UsageError
from trustme_tools.flash import bmap
from trustme_tools.flash.source import map_file
from trustme_tools.guestos import content
from trustme_tools.guestos import recipe as recipes
from trustme_tools.guestos.build import BuiltGuestOs, build_guestos, version_from_epoch
from trustme_tools.guestos.signing import CORE_SIGNER, KeySigner
from trustme_tools.image import disk, initramfs, libraries, modules, packages, uki
from trustme_tools.image.cache import Cache, digest_file, digest_tree
from trustme_tools.machine.images import BMAP, DISK, MANIFEST, MANIFEST_VERSION, PKI, UKI
from trustme_tools.pki import create as pki_create
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.publish import staged_directory, write_atomic

UKI_SIGNER: Final = "DB"
UKI_LIMIT: Final = 64 * 1024 * 1024
DEFAULT_EPOCH: Final = 1735689600
"""2025-01-01: time stamp of everything that comes from packages, so that it stays the same."""


def checkout() -> Path:
    """Return the root of the source tree that this program runs from."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "recipes/core/guestos.toml").is_file():
        raise ToolError(
            "the reference image is built from a source checkout",
            "run it in a checkout, or name one with --source",
            code="no-checkout",
            evidence=str(root),
        )
    return root


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen about an image."""

    development: bool = True
    version: str = "0.1.0"
    epoch: int | None = None
    """Build date in seconds, the device's clock floor; None for the start of today, so that a build of
    the same day is the same."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """Policy keys to set, dotted: {"core.start_timeout_s": 5}."""
    download_anchors: bytes = b""
    """Certificate authorities (PEM) of the servers that GuestOS images may be fetched from."""
    extra_modules: tuple[str, ...] = ()
    command_line: tuple[str, ...] = uki.COMMAND_LINE
    init: bytes = initramfs.INIT
    data_space: int = disk.DATA_SPACE

    @property
    def build_epoch(self) -> int:
        """Seconds since 1970."""
        return int(time.time()) // 86400 * 86400 if self.epoch is None else self.epoch


def policy_text(options: Options, recipe: recipes.Recipe) -> bytes:
    """Return the signed policy file; PolicyRefusal if the device would refuse it."""
    built = datetime.fromtimestamp(options.build_epoch, UTC)
    document: dict[str, Any] = {
        "version": device_policy.POLICY_VERSION,
        "development": options.development,
        "build_date": built,
        "hardware": recipe.hardware,
        "core": {
            "guest_os": recipe.name,
            "console": "/dev/hvc1",
            "start_timeout_s": 120,
            "memory_max_mib": recipe.def_ram_limit or 512,
            "pids_max": 256,
        },
        "platform": {"allow_insecure_boot": False, "allow_missing_tpm": False},
        "devices": {"timeout_s": 60, "modules": [*modules.DEVICE_MODULES, *options.extra_modules]},
        "provisioning": {
            "require": ["device-certificate", "token"]
            if options.development
            else list(device_policy.REQUIREMENTS),
            "device_key": "ecc-p256",
            "pin_tries": 10,
            "self_provisioning": options.development,
        },
        "containers": {
            "allow_unsigned_configs": options.development,
            "start_timeout_s": 300,
            "pids_max": 1024,
        },
    }
    for key, value in options.policy.items():
        table, _, name = key.rpartition(".")
        place = document.setdefault(table, {}) if table else document
        if not isinstance(place, dict) or "." in table:
            raise UsageError(f"the policy has no key {key}", "give KEY or TABLE.KEY", code="bad-policy-key")
        place[name] = value
    text = _toml(document).encode()
    device_policy.parse(text)
    return text


def _toml(document: Mapping[str, Any]) -> str:
    """Write a document of scalars, lists and one level of tables."""
    lines = [f"{key} = {_value(value)}" for key, value in document.items() if not isinstance(value, dict)]
    for name, table in document.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%SZ}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def development_pki(cache: Cache, out: Path, pki: Path | None) -> Path:
    """Return the PKI to use: the one named, the one in `out`, or development keys that stay the same."""
    if pki is not None:
        return pki
    if (out / PKI / "DB.key").exists():
        return out / PKI

    def build(target: Path) -> None:
        pki_create.create(target / PKI, development=True, progress=progress)

    return cache.get("development-pki", [list(pki_create.NAMES)], build) / PKI


def build_image(
    out: Path,
    *,
    cache: Cache,
    options: Options,
    pki_path: Path | None = None,
    source: Path | None = None,
    passphrase: bytes | None = None,
) -> dict[str, Any]:
    """Build the image directory `out` (replaced in one step) and return its manifest.

    ToolError("not-an-image") if `out` is there and holds anything else: replacing would delete that.
    """
    started = time.monotonic()
    _refuse_other_directory(out)
    root = source or checkout()
    device_package = root / "src/trustme_init"
    pins = libraries.read_pins(root / "requirements/device.txt")
    recipe = recipes.load(root / "recipes/core/guestos.toml")
    policy = policy_text(options, recipe)
    if not options.development and pki_path is None:
        raise ToolError("a release image needs its own keys", "give --pki DIR", code="release-needs-pki")
    pki = PkiDirectory(development_pki(cache, out, pki_path))
    if pki.is_development and not options.development:
        raise ToolError(
            "a release image cannot be signed with development keys",
            "make keys with `trustme pki create` and a passphrase",
            code="development-keys",
        )
    tree = packages.fetch(cache, "base-packages", packages.BASE)
    installed = libraries.install(cache, pins)
    base = initramfs.base(
        cache, tree, installed, extra_modules=options.extra_modules, timestamp=DEFAULT_EPOCH
    )
    core_root = content.build_root(cache, recipe, root / "recipes/core/files", device_package)
    with staged_directory(out, force=True) as staging:
        work = staging / "work"
        work.mkdir()
        initramfs.product(
            tree,
            device_package,
            policy,
            work / "product.cpio.zst",
            timestamp=DEFAULT_EPOCH,
            init=options.init,
            download_anchors=options.download_anchors,
        )
        uki.assemble(
            tree,
            [base / "initramfs.cpio.zst", work / "product.cpio.zst"],
            work / "unsigned.efi",
            version=options.version,
            command_line=options.command_line,
        )
        uki.sign(
            work / "unsigned.efi",
            staging / UKI,
            key_pem=pki.key_pem(UKI_SIGNER, passphrase),
            certificate=pki.certificate_path(UKI_SIGNER),
        )
        if (staging / UKI).stat().st_size > UKI_LIMIT:
            raise ToolError("the UKI is larger than 64 MiB", code="uki-too-large")
        store, built = _core_store(cache, recipe, core_root, pki=pki, options=options, passphrase=passphrase)
        disk.create(staging / DISK, staging / UKI, store, data_space=options.data_space)
        write_atomic(staging / BMAP, bmap.render(map_file(staging / DISK)))
        copy_pki(pki, staging / PKI, private_keys=options.development)
        manifest = {
            "version": MANIFEST_VERSION,
            "image": "trustme-base",
            "image_version": options.version,
            "development": options.development,
            "build_date": f"{datetime.fromtimestamp(options.build_epoch, UTC):%Y-%m-%dT%H:%M:%SZ}",
            "builder": "reference",
            "hardware": recipe.hardware,
            "kernel": packages.kernel_version(tree),
            "command_line": " ".join(options.command_line),
            "core": built,
            "files": {
                DISK: {"size": (staging / DISK).stat().st_size},
                UKI: initramfs.describe(staging / UKI),
            },
            "initramfs": {
                "base": initramfs.describe(base / "initramfs.cpio.zst"),
                "product": initramfs.describe(work / "product.cpio.zst"),
            },
            "source": digest_tree(device_package, suffixes=(".py",)),
            "packages": packages.versions(tree),
            "python": dict(pins),
            "policy": policy.decode(),
        }
        shutil.rmtree(work)
        write_atomic(staging / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")
    progress(f"image complete in {time.monotonic() - started:.1f} s: {out}")
    return manifest


def copy_pki(pki: PkiDirectory, target: Path, *, private_keys: bool) -> None:
    """Copy the certificates to `target`, and the keys where they are public anyway: tests sign with them."""
    shutil.copytree(pki.path, target, ignore=None if private_keys else shutil.ignore_patterns("*.key"))


def _refuse_other_directory(out: Path) -> None:
    if not os.path.lexists(out):
        return
    foreign = (
        {path.name for path in out.iterdir()} - {DISK, BMAP, UKI, PKI, MANIFEST}
        if out.is_dir()
        else {out.name}
    )
    if foreign:
        raise ToolError(
            f"{out} is not an image directory, and it would be replaced",
            "name a new directory, or one that holds an image and nothing else",
            code="not-an-image",
            evidence=f"found: {', '.join(sorted(foreign)[:4])}",
        )


def _core_store(
    cache: Cache,
    recipe: recipes.Recipe,
    root: Path,
    *,
    pki: PkiDirectory,
    options: Options,
    passphrase: bytes | None,
) -> tuple[Path, dict[str, Any]]:
    """Return the store's tree with the signed core GuestOS, and what identifies that."""
    version = version_from_epoch(options.build_epoch)
    facts: dict[str, Any] = {}

    def build(target: Path) -> None:
        signer = KeySigner(pki.key(CORE_SIGNER, passphrase), tuple(pki.chain(CORE_SIGNER)))
        guest: BuiltGuestOs = build_guestos(
            recipe,
            root,
            target / "store",
            signer=signer,
            version=version,
            epoch=options.build_epoch,
            progress=progress,
        )
        facts.update(
            name=guest.name,
            version=guest.version,
            config_sha256=guest.config_digest,
            root_hashes=dict(guest.root_hashes),
        )
        (target / "facts.json").write_text(json.dumps(facts))

    inputs = [
        *(root.parent.name, version, options.build_epoch, repr(recipe)),
        *(digest_file(pki.certificate_path(CORE_SIGNER)), digest_file(pki.key_path(CORE_SIGNER))),
    ]
    entry = cache.get(f"{recipe.name}-signed", inputs, build)
    return entry / "store", json.loads((entry / "facts.json").read_text())
