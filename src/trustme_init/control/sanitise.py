# SPDX-License-Identifier: Apache-2.0
"""Foreign text made safe to show: names, log lines and error texts that a container had a hand in.

Terminal escapes, forged line breaks, bidirectional overrides and invisible characters come out as visible
backslash escapes (threat row 27).
"""

from __future__ import annotations


def visible(text: str | bytes, *, keep: str = "") -> str:
    """Return `text` with every unprintable character but those in `keep` escaped.

    protobuf hands out `bytes` for a string field that is not UTF-8, so both are taken.
    """
    if isinstance(text, bytes):
        text = text.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
