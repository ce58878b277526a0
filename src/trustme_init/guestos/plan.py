# SPDX-License-Identifier: Apache-2.0
"""Which files belong to a GuestOS, how long each is, and how its content is judged. Pure.

Everything here comes from the signed configuration. The length of a hash tree follows from that of its image.
A hash image may be longer than its tree (upstream makes them on 10 MiB of zeros): the rest is never taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from trustme_init.errors import TrustRefusal
from trustme_init.trust.guestos import HASHED_TYPES, VERITY_TYPES, MountType
from trustme_init.trust.verity import BLOCK_SIZE, DIGEST_SIZE

if TYPE_CHECKING:
    from trustme_init.proto.guestos_pb2 import GuestOSConfig, GuestOSMount

DEFAULT_BASE_URL: Final = "file://var/cml-updates"
"""Where images are when neither the configuration nor a person says: the original's default (interop 2.5)."""
DIGESTS_PER_BLOCK: Final = BLOCK_SIZE // DIGEST_SIZE
_ARCHITECTURES: Final = {"x86_64": "x86", "aarch64": "arm", "riscv64": "riscv"}
"""`uname -m` to the word in a download's path (interop section 2.6)."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file to install. Sizes in bytes; hashes in lower-case hex, "" where there is none."""

    name: str
    size: int
    """Exactly this of an image; of a hash tree, this much from its beginning."""
    sha256: str = ""
    root_hash: str = ""
    """Of an image that has a hash tree: both are checked together, under the image's name."""
    salt: str | None = None
    """Signed salt; None: the superblock says."""
    tree: str = ""
    """Name of the hash tree's file, with `root_hash`."""
    is_tree: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the form in which the vault tells the manager."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be installed, in the order in which it is fetched."""

    stem: str
    base_url: str
    """As the configuration says, "" where it does not."""
    files: tuple[ImageFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Return the form in which the vault tells the manager."""
        files = [file.as_dict() for file in self.files]
        return {"stem": self.stem, "base_url": self.base_url, "files": files}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Plan:
        """Return what `as_dict` told."""
        files = tuple(ImageFile(**each) for each in document["files"])
        return cls(document["stem"], document["base_url"], files)


def plan(config: GuestOSConfig) -> Plan:
    """Return what a **verified** configuration needs; a hash tree comes before its image.

    TrustRefusal("image-ambiguous") when one name stands for two contents.
    """
    found: dict[str, ImageFile] = {}
    for mount in (*config.mounts, *config.mounts_setup):
        for file in _files(mount):
            known = found.setdefault(file.name, file)
            if known != file:
                raise TrustRefusal(
                    "image-ambiguous",
                    "the configuration names two different images alike",
                    evidence=file.name,
                    remedy="give each image a name of its own and sign the configuration again",
                )
    stem = f"{config.name}-{config.version}"
    return Plan(stem, config.update_base_url.rstrip("/"), tuple(found.values()))


def _files(mount: GuestOSMount) -> Iterable[ImageFile]:
    if MountType(mount.mount_type) not in VERITY_TYPES | HASHED_TYPES:
        return
    image = f"{mount.image_file}.img"
    if not mount.HasField("image_verity_sha256"):
        yield ImageFile(image, mount.image_size, mount.image_sha2_256)
        return
    tree = f"{mount.image_file}.hash.img"
    yield ImageFile(tree, tree_size(mount.image_size), is_tree=True)
    yield ImageFile(
        image,
        mount.image_size,
        mount.image_sha2_256,
        mount.image_verity_sha256,
        mount.verity_salt if mount.HasField("verity_salt") else None,
        tree,
    )


def levels(data_size: int) -> list[int]:
    """Return the blocks of each level of a hash tree, that of the data's hashes first.

    A single block of data has no level: the root hash is its own (drivers/md/dm-verity-target.c).
    """
    found = []
    blocks = data_size // BLOCK_SIZE
    while blocks > 1:
        blocks = -(-blocks // DIGESTS_PER_BLOCK)
        found.append(blocks)
    return found


def tree_size(data_size: int) -> int:
    """Return the bytes of superblock and hash tree for `data_size` bytes of data."""
    return BLOCK_SIZE * (1 + sum(levels(data_size)))


def directory_url(base_url: str, stem: str, machine: str = os.uname().machine) -> str:
    """Return where the files of a GuestOS are to be had (interop section 2.6), without a final slash."""
    architecture = _ARCHITECTURES.get(machine, machine)
    return f"{base_url}/operatingsystems/{architecture}/{stem}"
