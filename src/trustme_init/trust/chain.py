# SPDX-License-Identifier: Apache-2.0
"""From a PEM bundle to a signer that an anchor vouches for.

Rules:
- The bundle is exactly what OpenSSL writes (64 columns, LF), one to four certificates, leaf first, each
  signed by the next; no text between them, none twice. The last one is an anchor, signed by one, or a
  self-signed root. So every byte of the bundle is covered by a signature: no bit of it can be changed, but
  for the second form that every ECDSA signature has (`certificate.digests`).
- Every certificate in it meets the rules of `certificate` for form, key and signature, and none is revoked,
  nor is the anchor.
- The path from the leaf ends at the first anchor reached, at the latest after four certificates. An
  intermediate CA that is an anchor ends it like a root does (partial chain).
- All certificates of the path are valid at the time given, **the anchor included**: an entry in `db` has no
  other end of life than the one its owner wrote into it, and the library knows no exception. The leaf, made
  with a shorter life, expires first anyway.
- Path length counts every CA below, self-issued ones too, as the library does: stricter than RFC 5280
  section 6.1.4.

The library builds the path wherever it can. It knows no issuers with id-RSASSA-PSS or Ed25519 keys, and of
PSS signatures only those with a salt as long as the digest; where one of these is in play, the short
`_own_path` replaces its search. The rules for each single certificate stay the library's, there too
(`certificate.role_fault`).
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import PublicKeyAlgorithmOID, SignatureAlgorithmOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from trustme_init.errors import TrustRefusal
from trustme_init.trust import certificate as certificates
from trustme_init.trust.anchors import Anchor, AnchorSet, Purpose
from trustme_init.trust.certificate import CA, LEAF, Fault

CHAIN_LIMIT: Final = 4
"""Certificates in a bundle: leaf, sub CA, root and one to spare."""
BUNDLE_LIMIT: Final = 32 * 1024
"""Bytes of a bundle; four RSA-4096 certificates have about 8 KiB."""
SIGNING_PURPOSES: Final = frozenset({Purpose.CORE, Purpose.GUEST})

_BLOCK: Final = re.compile(rb"-----BEGIN CERTIFICATE-----\n([A-Za-z0-9+/=\n]+)\n-----END CERTIFICATE-----\n")
_COLUMNS: Final = 64
_REMEDY: Final = "sign again with a certificate whose issuer is enrolled (`trustme guestos sign`)"


@dataclass(frozen=True, slots=True)
class VerifiedSigner:
    """Who signed, as far as an anchor vouches for it."""

    leaf_der: bytes
    subject: str
    fingerprints: tuple[str, ...]
    """SHA-256 (hex) of the path's certificates, leaf first, anchor last."""
    anchor: Anchor

    @property
    def sha256_fingerprint(self) -> str:
        """SHA-256 (hex) of the leaf."""
        return self.fingerprints[0]


def verify_chain(pem: bytes, anchors: AnchorSet, *, at: datetime) -> VerifiedSigner:
    """Return the leaf of a PEM bundle, vouched for at the moment `at` (aware) by one of `anchors`.

    TrustRefusal: "wrong-purpose", "chain-too-large", "chain-malformed", "chain-too-long", "chain-duplicate",
    "chain-broken", "untrusted-signer", "path-length", "certificate-revoked", "chain-refused", or a code of
    `certificate` (weak-key, weak-signature, certificate-expired, not-a-ca, leaf-purpose, ...).
    """
    if at.tzinfo is None:
        raise ValueError("the time of judgement needs a time zone")
    if anchors.purpose not in SIGNING_PURPOSES:
        raise TrustRefusal(
            "wrong-purpose",
            f"anchors for the purpose {anchors.purpose.value} vouch for no software",
            remedy="a mistake in the calling code: report it",
        )
    chain = parse_bundle(pem)
    trusted = [(anchor, certificates.load(anchor.certificate)) for anchor in anchors.anchors]
    _screen(chain, [certificate for _, certificate in trusted], anchors)
    if _library_can(chain, [certificate for _, certificate in trusted]):
        path = _library_path(chain, [certificate for _, certificate in trusted], at)
    else:
        path = _own_path(chain, [certificate for _, certificate in trusted], at)
    if (fault := certificates.form_fault(path[-1])) is not None:
        raise _fault(fault, path[-1])
    _require_unrevoked(path[-1:], anchors)
    return VerifiedSigner(
        leaf_der=path[0].public_bytes(Encoding.DER),
        subject=certificates.subject_text(path[0]),
        fingerprints=tuple(
            certificates.fingerprint(certificate.public_bytes(Encoding.DER)) for certificate in path
        ),
        anchor=next(anchor for anchor, certificate in trusted if certificate == path[-1]),
    )


def parse_bundle(pem: bytes) -> list[x509.Certificate]:
    """Parse a PEM bundle strictly; TrustRefusal "chain-…" as `verify_chain` lists them."""
    if len(pem) > BUNDLE_LIMIT:
        raise _refuse("chain-too-large", f"the certificate file is larger than {BUNDLE_LIMIT} bytes")
    ders = []
    position = 0
    while position < len(pem):
        block = _BLOCK.match(pem, position)
        if block is None:
            raise _malformed(f"no certificate block at byte {position}")
        ders.append(_decode(block[1], position))
        position = block.end()
        if len(ders) > CHAIN_LIMIT:
            raise _refuse("chain-too-long", f"the certificate file has more than {CHAIN_LIMIT} certificates")
    if not ders:
        raise _malformed("empty")
    if len(set(ders)) != len(ders):
        raise _refuse("chain-duplicate", "a certificate is in the certificate file twice")
    try:
        return [certificates.load(der) for der in ders]
    except certificates.MalformedCertificateError as exc:
        raise _malformed(str(exc)) from exc


