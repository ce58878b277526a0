# SPDX-License-Identifier: Apache-2.0
"""What the provisioning marker looks like in the TPM, for `nv_marker` and for who has no library yet."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self
from uuid import UUID

INDEX: Final = 0x01800000 + 0x746D
"""In the range that the TCG leaves to owners (Registry of Reserved TPM 2.0 Handles, section 2.2.2); "tm"."""
SIZE: Final = 49

# TPMA_NV (TPM 2.0 Part 2, section 13.4); the type in bits 4 to 7 is 0, ordinary.
_OWNERWRITE: Final = 1 << 1
_WRITEDEFINE: Final = 1 << 13
_OWNERREAD: Final = 1 << 17
_AUTHREAD: Final = 1 << 18
_NO_DA: Final = 1 << 25
WRITELOCKED: Final = 1 << 11
WRITTEN: Final = 1 << 29
ATTRIBUTES: Final = _OWNERWRITE | _WRITEDEFINE | _OWNERREAD | _AUTHREAD | _NO_DA
PROGRESS: Final = WRITTEN | WRITELOCKED
"""The attributes that change on the way; all others stay as they were defined."""

_VERSION: Final = 1


class MarkerContent(NamedTuple):
    """What a completed marker says: which device was provisioned, and what as."""

    device_uuid: UUID
    record_sha256: bytes
    """SHA-256 of the provisioning record."""

    def encode(self) -> bytes:
        """Return the index's content: version (1 byte), UUID (16, RFC 9562 order), SHA-256 (32)."""
        data = bytes([_VERSION]) + self.device_uuid.bytes + self.record_sha256
        if len(data) != SIZE:
            raise ValueError("a record's SHA-256 has 32 bytes")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse an index's content; ValueError if it is not `SIZE` bytes of version 1."""
        if len(data) != SIZE or data[0] != _VERSION:
            raise ValueError("not a marker of version 1")
        return cls(UUID(bytes=data[1:17]), data[17:])


class MarkerState(enum.Enum):
    """How far provisioning went."""

    ABSENT = "absent"
    OPEN = "open"
    COMPLETED = "completed"


class MarkerReading(NamedTuple):
    """What the TPM says about the marker."""

    state: MarkerState
    content: MarkerContent | None = None
    """Present when COMPLETED."""
    locked: bool = False
    """Whether TPM2_NV_WriteLock was done; on a COMPLETED marker it is for good."""

    @property
    def completed(self) -> bool:
        """Whether provisioning was completed, locked or not."""
        return self.state is MarkerState.COMPLETED

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        content = self.content.encode().hex() if self.content is not None else None
        return {"state": self.state.value, "content": content, "locked": self.locked}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Self:
        """Read the JSON form; ValueError for anything that `as_dict` does not make."""
        try:
            state = MarkerState(said["state"])
            content = MarkerContent.decode(bytes.fromhex(said["content"])) if said["content"] else None
            locked = said["locked"]
        except (KeyError, TypeError) as exc:
            raise ValueError("not a reading of the marker") from exc
        if (content is not None) != (state is MarkerState.COMPLETED) or not isinstance(locked, bool):
            raise ValueError("a reading of the marker that cannot be")
        return cls(state, content, locked)
