# SPDX-License-Identifier: Apache-2.0
"""Serving framed requests on a Unix socket so that no client can delay another or the manager.

Rules (threat row 34):

- Every request ends in an answer or a closed connection.
- One request per connection and loop turn; a connection whose answer is not fully handed out is not read.
- What takes long is done elsewhere: an answer that waits for it holds up its own connection only.
- Everything a client can make grow or last is in `Limits`; passing a limit costs that client its connection.
- When there are too many connections, the process that holds most of them loses the one it used least
  recently: a newcomer always gets in, and whoever is in the middle of a request stays.
- A frame is written when the socket has room for it, one per writable event, because original clients want
  a whole body from one read (interop section 2.1).
- Answers belong to a connection object, never to a descriptor number, which may be someone else's by then.
"""

from __future__ import annotations

import enum
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trustme_init.control.framing import MIB, REPLY_LIMIT, REQUEST_LIMIT, FrameDecoder, encode_frame
from trustme_init.control.loop import Loop, Timer
from trustme_init.control.sockets import listen, peer_of, peer_process
from trustme_init.control.throttle import Log, ThrottledLog

CHUNK: Final = 64 * 1024
"""Bytes read from a client at a time, and so the most unparsed small requests it can have waiting here."""
ACCEPTS_PER_TURN: Final = 16
ACCEPT_PAUSE: Final = 0.1
"""Seconds without accepting after the process ran out of descriptors or memory."""


class Flush(enum.Enum):
    """An answer yields FLUSH to go on only when all it said before has reached the client's socket."""

    FLUSH = enum.auto()


FLUSH: Final = Flush.FLUSH


@dataclass(frozen=True, slots=True)
class Wait:
    """An answer yields a Wait to go on when something outside the loop is done.

    `start` is called at once, with what is to be called, once, when that is so; it may be called from within.
    """

    start: Callable[[Callable[[], None]], None]


@dataclass(frozen=True, slots=True)
class Listen:
    """Like Wait, for a conversation: meanwhile each further request of the connection goes to `accept` first.

    What `accept` refuses has its turn after this answer, and so has all behind it. A client that leaves, or
    ends its side, ends the answer. It may read as slowly as it likes.
    """

    start: Callable[[Callable[[], None]], None]
    accept: Callable[[bytes], bool]


Answer = Generator[bytes | Flush | Wait | Listen, None, None]
"""What one request gets: bodies, made one by one as the client takes them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server grants. Times in seconds, sizes in bytes."""

    clients: int = 64
    clients_per_process: int = 16
    request: int = REQUEST_LIMIT
    held: int = 32 * MIB
    """Unfinished requests and unread replies of all clients together; the largest holder goes first."""
    queued: int = 256 * 1024
    """Unread replies of one client above which no more of its answer is made."""
    frame_time: float = 10.0
    """From a frame's first byte to its last."""
    write_time: float = 10.0
    """Without a byte taken by a client that has replies waiting."""
    idle_time: float | None = 600.0
    """Without a request."""
    keep_first: bool = False
    """The longest connected client is never the one to make room (it receives the events)."""


class Connection:
    """One client. `push` may be called at any time, also when the client is long gone."""

    __slots__ = (
        "_server",
        "accept",
        "answer",
        "closed",
        "conversing",
        "deadline_frame",
        "deadline_write",
        "decoder",
        "eof",
        "flushing",
        "last_used",
        "out",
        "out_bytes",
        "pending",
        "pid",
        "reading",
        "running",
        "sock",
        "waiting",
    )

    def __init__(self, server: FrameServer, sock: socket.socket, pid: int) -> None:
        self._server = server
        self.sock = sock
        self.pid = pid
        self.decoder = FrameDecoder(server.limits.request)
        self.pending: deque[bytes] = deque()
        self.answer: Answer | None = None
        self.accept: Callable[[bytes], bool] | None = None
        self.conversing = False
        self.flushing = False
        self.out: deque[memoryview] = deque()
        self.out_bytes = 0
        self.last_used = time.monotonic()
        self.deadline_frame: float | None = None
        self.deadline_write: float | None = None
        self.reading = False
        self.running = False
        self.eof = False
        self.closed = False
        self.waiting = False

    @property
    def busy(self) -> bool:
        """Whether it has a request that is not fully answered."""
        return self.answer is not None or bool(self.pending) or bool(self.out)

    @property
    def held(self) -> int:
        """Bytes kept for this client."""
        return self.decoder.buffered + self.out_bytes

    def push(self, body: bytes) -> bool:
        """Send a message outside any answer; False when the client is gone or does not read."""
        return self._server.push(self, body)

    def peer(self) -> int:
        """Return a pidfd of the process that connected; see `sockets.peer_process`."""
        return peer_process(self.sock)


