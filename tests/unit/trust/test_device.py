# SPDX-License-Identifier: Apache-2.0
"""Device certificates: whatever an attacker may choose of one, a thing at a time, is refused by its name."""

from __future__ import annotations

import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
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
    usage,
)
from trustme_init.errors import TrustRefusal
from trustme_init.trust import chain as chain_module
from trustme_init.trust.anchors import AnchorSet, Purpose, Revocations
from trustme_init.trust.chain import verify_chain
from trustme_init.trust.device import (
    DeviceCertificate,
    named_uuid,
    uris,
    verify_device_certificate,
    verify_peer_certificate,
)

MINE = uuid.UUID("6f9619ff-8b86-4011-b42d-00cf4fc964ff")
OTHER = uuid.UUID("11111111-2222-4333-8444-555555555555")
KEY = ec.generate_private_key(ec.SECP256R1())
SERVER_AUTH = x509.ExtendedKeyUsage([Eku.SERVER_AUTH])


def spki(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def san(*names: str | x509.GeneralName, critical: bool = False) -> tuple[x509.ExtensionType, bool]:
    general = [x509.UniformResourceIdentifier(name) if isinstance(name, str) else name for name in names]
    return x509.SubjectAlternativeName(general), critical


def eku(*purposes: x509.ObjectIdentifier) -> x509.ExtendedKeyUsage:
    return x509.ExtendedKeyUsage(purposes)


DEVICE = Wish(
    "generic 0000",
    key_usage=usage("digital_signature", "content_commitment", "key_encipherment"),
    purpose=CLIENT_AUTH,
    more=(san(f"UUID:{MINE}"),),
)
"""As upstream's CSR asks for it: the interoperability notes, section 2.8."""


FUZZ_ROOT = issue(ROOT)


def trusted_devices(*issued: Issued, revocations: Revocations | None = None) -> AnchorSet:
    return anchors(*issued, purpose=Purpose.DEVICE, revocations=revocations)


def verify(pem: bytes, trusted: AnchorSet, public_key: bytes | None = None) -> DeviceCertificate:
    return verify_device_certificate(
        pem,
        public_key=spki(KEY) if public_key is None else public_key,
        device_uuid=MINE,
        anchors=trusted,
        at=NOW,
    )


def refusal(pem: bytes, trusted: AnchorSet, public_key: bytes | None = None) -> TrustRefusal:
    with pytest.raises(TrustRefusal) as caught:
        verify(pem, trusted, public_key)
    assert caught.value.cause
    assert caught.value.remedy
    assert "guestos sign" not in caught.value.remedy
    return caught.value


def peer_code(pem: bytes, trusted: AnchorSet) -> str:
    with pytest.raises(TrustRefusal) as caught:
        verify_peer_certificate(pem, anchors=trusted, at=NOW)
    assert caught.value.remedy
    return caught.value.code


@dataclass(frozen=True)
class Case:
    """A device's chain, what becomes of it as our own (`code`), and as a peer's."""

    name: str
    leaf: Wish = DEVICE
    sub: Wish | None = SUB
    root: Wish = ROOT
    code: str | None = None
    peer: str | None = None
    openssl: bool = True
    """As the chain of a TLS client: what openssl knows of our rules."""

    def build(self) -> tuple[bytes, AnchorSet]:
        root = issue(self.root)
        sub = issue(self.sub, root) if self.sub else None
        leaf = issue(self.leaf, sub or root, key=KEY)
        return bundle(leaf, *([sub] if sub else [])), trusted_devices(root)


MISMATCH = "device-uuid-mismatch"
PAST = {"not_after": NOW - DAY}
LATE = {"not_before": NOW + DAY}
POISON = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
NAME_CONSTRAINTS = x509.NameConstraints([x509.DNSName("example.org")], None)
MATRIX = [
    Case("upstream"),
    Case("straight under the root", sub=None),
    Case("UUID in capitals", DEVICE.but(more=(san(f"UUID:{MINE}".upper()),))),
    Case("scheme in small letters", DEVICE.but(more=(san(f"uuid:{MINE}"),))),
    Case("critical name", DEVICE.but(more=(san(f"UUID:{MINE}", critical=True),))),
    Case("other names beside", DEVICE.but(
        more=(san(x509.DNSName("device.example"), "https://example.org/uuid:x", f"UUID:{MINE}"),))),
    Case("client and server", DEVICE.but(purpose=eku(Eku.CLIENT_AUTH, Eku.SERVER_AUTH))),
    Case("CAs for clients", sub=SUB.but(purpose=CLIENT_AUTH), root=ROOT.but(purpose=CLIENT_AUTH)),
    Case("CA for any purpose", sub=SUB.but(purpose=eku(Eku.ANY_EXTENDED_KEY_USAGE)), openssl=False),
    # Subject
    Case("another subject", DEVICE.but(subject=str(OTHER))),
    Case("UUID in the subject only", DEVICE.but(subject=f"UUID:{MINE}", more=()), code=MISMATCH),
    # Subject alternative name
    Case("another UUID", DEVICE.but(more=(san(f"UUID:{OTHER}"),)), code=MISMATCH),
    Case("no UUID", DEVICE.but(more=()), code=MISMATCH),
    Case("no URI", DEVICE.but(more=(san(x509.DNSName("device.example")),)), code=MISMATCH),
    Case("UUID as a DNS name", DEVICE.but(more=(san(x509.DNSName(f"UUID:{MINE}")),)), code=MISMATCH),
    Case("UUID as a mail address", DEVICE.but(more=(san(x509.RFC822Name(f"UUID:{MINE}")),)), code=MISMATCH),
    Case("UUID of the issuer", DEVICE.but(more=((x509.IssuerAlternativeName(
        [x509.UniformResourceIdentifier(f"UUID:{MINE}")]), False),)), code=MISMATCH),
    Case("two UUIDs", DEVICE.but(more=(san(f"UUID:{MINE}", f"UUID:{OTHER}"),)),
         code=MISMATCH, peer="peer-uuid"),
    Case("two UUIDs, ours last", DEVICE.but(more=(san(f"UUID:{OTHER}", f"UUID:{MINE}"),)),
         code=MISMATCH, peer="peer-uuid"),
    Case("ours twice", DEVICE.but(more=(san(f"UUID:{MINE}", f"uuid:{MINE}"),)),
         code=MISMATCH, peer="peer-uuid"),
    Case("another as a URN", DEVICE.but(more=(san(f"UUID:{MINE}", f"urn:uuid:{OTHER}"),)),
         code=MISMATCH, peer="peer-uuid"),
    Case("ours as a URN only", DEVICE.but(more=(san(f"urn:uuid:{MINE}"),)), code=MISMATCH, peer="peer-uuid"),
    Case("ours and more", DEVICE.but(more=(san(f"UUID:{MINE}{OTHER}"),)), code=MISMATCH, peer="peer-uuid"),
    Case("ours and a line end", DEVICE.but(more=(san(f"UUID:{MINE}\n"),)), code=MISMATCH, peer="peer-uuid"),
    Case("ours in braces", DEVICE.but(more=(san(f"UUID:{{{MINE}}}"),)), code=MISMATCH, peer="peer-uuid"),
    Case("ours without dashes", DEVICE.but(more=(san(f"UUID:{MINE.hex}"),)), code=MISMATCH, peer="peer-uuid"),
    Case("ours behind a blank", DEVICE.but(more=(san(f"UUID: {MINE}"),)), code=MISMATCH, peer="peer-uuid"),
    Case("ours inside a URI", DEVICE.but(more=(san(f"https://UUID:{MINE}"),)), code=MISMATCH),
    # Purposes
    Case("no purpose", DEVICE.but(purpose=None), code="device-purpose", peer="peer-purpose"),
    Case("for code signing", DEVICE.but(purpose=CODE_SIGNING), openssl=False,
         code="device-purpose", peer="peer-purpose"),
    Case("for code signing too", DEVICE.but(purpose=eku(Eku.CLIENT_AUTH, Eku.CODE_SIGNING)),
         code="device-purpose", peer="peer-purpose"),
    Case("for any purpose", DEVICE.but(purpose=eku(Eku.ANY_EXTENDED_KEY_USAGE)),
         openssl=False, code="device-purpose", peer="peer-purpose"),
    Case("for any purpose too", DEVICE.but(purpose=eku(Eku.CLIENT_AUTH, Eku.ANY_EXTENDED_KEY_USAGE)),
         code="device-purpose", peer="peer-purpose"),
    Case("for servers", DEVICE.but(purpose=SERVER_AUTH), code="device-purpose", openssl=False),
    Case("no key usage", DEVICE.but(key_usage=None), code="device-purpose"),
    Case("may not sign", DEVICE.but(key_usage=usage("key_encipherment")), openssl=False,
         code="device-purpose", peer="peer-purpose"),
    Case("commits only", DEVICE.but(key_usage=usage("content_commitment")), openssl=False,
         code="device-purpose", peer="peer-purpose"),
    Case("may certify", DEVICE.but(key_usage=usage("digital_signature", "key_cert_sign")),
         code="device-purpose", peer="peer-purpose"),
    Case("is a CA", DEVICE.but(ca=True), code="leaf-is-ca", peer="leaf-is-ca"),
    # Path: the same rules as for software
    Case("expired", DEVICE.but(**PAST),
         code="certificate-expired", peer="certificate-expired", openssl=False),
    Case("too early", DEVICE.but(**LATE),
         code="certificate-not-yet-valid", peer="certificate-not-yet-valid", openssl=False),
    Case("anchor expired", root=ROOT.but(**PAST),
         code="certificate-expired", peer="certificate-expired", openssl=False),
    Case("sub CA expired", sub=SUB.but(**PAST),
         code="certificate-expired", peer="certificate-expired", openssl=False),
    Case("sub CA is none", sub=SUB.but(ca=False, key_usage=None),
         code="not-a-ca", peer="not-a-ca", openssl=False),
    Case("sub CA may not certify", sub=SUB.but(key_usage=usage("digital_signature")),
         code="ca-key-usage", peer="ca-key-usage", openssl=False),
    Case("sub CA for software", sub=SUB.but(purpose=CODE_SIGNING),
         code="ca-purpose", peer="ca-purpose", openssl=False),
    Case("root for software", root=ROOT.but(purpose=CODE_SIGNING),
         code="ca-purpose", peer="ca-purpose", openssl=False),
    Case("path length", root=ROOT.but(path_length=0), code="path-length", peer="path-length", openssl=False),
    Case("name constraints", sub=SUB.but(more=((NAME_CONSTRAINTS, True),)),
         code="name-constraints", peer="name-constraints"),
    Case("unknown critical extension", DEVICE.but(more=((POISON, True), san(f"UUID:{MINE}"))),
         code="certificate-refused", peer="certificate-refused", openssl=False),
]  # fmt: skip
CASES = pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name.replace(" ", "-"))
ROUTES = pytest.mark.parametrize("route", ["_library_path", "_own_path"])


