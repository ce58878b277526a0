# SPDX-License-Identifier: Apache-2.0
"""File system images and hash trees, the same bytes for the same input.

Times, owners and UUIDs are fixed: owner root:root, no extended attributes, every time is
`source_date_epoch`. The file systems sort names themselves.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trustme_init.trust.verity import BLOCK_SIZE
from trustme_tools.errors import ToolError
from trustme_tools.tooling import run

FILE_SYSTEMS: Final = ("squashfs", "erofs")
"""What is made of a directory; other types are taken as ready image files."""
SALT_TAG: Final = "trustme-verity-salt-v1"
UUID_TAG: Final = "trustme-image-uuid-v1"
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ImageId:
    """What salt and UUID of an image are derived from: same identity, same values."""

    name: str
    version: int
    image: str

    def salt(self) -> bytes:
        """Return the 32-byte salt of the hash tree."""
        return self._digest(SALT_TAG)

    def uuid(self) -> uuid.UUID:
        """Return the UUID of file system and superblock; nothing on the device reads it."""
        return uuid.UUID(bytes=self._digest(UUID_TAG)[:16], version=4)

    def _digest(self, tag: str) -> bytes:
        return hashlib.sha256("\0".join((tag, self.name, str(self.version), self.image)).encode()).digest()


def make_file_system(
    source: Path, destination: Path, fs_type: str, identity: ImageId, *, source_date_epoch: int
) -> None:
    """Make the image `destination` of the directory `source`, or copy a ready image of another type.

    ToolError("no-source-directory", "no-source-file", "empty-image").
    """
    if fs_type not in FILE_SYSTEMS:
        if not source.is_file():
            raise _no_source(source, "file", f"a {fs_type} image is taken as it is")
        shutil.copyfile(source, destination)
    elif not source.is_dir():
        raise _no_source(source, "directory", f"a {fs_type} image is made of one")
    elif fs_type == "squashfs":
        _squashfs(source, destination, source_date_epoch)
    else:
        _erofs(source, destination, identity, source_date_epoch)
    _pad(destination)


def format_verity(data: Path, hashes: Path, identity: ImageId) -> bytes:
    """Write the hash tree of `data` (with a superblock) and return its root hash."""
    output = run(
        "veritysetup",
        [
            *("format", data, hashes, "--hash", "sha256", "--format", "1"),
            *("--data-block-size", str(BLOCK_SIZE), "--hash-block-size", str(BLOCK_SIZE)),
            *("--salt", identity.salt().hex(), "--uuid", str(identity.uuid())),
        ],
        purpose=f"make the hash tree of {data.name}",
    ).decode()
    for line in output.splitlines():
        key, _, value = line.partition(":")
        if key == "Root hash":
            return bytes.fromhex(value.strip())
    raise ToolError(
        "veritysetup printed no root hash", "update cryptsetup", code="tool-failed", evidence=output
    )


def verify_verity(data: Path, hashes: Path, root_hash: str, salt: str | None) -> None:
    """Check every block of `data` by veritysetup; ToolError("image-damaged").

    With `salt` the superblock is not read, as on the device.
    """
    parameters: list[str | Path] = ["verify", data, hashes, root_hash]
    if salt is not None:
        blocks = data.stat().st_size // BLOCK_SIZE
        parameters += [
            *("--no-superblock", "--hash", "sha256", "--format", "1", "--salt", salt),
            *("--data-block-size", str(BLOCK_SIZE), "--hash-block-size", str(BLOCK_SIZE)),
            *("--data-blocks", str(blocks), "--hash-offset", str(BLOCK_SIZE)),
        ]
    try:
        run("veritysetup", parameters, purpose=f"verify {data.name}")
    except ToolError as exc:
        if exc.code != "tool-failed":
            raise
        raise ToolError(
            f"{data} does not have the root hash that is signed",
            "copy image and hash image again, or build them again",
            code="image-damaged",
            evidence=exc.evidence,
        ) from exc


def file_sha256(path: Path) -> str:
    """Return the lower-case hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _squashfs(source: Path, destination: Path, epoch: int) -> None:
    run(
        "mksquashfs",
        [
            *(source, destination, "-noappend", "-no-progress", "-quiet", "-comp", "zstd"),
            *("-all-root", "-no-xattrs", "-mkfs-time", str(epoch), "-all-time", str(epoch)),
        ],
        purpose=f"make a squashfs image of {source}",
        # mksquashfs refuses the variable beside the options that say the same.
        without=("SOURCE_DATE_EPOCH",),
    )


def _erofs(source: Path, destination: Path, identity: ImageId, epoch: int) -> None:
    run(
        "mkfs.erofs",
        [
            *("--quiet", "-zlz4hc", "-x-1", "--all-root", f"-T{epoch}", f"-U{identity.uuid()}"),
            *(destination, source),
        ],
        purpose=f"make an erofs image of {source}",
    )


def _pad(image: Path) -> None:
    """Fill the last block with zeros: dm-verity knows whole blocks only."""
    size = image.stat().st_size
    if size == 0:
        raise ToolError(f"the image {image.name} is empty", "give it content", code="empty-image")
    with image.open("r+b") as file:
        file.truncate(-(-size // BLOCK_SIZE) * BLOCK_SIZE)


def _no_source(source: Path, kind: str, reason: str) -> ToolError:
    return ToolError(
        f"{source} is not a {kind}: {reason}",
        f"name a {kind}",
        code=f"no-source-{kind}",
    )
