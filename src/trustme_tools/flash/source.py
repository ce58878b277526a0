# SPDX-License-Identifier: Apache-2.0
"""An image to be flashed: raw or compressed, with or without a block map, read from front to back.

Rules:
- The whole image is read and hashed before a device is touched. With a map each range must hash to what the
  map says; without one the image is mapped now, by the file's holes, or where it is compressed by its zeros.
- Later reads are compared with that map, so an image that changes in between is noticed.
- Compressed images go through the well-kept programs, recognised by content, not by name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, NamedTuple, Protocol

from trustme_init.storage.layout import MIB
from trustme_tools.errors import ToolError
from trustme_tools.flash import bmap
from trustme_tools.flash.bmap import Bmap, Range
from trustme_tools.tooling import find

CHUNK: Final = 4 * MIB
ENDS: Final = MIB
"""Bytes kept of either end of the image: its partition tables."""
STREAM_BLOCK: Final = 64 * 1024
"""A compressed image without a map is mapped in these."""

# "-M": xz and zstd have default limits of memory; gzip needs none.
_PROGRAMS: Final[Mapping[bytes, tuple[str, Sequence[str]]]] = {
    b"\x1f\x8b": ("gzip", ["-dc"]),
    b"\xfd7zXZ\0": ("xz", ["-dc", "-M", "512MiB"]),
    b"\x28\xb5\x2f\xfd": ("zstd", ["-dcq", "-M512MiB"]),
}
_SUFFIXES: Final = (".gz", ".xz", ".zst")


class Reader(Protocol):
    """Reads an image; offsets only grow."""

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes, fewer at the image's end."""
        ...


@dataclass(frozen=True, slots=True)
class Image:
    """A whole image that was read once: its map and both its ends."""

    path: Path
    program: tuple[str, Sequence[str]] | None
    bmap: Bmap
    bmap_path: Path | None
    """Where the map comes from; None if it was made here."""
    head: bytes
    tail: bytes

    @property
    def size(self) -> int:
        """Bytes, uncompressed."""
        return self.bmap.image_size

    def read_ends(self, offset: int, size: int) -> bytes:
        """Read from the ends only (a `gpt.ReadAt`): empty anywhere else."""
        if offset + size <= len(self.head):
            return self.head[offset : offset + size]
        start = offset - (self.size - len(self.tail))
        return self.tail[start : start + size] if start >= 0 else b""

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Open the image again, to read it from front to back."""
        with self.path.open("rb", buffering=0) as file:
            if self.program is None:
                yield _Raw(file.fileno())
                return
            with _decompressed(file, self.program, self.path) as stream:
                yield _Stream(stream)


def load(path: Path, *, map_path: Path | None = None, use_map: bool = True, limit: int) -> Image:
    """Read the image at `path` whole and return what is known of it.

    `map_path` names the block map; else the one beside the image is taken, unless not `use_map`. Reading ends
    after `limit` bytes. ToolError: "image-not-a-file", "image-unreadable", "device-too-small", "bad-bmap",
    "bmap-mismatch".
    """
    with path.open("rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ToolError(f"{path} is not a file", "name an image file", code="image-not-a-file")
        start = file.read(max(map(len, _PROGRAMS)))
        program = next((each for magic, each in _PROGRAMS.items() if start.startswith(magic)), None)
        found = map_path or (_map_beside(path) if use_map else None)
        given = bmap.parse(_bounded(found)) if found is not None else None
        file.seek(0)
        if program is None:
            size = os.fstat(file.fileno()).st_size
            _check_size(path, size, limit, given)
            raw = _Raw(file.fileno())
            measured = given or _measure(file.fileno(), size)
            if given is not None:
                verify(given, raw, path)
            head, tail = raw.read(0, min(ENDS, size)), raw.read(max(size - ENDS, 0), ENDS)
        else:
            with _decompressed(file, program, path) as stream:
                measured, head, tail = _measure_stream(stream, path, limit, given)
    return Image(path, program, measured, found, head, tail)


def verify(given: Bmap, reader: Reader, path: Path) -> None:
    """ToolError("bmap-mismatch") unless every range hashes to what the map says."""
    for each in given.ranges:
        digest = hashlib.sha256()
        for offset in range(each.first, each.end, CHUNK):
            digest.update(reader.read(offset, min(CHUNK, each.end - offset)))
        if digest.hexdigest() != each.sha256:
            raise _mismatch(path, f"bytes {each.first} to {each.end} hash to {digest.hexdigest()}")


def _mismatch(path: Path, evidence: str) -> ToolError:
    return ToolError(
        "the image is not the one its block map was made for",
        "get both again; nothing was written",
        code="bmap-mismatch",
        evidence=f"{path}: {evidence}",
    )


def _map_beside(path: Path) -> Path | None:
    """Return the map beside an image: IMAGE.bmap, or without the compression's suffix, or the image's."""
    plain = path.with_suffix("") if path.suffix in _SUFFIXES else path
    for name in (path.name, plain.name, plain.stem):
        if (candidate := path.with_name(name + bmap.SUFFIX)).exists():
            return candidate
    return None


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(bmap.LIMIT + 1)


def _check_size(path: Path, size: int, limit: int, given: Bmap | None) -> None:
    if size == 0:
        raise ToolError(f"{path} is empty", "build the image again", code="image-unreadable")
    if given is not None and given.image_size != size:
        raise _mismatch(path, f"{size} bytes, the map says {given.image_size}")
    if size > limit:
        raise too_small(size, limit)


def too_small(size: int, limit: int) -> ToolError:
    """Return the error of an image of `size` bytes, or more, for a device of `limit`."""
    return ToolError(
        "the device is too small for the image",
        "use a larger one",
        code="device-too-small",
        evidence=f"the image has at least {size} bytes, the device {limit}",
    )


def map_file(path: Path) -> Bmap:
    """Map a raw image by the holes of its file."""
    with path.open("rb", buffering=0) as file:
        return _measure(file.fileno(), os.fstat(file.fileno()).st_size)


def _measure(fd: int, size: int) -> Bmap:
    ranges = []
    raw = _Raw(fd)
    for first, end in _merged(_data(fd, size), size):
        digest = hashlib.sha256()
        for offset in range(first, end, CHUNK):
            digest.update(raw.read(offset, min(CHUNK, end - offset)))
        ranges.append(Range(first, end - first, digest.hexdigest()))
    return Bmap(size, bmap.BLOCK_SIZE, tuple(ranges))


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where the file is no hole: (first byte, byte behind)."""
    position = 0
    while position < size:
        try:
            first = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        position = os.lseek(fd, first, os.SEEK_HOLE)
        yield first, position


