# SPDX-License-Identifier: Apache-2.0
"""Running commands over a serial console, with a real shell behind a unix socket."""

from __future__ import annotations

import os
import pty
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trustme_tools.errors import ToolError
from trustme_tools.machine.console import Terminal, plain


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A shell on a pseudo terminal that echoes, as on the device."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "console"))
    listener.listen()
    master, slave = pty.openpty()
    child = os.posix_spawn(
        "/bin/sh",
        ["sh", "-i"],
        {"PS1": "core:~# ", "PATH": os.environ["PATH"]},
        file_actions=[(os.POSIX_SPAWN_DUP2, slave, number) for number in (0, 1, 2)],
        setsid=True,
    )
    os.close(slave)
    attached = Terminal(tmp_path / "console", lambda: True)
    connection, _ = listener.accept()

    def to_socket() -> None:
        try:
            while data := os.read(master, 4096):
                connection.sendall(data)
        except OSError:
            return

    def to_shell() -> None:
        try:
            while data := connection.recv(4096):
                os.write(master, data)
        except OSError:
            return

    threads = [threading.Thread(target=work, daemon=True) for work in (to_socket, to_shell)]
    for thread in threads:
        thread.start()
    yield attached
    attached.close()
    os.kill(child, 9)
    os.waitpid(child, 0)
    for thread in threads:
        thread.join(5)
    connection.close()
    listener.close()
    os.close(master)


def test_output_and_exit_code_come_back(terminal: Terminal) -> None:
    assert terminal.run("echo one; echo two >&2; (exit 3)", 10) == (3, "one\ntwo\n")
    assert terminal.run("true", 10) == (0, "")
    assert terminal.run("printf 'no newline'", 10) == (0, "no newline")


def test_the_echo_is_not_taken_for_the_answer(terminal: Terminal) -> None:
    answer = terminal.run("cat <<'X'\n{ echo }\nX", 10)
    assert answer == (0, "{ echo }\n")


def test_a_command_that_does_not_end_is_an_error(terminal: Terminal) -> None:
    with pytest.raises(ToolError) as caught:
        terminal.run("sleep 1", 0.3)
    assert caught.value.code == "no-answer"


def test_control_sequences_are_no_text() -> None:
    assert plain("\x1b[2J\x1b[01;01Hab\r\n\x1b[?25lc") == "ab\nc"
