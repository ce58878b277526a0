# SPDX-License-Identifier: Apache-2.0
"""What the vault does with containers: create, change, open, remove.

- What is stored was judged before, and is judged again at every use: nothing on the disk is believed.
- A configuration is for one container. One that names a container changes or creates that one; one that
  names none can only create, and the device draws the UUID; where everything must be signed, such a
  container's next configuration names it. On the disk only the text that was accepted last is good.
- `open` is all that a start needs: configuration, GuestOS, token, key, volumes, in this order; the first that
  fails refuses the start, and nothing stays open. What will run is measured before its key is used.
- No result has a secret in it.
"""

from __future__ import annotations

import base64
import uuid as uuids
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from trustme_init.compartments.spec import volume_requests
from trustme_init.containers.config import JudgedConfig, Token, judge
from trustme_init.containers.keys import Keys, Surroundings
from trustme_init.containers.ledger import Entry, Ledger, require
from trustme_init.containers.records import Record, Records
from trustme_init.errors import ControlRefusal, Refusal, StorageRefusal, TrustRefusal
from trustme_init.trust.anchors import Purpose
from trustme_init.trust.selection import GuestOsId

if TYPE_CHECKING:
    from trustme_init.guestos.operations import GuestOsOperations
    from trustme_init.guestos.store import SignedFiles
    from trustme_init.machine import VolumeBackend
    from trustme_init.trust.guestos import VerifiedGuestOs

Result = dict[str, Any]
Measure = Callable[[Iterable[tuple[str, str]]], None]
"""Extends events (name, data) into the TPM, in order; does nothing on a machine without one."""

MEASURED: Final = "container"
"""Name of the event that says what a container is about to run."""


@dataclass(frozen=True, slots=True)
class _Container:
    """One container that was looked at and is in order."""

    record: Record
    entry: Entry
    judged: JudgedConfig
    files: SignedFiles


