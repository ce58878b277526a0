# SPDX-License-Identifier: Apache-2.0
"""The TPM token: a key that never leaves the TPM, and a PIN that only the TPM tries.

`tpm-token.json` holds the key's two blobs, of no use without this TPM, and a salt. The authorisation value of
the key is HKDF-SHA-256 (RFC 5869) of PIN and salt. What wraps is ECDH on P-256, method 2 of `wrapping`: so a
container's key can be wrapped anew without ever showing the token's.

Rules:
- No slow derivation. A guess cannot be tested anywhere but in the TPM: blobs are encrypted by it, sessions
  salted to it. Who breaks it open finds the key beside the value, and needs no PIN. Slowness would be paid
  at each start of a container, and never by a guesser.
- Guesses are counted twice. Our count (`attempts`) is this token's, and does not forget: after `limit` wrong
  PINs it is locked, as any kind of token is. The TPM's is for whoever goes past our code, with the disk in
  hand or another system booted: it is one for all tokens of the TPM, so it locks only for a time.
- Where the TPM refuses to try (its lockout), or the key is another TPM's, our count stays. Where the answer
  is lost, the try counts.
- A changed PIN is a new blob under a new salt, in one file: old or new, at any power cut. The TPM keeps
  nothing. Who has copied the old file, and knows the old PIN, can still use it with this TPM.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from trustme_init.errors import TokenRefusal
from trustme_init.tokens.place import TOKEN_FILES, TPM, TokenPlace, TokenStatus
from trustme_init.tokens.softtoken import check_new_pin
from trustme_init.tokens.store import DEVELOPMENT_PIN

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from trustme_init.tpm.pin_key import PinKey

FILE_LIMIT: Final = 4096
"""Bytes; ours have under 700."""
SALT_BYTES: Final = 32

_VERSION: Final = 1
_FILE_KIND: Final = "trustme.tpm-token"
_INFO: Final = b"trustme TPM token, authorisation value, version 1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the file says."""

    public: bytes
    private: bytes
    """The key's blobs, marshalled."""
    salt: bytes
    default_pin: bool


class TpmToken(TokenPlace):
    """The TPM token in `directory`, of the TPM at `tcti`, with `limit` wrong PINs allowed; a `TokenKind`.

    Whatever needs the TPM raises DeviceRefusal: "tpm-failed", "storage-key-missing", "storage-key-foreign".
    """

    def __init__(self, directory: Path, limit: int, tcti: str) -> None:
        super().__init__(directory, TOKEN_FILES[TPM], FILE_LIMIT, limit)
        self._tcti = tcti

    def status(self) -> TokenStatus:
        """Return what is known without asking the TPM; a damaged file is a fault in it."""
        return self._status(TPM, lambda: self._load().default_pin)

    def create(self, pin: str, *, common_name: str = "", now: datetime | None = None) -> None:  # noqa: ARG002
        """Make the token; it is durable on return. It has no certificate, so no name and no date.

        Raises:
            TokenRefusal: "token-bad-pin", "token-already-there", "token-not-stored".
        """
        check_new_pin(pin)
        from trustme_init.tpm import pin_key
        from trustme_init.tpm.connection import open_tpm

        with self._changing(make=True):
            self._require_none()
            salt = os.urandom(SALT_BYTES)
            with open_tpm(self._tcti) as esapi:
                blobs = pin_key.create(esapi, authorisation(pin, salt))
            self._attempts.reset()
            self._store(_Kept(*blobs, salt, pin == DEVELOPMENT_PIN))

    @contextmanager
    def open(self, pin: str) -> Iterator[OpenTpmToken]:
        """Lend the opened token, with a session to the TPM that ends with the body.

        Raises:
            TokenRefusal: "token-missing", "token-malformed", "token-foreign", "token-tpm-lockout", and what
                `Attempts.try_pin` raises.
        """
        with ExitStack() as held:
            with self._changing():
                kept = self._load()
                key = held.enter_context(self._key(kept))
                auth = authorisation(pin, kept.salt)
                self._attempts.try_pin(lambda: _tried(lambda: key.check(auth)))
            yield OpenTpmToken(key, auth, kept.public)

    def change_pin(self, old: str, new: str) -> None:
        """Give the key another PIN; it is durable on return.

        Raises:
            TokenRefusal: "token-bad-pin" (for the new one), "token-not-stored", and what `open` raises.
        """
        check_new_pin(new)

        def change() -> None:
            private = _tried(lambda: key.change_auth(authorisation(old, kept.salt), authorisation(new, salt)))
            self._store(_Kept(kept.public, private, salt, new == DEVELOPMENT_PIN))

        with self._changing():
            kept = self._load()
            salt = os.urandom(SALT_BYTES)
            with self._key(kept) as key:
                self._attempts.try_pin(change)

    def remove(self) -> None:
        """Remove the token for good, with its count; needs no TPM. TokenRefusal("token-not-stored").

        What it wrapped is lost, but for who has copied its file before, has this TPM, and knows the PIN.
        """
        if not self._directory.is_dir():
            return
        with self._changing():
            for path in (self._path, self._attempts_path):
                self._remove(path)

    @contextmanager
    def _key(self, kept: _Kept) -> Iterator[PinKey]:
        from trustme_init.tpm import pin_key
        from trustme_init.tpm.connection import open_tpm
        from trustme_init.tpm.device_key import KeyBlobs
        from trustme_init.tpm.sealing import NotOursError

        with ExitStack() as held:
            esapi = held.enter_context(open_tpm(self._tcti))
            try:
                key = held.enter_context(pin_key.loaded(esapi, KeyBlobs(kept.public, kept.private)))
            except NotOursError as exc:
                raise TokenRefusal(
                    "token-foreign",
                    "the token is not one that this TPM made",
                    evidence=str(exc),
                    remedy="put the right disk and TPM together; if the TPM was cleared, the token is lost",
                ) from exc
            yield key

    def _store(self, kept: _Kept) -> None:
        document = {
            "kind": _FILE_KIND,
            "version": _VERSION,
            "salt": base64.b64encode(kept.salt).decode(),
            "public": base64.b64encode(kept.public).decode(),
            "private": base64.b64encode(kept.private).decode(),
            "default_pin": kept.default_pin,
        }
        self._write(self._path, json.dumps(document, indent=1).encode() + b"\n")

    def _load(self) -> _Kept:
        text = self._read()
        try:
            return _decode(text)
        except (ValueError, TypeError, LookupError, RecursionError) as exc:
            raise TokenRefusal(
                "token-malformed",
                "the token's file is damaged",
                evidence=f"{TOKEN_FILES[TPM]}: {type(exc).__name__}",
                remedy="put the token's file back, or remove the token and set a new one up",
            ) from exc


