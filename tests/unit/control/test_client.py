# SPDX-License-Identifier: Apache-2.0
"""The client against a peer that does one scripted thing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trustme_init.control.client import ControlClient
from trustme_init.errors import ControlRefusal
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply

ASK = Request(command=Request.GET_PROVISIONED)
GOOD = b"\0\0\0\x05\x08\x29\xc8\x02\x01"

Peer = Callable[[socket.socket], None]


def says(data: bytes) -> Peer:
    """Answer with `data`, after the request: who hangs up before has the client fail while it still sends."""

    def peer(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(data)

    return peer


@contextlib.contextmanager
def serving(path: Path, peer: Peer) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                peer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def outcome(path: Path, peer: Peer, timeout: float = 5) -> Reply | str:
    with serving(path, peer), ControlClient(path, timeout=timeout) as client:
        try:
            return client.request(ASK)
        except ControlRefusal as exc:
            return exc.code


def test_a_reply_in_pieces(tmp_path: Path) -> None:
    def peer(sock: socket.socket) -> None:
        assert sock.recv(100) == b"\0\0\0\x02\x08\x21"
        for byte in GOOD:
            sock.send(bytes([byte]))

    reply = outcome(tmp_path / "s", peer)
    assert isinstance(reply, Reply)
    assert reply.device_is_provisioned


def test_replies_in_one_piece_are_handed_out_one_by_one(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", says(GOOD * 2)),
        ControlClient(tmp_path / "s") as client,
    ):
        assert client.request(ASK).device_is_provisioned
        assert client.receive().device_is_provisioned


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"", "closed"),
        (GOOD[:3], "closed"),
        (GOOD[:6], "closed"),
        (b"\xff\xff\xff\xff", "malformed-reply"),
        (b"\x04\0\0\0", "malformed-reply"),
        (b"\0\0\0\x01\xff", "malformed-reply"),
        (b"\0\0\0\0", "malformed-reply"),
        (b"\0\0\0\x04\x08\x1e\xa2\x01", "malformed-reply"),
    ],
)
def test_bad_replies_are_named(tmp_path: Path, sent: bytes, code: str) -> None:
    assert outcome(tmp_path / "s", says(sent)) == code


def test_a_silent_or_dribbling_peer_is_timed_out_in_total(tmp_path: Path) -> None:
    stop = threading.Event()

    def dribble(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(b"\0\0\x10\0")
            while not stop.wait(0.05):
                sock.sendall(b"x")

    late = threading.Timer(20, stop.set)
    late.start()
    with serving(tmp_path / "s", dribble), ControlClient(tmp_path / "s", timeout=0.3) as client:
        with pytest.raises(ControlRefusal) as caught:
            client.request(ASK)
        assert not stop.is_set(), "it is the client that gave up"
        stop.set()
        late.cancel()
    assert caught.value.code == "timed-out"


def test_a_peer_that_does_not_take_the_request_is_timed_out(tmp_path: Path) -> None:
    release = threading.Event()
    big = Request(command=Request.PUSH_DEVICE_CERT, device_cert=bytes(4 << 20))
    with (
        serving(tmp_path / "s", lambda _sock: (release.wait(5), None)[1]),
        ControlClient(tmp_path / "s", timeout=0.2) as client,
    ):
        with pytest.raises(ControlRefusal) as caught:
            client.request(big)
        release.set()
    assert caught.value.code == "timed-out"


def test_a_listener_that_does_not_accept_is_timed_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        for _ in range(2):
            extra = stack.enter_context(socket.socket(socket.AF_UNIX))
            extra.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                extra.connect(str(tmp_path / "s"))
        begin = time.monotonic()
        with ControlClient(tmp_path / "s", timeout=0.2) as client, pytest.raises(ControlRefusal) as caught:
            client.request(ASK)
        assert caught.value.code == "timed-out"
        assert 0.1 < time.monotonic() - begin < 2


def test_nothing_there_is_not_running(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path / "dead", tmp_path / "plain"):
        if path.name == "dead":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
        elif path.name == "plain":
            path.touch()
        with ControlClient(path) as client, pytest.raises(ControlRefusal) as caught:
            client.request(ASK)
        assert caught.value.code == "not-running"
        assert str(path) in caught.value.evidence
