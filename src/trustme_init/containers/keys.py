# SPDX-License-Identifier: Apache-2.0
"""What protects a container's key, and the key itself: 96 random bytes that never change.

A folder of `containers/<uuid>/` has one of
    key.wrapped     by the container's own token (`tokens.wrapping`, the context is the UUID)
    key.sealed      by the TPM, to the state that Secure Boot is in: a container without a token
    key.plain       in the open: likewise, on a machine without a TPM (development only)
and `token/`, the softtoken, once it is paired (`control change_pin`). Rules:

- A key is durable before anybody uses it, and what is there is never made anew: a key that cannot be had is
  lost, not replaced.
- Moving between token and no token writes the new form, durably, before the old one goes. So there may be two
  after a power cut, of the same key: the one that the configuration asks for counts.
- Every try of a PIN is counted by the token's one counter, whatever the PIN is given for.
- What GyroidOS left is taken over where it lies: `tokens/<uuid>.p12` at the first change of the PIN, and
  `keys/<uuid>.key` at the first start. Neither is changed.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from trustme_init.containers.config import Token
from trustme_init.containers.ledger import unwritable
from trustme_init.containers.records import FILE_MODE, KEY, TOKEN
from trustme_init.errors import StorageRefusal, TokenRefusal
from trustme_init.linux.files import read_regular, sync_directory, write_atomic
from trustme_init.tokens.store import DEVELOPMENT_PIN, TokenStore
from trustme_init.tokens.wrapping import GYROIDOS_KEY_BYTES, WRAPPED_LIMIT, unwrap, unwrap_gyroidos, wrap

if TYPE_CHECKING:
    from tpm2_pytss import ESAPI, ESYS_TR

    from trustme_init.tokens.softtoken import Token as OpenToken

KEY_BYTES: Final = GYROIDOS_KEY_BYTES
WRAPPED: Final = f"{KEY}wrapped"
SEALED: Final = f"{KEY}sealed"
PLAIN: Final = f"{KEY}plain"

_SEALED_VERSION: Final = 1
_FILE_LIMIT: Final = 16 * 1024
_P12_LIMIT: Final = 64 * 1024
_UUID_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the device offers for keeping keys."""

    home: Path
    """`/data/cml`."""
    tcti: str | None
    """None on a machine without a TPM."""
    pin_tries: int
    development: bool
    now: Callable[[], datetime]


