# SPDX-License-Identifier: Apache-2.0
"""The history of the lifecycle statements that this device obeyed, on disk and in the TPM.

In `cml/lifecycle`: `history.json`, an entry for each statement in their order, and, while one is applied,
`pending.json` with that statement. The TPM holds the hash chain of the entries (`tpm.nv_history`). How a
statement gets into the history, each step durable before the next:

    begin    pending.json is written
    commit   the TPM's chain is extended: from here on the statement is obeyed, whatever happens
    (the caller makes its changes, each of which may be made twice)
    finish   history.json is written, pending.json is removed

So what lies on the disk and what the TPM says fit together in two ways only:

    the TPM has chain(history)             nothing is to be done; a pending statement never was committed
    the TPM has chain(history, pending)    the pending statement is committed and is to be finished

Everything else is "lifecycle-rolled-back": the disk, or a part of it, is older than what the TPM knows.

A committed statement is not judged again: its text is, byte for byte, the one that was judged before the TPM
recorded it, and judging it by what is valid today could only leave a device with half of a change.

Without a TPM, which only a development policy allows, a pending statement counts as committed, and an older
disk cannot be told from the present one.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate

from trustme_init.errors import StorageRefusal, TrustRefusal
from trustme_init.linux.files import openat2, read_limited, sync_directory
from trustme_init.provisioning.layout import not_writable, remove_durably, save
from trustme_init.tpm import nv_history, ownership
from trustme_init.tpm.connection import open_tpm
from trustme_init.trust.statement import (
    SERIAL_LIMIT,
    ReplaceAuthority,
    RetireAuthority,
    SignedStatement,
    Statement,
    parse_statement,
)

ENTRY_LIMIT: Final = 4096
"""Statements in the life of a device: one every working day for sixteen years."""

_VERSION: Final = 1
_FILE_LIMIT: Final = 1024 * 1024
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Entry:
    """A statement that was obeyed; `sha256` of its text, hex."""

    serial: int
    action: str
    sha256: str
    purpose: str = ""
    """Of the anchors that it changed, if it did."""
    adds: str = ""
    """SHA-256 of the anchor that is believed from then on, hex."""
    drops: str = ""
    """SHA-256 of the anchor that no longer is, hex."""

    @classmethod
    def of(cls, statement: Statement) -> Entry:
        """Return the entry of a statement."""
        told = (statement.serial, statement.name, statement.sha256)
        match statement.action:
            case ReplaceAuthority() as action:
                drops = "" if action.overlap else action.old_sha256
                return cls(*told, action.purpose.value, _fingerprint(action.certificate), drops)
            case RetireAuthority() as action:
                return cls(*told, action.purpose.value, drops=action.sha256)
        return cls(*told)

    @property
    def digest(self) -> bytes:
        """What the TPM's chain is extended by; every field is in it."""
        fields = (str(self.serial), self.action, self.sha256, self.purpose, self.adds, self.drops)
        return sha256(" ".join(fields).encode()).digest()


def chain(entries: Sequence[Entry]) -> bytes:
    """Return what the TPM says when these entries, and no others, were made."""
    value = nv_history.EMPTY
    for entry in entries:
        value = nv_history.extended(value, entry.digest)
    return value


