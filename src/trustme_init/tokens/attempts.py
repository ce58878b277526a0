# SPDX-License-Identifier: Apache-2.0
"""How often a PIN was tried in vain, kept so that no power cut gives a try back.

Rules:
- The count is raised durably before a PIN is tried, and falls to zero after one was right. So a power cut
  during a try costs that try: never more tries than the limit, at the price that a cut can waste one.
- At the limit nothing is tried. There is no time after which it opens again: the clock of a device is
  whatever its attacker sets.
- Only a wrong PIN keeps the count. Any other refusal of the action gives the try back: those say something
  about the file or the disk, and who can cause them after the PIN was looked at knows the PIN.
- A file that is damaged or missing locks. It is made before the token is, so no power cut leaves a token
  without it; and to reset a count by removing its file must not work.
- One try at a time: the directory is locked against other processes (not threads: an object is for one).

The count is as hard to turn back as the volume it lies on, whose encryption is authenticated and bound to the
TPM. Who can write to that volume can copy the token, too, and needs no count to guess.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from trustme_init.errors import TokenRefusal
from trustme_init.linux.files import openat2, read_limited, write_atomic

VERSION: Final = 1
FILE_LIMIT: Final = 256
_MODE: Final = 0o600
_DAMAGED: Final = "remove the token and set a new one up; what its containers keep encrypted is lost with it"

T = TypeVar("T")


class Attempts:
    """The count of wrong PINs in the file `path`, of which `limit` (1 or more) are allowed."""

    def __init__(self, path: Path, limit: int) -> None:
        if limit < 1:
            raise ValueError("a PIN that nobody may try")
        self._path = path
        self._limit = limit
        self._depth = 0

    @property
    def remaining(self) -> int:
        """How many tries are left.

        Raises:
            TokenRefusal: "token-attempts-damaged".
        """
        return max(0, self._limit - self._failed())

    def try_pin(self, action: Callable[[], T]) -> T:
        """Return what `action` returns, which tries a PIN exactly once.

        Raises:
            TokenRefusal: "token-locked" and "token-attempts-damaged" without having called `action`;
                "token-not-stored" likewise, when the count cannot be raised; "token-wrong-pin" from `action`,
                with the tries that are left; and any other refusal of it as it is.
        """
        with self.exclusive():
            failed = self._failed()
            if failed >= self._limit:
                raise TokenRefusal(
                    "token-locked",
                    "the token is locked: its PIN was wrong too often",
                    evidence=f"0 of {self._limit} tries left",
                    remedy=_DAMAGED,
                )
            self._store(failed + 1)
            try:
                result = action()
            except TokenRefusal as refusal:
                if refusal.code == "token-wrong-pin":
                    refusal.evidence = f"{self._limit - failed - 1} of {self._limit} tries left"
                else:
                    self._store_if_possible(failed)
                raise
            # The action has had its effect, which a count that stays too high does not undo.
            self._store_if_possible(0)
            return result

    def reset(self) -> None:
        """Begin anew, for a token that nobody has tried; TokenRefusal("token-not-stored")."""
        with self.exclusive():
            self._store(0)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep everybody else's hands off the directory; may be nested. OSError if there is no directory."""
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            self._depth = 1
            yield
        finally:
            self._depth = 0
            os.close(directory)

    def _failed(self) -> int:
        try:
            fd = openat2(self._path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                return _decode(read_limited(fd, FILE_LIMIT))
            finally:
                os.close(fd)
        except (OSError, ValueError) as exc:
            raise TokenRefusal(
                "token-attempts-damaged",
                "the token is locked: the count of wrong PINs cannot be read",
                evidence=f"{self._path.name}: {getattr(exc, 'strerror', None) or exc}",
                remedy=_DAMAGED,
            ) from exc

    def _store(self, failed: int) -> None:
        text = json.dumps({"version": VERSION, "failed": failed}).encode() + b"\n"
        try:
            write_atomic(self._path, text, _MODE)
        except OSError as exc:
            raise not_stored(self._path, exc) from exc

    def _store_if_possible(self, failed: int) -> None:
        with suppress(TokenRefusal):
            self._store(failed)


def not_stored(path: Path, error: OSError) -> TokenRefusal:
    """Return the refusal for a file that cannot be written."""
    return TokenRefusal(
        "token-not-stored",
        "a file of the token cannot be written",
        evidence=f"{path.name}: {error.strerror}",
        remedy="make room on the data volume and try again",
    )


def _decode(text: bytes) -> int:
    """Return the count; ValueError for anything that `_store` does not write."""
    document = json.loads(text)
    if not isinstance(document, dict) or document.keys() != {"version", "failed"}:
        raise ValueError("not a count of wrong PINs")
    version, failed = document["version"], document["failed"]
    if type(version) is not int or version != VERSION:
        raise ValueError(f"not version {VERSION}")
    if type(failed) is not int or failed < 0:
        raise ValueError("the count is no number")
    return failed
