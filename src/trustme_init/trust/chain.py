# SPDX-License-Identifier: Apache-2.0
"""From a PEM bundle to a signer, or to a device, that an anchor vouches for.

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
- What the chain is for (`Use`) says which rules its leaf and its CAs meet, and of which purpose the anchors
  are. Everything else is the same for software and for devices.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import PublicKeyAlgorithmOID, SignatureAlgorithmOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from trustme_init.errors import TrustRefusal
from trustme_init.trust import certificate as certificates
from trustme_init.trust.anchors import Anchor, AnchorSet, Purpose
from trustme_init.trust.certificate import CA, LEAF, Fault, Role, describe

CHAIN_LIMIT: Final = 4
"""Certificates in a bundle: leaf, sub CA, root and one to spare."""
BUNDLE_LIMIT: Final = 32 * 1024
"""Bytes of a bundle; four RSA-4096 certificates have about 8 KiB."""
SIGNING_PURPOSES: Final = frozenset({Purpose.CORE, Purpose.GUEST})

_BLOCK: Final = re.compile(rb"-----BEGIN CERTIFICATE-----\n([A-Za-z0-9+/=\n]+)\n-----END CERTIFICATE-----\n")
_COLUMNS: Final = 64
_EXCLUDED_SHOWN: Final = 4
_REMEDY: Final = "sign again with a certificate whose issuer is enrolled (`trustme guestos sign`)"


class MalformedPemError(ValueError):
    """The bytes are not a plain sequence of PEM certificate blocks."""


class Use(NamedTuple):
    """What a chain is to prove: the rules for its leaf and its CAs, and whose anchors count."""

    leaf: Role
    ca: Role
    purposes: frozenset[Purpose]
    vouches_for: str
    """In words: "anchors for the purpose … vouch for no …"."""


SOFTWARE: Final = Use(LEAF, CA, SIGNING_PURPOSES, "software")


class VerifiedPath(NamedTuple):
    """A path that holds: leaf first, `anchor`'s certificate last."""

    certificates: tuple[x509.Certificate, ...]
    anchor: Anchor

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """SHA-256 (hex) of the path's certificates."""
        return tuple(
            certificates.fingerprint(certificate.public_bytes(Encoding.DER))
            for certificate in self.certificates
        )


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
    path = verify_path(pem, anchors, SOFTWARE, at=at)
    leaf = path.certificates[0]
    return VerifiedSigner(
        leaf_der=leaf.public_bytes(Encoding.DER),
        subject=certificates.subject_text(leaf),
        fingerprints=path.fingerprints,
        anchor=path.anchor,
    )


def verify_path(pem: bytes, anchors: AnchorSet, use: Use, *, at: datetime) -> VerifiedPath:
    """Return the path from the leaf of a PEM bundle to the anchor that vouches for it, for one use.

    Refusals as `verify_chain` lists them; those of a leaf that does not suit the use are the use's own.
    """
    if at.tzinfo is None:
        raise ValueError("the time of judgement needs a time zone")
    if anchors.purpose not in use.purposes:
        raise TrustRefusal(
            "wrong-purpose",
            f"anchors for the purpose {anchors.purpose.value} vouch for no {use.vouches_for}",
            remedy="a mistake in the calling code: report it",
        )
    chain = parse_bundle(pem)
    loaded = [(anchor, certificates.load(anchor.certificate)) for anchor in anchors.anchors]
    trusted = [certificate for _, certificate in loaded]
    try:
        _screen(chain, trusted, anchors)
        find = _library_path if _library_can(chain, trusted) else _own_path
        path = find(chain, trusted, use, at)
    except TrustRefusal as refusal:
        if refusal.code == "untrusted-signer":
            refusal.evidence += _excluded_text(anchors)
        raise
    if (fault := certificates.form_fault(path[-1])) is not None:
        raise _fault(fault, path[-1])
    _require_unrevoked(path[-1:], anchors)
    return VerifiedPath(
        tuple(path), next(anchor for anchor, certificate in loaded if certificate == path[-1])
    )


def parse_bundle(pem: bytes) -> list[x509.Certificate]:
    """Parse a PEM bundle strictly; TrustRefusal "chain-…" as `verify_chain` lists them."""
    if len(pem) > BUNDLE_LIMIT:
        raise _refuse("chain-too-large", f"the certificate file is larger than {BUNDLE_LIMIT} bytes")
    ders = []
    try:
        for der in pem_blocks(pem):
            ders.append(der)
            if len(ders) > CHAIN_LIMIT:
                raise _refuse(
                    "chain-too-long", f"the certificate file has more than {CHAIN_LIMIT} certificates"
                )
    except MalformedPemError as exc:
        raise _malformed(str(exc)) from exc
    if not ders:
        raise _malformed("empty")
    if len(set(ders)) != len(ders):
        raise _refuse("chain-duplicate", "a certificate is in the certificate file twice")
    try:
        return [certificates.load(der) for der in ders]
    except certificates.MalformedCertificateError as exc:
        raise _malformed(str(exc)) from exc


