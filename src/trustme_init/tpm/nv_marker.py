# SPDX-License-Identifier: Apache-2.0
"""The provisioning marker: one NV index that is written once and then locked for good (design decision 5).

States, and the only ways between them:

    ABSENT --define_marker--> OPEN --complete_marker (NV_Write)--> COMPLETED --(NV_WriteLock)--> and locked

- The write is the commit point. A power cut after it leaves COMPLETED without the lock, and `ensure_locked`
  finishes that. The lock comes second because only on a written index it outlasts a reset (TPM 2.0 Part 2,
  section 13.4, TPMA_NV_WRITEDEFINE).
- The index is the owner's: defining, writing, locking and removing it take the owner's authorisation
  (`ownership`), so nothing is completed while the owner has none. Reading takes an empty one: the mode has to
  be known before anything is unsealed.
- Whatever else is found at the index is a refusal, not a state. Which device and which record a completed
  marker names, the caller compares: here only the form is judged.
"""

from __future__ import annotations

from typing import Final

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_RC,
    TPM2B_NV_PUBLIC,
    TPMA_NV,
    TPMS_NV_PUBLIC,
    TSS2_Exception,
)

from trustme_init.errors import DeviceRefusal
from trustme_init.tpm.connection import (
    authorised,
    nothing_there,
    response_code,
    salted_session,
    tpm_failures,
)
from trustme_init.tpm.marker_form import (
    ATTRIBUTES,
    INDEX,
    PROGRESS,
    SIZE,
    WRITELOCKED,
    WRITTEN,
    MarkerContent,
    MarkerReading,
    MarkerState,
)
from trustme_init.tpm.storage_key import find_storage_key

_REMEDY_FOREIGN: Final = (
    "somebody else has used this TPM: clear it in the firmware set-up and provision again"
)


@tpm_failures("read the provisioning marker")
def read_marker(esapi: ESAPI) -> MarkerReading:
    """Return the marker's state in at most three TPM commands, without any authorisation value.

    Raises DeviceRefusal "marker-foreign" for an index of any other form: attributes, size, name algorithm,
    policy, authorisation value or content.
    """
    try:
        index = esapi.tr_from_tpmpublic(INDEX)
    except TSS2_Exception as exc:
        if nothing_there(exc):
            return MarkerReading(MarkerState.ABSENT)
        raise
    return _reading(esapi, index)


@tpm_failures("define the provisioning marker")
def define_marker(esapi: ESAPI, owner_auth: bytes) -> MarkerReading:
    """Make the index unless it is there, and return its state: OPEN, or COMPLETED where it already was.

    Raises DeviceRefusal "marker-foreign" as `read_marker`, "tpm-auth-refused" for a wrong `owner_auth`.
    """
    reading = read_marker(esapi)
    if reading.state is not MarkerState.ABSENT:
        return reading
    public = TPM2B_NV_PUBLIC(
        nvPublic=TPMS_NV_PUBLIC(
            nvIndex=INDEX, nameAlg=TPM2_ALG.SHA256, attributes=TPMA_NV(ATTRIBUTES), dataSize=SIZE
        )
    )
    with (
        salted_session(esapi, find_storage_key(esapi)) as session,
        authorised(esapi, ESYS_TR.OWNER, owner_auth),
    ):
        esapi.nv_define_space(b"", public, session1=session)
    return read_marker(esapi)


def complete_marker(esapi: ESAPI, owner_auth: bytes, content: MarkerContent) -> MarkerReading:
    """Write `content`, which ends provisioning, and lock the index for good; return what is then there.

    The same content again only finishes a missing lock. Raises DeviceRefusal "marker-already-completed" where
    other content is there, "marker-undefined" without `define_marker`, "marker-unprotected" for an empty
    `owner_auth`, "tpm-auth-refused" for a wrong one; ValueError for content that cannot be encoded.
    """
    data = content.encode()
    if not owner_auth:
        raise DeviceRefusal(
            "marker-unprotected",
            "provisioning cannot be completed while the TPM's owner has no authorisation",
            evidence="anybody could remove the marker",
            remedy="take ownership of the TPM first",
        )
    reading = read_marker(esapi)
    if reading.state is MarkerState.ABSENT:
        raise DeviceRefusal(
            "marker-undefined",
            "provisioning cannot be completed: the TPM has no marker",
            evidence=f"the NV index {INDEX:#x} is not defined",
            remedy="was the TPM cleared? restart the device and provision it again",
        )
    if reading.content is not None and reading.content != content:
        raise DeviceRefusal(
            "marker-already-completed",
            "provisioning was completed before, with another record",
            evidence=f"marker: {_text(reading.content)}; asked for: {_text(content)}",
            remedy="a device is provisioned once; clear the TPM in the firmware set-up to start over",
        )
    if reading.content is None:
        _write(esapi, owner_auth, data)
    return ensure_locked(esapi, owner_auth)


