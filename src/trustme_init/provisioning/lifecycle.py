# SPDX-License-Identifier: Apache-2.0
"""What a device in operation changes about its keys and anchors, by signed statements (`trust.statement`).

Rules:

- Everything that can be refused is refused before the first change: a refused statement leaves the disk and
  the TPM as they were. (A wrong password is counted, as everywhere.)
- From its commit point on (`history`) a statement is obeyed for good, over any power cut: what is not done
  yet is done before anything else is, by the same code as without a power cut.
- The old one is good until the new one is proven. A new device key is used once before it becomes the
  device's, and its certificate has passed every check by then. The last anchor of a purpose is not retired,
  and no device anchor that the device's own certificate rests on: the new one comes first, beside it.
- A token's password is never kept, so a token cannot be replaced later: it is replaced, which is atomic by
  itself and counts a wrong password, right before the statement is committed. A power cut in between leaves
  the new token and the statement as good as new: given again, it puts the same token there again.
- While the disk is older than the TPM's history, nothing that rests on anchors, keys or token is done.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography import x509

from trustme_init.errors import DeviceRefusal, Refusal, StorageRefusal, TokenRefusal, TrustRefusal
from trustme_init.linux.files import sync_directory
from trustme_init.provisioning import identity, record
from trustme_init.provisioning.arguments import Arguments, Result, octets, text
from trustme_init.provisioning.device_key import DeviceKey, SoftwareDeviceKey, TpmDeviceKey
from trustme_init.provisioning.history import ENTRY_LIMIT, Entry, History
from trustme_init.provisioning.inventory import Inventory, read_file
from trustme_init.provisioning.layout import Layout, not_writable, save
from trustme_init.trust.anchors import AnchorSet, Purpose, anchor_set
from trustme_init.trust.certificate import public_key_der
from trustme_init.trust.device import verify_device_certificate
from trustme_init.trust.statement import (
    ENTITLING,
    DeviceCertificateChange,
    RenewDeviceKey,
    ReplaceAuthority,
    ReplaceToken,
    RetireAuthority,
    SignedStatement,
    Statement,
    verify_statement,
)

RESTS_ON_NOTHING: Final = frozenset(
    {"settle", "status", "authorities", "token-status", "lifecycle-status", "wipe", "destroy"}
)
"""Operations that use no anchor, key or token: they are done on a disk that is too old as well."""


@dataclass(frozen=True, slots=True)
class NextTpmKey(TpmDeviceKey):
    """A second key in the TPM, beside the device's."""

    @property
    def _key_file(self) -> Path:
        return self.directory / "device_key.next.json"


