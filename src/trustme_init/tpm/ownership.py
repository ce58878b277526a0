# SPDX-License-Identifier: Apache-2.0
"""Who owns the TPM: random owner and lockout authorisations, kept where only this device can use them.

The order makes every power cut harmless. Each step is durable before the next one begins:
 1. Both values are drawn and sealed (`sealing`), written to `authorisations.json`, read back and unsealed.
 2. The owner's authorisation is set, then the owner's policy is taken away: whoever was here before us, while
    the owner had no authorisation, may have left a policy as a second key (TPM2_SetPrimaryPolicy).
 3. The same for lockout; then the dictionary-attack parameters, which takes the lockout authorisation.
Cut before 2, the next call draws new values: a file found beside a TPM without owner is never believed, since
anybody could have sealed it. From 2 on the file must be there and fit; steps are repeated, which changes
nothing and proves that the TPM accepts our values.
Somebody who had both the TPM and the disk before us, and left both as we would have, cannot be told from us.

The endorsement authorisation stays empty: the endorsement key is used by its policy.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tpm2_pytss import ESAPI, ESYS_TR, TPM2_ALG, TPM2_RC, TPM2B_AUTH, TSS2_Exception
from tpm2_pytss._libtpm2_pytss import ffi, lib

from trustme_init.errors import DeviceRefusal, StorageRefusal
from trustme_init.linux.files import openat2, read_limited, write_atomic
from trustme_init.tpm.connection import (
    authorised,
    hmac_session,
    response_code,
    salted_session,
    tpm_failures,
)
from trustme_init.tpm.properties import permanent
from trustme_init.tpm.sealing import BANKS, NotOursError, Sealed, seal, unseal
from trustme_init.tpm.storage_key import ensure_storage_key, find_storage_key

FILE_NAME: Final = "authorisations.json"
AUTH_SIZE: Final = 32

MAX_TRIES: Final = 32
"""Wrong tries before dictionary-attack lockout. It guards what has a PIN; our own objects do not count."""
RECOVERY_TIME: Final = 600
"""Seconds after which one wrong try is forgotten: 144 guesses a day."""
LOCKOUT_RECOVERY: Final = 0
"""After one wrong lockout authorisation the next try needs a TPM reset. Ours cannot be guessed, so a wait in
seconds would only keep a wipe from working."""

_KIND: Final = "trustme.tpm-authorisations"
_VERSION: Final = 1
_FILE_LIMIT: Final = 16 * 1024
_REMEDY_CLEAR: Final = "clear the TPM in the firmware set-up, and provision the device again"


@dataclass(frozen=True, slots=True)
class Authorisations:
    """The two values, `AUTH_SIZE` bytes each; they are in no repr."""

    owner: bytes = field(repr=False)
    lockout: bytes = field(repr=False)


@tpm_failures("take an owner")
def take_ownership(esapi: ESAPI, directory: Path) -> Authorisations:
    """Make the TPM ours, or finish doing so, and return its authorisations; `directory` must exist.

    Raises DeviceRefusal "tpm-owned-by-another" where an authorisation is set that is not ours,
    "tpm-authorisation-lost" where ours is set but cannot be unsealed, "tpm-lockout", "storage-key-foreign",
    "tpm-no-bank"; StorageRefusal "authorisations-unwritable", with no authorisation set.
    """
    state = permanent(esapi)
    if state.endorsement_auth_set:
        raise _owned("the endorsement hierarchy has an authorisation; ours never has")
    if not state.owner_auth_set:
        if state.lockout_auth_set:
            raise _owned("lockout has an authorisation, the owner has none; we set the owner's first")
        ours = _prepare(esapi, directory)
    elif not (directory / FILE_NAME).exists():
        raise _owned(f"the owner has an authorisation, and there is no {FILE_NAME}")
    else:
        ours = authorisations(esapi, directory)
    with salted_session(esapi, find_storage_key(esapi)) as session:
        if not state.owner_auth_set:
            esapi.hierarchy_change_auth(ESYS_TR.OWNER, TPM2B_AUTH(ours.owner), session1=session)
        _hold(esapi, ESYS_TR.OWNER, ours.owner, session)
        if not state.lockout_auth_set:
            esapi.hierarchy_change_auth(ESYS_TR.LOCKOUT, TPM2B_AUTH(ours.lockout), session1=session)
        _hold(esapi, ESYS_TR.LOCKOUT, ours.lockout, session)
        with authorised(esapi, ESYS_TR.LOCKOUT, ours.lockout):
            esapi.dictionary_attack_parameters(MAX_TRIES, RECOVERY_TIME, LOCKOUT_RECOVERY, session1=session)
    return ours


@tpm_failures("unseal its authorisations")
def authorisations(esapi: ESAPI, directory: Path) -> Authorisations:
    """Return the authorisations that `take_ownership` keeps in `directory`.

    Raises DeviceRefusal "tpm-authorisation-lost", with the reason as evidence, where they cannot be had: file
    missing or damaged, TPM cleared or another one, PCR 7 changed.
    """
    sealed, key_name = _load(directory / FILE_NAME)
    try:
        srk = find_storage_key(esapi)
    except DeviceRefusal as exc:
        raise _lost(exc.evidence) from exc
    if bytes(esapi.tr_get_name(srk)) != key_name:
        raise _lost("the storage key is another one: the TPM was cleared, or it is another TPM")
    try:
        secret = unseal(esapi, srk, sealed)
    except NotOursError as exc:
        raise _lost(str(exc)) from exc
    if len(secret) != 2 * AUTH_SIZE:
        raise _lost(f"{len(secret)} bytes are sealed, not {2 * AUTH_SIZE}")
    return Authorisations(owner=secret[:AUTH_SIZE], lockout=secret[AUTH_SIZE:])


@tpm_failures("clear itself")
def clear(esapi: ESAPI, auth: bytes) -> None:
    """Clear the TPM by its lockout authorisation `auth`: keys, NV indices and both authorisations are gone.

    On a TPM whose lockout has no authorisation, as after an earlier clear, `auth` is not used. Raises
    DeviceRefusal "tpm-auth-refused", "tpm-lockout", "tpm-clear-disabled".
    """
    state = permanent(esapi)
    if state.clear_disabled:
        raise DeviceRefusal(
            "tpm-clear-disabled",
            "the TPM cannot be cleared by the operating system",
            evidence="TPM2_ClearControl has disabled it",
            remedy="clear the TPM in the firmware set-up",
        )
    with (
        hmac_session(esapi) as session,
        authorised(esapi, ESYS_TR.LOCKOUT, auth if state.lockout_auth_set else b""),
    ):
        esapi.clear(ESYS_TR.LOCKOUT, session1=session)


def _prepare(esapi: ESAPI, directory: Path) -> Authorisations:
    """Draw new authorisations and keep them; return what came back from where they are kept."""
    srk = ensure_storage_key(esapi)
    with salted_session(esapi, srk) as session:
        # That the owner has no authorisation was only said (`permanent`); this reply proves it, before a file
        # that may be the only copy is replaced.
        _hold(esapi, ESYS_TR.OWNER, b"", session)
    drawn = Authorisations(owner=os.urandom(AUTH_SIZE), lockout=os.urandom(AUTH_SIZE))
    sealed = seal(esapi, srk, drawn.owner + drawn.lockout)
    document = {
        "kind": _KIND,
        "version": _VERSION,
        "storage_key": bytes(esapi.tr_get_name(srk)).hex(),
        "bank": sealed.bank,
        "public": base64.b64encode(sealed.public).decode(),
        "private": base64.b64encode(sealed.private).decode(),
    }
    try:
        write_atomic(directory / FILE_NAME, json.dumps(document, indent=1, sort_keys=True).encode(), 0o600)
    except OSError as exc:
        raise StorageRefusal(
            "authorisations-unwritable",
            "the TPM's authorisations cannot be kept, so the TPM is left as it is",
            evidence=f"{directory / FILE_NAME}: {exc.strerror}",
            remedy="make room on the data volume",
        ) from exc
    kept = authorisations(esapi, directory)
    if kept != drawn:
        raise _lost("what was sealed is not what comes back")
    return kept


def _hold(esapi: ESAPI, hierarchy: ESYS_TR, auth: bytes, session: ESYS_TR) -> None:
    """Take a hierarchy's policy away with our authorisation, which shows that it is the one that is set."""
    try:
        with authorised(esapi, hierarchy, auth):
            _take_policy_away(esapi, hierarchy, session)
    except TSS2_Exception as exc:
        if response_code(exc) in (TPM2_RC.AUTH_FAIL, TPM2_RC.BAD_AUTH):
            name = "lockout" if hierarchy == ESYS_TR.LOCKOUT else "the owner"
            raise _owned(f"{name} has an authorisation that is not the one in {FILE_NAME}") from exc
        raise


