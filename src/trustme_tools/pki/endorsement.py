# SPDX-License-Identifier: Apache-2.0
"""Whether an endorsement key certificate is that of a TPM whose maker is believed.

Rules (TCG EK Credential Profile for TPM 2.0, version 2.6, section 3; RFC 5280):
- The CAs given are the anchors, roots and intermediates alike, and one of them issued the certificate: EK
  certificates come without their chain, so whoever names a root has to name the intermediate anyway.
- The certificate is not that of a CA. It says that it is for an EK (tcg-kp-EKCertificate); a certificate that
  limits no purpose at all must at least be for encryption, so that a maker's certificates for other things
  (an AK, a platform) do not serve.
- Its subjectAltName (TPM maker, model, version) may be critical, since its subject is often empty. Any other
  critical extension that is unknown is refused.
- It is valid at the time of judgement. Makers give no end or a far one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from trustme_init.trust.certificate import MalformedCertificateError
from trustme_init.trust.certificate import load as parse_certificate
from trustme_tools.errors import ToolError
from trustme_tools.pki.certificates import extension_value

EK_PURPOSE: Final = x509.ObjectIdentifier("2.23.133.8.1")
"""tcg-kp-EKCertificate."""


def load(der: bytes) -> x509.Certificate:
    """Parse an EK certificate; ToolError("ek-certificate-malformed") if any field of it cannot be read."""
    try:
        return parse_certificate(der)
    except MalformedCertificateError as exc:
        raise ToolError(
            "the EK certificate of the device cannot be read",
            "read it from the TPM with tpm2_getekcertificate and look at it with openssl x509",
            code="ek-certificate-malformed",
            evidence=str(exc),
        ) from exc


def check(
    certificate: x509.Certificate, cas: Sequence[x509.Certificate], *, at: datetime
) -> x509.Certificate:
    """Return the CA of `cas` that issued an EK certificate.

    ToolError: "ek-expired", "ek-purpose", "ek-untrusted".
    """
    if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
        raise _refused(
            "ek-expired",
            "the EK certificate is not valid now",
            certificate,
            f"valid {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}",
        )
    if (fault := _purpose_fault(certificate)) is not None:
        raise _refused("ek-purpose", "the certificate is not one of an endorsement key", certificate, fault)
    verifier = (
        PolicyBuilder()
        .time(at)
        .store(Store(list(cas)))
        .extension_policies(ca_policy=_authorities(), ee_policy=ExtensionPolicy.permit_all())
        .build_client_verifier()
    )
    try:
        return verifier.verify(certificate, []).chain[-1]
    except VerificationError as exc:
        raise _refused(
            "ek-untrusted", "no EK CA that was named vouches for the TPM", certificate, str(exc)
        ) from exc


def _authorities() -> ExtensionPolicy:
    policy = ExtensionPolicy.permit_all()
    # That basicConstraints says CA, the library demands of every issuer itself.
    policy = policy.require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    return policy.may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _may_issue)


def _may_issue(_policy: Policy, _certificate: x509.Certificate, value: x509.KeyUsage | None) -> None:
    if value is not None and not value.key_cert_sign:
        raise ValueError("a CA's key may not sign certificates")


def _purpose_fault(certificate: x509.Certificate) -> str | None:
    basic = extension_value(certificate.extensions, x509.BasicConstraints)
    if basic is not None and basic.ca:
        return "it is that of a CA"
    purposes = extension_value(certificate.extensions, x509.ExtendedKeyUsage)
    if purposes is not None:
        return None if EK_PURPOSE in purposes else "its purposes do not include tcg-kp-EKCertificate"
    usage = extension_value(certificate.extensions, x509.KeyUsage)
    if usage is not None and (usage.key_encipherment or usage.key_agreement):
        return None
    return "it names no purpose, and its key is not for encryption"


def _refused(code: str, cause: str, certificate: x509.Certificate, evidence: str) -> ToolError:
    fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
    issuer = certificate.issuer.rfc4514_string()
    return ToolError(
        cause,
        "name the CAs of the TPM's maker (root and intermediates) with --ek-ca, or look into the device",
        code=code,
        evidence=f"EK certificate sha256:{fingerprint[:16]} issued by {issuer}: {evidence}",
    )
