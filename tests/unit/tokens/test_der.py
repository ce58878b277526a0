# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.tokens import der
from trustme_init.tokens.der import DerError, Reader

TAGS = st.sampled_from([der.INTEGER, der.OCTET_STRING, der.OID, der.SEQUENCE, der.SET, der.EXPLICIT_0])


@given(st.lists(st.tuples(TAGS, st.binary(max_size=300)), max_size=5))
def test_what_is_written_is_read(elements: list[tuple[int, bytes]]) -> None:
    reader = Reader(b"".join(der.element(tag, contents) for tag, contents in elements))
    for tag, contents in elements:
        assert reader.follows(tag)
        assert reader.element(tag) == contents
    reader.end()


@given(st.integers(min_value=0, max_value=1 << 70))
def test_integers(value: int) -> None:
    assert Reader(der.integer(value)).integer() == value


@given(st.binary(max_size=64), TAGS)
def test_any_bytes_are_read_in_one_way_or_refused(data: bytes, tag: int) -> None:
    reader = Reader(data)
    try:
        contents = reader.element(tag)
    except DerError:
        return
    assert data.startswith(der.element(tag, contents))


@given(st.binary(max_size=12))
def test_any_integer_is_read_in_one_way_or_refused(data: bytes) -> None:
    try:
        value = Reader(der.element(der.INTEGER, data)).integer()
    except DerError:
        return
    assert der.integer(value) == der.element(der.INTEGER, data)


@pytest.mark.parametrize(
    "data",
    [
        "",
        "30",
        "3081",
        "308101",
        "30810102 01",  # one byte, in two
        "3082000102",
        "30830000010 2",
        "308400000001 02",
        "30ff02",
        "3102",
        "300401",
        "3f8101 00",
    ],
)
def test_other_encodings(data: str) -> None:
    with pytest.raises(DerError):
        Reader(bytes.fromhex(data.replace(" ", ""))).element(der.SEQUENCE)


@pytest.mark.parametrize("data", ["0200", "0201ff", "020180", "02020001", "0202007f", "0203000080"])
def test_other_integers(data: str) -> None:
    with pytest.raises(DerError):
        Reader(bytes.fromhex(data)).integer()


def test_ber_is_named() -> None:
    with pytest.raises(DerError, match="indefinite: BER"):
        Reader(bytes.fromhex("3080 0201 0100 00")).element(der.SEQUENCE)


def test_what_is_left_over() -> None:
    reader = Reader(der.integer(1) + b"\0")
    reader.integer()
    with pytest.raises(DerError):
        reader.end()