@CASES
@ROUTES
def test_row08_only_what_is_for_this_device(case: Case, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "_library_can", lambda *_: route == "_library_path")
    pem, trusted = case.build()
    if case.code is not None:
        assert refusal(pem, trusted).code == case.code
        return
    found = verify(pem, trusted)
    leaf = chain_module.parse_bundle(pem)[0]
    assert found.leaf_der == leaf.public_bytes(Encoding.DER)
    assert found.sha256 == found.fingerprints[0] == leaf.fingerprint(hashes.SHA256()).hex()
    assert found.fingerprints[-1] == found.anchor.sha256_fingerprint == trusted.anchors[0].sha256_fingerprint
    assert (found.uuid, found.not_after) == (MINE, DEVICE.not_after)
    assert found.subject == f"CN={case.leaf.subject}"


@CASES
def test_library_refuses_chains_by_itself(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "_library_can", lambda *_: True)
    monkeypatch.setattr(chain_module, "_own_path", lambda *_: None)
    pem, trusted = case.build()
    if case.code is None:
        verify(pem, trusted)
    else:
        assert refusal(pem, trusted).code in {"chain-refused", "device-uuid-mismatch"}


@CASES
def test_openssl_knows_no_more_reasons(case: Case, tmp_path: Path) -> None:
    pem, trusted = case.build()
    (tmp_path / "chain.pem").write_bytes(pem)
    (tmp_path / "anchor.pem").write_bytes(
        x509.load_der_x509_certificate(trusted.anchors[0].certificate).public_bytes(Encoding.PEM)
    )
    command = (
        *("openssl", "verify", "-partial_chain", "-no-CAfile", "-no-CApath", "-purpose", "sslclient"),
        *("-attime", str(int(NOW.timestamp())), "-trusted", "anchor.pem", "-untrusted", "chain.pem"),
    )
    result = subprocess.run([*command, "chain.pem"], cwd=tmp_path, capture_output=True, check=False)
    assert (result.returncode == 0) == case.openssl, result.stderr.decode()


