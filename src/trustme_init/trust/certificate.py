# SPDX-License-Identifier: Apache-2.0
"""One certificate at a time: what it must look like to sign software, name a device, or vouch for either.

Rules (RFC 5280 sections 4.1 and 4.2; `chain`, `anchors` and `authority` apply them, nothing else decides):
- X.509 version 3, serial number of 1 to 20 octets.
- Keys: RSA (also id-RSASSA-PSS) of 2048 to 8192 bits, ECDSA on P-256 or P-384, Ed25519. 2048 and not 3072,
  because factory `db` entries are RSA-2048; our own PKI makes 4096.
- Signatures: SHA-256, SHA-384, SHA-512 or Ed25519. PSS uses one hash throughout, with a salt as long as
  the digest or as long as fits (the two that OpenSSL makes). An id-RSASSA-PSS key makes only PSS signatures.
- A CA says so in basicConstraints, and may sign certificates if it limits its key's usage.
- A signer is not a CA, and may make signatures if it limits its key's usage.
- Where a certificate limits its purposes (extendedKeyUsage), code signing or any purpose is among them:
  a device or TLS certificate signs no software. For the CAs above a device it is client authentication (or
  server authentication, above a peer that is only a server) or any purpose.
- A device's certificate says what it is for: digital signatures (keyUsage) and client authentication
  (extendedKeyUsage). Code signing and any purpose are not among them, so that no identity can sign software
  where one CA stands above both. A peer's is for client or server authentication, and for no more either.
- Who signs lifecycle statements has a certificate for that and for nothing else (`LIFECYCLE_PURPOSE`): no
  signer of software and no device can change what a device believes.
- Name constraints say nothing about software, nor about a UUID, so a certificate that relies on them is
  refused.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, PublicKeyAlgorithmOID, SignatureAlgorithmOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

RSA_BITS: Final = range(2048, 8192 + 1)
"""Above 8192 bits a verification costs more than a boot can spend on bytes nobody has vouched for yet."""

LIFECYCLE_PURPOSE: Final = x509.ObjectIdentifier("2.25.164894978042813228552267070516158977459")
"""extendedKeyUsage of who signs lifecycle statements: UUID 7c0d9e1a-52f4-4b7e-9a36-1f8e40c2d5b3 (X.667)."""

_SUBJECT_LIMIT: Final = 200
_SERIAL_BITS: Final = 160
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
_SOFTWARE: Final = frozenset({ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})
_SIGNATURES: Final = frozenset(
    {
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.ED25519,
        SignatureAlgorithmOID.RSASSA_PSS,
    }
)
_HASHES: Final = frozenset({"sha256", "sha384", "sha512"})
_ECDSA_SIGNATURES: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
    }
)
_ORDERS: Final = (
    0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
)
"""Of P-256 and P-384 (FIPS 186-5 and SP 800-186, section 3.2.1)."""
_SEQUENCE: Final = 0x30
_BIT_STRING: Final = 0x03


class Fault(NamedTuple):
    """Why a certificate is not accepted: a refusal code and its cause in words."""

    code: str
    cause: str


class MalformedCertificateError(ValueError):
    """The bytes are not a certificate whose every field can be read."""


Rule = Callable[[Any], Fault | None]
"""Judges the value of one extension, or None where it is absent."""


def load(der: bytes) -> x509.Certificate:
    """Parse a DER certificate and touch every field; MalformedCertificateError if anything is off.

    What the library merely warns about (for example a serial number below 1) is refused too, and so is a
    signature with unused bits: where its last bits are zero, anybody could make the same certificate of it in
    other bytes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            certificate = x509.load_der_x509_certificate(der)
            certificate.public_key()
            _ = (
                certificate.subject,
                certificate.issuer,
                certificate.serial_number,
                certificate.extensions,
                certificate.not_valid_before_utc,
                certificate.not_valid_after_utc,
                certificate.public_key_algorithm_oid,
                certificate.signature_algorithm_oid,
            )
        if not der.endswith(_signature_field(certificate.signature)):
            raise ValueError("the signature is not a whole number of bytes")
    except Exception as exc:
        # Unvouched bytes make the library raise what it does not document: KeyError for the string type of
        # a name, InvalidVersion, warnings as errors. Whatever it is, this is no usable certificate.
        raise MalformedCertificateError(str(exc) or type(exc).__name__) from exc
    return certificate


