# SPDX-License-Identifier: Apache-2.0
"""What the vault can do: every operation that reads or changes what provisioning has set up.

Runs in the vault's process, one operation at a time. Rules:

- What is allowed in which state is one table (`states`). The gate of the control interface refuses first what
  provisioning had; this is the second lock. It asks the TPM for itself: the manager's word for the mode is
  that of the boot, and a vault may have died, or failed in the end, after it had completed provisioning.
- What is stored was judged before; a refused operation leaves the disk as it was.
- A result is returned when the change is durable. Results have no secret in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from trustme_init.containers.keys import Surroundings as KeySurroundings
from trustme_init.containers.operations import ContainerOperations
from trustme_init.errors import DeviceRefusal, Refusal, StorageRefusal, TrustRefusal
from trustme_init.guestos.operations import GuestOsOperations
from trustme_init.machine import VolumeBackend
from trustme_init.policy import Policy
from trustme_init.provisioning import destruction, guestos, identity, marker, record, requirements, states
from trustme_init.provisioning.arguments import Arguments, Result, octets, text
from trustme_init.provisioning.certstore import CertificateStore
from trustme_init.provisioning.containers import CONTAINER_OPERATIONS
from trustme_init.provisioning.device_key import DeviceKey, SoftwareDeviceKey, TpmDeviceKey
from trustme_init.provisioning.history import History
from trustme_init.provisioning.inventory import Inventory
from trustme_init.provisioning.layout import Layout, save
from trustme_init.provisioning.lifecycle import Lifecycle
from trustme_init.provisioning.mode import FROM_FILE, FROM_TPM, Mode, ModeFact
from trustme_init.provisioning.states import State
from trustme_init.tokens.store import DEVELOPMENT_PIN, TokenStore
from trustme_init.tpm import nv_marker, ownership
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.marker_form import MarkerContent
from trustme_init.tpm.measure import Measurement, extend_here
from trustme_init.trust.anchors import AnchorSet, Purpose
from trustme_init.trust.device import DeviceCertificate, verify_peer_certificate
from trustme_init.trust.guestos import verify_guestos

STORED: Final = (Purpose.GUEST, Purpose.DEVICE, Purpose.LIFECYCLE)
"""The purposes that the certificate store has anchors for."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the boot found out and the service builds on."""

    data: Path
    """Where the data volume is mounted."""
    tcti: str | None
    """None on a machine without a TPM, which only a development policy allows."""
    policy: Policy
    core_anchors: AnchorSet
    """With what `dbx` revokes."""
    mode: ModeFact
    measurement_log: Path
    """What this boot extended into the TPM."""
    volumes: VolumeBackend
    """What keeps the volumes of containers."""


