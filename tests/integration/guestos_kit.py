# SPDX-License-Identifier: Apache-2.0
"""A small GuestOS for tests: its recipe, a root for it, building and verifying it."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

from trustme_tools.guestos import check, recipe
from trustme_tools.guestos.build import BuiltGuestOs, build_guestos
from trustme_tools.guestos.signing import pki_signer
from trustme_tools.pki.directory import PkiDirectory

EPOCH = 1_700_000_000
RECIPE = """\
version = 1
name = "tiny"
hardware = "x86"
description = "a test"
init_path = "/sbin/init"
[[mounts]]
image_file = "root"
mount_point = "/"
fs_type = "squashfs"
mount_type = "SHARED_RW"
[[mounts]]
image_file = "kernel"
mount_point = "/boot/kernel"
fs_type = "vfat"
mount_type = "FLASH"
"""


def make_root(directory: Path, *, backwards: bool = False) -> Path:
    """Make the same tree in another order and at another time."""
    names = [f"file{number}" for number in range(40)]
    (directory / "sbin").mkdir(parents=True)
    for name in reversed(names) if backwards else names:
        path = directory / name
        path.write_bytes(hashlib.shake_256(name.encode()).digest(20_000))
        path.chmod(0o644)
        os.utime(path, (1, 1_600_000_000 if backwards else 1_500_000_000))
    (directory / "file1").chmod(0o755)
    (directory / "sbin/init").symlink_to("../file1")
    return directory


def build(tmp_path: Path, pki: PkiDirectory, text: str = RECIPE, **options: object) -> BuiltGuestOs:
    root = tmp_path / "root"
    if not root.exists():
        make_root(root)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel" * 1000)
    arguments: dict[str, object] = {"signer": pki_signer(pki), "epoch": EPOCH, "sources": {"kernel": kernel}}
    return build_guestos(recipe.parse(text), root, tmp_path / "store", **(arguments | options))  # type: ignore[arg-type] # the tests' own defaults


def verify(built: BuiltGuestOs, *anchors: Path, dbx: bytes = b"", at: datetime | None = None) -> None:
    found = check.anchors_from(anchors, dbx)
    check.verify(built.config_path, found, at=at or datetime.now(UTC))
