# SPDX-License-Identifier: Apache-2.0
"""Where images come from: the calling container's own files, or chunks that the client sends.

(A third source is `guestos.download`.) Rules:
- A `file://` path is looked up inside the root of the process that asked, as that process sees it, and
  nowhere else: `..` stops at that root, symbolic links and /proc's magic ones are not followed, and only
  regular files count.
- Never more than the signed size is taken. What the content is worth is judged afterwards (`guestos.check`).
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from trustme_init.errors import ControlRefusal, StorageRefusal
from trustme_init.guestos.pieces import Piece
from trustme_init.guestos.plan import ImageFile
from trustme_init.linux.files import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

FILE_SCHEME: Final = "file://"
CHUNK: Final = 256 * 1024

Progress = Callable[[str, int], None]
"""Takes a file's name and how many bytes of it there are now."""


@dataclass(frozen=True, slots=True)
class Target:
    """An open file that is to become an image; what it holds already was fetched by an earlier attempt."""

    file: ImageFile
    fd: int
    mark: int = -1
    """Open file for what tells this content from a later one on the server; -1 where that is not needed."""

    @property
    def have(self) -> int:
        """Bytes that are there."""
        return os.fstat(self.fd).st_size

    def append(self, data: bytes | memoryview) -> None:
        """Add data; StorageRefusal("guestos-unwritable"), as for a disk that is full."""
        try:
            offset = self.have
            view = memoryview(data)
            while view:
                written = os.pwrite(self.fd, view, offset)
                offset += written
                view = view[written:]
        except OSError as exc:
            raise not_writable(self.file.name, exc) from exc

    def restart(self) -> None:
        """Forget what there is."""
        os.ftruncate(self.fd, 0)

    def finish(self) -> None:
        """Make it durable."""
        try:
            os.fsync(self.fd)
        except OSError as exc:
            raise not_writable(self.file.name, exc) from exc


class Source(Protocol):
    """Something that fills targets."""

    def fetch(self, targets: Iterable[Target], progress: Progress) -> None:
        """Bring each target to its size; Refusal."""
        ...


def not_writable(name: str, error: OSError) -> StorageRefusal:
    """Return the refusal of what the disk does not take."""
    return StorageRefusal(
        "guestos-unwritable",
        "an image cannot be written",
        evidence=f"{name}: {error.strerror}",
        remedy="make room on the data volume and push the GuestOS again: what was fetched stays",
    )


def pid_of(process: int) -> int:
    """Return the number of the process that a pidfd names, -1 when it has ended; OSError."""
    info = Path(f"/proc/self/fdinfo/{process}").read_text(encoding="ascii")
    return next((int(line.partition(":")[2]) for line in info.splitlines() if line.startswith("Pid:")), -1)


def root_of(process: int) -> int:
    """Return an open descriptor of the root directory of the process that a pidfd names.

    ControlRefusal("caller-gone").
    """
    try:
        pid = pid_of(process)
        if pid < 1:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # It lives now, so the number was its own when the directory was opened.
            signal.pidfd_send_signal(process, 0)
        except OSError:
            os.close(root)
            raise
    except OSError as exc:
        raise ControlRefusal(
            "caller-gone",
            "whoever asked for the installation has ended, so its files cannot be found",
            evidence=type(exc).__name__,
            remedy="keep the client running until the installation has been completed",
        ) from exc
    return root


def open_inside(root: int, path: str) -> int:
    """Open a regular file below `root` for reading, following no link; OSError."""
    fd = openat2(
        path,
        os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY,
        dirfd=root,
        resolve=RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
    )
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


class FileSource:
    """Files of a container, opened at once: nothing is looked up after that."""

    def __init__(self, root: int, url: str, files: Iterable[ImageFile]) -> None:
        directory = url.removeprefix(FILE_SCHEME).strip("/")
        self._open: dict[str, int] = {}
        for file in files:
            path = f"{directory}/{file.name}"
            try:
                self._open[file.name] = open_inside(root, path)
            except OSError as exc:
                raise _unfit(file.name, str(exc.strerror), path) from exc

    def fetch(self, targets: Iterable[Target], progress: Progress) -> None:
        """Copy. StorageRefusal("image-source-unfit") for a file of another size, or that cannot be read."""
        for target in targets:
            source = self._open[target.file.name]
            size = os.fstat(source).st_size
            if size < target.file.size or (size > target.file.size and not target.file.is_tree):
                raise _unfit(target.file.name, f"{size} bytes, signed {target.file.size}")
            while (have := target.have) < target.file.size:
                try:
                    data = os.pread(source, min(CHUNK, target.file.size - have), have)
                except OSError as exc:
                    raise _unfit(target.file.name, str(exc.strerror)) from exc
                if not data:
                    raise _unfit(target.file.name, f"it ended at {have} of {target.file.size} bytes")
                target.append(data)
                progress(target.file.name, have + len(data))
            target.finish()


class StreamSource:
    """Pieces that come one by one; `receive` waits for the next, `taken` lets the client send another."""

    def __init__(self, receive: Callable[[], Piece], taken: Callable[[], None]) -> None:
        self._receive = receive
        self._taken = taken

    def fetch(self, targets: Iterable[Target], progress: Progress) -> None:
        """Take pieces until every target is whole; ControlRefusal("image-piece-unfit") ends it."""
        open_: Mapping[str, Target] = {target.file.name: target for target in targets}
        missing = {name for name, target in open_.items() if target.have < target.file.size}
        while missing:
            piece = self._receive()
            target = open_.get(piece.name)
            have = target.have if target is not None else 0
            if target is None or piece.offset != have or not 0 < len(piece.data) <= target.file.size - have:
                raise ControlRefusal(
                    "image-piece-unfit",
                    "a piece of an image was sent that does not follow what is there",
                    evidence=f"{piece.name!a:.80}: {len(piece.data)} bytes at {piece.offset} of {have}",
                    remedy="push the GuestOS again and send each file on from where the device says",
                )
            target.append(piece.data)
            if target.have == target.file.size:
                target.finish()
                missing.discard(piece.name)
            progress(piece.name, target.have)
            self._taken()


def _unfit(name: str, evidence: str, path: str = "") -> StorageRefusal:
    return StorageRefusal(
        "image-source-unfit",
        "an image cannot be taken from where it is said to be",
        evidence=f"{path or name}: {evidence}",
        remedy="put the files of this very build there, as regular files, and push the GuestOS again",
    )
