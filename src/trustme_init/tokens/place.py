# SPDX-License-Identifier: Apache-2.0
"""The directory that a token lies in: one file that is the token, and the count of wrong PINs beside it.

Rules, for every kind of token:
- The token's file is replaced as a whole, and its rename is the moment that counts.
- The count is there before the token is, and is removed after it: no power cut leaves a token without one.
- One token: where there is one of any kind, none of another is made. They would share a count.
- A file is 0600, the directory 0700, whatever the umask; nothing is read through a symbolic link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from trustme_init.errors import TokenRefusal
from trustme_init.linux.files import openat2, read_limited, sync_directory, write_atomic
from trustme_init.tokens.attempts import Attempts, not_stored

SOFTTOKEN: Final = "softtoken"
TPM: Final = "tpm"
PKCS11: Final = "pkcs11"
TOKEN_FILES: Final = {SOFTTOKEN: "testuser.p12", TPM: "tpm-token.json", PKCS11: "pkcs11-token.json"}
"""Kind of token → the file that it is."""
ATTEMPTS_NAME: Final = "attempts.json"

_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700


@dataclass(frozen=True, slots=True)
class TokenStatus:
    """What can be said about the device's token without its PIN."""

    kind: str
    """One of `place.TOKEN_FILES`, or "none"."""
    tries_left: int
    limit: int
    certificate_sha256: str | None = None
    """Hex; None where the file hides its certificate or cannot be read. Not verified: that takes the PIN."""
    rounds: int | None = None
    default_pin: bool | None = None
    """None: not known."""
    fault: str | None = None
    """Code of the refusal that meets whoever uses the token."""

    def as_dict(self) -> dict[str, Any]:
        """Return the form of status replies."""
        return asdict(self)


class TokenPlace:
    """The token in the file `name`, at most `size` bytes, of `directory`, which is made when a token is."""

    def __init__(self, directory: Path, name: str, size: int, limit: int) -> None:
        self._directory = directory
        self._path = directory / name
        self._size = size
        self._attempts_path = directory / ATTEMPTS_NAME
        self._attempts = Attempts(self._attempts_path, limit)
        self._limit = limit

    @contextmanager
    def _changing(self, *, make: bool = False) -> Iterator[None]:
        """Hold the directory for one operation; `make` it if it is not there."""
        with ExitStack() as held:
            try:
                if make and not self._directory.is_dir():
                    self._directory.mkdir()
                    self._directory.chmod(_DIRECTORY_MODE)  # whatever the umask
                    sync_directory(self._directory.parent)
                held.enter_context(self._attempts.exclusive())
            except FileNotFoundError as exc:
                raise not_stored(self._directory, exc) if make else self._missing() from exc
            except OSError as exc:
                raise not_stored(self._directory, exc) from exc
            yield

    def _status(self, kind: str, default_pin: Callable[[], bool | None]) -> TokenStatus:
        """Return the status of a token that shows nothing but whether it has the published PIN."""
        fault = known = None
        try:
            known = default_pin()
        except TokenRefusal as refusal:
            fault = refusal.code
        tries_left, attempts_fault = self._tries_left()
        if fault == "token-missing":
            return TokenStatus("none", tries_left, self._limit, fault=attempts_fault)
        return TokenStatus(kind, tries_left, self._limit, default_pin=known, fault=attempts_fault or fault)

    def _tries_left(self) -> tuple[int, str | None]:
        """Return the tries that are left, and the code of what there is to say about them."""
        if self._is_new():
            return self._limit, None
        try:
            left = self._attempts.remaining
        except TokenRefusal as refusal:
            return 0, refusal.code
        return left, None if left else "token-locked"

    def _is_new(self) -> bool:
        """Whether there is neither a token nor a count."""
        return not self._is_there() and not os.path.lexists(self._attempts_path)

    def _is_there(self) -> bool:
        """Whether anything has the token's name, readable or not."""
        return os.path.lexists(self._path)

    def _require_none(self, *, of_another_kind: bool = False) -> None:
        """TokenRefusal("token-already-there") where there is a token, or one `of_another_kind` than this."""
        for name in TOKEN_FILES.values():
            if of_another_kind and name == self._path.name:
                continue
            if os.path.lexists(self._directory / name):
                raise TokenRefusal(
                    "token-already-there",
                    "there is a token already",
                    evidence=name,
                    remedy="change its PIN, replace it, or remove it first",
                )

    def _read(self) -> bytes:
        try:
            # O_NONBLOCK: a FIFO of that name must be refused, not waited for.
            fd = openat2(self._path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise self._unreadable("it is no regular file")
                return read_limited(fd, self._size)
            finally:
                os.close(fd)
        except FileNotFoundError as exc:
            raise self._missing() from exc
        except OSError as exc:
            if exc.errno == errno.EFBIG:
                raise self._too_large(f"more than {self._size} bytes") from exc
            raise self._unreadable(str(exc.strerror)) from exc

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomic(path, data, _MODE)
        except OSError as exc:
            raise not_stored(path, exc) from exc

    def _remove(self, path: Path) -> None:
        """Remove a file durably, and what an interrupted write of it may have left (`write_atomic`)."""
        try:
            path.unlink(missing_ok=True)
            path.with_name(f".{path.name}.new").unlink(missing_ok=True)
            sync_directory(path.parent)
        except OSError as exc:
            raise not_stored(path, exc) from exc

    def _missing(self) -> TokenRefusal:
        return TokenRefusal(
            "token-missing",
            "there is no token",
            evidence=self._path.name,
            remedy="create one, or replace it by the operator's own",
        )

    def _unreadable(self, evidence: str) -> TokenRefusal:
        return TokenRefusal(
            "token-unreadable",
            "the token cannot be read",
            evidence=f"{self._path.name}: {evidence}",
            remedy="put the token's file back, or remove the token and set a new one up",
        )

    def _too_large(self, evidence: str) -> TokenRefusal:
        return self._unreadable(evidence)
