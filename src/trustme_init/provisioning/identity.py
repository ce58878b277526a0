# SPDX-License-Identifier: Apache-2.0
"""The device's UUID: random, made once, never changed; `device_id.conf`, a text DeviceId (interop 2.5)."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Final
from uuid import UUID

from trustme_init.errors import StorageRefusal
from trustme_init.provisioning.layout import save

_LIMIT: Final = 256
_TEXT: Final = re.compile(
    rb'uuid: "([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"\n?', re.ASCII
)


def load(path: Path) -> UUID | None:
    """Return the UUID, None when none was made yet; StorageRefusal("device-id-damaged")."""
    try:
        with path.open("rb") as file:
            text = file.read(_LIMIT)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _damaged(f"{path}: {exc.strerror}") from exc
    match = _TEXT.fullmatch(text)
    if match is None:
        raise _damaged(f"{path}: not a DeviceId")
    return UUID(match[1].decode())


def load_or_create(path: Path) -> UUID:
    """Return the UUID; make one durably first where there is none.

    StorageRefusal: "device-id-damaged", "disk-not-writable".
    """
    known = load(path)
    if known is not None:
        return known
    made = uuid.uuid4()
    save(path, f'uuid: "{made}"\n'.encode())
    return made


def _damaged(evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "device-id-damaged",
        "the device's own UUID cannot be read",
        evidence=evidence,
        remedy="the data volume is damaged; write the image to the disk again and provision anew",
    )