def pem_blocks(pem: bytes) -> Iterator[bytes]:
    """Yield the DER of one PEM certificate block after the other; MalformedPemError at any other byte."""
    position = 0
    while position < len(pem):
        block = _BLOCK.match(pem, position)
        if block is None:
            raise MalformedPemError(f"no certificate block at byte {position}")
        yield _decode(block[1], position)
        position = block.end()


def _decode(text: bytes, position: int) -> bytes:
    """Return the DER of one block; only one text is accepted for each DER."""
    try:
        der = base64.b64decode(text.replace(b"\n", b""), validate=True)
    except binascii.Error as exc:
        raise MalformedPemError(f"block at byte {position}: {exc}") from exc
    encoded = base64.b64encode(der)
    lines = [encoded[start : start + _COLUMNS] for start in range(0, len(encoded), _COLUMNS)]
    if b"\n".join(lines) != text:
        raise MalformedPemError(f"block at byte {position}: not the canonical text of its certificate")
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
                "a certificate of the chain is revoked in dbx",
                evidence=f"{describe(certificate)}: {reason}",
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
    chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate], use: Use, at: datetime
) -> list[x509.Certificate]:
    verifier = (
        PolicyBuilder()
        .time(at)
        .store(Store(list(trusted)))
        .max_chain_depth(CHAIN_LIMIT - 1)
        .extension_policies(ca_policy=use.ca.policy(), ee_policy=use.leaf.policy())
        .build_client_verifier()
    )
    try:
        return verifier.verify(chain[0], list(chain[1:])).chain
    except VerificationError as exc:
        # The library has refused; its reason is a sentence. Ours has a code, and the same rules.
        _own_path(chain, trusted, use, at)
        raise _refuse("chain-refused", f"the library refuses the chain: {exc}", chain[0]) from exc


def _own_path(
    chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate], use: Use, at: datetime
) -> list[x509.Certificate]:
    """Follow the bundle upwards until an anchor issued a certificate; `_screen` has accepted it.

    The refusal of the last step tried is the one reported.
    """
    if (fault := certificates.role_fault(chain[0], use.leaf, at)) is not None:
        raise _fault(fault, chain[0])
    refusal = None
    for depth, certificate in enumerate(chain):
        for anchor in trusted:
            if not certificates.is_signed_by(certificate, anchor):
                continue
            if (refusal := _issuer_refusal(anchor, depth, use, at)) is None:
                return [*chain[: depth + 1], anchor]
        if depth + 1 == len(chain):
            break
        # _screen has seen that the next one made the signature. Whether it may is the question here.
        if (next_refusal := _issuer_refusal(chain[depth + 1], depth, use, at)) is not None:
            raise next_refusal
    raise refusal or _untrusted(chain[-1])


def _issuer_refusal(issuer: x509.Certificate, depth: int, use: Use, at: datetime) -> TrustRefusal | None:
    """Judge an issuer with `depth` CA certificates below it (RFC 5280 section 6.1.4, k to n)."""
    if (fault := certificates.role_fault(issuer, use.ca, at)) is not None:
        return _fault(fault, issuer)
    limit = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    if limit is not None and depth > limit:
        return _refuse("path-length", f"a CA with path length {limit} has {depth} CAs below it", issuer)
    return None


def _fault(fault: Fault, certificate: x509.Certificate) -> TrustRefusal:
    evidence = f"{describe(certificate)}, {certificates.validity_text(certificate)}"
    return TrustRefusal(fault.code, fault.cause, evidence=evidence, remedy=_REMEDY)


def _untrusted(certificate: x509.Certificate) -> TrustRefusal:
    return TrustRefusal(
        "untrusted-signer",
        "no anchor vouches for the certificate",
        evidence=f"last certificate of the chain: {describe(certificate)}",
        remedy="enrol the signer's CA, or sign with a certificate of an enrolled one",
    )


def _excluded_text(anchors: AnchorSet) -> str:
    """Name what could have been the anchor, were it usable: the likely reason why there is none."""
    shown = "; ".join(
        f"{entry.sha256_fingerprint[:16]}: {entry.reason}" for entry in anchors.excluded[:_EXCLUDED_SHOWN]
    )
    return f"; not used as anchors: {shown}" if shown else ""


def _refuse(code: str, cause: str, certificate: x509.Certificate | None = None) -> TrustRefusal:
    evidence = describe(certificate) if certificate is not None else ""
    return TrustRefusal(code, cause, evidence=evidence, remedy=_REMEDY)


def _malformed(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "chain-malformed",
        "the certificate file is not a plain sequence of PEM certificates",
        evidence=evidence,
        remedy=_REMEDY,
    )
