# SPDX-License-Identifier: Apache-2.0
"""`control run`: a program in a container, with this command's own input and output as if it ran here."""

from __future__ import annotations

import argparse
import codecs
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from trustme_init.control.cli.session import LocalProblem, Session
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply

_STDIN: Final = 0
_CHUNK: Final = 16 * 1024
_SIGNALLED: Final = 128


def run(session: Session, options: argparse.Namespace) -> int:
    """CONTAINER_EXEC_CMD; returns the program's exit status, 128 and the signal's number if one ended it."""
    words: list[str] = options.words
    terminal = words[:1] != ["nopty"]
    words = words if terminal else words[1:]
    if not words:
        raise LocalProblem("no command to run")
    uuid = session.uuid_of(options.container)
    session.client.send(
        Request(
            command=Request.CONTAINER_EXEC_CMD,
            container_uuids=[uuid],
            exec_command=words[0],
            exec_args=words,
            exec_pty=terminal,
        )
    )
    with _raw(terminal):
        reply = _converse(session, uuid)
    if reply.code != Reply.EXEC_END:
        return session.show(reply)
    status: int = reply.exec_status
    return status if status >= 0 else _SIGNALLED - status


def _converse(session: Session, uuid: str) -> Reply:
    """Pass input and output on until the program has ended; return the reply that says so."""
    client = session.client
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    poll = select.poll()
    poll.register(client.fileno(), select.POLLIN)
    poll.register(_STDIN, select.POLLIN)
    while True:
        ready = {client.fileno()} if client.buffered else {fd for fd, _ in poll.poll()}
        if client.fileno() in ready:
            reply = client.receive()
            if reply.code != Reply.EXEC_OUTPUT:
                return reply
            # The program's own bytes, on purpose: whoever runs it wants its terminal output.
            sys.stdout.buffer.write(reply.exec_output)
            sys.stdout.buffer.flush()
        if _STDIN in ready:
            data = os.read(_STDIN, _CHUNK)
            text = decoder.decode(data, final=not data)
            # An empty one is the end of input; a part of a character is not, it waits for the rest.
            for part in [text] * bool(text) + [""] * (not data):
                client.send(
                    Request(command=Request.CONTAINER_EXEC_INPUT, container_uuids=[uuid], exec_input=part)
                )
            if not data:
                poll.unregister(_STDIN)


@contextmanager
def _raw(wanted: bool) -> Iterator[None]:  # noqa: FBT001 - read by its name at the one place of the call
    """Leave this terminal's keys to the program's, for as long as it runs."""
    if not wanted or not os.isatty(_STDIN):
        yield
        return
    before = termios.tcgetattr(_STDIN)
    tty.setraw(_STDIN, termios.TCSADRAIN)  # what was typed ahead is the program's, too
    try:
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)
