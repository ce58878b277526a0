# SPDX-License-Identifier: Apache-2.0
"""The lifecycle history as the TPM knows it: one NV index that can only be extended.

It holds a hash chain: value = SHA-256(value before | entry), beginning with 32 zero bytes (TPM2_NV_Extend,
TPM 2.0 Part 3, section 31.9). Whoever puts an older disk back cannot put an older value back: what the disk
says was obeyed and what the TPM says then differ, and `provisioning.lifecycle` stops.

- The index is defined in provisioning, beside the marker's (`nv_marker`), and like it is the owner's:
  defining, extending and removing it take the owner's authorisation, reading takes an empty one.
- Whatever else is found at the index is a refusal. So is, in provisioning, one that was extended before:
  whoever did that had the TPM before us, and would leave a device that stops at its first boot in operation.
"""

from __future__ import annotations

import hashlib
from typing import Final

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_NT,
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
from trustme_init.tpm.storage_key import find_storage_key

INDEX: Final = 0x01800000 + 0x746E
"""The one after the marker's."""
SIZE: Final = 32
"""Of a digest of the index's name algorithm, as TPM2_NV_DefineSpace demands for this type."""
EMPTY: Final = bytes(SIZE)

_ATTRIBUTES: Final = int(
    TPMA_NV.OWNERWRITE
    | TPMA_NV.OWNERREAD
    | TPMA_NV.AUTHREAD
    | TPMA_NV.NO_DA
    | (TPM2_NT.EXTEND << TPMA_NV.TPM2_NT_SHIFT)
)
_PROGRESS: Final = int(TPMA_NV.WRITTEN)
"""The attribute that changes on the way."""


def extended(value: bytes, entry: bytes) -> bytes:
    """Return what the index holds once `entry` was added to `value`."""
    return hashlib.sha256(value + entry).digest()


@tpm_failures("read the lifecycle history")
def read_history(esapi: ESAPI) -> bytes:
    """Return the chain's value, EMPTY before the first entry; three TPM commands, no authorisation.

    Raises DeviceRefusal "history-undefined" where there is no index, "history-foreign" for one of any other
    form: attributes, size, name algorithm, policy or authorisation value.
    """
    try:
        index = esapi.tr_from_tpmpublic(INDEX)
    except TSS2_Exception as exc:
        if nothing_there(exc):
            raise DeviceRefusal(
                "history-undefined",
                "the TPM has no lifecycle history",
                evidence=f"the NV index {INDEX:#x} is not defined",
                remedy="only the TPM's owner can have removed it: clear the TPM, provision the device again",
            ) from exc
        raise
    return _value(esapi, index)


@tpm_failures("define the lifecycle history")
def define_history(esapi: ESAPI, owner_auth: bytes) -> None:
    """Make the index, in provisioning, unless it is there.

    Raises DeviceRefusal "history-foreign" as `read_history` and for one that was extended before,
    "tpm-auth-refused" for a wrong `owner_auth`.
    """
    try:
        value = read_history(esapi)
    except DeviceRefusal as refusal:
        if refusal.code != "history-undefined":
            raise
    else:
        if value != EMPTY:
            raise _foreign("it was extended before this device obeyed any statement")
        return
    public = TPM2B_NV_PUBLIC(
        nvPublic=TPMS_NV_PUBLIC(
            nvIndex=INDEX, nameAlg=TPM2_ALG.SHA256, attributes=TPMA_NV(_ATTRIBUTES), dataSize=SIZE
        )
    )
    with (
        salted_session(esapi, find_storage_key(esapi)) as session,
        authorised(esapi, ESYS_TR.OWNER, owner_auth),
    ):
        esapi.nv_define_space(b"", public, session1=session)


@tpm_failures("extend the lifecycle history")
def extend_history(esapi: ESAPI, owner_auth: bytes, entry: bytes) -> bytes:
    """Add a digest of SIZE bytes to the chain, which cannot be taken back; return the chain's value.

    Raises DeviceRefusal "history-undefined", "history-foreign", "tpm-auth-refused" for a wrong `owner_auth`,
    and "history-not-extended" where the value afterwards is not the chain's next one.
    """
    before = read_history(esapi)
    index = esapi.tr_from_tpmpublic(INDEX)
    with (
        salted_session(esapi, find_storage_key(esapi)) as session,
        authorised(esapi, ESYS_TR.OWNER, owner_auth),
    ):
        esapi.nv_extend(index, entry, auth_handle=ESYS_TR.OWNER, session1=session)
    after = read_history(esapi)
    if after != extended(before, entry):
        raise DeviceRefusal(
            "history-not-extended",
            "the TPM did not extend the lifecycle history as it should",
            evidence=f"NV index {INDEX:#x}: {before.hex()[:16]} became {after.hex()[:16]}",
            remedy="the TPM is defective, or somebody else uses it: restart the device, look at its status",
        )
    return after


def _value(esapi: ESAPI, index: ESYS_TR) -> bytes:
    answer, _ = esapi.nv_read_public(index)
    public = answer.nvPublic
    attributes = int(public.attributes)
    found = (attributes & ~_PROGRESS, int(public.dataSize), int(public.nameAlg), bytes(public.authPolicy))
    if found != (_ATTRIBUTES, SIZE, int(TPM2_ALG.SHA256), b""):
        raise _foreign(
            f"attributes {attributes:#x}, {found[1]} bytes, name algorithm {found[2]:#x}, "
            f"{'with' if found[3] else 'without'} a policy"
        )
    try:
        return bytes(esapi.nv_read(index, SIZE))
    except TSS2_Exception as exc:
        match response_code(exc):
            case TPM2_RC.NV_UNINITIALIZED if not attributes & TPMA_NV.WRITTEN:
                return EMPTY
            case TPM2_RC.AUTH_FAIL | TPM2_RC.BAD_AUTH:
                raise _foreign("it has an authorisation value, where ours is empty") from exc
        raise


def _foreign(evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "history-foreign",
        "what the TPM has in the lifecycle history's place is not of our making",
        evidence=f"NV index {INDEX:#x}: {evidence}",
        remedy="somebody else has used this TPM: clear it in the firmware set-up and provision again",
    )
