# SPDX-License-Identifier: Apache-2.0
"""What every kind of token does, whatever keeps its key: a file (softtoken), the TPM, or a smart card.

A token is a directory of its own; which kind it is, its files say. It guards one key pair, which wraps the
keys of containers (`wrapping`). Moving a container to another token wraps its key anew: the key stays, and so
does everything that is encrypted with it.
"""

from __future__ import annotations

import hmac
import os
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol

from trustme_init.errors import DeviceRefusal, TokenRefusal
from trustme_init.tokens import place, wrapping
from trustme_init.tokens.pkcs11_token import Hardware, Pkcs11Token
from trustme_init.tokens.place import TokenStatus
from trustme_init.tokens.store import TokenStore
from trustme_init.tokens.tpm_token import TpmToken
from trustme_init.tokens.wrapping import OpenToken


class TokenKind(Protocol):
    """One token. A change is durable on return, and old or new whenever the power goes.

    Every use of a PIN is one try, counted by the token's one counter: TokenRefusal "token-wrong-pin",
    "token-locked" and what else `attempts.Attempts.try_pin` raises; "token-missing" where none is.
    """

    def status(self) -> TokenStatus:
        """Return what can be said without the PIN; never a refusal."""
        ...

    def create(self, pin: str, *, common_name: str, now: datetime) -> None:
        """Make the token; TokenRefusal "token-bad-pin", "token-already-there", "token-not-stored"."""
        ...

    def open(self, pin: str) -> AbstractContextManager[OpenToken]:
        """Lend the token's key, after one try of the PIN."""
        ...

    def change_pin(self, old: str, new: str) -> None:
        """Set another PIN; what was wrapped stays so."""
        ...

    def remove(self) -> None:
        """Remove the token for good; also where none is, or the rest of an interrupted removal."""
        ...


def token(
    kind: str, directory: Path, limit: int, *, tcti: str | None, hardware: Hardware | None
) -> TokenKind:
    """Return the token of a kind (of `place.TOKEN_FILES`) in `directory`, there or not yet.

    ValueError for another kind.

    Raises:
        DeviceRefusal: "tpm-missing" for a TPM token on a machine without a TPM, "pkcs11-not-allowed" for a
            PKCS#11 token where the policy names no module.
    """
    match kind:
        case place.SOFTTOKEN:
            return TokenStore(directory, limit)
        case place.TPM if tcti is not None:
            return TpmToken(directory, limit, tcti)
        case place.PKCS11 if hardware is not None:
            return Pkcs11Token(directory, limit, hardware)
        case place.TPM:
            raise DeviceRefusal(
                "tpm-missing",
                "a TPM token needs a TPM, and this machine has none",
                evidence=directory.name,
                remedy="use a softtoken, or the machine whose TPM made the token",
            )
        case place.PKCS11:
            raise DeviceRefusal(
                "pkcs11-not-allowed",
                "the policy of this base system names no PKCS#11 module",
                evidence=directory.name,
                remedy="use another kind of token, or a base system with a module",
            )
    raise ValueError(f"not a kind of token: {kind}")


def kind_in(directory: Path) -> str | None:
    """Return which kind of token lies in `directory`, None if none does.

    Raises:
        TokenRefusal: "token-ambiguous" where there are two: they would share a count.
    """
    found = [kind for kind, name in place.TOKEN_FILES.items() if os.path.lexists(directory / name)]
    if len(found) > 1:
        raise TokenRefusal(
            "token-ambiguous",
            "two tokens are in the place of one",
            evidence=f"{directory.name}: {' and '.join(found)}",
            remedy="take out the file of the one that did not wrap the key",
        )
    return found[0] if found else None


def rewrap(blob: bytes, source: OpenToken, target: OpenToken, *, context: bytes) -> bytes:
    """Return what `source` has wrapped, wrapped by `target`, which has shown that it can unwrap it.

    Nothing is stored: until the caller has replaced the old form, durably, the old one counts.

    Raises:
        TokenRefusal: "wrapped-key-damaged" where `source` cannot unwrap it; "rewrap-failed" where what
            `target` gives back is not what it was given.
    """
    key = wrapping.unwrap(source, blob, context=context)
    fresh = wrapping.wrap(target.public_key, key, context=context)
    if not hmac.compare_digest(wrapping.unwrap(target, fresh, context=context), key):
        raise TokenRefusal(
            "rewrap-failed",
            "the other token does not give back the key that it was given",
            evidence="unwrapped, and another one",
            remedy="stay with the present token; the other one, or the way to it, is defective",
        )
    return fresh
