# SPDX-License-Identifier: Apache-2.0
"""Protobuf's text format, read strictly: for texts whose signature was verified, and no others."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.message import Message


def parse(text: bytes, message: Message) -> None:
    """Fill an empty `message`; required fields may be missing, as in texts for the original's parser.

    ValueError, its text printable ASCII, for anything else than the one reading that there is.
    """
    from google.protobuf import text_format

    try:
        with warnings.catch_warnings():
            # The parser only warns of an escape sequence that there is none of; it is malformed all the same.
            warnings.simplefilter("error")
            text_format.Parse(text.decode(), message)
    except (text_format.ParseError, ValueError, RecursionError, Warning) as exc:
        raise ValueError(ascii(str(exc))[1:-1]) from exc
