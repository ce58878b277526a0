# SPDX-License-Identifier: Apache-2.0
"""`.esl` and `.auth` files for real machines (UEFI 2.10 section 8.2.2, EFI_VARIABLE_AUTHENTICATION_2).

A list is signed when it is complete, so db.auth holds everything that is in db.esl; who signs what is the
specification's order: PK and KEK by PK, db and dbx by KEK. efitools makes the authentication header.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from trustme_tools.pki.directory import KEY_EXCHANGE_KEYS, PLATFORM_KEY, PkiDirectory
from trustme_tools.publish import staged_directory, write_new
from trustme_tools.tooling import run
from trustme_tools.uefi.keys import OWNER

SIGNERS: Final[Mapping[str, str]] = {
    "PK": PLATFORM_KEY,
    "KEK": PLATFORM_KEY,
    "db": KEY_EXCHANGE_KEYS[0],
    "dbx": KEY_EXCHANGE_KEYS[0],
}
REMOVE_PK: Final = "PK-remove"
"""An empty PK, signed by PK: puts a machine back into setup mode."""


def write_lists(directory: Path, lists: Mapping[str, bytes], *, force: bool = False) -> list[str]:
    """Write NAME.esl for every list that is not empty; returns the file names."""
    with staged_directory(directory, force=force) as staging:
        return _write_lists(staging, lists)


def write_authenticated(
    directory: Path,
    lists: Mapping[str, bytes],
    pki: PkiDirectory,
    *,
    timestamp: datetime,
    passphrase: bytes | None = None,
    force: bool = False,
) -> list[str]:
    """Write NAME.esl and the signed NAME.auth, and PK-remove.auth; returns the file names.

    `timestamp` (aware, to the second) must be later than that of the variable it will replace.
    """
    with staged_directory(directory, force=force) as staging:
        names = _write_lists(staging, lists)
        updates = {name: (name, data) for name, data in lists.items() if data}
        updates[REMOVE_PK] = ("PK", b"")
        for stem, (variable, data) in updates.items():
            update = authenticate(variable, data, pki, timestamp=timestamp, passphrase=passphrase)
            write_new(staging / f"{stem}.auth", update)
            names.append(f"{stem}.auth")
        return names


def authenticate(
    variable: str, data: bytes, pki: PkiDirectory, *, timestamp: datetime, passphrase: bytes | None = None
) -> bytes:
    """Return `data` as a signed, time-based update that replaces `variable`."""
    signer = SIGNERS[variable]
    with (
        tempfile.TemporaryDirectory(prefix="trustme-auth-") as temporary,
        pki.unlocked_key(signer, passphrase) as (descriptor, key_path),
    ):
        source, out = Path(temporary, "in.esl"), Path(temporary, "out.auth")
        source.write_bytes(data)
        run(
            "sign-efi-sig-list",
            [
                *("-t", f"{timestamp.astimezone(UTC):%Y-%m-%d %H:%M:%S}", "-g", OWNER),
                *("-c", pki.certificate_path(signer), "-k", key_path, variable, source, out),
            ],
            purpose=f"sign the update of {variable}",
            pass_fds=(descriptor,),
        )
        return out.read_bytes()


def _write_lists(directory: Path, lists: Mapping[str, bytes]) -> list[str]:
    names = []
    for name, data in lists.items():
        if data:
            write_new(directory / f"{name}.esl", data)
            names.append(f"{name}.esl")
    return names
