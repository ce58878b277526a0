# SPDX-License-Identifier: Apache-2.0
"""The device key: made in the TPM, usable only there, and what is said about it in X.509.

It is a child of the storage key that signs and does nothing else. Its blobs are kept by the caller; they are
of no use without this TPM. Blobs come from a disk, so a key is believed to be the device's only with exactly
the attributes that we give: one made elsewhere and imported has others, and for these the TPM vouches.
The certificate's own meaning (who believes it, for what) is the business of `trust`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from uuid import UUID

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_ECC,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPMS_ECC_PARMS,
    TPMS_RSA_PARMS,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_PUBLIC,
    TPMT_RSA_SCHEME,
    TPMT_SYM_DEF_OBJECT,
    TPMU_PUBLIC_PARMS,
    TSS2_Exception,
)
from tpm2_pytss.cryptography import tpm_ecc_private_key, tpm_rsa_private_key

from trustme_init.errors import DeviceRefusal
from trustme_init.tpm.connection import blames_parameter, flushed, salted_session, tpm_failures
from trustme_init.tpm.storage_key import find_storage_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

KINDS: Final = ("ecc-p256", "rsa-2048")

SIGNING: Final = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.SIGN_ENCRYPT
)
"""Of a key that signs what it is given; with RESTRICTED it signs only what the TPM has made."""

_NAME_LIMIT: Final = 64
"""ub-common-name and ub-organization-name (RFC 5280, appendix A.1)."""

_Builder = TypeVar("_Builder", x509.CertificateSigningRequestBuilder, x509.CertificateBuilder)


class KeyBlobs(NamedTuple):
    """A TPM key as it is kept on disk: marshalled TPM2B_PUBLIC and TPM2B_PRIVATE. Neither is a secret."""

    public: bytes
    private: bytes


def create_device_key(esapi: ESAPI, kind: str) -> KeyBlobs:
    """Make a device key of a kind in `KINDS`.

    Raises DeviceRefusal "storage-key-missing", "tpm-failed"; ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"not a kind of device key: {kind}")
    with tpm_failures("make the device key"):
        return create_key(esapi, _ecc_template(SIGNING) if kind == "ecc-p256" else _rsa_template(SIGNING))


def create_key(esapi: ESAPI, template: TPM2B_PUBLIC) -> KeyBlobs:
    """Make a key below the storage key; for callers under `tpm_failures`."""
    srk = find_storage_key(esapi)
    with salted_session(esapi, srk) as session:
        private, public, *_ = esapi.create(srk, TPM2B_SENSITIVE_CREATE(), template, session1=session)
    return KeyBlobs(public.marshal(), private.marshal())


def restricted_template() -> TPM2B_PUBLIC:
    """Return the template of a key that signs only what the TPM itself has made (ECDSA on P-256, SHA-256)."""
    return _ecc_template(SIGNING | TPMA_OBJECT.RESTRICTED)


@contextlib.contextmanager
def loaded(esapi: ESAPI, blobs: KeyBlobs, attributes: int = int(SIGNING)) -> Iterator[ESYS_TR]:
    """Lend the handle of a key that has exactly `attributes`.

    Raises DeviceRefusal "device-key-foreign" for blobs of another TPM, of a cleared one, or of a key that was
    not made here; "device-key-damaged" for bytes that are no blobs.
    """
    public = parse_public(blobs.public)
    try:
        private, size = TPM2B_PRIVATE.unmarshal(blobs.private)
    except TSS2_Exception as exc:
        raise _damaged("private") from exc
    if size != len(blobs.private):
        raise _damaged("private")
    found = int(public.publicArea.objectAttributes)
    if found != attributes:
        raise _foreign(f"the key has the attributes {found:#x}, not {attributes:#x}")
    try:
        handle = esapi.load(find_storage_key(esapi), private, public)
    except TSS2_Exception as exc:
        if blames_parameter(exc):
            raise _foreign(str(exc)) from exc
        raise
    with flushed(esapi, handle):
        yield handle


def parse_public(data: bytes) -> TPM2B_PUBLIC:
    """Return a blob's public part; DeviceRefusal "device-key-damaged" if it is none. Needs no TPM."""
    try:
        public, size = TPM2B_PUBLIC.unmarshal(data)
    except TSS2_Exception as exc:
        raise _damaged("public") from exc
    if size != len(data):
        raise _damaged("public")
    return public


def spki(blobs: KeyBlobs) -> bytes:
    """Return the key as DER SubjectPublicKeyInfo, without any TPM; DeviceRefusal "device-key-damaged"."""
    public = parse_public(blobs.public)
    try:
        return bytes(public.to_der())
    except (ValueError, LookupError) as exc:
        raise _damaged("public") from exc


