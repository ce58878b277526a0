# SPDX-License-Identifier: Apache-2.0
"""The provisioning record: what was in place when provisioning was completed.

Written before the marker, which holds its SHA-256 for good: whoever changes the record, or puts another
device's in its place, has a device that stops and says so. It is never changed afterwards; what later
statements replace is beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from trustme_init.errors import StorageRefusal
from trustme_init.provisioning.layout import save

RECORD_VERSION: Final = 1
RECORD_LIMIT: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it stands on disk."""

    device_uuid: UUID
    sha256: bytes
    """Of the file's bytes."""
    authorities: tuple[tuple[str, str], ...] = ()
    """Purpose and SHA-256 (hex) of each anchor that was registered."""


def write(path: Path, device_uuid: UUID, facts: Mapping[str, Any]) -> Record:
    """Write the record durably; `facts` are what a status or a fleet's database wants to know.

    StorageRefusal: "disk-not-writable".
    """
    document = {
        "kind": "trustme.provisioning-record",
        "version": RECORD_VERSION,
        "device_uuid": str(device_uuid),
        **facts,
    }
    text = json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"
    save(path, text)
    return Record(device_uuid, hashlib.sha256(text).digest())


def read(path: Path) -> Record | None:
    """Return the record, None when there is none; StorageRefusal("provisioning-record-damaged")."""
    try:
        with path.open("rb") as file:
            text = file.read(RECORD_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _damaged(f"{path}: {exc.strerror}") from exc
    try:
        document = json.loads(text)
        if document["kind"] != "trustme.provisioning-record" or document["version"] != RECORD_VERSION:
            raise ValueError("another kind or version")
        device_uuid = UUID(document["device_uuid"])
        listed = document.get("authorities", [])
        authorities = tuple((str(each["purpose"]), str(each["sha256"])) for each in listed)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _damaged(f"{path}: {exc}") from exc
    return Record(device_uuid, hashlib.sha256(text).digest(), authorities)


def _damaged(evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "provisioning-record-damaged",
        "the record of this device's provisioning cannot be read",
        evidence=evidence,
        remedy="the data volume is damaged; restore it, or clear the TPM and provision the device anew",
    )
