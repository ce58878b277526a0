# SPDX-License-Identifier: Apache-2.0
"""GET_LAST_LOG: every log in fragments, each log's last one marked, then CMD_OK."""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Iterator
from typing import BinaryIO, Final

from trustme_init.control.framing import MIB
from trustme_init.control.handlers.reply import Context, Replies, response
from trustme_init.control.state import LogFile
from trustme_init.control.transport import FLUSH
from trustme_init.proto.control_pb2 import DaemonToController, LogMessage

FRAGMENT: Final = 32 * 1024
"""Bytes of log per message: a frame then fits a socket buffer whole, which original clients need, also when
every byte was invalid and has become a three-byte U+FFFD."""
LOG_LIMIT: Final = 64 * MIB
"""Bytes of one log that are sent, its newest; no honest log is as long. A container holds its own log open
for writing and can make it as long as a file can be, which takes no space: an answer would never end."""


def last_log(context: Context) -> Replies:
    """Send all logs as they are now; remove them, when asked, once the client's socket has taken them."""
    logs = context.state.logs()
    for log in logs:
        yield from _messages(log)
    yield FLUSH
    if context.request.remove_logs:
        context.state.remove_logs([log.name for log in logs])
    yield response(DaemonToController.CMD_OK)


def _messages(log: LogFile) -> Replies:
    held = ""
    for index, text in enumerate(_fragments(log)):
        if index:
            yield _message(DaemonToController.LOG_MESSAGE_FRAGMENT, log.name, held)
        held = text
    yield _message(DaemonToController.LOG_MESSAGE_FINAL, log.name, held)


def _message(code: DaemonToController.Code.ValueType, name: str, text: str) -> DaemonToController:
    return DaemonToController(code=code, log_message=LogMessage(name=name, msg=text))


def _fragments(log: LogFile) -> Iterator[str]:
    """Yield the text in pieces. What is written to the file meanwhile is left for the next time."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with _open(log) as file:
        size = file.seek(0, io.SEEK_END)
        left = min(size, LOG_LIMIT)
        file.seek(size - left)
        while left > 0:
            data = file.read(min(FRAGMENT, left))
            left = left - len(data) if data else 0
            # A C client ends a string at NUL and would lose the rest.
            yield decoder.decode(data, final=left == 0).replace("\0", "�")


def _open(log: LogFile) -> BinaryIO:
    if isinstance(log.source, bytes):
        return io.BytesIO(log.source)
    return os.fdopen(os.open(log.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