def make_csr(
    esapi: ESAPI,
    blobs: KeyBlobs,
    *,
    device_uuid: UUID,
    common_name: str,
    organization: str | None = None,
) -> bytes:
    """Return a PEM PKCS#10 request signed by the device key.

    Subject CN (and O), subjectAltName URI `UUID:<uuid>`, keyUsage digitalSignature, extendedKeyUsage
    clientAuth, SHA-256. Raises DeviceRefusal "device-key-foreign", "device-key-damaged",
    "certificate-name-unfit".
    """
    builder = _described(
        x509.CertificateSigningRequestBuilder(subject_name=_name(common_name, organization)), device_uuid
    )
    with tpm_failures("sign a certificate request"), _signer(esapi, blobs) as key:
        request = builder.sign(key, hashes.SHA256())
        if not request.is_signature_valid:
            raise _bad_signature("certificate request")
        return request.public_bytes(Encoding.PEM)


def self_signed_certificate(
    esapi: ESAPI,
    blobs: KeyBlobs,
    *,
    device_uuid: UUID,
    common_name: str,
    not_before: datetime,
    days: int,
) -> bytes:
    """Return a PEM certificate of the device key signed by itself: the request's shape, not a CA.

    Valid for `days` from `not_before` (with a time zone); random serial number. Refusals as `make_csr`.
    """
    name = _name(common_name, None)
    builder = _described(
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_before + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True),
        device_uuid,
    )
    with tpm_failures("sign a certificate"), _signer(esapi, blobs) as key:
        certificate = builder.public_key(key.public_key()).sign(key, hashes.SHA256())
        try:
            certificate.verify_directly_issued_by(certificate)
        except InvalidSignature as exc:
            raise _bad_signature("certificate") from exc
        return certificate.public_bytes(Encoding.PEM)


def _described(builder: _Builder, device_uuid: UUID) -> _Builder:
    """Add what says whose key this is and what it is for."""
    return (
        builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"UUID:{device_uuid}")]),
            critical=False,
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=False,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )


def _name(common_name: str, organization: str | None) -> x509.Name:
    parts = [(NameOID.COMMON_NAME, common_name)]
    if organization is not None:
        parts.insert(0, (NameOID.ORGANIZATION_NAME, organization))
    for _, text in parts:
        if not 0 < len(text) <= _NAME_LIMIT or not text.isprintable():
            raise DeviceRefusal(
                "certificate-name-unfit",
                "a name cannot stand in a certificate",
                evidence=f"{text[: _NAME_LIMIT + 1]!a}: {len(text)} characters",
                remedy=f"use 1 to {_NAME_LIMIT} printable characters",
            )
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts])


@contextlib.contextmanager
def _signer(esapi: ESAPI, blobs: KeyBlobs) -> Iterator[CertificateIssuerPrivateKeyTypes]:
    """Lend the device key as `cryptography` takes it."""
    with loaded(esapi, blobs) as handle:
        is_ecc = parse_public(blobs.public).publicArea.type == TPM2_ALG.ECC
        kind: Any = tpm_ecc_private_key if is_ecc else tpm_rsa_private_key
        yield kind(esapi, handle)


def _ecc_template(attributes: TPMA_OBJECT) -> TPM2B_PUBLIC:
    scheme = TPMT_ECC_SCHEME(scheme=TPM2_ALG.ECDSA)
    scheme.details.ecdsa.hashAlg = TPM2_ALG.SHA256
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=attributes,
            parameters=TPMU_PUBLIC_PARMS(
                eccDetail=TPMS_ECC_PARMS(
                    symmetric=TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL),
                    scheme=scheme,
                    curveID=TPM2_ECC.NIST_P256,
                    kdf=TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL),
                )
            ),
        )
    )


def _rsa_template(attributes: TPMA_OBJECT) -> TPM2B_PUBLIC:
    """No scheme is fixed: certificates take PKCS#1 v1.5, TLS 1.3 takes PSS."""
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.RSA,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=attributes,
            parameters=TPMU_PUBLIC_PARMS(
                rsaDetail=TPMS_RSA_PARMS(
                    symmetric=TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL),
                    scheme=TPMT_RSA_SCHEME(scheme=TPM2_ALG.NULL),
                    keyBits=2048,
                )
            ),
        )
    )


def _foreign(evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "device-key-foreign",
        "a key is not one that this TPM made for us",
        evidence=evidence,
        remedy="the disk or the TPM was changed or cleared: put the right one back, or provision again",
    )


def _damaged(part: str) -> DeviceRefusal:
    return DeviceRefusal(
        "device-key-damaged",
        "a key's file is damaged",
        evidence=f"its {part} part is not a marshalled TPM structure",
        remedy="provision the device again",
    )


def _bad_signature(what: str) -> DeviceRefusal:
    return DeviceRefusal(
        "tpm-failed",
        f"the TPM did not sign a {what}",
        evidence="its signature does not verify under its own public key",
        remedy="restart the device; if it stays so, the TPM or the way to it is defective",
    )
