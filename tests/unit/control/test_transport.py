# SPDX-License-Identifier: Apache-2.0
"""What only shows with the server in this process: pushes, re-entrancy, choice of the victim."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trustme_init.control.framing import encode_frame
from trustme_init.control.loop import Loop
from trustme_init.control.sockets import SO_PASSRIGHTS
from trustme_init.control.throttle import LOG_LINES
from trustme_init.control.transport import (
    FLUSH,
    Answer,
    Connection,
    FrameServer,
    Limits,
    Wait,
)


class Echo(FrameServer):
    """Answers with what it was asked; `reaction` runs inside the answer."""

    reaction: Callable[[], None] = staticmethod(lambda: None)
    log: list[str]

    def respond(self, connection: Connection, body: bytes) -> Answer:
        if body == b"fail":
            raise ValueError("on purpose\x1b[2J")
        yield body
        yield FLUSH
        self.reaction()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def make(loop: Loop, tmp_path: Path) -> Iterator[Callable[..., Echo]]:
    made: list[Echo] = []

    def make(**limits: object) -> Echo:
        log: list[str] = []
        server = Echo(
            loop,
            tmp_path / "s",
            uid=os.getuid(),
            gid=os.getgid(),
            limits=Limits(**limits),  # type: ignore[arg-type]
            log=log.append,
        )
        server.log = log
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()


def connect(server: FrameServer, loop: Loop) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(server.path))
    sock.settimeout(1)
    loop.turn(0.1)
    return sock


def test_a_request_that_makes_the_manager_close_the_server(loop: Loop, make: Callable[..., Echo]) -> None:
    server = make()
    server.reaction = server.close
    with connect(server, loop) as sock:
        sock.sendall(encode_frame(b"one") + encode_frame(b"two"))
        for _ in range(5):
            loop.turn(0.01)
        assert sock.recv(100) == encode_frame(b"one")
        assert sock.recv(100) == b""
    assert server.log == []
    assert not server.path.exists()


def test_row34_a_failing_answer_closes_its_connection_and_is_logged_visibly(
    loop: Loop, make: Callable[..., Echo]
) -> None:
    server = make()
    with connect(server, loop) as good, connect(server, loop) as bad:
        bad.sendall(encode_frame(b"fail"))
        good.sendall(encode_frame(b"fine"))
        loop.turn(0.1)
        assert bad.recv(10) == b""
        assert good.recv(100) == encode_frame(b"fine")
    assert "on purpose\\x1b[2J" in server.log[0]


def test_row27_the_log_is_limited(loop: Loop, make: Callable[..., Echo]) -> None:
    server = make()
    for _ in range(LOG_LINES * 3):
        with connect(server, loop) as bad:
            bad.sendall(encode_frame(b"fail"))
            loop.turn(0.1)
    assert len(server.log) == LOG_LINES


def test_push_reaches_the_client_and_knows_when_it_is_gone(loop: Loop, make: Callable[..., Echo]) -> None:
    server = make()
    with connect(server, loop) as sock:
        (connection,) = server.clients
        assert connection.push(b"event")
        assert sock.recv(100) == encode_frame(b"event")
    loop.turn(0.1)
    assert server.clients == []
    assert not connection.push(b"too late")


def test_row34_a_client_that_does_not_read_its_events_is_dropped(
    loop: Loop, make: Callable[..., Echo]
) -> None:
    server = make(queued=4096)
    with connect(server, loop):
        (connection,) = server.clients
        count = 0
        while connection.push(bytes(65536)):
            count += 1
            assert count < 100
    assert "does not read" in server.log[0]


def test_row34_the_least_recently_used_connection_makes_room(loop: Loop, make: Callable[..., Echo]) -> None:
    server = make(clients_per_process=3)
    socks = [connect(server, loop) for _ in range(3)]
    socks[0].sendall(encode_frame(b"busy"))
    loop.turn(0.1)
    socks.append(connect(server, loop))
    assert socks[0].recv(100) == encode_frame(b"busy")
    assert socks[1].recv(100) == b"", "used least recently"
    assert len(server.clients) == 3
    for sock in socks:
        sock.close()


def test_an_older_server_does_not_remove_its_successor(loop: Loop, make: Callable[..., Echo]) -> None:
    old, new = make(), make()
    old.close()
    with connect(new, loop) as sock:
        sock.sendall(encode_frame(b"x"))
        loop.turn(0.1)
        assert sock.recv(10) == encode_frame(b"x")


def can_refuse_descriptors() -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            return False
        return True


def send_lingering(path: Path) -> None:
    """Send the last descriptor of a connection whose close waits for a peer that never reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        client.setblocking(False)
        peer, _ = listener.accept()
    try:
        while client.send(bytes(65536)):
            pass
    except BlockingIOError:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(str(path))
        try:
            socket.send_fds(control, [encode_frame(b"x")], [client.fileno()])
        finally:
            client.close()
            signal.pause()  # the peer stays open
    peer.close()


