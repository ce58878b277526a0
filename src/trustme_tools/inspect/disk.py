# SPDX-License-Identifier: Apache-2.0
"""A disk image: its partitions, and the GuestOSes in its store. Only reads, needs no privilege."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from trustme_init.errors import Refusal
from trustme_init.storage import gpt
from trustme_init.storage.layout import (
    DATA_TYPE,
    ESP_TYPE,
    STORE_GUESTOS_DIR,
    STORE_TYPE,
)
from trustme_init.trust.guestos import parse_config
from trustme_init.trust.selection import parse_stem
from trustme_tools.errors import ToolError
from trustme_tools.guestos import check
from trustme_tools.tooling import run

SECTOR_SIZE: Final = 512
_KINDS: Final = {ESP_TYPE: "EFI system", STORE_TYPE: "store", DATA_TYPE: "data"}


def is_disk(path: Path) -> bool:
    """Whether the file has a GPT signature where a disk image has it."""
    with path.open("rb") as file:
        file.seek(SECTOR_SIZE)
        return file.read(len(gpt.SIGNATURE)) == gpt.SIGNATURE


def describe(path: Path) -> dict[str, Any]:
    """Return partitions and GuestOSes of a disk image; ToolError("bad-partition-table")."""
    with path.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        try:
            table = gpt.load(read, sectors=path.stat().st_size // SECTOR_SIZE, sector_size=SECTOR_SIZE)
        except gpt.TableError as exc:
            raise ToolError(
                f"{path} has no sound partition table",
                "build the image again",
                code="bad-partition-table",
                evidence=str(exc),
            ) from exc
    partitions = [
        {
            "number": partition.number,
            "name": partition.name,
            "kind": _KINDS.get(partition.type_guid, "other"),
            "type": str(partition.type_guid),
            "first_byte": table.first_byte(partition),
            "size": table.size_bytes(partition),
        }
        for partition in table.partitions
    ]
    free = sum(extent.sectors for extent in table.free_extents()) * SECTOR_SIZE
    stores = [table.first_byte(entry) for entry in table.partitions if entry.type_guid == STORE_TYPE]
    return {
        "image": path,
        "size": path.stat().st_size,
        "free": free,
        "partitions": partitions,
        "guestos": [guest for first_byte in stores for guest in _guests(path, first_byte)],
    }


def text(facts: dict[str, Any]) -> str:
    """Return the facts for people."""
    lines = [f"{facts['image']}: {_mib(facts['size'])}, {_mib(facts['free'])} free"]
    lines += [
        f"  p{entry['number']} {entry['kind']:12} {entry['name']:18} {_mib(entry['size'])}"
        for entry in facts["partitions"]
    ]
    for guest in facts["guestos"]:
        if "error" in guest:
            lines.append(f"{guest['file']}: {guest['error']}")
        else:
            lines.append(check.text(guest))
    return "\n".join(lines)


def _guests(image: Path, offset: int) -> list[dict[str, Any]]:
    """Return every configuration in the store at `offset`, by e2fsprogs' debugfs."""
    listing = _debugfs(image, offset, f"ls -p /{STORE_GUESTOS_DIR}").decode(errors="replace")
    # /inode/mode/uid/gid/name/size/
    names = sorted(line.split("/")[5] for line in listing.splitlines() if line.count("/") >= 6)
    guests = []
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if suffix != "conf":
            continue
        # Only such a name is one for the device, and only such a name is no syntax for debugfs.
        if parse_stem(stem) is None:
            guests.append({"file": name, "error": "not NAME-VERSION.conf: ignored by the device"})
            continue
        try:
            config = parse_config(_debugfs(image, offset, f"cat /{STORE_GUESTOS_DIR}/{name}"))
            guests.append({"file": name, **check.describe(config)})
        except Refusal as exc:
            guests.append({"file": name, "error": str(exc)})
    return guests


def _debugfs(image: Path, offset: int, request: str) -> bytes:
    return run("debugfs", ["-R", request, f"{image}?offset={offset}"], purpose=f"read the store in {image}")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
