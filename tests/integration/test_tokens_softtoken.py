# SPDX-License-Identifier: Apache-2.0
"""The softtoken as bytes. What openssl makes of it and the other way round: tests/integration."""

from __future__ import annotations

import random
import time
import traceback

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from cryptography.hazmat.primitives.serialization import pkcs12 as library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.tokens import kit
from tests.unit.tokens.kit import CANARY, FEW, NOW, PIN
from trustme_init.errors import TokenRefusal
from trustme_init.tokens import der, pkcs12, softtoken
from trustme_init.tokens.softtoken import Token, needs_upgrade, open_token, reencode

ANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def refused(data: bytes, pin: str = PIN) -> TokenRefusal:
    with pytest.raises(TokenRefusal) as caught:
        open_token(data, pin)
    assert caught.value.remedy
    return caught.value


def by_library(made: Token, rounds: int) -> bytes:
    """Encode with the library alone: its MAC has 2048 rounds whatever one asks for."""
    encryption = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(rounds)
        .key_cert_algorithm(library.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(PIN.encode())
    )
    return library.serialize_key_and_certificates(b"x", made.private_key, made.certificate, None, encryption)


def test_a_new_token_opens_and_is_what_it_should_be() -> None:
    data = softtoken.create(PIN, common_name="4c4c4544-0051-3610-8052-b4c04f4a3232", now=NOW)
    opened = open_token(data, PIN)
    assert opened.private_key.key_size == 3072
    assert opened.certificate.public_key() == opened.private_key.public_key()
    assert (
        opened.certificate.subject.rfc4514_string() == "CN=4c4c4544-0051-3610-8052-b4c04f4a3232,O=trustme-py"
    )
    assert opened.certificate.not_valid_before_utc == NOW
    assert opened.rounds == 600_000
    assert not needs_upgrade(opened)
    assert refused(data, PIN.upper()).code == "token-wrong-pin"
    seen = softtoken.inspect(data)
    assert seen.certificates == (opened.certificate.public_bytes(Encoding.DER),)
    assert (seen.rounds, seen.weak_kdf) == (600_000, False)


def test_every_way_to_test_a_pin_costs_the_same() -> None:
    """What the library alone makes is cheap to guess by its MAC, so it counts as weak."""
    made = kit.token()
    derivations = pkcs12.parse(kit.encoded(made)).derivations
    assert {each.protects: each.rounds for each in derivations} == {"mac": 600_000, "key": 600_000}
    alone = by_library(made, softtoken.ROUNDS)
    assert min(each.rounds for each in pkcs12.parse(alone).derivations) == 2048
    opened = open_token(alone, PIN)
    assert opened.rounds == 2048
    assert needs_upgrade(opened)
    assert not needs_upgrade(open_token(reencode(opened, PIN), PIN))


@pytest.mark.parametrize("pin", ["1", "x" * 128, " ", "pässwörd", "密码", "🔑", "a'b\"c`$(d)"])
def test_pins_that_may_be_set(few_rounds: None, pin: str) -> None:
    data = kit.encoded(pin=pin)
    assert open_token(data, pin)
    assert refused(data, pin + "x").code == "token-wrong-pin"


@pytest.mark.parametrize("pin", ["", "x" * 129, "a\nb", "a\0b", "\x7f", "\ud800", "\u200b"])
def test_pins_that_may_not(few_rounds: None, pin: str) -> None:
    with pytest.raises(TokenRefusal) as caught:
        softtoken.create(pin, common_name="x", now=NOW)
    assert caught.value.code == "token-bad-pin"
    with pytest.raises(TokenRefusal) as caught:
        reencode(kit.token(), pin)
    assert caught.value.code == "token-bad-pin"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("pin", [f"{PIN}\0", f"{PIN}\0x", "\ud800", "\udc80" * 3, ""])
def test_what_cannot_be_a_pin_is_a_wrong_one(few_rounds: None, pin: str) -> None:
    assert refused(kit.encoded(), pin).code == "token-wrong-pin"


