# SPDX-License-Identifier: Apache-2.0
"""The device's softtoken on disk: `testuser.p12` and what belongs to it, in the interop layout's `tokens/`.

Rules:
- Every operation leaves the old state or the new one, at whatever moment the power goes. The token itself is
  one file that is replaced as a whole, and its rename is the moment that counts: what describes it is written
  before and names by SHA-256 which token it describes, the count of wrong PINs falls after.
- One counter for all paths: unlocking, changing and replacing try a PIN through `Attempts`.
- A counter never falls while the token it protected is still there: in `replace` the new token is in place
  before the try with its password counts as right.
- Whether the PIN is the published development one is known without trying it, or said to be unknown (None):
  that is a token which somebody else put there and nobody has unlocked since.

An operator may put another file over `testuser.p12` at any time, as the openssl commands do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from trustme_init.errors import TokenRefusal
from trustme_init.linux.files import openat2, read_limited
from trustme_init.tokens import softtoken
from trustme_init.tokens.place import SOFTTOKEN, TOKEN_FILES, TokenPlace, TokenStatus
from trustme_init.tokens.softtoken import Token

TOKEN_NAME: Final = TOKEN_FILES[SOFTTOKEN]
RECORD_NAME: Final = "token.json"
DEVELOPMENT_PIN: Final = "trustme"
"""Published with GyroidOS and with this project; a token that has it protects nothing."""

_VERSION: Final = 1
_RECORD_LIMIT: Final = 1024


class TokenStore(TokenPlace):
    """The token in `directory` (which is made when a token is), with `limit` wrong PINs allowed."""

    def __init__(self, directory: Path, limit: int) -> None:
        super().__init__(directory, TOKEN_NAME, softtoken.TOKEN_LIMIT, limit)
        self._record_path = directory / RECORD_NAME

    def status(self) -> TokenStatus:
        """Return what is known; a damaged file is a fault in it, not a refusal of this."""
        fault = None
        try:
            data = self._read()
        except TokenRefusal as refusal:
            if refusal.code == "token-missing":
                tries_left, fault = self._tries_left()
                return TokenStatus("none", tries_left, self._limit, fault=fault)
            data, fault = b"", refusal.code
        tries_left, attempts_fault = self._tries_left()
        certificate = rounds = None
        if fault is None:
            try:
                seen = softtoken.inspect(data)
                rounds = seen.rounds
                certificate = hashlib.sha256(seen.certificates[0]).hexdigest() if seen.certificates else None
            except TokenRefusal as refusal:
                fault = refusal.code
        return TokenStatus(
            SOFTTOKEN,
            tries_left,
            self._limit,
            certificate_sha256=certificate,
            rounds=rounds,
            default_pin=self._record().get(_sha256(data)),
            fault=attempts_fault or fault,
        )

    def create(self, pin: str, *, common_name: str, now: datetime) -> None:
        """Make the device's token; it is durable on return.

        Raises:
            TokenRefusal: "token-bad-pin", "token-already-there", "token-not-stored".
        """
        softtoken.check_new_pin(pin)
        with self._changing(make=True):
            self._require_none()
            self._attempts.reset()
            self._install(softtoken.create(pin, common_name=common_name, now=now), pin)

    def unlock(self, pin: str) -> Token:
        """Return the opened token; one that is cheap to guess is encoded anew under the same PIN.

        Raises:
            TokenRefusal: "token-missing", and what `Attempts.try_pin` and `open_token` raise.
        """
        with self._changing():
            data = self._read()
            token = self._attempts.try_pin(lambda: softtoken.open_token(data, pin))
            # What follows betters the token and its description; a full disk must not forbid to use it.
            with suppress(TokenRefusal):
                if softtoken.needs_upgrade(token):
                    self._install(softtoken.reencode(token, pin), pin)
                    return softtoken.upgraded(token)
                if self._record().get(_sha256(data)) is None:
                    self._describe({_sha256(data): pin == DEVELOPMENT_PIN})
            return token

    @contextmanager
    def open(self, pin: str) -> Iterator[Token]:
        """Lend the opened token, as every kind of token does (`kind`). Refusals as `unlock`."""
        yield self.unlock(pin)

    def change_pin(self, old: str, new: str) -> None:
        """Encode the token under another PIN; it is durable on return.

        Raises:
            TokenRefusal: "token-bad-pin" (for the new one), "token-missing", "token-not-stored", and what
                `Attempts.try_pin` and `open_token` raise.
        """
        softtoken.check_new_pin(new)

        def change() -> None:
            self._install(softtoken.reencode(softtoken.open_token(data, old), new), new)

        with self._changing():
            data = self._read()
            self._attempts.try_pin(change)

    def replace(self, p12: bytes, pin: str) -> None:
        """Put the operator's own token in the place of the device's, or where none is; durable on return.

        A wrong password counts like a wrong PIN. A weakly protected file is encoded anew, so the password is
        the new token's PIN and must be one that may be set.

        Raises:
            TokenRefusal: "token-bad-pin", "token-not-stored", "token-already-there" (another kind), and what
                `Attempts.try_pin` and `open_token` raise; the old token then stays.
        """
        softtoken.check_new_pin(pin)

        def put() -> None:
            token = softtoken.open_token(p12, pin)
            self._install(softtoken.reencode(token, pin) if softtoken.needs_upgrade(token) else p12, pin)

        with self._changing(make=True):
            self._require_none(of_another_kind=True)
            if self._is_new():
                self._attempts.reset()
            self._attempts.try_pin(put)

    def remove(self) -> None:
        """Remove the token for good, with its counter; also where none is, or the rest of an interrupted one.

        What it wrapped is lost. The blocks of the file are not overwritten, which flash would not do anyway:
        they are as safe as the encrypted volume they lie on.

        Raises:
            TokenRefusal: "token-not-stored" if a file cannot be removed.
        """
        if not self._directory.is_dir():
            return
        with self._changing():
            # The token first: a counter without a token harms nothing, a token without one is locked.
            for path in (self._path, self._record_path, self._attempts_path):
                self._remove(path)

    def _install(self, data: bytes, pin: str) -> None:
        """Make `data` the token: first what describes it, beside what describes the present one."""
        known = self._record()
        try:
            present = _sha256(self._read())
        except TokenRefusal:
            present = ""
        kept = {digest: flag for digest, flag in known.items() if digest == present}
        self._describe(kept | {_sha256(data): pin == DEVELOPMENT_PIN})
        self._write(self._path, data)

    def _describe(self, default_pin: dict[str, bool]) -> None:
        text = json.dumps({"version": _VERSION, "default_pin": default_pin}).encode() + b"\n"
        self._write(self._record_path, text)

    def _record(self) -> dict[str, bool]:
        """Which tokens, by SHA-256, have the development PIN or another; a damaged file knows nothing."""
        try:
            fd = openat2(self._record_path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                document = json.loads(read_limited(fd, _RECORD_LIMIT))
            finally:
                os.close(fd)
            if document["version"] != _VERSION:
                return {}
            flags = document["default_pin"].items()
            return {digest: flag for digest, flag in flags if isinstance(flag, bool)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def _too_large(self, evidence: str) -> TokenRefusal:
        return softtoken.too_large(evidence)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
