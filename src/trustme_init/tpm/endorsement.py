# SPDX-License-Identifier: Apache-2.0
"""What connects the device key with the TPM's maker: endorsement key, attestation key, certification.

- The endorsement key (EK) is the one of the TCG EK Credential Profile for TPM 2.0, low range: ECC P-256
  (template L-2), or RSA-2048 (L-1) where only that one has a certificate. It is derived each time.
- The attestation key (AK) is a restricted signing key below the storage key: its signature on a structure
  that begins with TPM_GENERATED_VALUE means that the TPM made it. That AK and EK are in one TPM, the host
  proves by credential activation (TPM 2.0 Part 1, section 24).
- A certification is the AK's TPM2_Certify of the device key, bound to one certificate request.
Only indices that the platform created are read: whoever was the owner could define others in their place.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2B_DATA,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_NV,
    TPMA_OBJECT,
    TPMT_SIG_SCHEME,
    TSS2_Exception,
)
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

from trustme_init.errors import DeviceRefusal
from trustme_init.tpm.connection import (
    blames_parameter,
    flushed,
    nothing_there,
    salted_session,
    tpm_failures,
)
from trustme_init.tpm.device_key import (
    SIGNING,
    KeyBlobs,
    create_key,
    loaded,
    restricted_template,
)
from trustme_init.tpm.storage_key import find_storage_key

CERTIFICATION_KIND: Final = "trustme.device-key-certification"
CERTIFICATION_VERSION: Final = 1

ATTESTATION: Final = int(SIGNING | TPMA_OBJECT.RESTRICTED)

_ENDORSEMENT: Final = int(
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.ADMINWITHPOLICY
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.DECRYPT
)
_CHUNK: Final = 512
"""Every PC Client TPM reads at least this much at once (TPM_PT_NV_BUFFER_MAX)."""


class _Endorsement(NamedTuple):
    certificate: bytes | None
    template: TPM2B_PUBLIC


@tpm_failures("read its endorsement certificate")
def endorsement_certificate(esapi: ESAPI) -> bytes | None:
    """Return the EK's certificate as DER, None where the maker put none.

    Raises DeviceRefusal "endorsement-certificate-malformed" for other bytes. Nobody has verified it yet.
    """
    return _endorsement(esapi).certificate


@tpm_failures("make the attestation key")
def create_attestation_key(esapi: ESAPI) -> KeyBlobs:
    """Make a restricted key for ECDSA on P-256 with SHA-256; DeviceRefusal "storage-key-missing"."""
    return create_key(esapi, restricted_template())


@tpm_failures("certify the device key")
def certify_device_key(esapi: ESAPI, device_blobs: KeyBlobs, ak_blobs: KeyBlobs, csr_der: bytes) -> bytes:
    """Return a JSON document in which the TPM says where the device key of a request (DER) comes from.

    Members: `kind`, `version`; base64 of `ek_certificate` (DER, or null), `ek_public`, `ak_public`,
    `device_public` (TPM2B_PUBLIC), `attest` (TPMS_ATTEST of TPM2_Certify, its qualifyingData the SHA-256 of
    `csr_der`), `signature` (TPMT_SIGNATURE by the AK). Raises DeviceRefusal "device-key-foreign",
    "device-key-damaged", "endorsement-certificate-malformed", "endorsement-key-unusual".
    """
    certificate, template = _endorsement(esapi)
    with _endorsement_key(esapi, template) as (_, ek_public):
        pass
    with loaded(esapi, device_blobs) as device, loaded(esapi, ak_blobs, ATTESTATION) as ak:
        attest, signature = esapi.certify(
            device,
            ak,
            TPM2B_DATA(hashlib.sha256(csr_der).digest()),
            TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL),
        )
    document = {
        "kind": CERTIFICATION_KIND,
        "version": CERTIFICATION_VERSION,
        "ek_certificate": None if certificate is None else _base64(certificate),
        "ek_public": _base64(ek_public.marshal()),
        "ak_public": _base64(ak_blobs.public),
        "device_public": _base64(device_blobs.public),
        "attest": _base64(bytes(attest)),
        "signature": _base64(signature.marshal()),
    }
    return json.dumps(document, indent=1, sort_keys=True).encode()


@tpm_failures("activate a credential")
def activate_credential(
    esapi: ESAPI, ak_blobs: KeyBlobs, credential_blob: bytes, encrypted_secret: bytes
) -> bytes:
    """Return the secret that a host has encrypted to this EK for this AK (TPM2_ActivateCredential).

    `credential_blob` is a marshalled TPM2B_ID_OBJECT, `encrypted_secret` a TPM2B_ENCRYPTED_SECRET. Raises
    DeviceRefusal "credential-foreign" where they are for another EK or AK, or malformed;
    "device-key-foreign", "device-key-damaged", "endorsement-key-unusual".
    """
    id_object = _whole(TPM2B_ID_OBJECT, credential_blob)
    secret = _whole(TPM2B_ENCRYPTED_SECRET, encrypted_secret)
    with (
        loaded(esapi, ak_blobs, ATTESTATION) as ak,
        _endorsement_key(esapi, _endorsement(esapi).template) as (ek, _),
        salted_session(esapi, find_storage_key(esapi), policy=True) as session,
    ):
        # The templates' policy: whoever has the endorsement authorisation, which is empty (profile, B.6.2).
        esapi.policy_secret(ESYS_TR.ENDORSEMENT, session, expiration=0)
        try:
            return bytes(esapi.activate_credential(ak, ek, id_object, secret, session2=session))
        except TSS2_Exception as exc:
            if blames_parameter(exc):
                raise _credential(str(exc)) from exc
            raise


@contextlib.contextmanager
def _endorsement_key(esapi: ESAPI, template: TPM2B_PUBLIC) -> Iterator[tuple[ESYS_TR, TPM2B_PUBLIC]]:
    """Lend the EK's handle and public part."""
    attributes = int(template.publicArea.objectAttributes)
    if attributes != _ENDORSEMENT:
        raise DeviceRefusal(
            "endorsement-key-unusual",
            "the TPM's own template makes an endorsement key that is none",
            evidence=f"attributes {attributes:#x}, not {_ENDORSEMENT:#x}",
            remedy="this TPM cannot be attested; report its maker and model",
        )
    handle, public, *_ = esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template, ESYS_TR.ENDORSEMENT)
    with flushed(esapi, handle):
        yield handle, public


