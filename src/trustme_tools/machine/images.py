# SPDX-License-Identifier: Apache-2.0
"""What is in an image directory, whoever built it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trustme_tools.errors import ToolError

DISK: Final = "trustme-base.img"
UKI: Final = "trustme-base.efi"
PKI: Final = "pki"
MANIFEST: Final = "manifest.json"
MANIFEST_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class ImageDirectory:
    """Paths of a complete image directory, and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def disk(self) -> Path:
        """The raw disk."""
        return self.path / DISK

    @property
    def uki(self) -> Path:
        """The signed UKI."""
        return self.path / UKI

    @property
    def pki(self) -> Path:
        """The PKI directory."""
        return self.path / PKI


def load(path: Path) -> ImageDirectory:
    """Return the image directory at `path`; ToolError("no-image", "bad-manifest", "manifest-version")."""
    missing = [name for name in (DISK, UKI, PKI, MANIFEST) if not (path / name).exists()]
    if missing:
        raise ToolError(
            f"{path} is not an image directory",
            "build one: trustme image build --out DIR",
            code="no-image",
            evidence=f"missing: {', '.join(missing)}",
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except ValueError as exc:
        raise ToolError(
            f"{path / MANIFEST} is not a manifest",
            "build the image again",
            code="bad-manifest",
            evidence=str(exc),
        ) from exc
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        raise ToolError(
            f"{path / MANIFEST} does not have version {MANIFEST_VERSION}, the one this program reads",
            "build the image again",
            code="manifest-version",
        )
    return ImageDirectory(path.resolve(), manifest)
