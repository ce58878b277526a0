# SPDX-License-Identifier: Apache-2.0
"""A synchronous QMP client: what a test or a command needs, without an event loop.

QEMU Machine Protocol: one JSON object per line; answers carry `return` or `error`, events come between.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, Self

from trustme_tools.errors import ToolError

ANSWER_TIMEOUT: Final = 60.0
_CHUNK: Final = 65536


class QmpClient:
    """One connection to a running QEMU."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        try:
            self._read(ANSWER_TIMEOUT)
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; QEMU goes on."""
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command and return its result; ToolError("qmp") when QEMU refuses it."""
        request = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except ConnectionError:
            raise ToolError("QEMU ended", "see its log in the work directory", code="qemu-ended") from None
        while True:
            message = self._read(ANSWER_TIMEOUT)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise ToolError(f"QEMU refuses {command}", code="qmp", evidence=str(message["error"]["desc"]))
            else:
                return message["return"]

    def wait_migrated(self, timeout: float) -> None:
        """Return when the machine's state is written."""
        deadline = time.monotonic() + timeout
        for status in self._poll("query-migrate", deadline):
            if status.get("status") == "completed":
                return
            if status.get("status") in {"failed", "cancelled"}:
                raise ToolError(
                    "QEMU could not save the machine", code="snapshot-failed", evidence=str(status)
                )
        raise ToolError("saving the machine took too long", code="snapshot-timeout", evidence=f"{timeout} s")

    def go_on(self, timeout: float) -> None:
        """Let a machine run that was started from a saved state, as soon as that is read."""
        deadline = time.monotonic() + timeout
        for status in self._poll("query-status", deadline):
            if status.get("status") == "running":
                return
            # It was stopped when it was saved, and that is part of the state.
            if status.get("status") != "inmigrate":
                self.execute("cont")
        raise ToolError("the saved machine did not start", code="restore-timeout", evidence=f"{timeout} s")

    def _poll(self, command: str, deadline: float) -> Iterator[dict[str, Any]]:
        while time.monotonic() < deadline:
            yield self.execute(command)
            time.sleep(0.02)

    def _read(self, timeout: float) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        while b"\n" not in self._buffer:
            try:
                data = self._socket.recv(_CHUNK)
            except TimeoutError:
                raise ToolError("QEMU does not answer", code="qmp-timeout") from None
            except ConnectionError:
                data = b""
            if not data:
                raise ToolError("QEMU ended", "see its log in the work directory", code="qemu-ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