def _endorsement(esapi: ESAPI) -> _Endorsement:
    """Return the certificate and the template that goes with it: ECC before RSA before ECC without one."""
    read = _platform_indices(esapi)
    certificate, template = create_ek_template("EK-ECC256", read)
    if certificate is None:
        rsa_certificate, rsa_template = create_ek_template("EK-RSA2048", read)
        if rsa_certificate is not None:
            certificate, template = rsa_certificate, rsa_template
    return _Endorsement(None if certificate is None else _der(certificate), template)


def _platform_indices(esapi: ESAPI) -> Callable[[int], bytes]:
    """Return what reads an NV index that the platform has created, and knows no other (NoSuchIndex)."""

    def read(index: int) -> bytes:
        try:
            handle = esapi.tr_from_tpmpublic(index)
        except TSS2_Exception as exc:
            if nothing_there(exc):
                raise NoSuchIndex(index) from exc
            raise
        answer, _ = esapi.nv_read_public(handle)
        size = int(answer.nvPublic.dataSize)
        if not int(answer.nvPublic.attributes) & TPMA_NV.PLATFORMCREATE:
            raise NoSuchIndex(index)
        return b"".join(
            bytes(esapi.nv_read(handle, min(_CHUNK, size - offset), offset))
            for offset in range(0, size, _CHUNK)
        )

    return read


def _der(data: bytes) -> bytes:
    """Cut off what fills the index up behind the certificate (X.690, section 8.1.3)."""
    if len(data) > 4 and data[:2] == b"\x30\x82":
        size = 4 + int.from_bytes(data[2:4], "big")
        if size <= len(data):
            return data[:size]
    raise _malformed(f"it begins with {data[:4].hex()} and has {len(data)} bytes")


def _whole(kind: type[TPM2B_ID_OBJECT | TPM2B_ENCRYPTED_SECRET], data: bytes) -> object:
    try:
        value, size = kind.unmarshal(data)
    except TSS2_Exception as exc:
        raise _credential(f"not a {kind.__name__}") from exc
    if size != len(data):
        raise _credential(f"{len(data) - size} bytes too many for a {kind.__name__}")
    return value


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _malformed(evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "endorsement-certificate-malformed",
        "the TPM's endorsement certificate is not a certificate",
        evidence=evidence,
        remedy="this TPM cannot be attested; report its maker and model",
    )


def _credential(evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "credential-foreign",
        "a credential is not for this TPM and its attestation key",
        evidence=evidence,
        remedy="begin the certification again: the host must use the keys of this device",
    )
