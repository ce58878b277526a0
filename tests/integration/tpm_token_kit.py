# SPDX-License-Identifier: Apache-2.0
"""A TPM token in swtpm, and what the tests of it do again and again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tpm2_pytss import (
    ESYS_TR,
    TPM2_CC,
)

from tests.integration.software_tpm import SoftwareTpm
from tests.unit.tokens.kit import PIN
from trustme_init.errors import Refusal, TokenRefusal
from trustme_init.tokens import wrapping
from trustme_init.tokens.place import TOKEN_FILES, TPM
from trustme_init.tokens.tpm_token import TpmToken
from trustme_init.tpm import pin_key
from trustme_init.tpm.connection import open_tpm, salted_session
from trustme_init.tpm.ownership import authorisations, take_ownership
from trustme_init.tpm.storage_key import find_storage_key

LIMIT = 10
NEW = "another PIN"
KEY = os.urandom(96)
CONTEXT = b"a container's UUID"
NAME = TOKEN_FILES[TPM]
FUZZ_ROUNDS = int(os.environ.get("TRUSTME_FUZZ_ROUNDS", "300"))
TRYING = (TPM2_CC.ObjectChangeAuth, TPM2_CC.ECDH_ZGen)
"""The commands that take a token's authorisation value."""


@contextmanager
def owned_tpm(directory: Path) -> Iterator[SoftwareTpm]:
    """A TPM that is ours, as on a device: with the limits of `ownership`; what that keeps is in `owner/`."""
    with SoftwareTpm(directory) as running:
        with open_tpm(running.tcti) as esapi:
            (directory / "owner").mkdir()
            take_ownership(esapi, directory / "owner")
        yield running


def wrapped(token: TpmToken, pin: str = PIN) -> bytes:
    with token.open(pin) as opened:
        return wrapping.wrap(opened.public_key, KEY, context=CONTEXT)


def unwrapped(token: TpmToken, blob: bytes, pin: str = PIN) -> bytes:
    with token.open(pin) as opened:
        return wrapping.unwrap(opened, blob, context=CONTEXT)


def code_or_key(token: TpmToken, blob: bytes, pin: str = PIN) -> str | bytes:
    try:
        return unwrapped(token, blob, pin)
    except TokenRefusal as refusal:
        return refusal.code


def check(token: TpmToken, pin: str) -> None:
    with token.open(pin):
        pass


def refused(action: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        action()
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value


def code(action: Callable[[], object]) -> str:
    return refused(action).code


def wrong_count(tcti: str) -> int:
    """How many wrong authorisations the TPM has not forgotten."""
    with open_tpm(tcti) as esapi:
        return pin_key.lockout_state(esapi).counter


def flush(tpm: SoftwareTpm) -> None:
    """Do what a resource manager does after a connection that broke; swtpm has none."""
    for what in ("-t", "-l", "-s"):
        subprocess.run(["tpm2_flushcontext", "-T", tpm.tcti, what], check=True, capture_output=True)


def no_lockout(tpm: SoftwareTpm, owner: Path) -> None:
    """Have the TPM forget: the tests ask for more wrong PINs than it takes."""
    with open_tpm(tpm.tcti) as esapi:
        ours = authorisations(esapi, owner)
        esapi.tr_set_auth(ESYS_TR.LOCKOUT, ours.lockout)
        with salted_session(esapi, find_storage_key(esapi)) as session:
            esapi.dictionary_attack_lock_reset(ESYS_TR.LOCKOUT, session1=session)
