# SPDX-License-Identifier: Apache-2.0
"""The two ways a machine's consoles are read: a log that grows, and a terminal that answers."""

from __future__ import annotations

import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from trustme_tools.errors import ToolError

POLL: Final = 0.02
_CHUNK: Final = 65536
_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-9;?=]*[A-Za-z]|[()][A-Z0-9]|[=>])")
_SHOWN: Final = 400


def plain(text: str) -> str:
    """Return terminal output without control sequences and carriage returns."""
    return _ESCAPES.sub("", text).replace("\r", "")


class ConsoleLog:
    """Output of a console that is only written by the machine, followed in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def text(self) -> str:
        """Everything so far, as plain text."""
        try:
            return plain(self.path.read_text(errors="replace"))
        except FileNotFoundError:
            return ""


class Answer(NamedTuple):
    """What a command on the machine printed, and its exit code."""

    code: int
    output: str


class Terminal:
    """The core container's console, with a shell on it.

    It is reached through a unix socket (QEMU's, by its path) or one that is connected already.
    """

    def __init__(self, way: Path | socket.socket, alive: Callable[[], bool]) -> None:
        self._alive = alive
        self._text = ""
        self._position = 0
        if isinstance(way, socket.socket):
            self._socket = way
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(way))
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        """Let go of the console; another may attach."""
        self._socket.close()

    @property
    def text(self) -> str:
        """Everything seen so far, as plain text."""
        return plain(self._text)

    def send(self, text: str) -> None:
        """Type `text`."""
        self._socket.sendall(text.encode())

    def expect(self, pattern: str, timeout: float) -> re.Match[str]:
        """Return the first match of `pattern` after what was matched before; ToolError("no-answer")."""
        deadline = time.monotonic() + timeout
        while True:
            match = re.compile(pattern, re.MULTILINE).search(self._text, self._position)
            if match:
                self._position = match.end()
                return match
            if time.monotonic() > deadline or not self._alive():
                raise ToolError(
                    f"the core console did not show {pattern!r}",
                    code="no-answer",
                    evidence=repr(self._text[self._position :][-_SHOWN:]),
                )
            self._read(0.2)

    def run(self, command: str, timeout: float = 30.0) -> Answer:
        """Run a shell command and return its output (both streams) and exit code."""
        marker = f"m{secrets.token_hex(6)}"
        # The marker is split where it is typed, so that the echo of the command cannot be mistaken for it.
        typed = f"{marker[:4]}''{marker[4:]}"
        self.send(f"echo; echo {typed}-begin; {{ {command}\n}} 2>&1; echo {typed}-end-$?\n")
        self.expect(f"{marker}-begin\r?\n", timeout)
        start = self._position
        match = self.expect(rf"{marker}-end-(\d+)\r?\n", timeout)
        output = plain(self._text[start : match.start()])
        return Answer(int(match[1]), _without_echo(output))

    def drain(self, quiet: float = 0.1) -> None:
        """Read until nothing has come for `quiet` seconds."""
        while self._read(quiet):
            pass
        self._position = len(self._text)

    def _read(self, timeout: float) -> bool:
        self._socket.settimeout(timeout)
        try:
            data = self._socket.recv(_CHUNK)
        except TimeoutError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            time.sleep(POLL)
            return False
        self._text += data.decode(errors="replace")
        return True


def _without_echo(output: str) -> str:
    """Drop the shell's secondary prompt and what it echoes of a command's last line."""
    return re.sub(r"^(?:> )?\} 2>&1; echo .*\n", "", output, count=1)
