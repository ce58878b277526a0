# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.control.framing import MIB, REQUEST_LIMIT
from trustme_init.control.screen import FILE_FIELDS, OVERHEAD_LIMIT, screen_request
from trustme_init.errors import ControlRefusal
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def test_file_fields_are_those_of_the_protocol_and_ours() -> None:
    assert frozenset({13, 18, 19, 20, 21, 22, 23, 41, 301, 302, 303, 304, 320, 321, 322, 335}) == FILE_FIELDS


def test_large_files_pass() -> None:
    request = Request(
        command=Request.PUSH_GUESTOS_CONFIG,
        guestos_config_file=bytes(8 * MIB),
        guestos_config_signature=bytes(1000),
        guestos_config_certificate=bytes(4 * MIB),
        container_uuids=["x" * 36] * 100,
    )
    screen_request(request.SerializeToString())


@pytest.mark.parametrize(
    "filling",
    [
        pytest.param(b"\x52\x00", id="empty-uuids"),
        pytest.param(b"\x28\x01", id="unknown-numbers"),
        pytest.param(b"\x6a\x00", id="empty-files"),
        pytest.param(b"\x5a\x02\x28\x01", id="small-parameters"),
    ],
)
def test_row34_a_request_that_is_costly_to_parse_is_refused_quickly(filling: bytes) -> None:
    body = b"\x08\x03" + filling * (REQUEST_LIMIT // len(filling) - 2)
    begin = time.perf_counter()
    with pytest.raises(ControlRefusal) as caught:
        screen_request(body)
    assert caught.value.code == "request-too-complex"
    assert time.perf_counter() - begin < 0.25, "bounded by OVERHEAD_LIMIT, typically 20 ms"


def test_row34_one_large_parameter_is_refused() -> None:
    inner = b"\x28\x01" * OVERHEAD_LIMIT
    with pytest.raises(ControlRefusal) as caught:
        screen_request(b"\x08\x03\x5a" + varint(len(inner)) + inner)
    assert caught.value.code == "request-too-complex"


@pytest.mark.parametrize(
    "end", [b"\x6a\xff\xff\xff\x7f", b"\x0b", b"\xff" * 11, b"\x6a\x05xx", b"\x6a\xff", b"\x09\x01"]
)
def test_row34_broken_fields_in_a_large_request(end: bytes) -> None:
    with pytest.raises(ControlRefusal) as caught:
        screen_request(b"\x6a" + varint(OVERHEAD_LIMIT) + bytes(OVERHEAD_LIMIT) + end)
    assert caught.value.code == "request-malformed"


@given(st.binary(max_size=200))
def test_row34_random_ends_are_judged_not_crashed_on(end: bytes) -> None:
    with contextlib.suppress(ControlRefusal):
        screen_request(b"\x6a" + varint(OVERHEAD_LIMIT) + bytes(OVERHEAD_LIMIT) + end)
