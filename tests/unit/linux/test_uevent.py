# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.linux import uevent

# As strace shows a kernel message (loop device, Linux 6.18)
REAL = (
    b"add@/devices/virtual/block/loop0\0ACTION=add\0DEVPATH=/devices/virtual/block/loop0\0SUBSYSTEM=block\0"
    b"SYNTH_UUID=0\0MAJOR=7\0MINOR=0\0DEVNAME=loop0\0DEVTYPE=disk\0DISKSEQ=1\0SEQNUM=1234\0"
)
WORD = st.text(
    st.characters(codec="utf-8", exclude_characters="\0=@\n", exclude_categories=["Cs"]), min_size=1
)


def test_a_real_message() -> None:
    event = uevent.parse(REAL)
    assert event[:3] == ("add", "/devices/virtual/block/loop0", "block")
    assert event.env["DEVNAME"] == "loop0"
    assert event.env["SEQNUM"] == "1234"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0",
        b"add@/x",
        b"add@/x\0ACTION=add\0DEVPATH=/x\0",
        b"add@/x\0ACTION=remove\0DEVPATH=/x\0SUBSYSTEM=block\0",
        b"add@/x\0ACTION=add\0DEVPATH=/y\0SUBSYSTEM=block\0",
        b"add/x\0ACTION=add\0DEVPATH=/x\0SUBSYSTEM=block\0",
        b"add@/x\0ACTION=add\0DEVPATH=/x\0SUBSYSTEM=block\0SUBSYSTEM=net\0",
        b"add@/x\0ACTION=add\0DEVPATH=/x\0SUBSYSTEM=block\0=1\0",
        b"add@/x\0ACTION=add\0\0DEVPATH=/x\0SUBSYSTEM=block\0",
        b"libudev\0\xfe\xed\xca\xfe" + bytes(28) + REAL,
        REAL + b"A=" + b"x" * uevent.MESSAGE_LIMIT,
    ],
)
def test_what_no_kernel_says(message: bytes) -> None:
    with pytest.raises(ValueError):
        uevent.parse(message)


@given(st.binary(max_size=300), st.sampled_from([b"", REAL, b"add@/x\0"]))
def test_anything_parses_or_is_a_value_error(tail: bytes, head: bytes) -> None:
    try:
        event = uevent.parse(head + tail)
    except ValueError:
        return
    assert event.env["ACTION"] == event.action
    assert event.env["DEVPATH"] == event.devpath


@given(WORD, WORD, WORD, st.dictionaries(WORD, WORD))
def test_round_trip(action: str, path: str, subsystem: str, more: dict[str, str]) -> None:
    env = {**more, "ACTION": action, "DEVPATH": path, "SUBSYSTEM": subsystem}
    fields = [f"{action}@{path}", *(f"{key}={value}" for key, value in env.items())]
    message = b"".join(field.encode() + b"\0" for field in fields)
    if len(message) <= uevent.MESSAGE_LIMIT:
        assert uevent.parse(message) == (action, path, subsystem, env)


def credentials(pid: int) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("iII", pid, 0, 0))]


def test_only_the_kernel_is_believed() -> None:
    assert uevent.is_from_kernel((0, 1), credentials(0))
    assert not uevent.is_from_kernel((4711, 1), credentials(0))
    assert not uevent.is_from_kernel((0, 1), credentials(4711))
    assert not uevent.is_from_kernel((0, 2), credentials(0))
    assert not uevent.is_from_kernel((0, 0), credentials(0))
    assert not uevent.is_from_kernel((0, 1), [])
    assert not uevent.is_from_kernel((0, 1), credentials(0) * 2)
    assert not uevent.is_from_kernel((0, 1), [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, b"\0\0\0\0")])