@tpm_failures("lock the provisioning marker")
def ensure_locked(esapi: ESAPI, owner_auth: bytes) -> MarkerReading:
    """Give a completed marker the lock that a power cut kept it from, and return what is then there.

    Does nothing where the lock is there, or where nothing is written yet. Raises DeviceRefusal
    "tpm-auth-refused" for a wrong `owner_auth`, "marker-not-locked" where the TPM says it locked and did not.
    """
    reading = read_marker(esapi)
    if reading.state is not MarkerState.COMPLETED or reading.locked:
        return reading
    index = esapi.tr_from_tpmpublic(INDEX)
    with (
        salted_session(esapi, find_storage_key(esapi)) as session,
        authorised(esapi, ESYS_TR.OWNER, owner_auth),
    ):
        esapi.nv_write_lock(index, auth_handle=ESYS_TR.OWNER, session1=session)
    reading = read_marker(esapi)
    if not reading.locked:
        raise DeviceRefusal(
            "marker-not-locked",
            "the TPM did not lock the provisioning marker",
            evidence=f"NV index {INDEX:#x}: TPMA_NV_WRITELOCKED is clear after TPM2_NV_WriteLock",
            remedy="the TPM is defective; the device cannot be used",
        )
    return reading


@tpm_failures("complete the provisioning marker")
def _write(esapi: ESAPI, owner_auth: bytes, data: bytes) -> None:
    index = esapi.tr_from_tpmpublic(INDEX)
    with (
        salted_session(esapi, find_storage_key(esapi)) as session,
        authorised(esapi, ESYS_TR.OWNER, owner_auth),
    ):
        esapi.nv_write(index, data, auth_handle=ESYS_TR.OWNER, session1=session)


def _reading(esapi: ESAPI, index: ESYS_TR) -> MarkerReading:
    answer, _ = esapi.nv_read_public(index)
    public = answer.nvPublic
    attributes = int(public.attributes)
    found = (attributes & ~PROGRESS, int(public.dataSize), int(public.nameAlg), bytes(public.authPolicy))
    if found != (ATTRIBUTES, SIZE, int(TPM2_ALG.SHA256), b""):
        raise _foreign(
            f"attributes {attributes:#x}, {found[1]} bytes, name algorithm {found[2]:#x}, "
            f"{'with' if found[3] else 'without'} a policy"
        )
    locked = bool(attributes & WRITELOCKED)
    written = bool(attributes & WRITTEN)
    try:
        data = bytes(esapi.nv_read(index, SIZE))
    except TSS2_Exception as exc:
        # Authorisation comes before content: this is how an index with an authorisation value shows,
        # which nobody could read once it is completed.
        match response_code(exc):
            case TPM2_RC.NV_UNINITIALIZED if not written:
                return MarkerReading(MarkerState.OPEN, locked=locked)
            case TPM2_RC.AUTH_FAIL | TPM2_RC.BAD_AUTH:
                raise _foreign("it has an authorisation value, where ours is empty") from exc
        raise
    try:
        return MarkerReading(MarkerState.COMPLETED, MarkerContent.decode(data), locked)
    except ValueError as exc:
        raise _foreign(f"its content is no marker: {data[:1].hex()}... of {len(data)} bytes") from exc


def _foreign(evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "marker-foreign",
        "what the TPM has in the provisioning marker's place is not of our making",
        evidence=f"NV index {INDEX:#x}: {evidence}",
        remedy=_REMEDY_FOREIGN,
    )


def _text(content: MarkerContent) -> str:
    return f"device {content.device_uuid}, record {content.record_sha256.hex()}"
