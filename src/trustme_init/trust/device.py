# SPDX-License-Identifier: Apache-2.0
"""Whether a certificate is this very device's, and who another party is.

Rules:
- Chain, path, validity and revocation are `chain.verify_path`'s, as for software; the anchors are those of
  devices. An anchor of software never vouches for a device, and one of devices never for software.
- The device's certificate holds the public key of its TPM, byte for byte, and names its UUID.
- A UUID is named by one URI in subjectAltName, `UUID:<8-4-4-4-12 hex digits>` (upstream's form), letters of
  either case. A second URI that names a UUID, also as a URN, is refused even if it names the same one: who
  reads only one of them must not read another than we did. The subject says nothing about who it is.
- What the certificate is for, `certificate.DEVICE` says; that a peer may be a client or a server,
  `certificate.CLIENT` and `SERVER`. The CAs above must allow the same, if they limit their purposes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.errors import TrustRefusal
from trustme_init.trust import certificate as certificates
from trustme_init.trust.anchors import Anchor, AnchorSet, Purpose
from trustme_init.trust.chain import Use, VerifiedPath, verify_path

_DEVICES: Final = frozenset({Purpose.DEVICE})
DEVICE_USE: Final = Use(certificates.DEVICE, certificates.DEVICE_CA, _DEVICES, "device")
CLIENT_USE: Final = Use(certificates.CLIENT, certificates.DEVICE_CA, _DEVICES, "device")
SERVER_USE: Final = Use(certificates.SERVER, certificates.SERVER_CA, _DEVICES, "device")

_NAMES_A_UUID: Final = re.compile(r"(?:urn:)?uuid:", re.ASCII | re.IGNORECASE)
_UUID_URI: Final = re.compile(
    r"uuid:([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})", re.ASCII | re.IGNORECASE
)
_EVIDENCE_LIMIT: Final = 100
_REMEDY: Final = "have the device's own CSR signed by a CA registered for devices (`trustme pki sign-device`)"


@dataclass(frozen=True, slots=True)
class DeviceCertificate:
    """Who it is, as far as an anchor of devices vouches for it."""

    leaf_der: bytes
    subject: str
    sha256: str
    """Of the leaf, hex."""
    fingerprints: tuple[str, ...]
    """SHA-256 (hex) of the path's certificates, leaf first, anchor last."""
    anchor: Anchor
    not_after: datetime
    """Of the leaf."""
    uuid: UUID | None
    """None only for a peer that names none."""


def verify_device_certificate(
    pem: bytes, *, public_key: bytes, device_uuid: UUID, anchors: AnchorSet, at: datetime
) -> DeviceCertificate:
    """Return this device's certificate: `pem` is its chain, leaf first, `at` the moment (aware).

    `public_key` is that of the device key as the TPM reports it, DER SubjectPublicKeyInfo (RFC 5280, section
    4.1.2.7).

    TrustRefusal: "wrong-purpose", "device-purpose", "device-key-mismatch", "device-uuid-mismatch", and those
    of `chain.verify_chain` that are not about signing software.
    """
    path = _path(pem, anchors, DEVICE_USE, at)
    leaf = path.certificates[0]
    if certificates.public_key_der(leaf) != public_key:
        raise TrustRefusal(
            "device-key-mismatch",
            "the certificate is for another key than the one in this device's TPM",
            evidence=certificates.describe(leaf),
            remedy=_REMEDY,
        )
    try:
        named = named_uuid(uris(leaf))
    except ValueError as exc:
        raise _uuid_mismatch(leaf, str(exc), device_uuid) from exc
    if named != device_uuid:
        raise _uuid_mismatch(leaf, f"it names {named or 'none'}", device_uuid)
    return _facts(path, named)


def verify_peer_certificate(pem: bytes, *, anchors: AnchorSet, at: datetime) -> DeviceCertificate:
    """Return another party's certificate (a backend's, another device's), judged against the device anchors.

    It is good as a client's or as a server's, all the way up to the anchor; that is not told apart.

    TrustRefusal: "wrong-purpose", "peer-purpose", "peer-uuid" (names a UUID, but not just one in its proper
    form), and those of `chain.verify_chain` that are not about signing software.
    """
    try:
        path = _path(pem, anchors, CLIENT_USE, at)
    except TrustRefusal as no_client:
        if no_client.code not in {"peer-purpose", "ca-purpose"}:
            raise
        try:
            path = _path(pem, anchors, SERVER_USE, at)
        except TrustRefusal as no_server:
            # Of a certificate that is a client's, the first refusal is the one that says why.
            raise (no_client if no_server.code == "peer-purpose" else no_server) from None
    leaf = path.certificates[0]
    try:
        named = named_uuid(uris(leaf))
    except ValueError as exc:
        raise TrustRefusal(
            "peer-uuid",
            "the peer's certificate does not name one UUID",
            evidence=f"{certificates.describe(leaf)}: {exc}",
            remedy="issue the peer's certificate anew, with one URI `UUID:<uuid>` or none",
        ) from exc
    return _facts(path, named)


def uris(certificate: x509.Certificate) -> list[str]:
    """Return the URIs in a certificate's subjectAltName (RFC 5280, section 4.2.1.6)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def named_uuid(names: Sequence[str]) -> UUID | None:
    """Return the UUID that a certificate's URIs name, or None; ValueError if it is not just one, properly."""
    naming = [name for name in names if _NAMES_A_UUID.match(name)]
    if not naming:
        return None
    shown = ", ".join(naming)[:_EVIDENCE_LIMIT]
    if len(naming) > 1:
        raise ValueError(f"{len(naming)} URIs name a UUID: {shown!a}")
    if (match := _UUID_URI.fullmatch(naming[0])) is None:
        raise ValueError(f"not of the form UUID:<uuid>: {shown!a}")
    return UUID(match[1])


def _path(pem: bytes, anchors: AnchorSet, use: Use, at: datetime) -> VerifiedPath:
    try:
        return verify_path(pem, anchors, use, at=at)
    except TrustRefusal as refusal:
        refusal.remedy = _REMEDY  # the chain's own is for who signs software
        raise


def _facts(path: VerifiedPath, uuid: UUID | None) -> DeviceCertificate:
    leaf = path.certificates[0]
    return DeviceCertificate(
        leaf_der=leaf.public_bytes(Encoding.DER),
        subject=certificates.subject_text(leaf),
        sha256=path.fingerprints[0],
        fingerprints=path.fingerprints,
        anchor=path.anchor,
        not_after=leaf.not_valid_after_utc,
        uuid=uuid,
    )


def _uuid_mismatch(leaf: x509.Certificate, found: str, wanted: UUID) -> TrustRefusal:
    return TrustRefusal(
        "device-uuid-mismatch",
        "the certificate does not name this device's UUID, just once, in subjectAltName",
        evidence=f"{certificates.describe(leaf)}: {found}; this device is {wanted}",
        remedy=_REMEDY,
    )
