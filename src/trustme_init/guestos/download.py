# SPDX-License-Identifier: Apache-2.0
"""Images from an HTTP server. Runs in the fetcher's process, without privileges and without secrets.

The content is judged afterwards by the signed configuration; TLS keeps others from learning and stopping what
is fetched. Rules:
- https, and its certificate is checked against the anchors of this build (`download_anchors.pem` beside the
  policy), by host name. Plain http is for development builds.
- Never more than the signed size. A partial file is gone on with by Range, with If-Range where the server has
  said by a strong ETag which content it was; a server that sends everything again gets that.
- Redirects: few, and never to another scheme. No proxy from the environment, no credentials, no cookies.
- A server that hangs, trickles or fails time and again loses: every wait has an end.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urljoin, urlsplit

from trustme_init.errors import DeviceRefusal, PolicyRefusal
from trustme_init.guestos.sources import CHUNK, Progress, Target

TIMEOUT: Final = 30.0
"""Seconds for one connection attempt, and for one read."""
TRIES: Final = 5
"""Attempts in a row that bring nothing."""
ATTEMPTS: Final = 50
"""Attempts for one image, whatever they bring."""
RETRY_DELAY: Final = 1.0
"""Seconds before the second attempt; twice as long before each further one."""
SLOW_TIME: Final = 60.0
SLOW_BYTES: Final = 64 * 1024
"""A server that takes SLOW_TIME seconds for fewer bytes than this is given up."""
REDIRECTS: Final = 5
MARK_LIMIT: Final = 256

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,16})-[0-9]{1,16}/([0-9]{1,16}|\*)", re.ASCII)
_STRONG_ETAG: Final = re.compile(r'"[\x21\x23-\x7e]{1,250}"')
_WORTH_A_RETRY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class _TryAgainError(Exception):
    """What happened may be over in a moment."""


@dataclass(frozen=True, slots=True)
class _Address:
    scheme: str
    host: str
    port: int | None
    path: str

    @classmethod
    def of(cls, url: str, base: _Address | None = None) -> _Address:
        """Take a URL apart. One that a server has sent is relative to `base`, and must be of its scheme."""
        try:
            parts = urlsplit(url if base is None else urljoin(base.url, url))
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise _refused("download-address", "an address makes no sense", f"{url!a:.200}: {exc}") from exc
        if (
            parts.scheme not in ("http", "https")
            or (base is not None and parts.scheme != base.scheme)
            or not host
            or "@" in parts.netloc
        ):
            raise _refused("download-address", "images are not fetched from such an address", f"{url!a:.200}")
        path = quote(parts.path or "/", safe="/%~:@!$&'()*+,;=-._")
        return cls(parts.scheme, host, port, f"{path}?{parts.query}" if parts.query else path)

    @property
    def url(self) -> str:
        """The whole of it."""
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def netloc(self) -> str:
        """Host and port as a URL has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"


class HttpSource:
    """The directory at `url`; `anchors` is a PEM file of certificate authorities.

    PolicyRefusal: "download-insecure" for http in a production build, "download-anchors-missing".
    """

    def __init__(self, url: str, *, anchors: Path, development: bool) -> None:
        self._url = url
        "localhost".encode("idna")  # every look-up needs this codec, and loading it later means unprivileged
        self._context: ssl.SSLContext | None = None
        if _Address.of(url).scheme == "https":
            self._context = _context(anchors)
        elif not development:
            raise PolicyRefusal(
                "download-insecure",
                "images are not fetched without TLS",
                evidence=f"{url!a:.200}",
                remedy="serve them over https, or push them with `--stream`",
            )

    def fetch(self, targets: Iterable[Target], progress: Progress) -> None:
        """Download each target.

        DeviceRefusal: "download-failed", "download-refused", "download-untrusted", "download-too-slow",
        "download-size", "download-address".
        """
        for target in targets:
            tries = attempts = 0
            while target.have < target.file.size:
                before = target.have
                try:
                    self._attempt(target, progress)
                except _TryAgainError as exc:
                    attempts += 1
                    tries = 1 if target.have > before else tries + 1
                    if tries >= TRIES or attempts >= ATTEMPTS:
                        raise _refused(
                            "download-failed",
                            "an image cannot be fetched",
                            f"{target.file.name} at {target.have} of {target.file.size} bytes: {exc}",
                        ) from exc
                    time.sleep(RETRY_DELAY * 2 ** (tries - 1))
            target.finish()

    def _attempt(self, target: Target, progress: Progress) -> None:
        address = _Address.of(f"{self._url}/{target.file.name}")
        for _ in range(REDIRECTS + 1):
            connection = self._connect(address)
            try:
                response = _ask(connection, address, target)
                location = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and location is not None:
                    address = _Address.of(location, address)
                    continue
                _begin(response, target)
                _receive(response, target, progress)
            except ssl.SSLCertVerificationError as exc:
                raise _untrusted(address, exc) from exc
            except (OSError, http.client.HTTPException) as exc:
                raise _TryAgainError(f"{type(exc).__name__}: {exc}"[:200]) from exc
            finally:
                connection.close()
            return
        raise _refused(
            "download-refused",
            "the server sends from one address to the next",
            f"{target.file.name}: more than {REDIRECTS} redirects",
        )

    def _connect(self, address: _Address) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(address.host, address.port, timeout=TIMEOUT)
        return http.client.HTTPSConnection(address.host, address.port, timeout=TIMEOUT, context=self._context)


