# SPDX-License-Identifier: Apache-2.0
"""What the TPM says about itself: who has set its authorisations, and which PCR banks it keeps.

These are plain reads (TPM2_GetCapability, TPM 2.0 Part 3, section 30.2). Nothing is granted because of them:
they choose which command comes next, and that command's own authorisation decides.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tpm2_pytss import ESAPI, TPM2_ALG, TPM2_CAP, TPM2_PT

from trustme_init.errors import DeviceRefusal

# TPMA_PERMANENT (TPM 2.0 Part 2, section 8.6)
_OWNER_AUTH_SET: Final = 1 << 0
_ENDORSEMENT_AUTH_SET: Final = 1 << 1
_LOCKOUT_AUTH_SET: Final = 1 << 2
_DISABLE_CLEAR: Final = 1 << 8

_STRONG: Final = ((TPM2_ALG.SHA512, "sha512"), (TPM2_ALG.SHA384, "sha384"), (TPM2_ALG.SHA256, "sha256"))


class Permanent(NamedTuple):
    """TPM_PT_PERMANENT: what survives a reset."""

    owner_auth_set: bool
    endorsement_auth_set: bool
    lockout_auth_set: bool
    clear_disabled: bool


def permanent(esapi: ESAPI) -> Permanent:
    """Return which hierarchies have an authorisation value; for callers under `tpm_failures`."""
    _, answer = esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, TPM2_PT.PERMANENT, 1)
    # The answer owns the memory that its parts are read from, so it needs a name of its own.
    values = {int(each.property): int(each.value) for each in answer.data.tpmProperties}
    value = values.get(int(TPM2_PT.PERMANENT))
    if value is None:
        raise DeviceRefusal(
            "tpm-failed",
            "the TPM does not say who owns it",
            evidence=f"TPM2_GetCapability answers with the properties {[hex(each) for each in values]}",
            remedy="restart the device; if it stays so, the TPM or the way to it is defective",
        )
    return Permanent(
        owner_auth_set=bool(value & _OWNER_AUTH_SET),
        endorsement_auth_set=bool(value & _ENDORSEMENT_AUTH_SET),
        lockout_auth_set=bool(value & _LOCKOUT_AUTH_SET),
        clear_disabled=bool(value & _DISABLE_CLEAR),
    )


def strongest_bank(esapi: ESAPI, pcr: int) -> str:
    """Return the name of the strongest SHA-2 bank that has the register `pcr`.

    Raises DeviceRefusal "tpm-no-bank" where there is none: SHA-1 seals nothing.
    """
    _, answer = esapi.get_capability(TPM2_CAP.PCRS, 0, 1)
    active = {
        int(bank.hash) for bank in answer.data.assignedPCR if bytes(bank.pcrSelect)[pcr // 8] >> (pcr % 8) & 1
    }
    for algorithm, name in _STRONG:
        if int(algorithm) in active:
            return name
    raise DeviceRefusal(
        "tpm-no-bank",
        "the TPM has no register bank stronger than SHA-1",
        evidence=f"PCR {pcr}: none of {', '.join(name for _, name in _STRONG)} is active",
        remedy="activate the SHA-256 bank in the firmware set-up",
    )