@CASES
@ROUTES
def test_peers(case: Case, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "_library_can", lambda *_: route == "_library_path")
    pem, trusted = case.build()
    if case.peer is not None:
        assert peer_code(pem, trusted) == case.peer
        return
    found = verify_peer_certificate(pem, anchors=trusted, at=NOW)
    assert found.anchor in trusted.anchors
    names = [name for name in uris(chain_module.parse_bundle(pem)[0]) if name.upper().startswith("UUID:")]
    assert found.uuid == (uuid.UUID(names[0][5:]) if names else None)


def test_row08_a_certificate_for_another_key_is_refused() -> None:
    root = issue(ROOT)
    pem = bundle(issue(DEVICE, root))
    assert refusal(pem, trusted_devices(root)).code == "device-key-mismatch"
    pem = bundle(issue(DEVICE, root, key=KEY))
    verify(pem, trusted_devices(root))
    for other in (b"", spki(KEY)[:-1], spki(ec.generate_private_key(ec.SECP384R1()))):
        assert refusal(pem, trusted_devices(root), other).code == "device-key-mismatch"


def test_row08_a_certificate_under_another_anchor_is_refused() -> None:
    root, impostor = issue(ROOT), issue(ROOT)
    leaf = issue(DEVICE, impostor, key=KEY)
    trusted = trusted_devices(root)
    for pem in (bundle(leaf), bundle(leaf, impostor)):
        assert refusal(pem, trusted).code == "untrusted-signer"
        assert peer_code(pem, trusted) == "untrusted-signer"
    assert refusal(bundle(issue(DEVICE, key=KEY)), trusted).code == "untrusted-signer"
    assert refusal(bundle(leaf), trusted_devices()).code == "untrusted-signer"


