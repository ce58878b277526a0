# SPDX-License-Identifier: Apache-2.0
"""The way to the TPM: opening it, the sessions on it, and what its refusals are called here.

Rules, which every module of this room but `measure` follows:
- The functions raise refusals only. Their evidence is the text of the TPM's response code, never a value.
- An authorisation value or a secret is used only in a session salted to the storage key, with AES-128-CFB
  encryption of parameters both ways (TPM 2.0 Part 1, sections 17.6 and 19). Where such a session cannot be
  had, or a reply's HMAC is wrong, that is a refusal: nothing is tried again without protection.
- What is loaded is flushed, also after a failure; authorisation values do not stay in the library's context.
- The address (a TCTI string) is all that is known about the TPM: whoever wants to count, delay, record or
  change commands stands at that address and passes them on.

These modules load `tpm2_pytss`, so they are imported in a child process of their own, never by the manager.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_RC,
    TPM2_SE,
    TPMA_SESSION,
    TPMT_SYM_DEF,
    TPMU_SYM_KEY_BITS,
    TPMU_SYM_MODE,
    TSS2_Exception,
)

from trustme_init.errors import DeviceRefusal

NO_NUMBER: Final = 0
"""What `response_code` says of an error that is not the TPM's own; no TPM error has this code."""

_LAYER_SHIFT: Final = 16
_FIRST: Final = 0x100
"""Number one, of a handle, in a response code (TPM_RC_1)."""
_AUTHORISATION: Final = (TPM2_RC.AUTH_FAIL, TPM2_RC.BAD_AUTH)


def response_code(error: TSS2_Exception) -> int:
    """Return the TPM's response code without the number of a handle, parameter or session (Part 2, 6.6.2).

    Errors of the software layers below us are `NO_NUMBER`: they must not be taken for the TPM's word.
    """
    if error.rc >> _LAYER_SHIFT:
        return NO_NUMBER
    return int(error.error)


def nothing_there(error: TSS2_Exception) -> bool:
    """Return whether the TPM says that nothing is at the only handle of the command.

    It leads to making what is missing, so it is exactly this answer and no other failure.
    """
    return bool(error.rc == TPM2_RC.HANDLE + _FIRST)


def blames_parameter(error: TSS2_Exception) -> bool:
    """Return whether the TPM refuses the value of a parameter, as it does of blobs that are not its own.

    TPM2_Load and TPM2_ActivateCredential have many codes for that, depending on what they look at first
    (TPM 2.0 Part 3, sections 12.2 and 12.5).
    """
    return not error.rc >> _LAYER_SHIFT and bool(error.parameter)


def tpm_refusal(error: Exception, action: str) -> DeviceRefusal:
    """Return the refusal for an error of the TPM or its library; `action` is what the TPM did not do.

    Codes: "tpm-lockout", "tpm-auth-refused", and "tpm-failed" for all else.
    """
    if not isinstance(error, TSS2_Exception):
        # The text of the library's own exceptions may quote an argument; the name of the kind does not.
        return DeviceRefusal(
            "tpm-failed",
            f"the TPM did not {action}",
            evidence=f"the TPM library cannot use the answer ({type(error).__name__})",
            remedy="restart the device; if it stays so, the TPM or the way to it is defective",
        )
    code = response_code(error)
    evidence = f"{error} (response code {int(error.rc):#x})"
    if code == TPM2_RC.LOCKOUT:
        return DeviceRefusal(
            "tpm-lockout",
            f"the TPM did not {action}: it is locked after wrong authorisations",
            evidence=evidence,
            remedy="restart the device; if it stays so, leave it switched on for a day and restart it again",
        )
    if code in _AUTHORISATION:
        return DeviceRefusal(
            "tpm-auth-refused",
            f"the TPM did not {action}: it does not accept our authorisation",
            evidence=evidence,
            remedy="if somebody else has used this TPM, clear it in the firmware set-up and provision again",
        )
    return DeviceRefusal(
        "tpm-failed",
        f"the TPM did not {action}",
        evidence=evidence,
        remedy="check that the TPM is enabled in the firmware set-up, and restart the device",
    )


