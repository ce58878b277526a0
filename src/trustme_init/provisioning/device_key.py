# SPDX-License-Identifier: Apache-2.0
"""The device's signing key: in the TPM, not exportable. Without a TPM, in development builds, in a file.

Both kinds give the same request and certificates; every status names the kind, and a signer refuses a
request for a software key unless told otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trustme_init.errors import StorageRefusal
from trustme_init.provisioning.layout import save
from trustme_init.tpm import device_key as tpm_device_key
from trustme_init.tpm import endorsement, nv_marker, ownership, storage_key
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.device_key import KeyBlobs

SELF_SIGNED_DAYS: Final = 3650
_FILE_LIMIT: Final = 16 * 1024


class DeviceKey(Protocol):
    """What the service asks of the key, wherever it is."""

    kind: str

    def prepare(self) -> None:
        """Make the key, and whatever belongs to it, where it is not there yet. Safe to cut at any instant."""
        ...

    def exists(self) -> bool:
        """Return whether `prepare` came to its end once."""
        ...

    def public_key(self) -> bytes:
        """Return the SubjectPublicKeyInfo, DER."""
        ...

    def request(self, device_uuid: UUID) -> bytes:
        """Return a certificate signing request, PEM."""
        ...

    def self_signed(self, device_uuid: UUID, at: datetime) -> bytes:
        """Return a self-signed certificate valid from `at`, PEM."""
        ...

    def certification(self, request: bytes) -> bytes:
        """Return the TPM's word for the key of `request` (PEM); empty when there is no TPM."""
        ...

    def endorsement_key_sha256(self, certification: bytes) -> str:
        """Return the SHA-256 of the endorsement key in a certification, hex; empty without a TPM."""
        ...


def common_name(device_uuid: UUID) -> str:
    """Return the subject's common name: the UUID, the one name of a device that is never shared."""
    return str(device_uuid)


@dataclass(frozen=True, slots=True)
class TpmDeviceKey:
    """A key that only this device's TPM can use."""

    tcti: str
    directory: Path
    algorithm: str
    """"ecc-p256" or "rsa-2048"."""
    kind = "tpm"

    @property
    def _key_file(self) -> Path:
        return self.directory / "device_key.json"

    @property
    def _attestation_file(self) -> Path:
        return self.directory / "attestation_key.json"

    def prepare(self) -> None:
        """Take ownership of the TPM, define the marker, make both keys.

        The marker's index is defined here and not at completion, so that a TPM that cannot have one shows
        before anything else has been done.
        """
        with open_tpm(self.tcti) as tpm:
            ownership.take_ownership(tpm, self.directory)
            owner = ownership.authorisations(tpm, self.directory).owner
            storage_key.ensure_storage_key(tpm, owner)
            nv_marker.define_marker(tpm, owner)
            if not self._attestation_file.exists():
                _write_blobs(self._attestation_file, endorsement.create_attestation_key(tpm))
            if not self._key_file.exists():
                _write_blobs(self._key_file, tpm_device_key.create_device_key(tpm, self.algorithm))

    def exists(self) -> bool:
        """Return whether both keys are there; whether the TPM can use them, it says at the first use."""
        return self._key_file.exists() and self._attestation_file.exists()

    def public_key(self) -> bytes:
        """Return the SubjectPublicKeyInfo, DER; StorageRefusal("device-key-missing", "-damaged")."""
        return tpm_device_key.spki(_read_blobs(self._key_file))

    def request(self, device_uuid: UUID) -> bytes:
        """Return a request signed in the TPM. DeviceRefusal("device-key-foreign")."""
        with open_tpm(self.tcti) as tpm:
            return tpm_device_key.make_csr(
                tpm,
                _read_blobs(self._key_file),
                device_uuid=device_uuid,
                common_name=common_name(device_uuid),
            )

    def self_signed(self, device_uuid: UUID, at: datetime) -> bytes:
        """Return a certificate signed in the TPM."""
        with open_tpm(self.tcti) as tpm:
            return tpm_device_key.self_signed_certificate(
                tpm,
                _read_blobs(self._key_file),
                device_uuid=device_uuid,
                common_name=common_name(device_uuid),
                not_before=at,
                days=SELF_SIGNED_DAYS,
            )

    def certification(self, request: bytes) -> bytes:
        """Have the attestation key certify the device key for this request."""
        der = x509.load_pem_x509_csr(request).public_bytes(Encoding.DER)
        with open_tpm(self.tcti) as tpm:
            return endorsement.certify_device_key(
                tpm, _read_blobs(self._key_file), _read_blobs(self._attestation_file), der
            )

    def activate(self, credential_blob: bytes, encrypted_secret: bytes) -> bytes:
        """Return the secret of a challenge that was made for this TPM's endorsement and attestation keys."""
        with open_tpm(self.tcti) as tpm:
            return endorsement.activate_credential(
                tpm, _read_blobs(self._attestation_file), credential_blob, encrypted_secret
            )

    def endorsement_key_sha256(self, certification: bytes) -> str:
        """Return the SHA-256 of the endorsement key's SubjectPublicKeyInfo, hex: what signers call it by."""
        public = base64.b64decode(json.loads(certification)["ek_public"])
        return hashlib.sha256(tpm_device_key.spki(KeyBlobs(public, b""))).hexdigest()


