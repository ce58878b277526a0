# SPDX-License-Identifier: Apache-2.0
"""`control` over the core container's console: a terminal with a shell, for a device without a network.

Rules:
- The shell is only used to start `remote` in the device's Python, with the terminal raw and without echo. So
  a secret that follows is neither echoed nor kept in the shell's history.
- What comes before that program says that it is there is not believed to be anything. It is said with a mark
  that stands in two halves where it is typed, so that the echo cannot be taken for it.
- Each line that is sent is answered before the next one, however small the buffers on the way are.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Sequence
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.machine.console import Terminal
from trustme_tools.provision import remote
from trustme_tools.provision.transport import (
    GRACE,
    Output,
    Word,
    answered,
    new_mark,
    output,
    request,
    source,
    unreachable,
)

ATTEMPTS: Final = 3
READY_TIME: Final = 20.0
"""Seconds until the device's Python has started; 2 under emulation on an idle host."""
LINE_TIME: Final = 15.0
_QUIET: Final = 0.2
_INTERRUPT: Final = "\x03\n"
"""Ends what a shell was in the middle of, and ends `remote` if an earlier session left it there."""


class ConsoleTransport:
    """`control` through the shell of a Terminal, which `connect` opens and this closes."""

    def __init__(self, connect: Callable[[], Terminal]) -> None:
        self._connect = connect
        self._terminal: Terminal | None = None
        self._mark = ""

    def control(self, words: Sequence[Word], *, stdin: bytes, timeout: float) -> Output:
        """See transport.Transport."""
        return self.run(["control"], words, stdin=stdin, timeout=timeout)

    def run(self, program: Sequence[str], words: Sequence[Word], *, stdin: bytes, timeout: float) -> Output:
        """Run any program of the core container; otherwise as `control`."""
        try:
            terminal = self._terminal or self._open()
            for line in remote.lines(request(program, words, stdin, timeout)):
                terminal.send(f"{line}\n")
                if line.startswith(remote.REQUEST):
                    terminal.expect(rf"^{self._mark}\.\n", LINE_TIME)
            return output(self._answer(terminal, timeout))
        except (ToolError, OSError) as exc:
            # Whatever the console is in the middle of: the next call begins anew.
            self.close()
            if isinstance(exc, ToolError) and exc.code != "no-answer":
                raise
            # Of the terminal's own evidence nothing is shown: it is all that the console ever said.
            raise unreachable("the core console does not answer") from None

    def close(self) -> None:
        """Give the console back to its shell."""
        if self._terminal is None:
            return
        try:
            self._terminal.send("\n")
        except OSError:
            pass
        finally:
            self._terminal.close()
            self._terminal = None

    def _open(self) -> Terminal:
        terminal = self._terminal = self._connect()
        for attempt in range(1, ATTEMPTS + 1):
            terminal.send(_INTERRUPT)
            terminal.drain(_QUIET * attempt)
            self._mark = new_mark()
            half = len(self._mark) // 2
            start = (
                f'import base64,sys;print("{self._mark[:half]}""{self._mark[half:]}!",flush=True);'
                "exec(base64.b64decode(sys.stdin.buffer.readline()))"
            )
            terminal.send(f"stty raw -echo; python3 -Ic '{start}'; stty sane\n")
            try:
                terminal.expect(rf"^{self._mark}!\n", READY_TIME)
            except ToolError:
                continue
            program = f"{source()}\nserve({self._mark!r})\n"
            terminal.send(f"{base64.b64encode(program.encode()).decode()}\n")
            return terminal
        raise unreachable("there is no shell on the core console")

    def _answer(self, terminal: Terminal, timeout: float) -> dict[str, object]:
        deadline = time.monotonic() + timeout + GRACE
        pieces: list[str] = []
        line = re.escape(self._mark) + rf"([{remote.REQUEST}{remote.END}])([0-9A-Za-z+/=]*)\n"
        while True:
            match = terminal.expect(f"^{line}", max(deadline - time.monotonic(), 0.1))
            if match[1] == remote.END:
                return answered(pieces, match[2])
            pieces.append(match[2])
