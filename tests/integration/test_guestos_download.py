# SPDX-License-Identifier: Apache-2.0
"""Images from a server that is good, slow, broken or hostile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.image_server import Answer, Asked, ImageServer, Misbehave, certificate
from tests.integration.store_kit import content
from trustme_init.errors import Refusal
from trustme_init.guestos import download
from trustme_init.guestos.download import HttpSource
from trustme_init.guestos.plan import ImageFile
from trustme_init.guestos.sources import Target

DATA = content(300)
PATH = "/base/root.img"
NAME = "root.img"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRY_DELAY", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 0.5)


class Download:
    """One target in a directory, and what becomes of it."""

    def __init__(self, directory: Path, size: int = len(DATA), *, is_tree: bool = False) -> None:
        self.path = directory / NAME
        self.file = ImageFile(NAME, size, is_tree=is_tree)
        self.seen: list[int] = []
        self.anchors = directory / "ca.pem"

    def fetch(self, server: ImageServer, url: str = "", *, development: bool = True) -> str:
        """Return the code of the refusal, "" when it was fetched."""
        flags = os.O_RDWR | os.O_CREAT
        fds = [os.open(path, flags, 0o600) for path in (self.path, self.path.with_suffix(".etag"))]
        try:
            source = HttpSource(f"{url or server.url}/base", anchors=self.anchors, development=development)
            source.fetch([Target(self.file, *fds)], lambda _name, have: self.seen.append(have))
        except Refusal as refusal:
            return refusal.code
        finally:
            for fd in fds:
                os.close(fd)
        return ""

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()


@contextmanager
def serving(misbehave: Misbehave | None = None, **files: bytes) -> Iterator[ImageServer]:
    with ImageServer({PATH: DATA, **files}) as server:
        if misbehave is not None:
            server.misbehave = misbehave
        yield server


def broken(share: float) -> Misbehave:
    """Break each answer off after a share of its body."""

    def misbehave(_asked: Asked, answer: Answer) -> Answer:
        answer.body = answer.body[: int(len(answer.body) * share) or 1]
        return answer

    return misbehave


def test_a_file_is_fetched_with_progress(tmp_path: Path) -> None:
    it = Download(tmp_path)
    with serving() as server:
        assert it.fetch(server) == ""
    assert it.data == DATA
    assert it.seen == sorted(it.seen)
    assert it.seen[-1] == len(DATA)
    assert [asked.path for asked in server.asked] == [PATH]


def test_of_a_hash_image_only_its_tree_is_taken(tmp_path: Path) -> None:
    it = Download(tmp_path, 8192, is_tree=True)
    with serving() as server:
        assert it.fetch(server) == ""
    assert it.data == DATA[:8192]


def test_an_interrupted_download_goes_on_where_it_was(tmp_path: Path) -> None:
    it = Download(tmp_path)
    with serving(broken(0.5)) as server:
        # Each answer brings half of what is missing, so a retry is never in vain; the last byte comes, too.
        assert it.fetch(server) == ""
    assert it.data == DATA
    offsets = [asked.offset for asked in server.asked]
    assert offsets == sorted(set(offsets))
    assert all(asked.if_range == '"one"' for asked in server.asked[1:])


def test_another_attempt_goes_on_with_what_is_there(tmp_path: Path) -> None:
    it = Download(tmp_path)
    it.path.write_bytes(DATA[:5000])
    it.path.with_suffix(".etag").write_bytes(b'"one"')
    with serving() as server:
        assert it.fetch(server) == ""
    assert it.data == DATA
    assert [(asked.offset, asked.if_range) for asked in server.asked] == [(5000, '"one"')]


def test_content_that_changed_between_two_ranges_is_fetched_anew(tmp_path: Path) -> None:
    it = Download(tmp_path)
    old = content(300, "old")
    changed = False

    def misbehave(asked: Asked, answer: Answer) -> Answer:
        nonlocal changed
        if not changed:
            changed = True
            return Answer(200, {"ETag": '"zero"', "Content-Length": str(len(DATA))}, old[:9999])
        return answer

    with serving(misbehave) as server:
        assert it.fetch(server) == ""
    assert it.data == DATA
    assert server.asked[1].if_range == '"zero"'


def test_a_server_that_answers_a_range_with_everything_is_understood(tmp_path: Path) -> None:
    it = Download(tmp_path)
    it.path.write_bytes(b"x" * 5000)

    def misbehave(_asked: Asked, _answer: Answer) -> Answer:
        return Answer(200, {"Content-Length": str(len(DATA))}, DATA)

    with serving(misbehave) as server:
        assert it.fetch(server) == ""
    assert it.data == DATA
    assert it.path.with_suffix(".etag").read_bytes() == b""


@pytest.mark.parametrize(
    "span", ["bytes 0-99/1228800", "bytes 5001-9/1228800", "bytes x", "", "bytes 99999999999999999-1/*"]
)
def test_another_range_than_was_asked_for_is_not_taken(tmp_path: Path, span: str) -> None:
    it = Download(tmp_path)
    it.path.write_bytes(DATA[:5000])

    def misbehave(asked: Asked, answer: Answer) -> Answer:
        return Answer(206, {"Content-Range": span}, b"y" * 100) if asked.offset else answer

    with serving(misbehave) as server:
        assert it.fetch(server) == ""
    assert it.data == DATA


@pytest.mark.parametrize("etag", ['W/"weak"', "unquoted", '"' + "x" * 300 + '"', '"with\x7f"'])
def test_only_a_strong_etag_is_kept(tmp_path: Path, etag: str) -> None:
    it = Download(tmp_path)
    with serving() as server:
        server.etag = etag
        assert it.fetch(server) == ""
    assert it.path.with_suffix(".etag").read_bytes() == b""


def test_a_kept_mark_that_is_none_is_not_sent(tmp_path: Path) -> None:
    it = Download(tmp_path)
    it.path.write_bytes(DATA[:5000])
    it.path.with_suffix(".etag").write_bytes(b'"one"\r\nX-Injected: 1')
    with serving() as server:
        assert it.fetch(server) == ""
    assert server.asked[0].if_range == ""


@pytest.mark.parametrize("length", [len(DATA) - 1, len(DATA) + 1, 0, 2**31, 2**32, 2**63, 10**30])
def test_row2_another_length_than_the_signed_one_is_refused_before_the_body(
    tmp_path: Path, length: int
) -> None:
    it = Download(tmp_path)

    def misbehave(_asked: Asked, answer: Answer) -> Answer:
        answer.headers["Content-Length"] = str(length)
        return answer

    with serving(misbehave) as server:
        assert it.fetch(server) == "download-size"
    assert it.data == b""


@pytest.mark.parametrize("more", [1, 1_000_000])
def test_a_body_without_a_length_is_cut_at_the_signed_size(tmp_path: Path, more: int) -> None:
    it = Download(tmp_path)

    def misbehave(_asked: Asked, _answer: Answer) -> Answer:
        return Answer(200, {"Connection": "close"}, DATA + bytes(more))

    with serving(misbehave) as server:
        assert it.fetch(server) == "download-size"
    assert it.data == b""
    assert max(it.seen) == len(DATA)


def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    it = Download(tmp_path)

    def misbehave(_asked: Asked, answer: Answer) -> Answer:
        answer.hang = True
        return answer

    with serving(misbehave) as server:
        assert it.fetch(server) == "download-failed"
    assert len(server.asked) == download.TRIES


def test_a_server_that_trickles_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SLOW_TIME", 0.2)
    it = Download(tmp_path)

    def misbehave(_asked: Asked, answer: Answer) -> Answer:
        answer.drip = 0.01
        return answer

    with serving(misbehave) as server:
        assert it.fetch(server) == "download-too-slow"
    assert len(server.asked) == 1


def test_a_server_that_breaks_off_for_ever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 9)
    it = Download(tmp_path)

    def misbehave(_asked: Asked, answer: Answer) -> Answer:
        answer.body = answer.body[:1]  # always something, never enough
        return answer

    with serving(misbehave) as server:
        assert it.fetch(server) == "download-failed"
    assert len(server.asked) == 9
    assert it.data == DATA[:9]


@pytest.mark.parametrize("status", [401, 403, 404, 204, 304, 999])
def test_what_the_server_does_not_have_is_not_asked_for_again(tmp_path: Path, status: int) -> None:
    it = Download(tmp_path)
    with serving(lambda _asked, _answer: Answer(status, {"Content-Length": "0"}, b"")) as server:
        assert it.fetch(server) == "download-refused"
    assert len(server.asked) == 1


def test_a_server_in_trouble_is_asked_again(tmp_path: Path) -> None:
    it = Download(tmp_path)
    troubles = iter([500, 503, 429])

    def misbehave(_asked: Asked, answer: Answer) -> Answer:
        status = next(troubles, 0)
        return Answer(status, {"Content-Length": "0"}, b"") if status else answer

    with serving(misbehave) as server:
        assert it.fetch(server) == ""
    assert it.data == DATA


def redirecting(to: str) -> Misbehave:
    def misbehave(asked: Asked, answer: Answer) -> Answer:
        return Answer(302, {"Location": to, "Content-Length": "0"}, b"") if asked.path == PATH else answer

    return misbehave


def test_a_redirect_on_the_same_scheme_is_followed(tmp_path: Path) -> None:
    it = Download(tmp_path)
    with serving(redirecting("../other/root.img"), **{"/other/root.img": DATA}) as server:
        assert it.fetch(server) == ""
    assert it.data == DATA


@pytest.mark.parametrize(
    "to",
    [
        "https://127.0.0.1:1/root.img",
        "file:///etc/passwd",
        "ftp://127.0.0.1/root.img",
        "http://user@127.0.0.1/",
        "http://[::1",
        "http://127.0.0.1:99999/",
    ],
)
def test_a_redirect_elsewhere_is_not_followed(tmp_path: Path, to: str) -> None:
    it = Download(tmp_path)
    with serving(redirecting(to)) as server:
        assert it.fetch(server) == "download-address"
    assert len(server.asked) == 1


def test_redirects_have_an_end(tmp_path: Path) -> None:
    it = Download(tmp_path)
    with serving(redirecting(PATH)) as server:
        assert it.fetch(server) == "download-refused"
    assert len(server.asked) == download.REDIRECTS + 1


def test_no_proxy_and_no_credentials_of_the_environment_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    it = Download(tmp_path)
    with serving() as server:
        assert it.fetch(server) == ""


# TLS


def test_tls_with_an_authority_of_this_build(tmp_path: Path) -> None:
    it = Download(tmp_path)
    certificate(tmp_path)
    with ImageServer({PATH: DATA}, tmp_path / "server.pem") as server:
        assert it.fetch(server, development=False) == ""
    assert it.data == DATA


def test_a_server_of_another_authority_or_name_is_not_believed(tmp_path: Path) -> None:
    it = Download(tmp_path)
    certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other")
    with ImageServer({PATH: DATA}, tmp_path / "server.pem") as server:
        it.anchors = other
        assert it.fetch(server, development=False) == "download-untrusted"
        it.anchors = certificate(tmp_path / "other", address="127.0.0.2")
    with ImageServer({PATH: DATA}, tmp_path / "other/server.pem") as server:
        assert it.fetch(server, development=False) == "download-untrusted"
    assert it.data == b""
    assert server.asked == []


def test_tls_is_not_left_by_a_redirect(tmp_path: Path) -> None:
    it = Download(tmp_path)
    certificate(tmp_path)
    with serving() as plain, ImageServer({PATH: DATA}, tmp_path / "server.pem") as server:
        server.misbehave = redirecting(f"{plain.url}{PATH}")
        assert it.fetch(server, development=False) == "download-address"
        assert plain.asked == []


def test_without_tls_only_in_development_and_without_anchors_not_at_all(tmp_path: Path) -> None:
    it = Download(tmp_path)
    with serving() as server:
        assert it.fetch(server, development=False) == "download-insecure"
        assert it.fetch(server, "https://127.0.0.1:1") == "download-anchors-missing"
        it.anchors.write_text("no certificate")
        assert it.fetch(server, "https://127.0.0.1:1") == "download-anchors-missing"
    assert server.asked == []