def test_an_empty_pin_of_old_opens(few_rounds: None) -> None:
    file = pkcs12.parse(kit.encoded(pin="x"))
    safes = (kit.key_safe(""), *file._open_safes)
    # Another key than the certificate's: the refusal shows that the empty PIN was right.
    safes = tuple(safe for safe in safes if safe != file.key_safe)
    data = pkcs12.assemble(safes, "", hash_name="sha256", rounds=FEW)
    assert refused(data, "").code == "token-no-key"
    assert refused(data, "x").code == "token-wrong-pin"


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=lambda curve: curve.name)
def test_ec_tokens(few_rounds: None, curve: ec.EllipticCurve) -> None:
    made = kit.token(ec.generate_private_key(curve))
    opened = open_token(kit.encoded(made), PIN)
    assert opened.certificate == made.certificate


def test_further_certificates_are_kept(few_rounds: None) -> None:
    made = kit.token()
    others = (kit.token().certificate, kit.token().certificate)
    first = kit.encoded(Token(made.certificate, made.private_key, 1, weak_kdf=True, others=others))
    second = reencode(open_token(first, PIN), "other")
    opened = open_token(second, "other")
    assert opened.certificate == made.certificate
    assert set(opened.others) == set(others)
    assert softtoken.inspect(second).certificates[0] == made.certificate.public_bytes(Encoding.DER)


