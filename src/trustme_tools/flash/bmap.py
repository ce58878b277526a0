# SPDX-License-Identifier: Apache-2.0
"""Block maps: which parts of an image hold data, and what they hash to (format 2.0 of bmap-tools).

Rules:
- A map is read as strictly as a wire format: 2.x and SHA-256 only, every number within the image, ranges in
  order and apart, and the map's own checksum right. It is UTF-8 without a document type, so that an XML
  parser has nothing to expand.
- What a map leaves out is *zero* here. bmap-tools leaves such blocks of a disk as they were, and a file
  system that trusts its zeroed tables (ext4's inode tables, a FAT) then finds what an older one left there.
"""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Final, NamedTuple

from trustme_tools.errors import ToolError

SUFFIX: Final = ".bmap"
BLOCK_SIZE: Final = 4096
LIMIT: Final = 16 * 1024 * 1024
IMAGE_LIMIT: Final = 2**50
_BLOCK_SIZES: Final = tuple(512 << shift for shift in range(12))
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_RANGE: Final = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))?")
_NUMBER: Final = re.compile(r"[0-9]{1,15}")
_NO_CHECKSUM: Final = "0" * 64


class Range(NamedTuple):
    """A run of bytes that hold data."""

    first: int
    size: int
    sha256: str

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.first + self.size


class Bmap(NamedTuple):
    """An image's map; ranges are in order and do not touch beyond the image's end."""

    image_size: int
    block_size: int
    ranges: tuple[Range, ...]

    @property
    def mapped(self) -> int:
        """Bytes that hold data."""
        return sum(each.size for each in self.ranges)


def parse(data: bytes) -> Bmap:
    """Read and judge a map; ToolError("bad-bmap")."""
    try:
        return _parse(data)
    except (ValueError, ET.ParseError) as exc:
        raise ToolError(
            "the block map beside the image cannot be used",
            "get or make it again (`trustme image build` writes one), or flash without it: --no-bmap",
            code="bad-bmap",
            evidence=str(exc),
        ) from exc


def _parse(data: bytes) -> Bmap:
    if len(data) > LIMIT:
        raise ValueError(f"larger than {LIMIT} bytes")
    text = data.decode("utf-8")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it has a document type")
    root = ET.fromstring(text)  # noqa: S314 - bounded, and without a document type nothing can be expanded
    version = root.get("version", "")
    if root.tag != "bmap" or not re.fullmatch(r"2\.[0-9]+", version):
        raise ValueError(f"<{root.tag} version={version!r}> is not a bmap of version 2")
    if (kind := _text(root, "ChecksumType")) != "sha256":
        raise ValueError(f"its checksums are {kind}, not sha256")
    checksum = _text(root, "BmapFileChecksum")
    if data.count(checksum.encode()) != 1 or not _SHA256.fullmatch(checksum):
        raise ValueError("it has no checksum of its own")
    if hashlib.sha256(data.replace(checksum.encode(), _NO_CHECKSUM.encode())).hexdigest() != checksum:
        raise ValueError("its own checksum does not fit")
    image_size, block_size = _number(root, "ImageSize"), _number(root, "BlockSize")
    blocks, mapped = _number(root, "BlocksCount"), _number(root, "MappedBlocksCount")
    if block_size not in _BLOCK_SIZES or not 0 < image_size <= IMAGE_LIMIT:
        raise ValueError(f"image of {image_size} bytes in blocks of {block_size}")
    if blocks != -(-image_size // block_size):
        raise ValueError(f"{blocks} blocks of {block_size} are not {image_size} bytes")
    ranges = tuple(_ranges(root, image_size, block_size, blocks))
    if sum(-(-each.size // block_size) for each in ranges) != mapped:
        raise ValueError(f"the ranges do not have {mapped} blocks")
    return Bmap(image_size, block_size, ranges)


def _ranges(root: ET.Element, image_size: int, block_size: int, blocks: int) -> Iterator[Range]:
    maps = root.findall("BlockMap")
    if len(maps) != 1:
        raise ValueError(f"{len(maps)} block maps")
    behind = 0
    for element in maps[0].iterfind("Range"):
        match = _RANGE.fullmatch((element.text or "").strip())
        sha256 = element.get("chksum", "")
        if not match or not _SHA256.fullmatch(sha256):
            raise ValueError(f"range {element.text!r} with checksum {sha256!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not behind <= first <= last < blocks:
            raise ValueError(f"range {first}-{last} is out of order or outside {blocks} blocks")
        behind = last + 1
        end = min(behind * block_size, image_size)
        yield Range(first * block_size, end - first * block_size, sha256)


def _text(root: ET.Element, name: str) -> str:
    found = root.findall(name)
    if len(found) != 1:
        raise ValueError(f"{len(found)} elements {name}")
    return (found[0].text or "").strip()


def _number(root: ET.Element, name: str) -> int:
    text = _text(root, name)
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{name} {text!r}")
    return int(text)


def render(bmap: Bmap) -> bytes:
    """Write a map that `parse` and bmap-tools read."""

    def element(each: Range) -> str:
        first, last = each.first // bmap.block_size, (each.end - 1) // bmap.block_size
        blocks = f"{first}-{last}" if last > first else f"{first}"
        return f'        <Range chksum="{each.sha256}">{blocks}</Range>\n'

    mapped = sum(-(-each.size // bmap.block_size) for each in bmap.ranges)
    text = (
        '<?xml version="1.0" ?>\n'
        '<bmap version="2.0">\n'
        f"    <ImageSize>{bmap.image_size}</ImageSize>\n"
        f"    <BlockSize>{bmap.block_size}</BlockSize>\n"
        f"    <BlocksCount>{-(-bmap.image_size // bmap.block_size)}</BlocksCount>\n"
        f"    <MappedBlocksCount>{mapped}</MappedBlocksCount>\n"
        "    <ChecksumType>sha256</ChecksumType>\n"
        f"    <BmapFileChecksum>{_NO_CHECKSUM}</BmapFileChecksum>\n"
        "    <BlockMap>\n"
        f"{''.join(map(element, bmap.ranges))}"
        "    </BlockMap>\n"
        "</bmap>\n"
    ).encode()
    return text.replace(_NO_CHECKSUM.encode(), hashlib.sha256(text).hexdigest().encode())