def test_row08_a_chain_with_a_wrong_intermediate_is_refused() -> None:
    root = issue(ROOT)
    sub, other = issue(SUB, root), issue(SUB, root)
    leaf = issue(DEVICE, sub, key=KEY)
    trusted = trusted_devices(root)
    verify(bundle(leaf, sub), trusted)
    assert refusal(bundle(leaf, other), trusted).code == "chain-broken"
    assert refusal(bundle(leaf, other, sub), trusted).code == "chain-broken"
    assert refusal(bundle(sub, leaf), trusted).code == "chain-broken"
    assert refusal(bundle(leaf), trusted).code == "untrusted-signer"
    assert refusal(bundle(leaf, leaf), trusted).code == "chain-duplicate"
    # Another device's leaf is no intermediate, whatever it has signed.
    neighbour = issue(DEVICE.but(subject="neighbour"), sub)
    assert refusal(bundle(issue(DEVICE, neighbour, key=KEY), neighbour, sub), trusted).code == "not-a-ca"


def test_four_certificates_and_not_five() -> None:
    root = issue(ROOT)
    chain = [root]
    for name in ("one", "two", "three", "four"):
        chain.insert(0, issue(SUB.but(subject=name), chain[0]))
    leaf = issue(DEVICE, chain[0], key=KEY)
    assert refusal(bundle(leaf, *chain[:-1]), trusted_devices(root)).code == "chain-too-long"
    leaf = issue(DEVICE, chain[1], key=KEY)
    assert len(verify(bundle(leaf, *chain[1:-1]), trusted_devices(root)).fingerprints) == 5