def _ask(
    connection: http.client.HTTPConnection, address: _Address, target: Target
) -> http.client.HTTPResponse:
    headers = {"Accept-Encoding": "identity", "User-Agent": "trustme"}
    if target.have:
        headers["Range"] = f"bytes={target.have}-{target.file.size - 1}"
        if mark := _mark(target):
            headers["If-Range"] = mark
    connection.request("GET", address.path, headers=headers)
    return connection.getresponse()


def _begin(response: http.client.HTTPResponse, target: Target) -> None:
    """Judge the head of an answer; afterwards its body goes on from what the target has."""
    total = None
    match response.status:
        case 200:
            total = response.getheader("Content-Length")
            target.restart()
        case 206:
            span = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range") or "")
            if span is None or int(span[1]) != target.have:
                target.restart()
                raise _TryAgainError("the server sends another range than it was asked for")
            total = span[2]
        case 416:
            target.restart()
            raise _TryAgainError("the server has not the range that is missing")
        case status if status in _WORTH_A_RETRY:
            raise _TryAgainError(f"status {status}")
        case status:
            raise _refused(
                "download-refused",
                "the server does not have an image",
                f"{target.file.name}: status {status}",
            )
    if total is not None and total.isascii() and total.isdigit():
        _require_size(target, int(total))
    _remember(target, response.getheader("ETag"))


def _receive(response: http.client.HTTPResponse, target: Target, progress: Progress) -> None:
    """Add the body to the target."""
    name, size = target.file.name, target.file.size
    began, since = time.monotonic(), target.have
    while (have := target.have) < size:
        data = response.read1(min(CHUNK, size - have))
        if not data:
            raise _TryAgainError(f"it ended at {have} of {size} bytes")
        target.append(data)
        have += len(data)
        progress(name, have)
        if time.monotonic() - began > SLOW_TIME:
            if have - since < SLOW_BYTES:
                raise _refused(
                    "download-too-slow",
                    "the server is too slow",
                    f"{name}: {have - since} bytes in {SLOW_TIME:.0f} s",
                )
            began, since = time.monotonic(), have
    if not target.file.is_tree and response.read1(1):
        target.restart()
        raise _size(target, "more")


def _require_size(target: Target, total: int) -> None:
    size = target.file.size
    if total < size or (total > size and not target.file.is_tree):
        raise _size(target, str(total))


def _size(target: Target, found: str) -> DeviceRefusal:
    return _refused(
        "download-size",
        "the server's image has not the signed size",
        f"{target.file.name}: {found} bytes, signed {target.file.size}",
    )


def _mark(target: Target) -> str:
    if target.mark < 0:
        return ""
    mark = os.pread(target.mark, MARK_LIMIT, 0).decode("ascii", "replace")
    return mark if _STRONG_ETAG.fullmatch(mark) else ""


def _remember(target: Target, etag: str | None) -> None:
    """Keep a strong ETag; a weak one does not say that the bytes are the same (RFC 9110, 13.1.5)."""
    if target.mark >= 0:
        os.ftruncate(target.mark, 0)
        if etag is not None and _STRONG_ETAG.fullmatch(etag):
            os.pwrite(target.mark, etag.encode(), 0)


def _context(anchors: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=anchors)
    except (OSError, ssl.SSLError) as exc:
        raise PolicyRefusal(
            "download-anchors-missing",
            "this build has no authorities that a download server could be checked by",
            evidence=f"{anchors}: {exc.strerror}",
            remedy="build the base system with `--download-anchors FILE`, or push the images with `--stream`",
        ) from exc
    return context


def _untrusted(address: _Address, exc: ssl.SSLCertVerificationError) -> DeviceRefusal:
    return _refused(
        "download-untrusted",
        "the server's certificate is not to be believed",
        f"{address.netloc}: {exc.verify_message}",
    )


def _refused(code: str, cause: str, evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        code,
        cause,
        evidence=evidence,
        remedy="look at server and network, then push the GuestOS again: what was fetched stays",
    )