@contextlib.contextmanager
def tpm_failures(action: str) -> Iterator[None]:
    """Turn what the TPM library raises into `tpm_refusal`; a context manager and a decorator.

    Beside TSS2_Exception the library's wrappers raise whatever a nonsensical reply makes them stumble over.
    So errors of our own callers (ValueError) are raised outside of it.
    """
    try:
        yield
    except (TSS2_Exception, ValueError, TypeError, LookupError, RuntimeError) as exc:
        raise tpm_refusal(exc, action) from exc


@contextlib.contextmanager
def open_tpm(tcti: str) -> Iterator[ESAPI]:
    """Connect to the TPM at `tcti`, for example "device:/dev/tpmrm0", and disconnect at the end.

    Raises DeviceRefusal "tpm-failed" where there is no TPM; in the body, every error of the TPM that is not
    yet a refusal becomes one (`tpm_refusal`). After an error of the transport the connection is of no use.
    """
    # The library logs to standard error, and at the level "trace", which this variable can ask for, that
    # includes every buffer. All that it has to say otherwise is in the response codes.
    os.environ["TSS2_LOG"] = "all+none"
    with contextlib.ExitStack() as stack:
        with tpm_failures("answer"):
            esapi = stack.enter_context(ESAPI(tcti))
        try:
            yield esapi
        except TSS2_Exception as exc:
            raise tpm_refusal(exc, "do what it was asked for") from exc


@contextlib.contextmanager
def flushed(esapi: ESAPI, handle: ESYS_TR) -> Iterator[ESYS_TR]:
    """Lend a transient object or a session, and flush it at the end; a failure on the way goes first."""
    try:
        yield handle
    except BaseException:
        with contextlib.suppress(TSS2_Exception):
            esapi.flush_context(handle)
        raise
    esapi.flush_context(handle)


@contextlib.contextmanager
def salted_session(esapi: ESAPI, srk: ESYS_TR, *, policy: bool = False) -> Iterator[ESYS_TR]:
    """Lend a session salted to the storage key `srk`, with AES-128-CFB parameter encryption both ways.

    An HMAC session, or with `policy` a policy session whose policy the caller satisfies. The salt is 32
    random bytes of the library, which only this TPM's storage key can decrypt: who listens on the bus learns
    neither parameters nor enough to guess an authorisation value.
    """
    with flushed(esapi, _start(esapi, srk, TPM2_SE.POLICY if policy else TPM2_SE.HMAC)) as session:
        attributes = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
        esapi.trsess_set_attributes(session, attributes)
        yield session


@contextlib.contextmanager
def hmac_session(esapi: ESAPI) -> Iterator[ESYS_TR]:
    """Lend an HMAC session without salt: while there is no storage key, for commands without a secret.

    The authorisation value itself does not cross the bus. It must be one that cannot be guessed, as ours are:
    who listens can test guesses against the HMAC.
    """
    with flushed(esapi, _start(esapi, ESYS_TR.NONE, TPM2_SE.HMAC)) as session:
        esapi.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION)
        yield session


@contextlib.contextmanager
def trial_session(esapi: ESAPI) -> Iterator[ESYS_TR]:
    """Lend a trial session: it computes the digest of a policy and authorises nothing."""
    with flushed(esapi, _start(esapi, ESYS_TR.NONE, TPM2_SE.TRIAL)) as session:
        yield session


@contextlib.contextmanager
def authorised(esapi: ESAPI, hierarchy: ESYS_TR, auth: bytes) -> Iterator[None]:
    """Have the library use `auth` for a hierarchy in the body, and forget it afterwards."""
    esapi.tr_set_auth(hierarchy, auth)
    try:
        yield
    finally:
        esapi.tr_set_auth(hierarchy, b"")


def _start(esapi: ESAPI, key: ESYS_TR, kind: TPM2_SE) -> ESYS_TR:
    symmetric = TPMT_SYM_DEF(
        algorithm=TPM2_ALG.AES,
        keyBits=TPMU_SYM_KEY_BITS(sym=128),
        mode=TPMU_SYM_MODE(sym=TPM2_ALG.CFB),
    )
    return esapi.start_auth_session(key, ESYS_TR.NONE, kind, symmetric, TPM2_ALG.SHA256)
