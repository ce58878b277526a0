# SPDX-License-Identifier: Apache-2.0
"""What is remembered of every container there ever was: its uid range, and how far its serial has come.

One file, `containers.json` in `/data/cml`, outside the folders that come and go with the containers. Rules:
- An entry is durable before its container is there, and it is never removed.
- A range belongs to one container for as long as any of its data is there. Only then it is free again.
- The serial only rises. At the same serial only the very same text is good, so a configuration that was
  replaced does not come back, not even after its container was removed.
- The ledger names the one text that counts. While that is being put in its place, the one that it replaces
  still counts: whichever of the two a power cut leaves there.
- A damaged ledger, or none beside containers, says nothing about anybody: then no container is made or
  started. It cannot be made anew from what it protects.

Who can write to the data volume offline can put back an older ledger together with everything else on it:
that takes the volume's key, which is bound to the TPM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from trustme_init.compartments.spec import UID_BASE, UID_COUNT
from trustme_init.containers.config import SERIAL_LIMIT, UUID_PATTERN, JudgedConfig
from trustme_init.errors import StorageRefusal, TrustRefusal
from trustme_init.linux.files import read_regular, write_atomic

FILE_NAME: Final = "containers.json"
SLOT_LIMIT: Final = 1024
"""Containers at once: their ranges end at 67,698,687."""
ENTRY_LIMIT: Final = 8192
"""Containers in the life of a device."""

_VERSION: Final = 1
_FILE_LIMIT: Final = 4 * 1024 * 1024
_MODE: Final = 0o600
_UUID: Final = re.compile(UUID_PATTERN)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one container."""

    slot: int
    """Number of its uid range, from 1 on (the core has 0); 0 once it has none."""
    serial: int
    """Of the newest configuration that was accepted for it; 0 if none of them had one."""
    sha256: str
    """Of that configuration's text, hex."""
    replaced: str = ""
    """Of the text that it replaces, hex, until that is gone for good."""

    @property
    def uid_base(self) -> int:
        """The first uid (and gid) of its range on the machine."""
        return UID_BASE + self.slot * UID_COUNT


class Ledger:
    """The ledger of one data volume; `home` is `/data/cml`."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE_NAME

    def entries(self, present: Iterable[str]) -> dict[str, Entry]:
        """Return every entry by UUID; `present` are the containers that have data on the volume.

        StorageRefusal: "container-ledger-damaged", also where there is data that it does not know.
        """
        known = self._read()
        if known is None:
            strangers = sorted(present)
            if strangers:
                raise _damaged(f"there is none, but a container {strangers[0]}")
            return {}
        return known

    def enter(self, uuid: str, config: JudgedConfig, present: frozenset[str]) -> Entry:
        """Give a new container a range, and note its configuration; durable on return.

        TrustRefusal: as `require`. StorageRefusal: "container-ledger-damaged", "containers-full",
        "containers-unwritable".
        """
        known = self.entries(present)
        former = known.get(uuid)
        require(former, config)
        taken = {entry.slot for other, entry in known.items() if other in present}
        slot = next((each for each in range(1, SLOT_LIMIT + 1) if each not in taken), 0)
        if not slot or (former is None and len(known) >= ENTRY_LIMIT):
            raise StorageRefusal(
                "containers-full",
                "the device has no room for another container",
                evidence=f"{len(taken)} of {SLOT_LIMIT} ranges, {len(known)} of {ENTRY_LIMIT} entries",
                remedy="remove a container that is not needed",
            )
        # Whoever had the range before has no data left, and must not seem to have it.
        freed = {
            other: replace(entry, slot=0) if entry.slot == slot else entry for other, entry in known.items()
        }
        serial = max(config.serial, former.serial if former else 0)
        entry = Entry(slot, serial, config.sha256)
        self._write({**freed, uuid: entry})
        return entry

    def announce(self, uuid: str, config: JudgedConfig, present: frozenset[str]) -> None:
        """Note the configuration that is about to be put in its place; durable on return.

        Refusals as `enter`.
        """
        known = self.entries(present)
        former = known[uuid]
        require(former, config)
        still = former.replaced or former.sha256
        serial = max(former.serial, config.serial)
        self._write({**known, uuid: Entry(former.slot, serial, config.sha256, still)})

    def settle(self, uuid: str, sha256: str, present: frozenset[str]) -> None:
        """Take note that a text is in its place: what it replaced is good no more. Refusals as `enter`."""
        known = self.entries(present)
        entry = known[uuid]
        if entry.replaced and sha256 == entry.sha256:
            self._write({**known, uuid: replace(entry, replaced="")})

    def _read(self) -> dict[str, Entry] | None:
        try:
            return _decode(read_regular(self._path, _FILE_LIMIT))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise _damaged(str(exc.strerror)) from exc
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise _damaged(type(exc).__name__) from exc

    def _write(self, entries: Mapping[str, Entry]) -> None:
        document = {
            "version": _VERSION,
            "containers": {uuid: asdict(entry) for uuid, entry in sorted(entries.items())},
        }
        try:
            write_atomic(self._path, json.dumps(document, indent=1).encode() + b"\n", _MODE)
        except OSError as exc:
            raise unwritable(self._path.name, exc) from exc


def require(entry: Entry | None, config: JudgedConfig) -> None:
    """Refuse a configuration that a newer one has replaced; an entry of None knows of none.

    TrustRefusal: "container-config-rolled-back", "container-serial-taken".
    """
    if entry is None or not entry.serial:
        return
    if config.serial < entry.serial:
        raise TrustRefusal(
            "container-config-rolled-back",
            "the container has had a newer configuration",
            evidence=f"serial {config.serial}, but {entry.serial} was accepted before",
            remedy="sign the configuration with a higher serial",
        )
    if config.serial == entry.serial and config.sha256 != entry.sha256:
        raise TrustRefusal(
            "container-serial-taken",
            "the container has had another configuration with the same serial",
            evidence=f"serial {config.serial}",
            remedy="sign the configuration with a higher serial",
        )


def _decode(text: bytes) -> dict[str, Entry]:
    """Return the entries; ValueError and its like for anything that `_write` does not write."""
    document = json.loads(text)
    if document["version"] != _VERSION:
        raise ValueError("another version")
    entries = {uuid: Entry(**fields) for uuid, fields in document["containers"].items()}
    for uuid, entry in entries.items():
        numbers = (entry.slot, SLOT_LIMIT), (entry.serial, SERIAL_LIMIT)
        if any(type(number) is not int or not 0 <= number <= limit for number, limit in numbers):
            raise ValueError("not a number of ours")
        digests = (entry.sha256, *((entry.replaced,) if entry.replaced else ()))
        if not _UUID.fullmatch(uuid) or not all(map(_SHA256.fullmatch, digests)):
            raise ValueError("not a name of ours")
    slots = [entry.slot for entry in entries.values() if entry.slot]
    if len(set(slots)) != len(slots):
        raise ValueError("a range that two have")
    return entries


def _damaged(evidence: str) -> StorageRefusal:
    return StorageRefusal(
        "container-ledger-damaged",
        "the record of all containers' ranges and serials cannot be read",
        evidence=f"{FILE_NAME}: {evidence}",
        remedy="the data volume is damaged: restore it, or wipe the device and create the containers again",
    )


def unwritable(name: str, error: OSError) -> StorageRefusal:
    """Return the refusal of a change to containers that the disk does not take."""
    return StorageRefusal(
        "containers-unwritable",
        "what is kept of the containers cannot be changed",
        evidence=f"{name}: {error.strerror}",
        remedy="make room on the data volume and try again; if it stays, replace the disk",
    )
