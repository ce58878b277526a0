# SPDX-License-Identifier: Apache-2.0
"""The highest version of each GuestOS that was ever installed, which outlives the GuestOS.

`cml/guestos_floors.json`: for each name the version and the SHA-256 of its configuration. Versions never go
down, and one version is one content: neither removing a GuestOS nor wiping the device makes room for an older
one, or for another one of the same number. The record is durable before the version can be seen.

What it does not do: who puts an older copy of the whole data volume back has the older record, too (decision
record 0010).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

from trustme_init.errors import StorageRefusal, TrustRefusal
from trustme_init.guestos.store import unwritable
from trustme_init.linux.files import read_regular, write_atomic
from trustme_init.trust.selection import NAME_PATTERN, VERSION_LIMIT, GuestOsId

FILE: Final = "guestos_floors.json"
NAME_LIMIT: Final = 1024
"""GuestOS names in the life of a device."""

_VERSION: Final = 1
_FILE_LIMIT: Final = 512 * 1024
_NAME: Final = re.compile(NAME_PATTERN)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Floor(NamedTuple):
    """The highest version that was installed."""

    version: int
    config_sha256: str
    """Hex."""


class Floors:
    """The record in `home`. StorageRefusal: "guestos-floors-damaged"."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE

    def load(self) -> dict[str, Floor]:
        """Return every floor by name; none before the first installation."""
        try:
            return _parsed(json.loads(read_regular(self._path, _FILE_LIMIT)))
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise _damaged(str(exc.strerror)) from exc
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise _damaged(type(exc).__name__) from exc

    def require(self, guest_os: GuestOsId, config_sha256: str) -> None:
        """Refuse a version below the floor, and another content at it.

        TrustRefusal: "guestos-rolled-back", "guestos-version-taken".
        """
        floor = self.load().get(guest_os.name)
        if floor is None or guest_os.version > floor.version:
            return
        if guest_os.version < floor.version:
            raise TrustRefusal(
                "guestos-rolled-back",
                "a newer version of this GuestOS was installed before; versions do not go down",
                evidence=f"{guest_os.name}: version {guest_os.version}, floor {floor.version}",
                remedy="build the GuestOS with a higher version and sign it",
            )
        if config_sha256 != floor.config_sha256:
            raise version_taken(guest_os)

    def rise(self, guest_os: GuestOsId, config_sha256: str) -> None:
        """Have the record say, durably, that this version was installed; refusals as `require`.

        StorageRefusal: "guestos-unwritable", "guestos-floors-full".
        """
        self.require(guest_os, config_sha256)
        floors = self.load()
        floor = Floor(guest_os.version, config_sha256)
        if floors.get(guest_os.name) == floor:
            return
        floors[guest_os.name] = floor
        if len(floors) > NAME_LIMIT:
            raise StorageRefusal(
                "guestos-floors-full",
                f"this device has seen {NAME_LIMIT} GuestOSes and takes no new name",
                evidence=guest_os.name,
                remedy="install a newer version of one of them under its name",
            )
        document = {"version": _VERSION, "floors": {name: each._asdict() for name, each in floors.items()}}
        try:
            write_atomic(self._path, json.dumps(document, indent=1, sort_keys=True).encode() + b"\n", 0o600)
        except OSError as exc:
            raise unwritable(FILE, exc) from exc


def version_taken(guest_os: GuestOsId) -> TrustRefusal:
    """Return the refusal of a second content under one version."""
    return TrustRefusal(
        "guestos-version-taken",
        "another configuration was installed under this name and version",
        evidence=guest_os.stem,
        remedy="build the GuestOS with a higher version and sign it",
    )


def _parsed(document: Any) -> dict[str, Floor]:
    if document["version"] != _VERSION:
        raise ValueError("another version")
    floors = {name: Floor(**each) for name, each in document["floors"].items()}
    for name, floor in floors.items():
        if (
            not _NAME.fullmatch(name)
            or type(floor.version) is not int
            or not 0 < floor.version <= VERSION_LIMIT
            or not _SHA256.fullmatch(floor.config_sha256)
        ):
            raise ValueError("not a floor")
    return floors


def _damaged(evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "guestos-floors-damaged",
        "what this device knows of the versions that were installed cannot be read",
        evidence=f"{FILE}: {evidence}",
        remedy="the data volume is damaged; put it back as it was last",
    )