@dataclass(frozen=True, slots=True)
class History:
    """The history in `directory`, which is made when it is first written to.

    StorageRefusal: "lifecycle-history-damaged", "disk-not-writable"; DeviceRefusal: as `tpm.nv_history`.
    """

    directory: Path
    tcti: str | None
    """None: there is no TPM."""
    tpm_directory: Path
    """Where `tpm.ownership` keeps the owner's authorisation."""

    @property
    def _history(self) -> Path:
        return self.directory / "history.json"

    @property
    def _pending(self) -> Path:
        return self.directory / "pending.json"

    def prepare(self) -> None:
        """Make what the TPM needs for it, in provisioning; DeviceRefusal("history-foreign")."""
        if self.tcti is not None:
            with open_tpm(self.tcti) as tpm:
                nv_history.define_history(tpm, ownership.authorisations(tpm, self.tpm_directory).owner)

    def entries(self) -> tuple[Entry, ...]:
        """Return what the disk says was obeyed, oldest first."""
        document = _load(self._history)
        if document is None:
            return ()
        try:
            entries = tuple(Entry(**each) for each in document["entries"])
            serials = [entry.serial for entry in entries]
            if any(not _is_well_formed(entry) for entry in entries) or serials != sorted(set(serials)):
                raise ValueError("not a rising row of entries")
        except (KeyError, TypeError, ValueError) as exc:
            raise _damaged(self._history, str(exc)) from exc
        return entries

    def committed(self, entries: Sequence[Entry]) -> Statement | None:
        """Compare with the TPM; return the statement that is committed and not finished, if there is one.

        TrustRefusal("lifecycle-rolled-back") when the disk is older than what the TPM knows.
        """
        if self.tcti is None:
            return self._pending_statement()
        with open_tpm(self.tcti) as tpm:
            value = nv_history.read_history(tpm)
        if value == chain(entries):
            return None
        pending = self._pending_statement()
        if pending is not None and value == chain([*entries, Entry.of(pending)]):
            return pending
        raise TrustRefusal(
            "lifecycle-rolled-back",
            "the data volume is older than the last lifecycle statement that this device obeyed",
            evidence=f"the TPM has {value.hex()[:16]}, {len(entries)} statements on the disk make "
            f"{chain(entries).hex()[:16]}, {'one' if pending is not None else 'none'} is pending",
            remedy="put back the disk as it was last; an older copy must not be used, it may believe in what "
            "was replaced since. To start over, clear the TPM and provision the device again",
        )

    def begin(self, signed: SignedStatement) -> None:
        """Keep a statement that is about to be committed."""
        document = {
            "version": _VERSION,
            **{name: base64.b64encode(data).decode() for name, data in signed._asdict().items()},
        }
        try:
            if not self.directory.is_dir():
                self.directory.mkdir(mode=0o700)
                sync_directory(self.directory.parent)
        except OSError as exc:
            raise not_writable(self.directory, exc) from exc
        save(self._pending, _encoded(document))

    def commit(self, entry: Entry) -> None:
        """Have the TPM know that a statement is obeyed."""
        if self.tcti is not None:
            with open_tpm(self.tcti) as tpm:
                owner = ownership.authorisations(tpm, self.tpm_directory).owner
                nv_history.extend_history(tpm, owner, entry.digest)

    def finish(self, entries: Sequence[Entry]) -> None:
        """Write the history with a statement that has been done, and forget that it was pending."""
        document = {
            "version": _VERSION,
            "entries": [asdict(each) for each in entries],
        }
        save(self._history, _encoded(document))
        self.discard()

    def discard(self) -> None:
        """Forget a pending statement that was never committed."""
        if os.path.lexists(self._pending):
            try:
                remove_durably(self._pending)
            except OSError as exc:
                raise not_writable(self._pending, exc) from exc

    def _pending_statement(self) -> Statement | None:
        document = _load(self._pending)
        if document is None:
            return None
        try:
            return parse_statement(base64.b64decode(document["text"], validate=True))
        except (KeyError, TypeError, ValueError, TrustRefusal) as exc:
            raise _damaged(self._pending, str(exc)) from exc


def _is_well_formed(entry: Entry) -> bool:
    texts = (entry.action, entry.sha256, entry.purpose, entry.adds, entry.drops)
    return (
        type(entry.serial) is int
        and 0 < entry.serial < SERIAL_LIMIT
        and all(isinstance(each, str) for each in texts)
        and _SHA256.fullmatch(entry.sha256) is not None
        and all(not each or _SHA256.fullmatch(each) for each in (entry.adds, entry.drops))
    )


def _fingerprint(pem: bytes) -> str:
    """Return the SHA-256 of a judged certificate, hex."""
    return sha256(load_pem_x509_certificate(pem).public_bytes(Encoding.DER)).hexdigest()


def _load(path: Path) -> dict[str, Any] | None:
    try:
        fd = openat2(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            document: Any = json.loads(read_limited(fd, _FILE_LIMIT))
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _damaged(path, str(exc.strerror)) from exc
    except (ValueError, RecursionError) as exc:
        raise _damaged(path, type(exc).__name__) from exc
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise _damaged(path, f"not of version {_VERSION}")
    return document


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"


def _damaged(path: Path, evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "lifecycle-history-damaged",
        "what this device knows of the lifecycle statements it obeyed cannot be read",
        evidence=f"{path.name}: {evidence[:200]}",
        remedy="the data volume is damaged; put it back as it was last, or provision the device again",
    )
