# SPDX-License-Identifier: Apache-2.0
"""The storage key: parent of our TPM objects, and what sessions are salted to.

It is the ECC P-256 storage root key of the TCG TPM v2.0 Provisioning Guidance (section 7.5.1: the template of
the EK Credential Profile with userWithAuth and noDA set and no policy), a primary key of the owner hierarchy
at the handle that the guidance names. Making it takes a chip a quarter of a second, so it is kept there. A
key that is found there must have exactly the template's public area; only the point itself is not known.
"""

from __future__ import annotations

from typing import Final

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_ECC,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPMS_ECC_PARMS,
    TPMS_ECC_POINT,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_PUBLIC,
    TPMT_SYM_DEF_OBJECT,
    TPMU_PUBLIC_ID,
    TPMU_PUBLIC_PARMS,
    TPMU_SYM_KEY_BITS,
    TPMU_SYM_MODE,
    TSS2_Exception,
)

from trustme_init.errors import DeviceRefusal
from trustme_init.tpm.connection import authorised, flushed, hmac_session, nothing_there, tpm_failures

HANDLE: Final = 0x81000001

_ATTRIBUTES: Final = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.DECRYPT
)


@tpm_failures("find its storage key")
def find_storage_key(esapi: ESAPI) -> ESYS_TR:
    """Return the storage key's handle.

    Raises DeviceRefusal "storage-key-missing" where there is none (the TPM was cleared, or never
    initialised), "storage-key-foreign" where another object is in its place.
    """
    found = _find(esapi)
    if found is None:
        raise DeviceRefusal(
            "storage-key-missing",
            "the TPM has no storage key",
            evidence=f"nothing is at the handle {HANDLE:#x}",
            remedy="if the TPM was cleared, its keys are gone: provision the device again",
        )
    return found


@tpm_failures("make its storage key")
def ensure_storage_key(esapi: ESAPI, owner_auth: bytes = b"") -> ESYS_TR:
    """Return the storage key's handle; make the key persistent first where it is not there yet.

    Raises DeviceRefusal "storage-key-foreign" where another object is in its place, "tpm-auth-refused" where
    the key has to be made and `owner_auth` is not the owner's.
    """
    found = _find(esapi)
    if found is not None:
        return found
    with hmac_session(esapi) as session, authorised(esapi, ESYS_TR.OWNER, owner_auth):
        made, *_ = esapi.create_primary(
            TPM2B_SENSITIVE_CREATE(), _template(), ESYS_TR.OWNER, session1=session
        )
        with flushed(esapi, made):
            return esapi.evict_control(ESYS_TR.OWNER, made, HANDLE, session1=session)


def _find(esapi: ESAPI) -> ESYS_TR | None:
    try:
        found = esapi.tr_from_tpmpublic(HANDLE)
    except TSS2_Exception as exc:
        if nothing_there(exc):
            return None
        raise
    public, _, _ = esapi.read_public(found)
    name = public.get_name()
    public.publicArea.unique = _template().publicArea.unique
    if public.marshal() != _template().marshal():
        raise DeviceRefusal(
            "storage-key-foreign",
            "the TPM's storage key is not of our making",
            evidence=f"handle {HANDLE:#x}: the object {bytes(name).hex()} is not of the TCG's template",
            remedy="clear the TPM in the firmware set-up, and provision the device again",
        )
    return found


def _template() -> TPM2B_PUBLIC:
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=_ATTRIBUTES,
            parameters=TPMU_PUBLIC_PARMS(
                eccDetail=TPMS_ECC_PARMS(
                    symmetric=TPMT_SYM_DEF_OBJECT(
                        algorithm=TPM2_ALG.AES,
                        keyBits=TPMU_SYM_KEY_BITS(aes=128),
                        mode=TPMU_SYM_MODE(aes=TPM2_ALG.CFB),
                    ),
                    scheme=TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL),
                    curveID=TPM2_ECC.NIST_P256,
                    kdf=TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL),
                )
            ),
            unique=TPMU_PUBLIC_ID(ecc=TPMS_ECC_POINT(x=bytes(32), y=bytes(32))),
        )
    )
