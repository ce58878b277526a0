# SPDX-License-Identifier: Apache-2.0
"""What is kept of the containers that there are: `/data/cml/containers`, a folder for each.

    <uuid>/record.json      UUID, number of the uid range, when it was created: never changed
    <uuid>/config.json      its configuration: raw text, signature, certificate
    <uuid>/token/, key.*    `containers.keys`
    <uuid>/<name>.img       its lasting volumes, and their ledger (`compartments.volumes`)
    .new-<uuid>/            one that is being created
    .removing-<uuid>/       one that is being removed

A container is there when its folder has its name: it is made beside and renamed, and renamed before it is
removed. What stands in it is not believed: the configuration is judged anew whenever it is used. A damaged
folder is a fault of that one container.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trustme_init.containers.config import CONFIG_LIMIT, UUID_PATTERN
from trustme_init.containers.ledger import SLOT_LIMIT, unwritable
from trustme_init.errors import ControlRefusal, StorageRefusal
from trustme_init.guestos.store import CERTIFICATE_LIMIT, SIGNATURE_LIMIT, SignedFiles
from trustme_init.linux.files import read_regular, sync_directory, write_atomic

DIRECTORY: Final = "containers"
RECORD: Final = "record.json"
CONFIG: Final = "config.json"
TOKEN: Final = "token"  # noqa: S105 - a folder's name
KEY: Final = "key."
"""How the names of the files begin that hold the container's key in any form."""
WIPING: Final = "wiping"
"""A note: volumes and key are being removed."""
FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700

_NEW: Final = ".new-"
_REMOVING: Final = ".removing-"
_VERSION: Final = 1
_RECORD_LIMIT: Final = 4096
_CONFIG_FILE_LIMIT: Final = 2 * (CONFIG_LIMIT + SIGNATURE_LIMIT + CERTIFICATE_LIMIT)
_UUID: Final = re.compile(UUID_PATTERN)


@dataclass(frozen=True, slots=True)
class Record:
    """What never changes of a container."""

    uuid: str
    slot: int
    """Number of its uid range (`ledger.Entry`)."""
    created: int
    """Seconds since the epoch."""


