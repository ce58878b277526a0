# SPDX-License-Identifier: Apache-2.0
"""A part of an image on its way from a client to the process that installs."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

PIECE_LIMIT: Final = 1024 * 1024
"""Bytes of one piece."""
NAME_LIMIT: Final = 255
"""Bytes of a file's name (NAME_MAX)."""

_HEAD: Final = struct.Struct("<QH")
"""Offset, and length of the name, which follows; then the data."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file that a client sent."""

    name: str
    offset: int
    data: bytes

    def encoded(self) -> bytes:
        """Return the form in which the manager hands it on."""
        name = self.name.encode()
        return _HEAD.pack(self.offset, len(name)) + name + self.data

    @classmethod
    def decoded(cls, message: bytes) -> Piece:
        """Return what `encoded` made."""
        offset, length = _HEAD.unpack_from(message)
        end = _HEAD.size + length
        return cls(message[_HEAD.size : end].decode(), offset, message[end:])
