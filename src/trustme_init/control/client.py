# SPDX-License-Identifier: Apache-2.0
"""A blocking client of the control socket that never waits longer than it was told.

ControlRefusal codes: `not-running` (no socket, or nobody accepts), `not-permitted`, `timed-out`, `closed`
(the peer hung up before its reply was complete), `malformed-reply`. After any of them the connection is
unusable: make a new client.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from google.protobuf.message import DecodeError

from trustme_init.control.framing import REPLY_LIMIT, REQUEST_LIMIT, FrameDecoder, encode_frame
from trustme_init.errors import ControlRefusal
from trustme_init.proto.control_pb2 import ControllerToDaemon, DaemonToController

DEFAULT_SOCKET: Final = Path("/run/socket/cml-control")
DEFAULT_TIMEOUT: Final = 30.0
SLOW_TIMEOUT: Final = 200.0
"""For what the vault does: a little more than the device itself gives it (`provisioning.vault`)."""
_CHUNK: Final = 256 * 1024
_LONGEST_ADDRESS: Final = 107


class ControlClient:
    """One connection, opened by the first request. `timeout` seconds bound each request and each reply."""

    def __init__(self, path: Path = DEFAULT_SOCKET, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout
        self._socket: socket.socket | None = None
        self._decoder = FrameDecoder(REPLY_LIMIT)
        self._bodies: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. Harmless when there is no connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def request(self, message: ControllerToDaemon, timeout: float | None = None) -> DaemonToController:
        """Send one request and return its first reply."""
        self.send(message, timeout)
        return self.receive(timeout)

    def send(self, message: ControllerToDaemon, timeout: float | None = None) -> None:
        """Send a request, connecting if need be; prefix and body in one write."""
        deadline = self._deadline(timeout)
        frame = encode_frame(message.SerializeToString(), REQUEST_LIMIT)
        sock = self._connected(deadline)
        try:
            sock.settimeout(_left(deadline))
            sock.sendall(frame)
        except TimeoutError as exc:
            raise self._refusal("timed-out", "the device does not take the request") from exc
        except OSError as exc:
            raise self._refusal("closed", "the device closed the connection", exc) from exc

    def receive(self, timeout: float | None = None) -> DaemonToController:
        """Return the next reply."""
        deadline = self._deadline(timeout)
        sock = self._connected(deadline)
        while not self._bodies:
            try:
                sock.settimeout(_left(deadline))
                data = sock.recv(_CHUNK)
            except TimeoutError as exc:
                raise self._refusal("timed-out", "the device does not answer") from exc
            except OSError as exc:
                raise self._refusal("closed", "the device closed the connection", exc) from exc
            if not data:
                raise self._refusal("closed", "the device closed the connection without a complete answer")
            self._bodies = self._decoder.feed(data)
            if self._decoder.failure is not None and not self._bodies:
                raise self._refusal("malformed-reply", str(self._decoder.failure.evidence))
        return self._parse(self._bodies.pop(0))

    def fileno(self) -> int:
        """Return the connection's descriptor, to wait on; there must have been a request."""
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def buffered(self) -> bool:
        """Whether the next reply has arrived already."""
        return bool(self._bodies)

    def logs(self, *, remove: bool = False) -> Iterator[DaemonToController]:
        """Yield log fragments as they come, then the closing RESPONSE."""
        reply = self.request(ControllerToDaemon(command=ControllerToDaemon.GET_LAST_LOG, remove_logs=remove))
        while reply.HasField("log_message"):
            yield reply
            reply = self.receive()
        yield reply

    def _parse(self, body: bytes) -> DaemonToController:
        try:
            reply = DaemonToController.FromString(body)
        except DecodeError as exc:
            raise self._refusal("malformed-reply", "the answer is not a protobuf message") from exc
        if not reply.IsInitialized():
            raise self._refusal("malformed-reply", "the answer lacks required fields")
        return reply

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    def _connected(self, deadline: float) -> socket.socket:
        if self._socket is None:
            self._socket = self._connect(deadline)
        return self._socket

    def _connect(self, deadline: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        address = str(self._path)
        directory = -1
        try:
            if len(os.fsencode(address)) > _LONGEST_ADDRESS:
                directory = os.open(self._path.parent, os.O_PATH | os.O_CLOEXEC)
                address = f"/proc/self/fd/{directory}/{self._path.name}"
            # A listener that does not accept makes connect() wait: only the send time-out bounds that.
            wait = _left(deadline)
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(wait), int(wait % 1 * 1e6) or 1)
            )
            sock.connect(address)
        except (BlockingIOError, TimeoutError) as exc:
            sock.close()
            raise self._refusal("timed-out", "the device does not accept the connection") from exc
        except PermissionError as exc:
            sock.close()
            raise self._refusal("not-permitted", "this user may not use the control socket", exc) from exc
        except OSError as exc:
            sock.close()
            raise self._refusal("not-running", "the control interface cannot be reached", exc) from exc
        finally:
            if directory >= 0:
                os.close(directory)
        return sock

    def _refusal(self, code: str, cause: str, exc: OSError | None = None) -> ControlRefusal:
        evidence = str(self._path) if exc is None else f"{self._path}: {exc.strerror}"
        return ControlRefusal(code, cause, evidence=evidence)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
