# SPDX-License-Identifier: Apache-2.0
"""EFI_SIGNATURE_LIST: the format of `db`, `dbx`, `KEK` and `PK` (UEFI 2.10 section 32.4.1). Pure.

    list   = type GUID[16] | list size u32 | header size u32 | signature size u32 | header | signature*
    signature = owner GUID[16] | data[signature size - 16]           all integers little-endian

Rules:
- The lists fill the variable exactly; signatures fill each list exactly. Nothing is skipped or clipped.
- A type that is understood has no header, and a fixed size unless it is X.509.
- A type that is not understood is held to the same arithmetic, kept, and reported by name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from trustme_init.errors import FirmwareRefusal

LISTS_LIMIT: Final = 1024 * 1024
"""Bytes of all lists of one variable (the limit of the variable itself)."""

EFI_CERT_X509: Final = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072"
EFI_CERT_SHA256: Final = "c1c41626-504c-4092-aca9-41f936934328"
EFI_CERT_X509_SHA256: Final = "3bd2a492-96c0-4079-b420-fcf98ef103ed"
EFI_CERT_X509_SHA384: Final = "7076876e-80c2-4ee6-aad2-28b349a6865b"
EFI_CERT_X509_SHA512: Final = "446dbf63-2502-4cda-bcfa-2465d2b0fe9d"

DIGEST_SIZES: Final = {EFI_CERT_X509_SHA256: 32, EFI_CERT_X509_SHA384: 48, EFI_CERT_X509_SHA512: 64}
"""Bytes of the TBS-certificate digest; an EFI_TIME (16 bytes) follows it."""
EFI_TIME_SIZE: Final = 16

TYPE_NAMES: Final = {
    EFI_CERT_X509: "EFI_CERT_X509",
    EFI_CERT_SHA256: "EFI_CERT_SHA256",
    EFI_CERT_X509_SHA256: "EFI_CERT_X509_SHA256",
    EFI_CERT_X509_SHA384: "EFI_CERT_X509_SHA384",
    EFI_CERT_X509_SHA512: "EFI_CERT_X509_SHA512",
    "3c5766e8-269c-4e34-aa14-ed776e85b3b6": "EFI_CERT_RSA2048",
    "e2b36190-879b-4a3d-ad8d-f2e7bba32784": "EFI_CERT_RSA2048_SHA256",
    "826ca512-cf10-4ac9-b187-be01496631bd": "EFI_CERT_SHA1",
    "67f8444f-8743-48f1-a328-1eaab8736080": "EFI_CERT_RSA2048_SHA1",
    "0b6e5233-a65c-44c9-9407-d9ab83bfc8bd": "EFI_CERT_SHA224",
    "ff3e5307-9fd0-48c9-85f1-8ad56c701e01": "EFI_CERT_SHA384",
    "093e0fae-a6c4-4f50-9f1b-d41e2b89c19a": "EFI_CERT_SHA512",
    "4aafd29d-68df-49ee-8aa9-347d375665a7": "EFI_CERT_TYPE_PKCS7",
    "452e8ced-dfff-4b8c-ae01-5118862e682c": "EFI_CERT_EXTERNAL_MANAGEMENT",
}

_HEADER: Final = struct.Struct("<16sIII")
_OWNER_SIZE: Final = 16
_FIXED_SIZES: Final = {EFI_CERT_SHA256: 32} | {
    guid: size + EFI_TIME_SIZE for guid, size in DIGEST_SIZES.items()
}
_REMEDY: Final = "restore the variable from signed lists (`trustme uefi vars`, or the firmware's key set-up)"


@dataclass(frozen=True, slots=True)
class Signature:
    """One entry: who put it there (GUID text), and its data."""

    owner: str
    data: bytes


@dataclass(frozen=True, slots=True)
class SignatureList:
    """Entries of one type and one size. `signature_size` counts the owner's 16 bytes."""

    type_guid: str
    header: bytes
    signature_size: int
    signatures: tuple[Signature, ...]

    @property
    def type_name(self) -> str:
        """The specification's name of the type, or its GUID."""
        return TYPE_NAMES.get(self.type_guid, self.type_guid)


