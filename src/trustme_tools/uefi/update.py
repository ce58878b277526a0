# SPDX-License-Identifier: Apache-2.0
"""Signed updates (EFI_VARIABLE_AUTHENTICATION_2, UEFI 2.10 section 8.2.2), taken apart and verified.

    update = EFI_TIME[16] | WIN_CERTIFICATE_UEFI_GUID (length u32, revision u16 0x0200, type u16 0x0EF1,
             EFI_CERT_TYPE_PKCS7_GUID, SignedData in DER) | payload
    signed = name in UTF-16 without its end | vendor GUID | attributes u32 | EFI_TIME | payload

The signature is verified by the openssl program, which none of the tools that make updates is.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.firmware.secureboot import DATABASE_ATTRIBUTES
from trustme_init.firmware.siglist import guid_bytes
from trustme_tools.errors import ToolError
from trustme_tools.tooling import run
from trustme_tools.uefi.store import KEY_VARIABLES

SIGNED_BY: Final[Mapping[str, str]] = {"PK": "PK", "KEK": "PK", "db": "KEK", "dbx": "KEK"}
"""In whose list the signer of an update is."""

_TIME: Final = struct.Struct("<HBBBBBxIhBx")
_HEAD: Final = struct.Struct("<16sIHH16s")
_REVISION: Final = 0x0200
_TYPE: Final = 0x0EF1
_PKCS7: Final = guid_bytes("4aafd29d-68df-49ee-8aa9-347d375665a7")
_CERTIFICATE_HEAD: Final = _HEAD.size - _TIME.size
_SIGNED_DATA: Final = bytes.fromhex("06092a864886f70d010702")
"""OBJECT IDENTIFIER signedData: UEFI leaves the ContentInfo around SignedData out, openssl wants it."""


@dataclass(frozen=True, slots=True)
class Update:
    """A signed update, not verified: `timestamp` is aware, `signed_data` DER, `payload` signature lists."""

    time: bytes
    timestamp: datetime
    signed_data: bytes
    payload: bytes


def parse_update(data: bytes) -> Update:
    """Take an update apart; ToolError("not-an-update")."""
    if len(data) < _HEAD.size:
        raise _no_update(f"{len(data)} bytes")
    time, length, revision, kind, guid = _HEAD.unpack_from(data)
    if (revision, kind, guid) != (_REVISION, _TYPE, _PKCS7):
        raise _no_update(f"revision {revision:#06x}, type {kind:#06x}")
    if not _CERTIFICATE_HEAD <= length <= len(data) - _TIME.size:
        raise _no_update(f"certificate of {length} bytes in {len(data)}")
    year, month, day, hour, minute, second, *_ = _TIME.unpack(time)
    try:
        timestamp = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError as exc:
        raise _no_update(f"time: {exc}") from exc
    end = _TIME.size + length
    return Update(time, timestamp, data[_HEAD.size : end], data[end:])


def verify_update(variable: str, data: bytes, signers: Iterable[bytes]) -> None:
    """Verify that one of the certificates `signers` (DER) signed an update of `variable`.

    Firmware believes a key and looks neither at purpose nor at validity, so neither do we. ToolError:
    "not-an-update", "update-not-valid".
    """
    update = parse_update(data)
    signed = variable.encode("utf-16-le") + guid_bytes(KEY_VARIABLES[variable])
    signed += DATABASE_ATTRIBUTES.to_bytes(4, "little") + update.time + update.payload
    evidence = "no certificate to verify it with"
    for signer in signers:
        try:
            _verify(_content_info(update.signed_data), signed, signer)
        except ToolError as exc:
            if exc.code != "tool-failed":
                raise
            evidence = exc.evidence
        except ValueError as exc:
            evidence = str(exc)
        else:
            return
    raise ToolError(
        f"{variable}.auth is not signed by a key of {SIGNED_BY[variable]}",
        "make the updates anew with `trustme uefi auth`, all of one PKI",
        code="update-not-valid",
        evidence=evidence,
    )


def _verify(content_info: bytes, signed: bytes, signer: bytes) -> None:
    pem = x509.load_der_x509_certificate(signer).public_bytes(Encoding.PEM)
    with tempfile.TemporaryDirectory(prefix="trustme-update-") as temporary:
        content, certificate = Path(temporary, "content"), Path(temporary, "signer.pem")
        content.write_bytes(signed)
        certificate.write_bytes(pem)
        run(
            "openssl",
            [
                *("cms", "-verify", "-binary", "-inform", "DER", "-content", content, "-out", "/dev/null"),
                *("-nointern", "-certfile", certificate, "-CAfile", certificate, "-partial_chain"),
                *("-purpose", "any", "-no_check_time"),
            ],
            purpose="verify a signed update",
            stdin=content_info,
        )


def _content_info(signed_data: bytes) -> bytes:
    return _tlv(0x30, _SIGNED_DATA + _tlv(0xA0, signed_data))


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 0x80:
        return bytes([tag, size]) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + value


def _no_update(evidence: str) -> ToolError:
    return ToolError(
        "this is no authenticated update",
        "name a file made by `trustme uefi auth`",
        code="not-an-update",
        evidence=evidence,
    )
