# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from uuid import UUID

import pytest

from trustme_init.tpm.marker_form import SIZE, MarkerContent

CONTENT = MarkerContent(UUID("00112233-4455-6677-8899-aabbccddeeff"), bytes(range(32)))
ENCODED = bytes.fromhex("01" + "00112233445566778899aabbccddeeff") + bytes(range(32))


def test_the_layout_is_fixed() -> None:
    assert CONTENT.encode() == ENCODED
    assert len(ENCODED) == SIZE
    assert MarkerContent.decode(ENCODED) == CONTENT


@pytest.mark.parametrize(
    "data", [b"", ENCODED[:-1], ENCODED + b"\0", b"\0" + ENCODED[1:], b"\2" + ENCODED[1:]]
)
def test_other_bytes_are_no_marker(data: bytes) -> None:
    with pytest.raises(ValueError, match="version 1"):
        MarkerContent.decode(data)


@pytest.mark.parametrize("size", [0, 20, 31, 33, 64])
def test_a_digest_of_another_size_is_not_encoded(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        CONTENT._replace(record_sha256=bytes(size)).encode()
