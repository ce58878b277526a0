# SPDX-License-Identifier: Apache-2.0
"""Device certificates: what `trustme pki sign-device` issues, and what has to be true before it does.

Rules:
- Of the request come the public key and the UUID (`request`); everything else is written here: subject
  O=<the CA's>, CN=<UUID>; subjectAltName URI:UUID:<UUID>; keyUsage digitalSignature; extendedKeyUsage
  clientAuth; no CA; the key identifiers of device and CA.
- A key that no TPM vouches for is a software key: refused, unless the caller says that it may be one.
- The issuer is a CA that may issue this: valid now, strong, its key for certificates, its purposes (where it
  limits them) including client authentication; and it outlives what it issues.
- What was signed is verified with the device's own code before anybody gets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trustme_init.trust import certificate as device_rules
from trustme_tools.errors import ToolError
from trustme_tools.guestos.signing import Signer
from trustme_tools.pki import remote_key
from trustme_tools.pki.certificates import BACKDATE, extension_value
from trustme_tools.pki.request import URI_PREFIX, DeviceRequest
from trustme_tools.pki.tpm_certification import Checked

DEVICE_DAYS: Final = 730
"""As GyroidOS issues them (two years): longer than a rollout, short enough that renewal is practised."""
_CLIENT_PURPOSES: Final = frozenset(
    {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
)


@dataclass(frozen=True, slots=True)
class DeviceCertificate:
    """What was issued. `pem` is the chain: the device's certificate, then the CA's without its root."""

    certificate: x509.Certificate
    pem: bytes
    software_key: bool


def sign_device(
    request: DeviceRequest,
    signer: Signer,
    *,
    certification: Checked | None,
    allow_software_key: bool = False,
    days: int = DEVICE_DAYS,
    now: datetime,
) -> DeviceCertificate:
    """Issue a certificate for the key of `request`, valid from the midnight before yesterday's `now`.

    `certification` is what `tpm_certification.check` returned for this very request; None says that no TPM
    vouches for the key. `now` is aware. ToolError: "software-key", "issuer-unfit", "issuer-expires",
    "unsupported-key", "sign-command-failed", "issued-badly".
    """
    if certification is None and not allow_software_key:
        raise ToolError(
            "nothing shows that the key of the request is in a TPM",
            "give the TPM certification that came with the request (--certification), or, for a device that "
            "has no TPM, --allow-software-key",
            code="software-key",
            evidence=f"device {request.uuid}",
        )
    issuer = signer.chain[0]
    not_before = max(_midnight(now - BACKDATE), issuer.not_valid_before_utc)
    not_after = not_before + timedelta(days=days)
    _require_issuer(issuer, now, not_after)
    certificate = _build(request, signer, not_before, not_after)
    if not device_rules.is_signed_by(certificate, issuer):
        raise ToolError(
            "the signature of the issued certificate does not belong to the CA's certificate",
            "sign with the key of that certificate: SHA-512, and the scheme of its key type",
            code="issued-badly",
            evidence=issuer.subject.rfc4514_string(),
        )
    chain = b"".join(each.public_bytes(Encoding.PEM) for each in (certificate, *signer.chain))
    return DeviceCertificate(certificate, chain, software_key=certification is None)


def _midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def _build(
    request: DeviceRequest, signer: Signer, not_before: datetime, not_after: datetime
) -> x509.Certificate:
    issuer = signer.chain[0]
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    key, rsa_padding = remote_key.scheme(signer)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(request, issuer))
        .issuer_name(issuer.subject)
        .public_key(request.public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{URI_PREFIX}{request.uuid}")]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(request.public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .sign(key, hashes.SHA512(), rsa_padding=rsa_padding)
    )


def _subject(request: DeviceRequest, issuer: x509.Certificate) -> x509.Name:
    organization = issuer.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[:1]
    return x509.Name([*organization, x509.NameAttribute(NameOID.COMMON_NAME, str(request.uuid))])


def _key_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _require_issuer(issuer: x509.Certificate, now: datetime, not_after: datetime) -> None:
    fault = _issuer_fault(issuer, now)
    if fault is not None:
        raise ToolError(
            f"{issuer.subject.rfc4514_string()} may not issue device certificates",
            "name the device CA of the PKI (device_subca)",
            code="issuer-unfit",
            evidence=fault,
        )
    if not_after > issuer.not_valid_after_utc:
        raise ToolError(
            "the certificate would outlive its CA",
            "give fewer --days, or renew the device CA",
            code="issuer-expires",
            evidence=f"until {not_after:%Y-%m-%d}, the CA until {issuer.not_valid_after_utc:%Y-%m-%d}",
        )


def _issuer_fault(issuer: x509.Certificate, now: datetime) -> str | None:
    if not issuer.not_valid_before_utc <= now <= issuer.not_valid_after_utc:
        return f"valid {issuer.not_valid_before_utc} to {issuer.not_valid_after_utc}"
    if (form := device_rules.form_fault(issuer)) is not None:
        return form.cause
    basic = extension_value(issuer.extensions, x509.BasicConstraints)
    if basic is None or not basic.ca:
        return "it is not a CA"
    usage = extension_value(issuer.extensions, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return "its key may not sign certificates"
    purposes = extension_value(issuer.extensions, x509.ExtendedKeyUsage)
    if purposes is not None and _CLIENT_PURPOSES.isdisjoint(purposes):
        return "it is limited to purposes other than client authentication"
    if extension_value(issuer.extensions, x509.SubjectKeyIdentifier) is None:
        return "it has no subject key identifier"
    return None
