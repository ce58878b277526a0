# SPDX-License-Identifier: Apache-2.0
"""What is in an image directory, whoever built it.

The reference builder makes a directory of its own; Yocto deploys the same names beside many others, as
DEPLOY_DIR_IMAGE (build/tmp/deploy/images/MACHINE).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trustme_tools.errors import ToolError

DISK: Final = "trustme-base.img"
BMAP: Final = "trustme-base.img.bmap"
"""The disk's block map, for `trustme flash` and bmaptool; an image directory may be without."""
UKI: Final = "trustme-base.efi"
PKI: Final = "pki"
MANIFEST: Final = "manifest.json"
MANIFEST_VERSION: Final = 1
NEEDED: Final = (DISK, UKI, PKI, MANIFEST)

_DEPLOYED: Final = ("tmp/deploy/images", "deploy/images", "images", ".")
"""Where machines' deploy directories are, seen from each directory above them."""


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
    """Return the image directory at `path`.

    ToolError: "no-image", "image-not-deployed" (a deploy directory without our image), "bad-manifest",
    "manifest-version".
    """
    missing = [name for name in NEEDED if not (path / name).exists()]
    if missing:
        raise _no_image(path, missing)
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


def _no_image(path: Path, missing: list[str]) -> ToolError:
    dangling = [name for name in missing if (path / name).is_symlink()]
    evidence = f"missing: {', '.join(missing)}"
    if dangling:
        evidence += f"; {', '.join(dangling)}: a link to what is gone"
    if _is_deploy_directory(path):
        return ToolError(
            f"{path} is a deploy directory of Yocto, and trustme-base is not in it",
            "build the image: bitbake trustme-base, or kas build kas/MACHINE.yml",
            code="image-not-deployed",
            evidence=evidence,
        )
    found = [each for each in _deployed_below(path) if (each / MANIFEST).exists()]
    if found:
        remedy = f"name the machine's deploy directory: {', '.join(map(str, found))}"
    else:
        remedy = "build one: trustme image build --out DIR"
    return ToolError(f"{path} is not an image directory", remedy, code="no-image", evidence=evidence)


def _is_deploy_directory(path: Path) -> bool:
    """Whether bitbake deployed images here: it leaves test data, or the kernel's modules, beside each."""
    patterns = ("*.testdata.json", "*.rootfs.manifest", "modules-*.tgz")
    return any(next(path.glob(pattern), None) is not None for pattern in patterns)


def _deployed_below(path: Path) -> list[Path]:
    """Return the machines' directories if `path` is a build directory, or one between."""
    return sorted(each for place in _DEPLOYED for each in (path / place).glob("*") if each.is_dir())
