# SPDX-License-Identifier: Apache-2.0
"""An enrolment stick: a FAT file system with signed updates where firmware and boot programs look for them.

    keys/NAME.auth, NAME.esl        for KeyTool (efitools) and the firmware's own menu
    loader/keys/auto/NAME.auth      for systemd-boot, which offers "Enroll Secure Boot keys: auto"
    loader/loader.conf              whether systemd-boot waits for a person (manual) or not (force)
    EFI/BOOT/BOOTX64.EFI            the program itself, where one was named

Rules:
- Every update is checked before it is copied: it holds the list beside it, and it is signed by the key that
  the specification names (PK and KEK by PK, db and dbx by KEK), among those that are enrolled with it. A set
  that does not fit together would leave the machine half enrolled.
- PK-remove.auth stays away. With it anybody who has the stick, or root on the machine, can end Secure Boot.
"""

from __future__ import annotations

import tempfile
from enum import Enum
from pathlib import Path
from typing import Final
from uuid import UUID

from trustme_init.firmware.secureboot import parse_database
from trustme_init.storage.layout import ESP_TYPE, MIB
from trustme_tools.errors import ToolError
from trustme_tools.publish import refuse_existing, staged_directory, sync_directory, write_new
from trustme_tools.tooling import run
from trustme_tools.uefi.enrolment import differ, read_directory
from trustme_tools.uefi.show import entries, text
from trustme_tools.uefi.update import SIGNED_BY, parse_update, verify_update

IMAGE_SIZE: Final = 64 * MIB
"""FAT32 needs 65525 clusters; with one sector each this is enough, and any stick is larger."""

_REQUIRED: Final = ("PK", "KEK", "db")
_LABEL: Final = "ENROL"
_PARTITION: Final = UUID("5d0b6a4e-2c1f-4a57-9c3b-7a1f0e6d2b84")
_PE: Final = b"MZ"


class Enrol(Enum):
    """What systemd-boot does with the keys it finds (loader.conf(5), secure-boot-enroll)."""

    MANUAL = "manual"
    """A menu entry."""
    IF_SAFE = "if-safe"
    """By itself in a virtual machine, else a menu entry."""
    FORCE = "force"
    """By itself everywhere in setup mode, after 15 seconds."""


def write_esp(
    enrolment: Path,
    out: Path,
    *,
    loader: Path | None = None,
    enrol: Enrol = Enrol.MANUAL,
    tree: bool = False,
    force: bool = False,
) -> list[str]:
    """Write the stick as a disk image, or with `tree` as a directory to be copied; returns its file names.

    ToolError: "not-an-enrolment", "lists-differ", "not-an-update", "update-not-valid", "not-an-efi-program",
    "exists".
    """
    content = _content(enrolment, loader, enrol)
    if tree:
        with staged_directory(out, force=force) as staging:
            _write_tree(staging, content)
    else:
        refuse_existing(out, force=force)
        _write_image(out, content)
    return sorted(content)


def _content(enrolment: Path, loader: Path | None, enrol: Enrol) -> dict[str, bytes]:
    """Return path on the stick to content."""
    lists = read_directory(enrolment) if enrolment.is_dir() else {}
    present = [name for name in SIGNED_BY if name in lists or (enrolment / f"{name}.auth").exists()]
    content: dict[str, bytes] = {}
    for name in dict.fromkeys((*_REQUIRED, *present)):
        path = enrolment / f"{name}.auth"
        if name not in lists or not path.exists():
            raise ToolError(
                f"{enrolment} has no complete set of signed updates",
                "make one with `trustme uefi auth`",
                code="not-an-enrolment",
                evidence=f"no {name}.auth with {name}.esl",
            )
        data = path.read_bytes()
        if parse_update(data).payload != lists[name]:
            raise differ(path)
        verify_update(name, data, parse_database(lists[SIGNED_BY[name]]).certificates)
        content[f"keys/{name}.auth"] = content[f"loader/keys/auto/{name}.auth"] = data
        content[f"keys/{name}.esl"] = lists[name]
    shown = text({name: entries(lists[name]) for name in SIGNED_BY if name in lists})
    content["keys/README.txt"] = _readme(shown)
    content["loader/loader.conf"] = f"timeout 10\nsecure-boot-enroll {enrol.value}\n".encode()
    if loader is not None:
        content["EFI/BOOT/BOOTX64.EFI"] = _program(loader)
    return content


def _program(path: Path) -> bytes:
    data = path.read_bytes()
    if not data.startswith(_PE):
        raise ToolError(
            f"{path} is not an EFI program",
            "name systemd-bootx64.efi, or KeyTool.efi of efitools",
            code="not-an-efi-program",
        )
    return data


def _readme(shown: str) -> bytes:
    words = (
        "Secure Boot keys to enrol. Put the machine into setup mode, then enrol db, dbx if there is one,\n"
        "KEK, and PK last, which ends setup mode. Compare with what you expect to trust:\n\n"
    )
    return f"{words}{shown}\n".encode("ascii", errors="replace")


def _write_tree(root: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, data)


def _write_image(out: Path, content: dict[str, bytes]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".new", dir=out.parent) as temporary:
        image, root = Path(temporary, "image"), Path(temporary, "tree")
        root.mkdir()
        _write_tree(root, content)
        with image.open("xb") as file:
            file.truncate(IMAGE_SIZE)
        table = (
            f"label: gpt\nlabel-id: {_PARTITION}\nstart=1MiB, size={IMAGE_SIZE // MIB - 2}MiB, "
            f"type={ESP_TYPE}, name={_LABEL}, uuid={_PARTITION}\n"
        )
        run("sfdisk", ["--quiet", image], purpose="partition the stick", stdin=table.encode())
        run(
            "mkfs.vfat",
            [
                *("-F", "32", "-s", "1", "-n", _LABEL, "--invariant", "--offset", str(MIB // 512)),
                *(image, str((IMAGE_SIZE - 2 * MIB) // 1024)),
            ],
            purpose="format the stick",
        )
        run(
            "mcopy",
            ["-s", "-i", f"{image}@@{MIB}", *sorted(root.iterdir()), "::"],
            purpose="copy the keys to the stick",
        )
        image.chmod(0o644)
        image.replace(out)
    sync_directory(out.parent)