class ProvisioningService:
    """See the module. One object lives as long as its process."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._policy = surroundings.policy
        self._core_anchors = surroundings.core_anchors
        self._mode = surroundings.mode
        self._state = states.of_mode(surroundings.mode.mode)
        self._stale = True
        self._tcti = surroundings.tcti
        self._measurement_log = surroundings.measurement_log
        self._layout = Layout(surroundings.data)
        self._layout.make()
        self._store = CertificateStore(self._layout.tokens)
        self._token = TokenStore(self._layout.tokens, self._policy.pin_tries)
        self._key: DeviceKey = (
            TpmDeviceKey(self._tcti, self._layout.tpm, self._policy.device_key)
            if self._tcti is not None
            else SoftwareDeviceKey(self._layout.tokens / "device.key")
        )
        self._inventory = Inventory(
            self._layout,
            self._policy,
            self._core_anchors,
            self._store,
            self._token,
            self._key,
            self._registered,
        )
        self._lifecycle = Lifecycle(
            self._inventory, History(self._layout.home / "lifecycle", self._tcti, self._layout.tpm)
        )

        self.guestos = GuestOsOperations(
            self._layout.home,
            self._inventory,
            self._policy.hardware,
            self._policy.core_guest_os,
            users=self._guestos_users,
        )
        self.containers = ContainerOperations(
            self.guestos,
            surroundings.volumes,
            KeySurroundings(
                home=self._layout.home,
                tcti=self._tcti,
                pin_tries=self._policy.pin_tries,
                development=self._policy.provisions_itself,
                now=self._inventory.now,
            ),
            unsigned=self._policy.allows_unsigned_configs,
            measure=self._measure,
        )

    def handle(self, operation: str, arguments: Arguments) -> Result:
        """Do one operation of OPERATIONS, if the state has it; refusals as `states.after`, and its own."""
        if self._stale:
            self._look_again()
        state = states.after(self._state, operation)
        if self._state is State.OPERATIONAL:
            self._lifecycle.settle_for(operation)
        self._stale = state is not self._state  # until it is known that it came to its end
        result = OPERATIONS[operation](self, arguments)
        self._state, self._stale = state, False
        return result

    def _look_again(self) -> None:
        """Take over what was done for good since the mode was decided; refusals as `marker.decide`."""
        if self._layout.tombstone.exists():
            self._state = State.DESTROYED
        elif self._state is State.PROVISIONING:
            reading = None
            if self._tcti is not None:
                with open_tpm(self._tcti) as tpm:
                    reading = nv_marker.read_marker(tpm)
            mode = marker.decide(reading, self._layout.data)
            if mode.mode is Mode.OPERATIONAL:
                self._mode, self._state = mode, State.OPERATIONAL
                with suppress(Refusal):  # else the next boot does it
                    self.settle({})
        self._stale = False

    # The device itself

    def prepare(self, _arguments: Arguments) -> Result:
        """Make what a device in provisioning needs: UUID, TPM keys, and in a development build the rest."""
        destruction.finish_wiping(self._layout)
        device_uuid = identity.load_or_create(self._layout.identity)
        self._key.prepare()
        self._lifecycle.prepare()
        if self._policy.provisions_itself:
            if self._store.device_certificate() is None:
                self._store.set_device_certificate(self._key.self_signed(device_uuid, self._inventory.now()))
            if self._token.status().kind == "none":
                self._token.create(DEVELOPMENT_PIN, common_name=str(device_uuid), now=self._inventory.now())
        return {"device_uuid": str(device_uuid)}

    def settle(self, _arguments: Arguments) -> Result:
        """Finish a completion that a power cut came into: lock the marker, write its cache.

        Refusals as `Lifecycle.check`, for nobody else may ask for what would show them.
        """
        if self._mode.mode is Mode.OPERATIONAL:
            if not self._mode.locked and self._tcti is not None:
                with open_tpm(self._tcti) as tpm:
                    nv_marker.ensure_locked(tpm, ownership.authorisations(tpm, self._layout.tpm).owner)
            if not self._layout.marker.exists():
                marker.set_cache(self._layout)
            self._lifecycle.check()
        return {}

    def status(self, _arguments: Arguments) -> Result:
        """Return the checklist and the names of everything."""
        checklist = self._inventory.checklist()
        device_uuid = identity.load(self._layout.identity)
        return {
            "completed": self._mode.mode is Mode.OPERATIONAL,
            "development": self._policy.development,
            "marker": self._mode.source,
            "device_uuid": str(device_uuid) if device_uuid is not None else "",
            "requirements": [
                {
                    "name": each.finding.name,
                    "met": each.finding.met,
                    "required": each.required,
                    "detail": each.finding.detail,
                }
                for each in checklist
            ],
            "record_sha256": self._mode.record_sha256.hex(),
            **self._inventory.names(),
        }

    def complete(self, _arguments: Arguments) -> Result:
        """Complete provisioning, for good. ControlRefusal("provisioning-incomplete") says what is missing.

        The record first; then it is measured, for what runs on in this boot was not measured as operational;
        then the TPM's marker (the point of no return), its lock, and the file for people.
        """
        requirements.require_all(self._inventory.checklist())
        device_uuid = identity.load(self._layout.identity)
        if device_uuid is None:
            raise StorageRefusal(
                "device-id-missing",
                "the device has no UUID yet",
                remedy="wait until the first boot has prepared the device",
            )
        self._lifecycle.prepare()
        written = record.write(self._layout.record, device_uuid, self._record_facts())
        if self._tcti is None:
            marker.set_cache(self._layout)
            source = FROM_FILE
        else:
            content = MarkerContent(device_uuid, written.sha256)
            with open_tpm(self._tcti) as tpm:
                owner = ownership.authorisations(tpm, self._layout.tpm).owner
                event = Measurement("completion", f"device {device_uuid}; record {written.sha256.hex()}")
                extend_here(tpm, event, self._measurement_log)
                nv_marker.complete_marker(tpm, owner, content)
            with suppress(StorageRefusal):  # it is done, and the next boot writes the file
                marker.set_cache(self._layout)
            source = FROM_TPM
        self._mode = ModeFact(Mode.OPERATIONAL, "provisioning was completed", source, written.sha256)
        return {"record_sha256": written.sha256.hex(), "source": source}

    # Device identity

    def csr(self, _arguments: Arguments) -> Result:
        """Return the request for the device key's certificate, the same at every call, and the TPM's word."""
        if not self._key.exists():
            self.prepare({})
        device_uuid = identity.load_or_create(self._layout.identity)
        kept = self._inventory.request(device_uuid)
        pem = kept if kept is not None else self._key.request(device_uuid)
        certification = self._key.certification(pem)
        if certification:
            save(self._layout.certification, certification, 0o644)
        if kept is None:
            save(self._layout.device_csr, pem, 0o644)
        return {"csr": pem.decode(), "certification": certification.decode()}

    def push_certificate(self, arguments: Arguments) -> Result:
        """Take the device's certificate over, if it is the one; whatever was there stays otherwise."""
        pem = octets(arguments, "certificate")
        device_uuid = identity.load_or_create(self._layout.identity)
        accepted = self._inventory.verify_own(pem, device_uuid)
        self._store.set_device_certificate(pem)
        return _certificate(accepted)

    def verify_certificate(self, arguments: Arguments) -> Result:
        """Judge another party's certificate by the device anchors."""
        anchors = self._inventory.anchors(Purpose.DEVICE)
        return _certificate(
            verify_peer_certificate(
                octets(arguments, "certificate"), anchors=anchors, at=self._inventory.now()
            )
        )

    def verify_guestos(self, arguments: Arguments) -> Result:
        """Judge a GuestOS by the guest anchors, as an installation would."""
        verified = verify_guestos(
            octets(arguments, "config"),
            octets(arguments, "signature"),
            octets(arguments, "certificate"),
            self._inventory.anchors(Purpose.GUEST),
            at=self._inventory.now(),
            hardware=self._policy.hardware,
            file_stem=None,
        )
        leaf = x509.load_der_x509_certificate(verified.signer.leaf_der)
        return {
            "sha256": verified.signer.sha256_fingerprint,
            "subject": verified.signer.subject,
            "anchor_sha256": verified.signer.anchor.sha256_fingerprint,
            "not_after": int(leaf.not_valid_after_utc.timestamp()),
            "device_uuid": "",
        }

    def activate(self, arguments: Arguments) -> Result:
        """Answer a signer's challenge: both TPM keys are in one TPM, the one with this endorsement key."""
        if not isinstance(self._key, TpmDeviceKey):
            raise DeviceRefusal("tpm-missing", "there is no TPM that could answer a challenge")
        secret = self._key.activate(
            octets(arguments, "credential_blob"), octets(arguments, "encrypted_secret")
        )
        return {"secret": secret.hex()}

    # Certificate store

    def add_authority(self, arguments: Arguments) -> Result:
        """Add an anchor for GuestOSes, device certificates or statements; or set the one local CA."""
        pem = octets(arguments, "certificate")
        if text(arguments, "purpose") == "local":
            entry = self._store.set_local(
                pem, at=self._inventory.now(), revocations=self._core_anchors.revocations
            )
        else:
            entry = self._store.add(
                Purpose(text(arguments, "purpose")),
                pem,
                at=self._inventory.now(),
                revocations=self._core_anchors.revocations,
            )
        return {"sha256": entry.sha256, "subject": entry.subject}

    def remove_authority(self, arguments: Arguments) -> Result:
        """Remove an anchor by its SHA-256, whichever purpose it serves."""
        wanted = text(arguments, "sha256").lower()
        serving = [purpose for purpose in STORED if self._names(purpose, wanted)]
        if len(serving) > 1:
            raise TrustRefusal(
                "authority-ambiguous",
                "authorities of several purposes are called that",
                evidence=wanted[:64],
                remedy="give the whole SHA-256 (`control ca_list --json`)",
            )
        return {"sha256": self._store.remove(serving[0] if serving else STORED[0], wanted)}

    def authorities(self, _arguments: Arguments) -> Result:
        """Return every registered anchor."""
        return {"authorities": [each for purpose in STORED for each in self._listed(purpose)]}

    def _listed(self, purpose: Purpose) -> Iterator[Result]:
        """Yield what is stored for a purpose; of a damaged file only its name, and what is wrong with it."""
        registered = self._registered(purpose)
        for entry in self._store.entries(purpose):
            known = registered is None or entry.sha256 in registered
            yield {
                "sha256": entry.sha256,
                "subject": entry.subject,
                "purpose": purpose.value,
                "not_after": int(entry.not_after.timestamp()),
                "source": entry.source if known else "NOT REGISTERED on this device, not used",
            }
        for damaged in self._store.damaged(purpose):
            yield {
                "sha256": damaged.sha256_fingerprint,
                "subject": "",
                "purpose": purpose.value,
                "not_after": 0,
                "source": f"DAMAGED, not used: {damaged.reason}",
            }

    def _registered(self, purpose: Purpose) -> frozenset[str] | None:
        """Return which anchors the TPM vouches for; in operation no other counts, whatever the disk has."""
        if self._state is not State.OPERATIONAL or not self._mode.from_tpm:
            return None
        return self._lifecycle.registered(purpose, self._mode.record_sha256)

    def _names(self, purpose: Purpose, beginning: str) -> bool:
        return any(each["sha256"].startswith(beginning) for each in self._listed(purpose))

    # The device's token

    def token_status(self, _arguments: Arguments) -> Result:
        """Return what kind of token there is, and how many tries its PIN has left."""
        status = self._token.status()
        return {
            "kind": status.kind,
            "certificate_sha256": status.certificate_sha256 or "",
            "tries_left": status.tries_left,
            "default_pin": status.default_pin,
            "rounds": status.rounds or 0,
        }

    def token_create(self, arguments: Arguments) -> Result:
        """Make a softtoken with a PIN; there must be none."""
        device_uuid = identity.load_or_create(self._layout.identity)
        self._token.create(text(arguments, "pin"), common_name=str(device_uuid), now=self._inventory.now())
        return self.token_status({})

    def token_unlock(self, arguments: Arguments) -> Result:
        """Open the token with its PIN and forget it again: the way every use of the token begins."""
        self._token.unlock(text(arguments, "pin"))
        return self.token_status({})

    def token_change_pin(self, arguments: Arguments) -> Result:
        """Change the PIN: the old one stays until the new one is durable."""
        self._token.change_pin(text(arguments, "pin"), text(arguments, "new_pin"))
        return self.token_status({})

    def token_replace(self, arguments: Arguments) -> Result:
        """Put an operator's PKCS#12 file in the place of the token."""
        self._token.replace(octets(arguments, "token"), text(arguments, "pin"))
        return self.token_status({})

    def token_remove(self, _arguments: Arguments) -> Result:
        """Destroy the token. What its key had wrapped is lost."""
        self._token.remove()
        return self.token_status({})

    # Keys and anchors in operation

    def apply_statement(self, arguments: Arguments) -> Result:
        """Obey a signed statement about keys, anchors or token."""
        return self._lifecycle.apply(arguments)

    def lifecycle_status(self, _arguments: Arguments) -> Result:
        """Return how many statements were obeyed, and what the next one needs to know."""
        return self._lifecycle.status(in_operation=self._state is State.OPERATIONAL)

    def _guestos_users(self) -> Iterable[tuple[str, int | None]]:
        return self.containers.guestos_users()

    def _measure(self, events: Iterable[tuple[str, str]]) -> None:
        """Extend what is about to run; without a TPM there is nothing to extend, as in the boot."""
        if self._tcti is not None:
            with open_tpm(self._tcti) as tpm:
                for event, data in events:
                    extend_here(tpm, Measurement(event, data), self._measurement_log)

    # The end of data

    def wipe(self, _arguments: Arguments) -> Result:
        """Remove what containers left."""
        return {"removed": list(destruction.wipe(self._layout))}

    def destroy(self, _arguments: Arguments) -> Result:
        """Clear the TPM, remove every key; the device never runs again as what it was."""
        destruction.destroy(self._layout, self._tcti)
        return {}

    def _record_facts(self) -> dict[str, Any]:
        token = self._token.status()
        return {
            "completed_at": f"{self._inventory.now():%Y-%m-%dT%H:%M:%SZ}",
            "development": self._policy.development,
            "authorities": [
                {"purpose": purpose.value, "sha256": entry.sha256, "subject": entry.subject}
                for purpose in STORED
                for entry in self._store.entries(purpose)
            ],
            "token": {"kind": token.kind, "certificate_sha256": token.certificate_sha256 or ""},
            **self._inventory.names(),
        }