def guid_text(raw: bytes) -> str:
    """Return the canonical text of an EFI_GUID (first three fields little-endian)."""
    first, second, third, rest = struct.unpack("<IHH8s", raw)
    return f"{first:08x}-{second:04x}-{third:04x}-{rest[:2].hex()}-{rest[2:].hex()}"


def guid_bytes(text: str) -> bytes:
    """Return the 16 bytes of an EFI_GUID given as canonical text."""
    first, second, third, fourth, fifth = text.split("-")
    return struct.pack(
        "<IHH8s", int(first, 16), int(second, 16), int(third, 16), bytes.fromhex(fourth + fifth)
    )


def parse_signature_lists(data: bytes) -> tuple[SignatureList, ...]:
    """Parse the data of a signature database; empty data is no list.

    FirmwareRefusal("signature-list-malformed") names the offset and the rule that is broken.
    """
    if len(data) > LISTS_LIMIT:
        raise _malformed(0, f"{len(data)} bytes, at most {LISTS_LIMIT}")
    lists = []
    offset = 0
    while offset < len(data):
        lists.append(_parse_list(data, offset))
        offset += int.from_bytes(data[offset + 16 : offset + 20], "little")
    return tuple(lists)


def serialize_signature_lists(lists: Iterable[SignatureList]) -> bytes:
    """Return the bytes of `lists`; the inverse of `parse_signature_lists`. ValueError on unequal sizes."""
    parts = []
    for entry in lists:
        size = _HEADER.size + len(entry.header) + entry.signature_size * len(entry.signatures)
        parts.append(_HEADER.pack(guid_bytes(entry.type_guid), size, len(entry.header), entry.signature_size))
        parts.append(entry.header)
        for signature in entry.signatures:
            if len(signature.data) + _OWNER_SIZE != entry.signature_size:
                raise ValueError("a signature's size is not the list's signature size")
            parts.append(guid_bytes(signature.owner) + signature.data)
    return b"".join(parts)


def _parse_list(data: bytes, start: int) -> SignatureList:
    """Parse one list; on return, its size field is known to be positive and inside `data`."""
    left = len(data) - start
    if left < _HEADER.size:
        raise _malformed(start, f"{left} bytes left, a list header has {_HEADER.size}")
    raw_type, list_size, header_size, signature_size = _HEADER.unpack_from(data, start)
    type_guid = guid_text(raw_type)
    if not _HEADER.size <= list_size <= left:
        raise _malformed(start, f"list size {list_size}, {left} bytes left")
    if header_size > list_size - _HEADER.size:
        raise _malformed(start, f"header size {header_size} in a list of {list_size}")
    if signature_size <= _OWNER_SIZE:
        raise _malformed(start, f"signature size {signature_size}, an owner alone has {_OWNER_SIZE}")
    body = list_size - _HEADER.size - header_size
    if body % signature_size:
        raise _malformed(start, f"signature size {signature_size} does not divide {body} bytes")
    if type_guid in _FIXED_SIZES and signature_size != _OWNER_SIZE + _FIXED_SIZES[type_guid]:
        raise _malformed(start, f"signature size {signature_size} is not that of {TYPE_NAMES[type_guid]}")
    if header_size and (type_guid in _FIXED_SIZES or type_guid == EFI_CERT_X509):
        raise _malformed(start, f"{TYPE_NAMES[type_guid]} has no header, {header_size} bytes stated")
    header_start = start + _HEADER.size
    first = header_start + header_size
    return SignatureList(
        type_guid=type_guid,
        header=data[header_start:first],
        signature_size=signature_size,
        signatures=tuple(
            Signature(
                guid_text(data[position : position + _OWNER_SIZE]),
                data[position + _OWNER_SIZE : position + signature_size],
            )
            for position in range(first, start + list_size, signature_size)
        ),
    )


def _malformed(offset: int, evidence: str) -> FirmwareRefusal:
    return FirmwareRefusal(
        "signature-list-malformed",
        "a UEFI signature database is not well-formed",
        evidence=f"list at byte {offset}: {evidence}",
        remedy=_REMEDY,
    )
