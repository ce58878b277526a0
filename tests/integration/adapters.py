# SPDX-License-Identifier: Apache-2.0
"""What a test host's kernel lacks, from outside the product: device mapper, cgroup v2 controllers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
from pathlib import Path
from typing import Final

from trustme_init.compartments.volume_ledger import VolumeKeys
from trustme_init.compartments.volumes import BLOCK
from trustme_init.errors import TrustRefusal
from trustme_init.linux.cgroup import Limits
from trustme_init.linux.loop import Loop, attach
from trustme_init.trust.verity import VerityParameters

_CHUNK_BLOCKS: Final = 256


class UserspaceVerityDevice:
    """A loop device over an image that was verified as a whole."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    @property
    def path(self) -> Path:
        return self._loop.path

    def close(self) -> None:
        self._loop.close()


class UserspaceVerity:
    """A VerityBackend without dm-verity: the whole image is hashed before it is attached.

    The tree is rebuilt from the data, so the hash image is only checked to be the tree that dm-verity would
    read: every byte of it from `hash_start_block` on must be what the data implies.
    """

    def open(
        self, name: str, data_fd: int, hash_fd: int, parameters: VerityParameters
    ) -> UserspaceVerityDevice:
        levels, root = tree(data_fd, parameters)
        size = parameters.hash_block_size
        stored = os.pread(hash_fd, sum(map(len, levels)), parameters.hash_start_block * size)
        # On disk the level next to the root comes first (Documentation/admin-guide/device-mapper/verity.rst).
        if root != parameters.root_hash or stored != b"".join(reversed(levels)):
            raise TrustRefusal(
                "verity-mismatch",
                "the image does not fit its signed root hash",
                evidence=f"{name}: computed {root.hex()}",
                remedy="copy the GuestOS to the store again",
            )
        return UserspaceVerityDevice(attach(data_fd, size=parameters.data_size))


def tree(data_fd: int, parameters: VerityParameters) -> tuple[list[bytes], bytes]:
    """Return the levels of the hash tree, leaves first, and the root hash (format version 1: salt first)."""
    seed = hashlib.new(parameters.algorithm, parameters.salt)

    def digest(block: bytes | memoryview) -> bytes:
        state = seed.copy()
        state.update(block)
        return state.digest()

    block_size = parameters.data_block_size
    hashes: list[bytes] = []
    position = 0
    while position < parameters.data_size:
        chunk = memoryview(
            os.pread(data_fd, min(_CHUNK_BLOCKS * block_size, parameters.data_size - position), position)
        )
        if not chunk or len(chunk) % block_size:
            raise TrustRefusal("verity-mismatch", "the image is shorter than signed")
        hashes += [digest(chunk[at : at + block_size]) for at in range(0, len(chunk), block_size)]
        position += len(chunk)
    levels: list[bytes] = []
    while len(hashes) > 1:
        per_block = parameters.hash_block_size // len(hashes[0])
        blocks = [
            b"".join(hashes[at : at + per_block]).ljust(parameters.hash_block_size, b"\0")
            for at in range(0, len(hashes), per_block)
        ]
        levels.append(b"".join(blocks))
        hashes = [digest(block) for block in blocks]
    return levels, hashes[0]


class PlainLayer:
    """A VolumeLayer without dm-crypt and dm-integrity: a loop device over the file behind its first block.

    That block is made of the keys, so that the rules about keys, superblocks and sizes are met all the same.
    A loop device is found again by its file, `<uuid>/<name>.img`.
    """

    def file_size(self, size: int) -> int:
        return size + BLOCK

    def make(self, name: str, file: int, size: int, keys: VolumeKeys) -> Path:
        os.pwrite(file, _superblock(keys), 0)
        return self.open(name, file, size, keys)

    def superblock(self, file: int) -> bytes:
        return os.pread(file, BLOCK, 0)

    def open(self, name: str, file: int, size: int, keys: VolumeKeys) -> Path:
        assert self.superblock(file) == _superblock(keys), "the ledger should have refused this"
        if _loops(name):
            raise OSError(errno.EBUSY, "is open", name)
        with attach(
            file, offset=BLOCK, size=size, read_only=False, autoclear=False, block_size=BLOCK
        ) as loop:
            return loop.path

    def remove(self, prefix: str, *, deferred: bool) -> None:
        for path in _loops(prefix):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                with Loop(path, fd) as loop, contextlib.suppress(OSError):
                    loop.detach()  # the kernel itself defers it while a mount holds the device


def _superblock(keys: VolumeKeys) -> bytes:
    secret = keys.encryption + keys.authentication + keys.journal
    return hmac.digest(secret, b"superblock", "sha256").ljust(BLOCK, b"\0")


def _loops(prefix: str) -> list[Path]:
    """Return the loop devices of the files that devices whose names begin so are made of."""
    uuid = prefix.removeprefix("trustme-")[:36]
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            path = Path(entry.read_text().strip().removesuffix(" (deleted)"))
            if path.parent.name == uuid and f"trustme-{uuid}-{path.stem}".startswith(prefix):
                found.append(Path("/dev", entry.parts[3]))
    return found


class NoControllers:
    """A CgroupControllers for hosts whose controllers belong to version 1: it limits nothing."""

    def enable(self, parent: Path) -> None:
        pass

    def limit(self, group: Path, limits: Limits) -> None:
        pass