def fingerprint(der: bytes) -> str:
    """Return the SHA-256 of a certificate's DER, as hex."""
    return hashlib.sha256(der).hexdigest()


def digests(certificate: x509.Certificate) -> frozenset[bytes]:
    """Return the SHA-256 of a certificate's DER, and of each form it can be given without any key.

    If (r, s) is an ECDSA signature, so is (r, n - s), n being the order of the curve: whoever has the
    certificate has two of it. A list of digests names one of them and means both.
    """
    der = certificate.public_bytes(Encoding.DER)
    forms = {der}
    if certificate.signature_algorithm_oid in _ECDSA_SIGNATURES:
        try:
            r, s = decode_dss_signature(certificate.signature)
        except ValueError:
            return frozenset({hashlib.sha256(der).digest()})
        # Which curve it is, only the issuer's key says; the form of another one is nobody's.
        forms |= {_with_signature(certificate, encode_dss_signature(r, n - s)) for n in _ORDERS if 0 < s < n}
    return frozenset(hashlib.sha256(form).digest() for form in forms)


def _with_signature(certificate: x509.Certificate, signature: bytes) -> bytes:
    """Return the DER of a certificate with another signature (RFC 5280, section 4.1)."""
    der = certificate.public_bytes(Encoding.DER)
    begin = der.index(certificate.tbs_certificate_bytes)
    end = len(der) - len(_signature_field(certificate.signature))
    return _der(_SEQUENCE, der[begin:end] + _signature_field(signature))


def _signature_field(signature: bytes) -> bytes:
    return _der(_BIT_STRING, b"\0" + signature)  # no unused bits


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def subject_text(certificate: x509.Certificate) -> str:
    """Return the subject for people: one line, nothing a terminal would obey, bounded."""
    text = certificate.subject.rfc4514_string()
    safe = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
    return safe if len(safe) <= _SUBJECT_LIMIT else f"{safe[:_SUBJECT_LIMIT]}..."


def describe(certificate: x509.Certificate) -> str:
    """Return which certificate it is, as evidence: its subject and the beginning of its SHA-256."""
    der = certificate.public_bytes(Encoding.DER)
    return f"{subject_text(certificate)} sha256:{fingerprint(der)[:16]}"


def validity_text(certificate: x509.Certificate) -> str:
    """Return when a certificate is valid, as evidence."""
    return f"valid {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}"