def weak_keys() -> dict[str, object]:
    return {
        "rsa-1024": kit.rsa_key(1024),
        "secp521r1": ec.generate_private_key(ec.SECP521R1()),
        "secp256k1": ec.generate_private_key(ec.SECP256K1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "dsa": dsa.generate_private_key(2048),
    }


@pytest.mark.parametrize("kind", ["rsa-1024", "secp521r1", "secp256k1", "ed25519", "dsa"])
def test_weak_keys(kind: str) -> None:
    key = weak_keys()[kind]
    certificate = kit.certificate_for(kit.rsa_key())
    data = library.serialize_key_and_certificates(
        None,
        key,  # type: ignore[arg-type]
        None,
        [certificate],
        BestAvailableEncryption(PIN.encode()),
    )
    assert refused(data).code == "token-weak-key"
    assert refused(data, "x").code == "token-wrong-pin"


def test_no_key(few_rounds: None) -> None:
    certificate = kit.token().certificate
    data = library.serialize_key_and_certificates(
        None, None, certificate, None, BestAvailableEncryption(PIN.encode())
    )
    assert refused(data).code == "token-no-key"
    data = pkcs12.assemble((), PIN, hash_name="sha256", rounds=FEW)
    assert refused(data).code == "token-no-key"


def test_no_certificate(few_rounds: None) -> None:
    file = pkcs12.parse(kit.encoded())
    data = pkcs12.assemble((file.key_safe,), PIN, hash_name="sha256", rounds=FEW)
    refusal = refused(data)
    assert (refusal.code, refusal.evidence) == ("token-no-key", "0 certificates")


def test_certificate_of_another_key(few_rounds: None) -> None:
    file = pkcs12.parse(kit.encoded())
    other = kit.token().certificate.public_bytes(Encoding.DER)
    # Marked as belonging together: what counts is the key, not the mark.
    safes = (pkcs12.certificate_safe((other,), file.key_attributes), file.key_safe)
    refusal = refused(pkcs12.assemble(safes, PIN, hash_name="sha256", rounds=FEW))
    assert (refusal.code, refusal.evidence) == ("token-no-key", "1 certificates")


def test_no_rounds_no_mac_no_version(few_rounds: None) -> None:
    data = kit.encoded()
    pfx = der.Reader(data).enter(der.SEQUENCE)
    version, content, mac = pfx.raw(der.INTEGER), pfx.raw(der.SEQUENCE), pfx.raw(der.SEQUENCE)
    assert der.element(der.SEQUENCE, version, content, mac) == data
    assert refused(with_mac_rounds(data, 0)).code == "token-malformed"
    assert refused(der.element(der.SEQUENCE, version, content)).code == "token-malformed"
    assert refused(der.element(der.SEQUENCE, der.integer(2), content, mac)).code == "token-malformed"


def test_nothing_may_stand_beside_what_is_known(few_rounds: None) -> None:
    """One more element anywhere is refused by the form alone."""
    made = kit.token()
    file = pkcs12.parse(kit.encoded(made))
    safes = (*file._open_safes, kit.encrypted_safe(PIN, b""), kit.legacy_safe())
    data = pkcs12.assemble(safes, PIN, hash_name="sha256", rounds=FEW)
    certificate = made.certificate.public_bytes(Encoding.DER)
    tree = kit.Node.of(data, certificate)
    assert tree.encode() == data
    places = 0
    for inside in tree.everywhere():
        inside.append(kit.Node(der.NULL, b""))
        with pytest.raises(TokenRefusal) as caught:
            pkcs12.parse(tree.encode())
        assert caught.value.code == "token-malformed"
        inside.pop()
        places += 1
    assert places > 40  # the file's lists of elements
    assert pkcs12.parse(tree.encode())


@pytest.mark.parametrize(
    ("kind", "evidence"),
    [
        (1, "a private key is not encrypted"),
        (4, "something else"),
        (5, "something else"),
        (6, "something else"),
    ],
    ids=["key", "crl", "secret", "nested"],
)
def test_other_bags(few_rounds: None, kind: int, evidence: str) -> None:
    bag = der.element(
        der.SEQUENCE,
        der.element(der.OID, bytes.fromhex("2a864886f70d010c0a01") + bytes([kind])),
        der.element(der.EXPLICIT_0),
    )
    safes = (pkcs12._data(der.element(der.SEQUENCE, bag)), kit.key_safe(PIN))
    refusal = refused(pkcs12.assemble(safes, PIN, hash_name="sha256", rounds=FEW))
    assert refusal.code == "token-malformed"
    assert evidence in refusal.evidence


def test_encrypted_data_of_another_version(few_rounds: None) -> None:
    safes = (kit.key_safe(PIN), kit.encrypted_safe(PIN, b"", version=2))
    assert refused(pkcs12.assemble(safes, PIN, hash_name="sha256", rounds=FEW)).code == "token-malformed"


def test_two_keys_are_refused(few_rounds: None) -> None:
    file = pkcs12.parse(kit.encoded())
    safes = (*file._open_safes, kit.key_safe(PIN))
    assert refused(pkcs12.assemble(safes, PIN, hash_name="sha256", rounds=FEW)).code == "token-malformed"


def test_a_key_damaged_by_its_maker_gives_the_try_back(few_rounds: None) -> None:
    file = pkcs12.parse(kit.encoded())
    safes = (*(safe for safe in file._open_safes if safe != file.key_safe), kit.key_safe("other"))
    assert refused(pkcs12.assemble(safes, PIN, hash_name="sha256", rounds=FEW)).code == "token-malformed"


def test_size(few_rounds: None) -> None:
    data = kit.encoded()
    assert refused(data + bytes(softtoken.TOKEN_LIMIT - len(data))).code == "token-malformed"
    assert refused(data + bytes(softtoken.TOKEN_LIMIT + 1 - len(data))).code == "token-too-large"
    huge = kit.key_safe(PIN, contents=bytes(softtoken.KEY_LIMIT + 1))
    refusal = refused(pkcs12.assemble((huge,), PIN, hash_name="sha256", rounds=FEW))
    assert refusal.code == "token-too-large"
    assert "private key" in refusal.evidence


class TestIterationBombs:
    """Nothing is derived, so each is over at once; with a wrong PIN too."""

    @pytest.fixture(autouse=True)
    def _at_once(self) -> object:
        start = time.monotonic()
        yield
        assert time.monotonic() - start < 2

    def costly(self, data: bytes) -> None:
        for pin in (PIN, "x"):
            assert refused(data, pin).code == "token-kdf-too-costly"
        with pytest.raises(TokenRefusal) as caught:
            softtoken.inspect(data)
        assert caught.value.code == "token-kdf-too-costly"

    @pytest.mark.parametrize(
        "rounds", [4_000_001, 2**31 - 1, 2**63, 1 << 20_000], ids=["cap", "int", "long", "vast"]
    )
    def test_in_the_mac(self, few_rounds: None, rounds: int) -> None:
        data = pkcs12.assemble((kit.key_safe(PIN),), PIN, hash_name="sha256", rounds=FEW)
        self.costly(with_mac_rounds(data, rounds))

    def test_in_the_key(self, few_rounds: None) -> None:
        safe = kit.key_safe(PIN, claimed=2**31 - 1)
        self.costly(pkcs12.assemble((safe,), PIN, hash_name="sha256", rounds=FEW))

    def test_in_many_parts(self, few_rounds: None) -> None:
        parts = tuple(kit.encrypted_safe(PIN, b"", claimed=60_000) for _ in range(67))
        data = pkcs12.assemble((kit.key_safe(PIN), *parts), PIN, hash_name="sha256", rounds=FEW)
        self.costly(data)

    def test_in_a_key_hidden_in_an_encrypted_part(self, few_rounds: None) -> None:
        """It stands before the one in the open, and would be derived for first."""
        file = pkcs12.parse(kit.encoded())
        identifier, _ = kit.pbes2(PIN, FEW, claimed=40_000_000)
        bomb = kit.encrypted_safe(PIN, kit.shrouded_bag(identifier, bytes(160)))
        data = pkcs12.assemble((bomb, *file._open_safes), PIN, hash_name="sha256", rounds=FEW)
        assert open_token(data, PIN)

    def test_in_the_length_of_a_derived_key(self, few_rounds: None) -> None:
        tree = kit.Node.of(kit.key_safe(PIN), b"")
        (parameters,) = (
            inside for inside in tree.everywhere() if kit.Node(der.INTEGER, bytes([FEW])) in inside
        )
        parameters.insert(2, kit.Node(der.INTEGER, bytes([65])))
        longer = tree.encode()
        data = pkcs12.assemble((longer,), PIN, hash_name="sha256", rounds=FEW)
        refusal = refused(data)
        assert refusal.code == "token-malformed"
        assert "longer than any cipher" in refusal.evidence


def with_mac_rounds(data: bytes, rounds: int) -> bytes:
    """Replace the last integer of a PFX (of few rounds: three bytes)."""
    pfx = der.Reader(data).enter(der.SEQUENCE)
    version, content = pfx.raw(der.INTEGER), pfx.raw(der.SEQUENCE)
    mac = pfx.enter(der.SEQUENCE)
    digest, salt = mac.raw(der.SEQUENCE), mac.raw(der.OCTET_STRING)
    return der.element(
        der.SEQUENCE, version, content, der.element(der.SEQUENCE, digest, salt, der.integer(rounds))
    )


def test_truncated_anywhere(few_rounds: None) -> None:
    data = kit.encoded()
    for size in range(len(data)):
        assert refused(data[:size]).code == "token-malformed"


def test_every_byte_matters(few_rounds: None) -> None:
    data = kit.encoded()
    rng = random.Random(20)  # noqa: S311 - which bit, repeatably
    codes = set()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        codes.add(refused(bytes(changed)).code)
    assert codes <= {"token-wrong-pin", "token-malformed", "token-no-key", "token-kdf-too-costly"}
    assert {"token-wrong-pin", "token-malformed"} <= codes


@ANY
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert refused(data).code == "token-malformed"


@ANY
@given(data=st.data())
def test_any_change_is_refused_or_changes_nothing(few_rounds: None, data: st.DataObject) -> None:
    good = kit.encoded(SAMPLE)
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 8)))
    changed = good[:start] + data.draw(st.binary(max_size=8)) + good[end:]
    if changed == good:
        return
    assert refused(changed).code.startswith("token-")