@dataclass(frozen=True, slots=True)
class NextKey:
    """The key that is to become the device's, with the request for its certificate."""

    key: DeviceKey
    file: Path
    """Of the key; it is there as long as there is a next key."""
    becomes: Path
    """Where the device's key is kept."""
    layout: Layout

    @classmethod
    def beside(cls, key: DeviceKey, layout: Layout) -> NextKey:
        """Return the place for it beside the device's present key."""
        if isinstance(key, TpmDeviceKey):
            following = NextTpmKey(key.tcti, key.directory, key.algorithm)
            return cls(
                following,
                key.directory / "device_key.next.json",
                key.directory / "device_key.json",
                layout,
            )
        file = layout.tokens / "device.next.key"
        return cls(SoftwareDeviceKey(file), file, layout.tokens / "device.key", layout)

    @property
    def _request_file(self) -> Path:
        return self.layout.tokens / "device.next.csr"

    @property
    def _certification_file(self) -> Path:
        return self.layout.tokens / "device.next.csr.tpm"

    def exists(self) -> bool:
        """Return whether there is one."""
        return self.file.exists()

    def make(self, device_uuid: UUID) -> None:
        """Make key and request, unless they are there; a next key that is there stays."""
        self.key.prepare()
        if read_file(self._request_file) is None:
            request = self.key.request(device_uuid)
            certification = self.key.certification(request)
            if certification:
                save(self._certification_file, certification, 0o644)
            save(self._request_file, request, 0o644)

    def request(self) -> dict[str, str]:
        """Return request and certification as `csr` does; both empty when there is no next key."""
        files = (self._request_file, self._certification_file) if self.exists() else ()
        found = [(read_file(path) or b"").decode() for path in files] or ["", ""]
        return {"csr": found[0], "certification": found[1]}

    def prove(self, device_uuid: UUID) -> None:
        """Have the key sign something and verify that; DeviceRefusal("device-key-unproven")."""
        request = x509.load_pem_x509_csr(self.key.request(device_uuid))
        if not request.is_signature_valid or public_key_der(request) != self.key.public_key():
            raise DeviceRefusal(
                "device-key-unproven",
                "the new device key does not make signatures that verify under it",
                evidence=f"SHA-256 of the key: {hashlib.sha256(self.key.public_key()).hexdigest()}",
                remedy="the device's key stays; restart the device and try again",
            )

    def promote(self) -> None:
        """Make it the device's key. The key comes last: until it is there, there is a next key."""
        for source, target in (
            (self._request_file, self.layout.device_csr),
            (self._certification_file, self.layout.certification),
            (self.file, self.becomes),
        ):
            try:
                if source.exists():
                    source.replace(target)
                    sync_directory(target.parent)
            except OSError as exc:
                raise not_writable(target, exc) from exc


