# SPDX-License-Identifier: Apache-2.0
"""Keys, anchors and token in operation: changed by signed statements (`provisioning.lifecycle`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trustme_init.control.handlers.ask import ask, failure
from trustme_init.control.handlers.reply import Context, Replies
from trustme_init.control.handlers.tokens import LOCKED
from trustme_init.errors import Refusal
from trustme_init.proto.control_pb2 import DaemonToController, LifecycleStatus

Code = DaemonToController


def apply(context: Context) -> Replies:
    """APPLY_STATEMENT: the three parts of a statement, and with "replace-token" the file and its password."""
    request = context.request
    result, refusal = yield from ask(
        context,
        "apply-statement",
        statement=request.statement,
        signature=request.statement_signature,
        certificate=request.statement_certificate,
        token=request.token_file,
        pin=request.device_pin,
    )
    if refusal is None:
        yield _status(result)
    else:
        locked = refusal.code in LOCKED
        yield failure(refusal, Code.CONTAINER_LOCKED_TILL_REBOOT if locked else Code.CMD_FAILED)


def status(context: Context) -> Replies:
    """GET_LIFECYCLE_STATUS; the request for the next key's certificate comes with it, as often as asked."""
    result, refusal = yield from ask(context, "lifecycle-status")
    yield _status(result) if refusal is None else failure(refusal, Code.CMD_FAILED)


def _status(result: Mapping[str, Any]) -> DaemonToController:
    reply = DaemonToController(
        code=Code.LIFECYCLE_STATUS,
        lifecycle=LifecycleStatus(
            last_serial=result["last_serial"],
            applied=result["applied"],
            in_tpm=result["in_tpm"],
            next_key_sha256=result["next_key_sha256"] or None,
        ),
        device_csr=result["csr"].encode() or None,
        device_key_certification=result["certification"].encode() or None,
    )
    if result["problem"] is not None:
        problem = result["problem"]
        said = Refusal(
            problem["code"], problem["cause"], evidence=problem["evidence"], remedy=problem["remedy"]
        )
        reply.refusal.CopyFrom(failure(said, Code.CMD_FAILED).refusal)
    return reply
