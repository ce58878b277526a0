# SPDX-License-Identifier: Apache-2.0
"""The ledger of a container's volumes: which there are, how large, and how each file began. Authenticated.

A file `volumes` in the container's directory: one line with the key's name and the MAC of all that follows,
then JSON. Everything is derived by HKDF-SHA256 from the container's key of 96 random bytes and its UUID; a
volume's keys from its name and salt too, so that no two volumes, and no two makings of one volume, share one.
What this cannot tell is an older state of ledger and files together from the present one: whoever can write
the disk can put back what was there before (decision record 0009).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from trustme_init.compartments.volumes import prefix
from trustme_init.errors import StorageRefusal
from trustme_init.linux.files import read_regular, write_atomic

KEY_SIZE: Final = 96
"""Bytes: interop section 2.7, so that a key of the original can be imported."""
LEDGER: Final = "volumes"
VERSION: Final = 1
SALT_SIZE: Final = 16
_LIMIT: Final = 64 * 1024
_NAME_SIZE: Final = 8
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESTORE: Final = "restore the container's directory from a backup, or wipe the container to begin anew"


@dataclass(frozen=True, slots=True, repr=False)
class VolumeKeys:
    """The keys of one volume."""

    encryption: bytes
    """64 bytes, AES-256-XTS."""
    authentication: bytes
    """32 bytes, HMAC-SHA-256 of each block."""
    journal: bytes
    """32 bytes, HMAC-SHA-256 of journal and superblock."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One volume."""

    size: int
    """Bytes of the device."""
    salt: bytes
    superblock: bytes = b""
    """SHA-256 of what its file begins with; empty as long as it is being made."""

    @property
    def ready(self) -> bool:
        """It was complete once, so it may have been used."""
        return bool(self.superblock)

    def fits(self, superblock: bytes) -> bool:
        """Whether a file begins as it did when it was made."""
        return hashlib.sha256(superblock).digest() == self.superblock


class Ledger:
    """See the module; every change is durable when it returns. Made by `create` and `load`."""

    def __init__(self, directory: Path, uuid: str, key: bytes, entries: dict[str, Entry]) -> None:
        self._path = directory / LEDGER
        self._uuid = uuid
        self._key = key
        self.entries = entries

    @staticmethod
    def is_lost(directory: Path) -> bool:
        """Whether a ledger that names volumes is there, for somebody who has no key to read it with."""
        path = directory / LEDGER
        try:
            return _read(path).partition(b"\n")[2] != _body({})
        except StorageRefusal:
            return path.exists()

    @classmethod
    def create(cls, directory: Path, uuid: str, key: bytes) -> Ledger:
        """Begin an empty ledger under a new key, in the place of what may be there."""
        _check_key(key)
        ledger = cls(directory, uuid, key, {})
        ledger._save()
        return ledger

    @classmethod
    def load(cls, directory: Path, uuid: str, key: bytes) -> Ledger:
        """Read a ledger that must be there.

        StorageRefusal: "volume-key-malformed", "volume-ledger-missing", "volume-key-wrong" (it was written
        under another key or for another container), "volume-ledger-damaged".
        """
        _check_key(key)
        path = directory / LEDGER
        head, _, body = _read(path).partition(b"\n")
        name, _, mac = head.partition(b" ")
        if not hmac.compare_digest(name, _derive(key, uuid, "key name", size=_NAME_SIZE).hex().encode()):
            raise StorageRefusal(
                "volume-key-wrong",
                "the container's volumes do not belong to its key",
                evidence=str(path),
                remedy="give the token that they were made with, or restore the container's directory",
            )
        if not hmac.compare_digest(mac, _mac(key, uuid, body)):
            raise _damaged(path, "its authentication code does not fit")
        return cls(directory, uuid, key, _parse(path, body))

    def begin(self, name: str, size: int) -> Entry:
        """Note that a volume is about to be made, with a fresh salt."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"no name of a volume: {name!a}")
        self.entries[name] = entry = Entry(size, os.urandom(SALT_SIZE))
        self._save()
        return entry

    def complete(self, name: str, superblock: bytes) -> None:
        """Note that a volume is complete."""
        self.entries[name] = replace(self.entries[name], superblock=hashlib.sha256(superblock).digest())
        self._save()

    def keys(self, name: str, entry: Entry) -> VolumeKeys:
        """Derive the keys of a volume."""
        material = _derive(self._key, self._uuid, f"volume {name}", salt=entry.salt, size=128)
        return VolumeKeys(material[:64], material[64:96], material[96:])

    def device(self, name: str) -> str:
        """Return the name of a volume's device."""
        return f"{prefix(self._uuid)}{name}"

    def _save(self) -> None:
        body = _body(self.entries)
        name = _derive(self._key, self._uuid, "key name", size=_NAME_SIZE).hex().encode()
        write_atomic(self._path, name + b" " + _mac(self._key, self._uuid, body) + b"\n" + body, 0o600)


def _derive(key: bytes, uuid: str, purpose: str, *, size: int, salt: bytes | None = None) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    # Lengths are fixed or last: no two purposes have the same text.
    info = f"trustme volumes {VERSION} {uuid} {purpose}".encode()
    return HKDF(SHA256(), size, salt, info).derive(key)


def _mac(key: bytes, uuid: str, body: bytes) -> bytes:
    secret = _derive(key, uuid, "ledger", size=32)
    return hmac.digest(secret, body, "sha256").hex().encode()


def _body(entries: Mapping[str, Entry]) -> bytes:
    volumes = {
        name: {"size": entry.size, "salt": entry.salt.hex(), "superblock_sha256": entry.superblock.hex()}
        for name, entry in sorted(entries.items())
    }
    return json.dumps({"version": VERSION, "volumes": volumes}, indent=1).encode() + b"\n"


def _check_key(key: bytes) -> None:
    if len(key) != KEY_SIZE:
        raise StorageRefusal(
            "volume-key-malformed",
            "the container's key has not the length of one",
            evidence=f"{len(key)} bytes, not {KEY_SIZE}",
            remedy="restore the key from a backup",
        )


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _LIMIT)
    except FileNotFoundError as exc:
        raise StorageRefusal(
            "volume-ledger-missing",
            "the container has a key, but nothing says which volumes belong to it",
            evidence=str(path),
            remedy=_RESTORE,
        ) from exc
    except OSError as exc:
        raise _damaged(path, str(exc.strerror)) from exc


def _parse(path: Path, body: bytes) -> dict[str, Entry]:
    """Read what the key vouches for; still, a later version may have written it."""
    try:
        document: dict[str, Any] = json.loads(body)
        if document["version"] != VERSION:
            raise _damaged(path, f"version {document['version']!a}, this system knows {VERSION}")
        return {
            name: Entry(
                int(entry["size"]),
                bytes.fromhex(entry["salt"]),
                bytes.fromhex(entry["superblock_sha256"]),
            )
            for name, entry in document["volumes"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _damaged(path, type(exc).__name__) from exc


def _damaged(path: Path, why: str) -> StorageRefusal:
    return StorageRefusal(
        "volume-ledger-damaged",
        "what the container's volumes are is written down, but not to be believed",
        evidence=f"{path}: {why}",
        remedy=_RESTORE,
    )