def _with_guestos(
    operate: Callable[[GuestOsOperations, Arguments], Result],
) -> Callable[[ProvisioningService, Arguments], Result]:
    return lambda service, arguments: operate(service.guestos, arguments)


OPERATIONS: Final[Mapping[str, Callable[[ProvisioningService, Arguments], Result]]] = {
    "prepare": ProvisioningService.prepare,
    "settle": ProvisioningService.settle,
    "status": ProvisioningService.status,
    "complete": ProvisioningService.complete,
    "csr": ProvisioningService.csr,
    "push-certificate": ProvisioningService.push_certificate,
    "verify-certificate": ProvisioningService.verify_certificate,
    "verify-guestos": ProvisioningService.verify_guestos,
    "activate": ProvisioningService.activate,
    "add-authority": ProvisioningService.add_authority,
    "remove-authority": ProvisioningService.remove_authority,
    "authorities": ProvisioningService.authorities,
    "token-status": ProvisioningService.token_status,
    "token-create": ProvisioningService.token_create,
    "token-unlock": ProvisioningService.token_unlock,
    "token-change-pin": ProvisioningService.token_change_pin,
    "token-replace": ProvisioningService.token_replace,
    "token-remove": ProvisioningService.token_remove,
    "apply-statement": ProvisioningService.apply_statement,
    "lifecycle-status": ProvisioningService.lifecycle_status,
    "wipe": ProvisioningService.wipe,
    "destroy": ProvisioningService.destroy,
    **{name: _with_guestos(operate) for name, operate in guestos.OPERATIONS.items()},
    **CONTAINER_OPERATIONS,
}
"""What the names of `states.TABLE` do."""


def _certificate(accepted: DeviceCertificate) -> Result:
    return {
        "sha256": accepted.sha256,
        "subject": accepted.subject,
        "anchor_sha256": accepted.anchor.sha256_fingerprint,
        "not_after": int(accepted.not_after.timestamp()),
        "device_uuid": str(accepted.uuid) if accepted.uuid is not None else "",
    }
