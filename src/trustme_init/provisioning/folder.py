# SPDX-License-Identifier: Apache-2.0
"""A directory of the data volume that is only ever reached by its descriptor.

Nothing is followed: neither a symbolic link in any component of a path, nor a link or a device in place of a
file. What is written is old or new at any moment (`linux.files.write_atomic`); what an interrupted write left
behind has a name of its own, which `names` does not list and `clean` removes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from trustme_init.errors import StorageRefusal
from trustme_init.linux.files import AT_FDCWD, openat2, read_limited, write_atomic

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700


class Folder:
    """An open directory; to be used in a `with` statement, or closed.

    StorageRefusal: "certificate-store-unreadable", "certificate-store-unwritable".
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls, path: Path | str, dirfd: int = AT_FDCWD) -> Self | None:
        """Open a directory, relative to `dirfd`; None if there is none."""
        try:
            return cls(openat2(path, os.O_RDONLY | os.O_DIRECTORY, dirfd=dirfd))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise _unreadable(f"{path}: {exc.strerror}") from exc

    @classmethod
    def make(cls, path: Path) -> Self:
        """Open a directory; make it durably where there is none."""
        folder = cls.open(path)
        if folder is not None:
            return folder
        try:
            with suppress(FileExistsError):
                path.mkdir(mode=FOLDER_MODE)
            with cls(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as parent:
                os.fsync(parent._fd)
        except OSError as exc:
            raise _unwritable(f"{path}: {exc.strerror}") from exc
        return cls.make(path)

    def sub(self, name: str) -> Self | None:
        """Open a directory in this one; None if there is none."""
        return self.open(name, self._fd)

    def make_sub(self, name: str) -> Self:
        """Open a directory in this one; make it durably where there is none."""
        folder = self.sub(name)
        if folder is not None:
            return folder
        try:
            with suppress(FileExistsError):
                os.mkdir(name, FOLDER_MODE, dir_fd=self._fd)
            os.fsync(self._fd)
        except OSError as exc:
            raise _unwritable(f"{name}: {exc.strerror}") from exc
        return self.make_sub(name)

    def lock(self) -> None:
        """Wait until nobody else has this directory locked, and lock it until it is closed."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def names(self) -> list[str]:
        """Return the names in the directory in order, without what interrupted writes left behind."""
        return [name for name in self._all_names() if not _is_left_over(name)]

    def _all_names(self) -> list[str]:
        try:
            with os.scandir(self._fd) as entries:
                return sorted(entry.name for entry in entries)
        except OSError as exc:
            raise _unreadable(str(exc.strerror)) from exc

    def read(self, name: str, limit: int) -> bytes:
        """Return a regular file's content; OSError for anything else, or for more than `limit` bytes."""
        # O_NONBLOCK: a FIFO must be refused, not waited for.
        fd = openat2(name, os.O_RDONLY | os.O_NONBLOCK, dirfd=self._fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            return read_limited(fd, limit)
        finally:
            os.close(fd)

    def write(self, name: str, data: bytes) -> None:
        """Make a file hold `data`, mode 0600, durably when this returns."""
        # By the descriptor: the directory that was looked at is the one that is written to.
        path = Path(f"/proc/self/fd/{self._fd}") / name
        try:
            write_atomic(path, data, FILE_MODE)
        except OSError as exc:
            with suppress(OSError):
                os.unlink(f".{name}.new", dir_fd=self._fd)
            raise _unwritable(f"{name}: {exc.strerror}") from exc

    def remove(self, name: str) -> None:
        """Remove a file, or the link in its place, durably."""
        try:
            os.unlink(name, dir_fd=self._fd)
            os.fsync(self._fd)
        except OSError as exc:
            raise _unwritable(f"{name}: {exc.strerror}") from exc

    def clean(self) -> None:
        """Remove what interrupted writes left behind."""
        for name in self._all_names():
            if _is_left_over(name):
                with suppress(OSError):  # then it goes on being ignored
                    os.unlink(name, dir_fd=self._fd)

    def close(self) -> None:
        """Close the directory, which unlocks it."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_left_over(name: str) -> bool:
    """Whether a name is of the form that `write_atomic` gives a file until it is complete."""
    return name.startswith(".") and name.endswith(".new")


def _unreadable(evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "certificate-store-unreadable",
        "the certificate store cannot be read",
        evidence=evidence,
        remedy="the data volume is damaged; restore it, or wipe the device and provision it again",
    )


def _unwritable(evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "certificate-store-unwritable",
        "the certificate store cannot be changed",
        evidence=evidence,
        remedy="free space on the data volume; what is stored now, `control ca_list` shows",
    )
