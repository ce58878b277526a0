# SPDX-License-Identifier: Apache-2.0
"""Lifecycle statements: what a device in operation is told to change about whom it believes and who it is.

A statement is three byte strings, like a signed GuestOS: a JSON text, a raw signature over it (`signature`),
and the signer's PEM chain, leaf first (`chain`). Rules, in the order in which they are applied:

- The chain holds by an anchor of the lifecycle, of GuestOSes or of devices, and its leaf is for statements
  and for nothing else (`certificate.LIFECYCLE`). The signature is the leaf's. Only then is the text read.
- The text is exactly what is described here: a key that is not known, missing, there twice, or of another
  type refuses the whole.
- The signer is entitled: an anchor of the lifecycle to everything; an anchor of GuestOSes or devices to have
  itself replaced or retired; an anchor of devices also to renew what identifies a device.
- It is for this device, or for any. What is one device's own (its certificate, its token) is never for any.
- Its serial number is higher than that of every statement before it on this device.

    {"kind": "trustme.lifecycle-statement", "version": 1, "device_uuid": UUID or null,
     "serial": 1 to 2^63 - 1, "action": ..., and of the action:
       replace-authority   "purpose": "guest" or "device", "old_sha256", "certificate": PEM, "overlap": bool
       retire-authority    "purpose": "guest" or "device", "sha256"
       renew-device-key    nothing
       device-certificate  "certificate": PEM chain, leaf first
       replace-token       "token_sha256": of the PKCS#12 file
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple, NoReturn
from uuid import UUID

from trustme_init.errors import TrustRefusal
from trustme_init.trust import certificate as certificates
from trustme_init.trust.anchors import Anchor, AnchorSet, Purpose
from trustme_init.trust.chain import Use, VerifiedPath, verify_path
from trustme_init.trust.signature import verify_signature

STATEMENT_LIMIT: Final = 64 * 1024
"""Bytes of the text; a chain of four RSA-4096 certificates in it has about 8 KiB."""
SERIAL_LIMIT: Final = 2**63
KIND: Final = "trustme.lifecycle-statement"
VERSION: Final = 1
ENTITLING: Final = (Purpose.LIFECYCLE, Purpose.GUEST, Purpose.DEVICE)
"""Purposes of anchors that vouch for a signer, in the order in which they are tried."""
STATEMENT_USE: Final = Use(
    certificates.LIFECYCLE, certificates.LIFECYCLE_CA, frozenset(ENTITLING), "lifecycle statement"
)

_COMMON: Final = ("kind", "version", "device_uuid", "serial", "action")
_ROTATED: Final[Mapping[str, Purpose]] = {"guest": Purpose.GUEST, "device": Purpose.DEVICE}
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_SHOWN: Final = 60
_REMEDY: Final = "make and sign the statement again (`trustme lifecycle create`, `trustme lifecycle sign`)"


@dataclass(frozen=True, slots=True)
class ReplaceAuthority:
    """Take `certificate` (PEM, one CA) for an anchor in the place of another; with `overlap` beside it."""

    purpose: Purpose
    old_sha256: str
    certificate: bytes
    overlap: bool


@dataclass(frozen=True, slots=True)
class RetireAuthority:
    """Believe an anchor no longer."""

    purpose: Purpose
    sha256: str


@dataclass(frozen=True, slots=True)
class RenewDeviceKey:
    """Make a second device key and a request for its certificate; the first one stays until that is there."""


@dataclass(frozen=True, slots=True)
class DeviceCertificateChange:
    """Take this chain (PEM, leaf first) for the device's certificate, and the key that it is for."""

    certificate: bytes


@dataclass(frozen=True, slots=True)
class ReplaceToken:
    """Put the PKCS#12 file with this SHA-256 in the place of the device's token."""

    token_sha256: str


Action = ReplaceAuthority | RetireAuthority | RenewDeviceKey | DeviceCertificateChange | ReplaceToken


class SignedStatement(NamedTuple):
    """A statement as it comes: nothing of it is believed yet."""

    text: bytes
    signature: bytes
    chain: bytes
    """PEM, leaf first."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What a text says."""

    name: str
    """Of the action."""
    device_uuid: UUID | None
    """None: for any device."""
    serial: int
    action: Action
    sha256: str
    """Of the text, hex: what a statement goes by."""


@dataclass(frozen=True, slots=True)
class VerifiedStatement:
    """A statement that may be applied, and who says so."""

    statement: Statement
    signer: str
    """Subject of the leaf."""
    anchor: Anchor


