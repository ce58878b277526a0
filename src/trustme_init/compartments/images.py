# SPDX-License-Identifier: Apache-2.0
"""From the open directory of a GuestOS to detached mounts of its verified images.

Each file is opened once, by descriptor, following no link; that descriptor goes to dm-verity. Whatever
happens to the name, the file or its content afterwards: a block that does not fit the signed root hash is
never returned by a read.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from trustme_init.errors import CompartmentRefusal, TrustRefusal
from trustme_init.linux.files import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2
from trustme_init.linux.mount import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    fsopen_mount,
)
from trustme_init.trust.verity import BLOCK_SIZE, SUPERBLOCK_SIZE

if TYPE_CHECKING:
    from trustme_init.compartments.spec import VerifiedFile
    from trustme_init.machine import VerityBackend
    from trustme_init.trust.guestos import VerityImage

FILE_NAME: Final = "content"
"""Of a verified file in the file system that `mount_file` makes."""

_CHUNK: Final = 64 * 1024
_REMEDY: Final = "copy the GuestOS to the store again"


def mount_image(image: VerityImage, directory: int, backend: VerityBackend, *, name: str) -> int:
    """Return a detached, read-only mount of a verified image.

    `directory` is an open descriptor of the folder with `<image_file>.img` and `<image_file>.hash.img`,
    `name` is for the log and the device. CompartmentRefusal or TrustRefusal, and nothing is left behind.
    """
    with ExitStack() as stack:
        data = _open(directory, f"{image.image_file}.img")
        stack.callback(os.close, data)
        size = os.fstat(data).st_size
        if size != image.data_size or size % BLOCK_SIZE:
            raise TrustRefusal(
                "image-size-mismatch",
                "an image has not the signed size",
                evidence=f"{image.image_file}.img: {size} bytes, signed {image.data_size}",
                remedy=_REMEDY,
            )
        tree = _open(directory, f"{image.image_file}.hash.img")
        stack.callback(os.close, tree)
        superblock = os.pread(tree, SUPERBLOCK_SIZE, 0) if image.salt is None else None
        device = backend.open(name, data, tree, image.parameters(superblock))
        # The mount keeps the device; it goes away with the compartment's last process.
        stack.callback(device.close)
        try:
            return fsopen_mount(
                image.fs_type,
                source=str(device.path),
                options={"ro": None},
                attrs=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
            )
        except OSError as exc:
            raise CompartmentRefusal(
                "image-not-mountable",
                "a verified image cannot be mounted",
                evidence=f"{image.image_file}: {image.fs_type}: {exc.strerror}",
                remedy=f"use a kernel with {image.fs_type} and its compression, or copy the image again",
            ) from exc


def mount_file(file: VerifiedFile, directory: int) -> int:
    """Return a detached mount of a tmpfs whose one file FILE_NAME is a verified copy of the store's.

    What is hashed is what is written: the store's file is read once. The file system has no room for more
    than the file. TrustRefusal: "image-unreadable", "image-size-mismatch", "image-hash-mismatch".
    """
    with ExitStack() as stack:
        source = _open(directory, f"{file.image_file}.img")
        stack.callback(os.close, source)
        with ExitStack() as undo:
            # The directory takes one inode, and so does the file; a page more, as size 0 means no limit.
            mount = fsopen_mount(
                "tmpfs",
                source="file",
                options={"mode": "0755", "size": str(-(-file.size // 4096) * 4096), "nr_inodes": "2"},
                attrs=MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
            )
            undo.callback(os.close, mount)
            _copy(source, mount, file)
            undo.pop_all()
        return mount


def _copy(source: int, mount: int, file: VerifiedFile) -> None:
    digest = hashlib.sha256()
    left = file.size
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    target = os.open(FILE_NAME, flags, 0o644, dir_fd=mount)
    try:
        os.fchmod(target, 0o644)
        while data := os.read(source, _CHUNK):
            left -= len(data)
            if left < 0:
                break
            digest.update(data)
            os.write(target, data)
    finally:
        os.close(target)
    if left:
        raise TrustRefusal(
            "image-size-mismatch",
            "a file of the GuestOS has not the signed size",
            evidence=f"{file.image_file}.img, signed {file.size} bytes",
            remedy=_REMEDY,
        )
    if digest.digest() != file.sha256:
        raise TrustRefusal(
            "image-hash-mismatch",
            "a file of the GuestOS is not the one that was signed",
            evidence=f"{file.image_file}.img: SHA-256 {digest.hexdigest()}",
            remedy=_REMEDY,
        )


def _open(directory: int, name: str) -> int:
    try:
        # O_NONBLOCK: a FIFO is refused below instead of being waited for.
        fd = openat2(
            name,
            os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY,
            dirfd=directory,
            resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV,
        )
    except OSError as exc:
        raise TrustRefusal(
            "image-unreadable",
            "an image of the GuestOS cannot be opened",
            evidence=f"{name}: {exc.strerror}",
            remedy=_REMEDY,
        ) from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise TrustRefusal(
            "image-unreadable",
            "an image of the GuestOS is not a regular file",
            evidence=name,
            remedy=_REMEDY,
        )
    return fd
