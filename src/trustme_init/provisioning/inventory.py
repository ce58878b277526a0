# SPDX-License-Identifier: Apache-2.0
"""What a device has: keys, certificates, anchors, token; and how that stands against the policy's demands."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.errors import Refusal, StorageRefusal
from trustme_init.policy import Policy
from trustme_init.provisioning import identity, requirements
from trustme_init.provisioning.certstore import CertificateStore
from trustme_init.provisioning.device_key import DeviceKey
from trustme_init.provisioning.layout import Layout
from trustme_init.provisioning.requirements import Finding, Requirement
from trustme_init.tokens.store import TokenStore
from trustme_init.trust.anchors import AnchorSet, Purpose
from trustme_init.trust.certificate import public_key_der
from trustme_init.trust.clock import effective_time
from trustme_init.trust.device import DeviceCertificate, verify_device_certificate

_FILE_LIMIT: Final = 64 * 1024
_PIN_WORDS: Final = {
    False: "set by its owner",
    True: "the published one of development builds",
    None: "not known before the token was unlocked once",
}


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything in its place; what is asked is looked up anew each time."""

    layout: Layout
    policy: Policy
    core_anchors: AnchorSet
    """With what `dbx` revokes."""
    store: CertificateStore
    token: TokenStore
    key: DeviceKey
    registered: Callable[[Purpose], frozenset[str] | None] = lambda _purpose: None
    """SHA-256 (hex) of the anchors that the TPM vouches for; None where nothing vouches for any."""

    def now(self) -> datetime:
        """Return the time of judgement."""
        return effective_time(datetime.now(tz=UTC), self.policy.build_date).at

    def anchors(self, purpose: Purpose) -> AnchorSet:
        """Return the anchors of a purpose; TrustRefusal("no-anchor") if there are none.

        In a build that provisions itself, the core's own anchors vouch for every GuestOS too.
        """
        extra = (
            tuple(anchor.certificate for anchor in self.core_anchors.anchors)
            if purpose is Purpose.GUEST and self.policy.provisions_itself
            else ()
        )
        return self.stored_anchors(purpose, extra)

    def stored_anchors(self, purpose: Purpose, extra: Sequence[bytes] = ()) -> AnchorSet:
        """Return the stored anchors of a purpose, with `extra` (DER); TrustRefusal("no-anchor")."""
        return self.store.anchors(
            purpose,
            revocations=self.core_anchors.revocations,
            at=self.now(),
            extra=extra,
            registered=self.registered(purpose),
        )

    def verify_own(self, pem: bytes, device_uuid: UUID) -> DeviceCertificate:
        """Judge a certificate for this device; refusals as `verify_device_certificate`, and "no-anchor"."""
        return verify_device_certificate(
            pem,
            public_key=self.key.public_key(),
            device_uuid=device_uuid,
            anchors=self.anchors(Purpose.DEVICE),
            at=self.now(),
        )

    def request(self, device_uuid: UUID) -> bytes | None:
        """Return the kept signing request (PEM) if it is for the present key and UUID."""
        pem = read_file(self.layout.device_csr)
        if pem is None:
            return None
        try:
            request = x509.load_pem_x509_csr(pem)
            names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound):
            return None
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        fits = f"UUID:{device_uuid}" in uris and public_key_der(request) == self.key.public_key()
        return pem if fits else None

    def checklist(self) -> tuple[Requirement, ...]:
        """Return what the policy can demand, and how it stands."""
        token = self.token.status()
        has_token = token.kind != "none"
        pin = _PIN_WORDS[token.default_pin] if has_token else "there is no token"
        return requirements.judge(
            (
                self._certificate_finding(),
                self._anchor_finding(Purpose.DEVICE, "device-anchor"),
                self._anchor_finding(Purpose.GUEST, "guest-anchor"),
                Finding("token", has_token, token.kind if has_token else "there is no token"),
                Finding("token-pin", has_token and token.default_pin is False, pin),
            ),
            self.policy.requirements,
        )

    def names(self) -> dict[str, Any]:
        """Return kind and digests (SHA-256, hex) of the keys and certificates that identify the device."""
        if not self.key.exists():
            return {"device_key": self.key.kind}
        certificate = self.store.device_certificate()
        certification = read_file(self.layout.certification)
        return {
            "device_key": self.key.kind,
            "device_key_sha256": hashlib.sha256(self.key.public_key()).hexdigest(),
            "device_certificate_sha256": _leaf_sha256(certificate) if certificate is not None else "",
            "endorsement_key_sha256": (
                self.key.endorsement_key_sha256(certification) if certification is not None else ""
            ),
        }

    def _certificate_finding(self) -> Finding:
        """Look at the device certificate: pushed and good, or self-signed where the build does that."""
        name = "device-certificate"
        pem = self.store.device_certificate()
        device_uuid = identity.load(self.layout.identity)
        if pem is None or device_uuid is None:
            return Finding(name, False, "none was pushed")
        try:
            if self.policy.provisions_itself and _is_self_signed_by(pem, self.key.public_key()):
                return Finding(name, True, "self-signed by the device (development)")
            accepted = self.verify_own(pem, device_uuid)
        except Refusal as refusal:
            return Finding(name, False, f"{refusal.code}: {refusal.cause}")
        return Finding(name, True, f"{accepted.subject}, until {accepted.not_after:%Y-%m-%d}")

    def _anchor_finding(self, purpose: Purpose, name: str) -> Finding:
        try:
            anchors = self.anchors(purpose)
        except Refusal as refusal:
            return Finding(name, False, refusal.evidence or refusal.cause)
        return Finding(name, True, f"{len(anchors.anchors)}")


def read_file(path: Path) -> bytes | None:
    """Return a file of ours, None when there is none; StorageRefusal("provisioning-file-unreadable")."""
    try:
        with path.open("rb") as file:
            return file.read(_FILE_LIMIT)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StorageRefusal(
            "provisioning-file-unreadable",
            "a file of provisioning cannot be read",
            evidence=f"{path}: {exc.strerror}",
            remedy="the data volume is damaged; restore it",
        ) from exc


def _leaf_sha256(pem: bytes) -> str:
    """Return the SHA-256 of the first certificate; empty if it cannot be read (the checklist says why)."""
    try:
        der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    except ValueError:
        return ""
    return hashlib.sha256(der).hexdigest()


def _is_self_signed_by(pem: bytes, public_key: bytes) -> bool:
    """Whether a certificate is the device key's own word for itself."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return public_key_der(certificate) == public_key