def verify_statement(
    signed: SignedStatement,
    anchors: Sequence[AnchorSet],
    *,
    at: datetime,
    device_uuid: UUID,
    last_serial: int,
) -> VerifiedStatement:
    """Return the statement, if this device is to obey it at the moment `at` (aware).

    `anchors` are sets of the purposes in ENTITLING, of each one at most; `last_serial` is that of the
    statement obeyed last, 0 if there was none.

    TrustRefusal: "statement-too-large", "statement-purpose", those of `chain.verify_chain` that are not about
    signing software, "signature-size", "bad-signature", those of `parse_statement`, "statement-not-entitled",
    "statement-other-device", "statement-replayed".
    """
    if len(signed.text) > STATEMENT_LIMIT:
        raise _too_large(len(signed.text))
    path = _path(signed.chain, anchors, at)
    leaf = path.certificates[0]
    try:
        verify_signature(leaf, signed.signature, signed.text)
    except TrustRefusal as refusal:
        refusal.remedy = _REMEDY  # the module's own is for who signs software
        if refusal.code == "bad-signature":
            refusal.cause = "the statement is not what the signer signed"
        raise
    statement = parse_statement(signed.text)
    _require_entitled(statement, path.anchor)
    if statement.device_uuid not in {None, device_uuid}:
        raise TrustRefusal(
            "statement-other-device",
            "the statement is for another device",
            evidence=f"it names {statement.device_uuid}; this device is {device_uuid}",
            remedy="give it to the device that it names",
        )
    if statement.serial <= last_serial:
        raise TrustRefusal(
            "statement-replayed",
            "a statement with this serial number or a higher one was obeyed before",
            evidence=f"serial {statement.serial}; the last one was {last_serial}",
            remedy="sign a new statement with a higher serial number (`control lifecycle_status`)",
        )
    return VerifiedStatement(statement, certificates.subject_text(leaf), path.anchor)


def parse_statement(text: bytes) -> Statement:
    """Return what a statement's text says, whoever signed it.

    TrustRefusal: "statement-too-large", "statement-malformed", "statement-version",
    "statement-action-unknown", "statement-for-any-device".
    """
    if len(text) > STATEMENT_LIMIT:
        raise _too_large(len(text))
    try:
        document = json.loads(
            text.decode("ascii"),
            object_pairs_hook=_unrepeated,
            parse_constant=_no_constant,
            parse_float=_no_float,
        )
    except (ValueError, RecursionError) as exc:
        raise _malformed(f"not JSON as it is wanted ({type(exc).__name__}): {str(exc)[:_SHOWN]!a}") from exc
    if not isinstance(document, dict):
        raise _malformed("not a JSON object")
    if document.get("kind") != KIND:
        raise _malformed(f"its kind is not {KIND}")
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise TrustRefusal(
            "statement-version",
            "the statement is of a version that this device does not know",
            evidence=f"{version!a}"[:_SHOWN],
            remedy=f"make it in version {VERSION}",
        )
    fields = _Fields(document)
    name = fields.text("action")
    form = _ACTIONS.get(name)
    if form is None:
        raise TrustRefusal(
            "statement-action-unknown",
            "the statement asks for something that this device does not know",
            evidence=f"{name[:_SHOWN]!a}",
            remedy=f"the actions are {', '.join(_ACTIONS)}",
        )
    fields.require({*_COMMON, *form.keys})
    device_uuid = fields.device_uuid()
    if device_uuid is None and form.of_one_device:
        raise TrustRefusal(
            "statement-for-any-device",
            "the statement is for any device and changes what is one device's own",
            evidence=name,
            remedy="name the device in it (`device_uuid`)",
        )
    return Statement(
        name=name,
        device_uuid=device_uuid,
        serial=fields.serial(),
        action=form.read(fields),
        sha256=hashlib.sha256(text).hexdigest(),
    )


def _path(chain: bytes, anchors: Sequence[AnchorSet], at: datetime) -> VerifiedPath:
    """Return the path to the first anchor that vouches for the chain; else the refusal that says most."""
    refusals = []
    for purpose in ENTITLING:
        for found in anchors:
            if found.purpose is not purpose:
                continue
            try:
                return verify_path(chain, found, STATEMENT_USE, at=at)
            except TrustRefusal as refusal:
                refusals.append(refusal)
    telling = [refusal for refusal in refusals if refusal.code != "untrusted-signer"]
    for said in (*telling, *refusals):
        said.remedy = _REMEDY
        raise said
    raise TrustRefusal(
        "no-anchor",
        "this device has no anchor that could vouch for a statement",
        evidence="neither of the lifecycle, nor of GuestOSes, nor of devices",
        remedy="such a device can only be provisioned anew",
    )


