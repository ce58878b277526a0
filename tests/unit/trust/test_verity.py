# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.errors import Refusal, TrustRefusal
from trustme_init.trust.verity import (
    SUPERBLOCK_SIZE,
    VerityParameters,
    parse_superblock,
    with_superblock_salt,
)

SALT = bytes(range(32))
BLOCKS = 5


def code_of(superblock: bytes, *, data_size: int = BLOCKS * 4096) -> str:
    with pytest.raises(TrustRefusal) as caught:
        with_superblock_salt(superblock, root_hash=bytes(32), data_size=data_size)
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value.code


@pytest.fixture(scope="session")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return (hash image, root hash) as veritysetup makes them for a small image."""
    place = tmp_path_factory.mktemp("verity")
    (place / "root.img").write_bytes(bytes(range(256)) * 16 * BLOCKS)
    command = ["veritysetup", "format", "root.img", "root.hash.img", "--salt", SALT.hex()]
    command += ["--root-hash-file", "root.hash"]
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    return (place / "root.hash.img").read_bytes(), bytes.fromhex((place / "root.hash").read_text())


def test_superblock_of_veritysetup(formatted: tuple[bytes, bytes]) -> None:
    image, root_hash = formatted
    found = parse_superblock(image)
    assert (found.version, found.hash_type, found.algorithm) == (1, 1, "sha256")
    assert (found.data_block_size, found.hash_block_size, found.data_blocks) == (4096, 4096, BLOCKS)
    assert found.salt == SALT
    assert len(found.uuid) == 16
    parameters = with_superblock_salt(image, root_hash=root_hash, data_size=BLOCKS * 4096)
    assert parameters == VerityParameters(root_hash, SALT, BLOCKS)
    assert parameters.data_size == BLOCKS * 4096


def test_parameters_are_those_of_veritysetup(formatted: tuple[bytes, bytes]) -> None:
    # The defaults describe what veritysetup makes: with them the root hash can be computed.
    import hashlib

    image, root_hash = formatted
    parameters = VerityParameters(root_hash, SALT, BLOCKS)
    start = parameters.hash_start_block * parameters.hash_block_size
    top = image[start : start + parameters.hash_block_size]
    assert hashlib.new(parameters.algorithm, parameters.salt + top).digest() == parameters.root_hash


@pytest.mark.parametrize("data_size", [BLOCKS * 4096 - 4096, BLOCKS * 4096 + 4096, BLOCKS * 4096 + 1, 0])
def test_row2_superblock_of_another_size(formatted: tuple[bytes, bytes], data_size: int) -> None:
    assert code_of(formatted[0], data_size=data_size) == "superblock-mismatch"


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [
        (0, b"luks", "bad-superblock"),
        (8, (2).to_bytes(4, "little"), "bad-superblock"),
        (12, (0).to_bytes(4, "little"), "superblock-mismatch"),
        (32, b"sha512", "superblock-mismatch"),
        (32, bytes(32), "bad-superblock"),
        (32, b"sha256\0x", "bad-superblock"),
        (32, b"sha256\x1b", "bad-superblock"),
        (64, (512).to_bytes(4, "little"), "superblock-mismatch"),
        (64, (0).to_bytes(4, "little"), "superblock-mismatch"),
        (68, (2**32 - 1).to_bytes(4, "little"), "superblock-mismatch"),
        (72, (2**63).to_bytes(8, "little"), "superblock-mismatch"),
        (80, (257).to_bytes(2, "little"), "bad-superblock"),
        (80, (65535).to_bytes(2, "little"), "bad-superblock"),
        (80, (31).to_bytes(2, "little"), "bad-superblock"),
        (82, b"\1", "bad-superblock"),
        (400, b"\1", "bad-superblock"),
    ],
)
def test_row2_contradictions(formatted: tuple[bytes, bytes], offset: int, value: bytes, code: str) -> None:
    damaged = bytearray(formatted[0][:SUPERBLOCK_SIZE])
    damaged[offset : offset + len(value)] = value
    assert code_of(bytes(damaged)) == code


def test_row2_truncated(formatted: tuple[bytes, bytes]) -> None:
    for length in (0, 1, 511):
        assert code_of(formatted[0][:length]) == "bad-superblock"


@given(st.data())
def test_row2_any_flipped_byte_changes_nothing_but_salt_and_uuid(data: Any) -> None:
    salt = data.draw(st.binary(max_size=256))
    layout = "<8sII16s32sIIQH6x256s168x"
    fields = (b"verity\0\0", 1, 1, bytes(16), b"sha256", 4096, 4096, BLOCKS, len(salt), salt)
    raw = bytearray(struct.pack(layout, *fields))
    before = with_superblock_salt(bytes(raw), root_hash=bytes(32), data_size=BLOCKS * 4096)
    assert before.salt == salt
    raw[data.draw(st.integers(0, SUPERBLOCK_SIZE - 1))] ^= data.draw(st.integers(1, 255))
    try:
        after = with_superblock_salt(bytes(raw), root_hash=bytes(32), data_size=BLOCKS * 4096)
    except Refusal:
        return
    assert VerityParameters(after.root_hash, before.salt, after.data_blocks) == before


@given(st.binary(max_size=520))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Refusal):
        parse_superblock(data)


def test_superblock_of_an_image_that_is_no_hash_image(tmp_path: Path) -> None:
    assert code_of(bytes(4096)) == "bad-superblock"
