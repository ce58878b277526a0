# SPDX-License-Identifier: Apache-2.0
"""The certificate store: the anchors that were deployed on this device, and the device's own certificate.

Below `cml/tokens` (interop layout, section 2.5, with SHA-256 where upstream has SHA-1):

    ca/<sha256>.pem           anchors of GuestOSes
    device_ca/<sha256>.pem    anchors of devices
    lifecycle_ca/<sha256>.pem anchors of who signs lifecycle statements (ours)
    localca_rootca.cert       one more anchor of GuestOSes, for what is signed on the spot
    device.cert               this device's certificate, leaf first

Rules:
- What is stored was judged before the first byte is written; a refused change leaves the store as it was.
- What is read is judged again, at every load. A file that is not exactly the certificate its name says, and
  anything that is no regular file, is no anchor: it is left out of the set and named there
  ("authority-file-damaged"), as is a CA that has expired or been revoked since. The others go on serving: one
  bad block does not take a device out of service. With none left there is no set ("no-anchor").
- A CA is an anchor of one purpose: its key is refused for the others.
- Nothing is followed and nothing half written (`folder`). Changes exclude each other by a lock.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.errors import StorageRefusal, TrustRefusal
from trustme_init.provisioning.folder import Folder
from trustme_init.trust import certificate as certificates
from trustme_init.trust.anchors import AnchorSet, Excluded, Purpose, Revocations, anchor_set
from trustme_init.trust.authority import (
    AUTHORITY_BYTES,
    Authority,
    judge_authority,
    read_authority,
    require_authority,
)
from trustme_init.trust.chain import BUNDLE_LIMIT

AUTHORITY_LIMIT: Final = 64
"""Anchors of one purpose; each is looked at in every chain that is judged."""
PREFIX_MIN: Final = 8
"""Hex digits that are enough to name a stored CA, where no other begins alike."""
LOCAL_CA: Final = "localca_rootca.cert"
DEVICE_CERTIFICATE: Final = "device.cert"
STORE_SOURCE: Final = "certificate store"
LOCAL_SOURCE: Final = "local CA"
BASE_SOURCE: Final = "base system"
"""Of anchors that the caller adds to those of the store."""

_FOLDERS: Final = {Purpose.GUEST: "ca", Purpose.DEVICE: "device_ca", Purpose.LIFECYCLE: "lifecycle_ca"}
"""Of each purpose that there are stored anchors for."""
_SUFFIX: Final = ".pem"
_NAME: Final = re.compile(r"[0-9a-f]{64}\.pem", re.ASCII)
_PREFIX: Final = re.compile(rf"[0-9a-f]{{{PREFIX_MIN},64}}", re.ASCII)
_TEXT_SHOWN: Final = 100
_DIGITS_SHOWN: Final = 24
_FOREIGN_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored CA certificate; `sha256` is of its DER, hex."""

    sha256: str
    subject: str
    not_after: datetime
    source: str
    """STORE_SOURCE or LOCAL_SOURCE."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A file of the store: the certificate in it (unjudged), or why there is none."""

    name: str
    source: str
    content: x509.Certificate | TrustRefusal

    @property
    def entry(self) -> Entry | None:
        if isinstance(self.content, TrustRefusal):
            return None
        return Entry(
            sha256=certificates.fingerprint(self.content.public_bytes(Encoding.DER)),
            subject=certificates.subject_text(self.content),
            not_after=self.content.not_valid_after_utc,
            source=self.source,
        )

    @property
    def sha256(self) -> str:
        """What it goes by: its name in a folder, what it holds as local CA; "" if by nothing."""
        if self.source == LOCAL_SOURCE:
            return self.entry.sha256 if self.entry is not None else ""
        return self.name.removesuffix(_SUFFIX) if _NAME.fullmatch(self.name) else ""