def test_row08_software_anchors_vouch_for_no_device_and_the_other_way_round() -> None:
    root = issue(ROOT)
    pem = bundle(issue(DEVICE, root, key=KEY))
    verify(pem, trusted_devices(root))
    for purpose in (Purpose.CORE, Purpose.GUEST):
        assert refusal(pem, anchors(root, purpose=purpose)).code == "wrong-purpose"
        assert peer_code(pem, anchors(root, purpose=purpose)) == "wrong-purpose"
        # Nor does a device's certificate sign software where somebody made one CA an anchor of both.
        with pytest.raises(TrustRefusal) as caught:
            verify_chain(pem, anchors(root, purpose=purpose), at=NOW)
        assert caught.value.code == "leaf-purpose"
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(bundle(issue(LEAF, root)), trusted_devices(root), at=NOW)
    assert caught.value.code == "wrong-purpose"


@pytest.mark.parametrize("target", ["leaf", "sub", "root"])
def test_row16_revoked_anywhere_in_the_chain(target: str) -> None:
    made = {"root": issue(ROOT)}
    made["sub"] = issue(SUB, made["root"])
    made["leaf"] = issue(DEVICE, made["sub"], key=KEY)
    pem = bundle(made["leaf"], made["sub"])
    verify(pem, trusted_devices(made["root"]))
    revoked = trusted_devices(made["root"], revocations=Revocations(certificates=(made[target].der,)))
    assert refusal(pem, revoked).code == "certificate-revoked"
    assert peer_code(pem, revoked) == "certificate-revoked"


class TestServers:
    """A backend that is no client, and what the CAs above it say."""

    def test_a_server_without_uuid(self) -> None:
        root = issue(ROOT)
        backend = DEVICE.but(purpose=SERVER_AUTH, key_usage=None, more=(san(x509.DNSName("backend")),))
        assert (
            verify_peer_certificate(bundle(issue(backend, root)), anchors=trusted_devices(root), at=NOW).uuid
            is None
        )

    def test_purposes_must_fit_all_the_way_up(self) -> None:
        server, both = DEVICE.but(purpose=SERVER_AUTH), eku(Eku.CLIENT_AUTH, Eku.SERVER_AUTH)
        servers, clients = ROOT.but(purpose=SERVER_AUTH), ROOT.but(purpose=CLIENT_AUTH)
        for wish, root_wish, code in (
            (server, servers, None),
            (DEVICE.but(purpose=both), servers, None),
            (DEVICE.but(purpose=both), clients, None),
            (server, clients, "ca-purpose"),
            (DEVICE, servers, "ca-purpose"),
        ):
            root = issue(root_wish)
            pem, trusted = bundle(issue(wish, root)), trusted_devices(root)
            if code is None:
                verify_peer_certificate(pem, anchors=trusted, at=NOW)
            else:
                assert peer_code(pem, trusted) == code


