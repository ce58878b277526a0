# SPDX-License-Identifier: Apache-2.0
"""Disk images made by the system's own tools."""

from __future__ import annotations

import subprocess
from pathlib import Path

from trustme_init.storage import layout

MIB = 1024 * 1024
STORE_FIRST = 9
STORE_MIB = 16


def run(*argv: str | Path, text: str = "") -> str:
    done = subprocess.run(
        [str(arg) for arg in argv], input=text, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


def partition(image: Path, script: str) -> None:
    run("sfdisk", "--quiet", "--no-tell-kernel", image, text="label: gpt\n" + script)


def make_disk(image: Path, *, size_mib: int = 384, store: bool = True, data: str = "") -> Path:
    """An ESP, a store with one file in it, and `data`: further lines of sfdisk script."""
    with image.open("wb") as file:
        file.truncate(size_mib * MIB)
    lines = [f'start=1MiB, size=8MiB, type={layout.ESP_TYPE}, name="{layout.ESP_NAME}"']
    if store:
        lines.append(
            f"start={STORE_FIRST}MiB, size={STORE_MIB}MiB, type={layout.STORE_TYPE}, "
            f'name="{layout.STORE_NAME}"'
        )
    partition(image, "\n".join([*lines, data]) + "\n")
    if store:
        content = image.parent / "store-content" / layout.STORE_GUESTOS_DIR
        content.mkdir(parents=True, exist_ok=True)
        (content / "hello").write_text("from the store\n")
        run(
            "mkfs.ext4", "-q", "-F", "-d", content.parent, "-E", f"offset={STORE_FIRST * MIB}",
            image, f"{STORE_MIB * 1024}k",
        )  # fmt: skip
    return image
