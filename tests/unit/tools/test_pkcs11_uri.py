# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_tools.cli.options import key_place
from trustme_tools.errors import UsageError
from trustme_tools.guestos import pkcs11


def test_a_uri_is_taken_apart() -> None:
    uri = pkcs11.parse(
        "pkcs11:token=My%20token;serial=0a;object=k%C3%A9y;id=%01%ff?module-path=/m.so&pin-source=file:///run/pin"
    )
    assert uri.token == {"token": b"My token", "serial": b"0a"}
    assert (uri.label, uri.identifier) == ("kéy".encode(), b"\x01\xff")
    assert (uri.module, uri.pin_source) == ("/m.so", Path("/run/pin"))
    assert "pin-source" not in uri.text


def test_without_a_module_the_host_says_which() -> None:
    assert pkcs11.parse("pkcs11:object=a").module == pkcs11.DEFAULT_MODULE


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("pkcs11:", "object= or id="),
        ("pkcs11:token=a", "object= or id="),
        ("pkcs11:object=a;object=b", "object"),
        ("pkcs11:object", "object"),
        ("pkcs11:object=a;type=public", "type"),
        ("pkcs11:object=a;slot-id=3", "slot-id"),
        ("pkcs11:object=a?module-name=x", "module-name"),
        ("pkcs11:object=a?pin-source=|cat%20/pin", "pin-source"),
        ("pkcs11:object=a?pin-source=pin", "pin-source"),
        ("pkcs11:object=a?module-path=", "module-path"),
        ("pkcs11:object=a?module-path=%ff", "module-path"),
    ],
)
def test_what_is_not_understood_in_full_is_refused(uri: str, named: str) -> None:
    with pytest.raises(UsageError) as refused:
        pkcs11.parse(uri)
    assert refused.value.code == "bad-pkcs11-uri"
    assert named in refused.value.evidence


def test_a_pin_in_the_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as refused:
        pkcs11.parse("pkcs11:object=a?pin-value=canary1234")
    assert refused.value.code == "pin-in-uri"
    assert "canary" not in str(refused.value.as_dict())


@given(st.text(max_size=80))
def test_any_text_is_a_uri_or_refused(text: str) -> None:
    with suppress(UsageError):  # and nothing else
        pkcs11.parse(f"pkcs11:{text}")


def test_key_is_a_path_or_a_uri_as_it_is() -> None:
    assert key_place("keys/a.key") == Path("keys/a.key")
    assert key_place("pkcs11:object=a?module-path=//x//y") == "pkcs11:object=a?module-path=//x//y"