class TestOpenssl:
    """Chains that the openssl program made, of the kinds of keys that upstream has."""

    at = NOW + DAY / 2
    extensions = (
        "basicConstraints=CA:FALSE",
        "keyUsage=critical,digitalSignature,keyEncipherment,nonRepudiation",
        "extendedKeyUsage=clientAuth",
        f"subjectAltName=URI:UUID:{MINE}",
    )

    def verify(self, pem: bytes, trusted: AnchorSet, public_key: bytes) -> DeviceCertificate:
        return verify_device_certificate(
            pem, public_key=public_key, device_uuid=MINE, anchors=trusted, at=self.at
        )

    def test_an_rsa_device_under_each_kind_of_ca(self, openssl_ca: OpensslCa, pss: PssPki) -> None:
        key = openssl_ca.key("device", "RSA")
        for issuer, issuer_key in ((pss.root, pss.root_key), (pss.sub, pss.sub_key)):
            leaf = openssl_ca.issue("generic 0000", key, self.extensions, (issuer, issuer_key), "-sha256")
            public_key = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            trusted = anchors(issuer, purpose=Purpose.DEVICE)
            assert self.verify(bundle(leaf), trusted, public_key).uuid == MINE
            with pytest.raises(TrustRefusal) as caught:
                self.verify(bundle(leaf), trusted, spki(KEY))
            assert caught.value.code == "device-key-mismatch"

    def test_a_ca_for_clients_only(self, openssl_ca: OpensslCa) -> None:
        root_key = openssl_ca.key("device-root", "RSA")
        root = openssl_ca.issue(
            "device root", root_key, (*CA_EXTENSIONS, "extendedKeyUsage=clientAuth"), None, "-sha256"
        )
        key = openssl_ca.key("device", "RSA")
        leaf = openssl_ca.issue("generic 0000", key, self.extensions, (root, root_key), "-sha256")
        public_key = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert self.verify(bundle(leaf), anchors(root, purpose=Purpose.DEVICE), public_key).uuid == MINE

    def test_two_extensions_that_name_somebody(self) -> None:
        # No tool makes it: the second extension is issuerAltName until its identifier is changed.
        root = issue(ROOT)
        alternative = x509.IssuerAlternativeName([x509.UniformResourceIdentifier(f"UUID:{OTHER}")])
        made = issue(DEVICE.but(more=(san(f"UUID:{MINE}"), (alternative, False))), root, key=KEY)
        tbs = made.certificate.tbs_certificate_bytes.replace(b"\x55\x1d\x12", b"\x55\x1d\x11")
        assert tbs != made.certificate.tbs_certificate_bytes
        signature = root.key.sign(tbs, ec.ECDSA(hashes.SHA256()))
        bits = b"\x03" + bytes([len(signature) + 1]) + b"\x00" + signature
        body = tbs + bytes.fromhex("300a06082a8648ce3d040302") + bits
        der = b"\x30\x82" + len(body).to_bytes(2, "big") + body
        pem = bundle(x509.load_der_x509_certificate(der))
        assert refusal(pem, trusted_devices(root)).code == "chain-malformed"

    def test_a_name_that_is_no_text(self) -> None:
        raw = x509.UnrecognizedExtension(x509.OID_SUBJECT_ALTERNATIVE_NAME, b"\x30\x04\x86\x02\xff\xfe")
        root = issue(ROOT)
        pem = bundle(issue(DEVICE.but(more=((raw, False),)), root, key=KEY))
        assert refusal(pem, trusted_devices(root)).code == "chain-malformed"


SCHEMES = ("uuid:", "urn:uuid:")
CASES_OF_LETTERS = st.sampled_from([str.lower, str.upper, str.title])
PROPER = st.tuples(st.uuids(), CASES_OF_LETTERS).map(lambda made: (made[1](f"uuid:{made[0]}"), made[0]))
OPEN_ENDED = st.uuids().map(str) | st.uuids().map(lambda each: each.hex) | st.text(max_size=40)
IMPROPER = st.tuples(
    CASES_OF_LETTERS,
    st.tuples(st.just("uuid:"), OPEN_ENDED, st.sampled_from(["\n", " ", "0", "}"])).map("".join)
    | st.tuples(st.just("urn:uuid:"), OPEN_ENDED).map("".join),
).map(lambda made: (made[0](made[1][:9]) + made[1][9:], None))
UNRELATED = st.text(max_size=60).filter(lambda text: not text.lower().startswith(SCHEMES))


@given(st.lists(PROPER | IMPROPER, max_size=3), st.lists(UNRELATED, max_size=3), st.randoms())
def test_row08_a_uuid_is_named_once_or_not_at_all(
    naming: list[tuple[str, uuid.UUID | None]], unrelated: list[str], random: Random
) -> None:
    names = [*(name for name, _ in naming), *unrelated]
    random.shuffle(names)
    match naming:
        case []:
            assert named_uuid(names) is None
        case [(_, uuid.UUID() as made)]:
            assert named_uuid(names) == made
        case _:
            with pytest.raises(ValueError) as caught:
                named_uuid(names)
            assert str(caught.value).isascii()


@given(st.binary(max_size=60))
def test_row08_arbitrary_names_in_a_certificate_never_pass(content: bytes) -> None:
    raw = x509.UnrecognizedExtension(x509.OID_SUBJECT_ALTERNATIVE_NAME, content)
    pem = bundle(issue(DEVICE.but(more=((raw, False),)), FUZZ_ROOT, key=KEY))
    assert refusal(pem, trusted_devices(FUZZ_ROOT)).code in {"chain-malformed", "device-uuid-mismatch"}
