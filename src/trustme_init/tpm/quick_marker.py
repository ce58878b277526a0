# SPDX-License-Identifier: Apache-2.0
"""The provisioning marker without the TPM library, whose loading takes longer than deciding the mode may.

Two commands of the standard, sent as they are. What comes back is taken only if it is one of the two plain
cases, an index that is not there or one that is exactly ours; for anything else, a busy TPM included, the
answer is None, and `nv_marker` with the library decides and has the names for what is wrong. Nothing is
refused here, and nothing doubtful accepted.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Final

from trustme_init.tpm.marker_form import (
    ATTRIBUTES,
    INDEX,
    PROGRESS,
    SIZE,
    WRITELOCKED,
    WRITTEN,
    MarkerContent,
    MarkerReading,
    MarkerState,
)

TIMEOUT: Final = 10.0
_REPLY_LIMIT: Final = 4096

# TPM 2.0 Part 2, sections 6.5.2 (commands), 6.6.3 (responses), 6.9 (structure tags), 6.3 (algorithms)
_HEAD: Final = struct.Struct(">HII")
_NO_SESSIONS: Final = 0x8001
_SESSIONS: Final = 0x8002
_NV_READ_PUBLIC: Final = 0x169
_NV_READ: Final = 0x14E
_SUCCESS: Final = 0
_NOTHING_AT_HANDLE_1: Final = 0x18B
_NV_UNINITIALIZED: Final = 0x14A
_SHA256: Final = 0x0B
_PASSWORD: Final = struct.pack(">IHBH", 0x40000009, 0, 0, 0)
"""TPM_RS_PW with an empty password (Part 1, section 19.4)."""

# TPMS_NV_PUBLIC (Part 2, section 13.5) with an empty policy, behind its size
_PUBLIC: Final = struct.Struct(">HIHIHH")


def read(tcti: str) -> MarkerReading | None:
    """Return the marker of the TPM at `tcti`; None where the library has to be asked. Never raises."""
    try:
        return _read(tcti)
    except (OSError, ValueError, struct.error):
        return None


def _read(tcti: str) -> MarkerReading | None:
    code, public = _command(tcti, _NO_SESSIONS, _NV_READ_PUBLIC, struct.pack(">I", INDEX))
    if code == _NOTHING_AT_HANDLE_1:
        return MarkerReading(MarkerState.ABSENT)
    size, index, name_algorithm, attributes, policy, data_size = _PUBLIC.unpack_from(public)
    found = (code, size, index, name_algorithm, attributes & ~PROGRESS, policy, data_size)
    if found != (_SUCCESS, _PUBLIC.size - 2, INDEX, _SHA256, ATTRIBUTES, 0, SIZE):
        return None
    locked = bool(attributes & WRITELOCKED)
    handles_and_session = struct.pack(">III", INDEX, INDEX, len(_PASSWORD)) + _PASSWORD
    code, answer = _command(tcti, _SESSIONS, _NV_READ, handles_and_session + struct.pack(">HH", SIZE, 0))
    if code == _NV_UNINITIALIZED and not attributes & WRITTEN:
        return MarkerReading(MarkerState.OPEN, locked=locked)
    parameters, length = struct.unpack_from(">IH", answer)
    if (code, parameters, length) != (_SUCCESS, SIZE + 2, SIZE) or not attributes & WRITTEN:
        return None
    return MarkerReading(MarkerState.COMPLETED, MarkerContent.decode(answer[6 : 6 + SIZE]), locked)


def _command(tcti: str, tag: int, command: int, body: bytes) -> tuple[int, bytes]:
    """Return the response code and what follows it; ValueError for a reply that is not a whole one."""
    reply = _exchange(tcti, _HEAD.pack(tag, _HEAD.size + len(body), command) + body)
    _, size, code = _HEAD.unpack_from(reply)
    if size != len(reply):
        raise ValueError("a reply that is not as long as it says")
    return code, reply[_HEAD.size :]


def _exchange(tcti: str, message: bytes) -> bytes:
    kind, _, address = tcti.partition(":")
    if kind == "device":
        # One write, one read: the driver waits in between (drivers/char/tpm/tpm-dev-common.c).
        fd = os.open(Path(address), os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, message)
            return os.read(fd, _REPLY_LIMIT)
        finally:
            os.close(fd)
    name, _, path = address.partition("=")
    if kind != "swtpm" or name != "path":
        raise ValueError("an address that only the library knows")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT)
        connection.connect(path)
        connection.sendall(message)
        return _whole(connection)


def _whole(connection: socket.socket) -> bytes:
    reply = b""
    wanted = _HEAD.size
    while len(reply) < wanted:
        part = connection.recv(wanted - len(reply))
        if not part:
            raise ValueError("a reply that ends early")
        reply += part
        if len(reply) == _HEAD.size:
            wanted = _HEAD.unpack(reply)[1]
            if wanted > _REPLY_LIMIT:
                raise ValueError("a reply that is too long")
    return reply
