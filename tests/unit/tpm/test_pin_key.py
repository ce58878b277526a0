# SPDX-License-Identifier: Apache-2.0
"""What a TPM may answer and swtpm does not; `tests/integration/test_tokens_tpm.py` has the rest."""

from __future__ import annotations

from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2B_ECC_PARAMETER,
    TPM2B_ECC_POINT,
    TPMS_ECC_POINT,
    TSS2_Exception,
)

from trustme_init.tpm.pin_key import LockedOutError, PinKey

PEER = ec.generate_private_key(ec.SECP256R1()).public_key()


class Tpm:
    """The answers of a TPM to one ECDH; `auth` is what the library would go on using."""

    def __init__(self, answer: bytes | int) -> None:
        self._answer = answer
        self.auth = b""

    def tr_set_auth(self, _: ESYS_TR, auth: bytes) -> None:
        self.auth = auth

    def ecdh_zgen(self, *_: object, **__: object) -> TPM2B_ECC_POINT:
        if isinstance(self._answer, int):
            raise TSS2_Exception(self._answer)
        x = TPM2B_ECC_PARAMETER(self._answer)
        return TPM2B_ECC_POINT(TPMS_ECC_POINT(x=x, y=TPM2B_ECC_PARAMETER(bytes(32))))

    def get_capability(self, *_: object) -> Any:
        raise TSS2_Exception(0x101)


def key(tpm: Tpm) -> PinKey:
    return PinKey(cast("ESAPI", tpm), ESYS_TR.NONE, ESYS_TR.NONE, ESYS_TR.NONE)


def test_zeros_that_a_tpm_leaves_out_are_put_back() -> None:
    """TPM 2.0 Part 1, C.8, has coordinates padded; older TPMs do not pad."""
    tpm = Tpm(b"\1" * 31)
    assert key(tpm).agree(b"authorisation", PEER) == b"\0" + b"\1" * 31
    assert tpm.auth == b""


def test_a_lockout_is_named_even_if_the_tpm_does_not_say_for_how_long() -> None:
    tpm = Tpm(0x921)
    with pytest.raises(LockedOutError, match="does not say"):
        key(tpm).agree(b"authorisation", PEER)
    assert tpm.auth == b""
