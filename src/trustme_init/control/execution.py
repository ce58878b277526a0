# SPDX-License-Identifier: Apache-2.0
"""A program in a compartment as an answer sees it: output when it asks for some, input when there is room.

The program's processes are reaped here, whenever they end, also long after the client has gone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from trustme_init.errors import CompartmentRefusal, Refusal

if TYPE_CHECKING:
    from trustme_init.compartments.exec import Entry
    from trustme_init.control.loop import Loop, Timer

CHUNK: Final = 32 * 1024
"""Bytes of output per message: a frame then fits a socket buffer whole, which original clients need."""
INPUT_LIMIT: Final = 1024 * 1024
"""Bytes of input that a program may leave unread."""
LEFTOVER: Final = 1024 * 1024
"""Bytes that are still read after the program's end: more than the largest pipe, so that what others who hold
its output go on writing does not keep the answer open."""
ENTER_TIMEOUT: Final = 20.0
"""Seconds until the program is executed; the compartment decides how fast that goes."""
_END_OF_INPUT: Final = b"\x04"


class Execution:
    """One program, from being asked for to being reaped. All calls belong to the loop's thread."""

    def __init__(self, loop: Loop, entry: Entry) -> None:
        self._loop = loop
        self._entry = entry
        self._resume: Callable[[], None] | None = None
        self._pending = bytearray()
        self._end_input = False
        self._left = LEFTOVER
        self._output_ended = False
        self._closed = False
        self.started = False
        self.failure: Refusal | None = None
        self.ended = False
        self.status: int | None = None
        """Exit code, or minus the signal, once it has ended; None if nobody knows."""
        self._deadline: Timer | None = loop.call_later(ENTER_TIMEOUT, self._too_slow)
        loop.add_reader(entry.channel.fileno(), self._heard)
        self._reap_later(entry.entrant, self._entrant_ended)

    @property
    def over(self) -> bool:
        """Whether nothing more can come: it ended and its output was read, or it never began."""
        if self.failure is not None:
            return True
        return self.ended and (self._output_ended or self._left <= 0)

    def read(self) -> bytes:
        """Return some output, empty if there is none now."""
        fd = self._entry.output
        if not self.started or fd is None or self._output_ended or self._left <= 0:
            return b""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            self._output_ended = self.ended
            return b""
        except OSError as exc:
            if exc.errno != errno.EIO:  # a terminal without a program at its other end
                raise
            data = b""
        self._output_ended = not data
        if self.ended:
            self._left -= len(data)
        return data

    def write(self, text: bytes) -> None:
        """Give it input; empty is the end of input. CompartmentRefusal("input-overflow")."""
        if len(self._pending) + len(text) > INPUT_LIMIT:
            raise CompartmentRefusal(
                "input-overflow",
                "the program does not read its input",
                evidence=f"more than {INPUT_LIMIT} bytes wait",
                remedy="send input no faster than the program takes it",
            )
        self._pending += text
        self._end_input = not text
        self._feed()

    def when_ready(self, resume: Callable[[], None]) -> None:
        """Call `resume` once, when there is output, or something has changed."""
        self._resume = resume
        fd = self._entry.output
        if self.over:
            self._wake()
        elif self.started and fd is not None and not self._output_ended:
            self._loop.add_reader(fd, self._wake)

    def interrupt(self) -> None:
        """Have whoever waits for it look at it now."""
        self._wake()

    def close(self) -> None:
        """Give it up: kill what runs, close what is open. It is reaped when it has ended."""
        if self._closed:
            return
        self._closed = True
        self._resume = None
        self._clear_deadline()
        self._stop_watching()
        self._loop.remove(self._entry.channel.fileno())
        if not self.ended:
            self._entry.kill()
        self._entry.close()

    # What happens to it.

    def _wake(self) -> None:
        fd = self._entry.output
        if fd is not None:
            self._loop.remove_reader(fd)
        resume, self._resume = self._resume, None
        if resume is not None:
            resume()

    def _heard(self) -> None:
        try:
            self.started = self._entry.advance()
        except Refusal as refusal:
            self._fail(refusal)
        except OSError as exc:
            self._fail(_step_failed(f"{exc.filename}: {exc.strerror}"))
        if self.started or self.failure is not None:
            self._clear_deadline()
            self._loop.remove(self._entry.channel.fileno())
            self._feed()
            self._wake()

    def _fail(self, refusal: Refusal) -> None:
        self.failure = self.failure or refusal

    def _too_slow(self) -> None:
        self._fail(_step_failed(f"not executed within {ENTER_TIMEOUT:.0f} s"))
        self._wake()

    def _program_ended(self, status: int | None) -> None:
        self.ended, self.status = True, status
        if not self._closed:
            self._wake()

    def _entrant_ended(self, _status: int | None) -> None:
        """Only now the program is this process's child."""
        if not self._closed and not self.started and self.failure is None:
            self._heard()  # what it said before it ended must not be overtaken by its end
        if self._entry.program is not None:
            self._reap_later(self._entry.program, self._program_ended)

    def _reap_later(self, pidfd: int, ended: Callable[[int | None], None]) -> None:
        from trustme_init.compartments.start import exit_status

        def reap() -> None:
            try:
                status = exit_status(pidfd)
            except BlockingIOError:
                return
            self._loop.remove(pidfd)
            os.close(pidfd)
            ended(status)

        self._loop.add_reader(pidfd, reap)

    def _feed(self) -> None:
        """Write what the program takes now; the rest when it takes more."""
        fd = self._entry.input
        if fd is None or not self.started:
            return
        try:
            while self._pending:
                del self._pending[: os.write(fd, self._pending)]
        except BlockingIOError:
            self._loop.add_writer(fd, self._feed)
            return
        except OSError:  # it has closed its input, or is gone
            self._pending.clear()
        self._loop.remove_writer(fd)
        if self._end_input:
            self._end_input = False
            if fd == self._entry.output:
                self.write(_END_OF_INPUT)  # a terminal has a character for it
            else:
                self._entry.close_input()

    def _stop_watching(self) -> None:
        for fd in (self._entry.output, self._entry.input):
            if fd is not None:
                self._loop.remove(fd)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _step_failed(evidence: str) -> CompartmentRefusal:
    return CompartmentRefusal(
        "step-failed", "the program's start was cut short", evidence=evidence, remedy="try again"
    )
