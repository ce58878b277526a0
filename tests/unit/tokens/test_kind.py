# SPDX-License-Identifier: Apache-2.0
"""What holds for every kind of token, without a TPM: `tests/integration/test_tokens_tpm.py` has one."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.tokens import kit
from trustme_init.errors import DeviceRefusal, TokenRefusal
from trustme_init.tokens import kind, wrapping
from trustme_init.tokens.pkcs11_token import Hardware, Pkcs11Token
from trustme_init.tokens.place import PKCS11, SOFTTOKEN, TOKEN_FILES, TPM
from trustme_init.tokens.softtoken import PublicKey
from trustme_init.tokens.store import TokenStore
from trustme_init.tokens.tpm_token import TpmToken, authorisation

KEY = bytes(range(96))
CONTEXT = b"container"
SALT = bytes(range(32))
NOWHERE = "swtpm:path=/nobody/here"
HARDWARE = Hardware(Path("/nobody/here.so"), "label")


def code(action: Callable[[], object]) -> str:
    with pytest.raises(TokenRefusal) as caught:
        action()
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value.code


def test_the_files_say_which_kind_it_is(tmp_path: Path) -> None:
    assert kind.kind_in(tmp_path / "none") is None
    assert kind.kind_in(tmp_path) is None
    for name, made in ((SOFTTOKEN, TokenStore), (TPM, TpmToken), (PKCS11, Pkcs11Token)):
        directory = tmp_path / name
        directory.mkdir()
        (directory / TOKEN_FILES[name]).touch()
        assert kind.kind_in(directory) == name
        assert isinstance(kind.token(name, directory, 5, tcti=NOWHERE, hardware=HARDWARE), made)
        (directory / TOKEN_FILES[name]).unlink()
        (directory / TOKEN_FILES[name]).symlink_to("/dangling")
        assert kind.kind_in(directory) == name


def test_two_tokens_in_one_place_are_refused(tmp_path: Path) -> None:
    for name in TOKEN_FILES.values():
        (tmp_path / name).touch()
    assert code(lambda: kind.kind_in(tmp_path)) == "token-ambiguous"


def test_no_second_token_is_made_beside_another(tmp_path: Path) -> None:
    (tmp_path / TOKEN_FILES[TPM]).touch()
    store = TokenStore(tmp_path, 5)
    assert code(lambda: store.create(kit.PIN, common_name="x", now=kit.NOW)) == "token-already-there"
    assert code(lambda: store.replace(b"", kit.PIN)) == "token-already-there"
    (tmp_path / TOKEN_FILES[TPM]).unlink()
    (tmp_path / TOKEN_FILES[SOFTTOKEN]).touch()
    assert code(lambda: TpmToken(tmp_path, 5, NOWHERE).create(kit.PIN)) == "token-already-there"
    assert [each.name for each in tmp_path.iterdir()] == [TOKEN_FILES[SOFTTOKEN]]


@pytest.mark.parametrize(("name", "expected"), [(TPM, "tpm-missing"), (PKCS11, "pkcs11-not-allowed")])
def test_a_kind_that_the_machine_does_not_have(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(DeviceRefusal) as caught:
        kind.token(name, tmp_path, 5, tcti=None, hardware=None)
    assert caught.value.code == expected
    with pytest.raises(ValueError, match="smoke"):
        kind.token("smoke", tmp_path, 5, tcti=NOWHERE, hardware=HARDWARE)


def test_rewrapping_keeps_the_key_and_its_purpose() -> None:
    source, target = kit.token(), kit.token(kit.rsa_key())
    blob = wrapping.wrap(source.public_key, KEY, context=CONTEXT)
    fresh = kind.rewrap(blob, source, target, context=CONTEXT)
    assert wrapping.unwrap(target, fresh, context=CONTEXT) == KEY
    assert code(lambda: wrapping.unwrap(source, fresh, context=CONTEXT)) == "wrapped-key-damaged"
    assert code(lambda: wrapping.unwrap(target, fresh, context=b"another")) == "wrapped-key-damaged"
    assert code(lambda: kind.rewrap(blob, source, target, context=b"another")) == "wrapped-key-damaged"
    assert code(lambda: kind.rewrap(blob, target, source, context=CONTEXT)) == "wrapped-key-damaged"


class Liar:
    """A token that shows another's public key: what is wrapped for it, it cannot unwrap."""

    def __init__(self) -> None:
        self._own = kit.token()
        self._shown = kit.token()

    @property
    def public_key(self) -> PublicKey:
        return self._shown.public_key

    def decrypt(self, encapsulated: bytes) -> bytes:
        return self._own.decrypt(encapsulated)

    def agree(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        return self._own.agree(peer)


def test_a_token_that_cannot_unwrap_takes_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = kit.token()
    blob = wrapping.wrap(source.public_key, KEY, context=CONTEXT)
    assert code(lambda: kind.rewrap(blob, source, Liar(), context=CONTEXT)) == "wrapped-key-damaged"
    given_back = iter((KEY, bytes(96)))
    monkeypatch.setattr(wrapping, "unwrap", lambda *_, **__: next(given_back))
    assert code(lambda: kind.rewrap(blob, source, kit.token(), context=CONTEXT)) == "rewrap-failed"


def test_a_key_of_another_kind_opens_nothing() -> None:
    rsa_token, ec_token = kit.token(kit.rsa_key()), kit.token()
    peer = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(ValueError, match="EC"):
        rsa_token.agree(peer)
    with pytest.raises(ValueError, match="RSA"):
        ec_token.decrypt(bytes(256))


def test_the_authorisation_is_what_it_was() -> None:
    """HKDF-SHA-256 (RFC 5869), reckoned by `openssl kdf`; another value would lock every token out."""
    expected = "d4bb3f81bc6a641ad8d3a5fdd0bf8dfeb321b5d7713536ddef6e7e8ddc9081e3"
    assert authorisation("1234", SALT).hex() == expected


PINS = (
    "1234",
    "1235",
    "",
    "12345",
    "\uff11\uff12\uff13\uff14",
    chr(0xD800),
    chr(0xD801),
    "\u00e9",
    "e\u0301",
)


def test_another_pin_is_another_authorisation() -> None:
    values = [authorisation(pin, salt) for pin in PINS for salt in (SALT, bytes(32))]
    assert len(set(values)) == 2 * len(PINS)
    assert {len(value) for value in values} == {32}


GOOD: dict[str, Any] = {
    "kind": "trustme.tpm-token",
    "version": 1,
    "salt": base64.b64encode(SALT).decode(),
    "public": "AAAA",
    "private": "AAAA",
    "default_pin": True,
}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"[" * 2000,
        b"\xff",
        *(json.dumps({name: GOOD[name] for name in GOOD if name != missing}).encode() for missing in GOOD),
        *(
            json.dumps(GOOD | change).encode()
            for change in (
                {"kind": "trustme.tpm-authorisations"},
                {"version": 2},
                {"salt": "AAAA"},
                {"salt": 7},
                {"public": "*"},
                {"private": "é"},
                {"private": None},
                {"default_pin": 1},
            )
        ),
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_tried(tmp_path: Path, text: bytes) -> None:
    (tmp_path / TOKEN_FILES[TPM]).write_bytes(text)
    token = TpmToken(tmp_path, 5, NOWHERE)
    assert code(lambda: token.open("1234").__enter__()) == "token-malformed"
    assert code(lambda: token.change_pin("1234", "5678")) == "token-malformed"
    # There is no count, which locks; the file's own fault comes second.
    assert token.status().fault == "token-attempts-damaged"
    assert token.status().kind == TPM
    assert token.status().default_pin is None


def test_what_is_known_without_the_tpm(tmp_path: Path) -> None:
    token = TpmToken(tmp_path, 5, NOWHERE)
    assert token.status().kind == "none"
    assert token.status().tries_left == 5
    assert code(lambda: token.open("1234").__enter__()) == "token-missing"
    (tmp_path / TOKEN_FILES[TPM]).write_text(json.dumps(GOOD))
    (tmp_path / "attempts.json").write_text('{"version": 1, "failed": 2}')
    status = token.status()
    assert (status.kind, status.tries_left, status.default_pin, status.fault) == (TPM, 3, True, None)
    token.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_too_large_or_none_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / TOKEN_FILES[TPM]
    path.write_bytes(bytes(4097))
    assert TpmToken(tmp_path, 5, NOWHERE).status().fault == "token-attempts-damaged"
    assert code(lambda: TpmToken(tmp_path, 5, NOWHERE).open("1234").__enter__()) == "token-unreadable"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert code(lambda: TpmToken(tmp_path, 5, NOWHERE).open("1234").__enter__()) == "token-unreadable"


@pytest.mark.parametrize("pin", ["", "x" * 129, "a\nb"])
def test_what_cannot_be_a_pin_is_not_set(tmp_path: Path, pin: str) -> None:
    assert code(lambda: TpmToken(tmp_path, 5, NOWHERE).create(pin)) == "token-bad-pin"
    assert code(lambda: TpmToken(tmp_path, 5, NOWHERE).change_pin("old", pin)) == "token-bad-pin"
