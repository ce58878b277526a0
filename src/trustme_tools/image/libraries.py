# SPDX-License-Identifier: Apache-2.0
"""The device's Python libraries, in the versions of requirements/device.txt, for the device's Python.

What has a wheel is downloaded by the host's pip, with the host's configuration. What has none is compiled
in a chroot of the device's Debian release, which has no network: all it needs is downloaded before.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.image import packages
from trustme_tools.image.cache import Cache
from trustme_tools.image.target import SITE
from trustme_tools.tooling import run

COMPILED: Final = ("python-prctl", "tpm2-pytss")
"""Source distributions; everything else must have a wheel."""

BUILD_REQUIREMENTS: Final = (
    "packaging==26.3",
    "pip==26.3",
    "pkgconfig==1.6.0",
    "pycparser==3.12",
    "setuptools==84.2.1",
    "setuptools-scm==10.3.4",
    "wheel==0.48.0",
)

_PLATFORM: Final = (
    "--python-version=3.13",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux2014_x86_64",
    "--only-binary=:all:",
)
_QUIET: Final = ("--disable-pip-version-check", "--quiet")

# The feature API of tpm2-tss is not used, and would bring curl, json-c and their twenty libraries along.
_WITHOUT: Final = ("tss2-fapi", "tss2-policy", "tss2-tcti-spi-helper")

_BUILD_SCRIPT: Final = """\
set -eu
mount --rbind /dev "$1/dev"
exec chroot "$1" /usr/bin/env -i PATH=/usr/bin HOME=/tmp CC=gcc LC_ALL=C.UTF-8 \\
    SOURCE_DATE_EPOCH=0 PIP_CONFIG_FILE=/dev/null \\
    sh -c 'exec python3 "$(echo /in/pip-*.whl)/pip" --disable-pip-version-check --quiet wheel \\
        --no-deps --no-index --find-links /in --wheel-dir /out /in/*.tar.gz'
"""


def read_pins(requirements: Path) -> dict[str, str]:
    """Return name → version of a requirements file that pins everything with `==`."""
    pins = {}
    for line in requirements.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, operator, version = text.partition("==")
        if not operator:
            raise ToolError(f"{requirements.name}: {text} is not pinned with ==", code="not-pinned")
        pins[name] = version
    return pins


def _specifiers(pins: Mapping[str, str], names: Sequence[str]) -> list[str]:
    return [f"{name}=={pins[name]}" for name in names]


def build_wheels(cache: Cache, pins: Mapping[str, str]) -> Path:
    """Return a directory of wheels for what has to be compiled."""
    build_tree = packages.fetch(cache, "build-packages", packages.BUILD)

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache.root, prefix=".chroot-") as name:
            root = Path(name)
            run("cp", ["-a", f"{build_tree}/.", root], purpose="copy the build tree")
            for library in _WITHOUT:
                for description in root.glob(f"usr/lib/*/pkgconfig/{library}.pc"):
                    description.unlink()
            downloads = root / "in"
            for directory in (downloads, root / "out", root / "tmp", root / "dev", root / "proc"):
                directory.mkdir(exist_ok=True)
            _download_sources(downloads, pins)
            command: list[str | Path] = ["--mount", "sh", "-c", _BUILD_SCRIPT, "sh", root]
            if os.geteuid() != 0:
                command.insert(0, "--map-root-user")
            run("unshare", command, purpose="compile the Python libraries that have no wheel")
            for wheel in sorted((root / "out").glob("*.whl")):
                shutil.copy(wheel, target)

    inputs = [_specifiers(pins, COMPILED), BUILD_REQUIREMENTS, packages.versions(build_tree), _BUILD_SCRIPT]
    return cache.get("compiled-wheels", inputs, build)


def _download_sources(target: Path, pins: Mapping[str, str]) -> None:
    # --no-build-isolation would need the build tools in our own environment; pip fetches them for itself.
    run(
        sys.executable,
        [
            *("-m", "pip", "download", *_QUIET, "--no-deps", f"--no-binary={','.join(COMPILED)}"),
            *(f"--dest={target}", *_specifiers(pins, COMPILED)),
        ],
        purpose="download the sources of the Python libraries",
    )
    run(
        sys.executable,
        [
            *("-m", "pip", "download", *_QUIET, *_PLATFORM, f"--dest={target}"),
            *BUILD_REQUIREMENTS,
            *_specifiers(pins, ("cffi", "cryptography")),
        ],
        purpose="download the build tools of the Python libraries",
    )


def install(cache: Cache, pins: Mapping[str, str], *, part: str = "python-libraries") -> Path:
    """Return a tree with the pinned libraries below `SITE`, not compiled to byte code yet."""
    compiled = [name for name in pins if name in COMPILED]
    wheels = build_wheels(cache, pins) if compiled else None

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache.root, prefix=".wheels-") as name:
            downloads = Path(name)
            wanted = _specifiers(pins, [name for name in pins if name not in COMPILED])
            run(
                sys.executable,
                ["-m", "pip", "download", *_QUIET, *_PLATFORM, "--no-deps", f"--dest={downloads}", *wanted],
                purpose="download the Python libraries",
            )
            files = sorted([*downloads.glob("*.whl"), *(wheels.glob("*.whl") if wheels else ())])
            # The platform tag of what we compiled is the build machine's own: plain unpacking fits all.
            site = target / SITE
            site.mkdir(parents=True)
            for wheel in files:
                shutil.unpack_archive(wheel, site, "zip")

    inputs = [dict(pins), wheels.name if wheels else "", _PLATFORM]
    return cache.get(part, inputs, build)
