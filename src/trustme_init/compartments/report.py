# SPDX-License-Identifier: Apache-2.0
"""The pipe on which a compartment's processes tell the manager how far they have come.

One line per message. It ends without a `failed` line exactly when init was executed: the write end is
close-on-exec, and whoever gives up says so first.
"""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass
from typing import Final

from trustme_init.errors import CompartmentRefusal, Refusal

_LINE_LIMIT: Final = 4096
"""PIPE_BUF: a write of this size or less is never torn apart."""
_SEPARATOR: Final = "\x1f"


@dataclass(slots=True)
class Sender:
    """The child's side; `step` is what a failure will be blamed on."""

    fd: int
    step: str = "start"

    def send(self, *words: str) -> None:
        """Send one message."""
        line = _SEPARATOR.join(word.replace("\n", " ") for word in words)
        os.write(self.fd, line.encode(errors="backslashreplace")[: _LINE_LIMIT - 1] + b"\n")

    def failed(self, exc: BaseException) -> None:
        """Tell why it ends here."""
        if isinstance(exc, Refusal):
            self.send("failed", exc.code, exc.cause, exc.evidence, exc.remedy)
            return
        if isinstance(exc, OSError):
            name = f"{exc.filename}: " if exc.filename is not None else ""
            evidence = f"{self.step}: {name}{exc.strerror}"
        else:
            evidence = f"{self.step}: {type(exc).__name__}: {exc}"
        self.send("failed", "step-failed", "a step of the compartment's start failed", evidence, "")


class Receiver:
    """The manager's side; every wait has the one deadline given at the beginning."""

    def __init__(self, fd: int, timeout: float) -> None:
        self._fd = fd
        self._deadline = time.monotonic() + timeout
        self._received = b""

    def expect(self, name: str) -> list[str]:
        """Return the words after `name`, which must be the next message.

        CompartmentRefusal: what a `failed` message says; "step-failed" at end of file; "start-timeout".
        """
        message = self._next()
        if message is None:
            raise _refusal(f"ended without a word before '{name}'")
        if message[0] != name:
            raise _refusal(f"said '{message[0]}' instead of '{name}'")
        return message[1:]

    def expect_end(self) -> None:
        """Wait for the end of file, which says that init was executed."""
        message = self._next()
        if message is not None:
            raise _refusal(f"said '{message[0]}' instead of executing init")

    def _next(self) -> list[str] | None:
        while b"\n" not in self._received:
            data = self._read()
            if not data:
                return None
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return words_of(line)

    def _read(self) -> bytes:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        left = max(0.0, self._deadline - time.monotonic())
        if not poll.poll(left * 1000):
            raise CompartmentRefusal(
                "start-timeout",
                "the compartment's start did not end in time",
                remedy="look at the console's kernel messages for a device that does not answer",
            )
        return os.read(self._fd, _LINE_LIMIT)


def words_of(line: bytes) -> list[str]:
    """Return the words of one message; CompartmentRefusal: what a `failed` message says."""
    words = line.decode(errors="replace").split(_SEPARATOR)
    if words[0] == "failed":
        code, cause, evidence, remedy = (*words[1:], "", "", "", "")[:4]
        raise CompartmentRefusal(code, cause, evidence=evidence, remedy=remedy)
    return words


def _refusal(evidence: str) -> CompartmentRefusal:
    return CompartmentRefusal(
        "step-failed", "the compartment's start was cut short", evidence=evidence, remedy=""
    )
