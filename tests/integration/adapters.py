# SPDX-License-Identifier: Apache-2.0
"""What a test host's kernel lacks, from outside the product: device mapper, cgroup v2 controllers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

from trustme_init.errors import TrustRefusal
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


class NoControllers:
    """A CgroupControllers for hosts whose controllers belong to version 1: it limits nothing."""

    def enable(self, parent: Path) -> None:
        pass

    def limit(self, group: Path, *, memory_max: int, pids_max: int) -> None:
        pass
