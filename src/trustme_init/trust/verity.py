# SPDX-License-Identifier: Apache-2.0
"""What dm-verity must be told to check an image, and where each number comes from.

Rules:
- Root hash, data size and (in our own configurations) the salt are signed; block sizes, algorithm and
  format version are fixed by this module. Nothing else decides how an image is checked.
- A configuration without a signed salt (as GyroidOS makes them) takes the salt, and only the salt, from
  the superblock, after every other field of it was found equal to what the signed configuration implies.
  A wrong salt cannot make other data verify: the root hash is a hash over it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from trustme_init.errors import TrustRefusal

BLOCK_SIZE: Final = 4096
"""Bytes per data and per hash block; the one size `veritysetup` and our builder use."""
DIGEST_SIZE: Final = 32
"""Bytes of a SHA-256 root hash."""
SALT_LIMIT: Final = 256
"""Bytes of salt the superblock has room for, and the kernel accepts."""
SUPERBLOCK_SIZE: Final = 512
SUPERBLOCK_MAGIC: Final = b"verity\0\0"

# signature, version, hash type, UUID, algorithm, data block size, hash block size, data blocks, salt size,
# padding, salt, padding; little-endian (cryptsetup, docs/on-disk-format and lib/verity/verity.c).
_SUPERBLOCK: Final = struct.Struct("<8sII16s32sIIQH6s256s168s")
_REMEDY: Final = "rebuild the GuestOS image with `trustme guestos build`, or copy it to the store again"


@dataclass(frozen=True, slots=True)
class VerityParameters:
    """A dm-verity table line without its devices. Sizes in bytes, lengths in blocks."""

    root_hash: bytes
    salt: bytes
    data_blocks: int
    data_block_size: int = BLOCK_SIZE
    hash_block_size: int = BLOCK_SIZE
    hash_start_block: int = 1
    """First block of the tree in the hash image: the superblock occupies block 0."""
    algorithm: str = "sha256"
    version: int = 1
    """dm-verity hash type: 1 = salt first, as veritysetup makes it (0 is Chrome OS)."""

    @property
    def data_size(self) -> int:
        """Bytes of the data image that are covered by the root hash."""
        return self.data_blocks * self.data_block_size


@dataclass(frozen=True, slots=True)
class Superblock:
    """The unauthenticated header that `veritysetup format` puts in front of a hash tree."""

    version: int
    hash_type: int
    uuid: bytes
    algorithm: str
    data_block_size: int
    hash_block_size: int
    data_blocks: int
    salt: bytes


def parse_superblock(data: bytes) -> Superblock:
    """Parse the first 512 (or more) bytes of a hash image; TrustRefusal("bad-superblock") names the field.

    Layout: cryptsetup's struct verity_sb, version 1. Padding must be zero, so that one superblock has
    exactly one meaning.
    """
    if len(data) < SUPERBLOCK_SIZE:
        raise _bad(f"{len(data)} bytes, {SUPERBLOCK_SIZE} needed")
    (
        magic,
        version,
        hash_type,
        uuid,
        algorithm,
        data_block_size,
        hash_block_size,
        data_blocks,
        salt_size,
        padding,
        salt,
        more_padding,
    ) = _SUPERBLOCK.unpack_from(data)
    if magic != SUPERBLOCK_MAGIC:
        raise _bad(f"magic {magic!r}")
    if version != 1:
        raise _bad(f"version {version}, only 1 exists")
    if salt_size > SALT_LIMIT:
        raise _bad(f"salt of {salt_size} bytes, at most {SALT_LIMIT}")
    if any(padding) or any(more_padding) or any(salt[salt_size:]):
        raise _bad("padding is not zero")
    name = algorithm.rstrip(b"\0")
    if not name or not name.isascii() or not name.decode().isprintable():
        raise _bad(f"algorithm {algorithm!r}")
    return Superblock(
        version=version,
        hash_type=hash_type,
        uuid=uuid,
        algorithm=name.decode(),
        data_block_size=data_block_size,
        hash_block_size=hash_block_size,
        data_blocks=data_blocks,
        salt=salt[:salt_size],
    )


def with_superblock_salt(superblock: bytes, *, root_hash: bytes, data_size: int) -> VerityParameters:
    """Return parameters of an image whose signed configuration lacks the salt.

    `root_hash` and `data_size` (bytes) are the signed values. TrustRefusal("superblock-mismatch") if any
    field but salt and UUID differs from what they imply.
    """
    found = parse_superblock(superblock)
    expected = (1, "sha256", BLOCK_SIZE, BLOCK_SIZE, data_size // BLOCK_SIZE)
    stated = (
        found.hash_type,
        found.algorithm,
        found.data_block_size,
        found.hash_block_size,
        found.data_blocks,
    )
    if stated != expected or data_size % BLOCK_SIZE:
        raise TrustRefusal(
            "superblock-mismatch",
            "the superblock of the hash image contradicts the signed configuration",
            evidence=f"hash type, algorithm, block sizes, data blocks: {stated}, signed: {expected}",
            remedy=_REMEDY,
        )
    return VerityParameters(root_hash=root_hash, salt=found.salt, data_blocks=found.data_blocks)


def _bad(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "bad-superblock", "the hash image has no well-formed superblock", evidence=evidence, remedy=_REMEDY
    )