SAMPLE = kit.token()


def test_row29_no_refusal_holds_the_pin(few_rounds: None) -> None:
    data = kit.encoded(pin=CANARY)
    texts = []
    rng = random.Random(29)  # noqa: S311 - repeatably
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        texts.append(_everything(refused(bytes(changed), CANARY)))
    texts.append(_everything(refused(data, f"{CANARY}\ud800")))
    texts.append(_everything(refused(data, f"{CANARY}\0")))
    with pytest.raises(TokenRefusal) as caught:
        softtoken.check_new_pin(f"{CANARY}\n")
    texts.append(_everything(caught.value))
    texts.append(repr(open_token(data, CANARY)))
    assert not any(CANARY in text for text in texts)


def _everything(refusal: TokenRefusal) -> str:
    return "".join(traceback.format_exception(refusal)) + repr(refusal) + repr(refusal.as_dict())


@pytest.mark.parametrize(
    ("hash_name", "factor", "weak"),
    [("sha1", 100, True), ("sha256", 1, True), ("sha256", 2, False), ("sha512", 1, False)],
)
def test_what_a_mac_must_cost(few_rounds: None, hash_name: str, factor: int, *, weak: bool) -> None:
    """PKCS#12's derivation hashes once a round, PBKDF2's HMAC twice; SHA-1 is never good enough."""
    file = pkcs12.parse(kit.encoded())
    data = pkcs12.assemble(file._open_safes, PIN, hash_name=hash_name, rounds=FEW * factor)
    assert needs_upgrade(open_token(data, PIN)) is weak
