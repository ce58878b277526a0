# SPDX-License-Identifier: Apache-2.0
"""What an operation of the vault is given and returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trustme_init.errors import ControlRefusal

Arguments = Mapping[str, str | bytes]
Result = dict[str, Any]


def text(arguments: Arguments, name: str) -> str:
    """Return a text; ControlRefusal("argument-missing") if there is none."""
    value = arguments.get(name)
    if not isinstance(value, str):
        raise _missing(name)
    return value


def octets(arguments: Arguments, name: str) -> bytes:
    """Return bytes; ControlRefusal("argument-missing") if there are none."""
    value = arguments.get(name)
    if not isinstance(value, bytes):
        raise _missing(name)
    return value


def _missing(name: str) -> ControlRefusal:
    return ControlRefusal(
        "argument-missing", "the request lacks what it is about", evidence=name, remedy="send it"
    )
