# SPDX-License-Identifier: Apache-2.0
"""The GuestOSes that lie on the data volume, `/data/cml/operatingsystems` (interop section 2.5).

    <name>-<version>.conf|.sig|.cert                a signed configuration
    <name>-<version>/<image>.img|<image>.hash.img   its images
    .staging-<name>-<version>/                      one that is being installed (`guestos.staging`)

A version is there when its configuration is: that comes last, and goes first. Nothing in here is believed.
What `read` returns has to be judged before it is used, and images are checked while they are read. Everything
is reached by descriptor, and no symbolic link is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trustme_init.errors import StorageRefusal
from trustme_init.linux.files import (
    RESOLVE_BENEATH,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    openat2,
    read_limited,
    sync_directory,
)
from trustme_init.trust.guestos import CONFIG_LIMIT
from trustme_init.trust.selection import GuestOsId, parse_stem

DIRECTORY: Final = "operatingsystems"
STAGING: Final = ".staging-"
IMAGES: Final = "images"
"""The folder of a staging that images are fetched into."""
MARK: Final = ".etag"
"""Suffix of what the fetcher keeps beside an image, so that a server can say whether it has changed."""
SIGNATURE_LIMIT: Final = 4096
CERTIFICATE_LIMIT: Final = 64 * 1024
"""Bytes of a chain; as for the core (`boot.core`)."""
SUFFIXES: Final = {".conf": CONFIG_LIMIT, ".sig": SIGNATURE_LIMIT, ".cert": CERTIFICATE_LIMIT}
FOLDER_MODE: Final = 0o700

_INSIDE: Final = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV


@dataclass(frozen=True, slots=True)
class SignedFiles:
    """The three parts of a signed configuration, as they were given or found: not judged."""

    config: bytes
    signature: bytes
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Installed:
    """A version that has all its parts."""

    guest_os: GuestOsId
    size: int
    """Bytes that its images take on the volume."""


class GuestOsStore:
    """The reading side; see the module. `home` is `/data/cml`.

    StorageRefusal: "guestos-missing", "guestos-unreadable".
    """

    def __init__(self, home: Path) -> None:
        self._path = home / DIRECTORY

    @property
    def path(self) -> Path:
        """The directory, which may not be there yet."""
        return self._path

    def installed(self) -> Sequence[Installed]:
        """Return every complete version, by name, then by version."""
        root = self._root()
        if root is None:
            return ()
        try:
            names = set(list_names(root))
            return tuple(
                Installed(guest_os, _images_size(root, guest_os.stem))
                for guest_os in sorted(filter(None, map(parse_stem, _stems(names))))
                if guest_os.stem in names and all(f"{guest_os.stem}{end}" in names for end in SUFFIXES)
            )
        except OSError as exc:
            raise unreadable(DIRECTORY, exc) from exc
        finally:
            os.close(root)

    def versions(self, name: str) -> Sequence[GuestOsId]:
        """Return the complete versions of one GuestOS, oldest first."""
        return tuple(each.guest_os for each in self.installed() if each.guest_os.name == name)

    def newest(self, name: str) -> GuestOsId | None:
        """Return the highest complete version of a GuestOS, None if there is none."""
        return max(self.versions(name), default=None)

    def read(self, guest_os: GuestOsId) -> SignedFiles:
        """Return the signed configuration of a version."""
        root = self._root()
        if root is None:
            raise missing(guest_os.stem)
        try:
            return SignedFiles(
                *(read_file(root, f"{guest_os.stem}{end}", limit) for end, limit in SUFFIXES.items())
            )
        except FileNotFoundError as exc:
            raise missing(guest_os.stem) from exc
        except OSError as exc:
            raise unreadable(guest_os.stem, exc) from exc
        finally:
            os.close(root)

    def directory(self, guest_os: GuestOsId) -> int:
        """Return an open descriptor of the folder with a version's images, which the caller closes."""
        root = self._root()
        if root is None:
            raise missing(guest_os.stem)
        try:
            return open_folder(root, guest_os.stem)
        except FileNotFoundError as exc:
            raise missing(guest_os.stem) from exc
        except OSError as exc:
            raise unreadable(guest_os.stem, exc) from exc
        finally:
            os.close(root)

    def make(self) -> int:
        """Return an open descriptor of the directory, which is made durably where there is none.

        StorageRefusal: "guestos-unreadable", "guestos-unwritable".
        """
        root = self._root()
        if root is not None:
            return root
        try:
            self._path.mkdir(mode=FOLDER_MODE, exist_ok=True)
            sync_directory(self._path.parent)
        except OSError as exc:
            raise unwritable(DIRECTORY, exc) from exc
        return self.make()

    def _root(self) -> int | None:
        try:
            return openat2(self._path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise unreadable(DIRECTORY, exc) from exc


def list_names(folder: int) -> list[str]:
    """Return the names in an open folder, in order; OSError."""
    return sorted(os.listdir(folder))


def open_folder(parent: int, name: str) -> int:
    """Open a folder of the store; OSError."""
    return openat2(name, os.O_RDONLY | os.O_DIRECTORY, dirfd=parent, resolve=_INSIDE)


def open_file(parent: int, name: str) -> int:
    """Open a regular file of the store for reading; OSError for anything else."""
    # O_NONBLOCK: a FIFO is refused instead of being waited for.
    fd = openat2(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, dirfd=parent, resolve=_INSIDE)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def read_file(parent: int, name: str, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; OSError for anything else."""
    fd = open_file(parent, name)
    try:
        return read_limited(fd, limit)
    finally:
        os.close(fd)


def _stems(names: set[str]) -> list[str]:
    return [name.removesuffix(".conf") for name in names if name.endswith(".conf")]


def _images_size(root: int, stem: str) -> int:
    """Return what the regular files in a version's folder take; 0 if there is no such folder."""
    try:
        folder = open_folder(root, stem)
    except OSError:
        return 0
    try:
        with os.scandir(folder) as entries:
            found = [entry.stat(follow_symlinks=False) for entry in entries]
    finally:
        os.close(folder)
    return sum(info.st_blocks * 512 for info in found if stat.S_ISREG(info.st_mode))


def missing(stem: str) -> StorageRefusal:
    """Return the refusal of what is not in the store."""
    return StorageRefusal(
        "guestos-missing",
        "there is no such GuestOS on this device",
        evidence=ascii(stem)[1:-1][:100],
        remedy="install it (`control push_guestos_config`); `control list_guestos` shows what is there",
    )


def unreadable(name: str, error: OSError) -> StorageRefusal:
    """Return the refusal of what is there and cannot be read."""
    return StorageRefusal(
        "guestos-unreadable",
        "a GuestOS on the data volume cannot be read",
        evidence=f"{name}: {error.strerror}",
        remedy="remove the GuestOS and install it again",
    )


def unwritable(name: str, error: OSError) -> StorageRefusal:
    """Return the refusal of a change that the disk does not take."""
    return StorageRefusal(
        "guestos-unwritable",
        "the store of GuestOSes cannot be changed",
        evidence=f"{name}: {error.strerror}",
        remedy="make room on the data volume and try again; if it stays, replace the disk",
    )
