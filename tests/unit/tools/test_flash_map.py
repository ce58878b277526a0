# SPDX-License-Identifier: Apache-2.0
"""Block maps are read strictly and written as they are read; sets of bytes behave like sets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_tools.errors import ToolError
from trustme_tools.flash import bmap, source
from trustme_tools.flash.bmap import Bmap, Range
from trustme_tools.flash.extents import Extent, common, minus, union

A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()
MAP = Bmap(8 * 4096 + 100, 4096, (Range(0, 4096, A), Range(3 * 4096, 2 * 4096, B), Range(8 * 4096, 100, A)))

# In the manner of bmap-tools: comments, spaces inside elements, ranges of one block without a dash.
FOREIGN = f"""\
<?xml version="1.0" ?>
<!-- a comment -->

<bmap version="2.0">
    <!-- 44.4 % -->
    <ImageSize> 32868 </ImageSize>
    <BlockSize> 4096 </BlockSize>
    <BlocksCount> 9 </BlocksCount>
    <MappedBlocksCount> 4   </MappedBlocksCount>
    <ChecksumType> sha256 </ChecksumType>
    <!-- "0" -->
    <BmapFileChecksum> {"0" * 64} </BmapFileChecksum>
    <BlockMap>
        <!-- ranges -->
        <Range chksum="{A}"> 0 </Range>
        <Range chksum="{B}"> 3-4 </Range>
        <Range chksum="{A}"> 8 </Range>
    </BlockMap>
</bmap>
""".encode()


def sealed(text: bytes) -> bytes:
    """Put the right checksum of its own into a map."""
    blank = re.sub(rb"(?<=BmapFileChecksum>)(\s*)[0-9a-f]{64}", rb"\g<1>" + b"0" * 64, text)
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(ToolError) as caught:
        call()
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value.code


def test_what_is_written_is_read() -> None:
    assert bmap.parse(bmap.render(MAP)) == MAP
    assert MAP.mapped == 3 * 4096 + 100


def test_the_map_of_bmap_tools_is_read() -> None:
    assert bmap.parse(sealed(FOREIGN)) == MAP


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'version="2.0"', b'version="1.4"'),
        (b'version="2.0"', b'version="3.0"'),
        (b'version="2.0"', b""),
        (b"sha256</ChecksumType>", b"sha1</ChecksumType>"),
        (b"<ChecksumType>sha256</ChecksumType>", b""),
        (b"<ImageSize>32868", b"<ImageSize>-32868"),
        (b"<ImageSize>32868", b"<ImageSize>0"),
        (b"<ImageSize>32868", b"<ImageSize>36865"),
        (b"<ImageSize>32868", b"<ImageSize>99999999999999999999"),
        (b"<BlockSize>4096", b"<BlockSize>0"),
        (b"<BlockSize>4096", b"<BlockSize>4095"),
        (b"<BlocksCount>9", b"<BlocksCount>8"),
        (b"<MappedBlocksCount>4", b"<MappedBlocksCount>5"),
        (b">3-4<", b">4-3<"),
        (b">3-4<", b">0-4<"),
        (b">3-4<", b">3-8<"),
        (b">3-4<", b">3-9<"),
        (b">3-4<", b">3-<"),
        (b">3-4<", b"/><Range>4<"),
        (b">8<", b">9<"),
        (f'chksum="{B}"'.encode(), b""),
        (f'chksum="{B}"'.encode(), f'chksum="{B[1:]}"'.encode()),
        (f'chksum="{B}"'.encode(), f'sha1="{B[:40]}"'.encode()),
        (b"</BlockMap>", b"</BlockMap><BlockMap></BlockMap>"),
        (b"<bmap", b'<!DOCTYPE bmap [<!ENTITY a "a">]><bmap'),
        (b"</bmap>", b""),
    ],
)
def test_a_map_that_is_not_sound_is_refused(old: bytes, new: bytes) -> None:
    """The map's own checksum fits: what is wrong is found all the same."""
    text = bmap.render(MAP)
    assert text.count(old) == 1
    assert code_of(lambda: bmap.parse(sealed(text.replace(old, new)))) == "bad-bmap"


def test_any_changed_byte_of_a_map_is_noticed() -> None:
    text = bmap.render(MAP)
    for position in range(0, len(text), 7):
        changed = text[:position] + bytes([text[position] ^ 1]) + text[position + 1 :]
        assert code_of(lambda changed=changed: bmap.parse(changed)) == "bad-bmap"  # type: ignore[misc]  # bound now


@pytest.mark.parametrize(
    "data", [b"", b"\xff", bmap.render(MAP).decode().encode("utf-16"), b"<" * 70000, b"<bmap/>"]
)
def test_what_is_no_map(data: bytes) -> None:
    assert code_of(lambda: bmap.parse(data)) == "bad-bmap"


def test_a_file_is_mapped_by_its_holes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(1024 * 1024 + 10)
        for offset, data in ((300, b"a"), (65536, b"b" * 8192), (1024 * 1024 + 5, b"c")):
            file.seek(offset)
            file.write(data)
    found = source.map_file(path)
    assert found.image_size == path.stat().st_size
    content = path.read_bytes()
    rest = bytearray(content)
    for each in found.ranges:
        assert hashlib.sha256(content[each.first : each.end]).hexdigest() == each.sha256
        rest[each.first : each.end] = bytes(each.size)
    assert not any(rest), "all that is no zero is in a range"
    assert found.mapped < 200_000
    assert bmap.parse(bmap.render(found)) == found


def test_a_file_of_one_hole_has_an_empty_map(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(1024 * 1024)
    assert source.map_file(path).ranges == ()


extents = st.lists(st.builds(Extent, st.integers(0, 30), st.integers(0, 10)), max_size=6)


def members(extents: list[Extent]) -> set[int]:
    return {position for each in extents for position in range(each.first, each.end)}


@given(extents, extents)
def test_sets_of_bytes(left: list[Extent], right: list[Extent]) -> None:
    for result, expected in (
        (union(left, right), members(left) | members(right)),
        (minus(left, right), members(left) - members(right)),
        (common(left, right), members(left) & members(right)),
    ):
        assert members(result) == expected
        assert sum(each.size for each in result) == len(expected), "nothing twice"
        assert result == sorted(result)
        assert all(each.size for each in result)
