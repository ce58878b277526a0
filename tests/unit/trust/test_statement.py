# SPDX-License-Identifier: Apache-2.0
"""Lifecycle statements: whatever an attacker may choose of one, a thing at a time, is refused by its name."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trust.pki import (
    CLIENT_AUTH,
    CODE_SIGNING,
    DAY,
    LEAF,
    NOW,
    ROOT,
    SUB,
    Issued,
    Wish,
    anchors,
    bundle,
    issue,
    usage,
)
from trustme_init.errors import TrustRefusal
from trustme_init.trust.anchors import AnchorSet, Purpose, Revocations
from trustme_init.trust.authority import judge_authority
from trustme_init.trust.certificate import LIFECYCLE_PURPOSE
from trustme_init.trust.chain import verify_chain
from trustme_init.trust.statement import (
    ACTIONS,
    SERIAL_LIMIT,
    STATEMENT_LIMIT,
    DeviceCertificateChange,
    RenewDeviceKey,
    ReplaceAuthority,
    ReplaceToken,
    RetireAuthority,
    SignedStatement,
    VerifiedStatement,
    parse_statement,
    verify_statement,
)

MINE = uuid.UUID("6f9619ff-8b86-4011-b42d-00cf4fc964ff")
OTHER = uuid.UUID("11111111-2222-4333-8444-555555555555")
SIGNER = Wish(
    "signer", key_usage=usage("digital_signature"), purpose=x509.ExtendedKeyUsage([LIFECYCLE_PURPOSE])
)
GUEST, DEVICE, LIFECYCLE = (issue(ROOT.but(subject=name)) for name in ("guest", "device", "lifecycle"))
OTHER_GUEST = issue(ROOT.but(subject="other guest"))
NEW = issue(ROOT.but(subject="new"))
SETS = (
    anchors(GUEST, OTHER_GUEST, purpose=Purpose.GUEST),
    anchors(DEVICE, purpose=Purpose.DEVICE),
    anchors(LIFECYCLE, purpose=Purpose.LIFECYCLE),
)
UNDER = {
    "guest": issue(SIGNER, GUEST),
    "device": issue(SIGNER, DEVICE),
    "lifecycle": issue(SIGNER, LIFECYCLE),
}


def sha256(issued: Issued) -> str:
    return hashlib.sha256(issued.der).hexdigest()


def document(action: str, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "trustme.lifecycle-statement",
        "version": 1,
        "device_uuid": str(MINE),
        "serial": 7,
        "action": action,
        **fields,
    }


DOCUMENTS = {
    "replace-guest": document(
        "replace-authority",
        purpose="guest",
        old_sha256=sha256(GUEST),
        certificate=NEW.pem.decode(),
        overlap=True,
    ),
    "replace-device": document(
        "replace-authority",
        purpose="device",
        old_sha256=sha256(DEVICE),
        certificate=NEW.pem.decode(),
        overlap=False,
    ),
    "retire-guest": document("retire-authority", purpose="guest", sha256=sha256(GUEST)),
    "retire-device": document("retire-authority", purpose="device", sha256=sha256(DEVICE)),
    "renew-device-key": document("renew-device-key"),
    "device-certificate": document("device-certificate", certificate="chain"),
    "replace-token": document("replace-token", token_sha256="ab" * 32),
}
SIGNERS = {name: "guest" if name.endswith("guest") else "device" for name in DOCUMENTS}


def encoded(statement: dict[str, Any]) -> bytes:
    return json.dumps(statement, indent=1).encode()


def sign(signer: Issued, text: bytes) -> bytes:
    signature: bytes = signer.key.sign(text, ec.ECDSA(hashes.SHA512()))
    return signature


def signed(signer: Issued, statement: dict[str, Any] | bytes, *between: Issued) -> SignedStatement:
    text = statement if isinstance(statement, bytes) else encoded(statement)
    return SignedStatement(text, sign(signer, text), bundle(signer, *between))


def verify(
    statement: SignedStatement, sets: tuple[AnchorSet, ...] = SETS, last_serial: int = 6, **changes: Any
) -> VerifiedStatement:
    return verify_statement(
        statement, sets, **{"at": NOW, "device_uuid": MINE, "last_serial": last_serial, **changes}
    )


def refusal(call: Callable[[], object], code: str) -> TrustRefusal:
    with pytest.raises(TrustRefusal) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value


# What is accepted


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_action_under_its_own_anchor_and_under_a_lifecycle_anchor(name: str) -> None:
    for under in (SIGNERS[name], "lifecycle"):
        found = verify(signed(UNDER[under], DOCUMENTS[name]))
        assert found.anchor.purpose.value == under
        assert (found.statement.serial, found.statement.device_uuid) == (7, MINE)
        assert found.statement.name == DOCUMENTS[name]["action"]
        assert found.statement.sha256 == hashlib.sha256(encoded(DOCUMENTS[name])).hexdigest()


def test_what_a_statement_says() -> None:
    read = {name: parse_statement(encoded(each)).action for name, each in DOCUMENTS.items()}
    assert read == {
        "replace-guest": ReplaceAuthority(Purpose.GUEST, sha256(GUEST), NEW.pem, overlap=True),
        "replace-device": ReplaceAuthority(Purpose.DEVICE, sha256(DEVICE), NEW.pem, overlap=False),
        "retire-guest": RetireAuthority(Purpose.GUEST, sha256(GUEST)),
        "retire-device": RetireAuthority(Purpose.DEVICE, sha256(DEVICE)),
        "renew-device-key": RenewDeviceKey(),
        "device-certificate": DeviceCertificateChange(b"chain"),
        "replace-token": ReplaceToken("ab" * 32),
    }
    assert {each["action"] for each in DOCUMENTS.values()} == {*ACTIONS}


def test_a_signer_below_a_sub_ca() -> None:
    sub = issue(SUB, GUEST)
    found = verify(signed(issue(SIGNER, sub), DOCUMENTS["replace-guest"], sub))
    assert found.anchor.sha256_fingerprint == sha256(GUEST)


def test_a_device_without_lifecycle_anchors() -> None:
    assert (
        verify(signed(UNDER["guest"], DOCUMENTS["replace-guest"]), SETS[:2]).anchor.purpose is Purpose.GUEST
    )


# Who signs


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("under", ["guest", "device", "other guest"])
def test_row04_row08_a_signer_is_entitled_to_what_is_its_anchor_s_own(name: str, under: str) -> None:
    if under == SIGNERS[name]:
        return
    signer = UNDER.get(under) or issue(SIGNER, OTHER_GUEST)
    said = refusal(lambda: verify(signed(signer, DOCUMENTS[name])), "statement-not-entitled")
    assert DOCUMENTS[name]["action"] in said.evidence


LEAVES = {
    "an ordinary GuestOS signer": LEAF.but(purpose=CODE_SIGNING),
    "one without any purpose": LEAF,
    "any purpose": SIGNER.but(purpose=x509.ExtendedKeyUsage([Eku.ANY_EXTENDED_KEY_USAGE])),
    "a device": SIGNER.but(purpose=CLIENT_AUTH),
    "software, too": SIGNER.but(purpose=x509.ExtendedKeyUsage([LIFECYCLE_PURPOSE, Eku.CODE_SIGNING])),
    "any purpose, too": SIGNER.but(
        purpose=x509.ExtendedKeyUsage([LIFECYCLE_PURPOSE, Eku.ANY_EXTENDED_KEY_USAGE])
    ),
    "no key usage": SIGNER.but(key_usage=None),
    "no signatures": SIGNER.but(key_usage=usage("key_encipherment")),
    "signs certificates": SIGNER.but(key_usage=usage("digital_signature", "key_cert_sign")),
}


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("issuer", ["guest", "lifecycle"])
def test_row04_a_certificate_for_anything_else_signs_no_statement(kind: str, issuer: str) -> None:
    signer = issue(LEAVES[kind], {"guest": GUEST, "lifecycle": LIFECYCLE}[issuer])
    refusal(lambda: verify(signed(signer, DOCUMENTS["replace-guest"])), "statement-purpose")


def test_row04_who_signs_statements_signs_no_software() -> None:
    signer = UNDER["guest"]
    refusal(lambda: verify_chain(signer.pem, SETS[0], at=NOW), "leaf-purpose")


def test_row04_a_ca_that_is_limited_to_software_vouches_for_no_statement() -> None:
    limited = issue(ROOT.but(purpose=CODE_SIGNING))
    sets = (anchors(limited, purpose=Purpose.GUEST),)
    wanted = document("retire-authority", purpose="guest", sha256=sha256(limited))
    refusal(lambda: verify(signed(issue(SIGNER, limited), wanted), sets), "ca-purpose")
    refusal(
        lambda: judge_authority(limited.pem, at=NOW, revocations=Revocations(), purpose=Purpose.LIFECYCLE),
        "ca-purpose",
    )


def test_row04_who_is_not_vouched_for() -> None:
    stranger = issue(SIGNER, NEW)
    refusal(lambda: verify(signed(stranger, DOCUMENTS["replace-guest"])), "untrusted-signer")
    refusal(lambda: verify(signed(GUEST, DOCUMENTS["replace-guest"])), "leaf-is-ca")
    refusal(lambda: verify(signed(UNDER["guest"], DOCUMENTS["replace-guest"]), ()), "no-anchor")


def test_row04_anchors_of_the_core_vouch_for_no_statement() -> None:
    core = (anchors(GUEST, purpose=Purpose.CORE),)
    refusal(lambda: verify(signed(UNDER["guest"], DOCUMENTS["retire-guest"]), core), "no-anchor")


def test_row16_a_revoked_signer() -> None:
    revoked = Revocations(sha256=frozenset({hashlib.sha256(UNDER["guest"].der).digest()}))
    sets = (anchors(GUEST, purpose=Purpose.GUEST, revocations=revoked),)
    refusal(lambda: verify(signed(UNDER["guest"], DOCUMENTS["replace-guest"]), sets), "certificate-revoked")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"not_after": NOW - DAY}, "certificate-expired"),
        ({"not_before": NOW + DAY}, "certificate-not-yet-valid"),
    ],
)
def test_row17_a_signer_out_of_its_time(changes: dict[str, Any], code: str) -> None:
    signer = issue(SIGNER.but(**changes), LIFECYCLE)
    refusal(lambda: verify(signed(signer, DOCUMENTS["replace-guest"])), code)
    refusal(
        lambda: verify(signed(UNDER["lifecycle"], DOCUMENTS["replace-guest"]), at=NOW + 11 * DAY),
        "certificate-expired",
    )


# For whom and when


def test_row08_row32_a_statement_for_another_device() -> None:
    statement = signed(UNDER["lifecycle"], DOCUMENTS["replace-guest"] | {"device_uuid": str(OTHER)})
    refusal(lambda: verify(statement), "statement-other-device")
    assert verify(statement, device_uuid=OTHER).statement.device_uuid == OTHER


def test_a_statement_for_any_device() -> None:
    for name in ("replace-guest", "retire-device", "renew-device-key"):
        statement = signed(UNDER["lifecycle"], DOCUMENTS[name] | {"device_uuid": None})
        assert verify(statement, device_uuid=OTHER).statement.device_uuid is None
    for name in ("device-certificate", "replace-token"):
        statement = signed(UNDER["lifecycle"], DOCUMENTS[name] | {"device_uuid": None})
        refusal(lambda statement=statement: verify(statement), "statement-for-any-device")  # type: ignore[misc]


@pytest.mark.parametrize("last", [7, 8, SERIAL_LIMIT - 1])
def test_row32_an_equal_or_lower_serial_number(last: int) -> None:
    statement = signed(UNDER["guest"], DOCUMENTS["replace-guest"])
    said = refusal(lambda: verify(statement, last_serial=last), "statement-replayed")
    assert f"serial 7; the last one was {last}" in said.evidence


# What it is made of


@pytest.mark.parametrize("name", ["replace-guest", "renew-device-key"])
def test_row02_row03_no_part_can_be_changed_exchanged_or_left_out(name: str) -> None:
    good = signed(UNDER[SIGNERS[name]], DOCUMENTS[name])
    other = signed(UNDER["lifecycle"], DOCUMENTS["retire-device"])
    verify(good)
    random = Random(4711)  # noqa: S311 - places to flip, no secret
    for field in SignedStatement._fields:
        data = getattr(good, field)
        for wrong in (b"", data + b"\0", data[:-1], data * 2, getattr(other, field)):
            with pytest.raises(TrustRefusal):
                verify(good._replace(**{field: wrong}))
        for place in random.sample(range(len(data)), min(len(data), 60)):
            flipped = data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]
            with pytest.raises(TrustRefusal):
                verify(good._replace(**{field: flipped}))


def test_row04_the_text_is_not_looked_at_before_its_signature_holds() -> None:
    good = signed(UNDER["guest"], DOCUMENTS["replace-guest"])
    said = refusal(lambda: verify(good._replace(text=b"{")), "bad-signature")
    assert "statement" in said.cause
    refusal(lambda: verify(good._replace(text=b"{", chain=issue(SIGNER, NEW).pem)), "untrusted-signer")
    refusal(lambda: verify(signed(UNDER["guest"], b"{")), "statement-malformed")


def test_a_text_that_is_too_large() -> None:
    text = encoded(DOCUMENTS["renew-device-key"])
    refusal(lambda: verify(signed(UNDER["device"], text + b" " * STATEMENT_LIMIT)), "statement-too-large")
    refusal(lambda: parse_statement(text + b" " * STATEMENT_LIMIT), "statement-too-large")
    verify(signed(UNDER["device"], text + b" " * (STATEMENT_LIMIT - len(text))))


MALFORMED: dict[str, Any] = {
    "no object": [],
    "another kind": document("renew-device-key") | {"kind": "trustme.attestation"},
    "an unknown key": document("renew-device-key", comment="harmless"),
    "another action's key": document("renew-device-key", sha256="ab" * 32),
    "serial zero": document("renew-device-key") | {"serial": 0},
    "serial negative": document("renew-device-key") | {"serial": -1},
    "serial true": document("renew-device-key") | {"serial": True},
    "serial text": document("renew-device-key") | {"serial": "7"},
    "serial too high": document("renew-device-key") | {"serial": SERIAL_LIMIT},
    "uuid in upper case": document("renew-device-key") | {"device_uuid": str(MINE).upper()},
    "uuid with braces": document("renew-device-key") | {"device_uuid": f"{{{MINE}}}"},
    "uuid number": document("renew-device-key") | {"device_uuid": 5},
    "uuid empty": document("renew-device-key") | {"device_uuid": ""},
    "action missing": {key: value for key, value in document("").items() if key != "action"},
    "action list": document("") | {"action": ["renew-device-key"]},
    "purpose core": DOCUMENTS["retire-guest"] | {"purpose": "core"},
    "purpose lifecycle": DOCUMENTS["retire-guest"] | {"purpose": "lifecycle"},
    "sha in upper case": DOCUMENTS["retire-guest"] | {"sha256": sha256(GUEST).upper()},
    "sha short": DOCUMENTS["retire-guest"] | {"sha256": sha256(GUEST)[:16]},
    "overlap number": DOCUMENTS["replace-guest"] | {"overlap": 1},
    "overlap null": DOCUMENTS["replace-guest"] | {"overlap": None},
    "certificate null": DOCUMENTS["device-certificate"] | {"certificate": None},
}
TEXTS = {
    "empty": b"",
    "twice": encoded(document("renew-device-key")).replace(b'"serial": 7', b'"serial": 9, "serial": 7'),
    "float": encoded(document("renew-device-key")).replace(b'"serial": 7', b'"serial": 7.0'),
    "exponent": encoded(document("renew-device-key")).replace(b'"serial": 7', b'"serial": 7e0'),
    "infinity": encoded(document("renew-device-key")).replace(b'"serial": 7', b'"serial": Infinity'),
    "long number": encoded(document("renew-device-key")).replace(b'"serial": 7', b'"serial": ' + b"7" * 5000),
    "utf-16": encoded(document("renew-device-key")).decode().encode("utf-16"),
    "not ascii": encoded(document("renew-device-key")).replace(b"renew", "renéw".encode()),
    "more after it": encoded(document("renew-device-key")) + b"{}",
    "deep": b"[" * 30000,
}


@pytest.mark.parametrize("kind", [*MALFORMED, *TEXTS])
def test_a_text_of_another_form_is_refused_whole(kind: str) -> None:
    text = TEXTS[kind] if kind in TEXTS else encoded(MALFORMED[kind])
    refusal(lambda: verify(signed(UNDER["lifecycle"], text)), "statement-malformed")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_key_can_be_left_out(name: str) -> None:
    for key in DOCUMENTS[name]:
        less = {each: value for each, value in DOCUMENTS[name].items() if each != key}
        with pytest.raises(TrustRefusal) as caught:
            parse_statement(encoded(less))
        assert caught.value.code in {"statement-malformed", "statement-version"}


@pytest.mark.parametrize("version", [0, 2, "1", None, True, [1]])
def test_another_version(version: object) -> None:
    text = encoded(document("renew-device-key") | {"version": version})
    refusal(lambda: parse_statement(text), "statement-version")


def test_an_unknown_action() -> None:
    said = refusal(
        lambda: parse_statement(encoded(document("reopen-provisioning"))), "statement-action-unknown"
    )
    assert "replace-authority" in said.remedy
    refusal(lambda: parse_statement(encoded(document("x" * 5000 + "\x1b[2J"))), "statement-action-unknown")


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_refusal(text: bytes) -> None:
    with pytest.raises(TrustRefusal):
        parse_statement(text)


def test_a_time_without_zone_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="time zone"):
        verify(signed(UNDER["guest"], DOCUMENTS["replace-guest"]), at=NOW.replace(tzinfo=None))
