# SPDX-License-Identifier: Apache-2.0
"""Whether fetched files are what the signed configuration names: SHA-256, and dm-verity hash trees.

A tree is computed anew from the image and compared with the fetched one block by block, while the image is
read once: what dm-verity will be given is right in every block, not only on the path to some of them. Memory
is one block for each level of the tree.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Final

from trustme_init.errors import TrustRefusal
from trustme_init.guestos.plan import DIGESTS_PER_BLOCK, ImageFile, levels
from trustme_init.trust.verity import BLOCK_SIZE, SUPERBLOCK_SIZE, with_superblock_salt

_CHUNK: Final = 256 * BLOCK_SIZE
_REMEDY: Final = "put the files of this very build where the device fetches them, and push it again"

Progress = Callable[[int], None]
"""Takes how many bytes were read since the last call."""


def check_file(file: ImageFile, data: int, tree: int | None, progress: Progress) -> None:
    """Judge one image; `data` and `tree` are open descriptors, the tree's only with a root hash.

    TrustRefusal: "image-size-mismatch", "image-hash-mismatch", "verity-mismatch"; with a salt that is not
    signed, those of `trust.verity.with_superblock_salt`.
    """
    _require_size(file.name, data, file.size)
    digest = hashlib.sha256()
    checker = None
    if tree is not None:
        _require_size(file.tree, tree, BLOCK_SIZE * (1 + sum(levels(file.size))))
        checker = _Tree(file, tree)
    offset = 0
    while offset < file.size:
        chunk = os.pread(data, min(_CHUNK, file.size - offset), offset)
        if not chunk or (checker is not None and len(chunk) % BLOCK_SIZE):
            raise _size_mismatch(file.name, offset + len(chunk), file.size)
        if file.sha256:
            digest.update(chunk)
        if checker is not None:
            checker.update(chunk)
        offset += len(chunk)
        progress(len(chunk))
    if file.sha256 and digest.hexdigest() != file.sha256:
        raise TrustRefusal(
            "image-hash-mismatch",
            "an image is not the one that the configuration names",
            evidence=f"{file.name}: sha256 {digest.hexdigest()}, signed {file.sha256}",
            remedy=_REMEDY,
        )
    if checker is not None and checker.root() != file.root_hash:
        raise _verity_mismatch(f"{file.name}: root hash {checker.root()}, signed {file.root_hash}")


class _Tree:
    """The hash tree of what it is fed, compared with the one in the file at every full block."""

    def __init__(self, file: ImageFile, tree: int) -> None:
        self._file = file
        self._fd = tree
        if file.salt is None:
            superblock = os.pread(tree, SUPERBLOCK_SIZE, 0)
            root_hash = bytes.fromhex(file.root_hash)
            salt = with_superblock_salt(superblock, root_hash=root_hash, data_size=file.size).salt
        else:
            salt = bytes.fromhex(file.salt)
        self._salted = hashlib.sha256(salt)
        blocks = levels(file.size)
        # On disk the level nearest to the root comes first, after the superblock.
        self._next = [1 + sum(blocks[level + 1 :]) for level in range(len(blocks))]
        self._pending: list[list[bytes]] = [[] for _ in blocks]
        self._root = b""

    def update(self, data: bytes) -> None:
        """Take whole blocks."""
        view = memoryview(data)
        for start in range(0, len(data), BLOCK_SIZE):
            self._add(0, self._hash(view[start : start + BLOCK_SIZE]))

    def root(self) -> str:
        """Return the root hash (hex) of everything that was fed."""
        for level, pending in enumerate(self._pending):
            if pending:
                self._close_block(level)
        return self._root.hex()

    def _hash(self, block: bytes | memoryview) -> bytes:
        digest = self._salted.copy()
        digest.update(block)
        return digest.digest()

    def _add(self, level: int, digest: bytes) -> None:
        if level == len(self._pending):
            self._root = digest
            return
        pending = self._pending[level]
        pending.append(digest)
        if len(pending) == DIGESTS_PER_BLOCK:
            self._close_block(level)

    def _close_block(self, level: int) -> None:
        block = b"".join(self._pending[level]).ljust(BLOCK_SIZE, b"\0")
        self._pending[level].clear()
        number = self._next[level]
        self._next[level] += 1
        if os.pread(self._fd, BLOCK_SIZE, number * BLOCK_SIZE) != block:
            raise _verity_mismatch(f"{self._file.tree}: block {number} does not fit {self._file.name}")
        self._add(level + 1, self._hash(block))


def _require_size(name: str, fd: int, size: int) -> None:
    found = os.fstat(fd).st_size
    if found != size:
        raise _size_mismatch(name, found, size)


def _size_mismatch(name: str, found: int, size: int) -> TrustRefusal:
    return TrustRefusal(
        "image-size-mismatch",
        "an image has not the signed size",
        evidence=f"{name}: {found} bytes, signed {size}",
        remedy=_REMEDY,
    )


def _verity_mismatch(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "verity-mismatch",
        "an image does not fit its signed root hash",
        evidence=evidence,
        remedy=_REMEDY,
    )