def _decode(text: bytes, position: int) -> bytes:
    """Return the DER of one block; only one text is accepted for each DER."""
    try:
        der = base64.b64decode(text.replace(b"\n", b""), validate=True)
    except binascii.Error as exc:
        raise _malformed(f"block at byte {position}: {exc}") from exc
    encoded = base64.b64encode(der)
    lines = [encoded[start : start + _COLUMNS] for start in range(0, len(encoded), _COLUMNS)]
    if b"\n".join(lines) != text:
        raise _malformed(f"block at byte {position}: not the canonical text of its certificate")
    return der


def _screen(
    chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate], anchors: AnchorSet
) -> None:
    """Apply what holds for every certificate of the bundle, wherever the path will end."""
    for certificate in chain:
        fault = certificates.form_fault(certificate) or certificates.signature_fault(certificate)
        if fault is not None:
            raise _fault(fault, certificate)
    _require_unrevoked(chain, anchors)
    for certificate, issuer in itertools.pairwise(chain):
        if not certificates.is_signed_by(certificate, issuer):
            raise _refuse(
                "chain-broken",
                "a certificate in the file is not signed by the one after it",
                certificate,
            )
    last = chain[-1]
    if last in trusted or certificates.is_signed_by(last, last):
        return
    if not any(certificates.is_signed_by(last, anchor) for anchor in trusted):
        raise _untrusted(last)


def _require_unrevoked(chain: Sequence[x509.Certificate], anchors: AnchorSet) -> None:
    for certificate in chain:
        if (reason := anchors.revocations.reason(certificate)) is not None:
            raise TrustRefusal(
                "certificate-revoked",
                "a certificate of the signer's chain is revoked in dbx",
                evidence=f"{_describe(certificate)}: {reason}",
                remedy="sign with a certificate that is not revoked",
            )


def _library_can(chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate]) -> bool:
    """Whether every possible issuer's key, and every signature, is of a kind that the library knows."""
    names = {certificate.issuer for certificate in chain}
    issuers = [*chain[1:], *(anchor for anchor in trusted if anchor.subject in names)]
    unknown_keys = {PublicKeyAlgorithmOID.RSASSA_PSS, PublicKeyAlgorithmOID.ED25519}
    return not any(issuer.public_key_algorithm_oid in unknown_keys for issuer in issuers) and not any(
        certificate.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS for certificate in chain
    )


def _library_path(
    chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate], at: datetime
) -> list[x509.Certificate]:
    verifier = (
        PolicyBuilder()
        .time(at)
        .store(Store(list(trusted)))
        .max_chain_depth(CHAIN_LIMIT - 1)
        .extension_policies(ca_policy=CA.policy(), ee_policy=LEAF.policy())
        .build_client_verifier()
    )
    try:
        return verifier.verify(chain[0], list(chain[1:])).chain
    except VerificationError as exc:
        # The library has refused; its reason is a sentence. Ours has a code, and the same rules.
        _own_path(chain, trusted, at)
        raise _refuse("chain-refused", f"the library refuses the chain: {exc}", chain[0]) from exc


def _own_path(
    chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate], at: datetime
) -> list[x509.Certificate]:
    """Follow the bundle upwards until an anchor issued a certificate; `_screen` has accepted it.

    The refusal of the last step tried is the one reported.
    """
    if (fault := certificates.role_fault(chain[0], LEAF, at)) is not None:
        raise _fault(fault, chain[0])
    refusal = None
    for depth, certificate in enumerate(chain):
        for anchor in trusted:
            if not certificates.is_signed_by(certificate, anchor):
                continue
            if (refusal := _issuer_refusal(anchor, depth, at)) is None:
                return [*chain[: depth + 1], anchor]
        if depth + 1 == len(chain):
            break
        # _screen has seen that the next one made the signature. Whether it may is the question here.
        if (next_refusal := _issuer_refusal(chain[depth + 1], depth, at)) is not None:
            raise next_refusal
    raise refusal or _untrusted(chain[-1])


def _issuer_refusal(issuer: x509.Certificate, depth: int, at: datetime) -> TrustRefusal | None:
    """Judge an issuer with `depth` CA certificates below it (RFC 5280 section 6.1.4, k to n)."""
    if (fault := certificates.role_fault(issuer, CA, at)) is not None:
        return _fault(fault, issuer)
    limit = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    if limit is not None and depth > limit:
        return _refuse("path-length", f"a CA with path length {limit} has {depth} CAs below it", issuer)
    return None


def _describe(certificate: x509.Certificate) -> str:
    der = certificate.public_bytes(Encoding.DER)
    return f"{certificates.subject_text(certificate)} sha256:{certificates.fingerprint(der)[:16]}"


def _fault(fault: Fault, certificate: x509.Certificate) -> TrustRefusal:
    validity = f"valid {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}"
    return TrustRefusal(
        fault.code, fault.cause, evidence=f"{_describe(certificate)}, {validity}", remedy=_REMEDY
    )


def _untrusted(certificate: x509.Certificate) -> TrustRefusal:
    return TrustRefusal(
        "untrusted-signer",
        "no anchor vouches for the signer",
        evidence=f"last certificate of the chain: {_describe(certificate)}",
        remedy="enrol the signer's CA, or sign with a certificate of an enrolled one",
    )


def _refuse(code: str, cause: str, certificate: x509.Certificate | None = None) -> TrustRefusal:
    evidence = _describe(certificate) if certificate is not None else ""
    return TrustRefusal(code, cause, evidence=evidence, remedy=_REMEDY)


def _malformed(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "chain-malformed",
        "the certificate file is not a plain sequence of PEM certificates",
        evidence=evidence,
        remedy=_REMEDY,
    )
