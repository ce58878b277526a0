# SPDX-License-Identifier: Apache-2.0
"""Somebody on the TPM's bus: stands at an address of its own, counts, records, delays, changes or drops."""

from __future__ import annotations

import selectors
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.integration.software_tpm import SoftwareTpm

Hook = Callable[[bytes], bytes | None]
"""Takes a command or a reply; what it returns goes on. None drops it and hangs up."""

HEADER = 10


def code_of(command: bytes) -> int:
    """The TPM_CC of a command (TPM 2.0 Part 3, section 4.3)."""
    return int(struct.unpack(">HII", command[:HEADER])[2])


class Interposer:
    """Serves `tcti` and asks the swtpm behind it; the library hangs up after every command, and so do we."""

    def __init__(self, tpm: SoftwareTpm, directory: Path) -> None:
        self._behind = tpm.tcti.removeprefix("swtpm:path=")
        self._path = directory / "bus.sock"
        self.tcti = f"swtpm:path={self._path}"
        self.commands: list[bytes] = []
        self.replies: list[bytes] = []
        self.on_command: Hook = lambda command: command
        self.on_reply: Hook = lambda reply: reply
        self.latency = 0.0
        """Seconds per command, as a chip would take them."""

    def __enter__(self) -> Self:
        self._servers = [
            _Server(str(self._path), self._data),
            _Server(f"{self._path}.ctrl", self._control),
        ]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
            Path(str(server.server_address)).unlink()

    def forget(self) -> None:
        self.commands.clear()
        self.replies.clear()

    @property
    def codes(self) -> list[int]:
        return [code_of(command) for command in self.commands]

    def _data(self, client: socket.socket) -> None:
        command = _message(client)
        if not command:
            return
        self.commands.append(command)
        time.sleep(self.latency)
        changed = self.on_command(command)
        if changed is None:
            return
        with socket.socket(socket.AF_UNIX) as behind:
            behind.connect(self._behind)
            behind.sendall(changed)
            reply = _message(behind)
        self.replies.append(reply)
        answer = self.on_reply(reply)
        if answer is not None:
            client.sendall(answer)

    def _control(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as behind, selectors.DefaultSelector() as selector:
            behind.connect(f"{self._behind}.ctrl")
            selector.register(client, selectors.EVENT_READ, behind)
            selector.register(behind, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    assert isinstance(key.fileobj, socket.socket)
                    data = key.fileobj.recv(4096)
                    if not data:
                        return
                    key.data.sendall(data)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = True

    def __init__(self, path: str, serve: Callable[[socket.socket], None]) -> None:
        self.serve = serve
        super().__init__(path, _Handler)


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        try:
            self.server.serve(self.request)
        except OSError:
            return  # one of the two sides hung up, which is what the test is about


def _message(connection: socket.socket) -> bytes:
    """Read one command or reply; what there is of it, if the other side hangs up."""
    data = b""
    wanted = HEADER
    while len(data) < wanted:
        part = connection.recv(wanted - len(data))
        if not part:
            break
        data += part
        if len(data) == HEADER:
            wanted = max(HEADER, int(struct.unpack(">HII", data)[1]))
    return data
