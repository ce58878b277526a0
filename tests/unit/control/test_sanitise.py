# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.control.sanitise import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢", "plain ü 漢"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc", "a\\x0ab\\x09c"),
        ("\x9b31m", "\\x9b31m"),
        ("x\u202ey\u2028z", "x\\u202ey\\u2028z"),
        ("\U000e0001", "\\U000e0001"),
        (b"\xff\x1b", "\\xff\\x1b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_row27_foreign_text_is_made_visible(text: str | bytes, shown: str) -> None:
    assert visible(text) == shown


def test_row27_kept_characters() -> None:
    assert visible("a\n\tb\r", keep="\n\t") == "a\n\tb\\x0d"


@given(st.one_of(st.text(), st.binary()))
def test_row27_the_result_is_always_printable(text: str | bytes) -> None:
    assert visible(text).isprintable()
