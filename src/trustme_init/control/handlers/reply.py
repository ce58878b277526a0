# SPDX-License-Identifier: Apache-2.0
"""What handlers are made of: their type, what they are given, and the replies they share."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from trustme_init.control.state import DeviceState
from trustme_init.control.transport import Flush, Wait
from trustme_init.errors import Refusal
from trustme_init.proto.control_pb2 import ControllerToDaemon, DaemonToController


@dataclass(frozen=True, slots=True)
class Converse:
    """What `transport.Listen` is, with requests: `accept` is asked about those that the gate allows."""

    start: Callable[[Callable[[], None]], None]
    accept: Callable[[ControllerToDaemon], bool]


Replies = Generator[DaemonToController | Flush | Wait | Converse, None, None]


@dataclass(frozen=True, slots=True)
class Context:
    """One request's surroundings."""

    state: DeviceState
    request: ControllerToDaemon
    later: Callable[[DaemonToController], bool]
    """Sends a message after the answer has ended (an installation's outcome); False: nobody hears it."""
    peer: Callable[[], int]
    """Returns a pidfd of the process that connected, to be closed; ControlRefusal("caller-gone")."""


Handler = Callable[[Context], Replies]
"""A generator function. A Refusal or any other exception becomes CMD_FAILED.

What must happen after the reply is written follows a yielded FLUSH; what must happen even if the client
leaves first stands in a `finally`.
"""


def response(code: DaemonToController.Response.ValueType) -> DaemonToController:
    """Return a RESPONSE."""
    return DaemonToController(code=DaemonToController.RESPONSE, response=code)


def refused(refusal: Refusal, code: DaemonToController.Response.ValueType) -> DaemonToController:
    """Return a RESPONSE that says why, to those who can read it."""
    reply = response(code)
    reply.refusal.code = refusal.code
    reply.refusal.cause = refusal.cause
    if refusal.evidence:
        reply.refusal.evidence = refusal.evidence
    if refusal.remedy:
        reply.refusal.remedy = refusal.remedy
    return reply


def named_uuid(request: ControllerToDaemon) -> str | None:
    """Return the one UUID of a container command, None when there is not exactly one (or it is not text)."""
    uuids = request.container_uuids
    if len(uuids) != 1 or not isinstance(uuids[0], str):
        return None
    return uuids[0]
