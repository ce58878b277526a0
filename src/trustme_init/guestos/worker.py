# SPDX-License-Identifier: Apache-2.0
"""The two processes of an installation: one that fetches, then one that checks. Neither holds a secret.

Each is forked by the manager, opens what it needs, gives up every privilege (user and group NOBODY, no
capability, nothing new by exec) and only then touches what others made: the network's bytes, the images. The
one that checks is started when the one that fetched has ended, so nobody can change a file that was checked.
A worker ends with its manager.

The manager hears JSON over a SOCK_SEQPACKET socket: `progress` (file, bytes, done, total), `taken` for a
piece of a stream, and at last `done` or `refusal`. A worker that ends without a last word has failed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from trustme_init.errors import ControlRefusal, Refusal
from trustme_init.guestos.check import check_file
from trustme_init.guestos.pieces import PIECE_LIMIT, Piece
from trustme_init.guestos.plan import Plan, directory_url
from trustme_init.guestos.sources import (
    FILE_SCHEME,
    FileSource,
    Source,
    StreamSource,
    Target,
    root_of,
)
from trustme_init.guestos.store import MARK, open_file
from trustme_init.linux.files import openat2
from trustme_init.linux.process import (
    close_range,
    forbid_new_privileges,
    set_dumpable,
    set_parent_death_signal,
)

NOBODY: Final = 65534
MESSAGE_LIMIT: Final = PIECE_LIMIT + 4096
PROGRESS_INTERVAL: Final = 0.2
"""Seconds between two reports."""
FILE_MODE: Final = 0o600

_SO_SNDBUFFORCE: Final = 32
_FIRST: Final = 3
"""The first descriptor that is not standard input, output or error."""

Work = Callable[["Reporter"], None]


@dataclass(frozen=True, slots=True)
class Fetch:
    """What a fetcher is told."""

    plan: Plan
    images: Path
    """The folder to fetch into."""
    url: str
    """Base URL (interop section 2.6); "" for a stream from the client."""
    anchors: Path
    development: bool


@dataclass(frozen=True, slots=True)
class Worker:
    """A running worker as its parent sees it; who owns it closes both descriptors and reaps it."""

    pid: int
    pidfd: int
    connection: socket.socket


def spawn(prepare: Callable[[], Work], *, keep: int = -1) -> Worker:
    """Fork a worker. It calls `prepare` with the manager's privileges, and without them what that returns.

    `keep` is a descriptor that it needs, besides its socket. OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * MESSAGE_LIMIT)
    # A handler of the manager must not run in the child.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become_worker(theirs, prepare, keep)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
    ours.setblocking(False)
    return Worker(pid, os.pidfd_open(pid), ours)


