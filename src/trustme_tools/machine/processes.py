# SPDX-License-Identifier: Apache-2.0
"""Child processes that never outlive us, whichever way we end."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.tooling import find

END_GRACE: Final = 3.0
START_TIMEOUT: Final = 60.0
"""Seconds until a started program listens: well under one, but a busy machine may read it from disk."""


class Child:
    """A program with its output in a log file. The kernel kills it when the thread that made it ends."""

    def __init__(self, program: str, arguments: Sequence[str | Path], log: Path) -> None:
        self.log = log
        command = [find("setpriv"), "--pdeathsig", "KILL", find(program), *map(str, arguments)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self.name = program

    @property
    def pid(self) -> int:
        """Process id (setpriv becomes the program itself)."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Return code, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int:
        """Return its exit code; ToolError("still-running") when it does not end in time."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ToolError(
                f"{self.name} did not end", code="still-running", evidence=f"{timeout:.0f} s"
            ) from None

    def kill(self) -> None:
        """End it at once."""
        if self.running:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Ask it to end, then make it."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(END_GRACE)
            except subprocess.TimeoutExpired:
                self.kill()

    def last_words(self) -> str:
        """Return the end of its log, for an error message."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-4:])


def connect(path: Path, child: Child, timeout: float = START_TIMEOUT) -> socket.socket:
    """Return a connection to the unix socket that `child` is about to listen on.

    The socket's name appears a moment before anybody listens. ToolError("start-failed").
    """
    deadline = time.monotonic() + timeout
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        else:
            return connection
        _wait_a_moment(path, child, deadline)


def wait_for_path(path: Path, child: Child, timeout: float = START_TIMEOUT) -> None:
    """Return when `child` has made its socket at `path`, for a program that must be its first client."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        _wait_a_moment(path, child, deadline)


def _wait_a_moment(path: Path, child: Child, deadline: float) -> None:
    if not child.running or time.monotonic() > deadline:
        raise ToolError(
            f"{child.name} did not start", code="start-failed", evidence=child.last_words() or str(path)
        )
    time.sleep(0.01)