def _take_policy_away(esapi: ESAPI, hierarchy: ESYS_TR, session: ESYS_TR) -> None:
    """Set a hierarchy's policy to none (TPM2_SetPrimaryPolicy, TPM 2.0 Part 3, section 24.3).

    By the C library's function, since the wrapper forgets that lockout can have a policy too.
    """
    code = lib.Esys_SetPrimaryPolicy(
        esapi._ctx,  # noqa: SLF001 - there is no other way to the function
        hierarchy,
        session,
        ESYS_TR.NONE,
        ESYS_TR.NONE,
        ffi.new("TPM2B_DIGEST *"),
        TPM2_ALG.NULL,
    )
    if code:
        raise TSS2_Exception(code)


def _load(path: Path) -> tuple[Sealed, bytes]:
    """Return the sealed object and the name of the storage key it was made under."""
    try:
        fd = openat2(path, os.O_RDONLY)
        try:
            document: Any = json.loads(read_limited(fd, _FILE_LIMIT))
        finally:
            os.close(fd)
        if (document["kind"], document["version"]) != (_KIND, _VERSION):
            raise _lost(f"{path}: not authorisations of version {_VERSION}")
        bank = document["bank"]
        if bank not in BANKS:
            raise _lost(f"{path}: not a PCR bank that we seal to")
        sealed = Sealed(_decode(document["public"]), _decode(document["private"]), bank)
        return sealed, bytes.fromhex(document["storage_key"])
    except OSError as exc:
        raise _lost(f"{path}: {exc.strerror}") from exc
    except (ValueError, TypeError, LookupError, RecursionError) as exc:
        raise _lost(f"{path}: malformed ({type(exc).__name__})") from exc


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as exc:
        raise ValueError("not base64") from exc


def _owned(evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "tpm-owned-by-another",
        "the TPM belongs to somebody else",
        evidence=evidence,
        remedy=_REMEDY_CLEAR,
    )


def _lost(evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "tpm-authorisation-lost",
        "the TPM's authorisations cannot be unsealed",
        evidence=evidence,
        remedy=f"undo what was changed since (firmware keys, TPM, data volume), or {_REMEDY_CLEAR}",
    )