@dataclass(frozen=True, slots=True)
class SoftwareDeviceKey:
    """A P-256 key in a file of mode 0600, for development builds on machines without a TPM."""

    path: Path
    kind = "software"

    def prepare(self) -> None:
        """Make the key durably."""
        if not self.path.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            save(self.path, pem)

    def exists(self) -> bool:
        """Return whether the file is there."""
        return self.path.exists()

    def public_key(self) -> bytes:
        """Return the SubjectPublicKeyInfo, DER."""
        return self._key().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def request(self, device_uuid: UUID) -> bytes:
        """Return a request, PEM."""
        builder = x509.CertificateSigningRequestBuilder(_name(device_uuid))
        for extension, critical in _extensions(device_uuid):
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key(), hashes.SHA256()).public_bytes(Encoding.PEM)

    def self_signed(self, device_uuid: UUID, at: datetime) -> bytes:
        """Return a self-signed certificate, PEM."""
        key = self._key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(device_uuid))
            .issuer_name(_name(device_uuid))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(at)
            .not_valid_after(at + timedelta(days=SELF_SIGNED_DAYS))
        )
        for extension, critical in _extensions(device_uuid):
            builder = builder.add_extension(extension, critical)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def certification(self, request: bytes) -> bytes:  # noqa: ARG002 - a key's shape
        """Return nothing: no TPM vouches for this key."""
        return b""

    def endorsement_key_sha256(self, certification: bytes) -> str:  # noqa: ARG002 - a key's shape
        """Return nothing."""
        return ""

    def _key(self) -> ec.EllipticCurvePrivateKey:
        try:
            key = load_pem_private_key(_read(self.path), None)
        except ValueError as exc:
            raise _damaged(self.path) from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _damaged(self.path)
        return key


def _name(device_uuid: UUID) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name(device_uuid))])


def _extensions(device_uuid: UUID) -> list[tuple[x509.ExtensionType, bool]]:
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    return [
        (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"UUID:{device_uuid}")]), False),
        (usage, True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
    ]


def _write_blobs(path: Path, blobs: KeyBlobs) -> None:
    document = {
        "version": 1,
        "public": base64.b64encode(blobs.public).decode(),
        "private": base64.b64encode(blobs.private).decode(),
    }
    save(path, json.dumps(document).encode())


def _read_blobs(path: Path) -> KeyBlobs:
    try:
        document: dict[str, Any] = json.loads(_read(path))
        if document["version"] != 1:
            raise _damaged(path)
        return KeyBlobs(
            base64.b64decode(document["public"], validate=True),
            base64.b64decode(document["private"], validate=True),
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise _damaged(path) from exc


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_LIMIT)
    except FileNotFoundError as exc:
        raise StorageRefusal(
            "device-key-missing",
            "the device has no signing key",
            evidence=str(path),
            remedy="it is made at the first boot; see the device's log why that did not happen",
        ) from exc
    except OSError as exc:
        raise _damaged(path) from exc


def _damaged(path: Path) -> StorageRefusal:
    return StorageRefusal(
        "device-key-damaged",
        "the file of the device's signing key cannot be used",
        evidence=str(path),
        remedy="the data volume is damaged; restore it, or clear the TPM and provision the device anew",
    )
