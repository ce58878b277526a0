# SPDX-License-Identifier: Apache-2.0
"""Frames on control and service sockets (interop section 2.1): `uint32 big-endian length`, then the body.

Sans-io: bytes in, bodies out. Rules:

- A body's memory grows with the bytes that arrived, never with the length that was announced.
- Length 0 is a frame: a message with every field at its default. Whether that means anything is for the
  reader of the body to say.
- A length above the limit cannot be skipped without reading it, so the stream ends there: the decoder
  keeps the frames before it, sets `failure` and ignores everything after.
"""

from __future__ import annotations

import struct
from typing import Final

from trustme_init.errors import ControlRefusal

MIB: Final = 1024 * 1024
PREFIX: Final = struct.Struct(">I")

REQUEST_LIMIT: Final = 16 * MIB
"""Largest request body accepted, bytes. The largest real request is a GuestOS configuration with an icon
and two PEM chains, well under 1 MiB; the original protocol names 64 MiB but its server drops any body that
does not arrive in one read, so nothing above a socket buffer (about 208 KiB) ever worked there. 16 MiB
leaves room for growth and keeps what one client can make the manager hold small."""

REPLY_LIMIT: Final = 64 * MIB - 1
"""Largest reply body sent or accepted, bytes: original clients demand less than 64 MiB."""

SERVICE_LIMIT: Final = 64 * 1024
"""Largest body from a container's service, bytes: a code and one short string."""


def encode_frame(body: bytes, limit: int = REPLY_LIMIT) -> bytes:
    """Return prefix and body as one piece; ControlRefusal("frame-too-large") above `limit`."""
    if len(body) > limit:
        raise _too_large(len(body), limit)
    return PREFIX.pack(len(body)) + body


class FrameDecoder:
    """Cuts a byte stream into bodies of at most `limit` bytes."""

    __slots__ = ("_buffer", "_limit", "failure")

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit
        self.failure: ControlRefusal | None = None
        """Set once the stream can no longer be cut into frames."""

    @property
    def started(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)

    @property
    def buffered(self) -> int:
        """Bytes held for the unfinished frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take received bytes, return the bodies that are now complete, in order. Never raises."""
        if self.failure is not None:
            return []
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        position = 0
        while len(buffer) - position >= PREFIX.size:
            (length,) = PREFIX.unpack_from(buffer, position)
            if length > self._limit:
                self.failure = _too_large(length, self._limit)
                buffer.clear()
                return bodies
            end = position + PREFIX.size + length
            if end > len(buffer):
                break
            bodies.append(bytes(buffer[position + PREFIX.size : end]))
            position = end
        del buffer[:position]
        return bodies


def _too_large(length: int, limit: int) -> ControlRefusal:
    return ControlRefusal(
        "frame-too-large",
        "a frame is longer than this socket carries",
        evidence=f"{length} bytes announced, at most {limit}",
    )
