# SPDX-License-Identifier: Apache-2.0
"""The control socket of one container: frames in, gated commands, frames out."""

from __future__ import annotations

from pathlib import Path

from trustme_init.control.dispatch import Dispatcher
from trustme_init.control.gate import Socket
from trustme_init.control.loop import Loop
from trustme_init.control.throttle import Log
from trustme_init.control.transport import Answer, Connection, FrameServer, Limits

CONTROL_LIMITS = Limits()


class ControlServer(FrameServer):
    """Serves `dispatcher` at `path`, mode 0600, to processes of `uid` (and of root).

    `privileged` is the core container's socket; another container's is not. ControlRefusal
    ("socket-unavailable") when the socket cannot be made.
    """

    def __init__(
        self,
        loop: Loop,
        path: Path,
        dispatcher: Dispatcher,
        *,
        uid: int,
        gid: int,
        privileged: bool,
        log: Log,
        limits: Limits = CONTROL_LIMITS,
    ) -> None:
        self._dispatcher = dispatcher
        self._kind = Socket.PRIVILEGED if privileged else Socket.UNPRIVILEGED
        super().__init__(loop, path, uid=uid, gid=gid, limits=limits, log=log)

    def respond(self, connection: Connection, body: bytes) -> Answer:
        """Answer as the gate and the handlers say."""
        return self._dispatcher.answer(body, self._kind, connection.push, connection.peer)
