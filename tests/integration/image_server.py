# SPDX-License-Identifier: Apache-2.0
"""An HTTP(S) server on loopback that a test tells how to misbehave."""

from __future__ import annotations

import http.server
import re
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.unit.trust import pki

LOOPBACK = "127.0.0.1"


@dataclass
class Answer:
    """What one request gets; `body` is what is left of the file from `offset` on."""

    status: int
    headers: dict[str, str]
    body: bytes
    drip: float = 0.0
    """Seconds between two bytes."""
    hang: bool = False
    """Say nothing until the test is over."""


@dataclass
class Asked:
    """A request as it came in."""

    path: str
    offset: int
    if_range: str


Misbehave = Callable[[Asked, Answer], Answer]


def certificate(directory: Path, *, address: str = LOOPBACK) -> Path:
    """Write `ca.pem` and `server.pem` (certificate and key of `address`); return the CA's file."""
    ca = pki.issue(pki.ROOT.but(subject="download servers"))
    server = pki.issue(
        pki.Wish(
            "server",
            key_usage=pki.usage("digital_signature"),
            purpose=x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
            more=((x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(address))]), False),),
        ),
        ca,
    )
    key = server.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "server.pem").write_bytes(server.pem + key)
    (directory / "ca.pem").write_bytes(ca.pem)
    return directory / "ca.pem"


@dataclass
class ImageServer:
    """Serves files by path, with ETag and Range; use as a context manager."""

    files: dict[str, bytes]
    tls: Path | None = None
    """`server.pem`; None for plain HTTP."""
    misbehave: Misbehave = lambda _asked, answer: answer
    etag: str = '"one"'
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        server = self
        self._over = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # a client that hangs up is part of the tests

        self._server = Quiet((LOOPBACK, 0), Handler)
        self._server.daemon_threads = False
        self._server.block_on_close = True
        if self.tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{LOOPBACK}:{self._server.server_address[1]}"

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        match = re.fullmatch(r"bytes=(\d+)-\d*", handler.headers.get("Range", ""))
        asked = Asked(handler.path, int(match[1]) if match else 0, handler.headers.get("If-Range", ""))
        self.asked.append(asked)
        answer = self.misbehave(asked, self._honest(asked))
        if answer.hang:
            self._over.wait(60)
            return
        with suppress(OSError):
            handler.send_response(answer.status)
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            if not answer.drip:
                handler.wfile.write(answer.body)
            for byte in answer.body if answer.drip else b"":
                if self._over.wait(answer.drip):
                    return
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()

    def _honest(self, asked: Asked) -> Answer:
        data = self.files.get(asked.path)
        if data is None:
            return Answer(404, {"Content-Length": "0"}, b"")
        headers = {"ETag": self.etag, "Content-Length": str(len(data))}
        if not asked.offset or (asked.if_range and asked.if_range != self.etag):
            return Answer(200, headers, data)
        if asked.offset >= len(data):
            return Answer(416, {"Content-Length": "0"}, b"")
        headers["Content-Range"] = f"bytes {asked.offset}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - asked.offset)
        return Answer(206, headers, data[asked.offset :])


def serve_forever(files: dict[str, bytes], tls: Path | None, say: Callable[[str], None]) -> None:
    """Serve until the process ends; `say` hears the URL."""
    with ImageServer(files, tls) as server:
        say(server.url)
        while True:
            time.sleep(3600)