@dataclass(frozen=True, slots=True)
class ContainerOperations:
    """See the module. Refusals as those of `config`, `ledger`, `records`, `keys`, and those named here."""

    guest_oses: GuestOsOperations
    """Their judge and their place on the disk are the containers', too."""
    volumes: VolumeBackend
    around: Surroundings
    unsigned: bool
    """Whether the policy takes configurations that nobody signed."""
    measure: Measure
    _records: Records = field(init=False)
    _ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_records", Records(self.around.home))
        object.__setattr__(self, "_ledger", Ledger(self.around.home))

    # What there is

    def list(self) -> Result:
        """Finish what was interrupted; return the UUIDs of all containers, in order."""
        self._records.tidy()
        found = self._records.uuids()
        for uuid in found:
            with suppress(Refusal):  # then whoever starts it is told
                self._records.finish_wiping(uuid)
        return {"containers": list(found)}

    def describe(self, uuid: str) -> Result:
        """Return what there is to say of a container; `problem` is why it cannot be used, or None.

        The configuration is only said of one that is in order: of others there is none to be believed.
        """
        self._records.folder(uuid)
        try:
            found = self._look(uuid)
        except Refusal as refusal:
            return {"uuid": uuid, "problem": refusal.as_dict(), **self._of_record(uuid)}
        return self._said(found)

    def _said(self, found: _Container) -> Result:
        token = found.judged.token
        return {
            "uuid": found.record.uuid,
            "problem": None,
            "created": found.record.created,
            "config": base64.b64encode(found.files.config).decode(),
            "trust": int(found.judged.trust),
            "token": self._keys(found.record.uuid).describe(token),
            "needs_pin": token is Token.SOFT,
        }

    def _of_record(self, uuid: str) -> Result:
        with suppress(Refusal):
            return {"created": self._records.read(uuid).created}
        return {"created": 0}

    def guestos_users(self) -> Iterator[tuple[str, int | None]]:
        """Yield of each good container the GuestOS's name, and the version if it is bound to one."""
        for found in self._all():
            yield found.judged.config.guest_os, found.judged.version

    # Changes

    def create(self, files: SignedFiles) -> Result:
        """Create a container; return what there is to say of it.

        ControlRefusal: "container-exists", "container-name-taken".
        """
        judged = self._judge(files)
        self._records.tidy()
        uuid = judged.uuid if judged.uuid is not None else str(uuids.uuid4())
        present = self._records.present()
        if uuid in present:
            raise ControlRefusal(
                "container-exists",
                "there is a container with this UUID",
                evidence=uuid,
                remedy="change it (`control update_config`), or remove it first",
            )
        self._require_name(judged.config.name, but=uuid)
        entry = self._ledger.enter(uuid, judged, present)
        created = int(self.around.now().timestamp())
        self._records.create(Record(uuid, entry.slot, created), files)
        return self.describe(uuid)

    def update(self, uuid: str, files: SignedFiles) -> Result:
        """Give a container another configuration; it counts from the next start on.

        TrustRefusal: "container-config-foreign", "container-config-unbound".
        """
        self._records.folder(uuid)
        judged = self._judge(files)
        if judged.uuid is None and not self.unsigned:
            raise TrustRefusal(
                "container-config-unbound",
                "the configuration does not say which container it is for",
                evidence=f"container {uuid}",
                remedy="sign it with the container's uuid and a serial",
            )
        _require_own(uuid, judged)
        present = self._records.present()
        self._entry(uuid, present)
        self._require_name(judged.config.name, but=uuid)
        self._ledger.announce(uuid, judged, present)
        self._records.update(uuid, files)
        with suppress(StorageRefusal):  # else the next start does it
            self._ledger.settle(uuid, judged.sha256, present)
        return self.describe(uuid)

    def remove(self, uuid: str) -> Result:
        """Remove a container with its data. Its serial is remembered."""
        self._records.remove(uuid)
        return {}

    def wipe(self, uuid: str) -> Result:
        """Remove a container's volumes with their key; token and configuration stay."""
        self._records.wipe(uuid)
        return {}

    # The token

    def change_pin(self, uuid: str, pin: str, new_pin: str) -> Result:
        """Change the PIN of a container's token; the first time, make the token."""
        self._with_token(uuid).pair(pin, new_pin)
        return self.describe(uuid)

    def check_pin(self, uuid: str, pin: str | None) -> Result:
        """Refuse if a container's token does not open with this PIN; one without a token needs none."""
        found = self._look(uuid)
        if found.judged.token is Token.SOFT:
            self._keys(uuid).check_pin(pin)
        return self._said(found)

    def _with_token(self, uuid: str) -> Keys:
        if self._look(uuid).judged.token is not Token.SOFT:
            raise ControlRefusal(
                "container-without-token",
                "this container has no token",
                evidence=uuid,
                remedy="give it one in its configuration (token_type: SOFT)",
            )
        return self._keys(uuid)

    # Starting

    def open(self, uuid: str, pin: str | None) -> Result:
        """Open everything that a start needs.

        Return both texts (base64), the GuestOS's name under which its images are filed, the first uid of the
        range, and of each volume its name and device.
        """
        self._records.finish_wiping(uuid)
        found = self._look(uuid)
        present = self._records.present()
        self._ledger.settle(uuid, found.judged.sha256, present)
        guest_os = self._guest_os(found.judged)
        files = self.guest_oses.store.read(guest_os)
        verified = self.guest_oses.verified(files, guest_os.stem)
        requests = volume_requests(verified.config, found.judged.config)
        keys = self._keys(uuid)
        if found.judged.token is Token.SOFT and not requests:
            keys.check_pin(pin)
        self.measure(_events(found, verified))
        devices: list[tuple[str, str]] = []
        if requests:
            folder = self._records.folder(uuid)
            key = keys.key(
                found.judged.token, pin, prepare=lambda new: self.volumes.prepare(uuid, folder, new)
            )
            devices = [
                (each.name, str(each.device)) for each in self.volumes.open(uuid, folder, requests, key)
            ]
        return {
            **self._said(found),
            "uid_base": found.entry.uid_base,
            "guest_os": guest_os.stem,
            "guest_os_config": base64.b64encode(files.config).decode(),
            "volumes": devices,
        }

    def _guest_os(self, judged: JudgedConfig) -> GuestOsId:
        name = judged.config.guest_os
        if judged.version is not None:
            return GuestOsId(name, judged.version)
        newest = self.guest_oses.store.newest(name)
        if newest is None:
            raise StorageRefusal(
                "guestos-missing",
                "the container's GuestOS is not on this device",
                evidence=name,
                remedy="install it (`control push_guestos_config`)",
            )
        return newest

    # Looking

    def _look(self, uuid: str) -> _Container:
        """Return a container, judged by what is good now; any refusal is a problem of that container."""
        record = self._records.read(uuid)
        files = self._records.config(uuid)
        entry = self._entry(uuid, self._records.present())
        if entry.slot != record.slot:
            raise StorageRefusal(
                "container-damaged",
                "the container has not the uid range that was given to it",
                evidence=f"{uuid}: {record.slot}, given {entry.slot}",
                remedy="restore the data volume, or remove the container and create it again",
            )
        judged = self._judge(files)
        _require_own(uuid, judged)
        if judged.sha256 not in (entry.sha256, entry.replaced):
            require(entry, judged)
            raise TrustRefusal(
                "container-config-exchanged",
                "this is not the configuration that was accepted last for the container",
                evidence=f"{uuid}: sha256 {judged.sha256}, accepted {entry.sha256}",
                remedy="give the container its configuration again (`control update_config`)",
            )
        return _Container(record, entry, judged, files)

    def _entry(self, uuid: str, present: frozenset[str]) -> Entry:
        entry = self._ledger.entries(present).get(uuid)
        if entry is None:
            raise StorageRefusal(
                "container-damaged",
                "the container was not created on this device, or its uid range is not known any more",
                evidence=uuid,
                remedy="restore the data volume, or remove the container and create it again",
            )
        return entry

    def _all(self) -> Iterator[_Container]:
        for uuid in self._records.uuids():
            with suppress(Refusal):
                yield self._look(uuid)

    def _judge(self, files: SignedFiles) -> JudgedConfig:
        judge_ = self.guest_oses.judge
        return judge(files, lambda: judge_.anchors(Purpose.GUEST), at=judge_.now(), unsigned=self.unsigned)

    def _require_name(self, name: str, *, but: str) -> None:
        """Refuse a name that another container has: whoever gives orders by name must mean one."""
        for found in self._all():
            if found.judged.config.name == name and found.record.uuid != but:
                raise ControlRefusal(
                    "container-name-taken",
                    "another container has this name",
                    evidence=f"{name}: {found.record.uuid}",
                    remedy="choose another name, or remove the other container",
                )

    def _keys(self, uuid: str) -> Keys:
        return Keys(uuid, self._records.folder(uuid), self.around)


def _require_own(uuid: str, judged: JudgedConfig) -> None:
    if judged.uuid not in (None, uuid):
        raise TrustRefusal(
            "container-config-foreign",
            "the configuration is for another container",
            evidence=f"signed for {judged.uuid}, given to {uuid}",
            remedy="give it to the container that it is for, or sign one for this container",
        )


def _events(found: _Container, verified: VerifiedGuestOs) -> Iterable[tuple[str, str]]:
    """Return what is measured: who is about to run, by whose configuration, with which content."""
    images = (f"{each.image_file} {each.root_hash.hex()}" for each in verified.images)
    return (
        (MEASURED, f"{found.record.uuid} {found.judged.sha256}"),
        (f"{MEASURED}-guestos", f"{verified.guest_os.stem} {verified.config_digest.hex()}"),
        *((f"{MEASURED}-image", image) for image in images),
    )