class FrameServer:
    """A listening socket at a path and its clients; subclasses say how a request is answered."""

    def __init__(
        self,
        loop: Loop,
        path: Path,
        *,
        uid: int,
        gid: int,
        limits: Limits,
        log: Log,
    ) -> None:
        self.limits = limits
        self.path = path
        self._loop = loop
        self._uid = uid
        self._log = ThrottledLog(log, path.name)
        self._clients: dict[int, Connection] = {}
        self._sweeper: Timer | None = None
        self._socket, self._inode = listen(path, uid=uid, gid=gid)
        self._accepting: Timer | None = None
        loop.add_reader(self._socket.fileno(), self._accept)

    # What a server is about

    def respond(self, connection: Connection, body: bytes) -> Answer:
        """Answer one request, lazily. An exception closes the connection."""
        raise NotImplementedError

    def connected(self, connection: Connection) -> None:
        """Take note of a new client."""

    @property
    def clients(self) -> list[Connection]:
        """The connections, longest connected first."""
        return list(self._clients.values())

    def close(self) -> None:
        """Close every connection and the socket; remove the path unless a successor has replaced it."""
        for connection in self.clients:
            self._close(connection)
        for timer in (self._sweeper, self._accepting):
            if timer is not None:
                timer.cancel()
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        with suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()

    # Accepting

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._socket.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as exc:
                self._log(f"cannot accept: {exc.strerror}")
                self._make_room(self.clients)
                self._loop.remove_reader(self._socket.fileno())
                self._accepting = self._loop.call_later(ACCEPT_PAUSE, self._resume)
                return
            self._admit(sock)

    def _resume(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _admit(self, sock: socket.socket) -> None:
        pid, uid = peer_of(sock)
        if uid not in {self._uid, 0}:
            self._log(f"refused a client: uid {uid}, process {pid}")
            sock.close()
            return
        same = [connection for connection in self._clients.values() if connection.pid == pid]
        if len(same) >= self.limits.clients_per_process:
            self._make_room(same)
        elif len(self._clients) >= self.limits.clients:
            counts = Counter(connection.pid for connection in self._clients.values())
            most = max(counts.values())
            self._make_room([c for c in self._clients.values() if counts[c.pid] == most])
        sock.setblocking(False)
        connection = Connection(self, sock, pid)
        self._clients[sock.fileno()] = connection
        self._read_more(connection)
        self._guarded(connection, lambda: self.connected(connection))
        self._watch_time(connection)

    def _make_room(self, candidates: list[Connection]) -> None:
        if self.limits.keep_first and len(self._clients) > 1:
            first = next(iter(self._clients.values()))
            candidates = [connection for connection in candidates if connection is not first]
        if candidates:
            victim = min(candidates, key=lambda connection: (connection.busy, connection.last_used))
            self._drop(victim, "too many connections")

    # Reading and answering

    def _read_more(self, connection: Connection) -> None:
        connection.reading = True
        self._loop.add_reader(
            connection.sock.fileno(), lambda: self._guarded(connection, lambda: self._readable(connection))
        )

    def _readable(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        decoder = connection.decoder
        if data:
            connection.pending.extend(decoder.feed(data))
        if not data or decoder.failure is not None:
            # Nothing more can come; what came in full is still answered.
            connection.eof = True
            self._read_no_more(connection)
            if decoder.failure is not None:
                self._log(f"process {connection.pid}: {decoder.failure}")
        if not decoder.started:
            connection.deadline_frame = None
        elif connection.deadline_frame is None or connection.pending:
            connection.deadline_frame = time.monotonic() + self.limits.frame_time
        self._advance(connection)
        self._bound_memory(connection)

    def _read_no_more(self, connection: Connection) -> None:
        if connection.reading:
            connection.reading = False
            self._loop.remove_reader(connection.sock.fileno())

    def _advance(self, connection: Connection) -> None:
        """Take one step: begin the next request if none is being answered, hand out what fits."""
        if connection.answer is None and connection.pending:
            connection.last_used = time.monotonic()
            connection.answer = self.respond(connection, connection.pending.popleft())
        self._pump(connection)
        self._write(connection)
        if connection.closed:
            return
        if connection.accept is not None:
            self._listen(connection)
        elif connection.answer is not None or connection.pending:
            self._read_no_more(connection)
            if not connection.out and not connection.waiting:
                self._soon(connection)  # otherwise the writer, or what it waits for, takes it from here
        elif not connection.eof:
            self._read_on(connection)
        elif not connection.out:
            self._close(connection)
        self._watch_time(connection)

    def _listen(self, connection: Connection) -> None:
        while connection.pending and connection.accept is not None:
            if not connection.accept(connection.pending[0]):
                break
            connection.pending.popleft()
        if connection.eof:
            self._close(connection)
        elif connection.pending:
            self._read_no_more(connection)
        else:
            self._read_on(connection)

    def _read_on(self, connection: Connection) -> None:
        if not connection.reading:
            if connection.decoder.started:
                connection.deadline_frame = time.monotonic() + self.limits.frame_time
            self._read_more(connection)

    def _soon(self, connection: Connection) -> None:
        self._loop.call_soon(lambda: self._guarded(connection, lambda: self._advance(connection)))

    def _pump(self, connection: Connection) -> None:
        answer = connection.answer
        while answer is not None and not connection.waiting and connection.out_bytes < self.limits.queued:
            if connection.flushing and connection.out:
                return
            connection.flushing = False
            connection.running = True
            try:
                part = next(answer, None)
            finally:
                connection.running = False
            if connection.closed:
                answer.close()  # the request itself made the manager close this server
                return
            if part is None:
                connection.answer = answer = None
                connection.conversing = False
                connection.last_used = time.monotonic()
            elif isinstance(part, Flush):
                connection.flushing = True
            elif isinstance(part, Wait | Listen):
                connection.waiting = True
                if isinstance(part, Listen):
                    connection.accept, connection.conversing = part.accept, True
                part.start(lambda: self._resume_answer(connection))
            else:
                self._queue(connection, part)

    def _resume_answer(self, connection: Connection) -> None:
        connection.waiting = False
        connection.accept = None
        if not connection.closed:
            self._soon(connection)

    # Writing

    def _queue(self, connection: Connection, body: bytes) -> None:
        frame = encode_frame(body, REPLY_LIMIT)
        connection.out.append(memoryview(frame))
        connection.out_bytes += len(frame)

    def push(self, connection: Connection, body: bytes) -> bool:
        """See Connection.push."""
        if connection.closed:
            return False
        if connection.out_bytes > self.limits.queued:
            self._drop(connection, "does not read what is sent to it")
            return False

        def send() -> None:
            self._queue(connection, body)
            self._write(connection)
            self._watch_time(connection)

        self._guarded(connection, send)
        return not connection.closed

    def _write(self, connection: Connection) -> None:
        """Send one frame, or as much of it as the socket takes."""
        if connection.out:
            try:
                sent = connection.sock.send(connection.out[0], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                sent = 0
            connection.out_bytes -= sent
            if sent == len(connection.out[0]):
                connection.out.popleft()
            else:
                connection.out[0] = connection.out[0][sent:]
            if sent or connection.deadline_write is None:
                connection.deadline_write = time.monotonic() + self.limits.write_time
        if connection.out:
            self._loop.add_writer(
                connection.sock.fileno(), lambda: self._guarded(connection, lambda: self._advance(connection))
            )
        else:
            connection.deadline_write = None
            self._loop.remove_writer(connection.sock.fileno())

    # Limits

    def _bound_memory(self, connection: Connection) -> None:
        if connection.held <= CHUNK:
            return
        if sum(client.held for client in self._clients.values()) > self.limits.held:
            self._drop(max(self._clients.values(), key=lambda client: client.held), "too much data held")

    def _deadline(self, connection: Connection) -> float | None:
        deadlines = []
        if connection.deadline_write is not None and not connection.conversing:
            deadlines.append(connection.deadline_write)
        if connection.reading and connection.deadline_frame is not None:
            deadlines.append(connection.deadline_frame)
        if not deadlines and not connection.busy and self.limits.idle_time is not None:
            deadlines.append(connection.last_used + self.limits.idle_time)
        return min(deadlines, default=None)

    def _watch_time(self, connection: Connection) -> None:
        """Make sure the sweep comes no later than this connection's deadline."""
        deadline = None if connection.closed else self._deadline(connection)
        if deadline is None:
            return
        if self._sweeper is not None and self._sweeper.active:
            if self._sweeper.when <= deadline:
                return
            self._sweeper.cancel()
        self._sweeper = self._loop.call_later(max(deadline - time.monotonic(), 0), self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in self.clients:
            deadline = self._deadline(connection)
            if deadline is not None and deadline <= now:
                self._drop(connection, "too slow" if connection.busy or connection.decoder.started else "")
        for connection in self.clients:
            self._watch_time(connection)

    # Ending

    def _guarded(self, connection: Connection, step: Callable[[], None]) -> None:
        """Run one step for a client; whatever goes wrong ends this connection and nothing else."""
        if connection.closed:
            return
        try:
            step()
        except (BrokenPipeError, ConnectionResetError):
            self._close(connection)
        except Exception as exc:  # noqa: BLE001 - the server outlives any failure of one connection
            self._drop(connection, f"{type(exc).__name__}: {exc}")

    def _drop(self, connection: Connection, reason: str) -> None:
        if reason:
            self._log(f"process {connection.pid} disconnected: {reason}")
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        fd = connection.sock.fileno()
        self._loop.remove(fd)
        self._clients.pop(fd, None)
        connection.sock.close()
        connection.out.clear()
        connection.out_bytes = 0
        connection.pending.clear()
        answer, connection.answer = connection.answer, None
        try:
            # What an answer does after its reply (a reboot) is in its `finally` and happens now.
            if answer is not None and not connection.running:
                answer.close()
        except Exception as exc:  # noqa: BLE001 - see _guarded
            self._log(f"after a connection: {type(exc).__name__}: {exc}")
