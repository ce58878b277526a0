# SPDX-License-Identifier: Apache-2.0
"""Who is believed, for which purpose, and who no longer is.

Rules (design decision 2):
- The anchors of the core are the CA certificates in `db`, minus whatever `dbx` revokes. Any CA in `db` is a
  full anchor, self-signed or not. Other certificates there (a leaf that signs boot loaders) are no anchors.
- An anchor has one purpose. A set holds anchors of one purpose, and whoever uses it names the purpose.
  Anchors of software are CAs that may vouch for code signing, those of devices for client authentication,
  those of the lifecycle for who signs statements (`statement`).
- `dbx` revokes: a certificate listed in full, with everything it issued and everything with its key; a
  certificate by the digest of its TBSCertificate; and by SHA-256 a certificate, a configuration or an image.
- A revocation time (EFI_TIME beside a TBS digest) is not looked at: it spares signatures that a trusted
  authority time-stamped earlier, and ours carry no such stamp (as in EDK II without a time stamp).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.errors import TrustRefusal
from trustme_init.firmware.secureboot import FirmwareFacts, SignatureDb
from trustme_init.trust import certificate as certificates


class Purpose(Enum):
    """What an anchor is believed for."""

    CORE = "core"
    GUEST = "guest"
    DEVICE = "device"
    LIFECYCLE = "lifecycle"


AUTHORITY_ROLES: Final[Mapping[Purpose, certificates.Role]] = {
    Purpose.CORE: certificates.CA,
    Purpose.GUEST: certificates.CA,
    Purpose.DEVICE: certificates.DEVICE_CA,
    Purpose.LIFECYCLE: certificates.LIFECYCLE_CA,
}
"""The rules for a CA certificate that is to be an anchor."""
_VOUCHED: Final[Mapping[Purpose, str]] = {
    Purpose.CORE: "software",
    Purpose.GUEST: "software",
    Purpose.DEVICE: "devices",
    Purpose.LIFECYCLE: "lifecycle statements",
}
_REMEDIES: Final[Mapping[Purpose, str]] = {
    Purpose.CORE: "enrol the software-signing CA in db (`trustme uefi vars`, or the firmware's key set-up)",
    Purpose.GUEST: "register the CA that signs GuestOSes (`control ca_register`)",
    Purpose.DEVICE: "register the CA that signs device certificates (`control device_ca_register`)",
    Purpose.LIFECYCLE: "register a CA for them in provisioning (`control lifecycle_ca_register`)",
}


@dataclass(frozen=True, slots=True)
class Anchor:
    """A CA certificate that is believed a priori. `certificate` is DER, `sha256_fingerprint` of it, hex."""

    certificate: bytes
    subject: str
    sha256_fingerprint: str
    purpose: Purpose
    source: str


@dataclass(frozen=True, slots=True)
class Excluded:
    """A certificate that was offered as an anchor and is none: SHA-256 (hex), and why."""

    sha256_fingerprint: str
    reason: str


@dataclass(frozen=True, slots=True)
class Revocations:
    """A deny list; `dbx` in the terms of this module."""

    certificates: tuple[bytes, ...] = ()
    """DER; an entry that cannot be parsed still revokes the certificate that has the same bytes."""
    sha256: frozenset[bytes] = frozenset()
    tbs_digests: Mapping[str, frozenset[bytes]] = field(default_factory=dict)
    """Hash name to digests of TBSCertificates."""

    @classmethod
    def from_dbx(cls, dbx: SignatureDb) -> Revocations:
        """Take over every entry of a `dbx` that is understood."""
        return cls(
            certificates=dbx.certificates,
            sha256=dbx.sha256,
            tbs_digests={name: frozenset(entries) for name, entries in dbx.x509_hashes.items()},
        )

    def lists_digest(self, digest: bytes) -> bool:
        """Whether a SHA-256 digest (of a file, or a dm-verity root) is revoked."""
        return digest in self.sha256

    def reason(self, certificate: x509.Certificate) -> str | None:
        """Return which kind of entry revokes the certificate, or None."""
        der = certificate.public_bytes(Encoding.DER)
        if der in self.certificates:
            return "the certificate itself is listed"
        if self.sha256 and not self.sha256.isdisjoint(certificates.digests(certificate)):
            return "the SHA-256 of the certificate is listed"
        tbs = certificate.tbs_certificate_bytes
        for name, digests in self.tbs_digests.items():
            if hashlib.new(name, tbs).digest() in digests:
                return f"the {name} of its TBSCertificate is listed"
        key = certificates.public_key_der(certificate)
        for revoked_der in self.certificates:
            try:
                revoked = certificates.load(revoked_der)
            except certificates.MalformedCertificateError:
                continue
            if certificates.public_key_der(revoked) == key:
                return "its key is that of a listed certificate"
            if certificates.is_signed_by(certificate, revoked):
                return "its issuer is listed"
        return None


@dataclass(frozen=True, slots=True)
class AnchorSet:
    """The anchors of one purpose, what is revoked under them, and what was not taken."""

    purpose: Purpose
    anchors: tuple[Anchor, ...]
    revocations: Revocations = field(default_factory=Revocations)
    excluded: tuple[Excluded, ...] = ()

    def __post_init__(self) -> None:
        """ValueError if an anchor of another purpose is slipped in: a mistake in the calling code."""
        if any(anchor.purpose is not self.purpose for anchor in self.anchors):
            raise ValueError("an anchor set has one purpose")


def core_anchors(facts: FirmwareFacts) -> AnchorSet:
    """Return the anchors of the core container; TrustRefusal("no-anchor") if the firmware names none.

    The caller has had `facts` judged by `check_platform`: `db` means nothing while anybody may write it.
    """
    return anchor_set(Purpose.CORE, facts.db.certificates, Revocations.from_dbx(facts.dbx), source="UEFI db")


def anchor_set(
    purpose: Purpose,
    offered: Iterable[bytes],
    revocations: Revocations,
    *,
    source: str,
    excluded_before: Iterable[Excluded] = (),
) -> AnchorSet:
    """Take the usable CA certificates (DER) of `offered`; TrustRefusal("no-anchor") if there are none.

    `excluded_before` is what the caller found unusable before it could be offered: it is named likewise.
    """
    anchors: dict[bytes, Anchor] = {}
    excluded = list(excluded_before)
    for der in offered:
        try:
            certificate = certificates.load(der)
        except certificates.MalformedCertificateError as exc:
            excluded.append(Excluded(certificates.fingerprint(der), f"malformed: {exc}"))
            continue
        if (reason := _unusable(certificate, purpose, revocations)) is not None:
            excluded.append(Excluded(certificates.fingerprint(der), reason))
            continue
        anchors[der] = Anchor(
            certificate=der,
            subject=certificates.subject_text(certificate),
            sha256_fingerprint=certificates.fingerprint(der),
            purpose=purpose,
            source=source,
        )
    if not anchors:
        seen = "; ".join(f"{entry.sha256_fingerprint[:16]}: {entry.reason}" for entry in excluded[:8])
        raise TrustRefusal(
            "no-anchor",
            f"{source} holds no CA certificate that may vouch for {_VOUCHED[purpose]}",
            evidence=seen or "no certificate at all",
            remedy=_REMEDIES[purpose],
        )
    return AnchorSet(purpose, tuple(anchors.values()), revocations, tuple(excluded))


def _unusable(certificate: x509.Certificate, purpose: Purpose, revocations: Revocations) -> str | None:
    fault = certificates.form_fault(certificate) or AUTHORITY_ROLES[purpose].fault(certificate)
    if fault is not None:
        return fault.cause
    if (reason := revocations.reason(certificate)) is not None:
        return f"revoked: {reason}"
    return None