class Keys:
    """Token and key of one container, in its folder.

    TokenRefusal: "token-unpaired", "token-uninitialised", "token-pin-missing", those of `TokenStore` and
    `wrapping`. StorageRefusal: "container-key-lost", "containers-unwritable".
    """

    def __init__(self, uuid: str, folder: Path, around: Surroundings) -> None:
        self._uuid = uuid
        self._folder = folder
        self._around = around
        self._store = TokenStore(folder / TOKEN, around.pin_tries)

    # The token

    def describe(self, token: Token) -> str:
        """Return in a word or two what protects the key, and how that stands."""
        if token is Token.NONE:
            return "none (key sealed by the TPM)" if self._around.tcti else "none (KEY IN A FILE: no TPM)"
        status = self._store.status()
        if status.kind == "none":
            return "uninitialised" if self._has(WRAPPED) else "unpaired"
        if not status.tries_left:
            return "locked"
        published = ", PUBLISHED PIN" if status.default_pin else ""
        return f"paired ({status.tries_left} of {status.limit} tries left{published})"

    def pair(self, pin: str, new_pin: str) -> None:
        """Change the token's PIN; make the token first where there is none. Durable on return."""
        if self._store.status().kind != "none":
            self._store.change_pin(pin, new_pin)
            return
        if self._has(WRAPPED):
            raise _uninitialised(self._uuid)
        left = self._around.home / "tokens" / f"{self._uuid}.p12"
        if left.exists():
            self._store.replace(self._left(left, _P12_LIMIT), pin)
            self._store.change_pin(pin, new_pin)
            return
        if pin not in ("", *((DEVELOPMENT_PIN,) if self._around.development else ())):
            raise TokenRefusal(
                "token-unpaired",
                "the container's token has no PIN yet, so there is no old one",
                evidence=self._uuid,
                remedy="leave the old PIN empty",
            )
        self._store.create(new_pin, common_name=self._uuid, now=self._around.now())

    def check_pin(self, pin: str | None) -> OpenToken:
        """Return the opened token."""
        if self._store.status().kind == "none":
            raise _uninitialised(self._uuid) if self._has(WRAPPED) else _unpaired(self._uuid)
        if pin is None:
            raise TokenRefusal(
                "token-pin-missing",
                "the container's token needs its PIN",
                evidence=self._uuid,
                remedy="give it with the request (`--key=`)",
            )
        return self._store.unlock(pin)

    # The key

    def key(self, token: Token, pin: str | None, *, prepare: Callable[[bytes], None]) -> bytes:
        """Return the key, in the form that `token` asks for; make it where there is none.

        `prepare` is called with a new key before that is durable.
        """
        if token is Token.SOFT:
            opened = self.check_pin(pin)
            return self._with_token(opened, prepare)
        if self._has(SEALED) or self._has(PLAIN):
            key = self._unprotected()
        elif self._has(WRAPPED):  # it had a token until now: its PIN, once, moves the key
            key = unwrap(self.check_pin(pin), self._read(WRAPPED), context=self._context)
            self._protect(key)
        else:
            key = secrets.token_bytes(KEY_BYTES)
            prepare(key)
            self._protect(key)
        self._drop(WRAPPED)
        return key

    def _with_token(self, opened: OpenToken, prepare: Callable[[bytes], None]) -> bytes:
        if self._has(WRAPPED):
            key = unwrap(opened, self._read(WRAPPED), context=self._context)
        else:
            left = self._around.home / "keys" / f"{self._uuid}.key"
            if self._has(SEALED) or self._has(PLAIN):  # it had no token until now
                key = self._unprotected()
            elif left.exists():
                key = unwrap_gyroidos(opened, self._left(left, WRAPPED_LIMIT))
                prepare(key)
            else:
                key = secrets.token_bytes(KEY_BYTES)
                prepare(key)
            self._write(WRAPPED, wrap(opened.certificate, key, context=self._context))
        self._drop(SEALED, PLAIN)
        return key

    @property
    def _context(self) -> bytes:
        return UUID(self._uuid).bytes

    # Without a token

    def _protect(self, key: bytes) -> None:
        """Keep the key by the TPM's word, or in the open where there is none."""
        if self._around.tcti is None:
            self._write(PLAIN, key)
            return
        from trustme_init.tpm.sealing import seal

        with _storage_key(self._around.tcti) as (tpm, srk):
            sealed = seal(tpm, srk, self._context + key)
        document = {
            "version": _SEALED_VERSION,
            "bank": sealed.bank,
            "public": base64.b64encode(sealed.public).decode(),
            "private": base64.b64encode(sealed.private).decode(),
        }
        self._write(SEALED, json.dumps(document).encode() + b"\n")

    def _unprotected(self) -> bytes:
        key = self._read(PLAIN) if self._around.tcti is None else self._unsealed()
        if len(key) != KEY_BYTES:
            raise self._lost("it is not as long as a key is")
        return key

    def _unsealed(self) -> bytes:
        from trustme_init.tpm.sealing import BANKS, NotOursError, Sealed, unseal

        assert self._around.tcti is not None  # noqa: S101 - seen by the caller, said for the type checker
        try:
            document = json.loads(self._read(SEALED))
            if document["version"] != _SEALED_VERSION or document["bank"] not in BANKS:
                raise ValueError("another version")
            sealed = Sealed(
                public=base64.b64decode(document["public"], validate=True),
                private=base64.b64decode(document["private"], validate=True),
                bank=document["bank"],
            )
        except (ValueError, KeyError, TypeError) as exc:
            raise self._lost(f"{SEALED} is damaged") from exc
        try:
            with _storage_key(self._around.tcti) as (tpm, srk):
                secret = unseal(tpm, srk, sealed)
        except NotOursError as exc:
            raise self._lost(str(exc)) from exc
        if secret[:_UUID_BYTES] != self._context:
            raise self._lost("it is another container's")
        return secret[_UUID_BYTES:]

    # Files

    def _has(self, name: str) -> bool:
        return os.path.lexists(self._folder / name)

    def _read(self, name: str) -> bytes:
        return self._left(self._folder / name, _FILE_LIMIT)

    def _left(self, path: Path, limit: int) -> bytes:
        """Read a file that is there, ours or what GyroidOS left; one that cannot be read is a loss."""
        try:
            return read_regular(path, limit)
        except OSError as exc:
            raise self._lost(f"{path.name}: {exc.strerror}") from exc

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomic(self._folder / name, data, FILE_MODE)
        except OSError as exc:
            raise unwritable(f"{self._uuid}/{name}", exc) from exc

    def _drop(self, *names: str) -> None:
        """Remove other forms of a key that is durable in its own; what stays goes the next time."""
        present = [name for name in names if self._has(name)]
        with suppress(OSError):
            for name in present:
                (self._folder / name).unlink()
            if present:
                sync_directory(self._folder)

    def _lost(self, evidence: str) -> StorageRefusal:
        return StorageRefusal(
            "container-key-lost",
            "the key of the container's volumes cannot be had",
            evidence=evidence,
            remedy="restore the data volume, and the Secure Boot state that it was sealed to; or wipe the "
            "container (`control wipe`) and begin anew",
        )


@contextmanager
def _storage_key(tcti: str) -> Iterator[tuple[ESAPI, ESYS_TR]]:
    from trustme_init.tpm.connection import open_tpm
    from trustme_init.tpm.storage_key import find_storage_key

    with open_tpm(tcti) as tpm:
        yield tpm, find_storage_key(tpm)


def _unpaired(uuid: str) -> TokenRefusal:
    return TokenRefusal(
        "token-unpaired",
        "the container's token has no PIN yet",
        evidence=uuid,
        remedy="set one (`control change_pin`), the old PIN being empty",
    )


def _uninitialised(uuid: str) -> TokenRefusal:
    return TokenRefusal(
        "token-uninitialised",
        "the container has a key, but the token that wrapped it is gone",
        evidence=uuid,
        remedy="restore the data volume, or wipe the container (`control wipe`) and begin anew",
    )
