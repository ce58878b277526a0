# SPDX-License-Identifier: Apache-2.0
"""Make, sign and judge lifecycle statements (`trustme_init.trust.statement` says what they are).

Whatever is written here has been read by the device's own code before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.firmware.secureboot import parse_database
from trustme_init.trust import certificate as certificates
from trustme_init.trust.anchors import AnchorSet, Purpose, Revocations, anchor_set
from trustme_init.trust.statement import (
    KIND,
    STATEMENT_LIMIT,
    VERSION,
    DeviceCertificateChange,
    RenewDeviceKey,
    ReplaceAuthority,
    ReplaceToken,
    RetireAuthority,
    SignedStatement,
    Statement,
    VerifiedStatement,
    parse_statement,
    verify_statement,
)
from trustme_tools.errors import ToolError, UsageError
from trustme_tools.guestos.signing import Signer, signed
from trustme_tools.pki.directory import load_chain
from trustme_tools.publish import write_atomic

_FILE_LIMIT: Final = 64 * 1024
_BESIDE: Final = (".sig", ".cert")
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def default_serial() -> int:
    """Return the time (UTC) as YYYYMMDDHHMMSS: higher than that of any statement made like this before."""
    return int(f"{datetime.now(UTC):%Y%m%d%H%M%S}")


def create(action: str, *, device_uuid: UUID | None, serial: int, fields: Mapping[str, Any]) -> bytes:
    """Return the text of a statement; TrustRefusal of the device's code if it would not read it."""
    document = {
        "kind": KIND,
        "version": VERSION,
        "device_uuid": str(device_uuid) if device_uuid is not None else None,
        "serial": serial,
        "action": action,
        **fields,
    }
    text = json.dumps(document, indent=1).encode() + b"\n"
    parse_statement(text)
    return text


def anchor_sha256(text: str) -> str:
    """Return what an anchor goes by: `text` is its SHA-256, or a file with its certificate first."""
    if _SHA256.fullmatch(text.lower()):
        return text.lower()
    return hashlib.sha256(load_chain(Path(text))[0].public_bytes(Encoding.DER)).hexdigest()


def authority_pem(path: Path) -> str:
    """Return the first certificate of a file as the one PEM block that a device takes."""
    return load_chain(path)[0].public_bytes(Encoding.PEM).decode()


def chain_pem(path: Path) -> str:
    """Return every certificate of a file as plain PEM."""
    return b"".join(each.public_bytes(Encoding.PEM) for each in load_chain(path)).decode()


def sign(path: Path, signer: Signer) -> Statement:
    """Sign a statement; write STEM.sig and STEM.cert beside it, and return what was signed.

    TrustRefusal of the device's code for a text that it would not read; ToolError("not-a-lifecycle-signer")
    for a certificate that it would not take; UsageError("bad-name").
    """
    if path.suffix in _BESIDE:
        raise UsageError(
            f"{path} has the name that its signature or its certificate would get",
            "call it *.json",
            code="bad-name",
        )
    text = read(path)
    statement = parse_statement(text)
    if (fault := certificates.LIFECYCLE.fault(signer.chain[0])) is not None:
        raise ToolError(
            f"the signer's certificate is not one for lifecycle statements: {fault.cause}",
            f"its extendedKeyUsage is {certificates.LIFECYCLE_PURPOSE.dotted_string} alone, its keyUsage "
            "digitalSignature (`trustme pki create` makes one: lifecycle)",
            code="not-a-lifecycle-signer",
            evidence=certificates.subject_text(signer.chain[0]),
        )
    signature, chain = signed(signer, text)
    write_atomic(path.with_suffix(".sig"), signature)
    write_atomic(path.with_suffix(".cert"), chain)
    return statement


def verify(
    path: Path,
    anchors: Sequence[tuple[Purpose, Path]],
    *,
    at: datetime,
    device_uuid: UUID | None,
    last_serial: int,
) -> VerifiedStatement:
    """Judge a signed statement as a device would; `device_uuid` None is the device that it names.

    Refusals of the device's code pass through.
    """
    text = read(path)
    parts = SignedStatement(text, read(path.with_suffix(".sig")), read(path.with_suffix(".cert")))
    # Only to have a device to judge for: verify_statement parses again, after the signature.
    stated = device_uuid or parse_statement(text).device_uuid or UUID(int=0)
    return verify_statement(parts, _sets(anchors), at=at, device_uuid=stated, last_serial=last_serial)


def describe(statement: Statement) -> dict[str, Any]:
    """Return what a statement says, for people and programs; nothing of it is verified."""
    facts: dict[str, Any] = {
        "action": statement.name,
        "device_uuid": str(statement.device_uuid) if statement.device_uuid is not None else None,
        "serial": statement.serial,
        "sha256": statement.sha256,
    }
    match statement.action:
        case ReplaceAuthority(purpose=purpose, old_sha256=old, certificate=pem, overlap=overlap):
            facts |= {"purpose": purpose.value, "old_sha256": old, "overlap": overlap, "new": _subject(pem)}
        case RetireAuthority(purpose=purpose, sha256=sha256):
            facts |= {"purpose": purpose.value, "old_sha256": sha256}
        case DeviceCertificateChange(certificate=pem):
            facts |= {"new": _subject(pem)}
        case ReplaceToken(token_sha256=sha256):
            facts |= {"token_sha256": sha256}
        case RenewDeviceKey():
            pass
    return facts


def as_text(facts: Mapping[str, Any]) -> str:
    """Return the facts of `describe` for people."""
    lines = [
        f"{facts['action']}, serial {facts['serial']}",
        f"  device     {facts['device_uuid'] or 'any'}",
    ]
    names = {
        "purpose": "purpose",
        "old_sha256": "old anchor",
        "new": "new",
        "overlap": "overlap",
        "token_sha256": "token",
    }
    lines += [f"  {word:10} {facts[name]}" for name, word in names.items() if name in facts]
    return "\n".join([*lines, f"  sha256     {facts['sha256']}"])


def read(path: Path, limit: int = max(_FILE_LIMIT, STATEMENT_LIMIT)) -> bytes:
    """Return a file's beginning, one byte more than can be right; ToolError("file-unreadable")."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as exc:
        raise ToolError(
            f"{path} cannot be read: {exc.strerror}",
            "name a statement of `trustme lifecycle create`; .sig and .cert of it lie beside it",
            code="file-unreadable",
        ) from exc


def _sets(anchors: Sequence[tuple[Purpose, Path]]) -> list[AnchorSet]:
    revocations = Revocations.from_dbx(parse_database(b""))
    sets = []
    for purpose in dict.fromkeys(purpose for purpose, _ in anchors):
        ders = [load_chain(path)[0].public_bytes(Encoding.DER) for each, path in anchors if each is purpose]
        sets.append(anchor_set(purpose, ders, revocations, source=f"the {purpose.value} anchors given"))
    return sets


def _subject(pem: bytes) -> str:
    """Return the subject of the first certificate and its SHA-256, or that there is none."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        return "no certificate"
    sha256 = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
    return f"{certificates.subject_text(certificate)} sha256:{sha256}"
