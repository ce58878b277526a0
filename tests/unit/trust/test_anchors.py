# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.trust.pki import (
    CLIENT_AUTH,
    LEAF,
    NOW,
    ROOT,
    SUB,
    Issued,
    anchors,
    bundle,
    issue,
    openssl,
    usage,
)
from trustme_init.errors import TrustRefusal
from trustme_init.firmware.secureboot import FirmwareFacts, SignatureDb, parse_database
from trustme_init.trust.anchors import (
    Anchor,
    AnchorSet,
    Purpose,
    Revocations,
    anchor_set,
    core_anchors,
)
from trustme_init.trust.chain import verify_chain

ORDERS = {  # openssl ecparam -name ... -param_enc explicit -text
    "secp256r1": int("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16),
    "secp384r1": int("f" * 48 + "c7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16),
}


def facts(db: SignatureDb, dbx: SignatureDb | None = None) -> FirmwareFacts:
    return FirmwareFacts(secure_boot=True, setup_mode=False, db=db, dbx=dbx or SignatureDb())


def no_anchor(found: FirmwareFacts) -> TrustRefusal:
    with pytest.raises(TrustRefusal) as caught:
        core_anchors(found)
    assert caught.value.code == "no-anchor"
    assert caught.value.remedy
    return caught.value


def test_ca_certificates_of_db_are_the_core_anchors() -> None:
    root = issue(ROOT)
    sub = issue(SUB, root)
    # As GyroidOS ships it: a self-signed key that signs boot loaders, and the sub CA.
    db_leaf = issue(LEAF.but(subject="DB", key_usage=None, ca=None))
    found = core_anchors(facts(SignatureDb(certificates=(db_leaf.der, sub.der))))
    (anchor,) = found.anchors
    assert anchor == Anchor(sub.der, "CN=sub", hashlib.sha256(sub.der).hexdigest(), Purpose.CORE, "UEFI db")
    assert found.purpose is Purpose.CORE
    assert [entry.sha256_fingerprint for entry in found.excluded] == [hashlib.sha256(db_leaf.der).hexdigest()]


def test_empty_db_is_refused() -> None:
    assert no_anchor(facts(SignatureDb())).evidence == "no certificate at all"


def test_certificates_that_are_no_anchors() -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - to be refused
    offered = {
        b"no certificate": "malformed",
        issue(LEAF.but(subject="DB", ca=None)).der: "not that of a CA",
        issue(ROOT.but(ca=False)).der: "not that of a CA",
        issue(ROOT.but(key_usage=usage("digital_signature"))).der: "may not sign certificates",
        issue(ROOT.but(purpose=CLIENT_AUTH)).der: "purposes other than code signing",
        issue(ROOT, key=weak).der: "not accepted",
    }
    refusal = no_anchor(facts(SignatureDb(certificates=tuple(offered))))
    for reason, evidence in zip(offered.values(), refusal.evidence.split("; "), strict=True):
        assert reason in evidence
    good = issue(ROOT)
    found = core_anchors(facts(SignatureDb(certificates=(*offered, good.der))))
    assert [anchor.certificate for anchor in found.anchors] == [good.der]
    assert len(found.excluded) == len(offered)


def test_image_digests_in_db_are_no_anchors() -> None:
    no_anchor(facts(SignatureDb(sha256=frozenset({bytes(32)}))))


def revocations_of(kind: str, target: Issued) -> Revocations:
    tbs = target.certificate.tbs_certificate_bytes
    if kind == "certificate":
        return Revocations(certificates=(target.der,))
    if kind == "file":
        return Revocations(sha256=frozenset({hashlib.sha256(target.der).digest()}))
    return Revocations(tbs_digests={kind: frozenset({hashlib.new(kind, tbs).digest()})})


KINDS = pytest.mark.parametrize("kind", ["certificate", "file", "sha256", "sha384", "sha512"])


@KINDS
@pytest.mark.parametrize("target", ["leaf", "sub", "root"])
def test_row16_revoked_anywhere_in_the_chain(kind: str, target: str) -> None:
    made = {"root": issue(ROOT)}
    made["sub"] = issue(SUB, made["root"])
    made["leaf"] = issue(LEAF, made["sub"])
    revoked = revocations_of(kind, made[target])
    pem = bundle(made["leaf"], made["sub"])
    verify_chain(pem, anchors(made["root"]), at=NOW)
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(pem, anchors(made["root"], revocations=revoked), at=NOW)
    assert caught.value.code == "certificate-revoked"


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=lambda curve: curve.name)
def test_row16_a_revoked_certificate_in_other_bytes_is_revoked(curve: ec.EllipticCurve) -> None:
    """The other signature (r, n - s) is as good as (r, s) and needs no key."""
    root = issue(ROOT, key=ec.generate_private_key(curve))
    leaf = issue(LEAF, root)
    r, s = decode_dss_signature(leaf.certificate.signature)
    order = ORDERS[curve.name]
    twin = with_signature(leaf.certificate, encode_dss_signature(r, order - s))
    assert twin != leaf.certificate
    verify_chain(bundle(twin), anchors(root), at=NOW)
    revoked = Revocations(sha256=frozenset({hashlib.sha256(leaf.der).digest()}))
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(bundle(twin), anchors(root, revocations=revoked), at=NOW)
    assert caught.value.code == "certificate-revoked"


def test_row16_a_signature_with_unused_bits_is_no_other_certificate() -> None:
    root = issue(ROOT)
    leaf = next(
        made for made in iter(lambda: issue(LEAF, root), None) if not made.certificate.signature[-1] & 1
    )
    place = len(leaf.der) - len(leaf.certificate.signature) - 1
    other = x509.load_der_x509_certificate(leaf.der[:place] + b"\1" + leaf.der[place + 1 :])
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(bundle(other), anchors(root), at=NOW)
    assert caught.value.code == "chain-malformed"


def with_signature(certificate: x509.Certificate, signature: bytes) -> x509.Certificate:
    """Put another signature into a certificate, all lengths being in their usual form."""
    der = certificate.public_bytes(Encoding.DER)
    tail = len(certificate.signature) + 3
    body = der[4:-tail] + bytes([3, len(signature) + 1, 0]) + signature
    return x509.load_der_x509_certificate(b"\x30\x82" + len(body).to_bytes(2, "big") + body)


def test_row16_listed_in_db_and_dbx() -> None:
    root, other = issue(ROOT), issue(ROOT.but(subject="other"))
    db = SignatureDb(certificates=(root.der, other.der))
    found = core_anchors(facts(db, SignatureDb(certificates=(root.der,))))
    assert [anchor.certificate for anchor in found.anchors] == [other.der]
    assert found.excluded[0].reason == "revoked: the certificate itself is listed"
    no_anchor(facts(db, SignatureDb(certificates=(root.der, other.der))))


def test_row16_revoked_root_takes_its_anchored_sub_ca_with_it() -> None:
    root = issue(ROOT)
    sub = issue(SUB, root)
    refusal = no_anchor(facts(SignatureDb(certificates=(sub.der,)), SignatureDb(certificates=(root.der,))))
    assert "its issuer is listed" in refusal.evidence


def test_row16_revoked_key_under_a_new_name() -> None:
    root = issue(ROOT)
    renewed = issue(ROOT.but(subject="renewed", serial=2), key=root.key)
    refusal = no_anchor(
        facts(SignatureDb(certificates=(renewed.der,)), SignatureDb(certificates=(root.der,)))
    )
    assert "its key is that of a listed certificate" in refusal.evidence


def test_row16_signer_of_a_revoked_sub_ca() -> None:
    root = issue(ROOT)
    sub = issue(SUB, root)
    found = core_anchors(facts(SignatureDb(certificates=(root.der,)), SignatureDb(certificates=(sub.der,))))
    # A second certificate for the same sub CA, which the list does not hold.
    again = issue(SUB.but(serial=99), root, key=sub.key)
    for pem in (bundle(issue(LEAF, sub), sub), bundle(issue(LEAF, again), again)):
        with pytest.raises(TrustRefusal) as caught:
            verify_chain(pem, found, at=NOW)
        assert caught.value.code == "certificate-revoked"
    verify_chain(bundle(issue(LEAF, root)), found, at=NOW)


def test_row16_unparseable_entry_revokes_by_its_bytes_and_harms_nothing() -> None:
    root = issue(ROOT)
    found = core_anchors(
        facts(SignatureDb(certificates=(root.der,)), SignatureDb(certificates=(b"garbage",)))
    )
    assert found.anchors
    no_anchor(facts(SignatureDb(certificates=(b"garbage",)), SignatureDb(certificates=(b"garbage",))))


@pytest.mark.parametrize("size", [256, 384, 512])
@pytest.mark.parametrize("time", [(), ("-t", "2099-01-01 00:00:00")])
def test_row16_tbs_digest_of_efitools(tmp_path: Path, size: int, time: tuple[str, ...]) -> None:
    # The tool computes the digest; a time of revocation in the future spares nothing.
    root = issue(ROOT)
    (tmp_path / "root.pem").write_bytes(root.pem)
    command = ["cert-to-efi-hash-list", "-s", str(size), *time, "root.pem", "root.esl"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    dbx = parse_database((tmp_path / "root.esl").read_bytes())
    refusal = no_anchor(facts(SignatureDb(certificates=(root.der,)), dbx))
    assert f"the sha{size} of its TBSCertificate is listed" in refusal.evidence


def test_anchor_sets_have_one_purpose() -> None:
    guest = anchors(issue(ROOT), purpose=Purpose.GUEST).anchors
    with pytest.raises(ValueError, match="one purpose"):
        AnchorSet(Purpose.CORE, guest)


def test_subject_cannot_write_to_the_console() -> None:
    root = issue(ROOT.but(subject="a\x1b[2Jb\nc" + "d" * 40))
    (anchor,) = anchor_set(Purpose.GUEST, [root.der], Revocations(), source="test").anchors
    assert anchor.subject.isprintable()
    assert "\\u001b" in anchor.subject


def test_ca_made_by_openssl_without_key_usage(tmp_path: Path) -> None:
    key, pem = tmp_path / "ca.key", tmp_path / "ca.pem"
    openssl("ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", key)
    openssl("req", "-x509", "-new", "-key", key, "-sha384", "-days", "9", "-subj", "/C=DE/CN=CA", "-out", pem)
    certificate = x509.load_pem_x509_certificate(pem.read_bytes())
    assert anchor_set(Purpose.CORE, [Issued(certificate, None).der], Revocations(), source="test").anchors
