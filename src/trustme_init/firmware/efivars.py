# SPDX-License-Identifier: Apache-2.0
"""UEFI variables as efivarfs shows them: one file per variable, four attribute bytes, then the data.

Sources: UEFI 2.10 section 8.2 (attributes), Linux Documentation/filesystems/efivarfs.rst (file format).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trustme_init.errors import FirmwareRefusal

EFI_VARIABLE_NON_VOLATILE: Final = 0x01
EFI_VARIABLE_BOOTSERVICE_ACCESS: Final = 0x02
EFI_VARIABLE_RUNTIME_ACCESS: Final = 0x04
EFI_VARIABLE_TIME_BASED_AUTHENTICATED_WRITE_ACCESS: Final = 0x20

EFI_GLOBAL_VARIABLE: Final = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
EFI_IMAGE_SECURITY_DATABASE: Final = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"

VARIABLE_LIMIT: Final = 1024 * 1024
"""Bytes of one variable. Real `dbx` contents are tens of KiB; flash stores end at a few hundred."""

_NAME: Final = re.compile(r"[A-Za-z0-9]{1,64}")
_GUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_REMEDY: Final = "check the firmware set-up; restore the factory Secure Boot keys if a variable is damaged"


@dataclass(frozen=True, slots=True)
class EfiVariable:
    """One variable: attribute bits (EFI_VARIABLE_*) and its data without them."""

    attributes: int
    data: bytes


class EfiVars:
    """The variables in one efivarfs directory. Reads only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str, guid: str) -> EfiVariable | None:
        """Return the variable, or None if the firmware does not have it.

        FirmwareRefusal: "efivars-unavailable" (no efivarfs directory), "efivar-unreadable",
        "efivar-too-large", "efivar-malformed" (no complete attribute word).
        """
        if not _NAME.fullmatch(name) or not _GUID.fullmatch(guid):
            raise ValueError(f"not a variable name and GUID: {name!r} {guid!r}")
        variable = f"{name}-{guid}"
        try:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise FirmwareRefusal(
                "efivars-unavailable",
                "the UEFI variables are not accessible",
                evidence=f"{self._directory}: {exc.strerror}",
                remedy="boot through UEFI firmware, and mount efivarfs before this stage",
            ) from exc
        try:
            raw = _read_file(directory, variable)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise FirmwareRefusal(
                "efivar-unreadable",
                "a UEFI variable cannot be read",
                evidence=f"{variable}: {exc.strerror}",
                remedy=_REMEDY,
            ) from exc
        finally:
            os.close(directory)
        return parse_variable(variable, raw)


def parse_variable(name: str, raw: bytes) -> EfiVariable:
    """Split the content of an efivarfs file: attributes (4 bytes, little-endian), then data."""
    if len(raw) > VARIABLE_LIMIT + 4:
        raise FirmwareRefusal(
            "efivar-too-large",
            "a UEFI variable is larger than any firmware can store",
            evidence=f"{name}: more than {VARIABLE_LIMIT} bytes",
            remedy=_REMEDY,
        )
    if len(raw) < 4:
        raise FirmwareRefusal(
            "efivar-malformed",
            "a UEFI variable has no complete attribute word",
            evidence=f"{name}: {len(raw)} bytes",
            remedy=_REMEDY,
        )
    return EfiVariable(int.from_bytes(raw[:4], "little"), raw[4:])


def _read_file(directory: int, name: str) -> bytes:
    """Return at most one byte more than a variable may have, so that the caller sees the excess."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    with os.fdopen(fd, "rb", buffering=0) as file:
        parts = []
        left = VARIABLE_LIMIT + 4 + 1
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)
