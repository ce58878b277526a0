# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.control.framing import MIB, REPLY_LIMIT, REQUEST_LIMIT, FrameDecoder, encode_frame
from trustme_init.errors import ControlRefusal


@given(bodies=st.lists(st.binary(max_size=300), max_size=12), cuts=st.lists(st.integers(1, 50), max_size=200))
def test_frames_survive_any_splitting(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(body) for body in bodies)
    decoder = FrameDecoder(300)
    seen: list[bytes] = []
    for cut in cuts:
        piece, stream = stream[:cut], stream[cut:]
        seen += decoder.feed(piece)
    seen += decoder.feed(stream)
    assert seen == bodies
    assert decoder.failure is None
    assert not decoder.started
    assert decoder.buffered == 0


@given(data=st.lists(st.binary(max_size=64), max_size=40), limit=st.integers(0, 100))
def test_row34_random_bytes_never_raise_and_never_outgrow_what_came(data: list[bytes], limit: int) -> None:
    decoder = FrameDecoder(limit)
    received = 0
    for piece in data:
        received += len(piece)
        for body in decoder.feed(piece):
            assert len(body) <= limit
        assert decoder.buffered <= min(received, limit + 4)


def test_length_zero_is_a_frame() -> None:
    assert FrameDecoder(10).feed(bytes(8)) == [b"", b""]


@pytest.mark.parametrize("length", [REQUEST_LIMIT + 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_row34_an_oversize_length_ends_the_stream_but_not_what_came_before(length: int) -> None:
    decoder = FrameDecoder(REQUEST_LIMIT)
    assert decoder.feed(encode_frame(b"good") + struct.pack(">I", length) + b"rest") == [b"good"]
    assert decoder.failure is not None
    assert decoder.failure.code == "frame-too-large"
    assert decoder.feed(encode_frame(b"more")) == []
    assert decoder.buffered == 0


def test_row34_an_announced_length_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        decoder = FrameDecoder(REQUEST_LIMIT)
        decoder.feed(struct.pack(">I", REQUEST_LIMIT) + b"x")
        assert decoder.started
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
    finally:
        tracemalloc.stop()


def test_limits_are_those_of_the_protocol() -> None:
    assert REPLY_LIMIT < 64 * MIB
    with pytest.raises(ControlRefusal) as caught:
        encode_frame(b"12345", limit=4)
    assert caught.value.code == "frame-too-large"
