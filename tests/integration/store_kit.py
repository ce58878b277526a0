# SPDX-License-Identifier: Apache-2.0
"""Small signed GuestOSes: images of a few blocks with veritysetup's hash trees, and a PKI on P-256."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.trust import pki
from trustme_init.guestos.operations import GuestOsOperations, Users
from trustme_init.guestos.plan import directory_url
from trustme_init.guestos.store import SignedFiles
from trustme_init.linux.files import write_all
from trustme_init.trust.anchors import AnchorSet, Purpose

BLOCK = 4096
CORE = "trustme-coreos"
NAME = "exampleos"
Sign = Callable[[bytes], tuple[bytes, bytes]]


@cache
def authority() -> pki.Issued:
    """Return the CA of GuestOSes."""
    return pki.issue(pki.ROOT)


@cache
def leaf() -> pki.Issued:
    """Return who signs them."""
    return pki.issue(pki.LEAF, authority())


def sign(config: bytes, by: pki.Issued | None = None) -> tuple[bytes, bytes]:
    """Return signature and chain."""
    signer = by or leaf()
    return signer.key.sign(config, ec.ECDSA(hashes.SHA512())), pki.bundle(signer)


@cache
def tree(image: bytes) -> tuple[bytes, str, str]:
    """Return hash image, root hash and salt of an image, by veritysetup."""
    with tempfile.TemporaryDirectory() as directory:
        data, hash_image = Path(directory, "data"), Path(directory, "hash")
        data.write_bytes(image)
        told = subprocess.run(
            ["veritysetup", "format", data, hash_image], check=True, capture_output=True, text=True
        ).stdout
        found = dict(re.findall(r"^(Root hash|Salt):\s+([0-9a-f]+)$", told, re.MULTILINE))
        return hash_image.read_bytes(), found["Root hash"], found["Salt"]


@cache
def content(blocks: int, seed: str = "root") -> bytes:
    """Return an image of so many blocks, the same in every call."""
    return hashlib.shake_256(seed.encode()).digest(blocks * BLOCK)


@dataclass(frozen=True)
class Made:
    """A signed GuestOS and the files it names."""

    name: str
    version: int
    signed: SignedFiles
    files: Mapping[str, bytes]

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.version}"

    def serve(self, root: Path, base: str = "updates") -> Path:
        """Put the files where a base URL of `base` below `root` has them; return their folder."""
        folder = Path(directory_url(str(root / base), self.stem))
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder


def make(
    version: int = 1,
    *,
    name: str = NAME,
    base_url: str = "",
    verity: Mapping[str, bytes] | None = None,
    hashed: Mapping[str, bytes] | None = None,
    salted: bool = True,
    hardware: str = "x86",
    more: str = "",
    signer: Sign = sign,
) -> Made:
    """Make a GuestOS; the image at / is `verity["root"]`."""
    verity = {"root": content(5)} if verity is None else verity
    files: dict[str, bytes] = {}
    lines = [
        f'name: "{name}" hardware: "{hardware}" version: {version}',
        'description { en: "an example" } init_path: "/sbin/init"',
    ]
    if base_url:
        lines.append(f'update_base_url: "{base_url}"')
    for image, data in verity.items():
        hash_image, root_hash, salt = tree(data)
        files[f"{image}.hash.img"], files[f"{image}.img"] = hash_image, data
        place = "/" if image == "root" else f"/{image}"
        lines.append(
            f'mounts {{ image_file: "{image}" mount_point: "{place}" fs_type: "squashfs"'
            f' mount_type: SHARED_RW image_size: {len(data)} image_verity_sha256: "{root_hash}"'
            + (f' verity_salt: "{salt}"' if salted else "")
            + " }"
        )
    for image, data in (hashed or {}).items():
        files[f"{image}.img"] = data
        lines.append(
            f'mounts {{ image_file: "{image}" mount_point: "/{image}" fs_type: "none" mount_type: STORE_ONLY'
            f' image_size: {len(data)} image_sha2_256: "{hashlib.sha256(data).hexdigest()}" }}'
        )
    config = ("\n".join([*lines, more]) + "\n").encode()
    return Made(name, version, SignedFiles(config, *signer(config)), files)


@dataclass
class Judge:
    """By whose word GuestOSes are judged, to be changed by a test."""

    authorities: tuple[pki.Issued, ...] = field(default_factory=lambda: (authority(),))

    def anchors(self, purpose: Purpose) -> AnchorSet:
        assert purpose is Purpose.GUEST
        return pki.anchors(*self.authorities, purpose=Purpose.GUEST)

    def now(self) -> datetime:
        return pki.NOW


def operations(home: Path, users: Users = lambda: (), judge: Judge | None = None) -> GuestOsOperations:
    """Return the vault's operations on a store below `home`."""
    return GuestOsOperations(home, judge or Judge(), "x86", CORE, users)


def install(vault: GuestOsOperations, made: Made) -> None:
    """Install without any process: put the files where they would have been fetched to."""
    plan = vault.stage(made.signed, repair=False)
    if not plan["installed"]:
        images = vault.store.path / f".staging-{made.stem}" / "images"
        for name, data in made.files.items():
            if not (images / name).exists() or (images / name).stat().st_size != len(data):
                write(images / name, data)
        vault.publish(made.stem)


def write(path: Path, data: bytes) -> None:
    """Write a file by calls that `power` counts."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


Snapshot = dict[str, tuple[int, bytes | None]]


def snapshot(home: Path) -> Snapshot:
    """Return every path below `home` with its mode and content."""
    found: Snapshot = {}
    for path in sorted(home.rglob("*")):
        data = None
        if path.is_symlink():
            data = os.fsencode(path.readlink())
        elif path.is_file():
            data = path.read_bytes()
        found[str(path.relative_to(home))] = (path.lstat().st_mode, data)
    return found
