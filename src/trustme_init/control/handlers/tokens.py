# SPDX-License-Identifier: Apache-2.0
"""The device's token: what wraps the keys of containers. A PIN comes with its request and is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trustme_init.control.handlers.ask import ask, failure
from trustme_init.control.handlers.reply import Context, Replies, response
from trustme_init.errors import Refusal
from trustme_init.proto.control_pb2 import DaemonToController, TokenStatus

Code = DaemonToController
LOCKED: Final = frozenset({"token-locked", "token-attempts-damaged"})
"""Refusals of a token that takes no PIN any more; the protocol's word for it is older than our counting."""


def status(context: Context) -> Replies:
    """GET_TOKEN_STATUS."""
    yield from _answered(context, "token-status")


def create(context: Context) -> Replies:
    """CREATE_TOKEN, with `device_newpin`."""
    yield from _answered(context, "token-create", pin=context.request.device_newpin)


def unlock(context: Context) -> Replies:
    """UNLOCK_TOKEN, with `device_pin`: whether the PIN is right; nothing stays unlocked."""
    yield from _answered(context, "token-unlock", pin=context.request.device_pin)


def replace(context: Context) -> Replies:
    """REPLACE_TOKEN, with `token_file` and the `device_pin` that opens it."""
    yield from _answered(
        context, "token-replace", token=context.request.token_file, pin=context.request.device_pin
    )


def remove(context: Context) -> Replies:
    """REMOVE_TOKEN."""
    yield from _answered(context, "token-remove")


def change_device_pin(context: Context) -> Replies:
    """CHANGE_DEVICE_PIN of the device's own token."""
    _, refusal = yield from ask(
        context,
        "token-change-pin",
        pin=context.request.device_pin,
        new_pin=context.request.device_newpin,
    )
    if refusal is None:
        yield response(Code.CONTAINER_CHANGE_PIN_SUCCESSFUL)
    else:
        yield failure(refusal, _code(refusal, Code.CONTAINER_CHANGE_PIN_FAILED))


def _answered(context: Context, operation: str, **arguments: str | bytes) -> Replies:
    result, refusal = yield from ask(context, operation, **arguments)
    if refusal is not None:
        yield failure(refusal, _code(refusal, Code.CMD_FAILED))
    else:
        yield DaemonToController(code=Code.TOKEN_STATUS, token=_token(result))


def _token(result: Mapping[str, Any]) -> TokenStatus:
    return TokenStatus(
        kind=result["kind"],
        certificate_sha256=result["certificate_sha256"] or None,
        tries_left=result["tries_left"],
        default_pin=result["default_pin"],
        kdf_rounds=result["rounds"] or None,
    )


def _code(refusal: Refusal, otherwise: Code.Response.ValueType) -> Code.Response.ValueType:
    return Code.CONTAINER_LOCKED_TILL_REBOOT if refusal.code in LOCKED else otherwise
