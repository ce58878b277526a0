# SPDX-License-Identifier: Apache-2.0
"""What may become an anchor, and what may not; odd certificates are openssl's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trust.conftest import CA_EXTENSIONS, PssPki
from tests.unit.trust.pki import (
    CLIENT_AUTH,
    CODE_SIGNING,
    DAY,
    LEAF,
    NOW,
    ROOT,
    SUB,
    Issued,
    OpensslCa,
    Wish,
    anchors,
    bundle,
    issue,
    openssl,
    usage,
)
from trustme_init.errors import Refusal, TrustRefusal
from trustme_init.trust.anchors import Purpose, Revocations, anchor_set
from trustme_init.trust.authority import AUTHORITY_BYTES, Authority, judge_authority
from trustme_init.trust.chain import verify_chain

NONE = Revocations()
ANY = x509.ExtendedKeyUsage([Eku.ANY_EXTENDED_KEY_USAGE])
SERVER_AUTH = x509.ExtendedKeyUsage([Eku.SERVER_AUTH])
BOTH = pytest.mark.parametrize("purpose", [Purpose.GUEST, Purpose.DEVICE], ids=lambda each: each.value)


def judge(data: bytes, purpose: Purpose = Purpose.GUEST, revocations: Revocations = NONE) -> Authority:
    return judge_authority(data, at=NOW, revocations=revocations, purpose=purpose)


def refusal(data: bytes, purpose: Purpose = Purpose.GUEST, revocations: Revocations = NONE) -> TrustRefusal:
    with pytest.raises(TrustRefusal) as caught:
        judge(data, purpose, revocations)
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value


@BOTH
def test_a_root_and_a_sub_ca_may_be_anchors(purpose: Purpose) -> None:
    root = issue(ROOT)
    sub = issue(SUB, root)
    for each in (root, sub):
        found = judge(each.pem, purpose)
        assert found == Authority(
            each.der,
            each.certificate.subject.rfc4514_string(),
            hashlib.sha256(each.der).hexdigest(),
            ROOT.not_after,
        )
        assert anchor_set(purpose, [found.certificate_der], NONE, source="test").anchors


@dataclass(frozen=True)
class Case:
    name: str
    wish: Wish
    guest: str | None
    device: str | None


NAME_CONSTRAINTS = x509.NameConstraints([x509.DNSName("example.org")], None)
POISON = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
MATRIX = [
    Case("for code signing", ROOT.but(purpose=CODE_SIGNING), None, "ca-purpose"),
    Case("for clients", ROOT.but(purpose=CLIENT_AUTH), "ca-purpose", None),
    Case("for servers", ROOT.but(purpose=SERVER_AUTH), "ca-purpose", "ca-purpose"),
    Case("for any purpose", ROOT.but(purpose=ANY), None, None),
    Case("without key usage", ROOT.but(key_usage=None), None, None),
    Case("a leaf", LEAF, "not-a-ca", "not-a-ca"),
    Case("says nothing", ROOT.but(ca=None), "not-a-ca", "not-a-ca"),
    Case("says no", ROOT.but(ca=False), "not-a-ca", "not-a-ca"),
    Case("may not certify", ROOT.but(key_usage=usage("digital_signature")), "ca-key-usage", "ca-key-usage"),
    Case("signs lists only", ROOT.but(key_usage=usage("crl_sign")), "ca-key-usage", "ca-key-usage"),
    Case("expired", ROOT.but(not_after=NOW - DAY), "certificate-expired", "certificate-expired"),
    Case("too early", ROOT.but(not_before=NOW + DAY),
         "certificate-not-yet-valid", "certificate-not-yet-valid"),
    Case("constrains names", ROOT.but(more=((NAME_CONSTRAINTS, True),)),
         "name-constraints", "name-constraints"),
    Case("unknown critical extension", ROOT.but(more=((POISON, True),)),
         "certificate-refused", "certificate-refused"),
]  # fmt: skip


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name.replace(" ", "-"))
@BOTH
def test_what_the_certificate_says(case: Case, purpose: Purpose) -> None:
    pem = issue(case.wish).pem
    code = case.guest if purpose is Purpose.GUEST else case.device
    if code is None:
        judge(pem, purpose)
    else:
        assert refusal(pem, purpose).code == code


def test_a_signers_certificate_is_no_anchor() -> None:
    root = issue(ROOT)
    assert refusal(issue(LEAF, root).pem).code == "not-a-ca"


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (lambda: rsa.generate_private_key(65537, 1024), "weak-key"),  # noqa: S505 - to be refused
        (lambda: ec.generate_private_key(ec.SECP521R1()), "weak-key"),
        (lambda: ec.generate_private_key(ec.SECP256K1()), "weak-key"),
        (lambda: ec.generate_private_key(ec.SECP384R1()), None),
        (ed25519.Ed25519PrivateKey.generate, None),
    ],
    ids=["rsa-1024", "p521", "k256", "p384", "ed25519"],
)
def test_keys(key: Callable[[], object], code: str | None) -> None:
    pem = issue(ROOT, key=key()).pem
    if code is None:
        judge(pem)
    else:
        assert refusal(pem).code == code


class TestOpenssl:
    """Certificates that the library would not make."""

    def judge(self, pem: bytes) -> Authority:
        return judge_authority(pem, at=NOW + DAY / 2, revocations=NONE, purpose=Purpose.GUEST)

    def code(self, pem: bytes) -> str:
        with pytest.raises(TrustRefusal) as caught:
            self.judge(pem)
        return caught.value.code

    def test_rsa_and_pss_cas_of_upstream(self, pss: PssPki) -> None:
        for certificate in (pss.root, pss.sub):
            self.judge(certificate.public_bytes(Encoding.PEM))
        assert self.code(pss.leaf.public_bytes(Encoding.PEM)) == "not-a-ca"

    @pytest.mark.parametrize("digest", ["-sha1", "-md5"])
    def test_a_root_that_signs_itself_weakly(self, openssl_ca: OpensslCa, digest: str) -> None:
        key = openssl_ca.key("weak-root", "RSA")
        root = openssl_ca.issue("weak", key, CA_EXTENSIONS, None, digest)
        assert self.code(root.public_bytes(Encoding.PEM)) == "weak-signature"

    def test_a_sub_ca_that_was_signed_weakly(self, openssl_ca: OpensslCa, pss: PssPki) -> None:
        sub = openssl_ca.issue("sub", pss.sub_key, CA_EXTENSIONS, (pss.root, pss.root_key), "-sha1")
        assert self.code(sub.public_bytes(Encoding.PEM)) == "weak-signature"

    def test_version_1(self, openssl_ca: OpensslCa) -> None:
        root = openssl_ca.issue("old", openssl_ca.key("old", "RSA"), (), None, "-sha256")
        assert self.code(root.public_bytes(Encoding.PEM)) == "certificate-version"

    def test_serial_numbers(self, openssl_ca: OpensslCa) -> None:
        key = openssl_ca.key("root", "RSA")
        long = openssl_ca.issue("long", key, CA_EXTENSIONS, None, "-set_serial", "0x1" + "00" * 20)
        assert self.code(long.public_bytes(Encoding.PEM)) == "certificate-serial"
        zero = openssl_ca.issue("zero", key, CA_EXTENSIONS, None, "-set_serial", "0")
        assert self.code(zero.public_bytes(Encoding.PEM)) == "authority-malformed"

    def test_what_openssl_prints_beside_the_block_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "root.pem"
        path.write_bytes(issue(ROOT).pem)
        assert self.code(openssl("x509", "-in", path, "-text")) == "not-pem"
        # The remedy that the refusal names.
        self.judge(openssl("x509", "-in", path))
        der = openssl("x509", "-in", path, "-outform", "DER")
        (tmp_path / "root.der").write_bytes(der)
        self.judge(openssl("x509", "-inform", "DER", "-in", tmp_path / "root.der"))


def test_der_is_refused_and_named() -> None:
    found = refusal(issue(ROOT).der)
    assert found.code == "not-pem"
    assert found.evidence == "the bytes are a DER certificate"
    assert "-inform DER" in found.remedy


@pytest.mark.parametrize(
    "change",
    [
        lambda pem: b"",
        lambda pem: b"\x30",
        lambda pem: b"text before\n" + pem,
        lambda pem: pem + b"trailing",
        lambda pem: pem[:-1],
        lambda pem: pem.replace(b"\n", b"\r\n"),
        lambda pem: pem.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE"),
        lambda pem: pem + b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        lambda pem: pem.replace(b"\nM", b"\n\nM", 1),
    ],
)
def test_not_one_plain_block(change: Callable[[bytes], bytes]) -> None:
    assert refusal(change(issue(ROOT).pem)).code == "not-pem"


def test_a_block_without_a_certificate() -> None:
    pem = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    assert refusal(pem).code == "authority-malformed"


def test_more_than_one_certificate() -> None:
    root = issue(ROOT)
    assert refusal(bundle(issue(SUB, root), root)).code == "authority-several"
    assert refusal(bundle(root, root)).code == "authority-several"


def test_the_largest_file() -> None:
    assert refusal(b"-" * (AUTHORITY_BYTES + 1)).code == "authority-too-large"
    assert refusal(b"-" * AUTHORITY_BYTES).code == "not-pem"
    padding = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), bytes(AUTHORITY_BYTES))
    assert refusal(issue(ROOT.but(more=((padding, False),))).pem).code == "authority-too-large"


def test_a_root_must_have_signed_itself() -> None:
    impostor = issue(ROOT)
    # Same name as issuer and subject, but another key's signature.
    forged = issue(ROOT, Issued(impostor.certificate, ec.generate_private_key(ec.SECP256R1())))
    assert forged.certificate.issuer == forged.certificate.subject
    assert refusal(forged.pem).code == "authority-signature"


def test_any_flipped_byte_of_a_root_is_refused() -> None:
    root = issue(ROOT)
    for position in range(len(root.pem)):
        damaged = bytearray(root.pem)
        damaged[position] ^= 0x01
        try:
            found = judge(bytes(damaged))
        except TrustRefusal:
            continue
        # One name of the two was hit: it says it was issued by somebody else, who is not asked.
        certificate = x509.load_der_x509_certificate(found.certificate_der)
        assert certificate.issuer != certificate.subject


@pytest.mark.parametrize("kind", ["certificate", "file", "tbs", "issuer", "key"])
@BOTH
def test_row16_a_revoked_ca_is_refused(kind: str, purpose: Purpose) -> None:
    root = issue(ROOT)
    sub = issue(SUB, root)
    tbs = hashlib.sha384(sub.certificate.tbs_certificate_bytes).digest()
    revocations = {
        "certificate": Revocations(certificates=(sub.der,)),
        "file": Revocations(sha256=frozenset({hashlib.sha256(sub.der).digest()})),
        "tbs": Revocations(tbs_digests={"sha384": frozenset({tbs})}),
        "issuer": Revocations(certificates=(root.der,)),
        "key": Revocations(certificates=(issue(ROOT.but(subject="other"), key=sub.key).der,)),
    }[kind]
    judge(sub.pem, purpose)
    assert refusal(sub.pem, purpose, revocations).code == "certificate-revoked"


def test_anchors_of_the_core_are_not_registered() -> None:
    assert refusal(issue(ROOT).pem, Purpose.CORE).code == "wrong-purpose"


def test_moment_needs_a_time_zone() -> None:
    at = NOW.replace(tzinfo=None)
    with pytest.raises(ValueError, match="time zone"):
        judge_authority(issue(ROOT).pem, at=at, revocations=NONE, purpose=Purpose.GUEST)


@given(st.binary(max_size=300) | st.binary(max_size=60).map(
    lambda data: b"-----BEGIN CERTIFICATE-----\n" + data + b"\n-----END CERTIFICATE-----\n"))  # fmt: skip
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Refusal):
        judge(data)


def test_anchor_sets_follow_the_purpose() -> None:
    software, devices = issue(ROOT.but(purpose=CODE_SIGNING)), issue(ROOT.but(purpose=CLIENT_AUTH))
    offered = [software.der, devices.der]
    for purpose, good in ((Purpose.GUEST, software), (Purpose.DEVICE, devices), (Purpose.CORE, software)):
        found = anchor_set(purpose, offered, NONE, source="test")
        assert [anchor.certificate for anchor in found.anchors] == [good.der]
        assert len(found.excluded) == 1
    with pytest.raises(TrustRefusal) as caught:
        anchor_set(Purpose.DEVICE, [software.der], NONE, source="test")
    assert (caught.value.code, "devices" in caught.value.cause) == ("no-anchor", True)
    assert "device_ca_register" in caught.value.remedy


def test_a_refused_chain_names_the_anchors_that_are_none() -> None:
    root, good = issue(ROOT), issue(ROOT)
    revoked = Revocations(certificates=(root.der,))
    found = anchor_set(Purpose.GUEST, [root.der, good.der], revoked, source="test")
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(bundle(issue(LEAF, issue(ROOT.but(subject="other")))), found, at=NOW)
    assert caught.value.code == "untrusted-signer"
    assert hashlib.sha256(root.der).hexdigest()[:16] in caught.value.evidence
    assert "revoked" in caught.value.evidence
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(bundle(issue(LEAF, root)), anchors(good, purpose=Purpose.GUEST), at=NOW)
    assert "not used as anchors" not in caught.value.evidence