def public_key_der(certificate: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """Return the public key of a certificate or request as DER SubjectPublicKeyInfo (RFC 5280, 4.1.2.7)."""
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def form_fault(certificate: x509.Certificate) -> Fault | None:
    """Judge version, serial number and key."""
    if certificate.version is not x509.Version.v3:
        return Fault("certificate-version", "a certificate is not of X.509 version 3")
    if not 0 < certificate.serial_number.bit_length() <= _SERIAL_BITS:
        return Fault("certificate-serial", "a certificate's serial number is not one of 1 to 20 octets")
    key = certificate.public_key()
    match key:
        case rsa.RSAPublicKey():
            strong = key.key_size in RSA_BITS
        case ec.EllipticCurvePublicKey():
            strong = isinstance(key.curve, _CURVES)
        case _:
            strong = isinstance(key, ed25519.Ed25519PublicKey)
    if not strong:
        return Fault("weak-key", "a certificate's key is of a kind or size that is not accepted")
    return None


def signature_fault(certificate: x509.Certificate) -> Fault | None:
    """Judge the algorithm that a certificate is signed with (an anchor's own does not matter)."""
    fault = Fault("weak-signature", "a certificate is signed with an algorithm that is not accepted")
    oid = certificate.signature_algorithm_oid
    if oid not in _SIGNATURES:
        return fault
    if oid == SignatureAlgorithmOID.ED25519:
        return None
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return fault
    return None if algorithm is not None and algorithm.name in _HASHES else fault


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether `issuer` has the name and the key that `certificate` claims to be issued with."""
    try:
        certificate.verify_directly_issued_by(issuer)
        if certificate.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS:
            return _is_plain_pss(certificate, issuer)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return issuer.public_key_algorithm_oid != PublicKeyAlgorithmOID.RSASSA_PSS


def _is_plain_pss(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether a PSS signature has one hash throughout, and a salt of digest or of maximal length."""
    key = issuer.public_key()
    algorithm = certificate.signature_hash_algorithm
    if not isinstance(key, rsa.RSAPublicKey) or algorithm is None:
        return False
    # PSS.MAX_LENGTH would not do: for a verification it means any length.
    longest = (key.key_size - 1 + 7) // 8 - algorithm.digest_size - 2
    for salt_length in (algorithm.digest_size, longest):
        scheme = padding.PSS(padding.MGF1(algorithm), salt_length)
        try:
            key.verify(certificate.signature, certificate.tbs_certificate_bytes, scheme, algorithm)
        except InvalidSignature:
            continue
        return True
    return False


def _ca_basic(value: x509.BasicConstraints | None) -> Fault | None:
    if value is not None and value.ca:
        return None
    return Fault("not-a-ca", "a certificate that is to vouch for others is not that of a CA")


def _ca_key_usage(value: x509.KeyUsage | None) -> Fault | None:
    if value is None or value.key_cert_sign:
        return None
    return Fault("ca-key-usage", "a CA's key may not sign certificates")


def _ca_purpose(purpose: x509.ObjectIdentifier, name: str) -> Rule:
    allowed = frozenset({purpose, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})

    def rule(value: x509.ExtendedKeyUsage | None) -> Fault | None:
        if value is None or not allowed.isdisjoint(value):
            return None
        return Fault("ca-purpose", f"a CA is limited to purposes other than {name}")

    return rule


def _leaf_basic(value: x509.BasicConstraints | None) -> Fault | None:
    if value is None or not value.ca:
        return None
    return Fault("leaf-is-ca", "the certificate that the chain is for is that of a CA")


def _leaf_key_usage(value: x509.KeyUsage | None) -> Fault | None:
    if value is None or ((value.digital_signature or value.content_commitment) and not value.key_cert_sign):
        return None
    return Fault("leaf-key-usage", "the signer's key may not make signatures")


def _leaf_purpose(value: x509.ExtendedKeyUsage | None) -> Fault | None:
    if value is None or not _SOFTWARE.isdisjoint(value):
        return None
    return Fault("leaf-purpose", "the signer's certificate is not for signing software")


def _device_key_usage(value: x509.KeyUsage | None) -> Fault | None:
    if value is not None and value.digital_signature and not value.key_cert_sign:
        return None
    return Fault("device-purpose", "the device's certificate does not say that its key makes signatures")


def _device_purpose(value: x509.ExtendedKeyUsage | None) -> Fault | None:
    if value is None or ExtendedKeyUsageOID.CLIENT_AUTH not in value:
        return Fault("device-purpose", "the device's certificate is not for client authentication")
    if not _SOFTWARE.isdisjoint(value):
        return Fault("device-purpose", "the device's certificate is for signing software, too")
    return None


def _peer_key_usage(value: x509.KeyUsage | None) -> Fault | None:
    if value is None or (value.digital_signature and not value.key_cert_sign):
        return None
    return Fault("peer-purpose", "the peer's key may not make signatures")


def _peer_purpose(purpose: x509.ObjectIdentifier) -> Rule:
    def rule(value: x509.ExtendedKeyUsage | None) -> Fault | None:
        if value is None or purpose not in value:
            return Fault(
                "peer-purpose", "the peer's certificate is for neither client nor server authentication"
            )
        if not _SOFTWARE.isdisjoint(value):
            return Fault("peer-purpose", "the peer's certificate is for signing software, too")
        return None

    return rule


def _lifecycle_key_usage(value: x509.KeyUsage | None) -> Fault | None:
    if value is not None and value.digital_signature and not value.key_cert_sign:
        return None
    return Fault("statement-purpose", "the certificate does not say that its key makes signatures")


def _lifecycle_purpose(value: x509.ExtendedKeyUsage | None) -> Fault | None:
    if value is not None and set(value) == {LIFECYCLE_PURPOSE}:
        return None
    return Fault("statement-purpose", "the certificate is not for lifecycle statements, and for nothing else")


def _no_name_constraints(value: x509.NameConstraints | None) -> Fault | None:
    if value is None:
        return None
    return Fault("name-constraints", "a certificate relies on name constraints")


class Role:
    """What a certificate is used as: a table of extension rules, for the library and for naming faults."""

    def __init__(
        self,
        rules: tuple[tuple[type[x509.ExtensionType], Rule], ...],
        required: type[x509.ExtensionType] | None,
    ) -> None:
        self._rules = rules
        self._required = required

    def fault(self, certificate: x509.Certificate) -> Fault | None:
        """Return the first rule that the certificate's extensions break."""
        for kind, rule in self._rules:
            try:
                value = certificate.extensions.get_extension_for_class(kind).value
            except x509.ExtensionNotFound:
                value = None
            if (fault := rule(value)) is not None:
                return fault
        return None

    def policy(self) -> ExtensionPolicy:
        """Return the same rules as the library takes them; it refuses unknown critical extensions itself."""
        policy = ExtensionPolicy.permit_all()
        for kind, rule in self._rules:
            method = policy.require_present if kind is self._required else policy.may_be_present
            policy = method(kind, Criticality.AGNOSTIC, _validator(rule))
        return policy


def _authority(purpose: x509.ObjectIdentifier, name: str) -> Role:
    return Role(
        (
            (x509.BasicConstraints, _ca_basic),
            (x509.KeyUsage, _ca_key_usage),
            (x509.ExtendedKeyUsage, _ca_purpose(purpose, name)),
            (x509.NameConstraints, _no_name_constraints),
        ),
        required=x509.BasicConstraints,
    )


def _leaf(key_usage: Rule, purpose: Rule) -> Role:
    return Role(
        (
            (x509.BasicConstraints, _leaf_basic),
            (x509.KeyUsage, key_usage),
            (x509.ExtendedKeyUsage, purpose),
            (x509.NameConstraints, _no_name_constraints),
        ),
        required=None,
    )


CA: Final = _authority(ExtendedKeyUsageOID.CODE_SIGNING, "code signing")
LEAF: Final = _leaf(_leaf_key_usage, _leaf_purpose)
DEVICE_CA: Final = _authority(ExtendedKeyUsageOID.CLIENT_AUTH, "client authentication")
DEVICE: Final = _leaf(_device_key_usage, _device_purpose)
CLIENT: Final = _leaf(_peer_key_usage, _peer_purpose(ExtendedKeyUsageOID.CLIENT_AUTH))
SERVER_CA: Final = _authority(ExtendedKeyUsageOID.SERVER_AUTH, "server authentication")
SERVER: Final = _leaf(_peer_key_usage, _peer_purpose(ExtendedKeyUsageOID.SERVER_AUTH))
LIFECYCLE_CA: Final = _authority(LIFECYCLE_PURPOSE, "lifecycle statements")
LIFECYCLE: Final = _leaf(_lifecycle_key_usage, _lifecycle_purpose)


def role_fault(certificate: x509.Certificate, role: Role, at: datetime) -> Fault | None:
    """Judge one certificate at a time and in a role, without looking at who signed it.

    The library judges: it takes a certificate that is in its store for a complete path, so that what
    remains is RFC 5280's rules for a single certificate (form, validity, every critical extension known)
    and ours for the role. Our own code only finds the name of what the library refused.
    """
    verifier = (
        PolicyBuilder()
        .time(at)
        .store(Store([certificate]))
        .extension_policies(ca_policy=CA.policy(), ee_policy=role.policy())
        .build_client_verifier()
    )
    try:
        verifier.verify(certificate, [])
    except VerificationError as exc:
        if at < certificate.not_valid_before_utc:
            return Fault("certificate-not-yet-valid", "a certificate is not valid yet")
        if at > certificate.not_valid_after_utc:
            return Fault("certificate-expired", "a certificate has expired")
        return role.fault(certificate) or Fault(
            "certificate-refused", f"a certificate breaks a rule of RFC 5280: {exc}"
        )
    return None


def _validator(rule: Rule) -> Callable[[Policy, x509.Certificate, Any], None]:
    def validate(_policy: Policy, _certificate: x509.Certificate, value: Any) -> None:
        if (fault := rule(value)) is not None:
            raise ValueError(fault.code)

    return validate
