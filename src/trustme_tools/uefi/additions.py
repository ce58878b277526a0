# SPDX-License-Identifier: Apache-2.0
"""A third party's entries for db or dbx: what a file offers, and whether it is to be added.

Rules:
- A file is taken only if its SHA-256, which came another way, is what the operator was told: of the file, or
  of the certificate (DER) where it offers just one. What is added are the bytes that were compared.
- It offers whole signature lists (.esl), or one certificate: of a PEM chain the first. What stands behind it
  must not become trusted by the way.
- What goes to db is a CA that the device would take as an anchor (`trust.certificate`, valid now), because
  that is what a db entry is: a full anchor for core software and for boot images. Anything else is refused,
  or with `boot_only` added as what it then is: what the firmware starts programs by, and no anchor.
- What dbx revokes is not added to db; what is there already is not added again.
- All or nothing: one entry that is refused refuses the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.errors import Refusal
from trustme_init.firmware.secureboot import parse_database
from trustme_init.firmware.siglist import (
    DIGEST_SIZES,
    EFI_CERT_SHA256,
    EFI_CERT_X509,
    LISTS_LIMIT,
    Signature,
    SignatureList,
    parse_signature_lists,
    serialize_signature_lists,
)
from trustme_init.trust import certificate as device_rules
from trustme_init.trust.anchors import Revocations
from trustme_tools.errors import ToolError, UsageError
from trustme_tools.uefi.keys import OWNER
from trustme_tools.uefi.show import signature_facts

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_OWNER_SIZE: Final = 16
_DER_SEQUENCE: Final = 0x30
"""First byte of a certificate in DER; no signature list begins with it, since they begin with known GUIDs."""
_ANCHOR: Final = "a full anchor: vouches for core software and for boot images"
_KNOWN: Final = frozenset({EFI_CERT_X509, EFI_CERT_SHA256, *DIGEST_SIZES})


@dataclass(frozen=True, slots=True)
class Offer:
    """What a file offers. `left_out` counts the certificates behind the first one of a chain."""

    path: Path
    lists: tuple[SignatureList, ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class Addition:
    """A database with the new entries behind the old ones, and what they are, entry by entry.

    Entries are as `uefi show` has them, with `effect` in words; `present` are those that were there already.
    """

    data: bytes
    entries: tuple[dict[str, Any], ...]
    present: tuple[dict[str, Any], ...]


def expected_digest(text: str) -> str:
    """Return a SHA-256 as lower-case hex; also taken in the form AA:BB:…; UsageError("bad-digest")."""
    digest = text.replace(":", "").replace(" ", "").lower()
    if not _DIGEST.fullmatch(digest):
        raise UsageError(
            f"{text} is not a SHA-256 digest",
            "give the 64 hexadecimal digits that the other party told you",
            code="bad-digest",
        )
    return digest


def read_offer(path: Path, digest: str) -> Offer:
    """Read a file whose SHA-256 must be `digest` (hex).

    ToolError: "digest-mismatch", "bad-lists", "certificate-unreadable", "no-entries".
    """
    with path.open("rb") as file:
        data = file.read(LISTS_LIMIT + 1)
    lists, left_out = _parse(path, data)
    signatures = [signature.data for entry in lists for signature in entry.signatures]
    if not signatures:
        raise ToolError(f"{path} offers nothing", "name a file with at least one entry", code="no-entries")
    accepted = {hashlib.sha256(data).hexdigest()}
    if len(signatures) == 1 and lists[0].type_guid == EFI_CERT_X509:
        accepted.add(hashlib.sha256(signatures[0]).hexdigest())
    if digest not in accepted:
        raise ToolError(
            f"{path} is not what you were told it is",
            "ask its owner for the SHA-256 again, by another way than the file came",
            code="digest-mismatch",
            evidence=f"SHA-256 of the file {hashlib.sha256(data).hexdigest()}, expected {digest}",
        )
    return Offer(path, lists, left_out)


def add_to_db(db: bytes, dbx: bytes, offer: Offer, *, boot_only: bool, at: datetime) -> Addition:
    """Add an offer to the data of db; `at` (aware) is when an anchor has to be valid.

    ToolError: "already-there", "revoked", "bad-certificate", "unknown-entry", or the code of the rule of
    `trust.certificate` that an anchor would break: "not-a-ca", "weak-key", "certificate-expired", ….
    """
    revocations = Revocations.from_dbx(parse_database(dbx))

    def effect(entry: SignatureList, data: bytes) -> str:
        if entry.type_guid == EFI_CERT_X509:
            return _anchor_effect(offer, data, revocations, boot_only=boot_only, at=at)
        return _other_effect(offer, entry, data, revocations, boot_only=boot_only)

    return _add(db, offer, effect)


def add_to_dbx(dbx: bytes, db: bytes, offer: Offer) -> Addition:
    """Add an offer to the data of dbx. What of db it revokes is in the effects.

    ToolError: "already-there", "bad-certificate", "unknown-entry".
    """
    trusted = [_certificate(offer, der) for der in parse_database(db).certificates]

    def effect(entry: SignatureList, data: bytes) -> str:
        if entry.type_guid == EFI_CERT_X509:
            _certificate(offer, data)
        elif entry.type_guid not in _KNOWN:
            raise _unknown(offer, entry)
        one = replace(entry, signatures=(Signature(OWNER, data),))
        revocations = Revocations.from_dbx(parse_database(serialize_signature_lists([one])))
        hit = [device_rules.subject_text(each) for each in trusted if revocations.reason(each) is not None]
        return f"revokes what is in db: {'; '.join(hit)}" if hit else "revokes nothing that is in db itself"

    return _add(dbx, offer, effect)


def _add(current: bytes, offer: Offer, effect: Any) -> Addition:
    known = {
        (entry.type_guid, signature.data)
        for entry in parse_signature_lists(current)
        for signature in entry.signatures
    }
    entries: list[dict[str, Any]] = []
    present: list[dict[str, Any]] = []
    lists = []
    for entry in offer.lists:
        new = []
        for signature in entry.signatures:
            facts = signature_facts(entry, signature)
            if (entry.type_guid, signature.data) in known:
                present.append(facts)
                continue
            known.add((entry.type_guid, signature.data))
            entries.append({**facts, "effect": effect(entry, signature.data)})
            new.append(signature)
        if new:
            lists.append(replace(entry, signatures=tuple(new)))
    if not lists:
        raise ToolError(
            f"everything that {offer.path} offers is there already",
            "nothing has to be done",
            code="already-there",
            evidence="; ".join(entry.get("subject") or entry["data"] for entry in present),
        )
    data = current + serialize_signature_lists(lists)
    parse_signature_lists(data)  # refuses what no variable can hold
    return Addition(data, tuple(entries), tuple(present))


def _anchor_effect(
    offer: Offer, der: bytes, revocations: Revocations, *, boot_only: bool, at: datetime
) -> str:
    certificate = _certificate(offer, der)
    if (reason := revocations.reason(certificate)) is not None:
        raise _revoked(offer, device_rules.subject_text(certificate), reason)
    fault = device_rules.form_fault(certificate) or device_rules.role_fault(certificate, device_rules.CA, at)
    if fault is None:
        return _ANCHOR
    cause = _in_own_words(fault)
    if boot_only:
        return f"boot only: the firmware starts what it signed; no anchor, since {cause}"
    raise ToolError(
        f"{offer.path} offers a certificate that is no anchor: {cause}",
        "ask its owner for the CA, or give --boot-only if the firmware shall start what this key signed and "
        "nothing more",
        code=fault.code,
        evidence=f"{device_rules.subject_text(certificate)} sha256:{device_rules.fingerprint(der)}",
    )


def _other_effect(
    offer: Offer, entry: SignatureList, data: bytes, revocations: Revocations, *, boot_only: bool
) -> str:
    if entry.type_guid != EFI_CERT_SHA256:
        raise _unknown(offer, entry)
    if revocations.lists_digest(data):
        raise _revoked(offer, data.hex(), "the digest is listed")
    if not boot_only:
        raise ToolError(
            f"{offer.path} offers a digest, which is no anchor",
            "ask its owner for a CA, or give --boot-only if the firmware shall start this one program",
            code="not-a-ca",
            evidence=data.hex(),
        )
    return "boot only: the firmware starts the one program that has this digest"


def _parse(path: Path, data: bytes) -> tuple[tuple[SignatureList, ...], int]:
    if b"-----BEGIN" in data or data[:1] == bytes([_DER_SEQUENCE]):
        chain = _chain(path, data)
        der = chain[0].public_bytes(Encoding.DER)
        entry = SignatureList(EFI_CERT_X509, b"", _OWNER_SIZE + len(der), (Signature(OWNER, der),))
        return (entry,), len(chain) - 1
    try:
        return parse_signature_lists(data), 0
    except Refusal as exc:
        raise ToolError(
            f"{path} holds neither signature lists nor a certificate",
            "name an .esl file, or a certificate in PEM or DER",
            code="bad-lists",
            evidence=exc.evidence,
        ) from exc


def _chain(path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        if b"-----BEGIN" in data:
            return x509.load_pem_x509_certificates(data)
        return [x509.load_der_x509_certificate(data)]
    except ValueError as exc:
        raise ToolError(
            f"the certificate {path} cannot be read",
            "name a PEM or DER certificate, or an .esl file",
            code="certificate-unreadable",
            evidence=str(exc),
        ) from exc


def _certificate(offer: Offer, der: bytes) -> x509.Certificate:
    try:
        return device_rules.load(der)
    except device_rules.MalformedCertificateError as exc:
        raise ToolError(
            "a certificate cannot be read by the device",
            "ask its owner for one of X.509 version 3 in DER",
            code="bad-certificate",
            evidence=f"{offer.path}, sha256:{device_rules.fingerprint(der)}: {exc}",
        ) from exc


def _in_own_words(fault: device_rules.Fault) -> str:
    """The device's causes speak of chains; here it is about one certificate."""
    return "it is not that of a CA" if fault.code == "not-a-ca" else fault.cause


def _revoked(offer: Offer, what: str, reason: str) -> ToolError:
    return ToolError(
        f"dbx revokes what {offer.path} offers",
        "do not add it; a revocation is only undone by making dbx anew",
        code="revoked",
        evidence=f"{what}: {reason}",
    )


def _unknown(offer: Offer, entry: SignatureList) -> ToolError:
    return ToolError(
        f"{offer.path} offers entries of a kind that is of no use here",
        "ask for certificates (EFI_CERT_X509) or SHA-256 digests",
        code="unknown-entry",
        evidence=entry.type_name,
    )


def describe(entries: Iterable[dict[str, Any]]) -> list[str]:
    """Return lines that show each entry and its effect to a person who is about to trust it."""
    lines = []
    for entry in entries:
        lines += [
            f"  {entry['type']:22} {entry.get('subject') or entry['data']}",
            f"    sha256 {entry.get('sha256', '-')}",
        ]
        if "effect" in entry:
            lines.append(f"    {entry['effect']}")
    return lines