class CertificateStore:
    """The store in `directory` (`cml/tokens` of the data volume), which is made when first written to.

    StorageRefusal from every method: "certificate-store-unreadable", "certificate-store-unwritable".
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def entries(self, purpose: Purpose) -> tuple[Entry, ...]:
        """Return what is stored whole for a purpose, by SHA-256, the local CA last. It is not judged.

        TrustRefusal: "too-many-authorities" if there are more than were ever taken, "wrong-purpose".
        """
        return tuple(entry for each in self._find(purpose) if (entry := each.entry) is not None)

    def damaged(self, purpose: Purpose) -> tuple[Excluded, ...]:
        """Return the files that are not what their names say: to be removed, or replaced by `add`.

        TrustRefusal: as `entries`.
        """
        return tuple(
            Excluded(each.sha256, str(each.content))
            for each in self._find(purpose)
            if isinstance(each.content, TrustRefusal)
        )

    def anchors(
        self,
        purpose: Purpose,
        *,
        revocations: Revocations,
        at: datetime,
        extra: Sequence[bytes] = (),
        registered: Collection[str] | None = None,
    ) -> AnchorSet:
        """Return the stored anchors for a purpose that are good at the moment `at` (aware).

        `extra` (DER) are further ones that the caller has from elsewhere, where the signed policy says so.
        With `registered` a stored one counts only if its SHA-256 (hex) is in it.

        TrustRefusal: "no-anchor" when not one is good, and as `entries`.
        """
        sources = dict.fromkeys(extra, BASE_SOURCE)
        excluded = []
        for each in self._find(purpose):
            try:
                if isinstance(each.content, TrustRefusal):
                    raise each.content
                if registered is not None and each.sha256 not in registered:
                    raise _unregistered(each.sha256)
                authority = require_authority(each.content, at=at, revocations=revocations, purpose=purpose)
            except TrustRefusal as refusal:
                excluded.append(Excluded(each.sha256, str(refusal)))
                continue
            sources[authority.certificate_der] = each.source
        found = anchor_set(
            purpose, sources, revocations, source=f"the {STORE_SOURCE}", excluded_before=excluded
        )
        named = (replace(anchor, source=sources[anchor.certificate]) for anchor in found.anchors)
        return replace(found, anchors=tuple(named))

    def add(self, purpose: Purpose, pem: bytes, *, at: datetime, revocations: Revocations) -> Entry:
        """Store a CA certificate as an anchor for a purpose; durable when this returns.

        A damaged file in its place is replaced.

        TrustRefusal: those of `judge_authority`, "authority-already-there", "authority-other-purpose",
        "too-many-authorities".
        """
        authority = judge_authority(pem, at=at, revocations=revocations, purpose=purpose)
        with self._changing() as root:
            stored = self._find(purpose, limited=False)
            self._require_new(authority, purpose, stored)
            self._require_room(authority, purpose, stored)
            with root.make_sub(_FOLDERS[purpose]) as folder:
                folder.write(f"{authority.sha256}{_SUFFIX}", pem)
        return _entry(authority, STORE_SOURCE)

    def set_local(self, pem: bytes, *, at: datetime, revocations: Revocations) -> Entry:
        """Store the local CA, an anchor for GUEST, in place of the one that was; durable when this returns.

        TrustRefusal: those of `judge_authority`, "authority-already-there", "authority-other-purpose".
        """
        authority = judge_authority(pem, at=at, revocations=revocations, purpose=Purpose.GUEST)
        with self._changing() as root:
            self._require_new(authority, Purpose.GUEST, self._find(Purpose.GUEST, limited=False))
            root.write(LOCAL_CA, pem)
        return _entry(authority, LOCAL_SOURCE)

    def remove(self, purpose: Purpose, sha256: str) -> str:
        """Remove the CA that `sha256` names, in full or by a beginning that is its alone; return it in full.

        A damaged file goes by the name it has, the local CA by the SHA-256 of what it holds.

        TrustRefusal: "authority-unknown", "authority-ambiguous", "wrong-purpose".
        """
        wanted = sha256.lower() if _PREFIX.fullmatch(sha256.lower()) else None
        with self._changing() as root:
            matches = [
                each
                for each in self._find(purpose, limited=False)
                if wanted is not None and each.sha256.startswith(wanted)
            ]
            if not matches:
                raise _unknown(f"{sha256[:_TEXT_SHOWN]!a} for the purpose {purpose.value}")
            if len(matches) > 1:
                raise TrustRefusal(
                    "authority-ambiguous",
                    "more than one stored CA certificate begins like that",
                    evidence=", ".join(each.sha256[:_DIGITS_SHOWN] for each in matches[:2]),
                    remedy="give more digits of its SHA-256",
                )
            (match,) = matches
            if match.source == LOCAL_SOURCE:
                root.remove(match.name)
            else:
                with root.make_sub(_FOLDERS[purpose]) as folder:
                    folder.remove(match.name)
        return match.sha256

    def require_new(
        self, purpose: Purpose, pem: bytes, *, at: datetime, revocations: Revocations, replaced: str = ""
    ) -> Authority:
        """Judge a CA certificate as `add` does, store nothing, and return it.

        `replaced` is the SHA-256 of the one that it is to take the place of, for the count.

        TrustRefusal: as `add`.
        """
        authority = judge_authority(pem, at=at, revocations=revocations, purpose=purpose)
        stored = self._find(purpose, limited=False)
        self._require_new(authority, purpose, stored)
        self._require_room(authority, purpose, stored, replaced)
        return authority

    def put(self, purpose: Purpose, pem: bytes) -> None:
        """Store a CA certificate that `require_new` has accepted before; twice is as good as once.

        Not judged again: what was once accepted for good must not be undone by the time that passed since.
        """
        sha256 = certificates.fingerprint(read_authority(pem).public_bytes(Encoding.DER))
        with self._changing() as root, root.make_sub(_FOLDERS[purpose]) as folder:
            folder.write(f"{sha256}{_SUFFIX}", pem)

    def drop(self, purpose: Purpose, sha256: str) -> None:
        """Remove the CA with this SHA-256, the local CA too; harmless where there is none."""
        with self._changing() as root:
            for each in self._find(purpose, limited=False):
                if each.sha256 != sha256:
                    continue
                if each.source == LOCAL_SOURCE:
                    root.remove(each.name)
                else:
                    with root.make_sub(_FOLDERS[purpose]) as folder:
                        folder.remove(each.name)

    def remove_local(self) -> None:
        """Remove the local CA, whatever state its file is in; TrustRefusal("authority-unknown")."""
        with self._changing() as root:
            if LOCAL_CA not in root.names():
                raise _unknown("there is no local CA")
            root.remove(LOCAL_CA)

    def device_certificate(self) -> bytes | None:
        """Return this device's certificate as stored (PEM, leaf first), None when there is none.

        Whoever uses it has it judged by `verify_device_certificate`.

        StorageRefusal: "device-certificate-unreadable" for what is no regular file, or too large.
        """
        root = Folder.open(self._directory)
        if root is None:
            return None
        with root:
            try:
                return root.read(DEVICE_CERTIFICATE, BUNDLE_LIMIT)
            except FileNotFoundError:
                return None
            except OSError as exc:
                raise StorageRefusal(
                    "device-certificate-unreadable",
                    "this device's certificate cannot be read",
                    evidence=f"{DEVICE_CERTIFICATE}: {exc.strerror}",
                    remedy="push the device's certificate again (`control push_cert`)",
                ) from exc

    def set_device_certificate(self, pem: bytes) -> None:
        """Store this device's certificate in place of the one that was; durable when this returns.

        The caller has had it judged. ValueError for what no judge has accepted: nothing, or too much.
        """
        if not 0 < len(pem) <= BUNDLE_LIMIT:
            raise ValueError(f"no certificate chain has {len(pem)} bytes")
        with self._changing() as root:
            root.write(DEVICE_CERTIFICATE, pem)

    def _require_room(
        self, authority: Authority, purpose: Purpose, stored: Sequence[_Found], replaced: str = ""
    ) -> None:
        others = {each.sha256 for each in stored if each.source == STORE_SOURCE}
        if len(others - {"", authority.sha256, replaced}) >= AUTHORITY_LIMIT:
            raise _too_many(purpose, len(others))

    def _require_new(self, authority: Authority, purpose: Purpose, stored: Sequence[_Found]) -> None:
        certificate = certificates.load(authority.certificate_der)
        # In each form that it can be given without any key: else removing one would leave its twin.
        forms = {digest.hex() for digest in certificates.digests(certificate)}
        for each in stored:
            if each.entry is not None and each.entry.sha256 in forms:
                raise TrustRefusal(
                    "authority-already-there",
                    "this CA certificate is stored already",
                    evidence=f"{each.entry.sha256}, {each.source}",
                    remedy="nothing needs to be done",
                )
        key = certificates.public_key_der(certificate)
        for other in _FOLDERS:
            for each in self._find(other, limited=False) if other is not purpose else ():
                if isinstance(each.content, TrustRefusal) or certificates.public_key_der(each.content) != key:
                    continue
                raise TrustRefusal(
                    "authority-other-purpose",
                    f"this CA's key is an anchor for the purpose {other.value} already",
                    evidence=certificates.describe(each.content),
                    remedy="use a CA of its own for each purpose: register sub CAs instead of their root",
                )

    def _find(self, purpose: Purpose, *, limited: bool = True) -> list[_Found]:
        """Read the files of one purpose; "too-many-authorities" if `limited` and there are too many."""
        if purpose not in _FOLDERS:
            raise TrustRefusal(
                "wrong-purpose",
                f"anchors for the purpose {purpose.value} are not in the certificate store",
                remedy="a mistake in the calling code: report it",
            )
        root = Folder.open(self._directory)
        if root is None:
            return []
        with root:
            found = []
            if (folder := root.sub(_FOLDERS[purpose])) is not None:
                with folder:
                    found = _find_in(folder, purpose, limited=limited)
            if purpose is Purpose.GUEST and LOCAL_CA in root.names():
                found.append(_Found(LOCAL_CA, LOCAL_SOURCE, _content(root, LOCAL_CA)))
            return found

    @contextmanager
    def _changing(self) -> Iterator[Folder]:
        """Lock the store, which is made if need be, and clean up after what was interrupted."""
        with Folder.make(self._directory) as root:
            root.lock()
            root.clean()
            for name in _FOLDERS.values():
                if (folder := root.sub(name)) is not None:
                    with folder:
                        folder.clean()
            yield root


def _find_in(folder: Folder, purpose: Purpose, *, limited: bool) -> list[_Found]:
    names = folder.names()
    ours = [name for name in names if _NAME.fullmatch(name)]
    foreign = [name for name in names if not _NAME.fullmatch(name)]
    if limited and len(ours) > AUTHORITY_LIMIT:
        raise _too_many(purpose, len(ours))
    return [
        *(_Found(name, STORE_SOURCE, _content(folder, name)) for name in ours),
        *(
            _Found(name, STORE_SOURCE, _damaged(name, "its name is not <sha256>.pem"))
            for name in foreign[:_FOREIGN_SHOWN]
        ),
    ]


def _content(folder: Folder, name: str) -> x509.Certificate | TrustRefusal:
    try:
        certificate = read_authority(folder.read(name, AUTHORITY_BYTES))
    except OSError as exc:
        return _damaged(name, str(exc.strerror))
    except TrustRefusal as refusal:
        return _damaged(name, str(refusal))
    sha256 = certificates.fingerprint(certificate.public_bytes(Encoding.DER))
    if name not in (LOCAL_CA, f"{sha256}{_SUFFIX}"):
        return _damaged(name, f"it holds {sha256}")
    return certificate


def _entry(authority: Authority, source: str) -> Entry:
    return Entry(authority.sha256, authority.subject, authority.not_after, source)


def _damaged(name: str, evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "authority-file-damaged",
        "a file in the certificate store is not the CA certificate it should be",
        evidence=f"{name[:_TEXT_SHOWN]!a}: {evidence}",
        remedy="remove it, or register the CA again",
    )


def _too_many(purpose: Purpose, count: int) -> TrustRefusal:
    return TrustRefusal(
        "too-many-authorities",
        f"the certificate store takes {AUTHORITY_LIMIT} CA certificates of one purpose",
        evidence=f"{count} for the purpose {purpose.value}",
        remedy="remove those that are not needed any more (`control ca_remove`)",
    )


def _unregistered(sha256: str) -> TrustRefusal:
    return TrustRefusal(
        "authority-unregistered",
        "this CA certificate was put on the disk, and never registered on this device",
        evidence=sha256,
        remedy="somebody has written to the disk while the device was off: look for what else was changed",
    )


def _unknown(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "authority-unknown",
        "no such CA certificate is stored",
        evidence=evidence,
        remedy=f"name it by its SHA-256, at least {PREFIX_MIN} hex digits (`control ca_list`)",
    )
