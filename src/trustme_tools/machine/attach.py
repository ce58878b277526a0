# SPDX-License-Identifier: Apache-2.0
"""Give a person's terminal to the core container's console."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ESCAPE: Final = b"\x1d"
"""Ctrl-]: leaves the console, as in telnet."""
_CHUNK: Final = 65536
_LOOK_AGAIN: Final = 0.5


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def attach(path: Path, alive: Callable[[], bool]) -> None:
    """Connect stdin and stdout (a terminal) to the console until Ctrl-] or the machine's end."""
    standard_input, standard_output = sys.stdin.fileno(), sys.stdout.fileno()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console, selectors.DefaultSelector() as waiting:
        console.connect(str(path))
        waiting.register(console, selectors.EVENT_READ)
        waiting.register(standard_input, selectors.EVENT_READ)
        with _raw(standard_input):
            # Whatever the console showed before is gone: an empty line brings the prompt back.
            console.sendall(b"\r")
            while alive():
                for key, _ in waiting.select(_LOOK_AGAIN):
                    if key.fileobj is console:
                        data = console.recv(_CHUNK)
                        if not data:
                            return
                        os.write(standard_output, data)
                    else:
                        typed = os.read(standard_input, _CHUNK)
                        if not typed or ESCAPE in typed:
                            return
                        console.sendall(typed)
