# SPDX-License-Identifier: Apache-2.0
"""Files and streams as sources, without a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trustme_init.errors import Refusal
from trustme_init.guestos.pieces import Piece
from trustme_init.guestos.plan import ImageFile
from trustme_init.guestos.sources import FileSource, StreamSource, Target, open_inside, pid_of, root_of

DATA = bytes(range(256)) * 40
FILE = ImageFile("x.img", len(DATA))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT, 0o600)
    yield Target(FILE, fd)
    os.close(fd)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "root/updates").mkdir(parents=True)
    (tmp_path / "root/updates/x.img").write_bytes(DATA)
    fd = os.open(tmp_path / "root", os.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    "url", ["file://updates", "file:///updates/", "file://../../updates", "file:////updates"]
)
@pytest.mark.parametrize("have", [0, 1, 5000])
def test_a_file_is_copied_from_where_the_target_ends(root: int, target: Target, url: str, have: int) -> None:
    target.append(DATA[:have])
    seen: list[int] = []
    source = FileSource(root, url, [FILE])
    source.fetch([target], lambda _name, now: seen.append(now))
    assert os.pread(target.fd, 10**6, 0) == DATA
    assert seen[-1] == len(DATA)
    for fd in source._open.values():
        os.close(fd)


def test_a_file_that_shrinks_meanwhile_is_refused(root: int, target: Target, tmp_path: Path) -> None:
    source = FileSource(root, "file://updates", [FILE])
    image = tmp_path / "root/updates/x.img"

    def shrink(_name: str, _now: int) -> None:
        os.truncate(image, 0)

    os.truncate(image, len(DATA) - 1)
    with pytest.raises(Refusal) as caught:
        source.fetch([target], shrink)
    assert caught.value.code == "image-source-unfit"
    for fd in source._open.values():
        os.close(fd)


@pytest.mark.parametrize(
    "name", ["link", "folder/link", "dir-link/x.img", "self", "/proc/self/root/etc/passwd"]
)
def test_no_link_is_followed(root: int, tmp_path: Path, name: str) -> None:
    inside = tmp_path / "root"
    (inside / "folder").mkdir()
    (inside / "link").symlink_to("updates/x.img")
    (inside / "folder/link").symlink_to("/updates/x.img")
    (inside / "dir-link").symlink_to("updates")
    (inside / "self").symlink_to("/proc/self/exe")
    with pytest.raises(OSError):
        open_inside(root, name)


def test_the_root_of_a_process_is_found_by_its_descriptor() -> None:
    own = os.pidfd_open(os.getpid())
    try:
        assert pid_of(own) == os.getpid()
        fd = root_of(own)
        assert os.fstat(fd).st_ino == Path("/").stat().st_ino
        os.close(fd)
    finally:
        os.close(own)


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece("x.img", 0, DATA)],
        [Piece("x.img", 0, DATA[:1]), Piece("x.img", 1, DATA[1:])],
    ],
)
def test_a_stream_fills_the_target(target: Target, pieces: list[Piece]) -> None:
    taken: list[int] = []
    source = StreamSource(iter(pieces).__next__, lambda: taken.append(1))
    source.fetch([target], lambda _name, _now: None)
    assert os.pread(target.fd, 10**6, 0) == DATA
    assert len(taken) == len(pieces)


@pytest.mark.parametrize(
    "piece",
    [
        Piece("y.img", 0, b"x"),
        Piece("x.img", 1, b"x"),
        Piece("x.img", -1, b"x"),
        Piece("x.img", 0, b""),
        Piece("x.img", 0, DATA + b"x"),
    ],
)
def test_row2_a_piece_out_of_place_is_refused_unwritten(target: Target, piece: Piece) -> None:
    source = StreamSource(lambda: piece, lambda: None)
    with pytest.raises(Refusal) as caught:
        source.fetch([target], lambda _name, _now: None)
    assert caught.value.code == "image-piece-unfit"
    assert target.have == 0
