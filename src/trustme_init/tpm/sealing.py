# SPDX-License-Identifier: Apache-2.0
"""Sealing a few bytes to this TPM and to the Secure Boot state it was started with.

The object is a child of the storage key whose only way out is a policy: PCR 7 (Secure Boot state and keys,
TCG PC Client Platform Firmware Profile, section 3.3.4.8) in the strongest SHA-2 bank has the value it had at
sealing. It has no authorisation value that could be used instead, and does not take part in dictionary-attack
counting.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_RC,
    TPM2B_DIGEST,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPM2B_SENSITIVE_DATA,
    TPMA_OBJECT,
    TPML_PCR_SELECTION,
    TPMS_KEYEDHASH_PARMS,
    TPMS_SENSITIVE_CREATE,
    TPMT_KEYEDHASH_SCHEME,
    TPMT_PUBLIC,
    TPMU_PUBLIC_PARMS,
    TSS2_Exception,
)

from trustme_init.tpm.connection import (
    blames_parameter,
    flushed,
    response_code,
    salted_session,
    trial_session,
)
from trustme_init.tpm.properties import strongest_bank

PCR: Final = 7
BANKS: Final = ("sha256", "sha384", "sha512")

_ATTRIBUTES: Final = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.NODA


class Sealed(NamedTuple):
    """A sealed object as it is kept: marshalled TPM2B_PUBLIC and TPM2B_PRIVATE, and the policy's bank."""

    public: bytes
    private: bytes
    bank: str


class NotOursError(Exception):
    """This TPM, as it was started, does not open the object; the text says why."""


def seal(esapi: ESAPI, srk: ESYS_TR, secret: bytes) -> Sealed:
    """Seal `secret`, at most MAX_SYM_DATA = 128 bytes; DeviceRefusal "tpm-no-bank" without a SHA-2 bank."""
    bank = strongest_bank(esapi, PCR)
    with trial_session(esapi) as trial:
        esapi.policy_pcr(trial, TPM2B_DIGEST(), _selection(bank))
        policy = esapi.policy_get_digest(trial)
    template = TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.KEYEDHASH,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=_ATTRIBUTES,
            authPolicy=bytes(policy),
            parameters=TPMU_PUBLIC_PARMS(
                keyedHashDetail=TPMS_KEYEDHASH_PARMS(scheme=TPMT_KEYEDHASH_SCHEME(scheme=TPM2_ALG.NULL))
            ),
        )
    )
    sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=TPM2B_SENSITIVE_DATA(secret)))
    with salted_session(esapi, srk) as session:
        private, public, *_ = esapi.create(srk, sensitive, template, session1=session)
    return Sealed(public.marshal(), private.marshal(), bank)


def unseal(esapi: ESAPI, srk: ESYS_TR, sealed: Sealed) -> bytes:
    """Return the secret; NotOursError for an object of another TPM or damaged, or another value of PCR 7."""
    try:
        public, public_size = TPM2B_PUBLIC.unmarshal(sealed.public)
        private, private_size = TPM2B_PRIVATE.unmarshal(sealed.private)
    except TSS2_Exception as exc:
        raise NotOursError("the sealed object is damaged") from exc
    if (public_size, private_size) != (len(sealed.public), len(sealed.private)):
        raise NotOursError("the sealed object is damaged")
    try:
        handle = esapi.load(srk, private, public)
    except TSS2_Exception as exc:
        if blames_parameter(exc):
            raise NotOursError(f"the sealed object is not this TPM's: {exc}") from exc
        raise
    with flushed(esapi, handle), salted_session(esapi, srk, policy=True) as session:
        esapi.policy_pcr(session, TPM2B_DIGEST(), _selection(sealed.bank))
        try:
            return bytes(esapi.unseal(handle, session1=session))
        except TSS2_Exception as exc:
            if response_code(exc) == TPM2_RC.POLICY_FAIL:
                raise NotOursError(
                    f"PCR {PCR} ({sealed.bank}) has another value: the Secure Boot state has changed"
                ) from exc
            raise


def _selection(bank: str) -> TPML_PCR_SELECTION:
    return TPML_PCR_SELECTION.parse(f"{bank}:{PCR}")