class Reporter:
    """The worker's side of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._done: dict[str, int] = {}
        self._total = 0
        self._last = 0.0

    def expect(self, present: Mapping[str, int], total: int) -> None:
        """Begin to count: bytes that are there already, and how many there will be."""
        self._done = dict(present)
        self._total = total

    def progress(self, name: str, have: int) -> None:
        """Say how far a file is, now and then; always when everything is there."""
        self._done[name] = have
        done = sum(self._done.values())
        now = time.monotonic()
        if now - self._last >= PROGRESS_INTERVAL or done == self._total:
            self._last = now
            self.say({"progress": {"file": name, "bytes": have, "done": done, "total": self._total}})

    def say(self, message: Mapping[str, Any]) -> None:
        """Tell the manager something."""
        self._connection.send(json.dumps(message).encode())

    def receive(self) -> Piece:
        """Wait for the next piece of a stream; ControlRefusal("stream-ended")."""
        message = self._connection.recv(MESSAGE_LIMIT)
        if not message:
            raise ControlRefusal("stream-ended", "the client sends no more of the images")
        return Piece.decoded(message)


def _become_worker(connection: socket.socket, prepare: Callable[[], Work], keep: int) -> NoReturn:
    status = 1
    try:
        set_dumpable(enabled=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is too long is an error, not the end
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _close_all_but(connection.fileno(), keep)
        connection.setblocking(True)
        run(Reporter(connection), prepare)
        status = 0
    finally:
        os._exit(status)


def run(reporter: Reporter, prepare: Callable[[], Work], *, confine: bool = True) -> None:
    """Do the work and say what became of it."""
    try:
        work = prepare()
        if confine:
            _give_up_privileges()
        work(reporter)
        last: Mapping[str, Any] = {"done": {}}
    except Refusal as refusal:
        last = {"refusal": refusal.as_dict()}
    except Exception as exc:  # noqa: BLE001 - whatever it is, the manager is told
        last = {
            "refusal": {
                "code": "installation-failed",
                "cause": "the installation met something that it was not made for",
                "evidence": f"{type(exc).__name__}: {exc}"[:200],
                "remedy": "push the GuestOS again; report this if it stays",
            }
        }
    reporter.say(last)


def _close_all_but(*kept: int) -> None:
    first = _FIRST
    for fd in sorted(fd for fd in kept if fd >= _FIRST):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1
    close_range(first)


def _give_up_privileges() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    forbid_new_privileges()
    set_dumpable(enabled=False)
    set_parent_death_signal(signal.SIGKILL)


# What they do


def fetcher(job: Fetch, caller: int) -> Work:
    """Open everything that fetching needs; `caller` is a pidfd of who asked. Runs with privileges."""
    present = _present(job)
    missing = [file for file in job.plan.files if present[file.name] < file.size]
    is_file, is_stream = job.url.startswith(FILE_SCHEME), not job.url
    url = directory_url(job.url, job.plan.stem)
    root = root_of(caller) if is_file and missing else -1
    files = FileSource(root, url, missing) if is_file and missing else None
    folder = openat2(job.images, os.O_RDONLY | os.O_DIRECTORY)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    targets = []
    for file in missing:
        fd = openat2(file.name, flags, dirfd=folder, mode=FILE_MODE)
        needs_mark = not is_file and not is_stream
        mark = openat2(file.name + MARK, flags, dirfd=folder, mode=FILE_MODE) if needs_mark else -1
        targets.append(Target(file, fd, mark))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit := max([4096, *(file.size for file in missing)]), limit))
    http = None
    if not is_file and not is_stream and missing:
        from trustme_init.guestos import network
        from trustme_init.guestos.download import HttpSource

        http = HttpSource(url, anchors=job.anchors, development=job.development)
        network.enter(caller)

    def work(reporter: Reporter) -> None:
        reporter.expect(present, job.plan.size)
        source: Source | None = files or http
        if is_stream:
            source = StreamSource(reporter.receive, lambda: reporter.say({"taken": {}}))
        if source is not None:
            source.fetch(targets, reporter.progress)

    return work


def checker(plan: Plan, folder: Path) -> Work:
    """Open the images for reading. Runs with privileges."""
    directory = openat2(folder, os.O_RDONLY | os.O_DIRECTORY)
    opened = {}
    for file in plan.files:
        # What is not there is of the wrong size, too: it is said by the same check.
        with suppress(FileNotFoundError):
            opened[file.name] = open_file(directory, file.name)
    empty = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def work(reporter: Reporter) -> None:
        images = [file for file in plan.files if not file.is_tree]
        reporter.expect({}, sum(file.size for file in images))
        for file in images:
            have = 0

            def count(read: int, name: str = file.name) -> None:
                nonlocal have
                have += read
                reporter.progress(name, have)

            tree = opened.get(file.tree, empty) if file.root_hash else None
            check_file(file, opened.get(file.name, empty), tree, count)

    return work


def _present(job: Fetch) -> dict[str, int]:
    """Return how many bytes of each file an earlier attempt has left."""
    found = {}
    for file in job.plan.files:
        found[file.name] = 0
        with suppress(OSError):
            found[file.name] = min((job.images / file.name).lstat().st_size, file.size)
    return found