class Lifecycle:
    """See the module. One object lives as long as the vault's process."""

    def __init__(self, inventory: Inventory, history: History) -> None:
        self._inventory = inventory
        self._history = history
        self._next = NextKey.beside(inventory.key, inventory.layout)
        self._settled = False

    def prepare(self) -> None:
        """Make what the TPM needs for it, in provisioning; DeviceRefusal("history-foreign")."""
        self._history.prepare()

    def settle_for(self, operation: str) -> None:
        """Finish what a power cut came into, before an operation; refused if that rests on what is too old.

        Refusals as `History.committed`, and those of storage and TPM where it cannot be finished.
        """
        try:
            self._settle()
        except Refusal:
            if operation not in RESTS_ON_NOTHING:
                raise

    def registered(self, purpose: Purpose, record_sha256: bytes) -> frozenset[str]:
        """Return the anchors (SHA-256, hex) that were registered at completion, with every change since.

        Both are what the TPM vouches for: the record by the marker, the changes by the history.

        StorageRefusal: "provisioned-data-foreign", "provisioning-record-damaged".
        """
        found = record.read(self._inventory.layout.record)
        if found is None or found.sha256 != record_sha256:
            raise StorageRefusal(
                "provisioned-data-foreign",
                "the record of this device's provisioning is not the one that the TPM knows",
                evidence=f"{self._inventory.layout.record}",
                remedy="put back the disk that belongs to this device",
            )
        known = {sha256 for its_purpose, sha256 in found.authorities if its_purpose == purpose.value}
        for entry in self._history.entries():
            if entry.purpose == purpose.value:
                known -= {entry.drops}
                known |= {entry.adds} - {""}
        return frozenset(known)

    def check(self) -> None:
        """Refuse a disk that does not fit the TPM's history; refusals as `settle_for`."""
        self._settle()

    def status(self, *, in_operation: bool) -> Result:
        """Return how many statements were obeyed, the last serial number, and the next key's request.

        `problem` is the refusal, as a dictionary, that every operation meets which rests on the history.
        """
        facts: dict[str, Any] = {"last_serial": 0, "applied": 0, "in_tpm": self._history.tcti is not None}
        facts |= {"next_key_sha256": "", "problem": None, "csr": "", "certification": ""}
        try:
            if in_operation:
                self._settle()
            entries = self._history.entries()
            facts |= {"applied": len(entries), "last_serial": entries[-1].serial if entries else 0}
            if self._next.exists():
                facts["next_key_sha256"] = hashlib.sha256(self._next.key.public_key()).hexdigest()
                facts |= self._next.request()
        except Refusal as refusal:
            facts["problem"] = refusal.as_dict()
        return facts

    def apply(self, arguments: Arguments) -> Result:
        """Obey a statement, and return `status`.

        Refusals: those of `trust.statement.verify_statement` and of `_judge`; "lifecycle-history-full".
        """
        signed = SignedStatement(
            octets(arguments, "statement"), octets(arguments, "signature"), octets(arguments, "certificate")
        )
        self._settled = False  # once more: the chain that is extended has to be the one that was looked at
        self._settle()
        entries = self._history.entries()
        if len(entries) >= ENTRY_LIMIT:
            raise StorageRefusal(
                "lifecycle-history-full",
                f"this device has obeyed {ENTRY_LIMIT} statements and takes no more",
                evidence=f"the last one had serial {entries[-1].serial}",
                remedy="clear the TPM and provision the device again",
            )
        statement = verify_statement(
            signed,
            self._entitling_anchors(),
            at=self._inventory.now(),
            device_uuid=self._device_uuid(),
            last_serial=entries[-1].serial if entries else 0,
        ).statement
        self._judge(statement, arguments)
        self._settled = False
        self._history.begin(signed)
        try:
            self._history.commit(Entry.of(statement))
        except Refusal:
            # Was the command lost, or only its reply? The TPM's history says, and nothing else.
            self._settle()
            if Entry.of(statement) not in self._history.entries():
                raise
        self._settle()
        return self.status(in_operation=True)

    def _settle(self) -> None:
        if self._settled:
            return
        entries = self._history.entries()
        statement = self._history.committed(entries)
        if statement is None:
            self._history.discard()
        else:
            self._do(statement)
            self._history.finish([*entries, Entry.of(statement)])
        self._settled = True

    def _entitling_anchors(self) -> list[AnchorSet]:
        """Return the stored anchors of every purpose that has good ones; none of the base system's own."""
        found = []
        for purpose in ENTITLING:
            try:
                found.append(self._anchors(purpose))
            except TrustRefusal as refusal:
                if refusal.code != "no-anchor":
                    raise
        return found

    def _anchors(self, purpose: Purpose) -> AnchorSet:
        return self._inventory.stored_anchors(purpose)

    def _device_uuid(self) -> UUID:
        device_uuid = identity.load(self._inventory.layout.identity)
        if device_uuid is None:
            raise StorageRefusal(
                "device-id-missing",
                "the device has no UUID",
                evidence=f"{self._inventory.layout.identity} is not there",
                remedy="put back the disk that belongs to this device",
            )
        return device_uuid

    # Every refusal

    def _judge(self, statement: Statement, arguments: Arguments) -> None:
        match statement.action:
            case ReplaceAuthority() as action:
                self._judge_replacement(action)
            case RetireAuthority() as action:
                self._require_stored(action.purpose, action.sha256)
                self._require_remaining(action.purpose, without=action.sha256)
            case RenewDeviceKey():
                pass
            case DeviceCertificateChange() as action:
                self._judge_certificate(action)
            case ReplaceToken() as action:
                self._replace_token(action, octets(arguments, "token"), text(arguments, "pin"))

    def _judge_replacement(self, action: ReplaceAuthority) -> None:
        self._require_stored(action.purpose, action.old_sha256)
        authority = self._inventory.store.require_new(
            action.purpose,
            action.certificate,
            at=self._inventory.now(),
            revocations=self._inventory.core_anchors.revocations,
            replaced="" if action.overlap else action.old_sha256,
        )
        if not action.overlap:
            self._require_remaining(
                action.purpose, without=action.old_sha256, beside=(authority.certificate_der,)
            )

    def _require_stored(self, purpose: Purpose, sha256: str) -> None:
        if all(entry.sha256 != sha256 for entry in self._inventory.store.entries(purpose)):
            raise TrustRefusal(
                "authority-unknown",
                "no such CA certificate is stored",
                evidence=f"{sha256} for the purpose {purpose.value}",
                remedy="name it by the whole SHA-256 of what is stored (`control ca_list --json`)",
            )

    def _require_remaining(self, purpose: Purpose, *, without: str, beside: tuple[bytes, ...] = ()) -> None:
        """Refuse a change that leaves no anchor, or the device's own certificate without one."""
        kept = [
            anchor.certificate
            for anchor in self._good_anchors(purpose)
            if anchor.sha256_fingerprint != without
        ]
        try:
            remaining = anchor_set(
                purpose,
                [*kept, *beside],
                self._inventory.core_anchors.revocations,
                source=f"what would be left of the {purpose.value} anchors",
            )
        except TrustRefusal as refusal:
            raise TrustRefusal(
                "authority-last",
                f"no good anchor for the purpose {purpose.value} would be left",
                evidence=without,
                remedy="replace it instead of retiring it",
            ) from refusal
        if purpose is Purpose.DEVICE and self._own_is_good(None) and not self._own_is_good(remaining):
            raise TrustRefusal(
                "device-certificate-orphaned",
                "the device's own certificate is good only as long as this anchor is there",
                evidence=without,
                remedy='replace the anchor with "overlap", give the device a certificate under the new one '
                "(device-certificate), then retire the old one (retire-authority)",
            )

    def _good_anchors(self, purpose: Purpose) -> tuple[Any, ...]:
        try:
            return self._anchors(purpose).anchors
        except TrustRefusal as refusal:
            if refusal.code != "no-anchor":
                raise
            return ()

    def _own_is_good(self, anchors: AnchorSet | None) -> bool:
        """Whether the device's certificate holds, by the present anchors for None."""
        pem = self._inventory.store.device_certificate()
        if pem is None:
            return False
        try:
            verify_device_certificate(
                pem,
                public_key=self._inventory.key.public_key(),
                device_uuid=self._device_uuid(),
                anchors=anchors if anchors is not None else self._anchors(Purpose.DEVICE),
                at=self._inventory.now(),
            )
        except TrustRefusal:
            return False
        return True

    def _judge_certificate(self, action: DeviceCertificateChange) -> None:
        device_uuid = self._device_uuid()
        for_next = self._is_for_next(action.certificate)
        inventory = replace(self._inventory, key=self._next.key) if for_next else self._inventory
        inventory.verify_own(action.certificate, device_uuid)
        if for_next:
            self._next.prove(device_uuid)

    def _replace_token(self, action: ReplaceToken, p12: bytes, password: str) -> None:
        if hashlib.sha256(p12).hexdigest() != action.token_sha256:
            raise TokenRefusal(
                "token-other-file",
                "the file is not the one that the statement names",
                evidence=f"SHA-256 {hashlib.sha256(p12).hexdigest()}; named is {action.token_sha256}",
                remedy="give the file that the statement was made for",
            )
        self._inventory.token.replace(p12, password)

    # Every change; each may be made twice

    def _do(self, statement: Statement) -> None:
        match statement.action:
            case ReplaceAuthority() as action:
                self._inventory.store.put(action.purpose, action.certificate)
                if not action.overlap:
                    self._inventory.store.drop(action.purpose, action.old_sha256)
            case RetireAuthority() as action:
                self._inventory.store.drop(action.purpose, action.sha256)
            case RenewDeviceKey():
                self._next.make(self._device_uuid())
            case DeviceCertificateChange() as action:
                for_next = self._is_for_next(action.certificate)
                self._inventory.store.set_device_certificate(action.certificate)
                if for_next:
                    self._next.promote()
            case ReplaceToken():
                pass  # done before the statement was committed

    def _is_for_next(self, chain: bytes) -> bool:
        """Whether the first certificate of a chain is for the next key, if there is one."""
        if not self._next.exists():
            return False
        try:
            leaf = x509.load_pem_x509_certificate(chain)
            return public_key_der(leaf) == self._next.key.public_key()
        except ValueError:
            return False  # what is no certificate, its judge says
