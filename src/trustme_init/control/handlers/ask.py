# SPDX-License-Identifier: Apache-2.0
"""How a handler has something done by the vault: it waits, its connection waits, nothing else does."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from trustme_init.control.handlers.reply import Context, refused, response
from trustme_init.control.transport import Wait
from trustme_init.errors import Refusal
from trustme_init.proto.control_pb2 import DaemonToController

CLOSED = "provisioning-closed"
"""The vault's word for an operation that ended with provisioning; on the wire it is CMD_UNSUPPORTED."""


def ask(
    context: Context, operation: str, **arguments: str | bytes
) -> Generator[Wait, None, tuple[Mapping[str, Any], Refusal | None]]:
    """Have `operation` done; return its result, and why there is none."""
    answered: list[tuple[Mapping[str, Any], Refusal | None]] = []

    def start(resume: Any) -> None:
        def done(result: Mapping[str, Any], refusal: Refusal | None) -> None:
            answered.append((result, refusal))
            resume()

        context.state.vault(operation, arguments, done)

    yield Wait(start)
    return answered[0]


def failure(refusal: Refusal, code: DaemonToController.Response.ValueType) -> DaemonToController:
    """Return the reply to what was refused: `code`, unless provisioning is simply over."""
    if refusal.code == CLOSED:
        return response(DaemonToController.CMD_UNSUPPORTED)
    return refused(refusal, code)