@pytest.mark.skipif(not can_refuse_descriptors(), reason="SO_PASSRIGHTS needs Linux 6.16")
def test_row34_a_descriptor_that_is_slow_to_close_never_reaches_the_manager(
    loop: Loop, make: Callable[..., Echo]
) -> None:
    server = make()
    attacker = os.fork()
    if attacker == 0:
        try:
            send_lingering(server.path)
        finally:
            signal.pause()
            os._exit(0)
    try:
        loop.turn(5)  # the attacker connects
        begin = time.monotonic()
        for _ in range(5):
            loop.turn(0.1)
        with connect(server, loop) as sock:
            sock.sendall(encode_frame(b"good"))
            loop.turn(0.1)
            assert sock.recv(100) == encode_frame(b"good")
        assert time.monotonic() - begin < 5
    finally:
        os.kill(attacker, signal.SIGKILL)
        os.waitpid(attacker, 0)


# Waiting


class Waiting(FrameServer):
    """Answers b"wait" only when it is told to; everything else at once."""

    resumes: list[Callable[[], None]]

    def respond(self, connection: Connection, body: bytes) -> Answer:
        if body == b"wait":
            yield Wait(self.resumes.append)
        elif body == b"already":
            yield Wait(lambda resume: resume())
        yield body


@pytest.fixture
def waiting(loop: Loop, tmp_path: Path) -> Iterator[Waiting]:
    limits = Limits()
    log: list[str] = []
    server = Waiting(loop, tmp_path / "w", uid=os.getuid(), gid=os.getgid(), limits=limits, log=log.append)
    server.resumes = []
    yield server
    server.close()
    assert log == []


def turn(loop: Loop, times: int = 4) -> None:
    for _ in range(times):
        loop.turn(0.01)


def test_row34_an_answer_that_waits_holds_up_nobody_else(loop: Loop, waiting: Waiting) -> None:
    with connect(waiting, loop) as slow, connect(waiting, loop) as quick:
        slow.sendall(encode_frame(b"wait") + encode_frame(b"after"))
        turn(loop)
        quick.sendall(encode_frame(b"at once"))
        turn(loop)
        assert quick.recv(100) == encode_frame(b"at once")
        slow.setblocking(False)
        with pytest.raises(BlockingIOError):
            slow.recv(1)
        (resume,) = waiting.resumes
        resume()
        turn(loop)
        assert slow.recv(100) == encode_frame(b"wait") + encode_frame(b"after"), "in order, all of it"


def test_an_answer_that_need_not_wait_after_all(loop: Loop, waiting: Waiting) -> None:
    with connect(waiting, loop) as sock:
        sock.sendall(encode_frame(b"already") + encode_frame(b"next"))
        turn(loop)
        assert sock.recv(100) == encode_frame(b"already") + encode_frame(b"next")


def test_whoever_leaves_while_it_waits_is_forgotten(loop: Loop, waiting: Waiting) -> None:
    with connect(waiting, loop) as sock:
        sock.sendall(encode_frame(b"wait"))
        turn(loop)
    (resume,) = waiting.resumes
    for connection in waiting.clients:
        waiting._close(connection)
    resume()
    turn(loop)
    assert waiting.clients == []


def test_a_loop_with_a_waiting_answer_sleeps(loop: Loop, waiting: Waiting) -> None:
    with connect(waiting, loop) as sock:
        sock.sendall(encode_frame(b"wait"))
        turn(loop)
        started = time.monotonic()
        loop.turn(0.05)
        assert time.monotonic() - started >= 0.04, "nothing spins"
