# SPDX-License-Identifier: Apache-2.0
"""The raw disk image, and small changes to a finished one. Nothing here needs root or a loop device.

Layout: p1 EFI system partition (FAT32), p2 the store (ext4), then free space for the data volume that
the device makes itself at its first boot.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid5

from trustme_init.storage.layout import (
    ESP_NAME,
    ESP_TYPE,
    MIB,
    STORE_NAME,
    STORE_TYPE,
)
from trustme_tools.errors import ToolError
from trustme_tools.tooling import run

ESP_SIZE: Final = 160 * MIB
"""Room for two UKIs of the largest size allowed, so that one can be replaced safely."""
STORE_SIZE: Final = 256 * MIB
DATA_SPACE: Final = 512 * MIB
GPT_SPACE: Final = MIB
"""At both ends, for partition table and alignment."""

BOOT_FILE: Final = "EFI/BOOT/BOOTX64.EFI"
"""What firmware starts on a disk it has no boot entry for (UEFI 2.10, section 3.5.1.1)."""

_NAMESPACE: Final = UUID("7b1d2f0e-54a6-4f8e-8a51-6ad1d1a3c3f0")


@dataclass(frozen=True, slots=True)
class Region:
    """Where a partition lies, in bytes."""

    offset: int
    size: int


def _identity(name: str) -> str:
    """Return the same identifier for the same thing in every build."""
    return str(uuid5(_NAMESPACE, name))


def create(
    image: Path, uki: Path, store: Path, *, data_space: int = DATA_SPACE, store_size: int = STORE_SIZE
) -> None:
    """Make a (sparse) disk image with `uki` as its boot file and the tree `store` in the store."""
    size = GPT_SPACE + ESP_SIZE + store_size + data_space + GPT_SPACE
    image.unlink(missing_ok=True)
    with image.open("xb") as file:
        file.truncate(size)
    table = (
        f"label: gpt\nlabel-id: {_identity('disk')}\nunit: sectors\nsector-size: 512\n"
        f"start=1MiB, size={ESP_SIZE // MIB}MiB, type={ESP_TYPE}, name={ESP_NAME}, uuid={_identity('esp')}\n"
        f"size={store_size // MIB}MiB, type={STORE_TYPE}, name={STORE_NAME}, uuid={_identity('store')}\n"
    )
    run("sfdisk", ["--quiet", image], purpose="partition the image", stdin=table.encode())
    esp = partition(image, ESP_NAME)
    run(
        "mkfs.vfat",
        [
            # Small clusters: with fewer than 65525 of them the file system would count as FAT16.
            *("-F", "32", "-s", "2", "-n", "BOOT", "--invariant"),
            *("--offset", str(esp.offset // 512), image, str(esp.size // 1024)),
        ],
        purpose="format the boot partition",
    )
    replace_esp_file(image, uki)
    _format_store(image, store)


def partition(image: Path, name: str) -> Region:
    """Return where the partition called `name` lies; ToolError("no-partition") if there is none."""
    report = json.loads(run("sfdisk", ["--json", image], purpose="read the partition table"))
    table = report["partitiontable"]
    unit = int(table.get("sectorsize", 512))
    for entry in table["partitions"]:
        if entry.get("name") == name:
            return Region(entry["start"] * unit, entry["size"] * unit)
    raise ToolError(f"{image.name} has no partition {name}", "is this an image of ours?", code="no-partition")


def replace_esp_file(image: Path, content: Path | None, path: str = BOOT_FILE) -> None:
    """Put `content` at `path` of the boot partition; None removes what is there."""
    where = f"{image}@@{partition(image, ESP_NAME).offset}"
    if content is None:
        run("mdel", ["-i", where, f"::{path}"], purpose="remove a file from the boot partition")
        return
    parent = ""
    for part in path.split("/")[:-1]:
        parent = f"{parent}/{part}"
        # -D s: an existing directory is left as it is.
        try:
            run("mmd", ["-D", "s", "-i", where, f"::{parent}"], purpose="make a directory for the boot file")
        except ToolError as error:
            if "exists" not in error.evidence and error.evidence:
                raise
    run("mcopy", ["-o", "-i", where, content, f"::{path}"], purpose="copy the boot file")


def edit_store(image: Path, change: Callable[[Path], None]) -> None:
    """Let `change` work on a copy of the store's tree, then make the store anew from it."""
    with tempfile.TemporaryDirectory(prefix="trustme-store-") as name:
        tree = Path(name) / "tree"
        read_store(image, tree)
        change(tree)
        _format_store(image, tree)


def read_store(image: Path, target: Path) -> None:
    """Copy the store's tree to `target`."""
    target.mkdir()
    region = partition(image, STORE_NAME)
    request = f"rdump / {target}"
    run("debugfs", ["-R", request, f"{image}?offset={region.offset}"], purpose="read the store")
    shutil.rmtree(target / "lost+found", ignore_errors=True)


def _format_store(image: Path, tree: Path) -> None:
    region = partition(image, STORE_NAME)
    _punch(image, region)
    run(
        "mke2fs",
        [
            *("-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096"),
            *("-O", "^has_journal,^resize_inode,^metadata_csum_seed,^orphan_file", "-I", "256"),
            *("-L", STORE_NAME, "-U", _identity("store-fs")),
            *("-E", f"offset={region.offset},root_owner=0:0,hash_seed={_identity('hash')},nodiscard"),
            *("-d", tree, image, f"{region.size // 1024}k"),
        ],
        purpose="format the store",
        # mke2fs stamps everything with this time.
        environment={"E2FSPROGS_FAKE_TIME": "1"},
    )


def _punch(image: Path, region: Region) -> None:
    """Make a region of the image a hole again."""
    run(
        "fallocate",
        ["--punch-hole", "--offset", str(region.offset), "--length", str(region.size), image],
        purpose="clear the store",
    )


def copy(image: Path, target: Path) -> None:
    """Copy an image, sharing blocks where the file system can and keeping holes."""
    run("cp", ["--reflink=auto", "--sparse=always", image, target], purpose="copy the image")
