# SPDX-License-Identifier: Apache-2.0
"""A cheap look at a large request before protobuf takes it apart.

16 MiB of empty strings is a valid `ControllerToDaemon` that costs 0.4 s and 300 MiB to parse: one client
would hold up all others. Only the file fields are ever large, and those cost one copy each. So everything
else in a request together, tags included, must fit in OVERHEAD_LIMIT.
"""

from __future__ import annotations

from typing import Final

from trustme_init.errors import ControlRefusal
from trustme_init.proto.control_pb2 import ControllerToDaemon

OVERHEAD_LIMIT: Final = 64 * 1024
"""Bytes of a request outside its file fields: dozens of UUIDs or a long argument list fit many times."""

FILE_FIELDS: Final = frozenset(
    field.number
    for field in ControllerToDaemon.DESCRIPTOR.fields
    if field.type == field.TYPE_BYTES  # the configuration triples and certificates
)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


def screen_request(body: bytes) -> None:
    """Refuse a request that would be expensive to parse, in at most a few milliseconds.

    ControlRefusal("request-too-complex") or ("request-malformed"). What is accepted may still be malformed
    further in: the parser judges that.
    """
    if len(body) <= OVERHEAD_LIMIT:
        return
    position = 0
    overhead = 0
    while position < len(body):
        start = position
        tag, position = _varint(body, position)
        payload = 0
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(body, position)
        elif kind == _BYTES:
            payload, position = _varint(body, position)
        elif kind in {_FIXED64, _FIXED32}:
            position += 8 if kind == _FIXED64 else 4
        else:
            raise _malformed(f"wire type {kind} at byte {start}")
        overhead += position - start
        position += payload
        if tag >> 3 not in FILE_FIELDS:
            overhead += payload
        if overhead > OVERHEAD_LIMIT:
            raise ControlRefusal(
                "request-too-complex",
                "a request holds too much besides its files",
                evidence=f"more than {OVERHEAD_LIMIT} bytes",
            )
    if position > len(body):
        raise _malformed("a field ends behind the message")


def _varint(body: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(body[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise _malformed(f"unfinished number at byte {position}")


def _malformed(evidence: str) -> ControlRefusal:
    return ControlRefusal("request-malformed", "a request is not a protobuf message", evidence=evidence)
