# SPDX-License-Identifier: Apache-2.0
"""Add to a prepared db or dbx: of an OVMF variable store, or of a directory of `uefi esl` or `uefi auth`.

Rules:
- A directory is replaced as a whole or not at all, and a store likewise.
- Where it holds signed updates, NAME.auth is signed again *after* the list is complete, by the KEK that the
  directory itself enrols, and with a later time than before: firmware refuses an update that is not newer.
- A directory whose NAME.auth holds something else than NAME.esl is refused: which one is meant is not clear.
"""

from __future__ import annotations

import shutil
import stat
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.firmware.secureboot import parse_database
from trustme_tools.errors import ToolError
from trustme_tools.pki.directory import KEY_EXCHANGE_KEYS, PkiDirectory
from trustme_tools.publish import staged_directory, write_new
from trustme_tools.uefi.additions import Addition, Offer, add_to_db, add_to_dbx
from trustme_tools.uefi.auth import authenticate
from trustme_tools.uefi.keys import read_lists_data
from trustme_tools.uefi.store import KEY_VARIABLES, read_store, replace_database
from trustme_tools.uefi.update import parse_update

_REQUIRED: Final = ("KEK", "db")
"""Lists without which a directory is no enrolment; PK may be kept elsewhere."""

_TICK: Final = timedelta(seconds=1)
"""The resolution of the time of an update."""


@dataclass(frozen=True, slots=True)
class Signing:
    """Who signs an update and when (`now` and `timestamp` are aware, to the second).

    Without a `timestamp` an update has the time `now`, or is one second newer than the one it replaces.
    """

    pki: PkiDirectory | None
    now: datetime
    timestamp: datetime | None = None
    passphrase: bytes | None = None


def add(
    target: Path,
    variable: str,
    offer: Offer,
    *,
    signing: Signing,
    boot_only: bool = False,
    out: Path | None = None,
) -> Addition:
    """Add an offer to `variable` ("db" or "dbx") of a directory or a store.

    `out` is where a store goes (default: in its place). ToolError: "not-an-enrolment", "kek-needed",
    "kek-mismatch", "lists-differ", "time-not-later", "bad-lists", "not-a-store", or a code of `additions`.
    """
    if target.is_dir():
        return _add_to_directory(target.resolve(), variable, offer, signing, boot_only=boot_only)
    databases = {
        each.name: each.data for each in read_store(target) if KEY_VARIABLES.get(each.name) == each.guid
    }
    if not databases.get("db"):
        raise _no_enrolment(target, "the store has no db")
    addition = _judge(variable, databases, offer, signing, boot_only=boot_only)
    replace_database(target, out or target, variable, addition.data)
    return addition


def _judge(
    variable: str, databases: dict[str, bytes], offer: Offer, signing: Signing, *, boot_only: bool
) -> Addition:
    db, dbx = databases.get("db", b""), databases.get("dbx", b"")
    if variable == "dbx":
        return add_to_dbx(dbx, db, offer)
    return add_to_db(db, dbx, offer, boot_only=boot_only, at=signing.now)


def _add_to_directory(
    directory: Path, variable: str, offer: Offer, signing: Signing, *, boot_only: bool
) -> Addition:
    lists = read_directory(directory)
    if missing := [name for name in _REQUIRED if not lists.get(name)]:
        raise _no_enrolment(directory, f"no {', '.join(f'{name}.esl' for name in missing)}")
    addition = _judge(variable, lists, offer, signing, boot_only=boot_only)
    update = _signed_again(directory, variable, lists, addition.data, signing)
    mode = stat.S_IMODE(directory.stat().st_mode)
    with staged_directory(directory, force=True, mode=mode) as staging:
        shutil.copytree(directory, staging, symlinks=True, dirs_exist_ok=True)
        for suffix in ("esl", "auth"):
            (staging / f"{variable}.{suffix}").unlink(missing_ok=True)
        write_new(staging / f"{variable}.esl", addition.data)
        if update is not None:
            write_new(staging / f"{variable}.auth", update)
    return addition


def read_directory(directory: Path) -> dict[str, bytes]:
    """Return the lists of an enrolment directory, each parsed once; ToolError("bad-lists")."""
    return {
        name: read_lists_data(directory / f"{name}.esl")
        for name in KEY_VARIABLES
        if (directory / f"{name}.esl").exists()
    }


def _signed_again(
    directory: Path, variable: str, lists: dict[str, bytes], complete: bytes, signing: Signing
) -> bytes | None:
    """Return the signed update of a complete list, or None where the directory holds no signed updates."""
    if not any((directory / f"{name}.auth").exists() for name in KEY_VARIABLES):
        return None
    if signing.pki is None:
        raise ToolError(
            f"{directory} holds signed updates, and {variable}.auth has to be signed again",
            "give --pki DIR, where the KEK's key is",
            code="kek-needed",
        )
    certificate = signing.pki.certificate(KEY_EXCHANGE_KEYS[0])
    if certificate.public_bytes(Encoding.DER) not in parse_database(lists["KEK"]).certificates:
        raise ToolError(
            f"the KEK of {signing.pki.path} is not the one that {directory} enrols",
            "name the PKI that the directory was made with",
            code="kek-mismatch",
            evidence=certificate.subject.rfc4514_string(),
        )
    timestamp = _timestamp(directory / f"{variable}.auth", lists.get(variable, b""), signing)
    return authenticate(variable, complete, signing.pki, timestamp=timestamp, passphrase=signing.passphrase)


def _timestamp(old: Path, payload: bytes, signing: Signing) -> datetime:
    """Return a time that is later than that of the update to be replaced, which must hold `payload`."""
    chosen = signing.timestamp
    if not old.exists():
        return chosen or signing.now
    update = parse_update(old.read_bytes())
    if update.payload != payload:
        raise differ(old)
    if chosen is None:
        return max(signing.now, update.timestamp + _TICK)
    if chosen <= update.timestamp:
        raise ToolError(
            f"the new {old.name} would not be newer than the old one, and no firmware would take it",
            "give a later --timestamp, or none",
            code="time-not-later",
            evidence=f"old {update.timestamp:%Y-%m-%dT%H:%M:%SZ}, new {chosen:%Y-%m-%dT%H:%M:%SZ}",
        )
    return chosen


def differ(path: Path) -> ToolError:
    """Return the refusal of an update that holds something else than the list beside it."""
    return ToolError(
        f"{path} holds something else than {path.stem}.esl beside it",
        "make the directory anew with `trustme uefi auth`",
        code="lists-differ",
    )


def _no_enrolment(target: Path, evidence: str) -> ToolError:
    return ToolError(
        f"{target} is not a prepared set of Secure Boot keys",
        "name a directory of `trustme uefi esl` or `trustme uefi auth`, or a store of `trustme uefi vars`",
        code="not-an-enrolment",
        evidence=evidence,
    )