def _require_entitled(statement: Statement, anchor: Anchor) -> None:
    if anchor.purpose is Purpose.LIFECYCLE:
        return
    match statement.action:
        case (
            ReplaceAuthority(purpose=purpose, old_sha256=sha256)
            | RetireAuthority(purpose=purpose, sha256=sha256)
        ):
            entitled = anchor.purpose is purpose and anchor.sha256_fingerprint == sha256
            wanted = f"the {purpose.value} anchor {sha256[:16]}"
        case _:
            entitled = anchor.purpose is Purpose.DEVICE
            wanted = "an anchor for the purpose device"
    if not entitled:
        raise TrustRefusal(
            "statement-not-entitled",
            "the signer may not ask for this",
            evidence=f"{statement.name} takes {wanted}, or one of the lifecycle; signed under the "
            f"{anchor.purpose.value} anchor {anchor.sha256_fingerprint[:16]}",
            remedy="sign under the anchor that is to be replaced, or under a lifecycle anchor",
        )


class _Fields:
    """The keys of a statement, each taken by its type."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def require(self, keys: set[str]) -> None:
        """Refuse anything beside `keys`, and anything of them that is not there."""
        wrong = sorted(self._document.keys() ^ keys)
        if wrong:
            raise _malformed(f"keys unknown or missing: {', '.join(wrong)[:_SHOWN]!a}")

    def text(self, key: str) -> str:
        value = self._document.get(key)
        if not isinstance(value, str):
            raise _malformed(f"{key} is not a text")
        return value

    def octets(self, key: str) -> bytes:
        return self.text(key).encode("utf-8", "surrogatepass")  # what is no PEM, the certificate's judge says

    def sha256(self, key: str) -> str:
        value = self.text(key)
        if not _SHA256.fullmatch(value):
            raise _malformed(f"{key} is not a SHA-256 in lower-case hex")
        return value

    def purpose(self) -> Purpose:
        purpose = _ROTATED.get(self.text("purpose"))
        if purpose is None:
            raise _malformed(f"purpose is neither of {', '.join(_ROTATED)}")
        return purpose

    def boolean(self, key: str) -> bool:
        value = self._document.get(key)
        if not isinstance(value, bool):
            raise _malformed(f"{key} is neither true nor false")
        return value

    def serial(self) -> int:
        value = self._document.get("serial")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < SERIAL_LIMIT:
            raise _malformed("serial is not an integer from 1 to 2^63 - 1")
        return value

    def device_uuid(self) -> UUID | None:
        if self._document.get("device_uuid") is None:
            return None
        value = self.text("device_uuid")
        if not _UUID.fullmatch(value):
            raise _malformed("device_uuid is neither null nor a UUID in lower case")
        return UUID(value)


class _Form(NamedTuple):
    """What an action looks like: the keys of its own, how they are read, whether it is one device's own."""

    keys: tuple[str, ...]
    read: Callable[[_Fields], Action]
    of_one_device: bool = False


_ACTIONS: Final[Mapping[str, _Form]] = {
    "replace-authority": _Form(
        ("purpose", "old_sha256", "certificate", "overlap"),
        lambda fields: ReplaceAuthority(
            fields.purpose(),
            fields.sha256("old_sha256"),
            fields.octets("certificate"),
            fields.boolean("overlap"),
        ),
    ),
    "retire-authority": _Form(
        ("purpose", "sha256"), lambda fields: RetireAuthority(fields.purpose(), fields.sha256("sha256"))
    ),
    "renew-device-key": _Form((), lambda _fields: RenewDeviceKey()),
    "device-certificate": _Form(
        ("certificate",),
        lambda fields: DeviceCertificateChange(fields.octets("certificate")),
        of_one_device=True,
    ),
    "replace-token": _Form(
        ("token_sha256",), lambda fields: ReplaceToken(fields.sha256("token_sha256")), of_one_device=True
    ),
}
ACTIONS: Final = tuple(_ACTIONS)
"""The names of what a statement can ask for."""


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key is there twice")
    return document


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text} is not an integer")


def _too_large(size: int) -> TrustRefusal:
    return TrustRefusal(
        "statement-too-large",
        f"the statement is larger than {STATEMENT_LIMIT} bytes",
        evidence=f"{size} bytes",
        remedy=_REMEDY,
    )


def _malformed(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "statement-malformed",
        "the statement does not say what it should in the form that it should",
        evidence=evidence,
        remedy=_REMEDY,
    )