class Records:
    """The containers of one data volume; `home` is `/data/cml`.

    StorageRefusal: "container-damaged", "containers-unreadable", "containers-unwritable".
    """

    def __init__(self, home: Path) -> None:
        self._path = home / DIRECTORY

    def folder(self, uuid: str) -> Path:
        """Return a container's folder; ControlRefusal("container-unknown") if there is none."""
        if not _UUID.fullmatch(uuid) or not (self._path / uuid).is_dir():
            raise unknown(uuid)
        return self._path / uuid

    def uuids(self) -> Sequence[str]:
        """Return the containers that there are, in order."""
        return tuple(name for name in self._names() if _UUID.fullmatch(name))

    def present(self) -> frozenset[str]:
        """Return the containers of which any data is there."""
        bare = (name.removeprefix(_NEW).removeprefix(_REMOVING) for name in self._names())
        return frozenset(name for name in bare if _UUID.fullmatch(name))

    def read(self, uuid: str) -> Record:
        """Return a container's record."""
        document = self._document(uuid, RECORD, _RECORD_LIMIT)
        try:
            record = Record(document["uuid"], document["slot"], document["created"])
        except (KeyError, TypeError) as exc:
            raise _damaged(uuid, f"{RECORD}: {exc}") from exc
        numbers = type(record.slot) is int and type(record.created) is int
        if record.uuid != uuid or not numbers or not 1 <= record.slot <= SLOT_LIMIT or record.created < 0:
            raise _damaged(uuid, f"{RECORD} is not of this container")
        return record

    def config(self, uuid: str) -> SignedFiles:
        """Return a container's configuration, not judged."""
        document = self._document(uuid, CONFIG, _CONFIG_FILE_LIMIT)
        try:
            parts = [base64.b64decode(document[name], validate=True) for name in SignedFiles.__slots__]
        except (KeyError, TypeError, ValueError) as exc:
            raise _damaged(uuid, f"{CONFIG}: {type(exc).__name__}") from exc
        return SignedFiles(*parts)

    def create(self, record: Record, files: SignedFiles) -> None:
        """Make a container, whole or not at all; durable on return."""
        staged = self._path / f"{_NEW}{record.uuid}"
        document = {
            "version": _VERSION,
            "uuid": record.uuid,
            "slot": record.slot,
            "created": record.created,
        }
        try:
            self._path.mkdir(mode=FOLDER_MODE, exist_ok=True)
            sync_directory(self._path.parent)
            _remove_tree(staged)
            staged.mkdir(mode=FOLDER_MODE)
            write_atomic(staged / RECORD, json.dumps(document).encode() + b"\n", FILE_MODE)
            write_atomic(staged / CONFIG, _encoded(files), FILE_MODE)
            staged.rename(self._path / record.uuid)
            sync_directory(self._path)
        except OSError as exc:
            with suppress(OSError):
                _remove_tree(staged)
            raise unwritable(record.uuid, exc) from exc

    def update(self, uuid: str, files: SignedFiles) -> None:
        """Replace a container's configuration; durable on return."""
        path = self.folder(uuid) / CONFIG
        try:
            write_atomic(path, _encoded(files), FILE_MODE)
        except OSError as exc:
            with suppress(OSError):
                path.with_name(f".{CONFIG}.new").unlink()
            raise unwritable(uuid, exc) from exc

    def remove(self, uuid: str) -> None:
        """Remove a container with all its data; from the first step on it is not there any more."""
        folder = self.folder(uuid)
        gone = self._path / f"{_REMOVING}{uuid}"
        try:
            _remove_tree(gone)
            folder.rename(gone)
            sync_directory(self._path)
            _remove_tree(gone)
            sync_directory(self._path)
        except OSError as exc:
            raise unwritable(uuid, exc) from exc

    def tidy(self) -> None:
        """Remove what interrupted changes left behind; what cannot be removed keeps its uid range."""
        for name in self._names():
            if name.startswith((_NEW, _REMOVING)):
                with suppress(OSError):
                    _remove_tree(self._path / name)
                    sync_directory(self._path)

    def wipe(self, uuid: str) -> None:
        """Remove a container's key and volumes, and nothing else; once begun, it will be finished."""
        try:
            write_atomic(self.folder(uuid) / WIPING, b"", FILE_MODE)
        except OSError as exc:
            raise unwritable(uuid, exc) from exc
        self.finish_wiping(uuid)

    def finish_wiping(self, uuid: str) -> None:
        """Finish what `wipe` began, if it did. The key goes first: then nobody can read the rest."""
        folder = self.folder(uuid)
        if not (folder / WIPING).exists():
            return
        try:
            entries = sorted(folder.iterdir(), key=lambda path: not path.name.startswith(KEY))
            for path in entries:
                if path.name in {RECORD, CONFIG, TOKEN, WIPING}:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                if path.name.startswith(KEY):
                    sync_directory(folder)
            sync_directory(folder)
            (folder / WIPING).unlink()
            sync_directory(folder)
        except OSError as exc:
            raise unwritable(uuid, exc) from exc

    def _names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in self._path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise StorageRefusal(
                "containers-unreadable",
                "the containers on the data volume cannot be read",
                evidence=str(exc.strerror),
                remedy="the data volume is damaged; restore it",
            ) from exc

    def _document(self, uuid: str, name: str, limit: int) -> dict[str, Any]:
        try:
            document = json.loads(self._bytes(uuid, name, limit))
        except (ValueError, RecursionError) as exc:
            raise _damaged(uuid, f"{name} is not JSON") from exc
        if not isinstance(document, dict) or document.get("version") != _VERSION:
            raise _damaged(uuid, f"{name} is not of version {_VERSION}")
        return document

    def _bytes(self, uuid: str, name: str, limit: int) -> bytes:
        path = self.folder(uuid) / name
        try:
            return read_regular(path, limit)
        except OSError as exc:
            raise _damaged(uuid, f"{name}: {exc.strerror}") from exc


def _encoded(files: SignedFiles) -> bytes:
    parts = {name: base64.b64encode(getattr(files, name)).decode() for name in SignedFiles.__slots__}
    return json.dumps({"version": _VERSION, **parts}).encode() + b"\n"


def _remove_tree(path: Path) -> None:
    if os.path.lexists(path):
        shutil.rmtree(path)


def unknown(uuid: str) -> ControlRefusal:
    """Return the refusal of a container that there is not."""
    return ControlRefusal(
        "container-unknown",
        "there is no such container",
        evidence=ascii(uuid)[1:-1][:64],
        remedy="`control list` shows those that there are",
    )


def _damaged(uuid: str, evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "container-damaged",
        "what is kept of the container cannot be used",
        evidence=f"{uuid}: {evidence}",
        remedy="restore the data volume, or remove the container and create it again",
    )
