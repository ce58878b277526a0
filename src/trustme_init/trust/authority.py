# SPDX-License-Identifier: Apache-2.0
"""Whether a certificate may become an anchor of GuestOSes, of devices, or of the lifecycle.

Rules, on top of those that `certificate` has for every CA:
- One PEM block, exactly as OpenSSL writes it (`chain.pem_blocks`), and nothing else: one text for each
  certificate, so that its SHA-256 names the stored file as well.
- It is a CA for the purpose it is offered for, valid now, and not revoked in `dbx`.
- The algorithm of its own signature is one that is accepted in chains, self-signed root or not. For `db` that
  does not matter (`certificate.signature_fault`): its entries come with the machine. What is deployed today
  and still signs with SHA-1 is not worth starting with.
- A certificate that names itself as its issuer is signed with its own key. One of another issuer (a sub CA)
  is an anchor as it is: whoever registers it vouches for it, its issuer is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.errors import TrustRefusal
from trustme_init.trust import certificate as certificates
from trustme_init.trust.anchors import AUTHORITY_ROLES, Purpose, Revocations
from trustme_init.trust.chain import MalformedPemError, pem_blocks

AUTHORITY_BYTES: Final = 16 * 1024
"""Of the PEM text; that of an RSA-8192 CA has about 4 KiB."""
DEPLOYED: Final = frozenset({Purpose.GUEST, Purpose.DEVICE, Purpose.LIFECYCLE})
"""The purposes that anchors are registered for; those of the core are the firmware's."""

_DER_SEQUENCE: Final = b"\x30"
_REMEDY: Final = "register the certificate of a CA that is made for this (`trustme pki create`)"
_PEM_REMEDY: Final = (
    "write the CA's certificate alone as plain PEM: `openssl x509 -in FILE -out NEW` (`-inform DER` for DER)"
)


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA certificate that may become an anchor; `sha256` is of the DER, hex."""

    certificate_der: bytes
    subject: str
    sha256: str
    not_after: datetime


def judge_authority(data: bytes, *, at: datetime, revocations: Revocations, purpose: Purpose) -> Authority:
    """Return the CA that the PEM text `data` holds, if it may be an anchor for `purpose` at the moment `at`.

    TrustRefusal: those of `read_authority` and `require_authority`.
    """
    return require_authority(read_authority(data), at=at, revocations=revocations, purpose=purpose)


def read_authority(data: bytes) -> x509.Certificate:
    """Return the one certificate of a PEM text, unjudged.

    TrustRefusal: "authority-too-large", "not-pem", "authority-several", "authority-malformed".
    """
    if len(data) > AUTHORITY_BYTES:
        raise TrustRefusal(
            "authority-too-large",
            f"a CA certificate is larger than {AUTHORITY_BYTES} bytes",
            evidence=f"{len(data)} bytes",
            remedy=_PEM_REMEDY,
        )
    blocks = pem_blocks(data)
    try:
        first, second = next(blocks, None), next(blocks, None)
    except MalformedPemError as exc:
        raise _not_pem(_looks_like_der(data) or str(exc)) from exc
    if first is None:
        raise _not_pem("empty")
    if second is not None:
        raise TrustRefusal(
            "authority-several",
            "the file holds more than one certificate",
            evidence=f"{certificates.fingerprint(first)[:16]} and {certificates.fingerprint(second)[:16]}",
            remedy="register each CA by itself",
        )
    try:
        return certificates.load(first)
    except certificates.MalformedCertificateError as exc:
        raise TrustRefusal(
            "authority-malformed",
            "the PEM block holds no well-formed certificate",
            evidence=str(exc),
            remedy=_PEM_REMEDY,
        ) from exc


def require_authority(
    certificate: x509.Certificate, *, at: datetime, revocations: Revocations, purpose: Purpose
) -> Authority:
    """Judge a certificate as an anchor for `purpose`, one of DEPLOYED, at the moment `at` (aware).

    TrustRefusal: "wrong-purpose", "certificate-version", "certificate-serial", "weak-key", "weak-signature",
    "certificate-not-yet-valid", "certificate-expired", "not-a-ca", "ca-key-usage", "ca-purpose",
    "name-constraints", "certificate-refused", "authority-signature", "certificate-revoked".
    """
    if at.tzinfo is None:
        raise ValueError("the time of judgement needs a time zone")
    if purpose not in DEPLOYED:
        raise TrustRefusal(
            "wrong-purpose",
            f"anchors for the purpose {purpose.value} are not registered",
            remedy="a mistake in the calling code: report it",
        )
    fault = (
        certificates.form_fault(certificate)
        or certificates.signature_fault(certificate)
        or certificates.role_fault(certificate, AUTHORITY_ROLES[purpose], at)
    )
    if fault is not None:
        evidence = f"{certificates.describe(certificate)}, {certificates.validity_text(certificate)}"
        raise TrustRefusal(fault.code, fault.cause, evidence=evidence, remedy=_REMEDY)
    if certificate.issuer == certificate.subject and not certificates.is_signed_by(certificate, certificate):
        raise TrustRefusal(
            "authority-signature",
            "a CA certificate that names itself as its issuer is not signed with its own key",
            evidence=certificates.describe(certificate),
            remedy=_REMEDY,
        )
    if (reason := revocations.reason(certificate)) is not None:
        raise TrustRefusal(
            "certificate-revoked",
            "the CA certificate is revoked in dbx",
            evidence=f"{certificates.describe(certificate)}: {reason}",
            remedy="register a CA that is not revoked",
        )
    der = certificate.public_bytes(Encoding.DER)
    return Authority(
        certificate_der=der,
        subject=certificates.subject_text(certificate),
        sha256=certificates.fingerprint(der),
        not_after=certificate.not_valid_after_utc,
    )


def _looks_like_der(data: bytes) -> str:
    if not data.startswith(_DER_SEQUENCE):
        return ""
    try:
        certificates.load(data)
    except certificates.MalformedCertificateError:
        return ""
    return "the bytes are a DER certificate"


def _not_pem(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "not-pem",
        "the CA certificate is not one plain PEM block",
        evidence=evidence,
        remedy=_PEM_REMEDY,
    )