def _merged(runs: Iterator[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Grow runs to whole blocks, and make one of those that then touch."""
    merged: list[tuple[int, int]] = []
    block = bmap.BLOCK_SIZE
    for first, end in runs:
        start, behind = first // block * block, min(-(-end // block) * block, size)
        if merged and start <= merged[-1][1]:
            start, _ = merged.pop()
        merged.append((start, behind))
    return merged


class _Measured(NamedTuple):
    bmap: Bmap
    head: bytes
    tail: bytes


def _measure_stream(pipe: IO[bytes], path: Path, limit: int, given: Bmap | None) -> _Measured:
    """Read a compressed image to its end: map it where there is no map, else compare."""
    if given is not None and given.image_size > limit:
        raise too_small(given.image_size, limit)
    recorder = _Recorder(pipe)
    if given is not None:
        verify(given, recorder, path)
    ranges: list[Range] = []
    first, digest = -1, hashlib.sha256()
    while data := recorder.read(recorder.position, STREAM_BLOCK):
        offset = recorder.position - len(data)
        if recorder.position > limit:
            raise too_small(recorder.position, limit)
        if given is not None:
            continue
        if data.count(0) == len(data):
            if first >= 0:
                ranges.append(Range(first, offset - first, digest.hexdigest()))
                first = -1
            continue
        if first < 0:
            first, digest = offset, hashlib.sha256()
        digest.update(data)
    size = recorder.position
    if first >= 0:
        ranges.append(Range(first, size - first, digest.hexdigest()))
    _check_size(path, size, limit, given)
    return _Measured(given or Bmap(size, STREAM_BLOCK, tuple(ranges)), recorder.head, recorder.tail)


class _Raw:
    """A Reader of an open file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        while (
            data and len(data) < size and (more := os.pread(self._fd, size - len(data), offset + len(data)))
        ):
            data += more
        return data


class _Stream:
    """A Reader of a pipe: what lies between two reads is read and dropped."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self.position = 0

    def read(self, offset: int, size: int) -> bytes:
        while self.position < offset:
            if not self._take(min(CHUNK, offset - self.position)):
                return b""
        return self._take(size)

    def _take(self, size: int) -> bytes:
        data = self._pipe.read(size)
        self.position += len(data)
        return data


class _Recorder(_Stream):
    """Keeps both ends of all that goes by, what is dropped included."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(pipe)
        self.head = b""
        self._last: deque[bytes] = deque()
        self._kept = 0

    @property
    def tail(self) -> bytes:
        """The last bytes so far, ENDS of them if there are as many."""
        return b"".join(self._last)[-ENDS:]

    def _take(self, size: int) -> bytes:
        data = super()._take(size)
        if len(self.head) < ENDS:
            self.head += data[: ENDS - len(self.head)]
        self._last.append(data)
        self._kept += len(data)
        while self._kept - len(self._last[0]) >= ENDS:
            self._kept -= len(self._last.popleft())
        return data


@contextmanager
def _decompressed(file: IO[bytes], program: tuple[str, Sequence[str]], path: Path) -> Iterator[IO[bytes]]:
    """Yield what `program` makes of the file; ToolError("image-unreadable") if it does not like it."""
    name, arguments = program
    process = subprocess.Popen(
        [find(name), *arguments], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=CHUNK
    )
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    assert process.stderr is not None  # noqa: S101 - same
    try:
        yield process.stdout
        ended = not process.stdout.read(1)
        said = process.stderr.read().decode(errors="replace").strip()
        if ended and process.wait():
            raise ToolError(
                f"{path} cannot be decompressed",
                "get the image again",
                code="image-unreadable",
                evidence=f"{name}: {said}",
            )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