class OpenTpmToken:
    """A `wrapping.OpenToken` whose key is in the TPM; it serves while `TpmToken.open` lends it."""

    def __init__(self, key: PinKey, auth: bytes, public: bytes) -> None:
        self._key = key
        self._auth = auth
        self._public = public

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half; the TPM has loaded both together, so they belong together."""
        from trustme_init.tpm.pin_key import public_key

        return public_key(self._public)

    def decrypt(self, encapsulated: bytes) -> bytes:  # noqa: ARG002 - the key is EC
        """Raise ValueError, as for any content that is another token's."""
        raise ValueError("not an RSA token")

    def agree(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        """Return the ECDH secret. TokenRefusal "token-tpm-lockout" if another token's user locked the TPM."""
        return _tried(lambda: self._key.agree(self._auth, peer))


def authorisation(pin: str, salt: bytes) -> bytes:
    """Return the authorisation value for a PIN; any text is a PIN here, so that a wrong one is just wrong."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    from trustme_init.tpm.pin_key import AUTH_SIZE

    return HKDF(hashes.SHA256(), AUTH_SIZE, salt, _INFO).derive(pin.encode("utf-8", "surrogatepass"))


def _tried(action: Callable[[], T]) -> T:
    """Do what takes the authorisation value; the TPM's answer in the words of tokens."""
    from trustme_init.tpm.pin_key import LockedOutError, WrongAuthorisationError

    try:
        return action()
    except WrongAuthorisationError as exc:
        raise TokenRefusal(
            "token-wrong-pin",
            "the PIN does not open the token",
            remedy="enter the PIN that was set last",
        ) from exc
    except LockedOutError as exc:
        raise TokenRefusal(
            "token-tpm-lockout",
            "the TPM tries no PIN now: too many were wrong, of this token or another one",
            evidence=str(exc),
            remedy="leave the device switched on until the TPM has forgotten one, and try again",
        ) from exc


def _decode(text: bytes) -> _Kept:
    """Return what `TpmToken._store` wrote; ValueError, TypeError or LookupError for anything else."""
    document: Any = json.loads(text)
    if (document["kind"], document["version"]) != (_FILE_KIND, _VERSION):
        raise ValueError("not a TPM token of this version")
    public, private, salt = (
        base64.b64decode(document[name], validate=True) for name in ("public", "private", "salt")
    )
    if len(salt) != SALT_BYTES or not isinstance(document["default_pin"], bool):
        raise ValueError("not what we write")
    return _Kept(public, private, salt, document["default_pin"])
