# SPDX-License-Identifier: Apache-2.0
"""Debian packages as plain trees: downloaded and extracted by mmdebstrap, no maintainer script run.

mmdebstrap takes mirror, proxies and keys from the host's configuration. What was used is recorded.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.image.cache import Cache
from trustme_tools.tooling import run

SUITE: Final = "trixie"
PYTHON: Final = "python3.13"

BASE: Final = (
    "e2fsprogs",
    "fdisk",
    "kmod",
    "libcap2",
    "libtss2-esys-3.0.2-0t64",
    "libtss2-mu-4.0.1-0t64",
    "libtss2-rc0t64",
    "libtss2-tcti-device0t64",
    "libtss2-tctildr0t64",
    "linux-image-cloud-amd64",
    "ovmf",
    PYTHON,
    "systemd-boot-efi",
    "systemd-ukify",
)
"""What initramfs, UKI and virtual machine are made from; ukify and OVMF are used as plain data."""

BUILD: Final = (
    "base-files",
    "bash",
    "binutils",
    "coreutils",
    "dash",
    "gcc",
    "libc6-dev",
    "libcap-dev",
    "libtss2-dev",
    "pkg-config",
    "python3-dev",
    PYTHON,
)
"""Compiles the libraries that have no wheel; nothing of it reaches the device."""

_NAME: Final = re.compile(r"([a-z0-9.+-]+)_([^_]+)_(?:amd64|all)\.deb")
_MERGED: Final = ("bin", "lib", "lib64", "sbin")


def fetch(cache: Cache, name: str, packages: Sequence[str], *, suite: str = SUITE) -> Path:
    """Return a tree that holds `packages` and their dependencies, with merged /usr."""

    def build(target: Path) -> None:
        archive = target / "tree.tar"
        # The list has to be taken by a hook: afterwards mmdebstrap has emptied apt's cache.
        run(
            "mmdebstrap",
            [
                "--quiet",
                "--variant=extract",
                "--format=tar",
                f"--include={','.join(packages)}",
                '--extract-hook=ls "$1"/var/cache/apt/archives > "$1"/packages.txt',
                suite,
                archive,
            ],
            purpose=f"fetch the packages of {name}",
        )
        run(
            "tar",
            ["-C", target, "--no-same-owner", "--exclude=./dev/*", "-xf", archive],
            purpose=f"unpack the packages of {name}",
        )
        archive.unlink()
        for directory in _MERGED:
            link = target / directory
            if not link.exists() and (target / "usr" / directory).is_dir():
                link.symlink_to(f"usr/{directory}")
        if not versions(target):
            raise ToolError(f"mmdebstrap fetched nothing for {name}", "run it by hand", code="no-packages")

    return cache.get(name, [suite, sorted(packages)], build)


def versions(tree: Path) -> dict[str, str]:
    """Return package → version of a fetched tree."""
    found = {}
    for line in (tree / "packages.txt").read_text().splitlines():
        if match := _NAME.fullmatch(line):
            found[match[1]] = match[2].replace("%3a", ":")
    return dict(sorted(found.items()))


def kernel_version(tree: Path) -> str:
    """Return the one kernel release in a fetched tree."""
    found = sorted(path.name for path in (tree / "usr/lib/modules").iterdir())
    if len(found) != 1:
        raise ToolError(
            f"expected one kernel, found {', '.join(found) or 'none'}",
            code="kernel-count",
            evidence=str(tree),
        )
    return found[0]


def clean_tree(tree: Path, remove: Sequence[str]) -> None:
    """Remove paths (relative to `tree`); a path that is not there is fine."""
    for name in remove:
        path = tree / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
