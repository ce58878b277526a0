# SPDX-License-Identifier: Apache-2.0
"""Chains: one matrix through the library's search and through our own, with openssl as a third opinion."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trust.conftest import CA_EXTENSIONS, LEAF_EXTENSIONS, PSS_64
from tests.unit.trust.pki import (
    CERT_SIGN,
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
from trustme_init.errors import Refusal, TrustRefusal
from trustme_init.trust import chain as chain_module
from trustme_init.trust.anchors import AnchorSet, Purpose
from trustme_init.trust.chain import BUNDLE_LIMIT, parse_bundle, verify_chain

if TYPE_CHECKING:
    from tests.unit.trust.conftest import PssPki
    from tests.unit.trust.pki import OpensslCa

POISON = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
NAME_CONSTRAINTS = x509.NameConstraints([x509.DNSName("example.org")], None)


def code_of(pem: bytes, trusted: AnchorSet) -> str:
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(pem, trusted, at=NOW)
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value.code


@dataclass(frozen=True)
class Case:
    """Certificates from the leaf up, which of them are anchors, and what becomes of them."""

    name: str
    root: Wish = ROOT
    sub: Wish | None = SUB
    leaf: Wish = LEAF
    code: str | None = None
    sent: str = "leaf sub"
    anchor: str = "root"
    openssl_differs: bool = False
    """Where openssl, which knows nothing of our purposes, decides otherwise."""

    def build(self) -> tuple[list[x509.Certificate], AnchorSet]:
        root = issue(self.root)
        sub = issue(self.sub, root) if self.sub else root
        made = {"root": root, "sub": sub, "leaf": issue(self.leaf, sub)}
        sent = [made[name].certificate for name in self.sent.split()]
        return sent, anchors(*(made[name] for name in self.anchor.split()))


LATE = {"not_before": NOW + DAY}
PAST = {"not_after": NOW - DAY}
MATRIX = [
    Case("root is anchor"),
    Case("no sub CA", sub=None, sent="leaf"),
    Case("sub CA is anchor", anchor="sub", sent="leaf"),
    Case("sub CA is anchor and sent", anchor="sub"),
    Case("root sent too", sent="leaf sub root"),
    Case("root sent beyond the anchor", sent="leaf sub root", anchor="sub"),
    Case("both are anchors", anchor="root sub"),
    Case("upstream leaf", leaf=LEAF.but(
        key_usage=usage("content_commitment", "digital_signature", "key_encipherment"))),
    Case("leaf without extensions", leaf=Wish("leaf", ca=None)),
    Case("leaf for non-repudiation", leaf=LEAF.but(key_usage=usage("content_commitment"))),
    Case("leaf for code signing", leaf=LEAF.but(purpose=CODE_SIGNING)),
    Case("leaf for TLS and code signing", leaf=LEAF.but(
        purpose=x509.ExtendedKeyUsage([Eku.SERVER_AUTH, Eku.CODE_SIGNING]))),
    Case("leaf for any purpose", leaf=LEAF.but(
        purpose=x509.ExtendedKeyUsage([Eku.ANY_EXTENDED_KEY_USAGE]))),
    Case("sub CA for code signing", sub=SUB.but(purpose=CODE_SIGNING)),
    Case("path length 1 and one CA below", root=ROOT.but(path_length=1)),
    Case("path length 0 and no CA below", sub=SUB.but(path_length=0)),
    Case("CAs without key usage", root=ROOT.but(key_usage=None), sub=SUB.but(key_usage=None)),
    Case("unknown extension, not critical", leaf=LEAF.but(more=((POISON, False),))),
    Case("sub CA missing", sent="leaf", code="untrusted-signer"),
    Case("leaf expired", leaf=LEAF.but(**PAST), code="certificate-expired"),
    Case("leaf too early", leaf=LEAF.but(**LATE), code="certificate-not-yet-valid"),
    Case("sub CA expired", sub=SUB.but(**PAST), code="certificate-expired"),
    Case("sub CA too early", sub=SUB.but(**LATE), code="certificate-not-yet-valid"),
    Case("root expired", root=ROOT.but(**PAST), code="certificate-expired"),
    Case("root too early", root=ROOT.but(**LATE), code="certificate-not-yet-valid"),
    Case("anchored sub CA expired", sub=SUB.but(**PAST), anchor="sub", code="certificate-expired"),
    Case("sub is no CA", sub=SUB.but(ca=False, key_usage=None), code="not-a-ca"),
    Case("sub does not say CA", sub=SUB.but(ca=None, key_usage=None), code="not-a-ca"),
    Case("root does not say CA", root=ROOT.but(ca=None, key_usage=None), code="not-a-ca"),
    Case("anchored sub is no CA", sub=SUB.but(ca=False), anchor="sub", code="not-a-ca"),
    Case("sub CA may not certify", sub=SUB.but(key_usage=usage("digital_signature")),
         code="ca-key-usage"),
    Case("root may not certify", root=ROOT.but(key_usage=usage("crl_sign")), code="ca-key-usage"),
    Case("sub CA for clients", sub=SUB.but(purpose=CLIENT_AUTH), code="ca-purpose", openssl_differs=True),
    Case("root for clients", root=ROOT.but(purpose=CLIENT_AUTH), code="ca-purpose", openssl_differs=True),
    Case("path length 0 and a CA below", root=ROOT.but(path_length=0), code="path-length"),
    Case("leaf is a CA", leaf=LEAF.but(ca=True), code="leaf-is-ca", openssl_differs=True),
    Case("leaf may only encrypt", leaf=LEAF.but(key_usage=usage("key_encipherment")),
         code="leaf-key-usage", openssl_differs=True),
    Case("leaf may certify", leaf=LEAF.but(key_usage=usage("digital_signature", "key_cert_sign")),
         code="leaf-key-usage", openssl_differs=True),
    Case("leaf of a device", leaf=LEAF.but(purpose=CLIENT_AUTH), code="leaf-purpose", openssl_differs=True),
    Case("unknown critical extension in the leaf", leaf=LEAF.but(more=((POISON, True),)),
         code="certificate-refused"),
    Case("unknown critical extension in the sub CA", sub=SUB.but(more=((POISON, True),)),
         code="certificate-refused"),
    Case("unknown critical extension in the root", root=ROOT.but(more=((POISON, True),)),
         code="certificate-refused"),
    Case("name constraints in the sub CA", sub=SUB.but(more=((NAME_CONSTRAINTS, True),)),
         code="name-constraints", openssl_differs=True),
    Case("name constraints in the root", root=ROOT.but(more=((NAME_CONSTRAINTS, False),)),
         code="name-constraints", openssl_differs=True),
]  # fmt: skip
CASES = pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name.replace(" ", "-"))
ROUTES = pytest.mark.parametrize("route", ["_library_path", "_own_path"])


@CASES
@ROUTES
def test_both_ways_decide_alike(case: Case, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, trusted = case.build()
    monkeypatch.setattr(chain_module, "_library_can", lambda *_: route == "_library_path")
    other = "_own_path" if route == "_library_path" else "_library_path"
    if case.code is None:
        # The way not taken must not be what accepts.
        monkeypatch.setattr(chain_module, other, lambda *_: pytest.fail("the other way was taken"))
        signer = verify_chain(bundle(*sent), trusted, at=NOW)
        assert signer.leaf_der == sent[0].public_bytes(Encoding.DER)
        assert signer.anchor in trusted.anchors
        assert signer.fingerprints[-1] == signer.anchor.sha256_fingerprint
        assert signer.fingerprints[0] == signer.sha256_fingerprint
    else:
        assert code_of(bundle(*sent), trusted) == case.code


@CASES
def test_library_refuses_by_itself(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the library decides, our own search only words the refusal: it cannot turn it round.
    sent, trusted = case.build()
    monkeypatch.setattr(chain_module, "_library_can", lambda *_: True)
    monkeypatch.setattr(chain_module, "_own_path", lambda *_: None)
    if case.code is None:
        verify_chain(bundle(*sent), trusted, at=NOW)
    else:
        assert code_of(bundle(*sent), trusted) in {"chain-refused", "untrusted-signer"}


@CASES
def test_openssl_agrees(case: Case, tmp_path: Path) -> None:
    sent, trusted = case.build()
    (tmp_path / "leaf.pem").write_bytes(bundle(sent[0]))
    (tmp_path / "sent.pem").write_bytes(bundle(*sent))
    (tmp_path / "anchors.pem").write_bytes(
        bundle(*(x509.load_der_x509_certificate(anchor.certificate) for anchor in trusted.anchors))
    )
    command = (
        *("openssl", "verify", "-partial_chain", "-no-CAfile", "-no-CApath"),
        *("-attime", str(int(NOW.timestamp())), "-trusted", "anchors.pem", "-untrusted", "sent.pem"),
    )
    result = subprocess.run([*command, "leaf.pem"], cwd=tmp_path, capture_output=True, check=False)
    accepted = case.code is None or case.openssl_differs
    assert (result.returncode == 0) == accepted, result.stderr.decode()


def four_certificates() -> tuple[list[Issued], Issued]:
    root = issue(ROOT)
    one = issue(SUB.but(subject="one"), root)
    two = issue(SUB.but(subject="two"), one)
    three = issue(SUB.but(subject="three"), two)
    return [issue(LEAF, three), three, two, one], root


@ROUTES
def test_row2_four_certificates_and_not_five(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "_library_can", lambda *_: route == "_library_path")
    chain, root = four_certificates()
    assert len(verify_chain(bundle(*chain), anchors(root), at=NOW).fingerprints) == 5
    assert code_of(bundle(*chain, root), anchors(root)) == "chain-too-long"


def test_row2_largest_bundle() -> None:
    assert code_of(b"-" * (BUNDLE_LIMIT + 1), anchors(issue(ROOT))) == "chain-too-large"
    assert code_of(b"-" * BUNDLE_LIMIT, anchors(issue(ROOT))) == "chain-malformed"


def test_row3_dropped_swapped_and_doubled_elements() -> None:
    root, other_root = issue(ROOT), issue(ROOT)
    sub, other_sub = issue(SUB, root), issue(SUB, other_root)
    leaf = issue(LEAF, sub)
    trusted = anchors(root)
    assert code_of(b"", trusted) == "chain-malformed"
    assert code_of(bundle(leaf), trusted) == "untrusted-signer"
    assert code_of(bundle(sub), trusted) == "leaf-is-ca"
    assert code_of(bundle(leaf, leaf), trusted) == "chain-duplicate"
    assert code_of(bundle(leaf, sub, sub), trusted) == "chain-duplicate"
    assert code_of(bundle(sub, leaf), trusted) == "chain-broken"
    assert code_of(bundle(leaf, other_sub), trusted) == "chain-broken"
    assert code_of(bundle(leaf, sub, other_root), trusted) == "chain-broken"
    assert code_of(bundle(leaf, sub), anchors(other_root)) == "untrusted-signer"
    assert code_of(bundle(leaf, sub, root), anchors(other_root)) == "untrusted-signer"


def test_row3_impostor_with_the_anchors_name() -> None:
    root, impostor = issue(ROOT), issue(ROOT)
    assert code_of(bundle(issue(LEAF, impostor)), anchors(root)) == "untrusted-signer"
    assert code_of(bundle(issue(LEAF, impostor), impostor), anchors(root)) == "untrusted-signer"


@pytest.mark.parametrize(
    "change",
    [
        lambda pem: b"text before\n" + pem,
        lambda pem: pem + b"\n",
        lambda pem: pem + b"trailing",
        lambda pem: pem[:-1],
        lambda pem: pem.replace(b"\n", b"\r\n"),
        lambda pem: pem.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE"),
        lambda pem: pem.replace(b"BEGIN CERTIFICATE", b"BEGIN X509 CRL").replace(
            b"END CERTIFICATE", b"END X509 CRL"
        ),
        lambda pem: pem + b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        lambda pem: pem.replace(b"\nM", b"\n\nM", 1),
        lambda pem: pem.replace(b"\nM", b"\nM\n", 1),
        lambda pem: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        lambda pem: b"-----BEGIN CERTIFICATE-----\nA===\n-----END CERTIFICATE-----\n",
        lambda pem: b"\xef\xbb\xbf" + pem,
    ],
)
def test_row3_only_plain_certificate_blocks(change: Callable[[bytes], bytes]) -> None:
    root = issue(ROOT)
    assert code_of(change(bundle(issue(LEAF, root))), anchors(root)) == "chain-malformed"


def test_row2_any_flipped_byte_of_a_bundle_is_refused(pss: PssPki) -> None:
    root = issue(ROOT)
    sub = issue(SUB, root)
    good = bundle(issue(LEAF, sub), sub, root)
    long = bundle(pss.leaf, pss.sub, pss.root)
    for pem, trusted, step in ((good, anchors(sub), 3), (long, anchors(pss.root), 41)):
        verify_chain(pem, trusted, at=NOW + DAY / 2)
        for position in range(0, len(pem), step):
            for mask in (0x01, 0x20, 0x80):
                damaged = bytearray(pem)
                damaged[position] ^= mask
                with pytest.raises(TrustRefusal):
                    verify_chain(bytes(damaged), trusted, at=NOW + DAY / 2)


@given(st.binary(max_size=300) | st.binary(max_size=60).map(
    lambda data: b"-----BEGIN CERTIFICATE-----\n" + data + b"\n-----END CERTIFICATE-----\n"))  # fmt: skip
def test_arbitrary_bundles_are_refused(data: bytes) -> None:
    with pytest.raises(Refusal):
        parse_bundle(data)


GOOD_LEAF = issue(LEAF)
ISSUER_OF_GOOD_LEAF = anchors(issue(ROOT.but(subject=LEAF.subject), key=GOOD_LEAF.key))


def test_undamaged_certificate_is_accepted() -> None:
    verify_chain(bundle(GOOD_LEAF), ISSUER_OF_GOOD_LEAF, at=NOW)


@given(st.integers(0, len(GOOD_LEAF.der) - 1), st.integers(1, 255))
def test_row2_damaged_certificates_are_refused(position: int, mask: int) -> None:
    der = bytearray(GOOD_LEAF.der)
    der[position] ^= mask
    text = base64.encodebytes(bytes(der)).replace(b"\n", b"")
    lines = b"\n".join(text[start : start + 64] for start in range(0, len(text), 64))
    pem = b"-----BEGIN CERTIFICATE-----\n" + lines + b"\n-----END CERTIFICATE-----\n"
    with pytest.raises(Refusal):
        verify_chain(pem, ISSUER_OF_GOOD_LEAF, at=NOW)


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
    weak = key()
    root = issue(ROOT)
    sub = issue(SUB, root, key=weak)
    for pem, trusted in (
        (bundle(issue(LEAF, root, key=weak)), anchors(root)),
        (bundle(issue(LEAF, sub), sub), anchors(root)),
        (bundle(issue(LEAF, sub)), anchors(sub)),
    ):
        if code is None:
            verify_chain(pem, trusted, at=NOW)
        else:
            assert code_of(pem, trusted) in {code, "chain-refused"}


def test_sha1_signatures_are_refused(openssl_ca: OpensslCa, pss: PssPki) -> None:
    issuer = (pss.root, pss.root_key)
    leaf = openssl_ca.issue("leaf", pss.leaf_key, LEAF_EXTENSIONS, issuer, "-sha1")
    assert code_of(bundle(leaf), anchors(pss.root)) == "weak-signature"
    sha1_pss = ("-sha1", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:20")
    leaf = openssl_ca.issue("leaf", pss.leaf_key, LEAF_EXTENSIONS, issuer, *sha1_pss)
    assert code_of(bundle(leaf), anchors(pss.root)) == "weak-signature"


def test_dsa_signatures_are_refused() -> None:
    root = issue(ROOT, key=dsa.generate_private_key(1024))  # noqa: S505 - to be refused
    assert code_of(bundle(issue(LEAF, root)), anchors(root)) == "weak-signature"


@pytest.mark.parametrize(
    ("serial", "code"),
    [
        ("0", "chain-malformed"),
        ("-5", "chain-malformed"),
        ("0x" + "ff" * 20, None),
        ("0x1" + "00" * 20, "certificate-serial"),
    ],
)
def test_serial_numbers(pss: PssPki, serial: str, code: str | None) -> None:
    issuer = (pss.root, pss.root_key)
    leaf = pss.ca.issue("leaf", pss.leaf_key, LEAF_EXTENSIONS, issuer, "-set_serial", serial)
    if code is None:
        verify_chain(bundle(leaf), anchors(pss.root), at=NOW + DAY / 2)
    else:
        assert code_of(bundle(leaf), anchors(pss.root)) == code


def test_version_1_is_refused(pss: PssPki) -> None:
    # Without extensions openssl makes a version 1 certificate; it cannot say what it is for.
    leaf = pss.ca.issue("leaf", pss.leaf_key, (), (pss.root, pss.root_key))
    assert code_of(bundle(leaf), anchors(pss.root)) == "certificate-version"


def test_purpose_of_the_anchors() -> None:
    root = issue(ROOT)
    pem = bundle(issue(LEAF, root))
    verify_chain(pem, anchors(root, purpose=Purpose.GUEST), at=NOW)
    assert code_of(pem, anchors(root, purpose=Purpose.DEVICE)) == "wrong-purpose"


def test_renewed_anchor_beside_the_expired_one() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    old, new = issue(ROOT.but(not_after=NOW - DAY), key=key), issue(ROOT, key=key)
    pem = bundle(issue(LEAF, old))
    assert verify_chain(pem, anchors(old, new), at=NOW).anchor.certificate == new.der
    assert verify_chain(pem, anchors(new, old), at=NOW).anchor.certificate == new.der


def test_validity_ends_are_included() -> None:
    root = issue(ROOT)
    pem = bundle(issue(LEAF, root))
    for moment in (LEAF.not_before, LEAF.not_after):
        verify_chain(pem, anchors(root), at=moment)
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(pem, anchors(root), at=LEAF.not_after + DAY / 86400)
    assert caught.value.code == "certificate-expired"


def test_moment_needs_a_time_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        verify_chain(b"", anchors(issue(ROOT)), at=NOW.replace(tzinfo=None))


class TestPss:
    """id-RSASSA-PSS keys, which only our own search knows; certificates made by openssl."""

    at = NOW + DAY / 2

    def code(self, pem: bytes, trusted: AnchorSet) -> str:
        with pytest.raises(TrustRefusal) as caught:
            verify_chain(pem, trusted, at=self.at)
        return caught.value.code

    def test_upstream_chain(self, pss: PssPki) -> None:
        verify_chain(bundle(pss.leaf, pss.sub), anchors(pss.root), at=self.at)
        verify_chain(bundle(pss.leaf), anchors(pss.sub), at=self.at)
        verify_chain(bundle(pss.leaf, pss.sub, pss.root), anchors(pss.sub), at=self.at)
        assert self.code(bundle(pss.leaf), anchors(pss.root)) == "untrusted-signer"

    def test_library_would_refuse(self, pss: PssPki, monkeypatch: pytest.MonkeyPatch) -> None:
        # The day this fails, _own_path can go.
        monkeypatch.setattr(chain_module, "_library_can", lambda *_: True)
        monkeypatch.setattr(chain_module, "_own_path", lambda *_: None)
        assert self.code(bundle(pss.leaf, pss.sub), anchors(pss.root)) == "chain-refused"

    @pytest.mark.parametrize(
        ("extensions", "code"),
        [
            (("basicConstraints=CA:FALSE", "extendedKeyUsage=codeSigning"), None),
            (("basicConstraints=CA:FALSE", "extendedKeyUsage=clientAuth"), "leaf-purpose"),
            (("basicConstraints=CA:FALSE", "keyUsage=keyEncipherment"), "leaf-key-usage"),
            (CA_EXTENSIONS, "leaf-is-ca"),
            (("1.3.6.1.4.1.99999.1=critical,ASN1:NULL",), "certificate-refused"),
        ],
    )
    def test_leaf_rules(self, pss: PssPki, extensions: tuple[str, ...], code: str | None) -> None:
        leaf = pss.ca.issue("leaf", pss.leaf_key, extensions, (pss.sub, pss.sub_key), *PSS_64)
        if code is None:
            verify_chain(bundle(leaf, pss.sub), anchors(pss.root), at=self.at)
        else:
            assert self.code(bundle(leaf, pss.sub), anchors(pss.root)) == code

    @pytest.mark.parametrize(
        ("extensions", "code"),
        [
            (("basicConstraints=CA:FALSE",), "not-a-ca"),
            (("subjectKeyIdentifier=hash",), "not-a-ca"),
            (("basicConstraints=CA:TRUE", "keyUsage=digitalSignature"), "ca-key-usage"),
            (("basicConstraints=CA:TRUE", "extendedKeyUsage=clientAuth"), "ca-purpose"),
            (("basicConstraints=CA:TRUE", "1.3.6.1.4.1.99999.1=critical,ASN1:NULL"), "certificate-refused"),
        ],
    )
    def test_ca_rules(self, pss: PssPki, extensions: tuple[str, ...], code: str) -> None:
        sub = pss.ca.issue("sub", pss.sub_key, extensions, (pss.root, pss.root_key), "-sha512")
        assert self.code(bundle(pss.leaf, sub), anchors(pss.root)) == code
        assert self.code(bundle(pss.leaf), anchors(sub)) == code

    def test_path_length(self, pss: PssPki) -> None:
        extensions = ("basicConstraints=critical,CA:TRUE,pathlen:0",)
        root = pss.ca.issue("root", pss.root_key, extensions, None, "-sha512")
        assert self.code(bundle(pss.leaf, pss.sub), anchors(root)) == "path-length"

    def test_validity(self, pss: PssPki) -> None:
        for at, code in ((NOW - DAY, "not-yet-valid"), (NOW + 40 * DAY, "expired")):
            with pytest.raises(TrustRefusal) as caught:
                verify_chain(bundle(pss.leaf, pss.sub), anchors(pss.root), at=at)
            assert caught.value.code == f"certificate-{code}"

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            (("-sha256", "-sigopt", "rsa_pss_saltlen:32"), None),
            (("-sha512", "-sigopt", "rsa_pss_saltlen:-3"), None),  # as long as fits: openssl 3.0's default
            (("-sha512", "-sigopt", "rsa_pss_saltlen:0"), "untrusted-signer"),
            (("-sha512", "-sigopt", "rsa_pss_saltlen:20"), "untrusted-signer"),
            (("-sha512", "-sigopt", "rsa_mgf1_md:sha1"), "untrusted-signer"),
            (("-sha512", "-sigopt", "rsa_mgf1_md:sha256"), "untrusted-signer"),
        ],
    )
    def test_parameters_of_pss(self, pss: PssPki, options: tuple[str, ...], code: str | None) -> None:
        leaf = pss.ca.issue("leaf", pss.leaf_key, LEAF_EXTENSIONS, (pss.sub, pss.sub_key), *options)
        if code is None:
            verify_chain(bundle(leaf), anchors(pss.sub), at=self.at)
        else:
            assert self.code(bundle(leaf), anchors(pss.sub)) == code

    def test_pss_signature_of_a_plain_key(self, pss: PssPki) -> None:
        leaf = pss.ca.issue("leaf", pss.leaf_key, LEAF_EXTENSIONS, (pss.root, pss.root_key), *PSS_64)
        verify_chain(bundle(leaf), anchors(pss.root), at=self.at)

    def test_plain_signature_of_a_pss_key(self, pss: PssPki) -> None:
        # RFC 4055: a key marked id-RSASSA-PSS makes no other signatures. The same numbers, unmarked, do.
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key = load_pem_private_key(pss.sub_key.read_bytes(), None)
        leaf = issue(LEAF.but(not_before=NOW - DAY), Issued(pss.sub, key))
        assert self.code(bundle(leaf), anchors(pss.sub)) == "untrusted-signer"


def test_ed25519_chain() -> None:
    root = issue(ROOT, key=ed25519.Ed25519PrivateKey.generate())
    sub = issue(SUB, root, key=ed25519.Ed25519PrivateKey.generate())
    leaf = issue(LEAF, sub, key=ed25519.Ed25519PrivateKey.generate())
    verify_chain(bundle(leaf, sub), anchors(root), at=NOW)
    late = issue(LEAF.but(not_after=NOW - DAY), sub)
    assert code_of(bundle(late, sub), anchors(root)) == "certificate-expired"
    not_ca = issue(SUB.but(ca=False, key_usage=CERT_SIGN), root, key=sub.key)
    assert code_of(bundle(leaf, not_ca), anchors(root)) == "not-a-ca"
