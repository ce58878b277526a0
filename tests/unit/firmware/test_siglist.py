# SPDX-License-Identifier: Apache-2.0
"""EFI_SIGNATURE_LIST against efitools and virt-firmware, arbitrary bytes, and the arithmetic of attackers."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.errors import FirmwareRefusal, Refusal
from trustme_init.firmware import siglist
from trustme_init.firmware.siglist import (
    EFI_CERT_SHA256,
    EFI_CERT_X509,
    EFI_CERT_X509_SHA256,
    EFI_CERT_X509_SHA384,
    EFI_CERT_X509_SHA512,
    Signature,
    SignatureList,
    guid_bytes,
    guid_text,
    parse_signature_lists,
    serialize_signature_lists,
)

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import ToolMade

OWNER = "77fa9abd-0359-4d32-bd60-28f4e78f784b"
UNKNOWN = "00112233-4455-6677-8899-aabbccddeeff"


def header(type_guid: str, list_size: int, header_size: int, signature_size: int) -> bytes:
    return guid_bytes(type_guid) + struct.pack("<III", list_size, header_size, signature_size)


def refused(data: bytes) -> None:
    with pytest.raises(FirmwareRefusal) as caught:
        parse_signature_lists(data)
    assert caught.value.code == "signature-list-malformed"
    assert caught.value.evidence
    assert caught.value.remedy


def test_certificate_list_of_efitools(tool_made: ToolMade) -> None:
    (found,) = parse_signature_lists(tool_made.efitools_cert)
    assert (found.type_guid, found.type_name, found.header) == (EFI_CERT_X509, "EFI_CERT_X509", b"")
    assert found.signatures == (Signature(OWNER, tool_made.der),)
    assert serialize_signature_lists([found]) == tool_made.efitools_cert


def test_database_of_virt_firmware(tool_made: ToolMade) -> None:
    certificates, digests = parse_signature_lists(tool_made.virt_firmware)
    assert certificates.signatures == (Signature(OWNER, tool_made.der),)
    assert digests.type_guid == EFI_CERT_SHA256
    assert [entry.data for entry in digests.signatures] == [tool_made.digest, tool_made.digest[::-1]]
    assert serialize_signature_lists([certificates, digests]) == tool_made.virt_firmware


@pytest.mark.parametrize(
    ("size", "type_guid"),
    [(256, EFI_CERT_X509_SHA256), (384, EFI_CERT_X509_SHA384), (512, EFI_CERT_X509_SHA512)],
)
def test_tbs_digests_of_efitools(tool_made: ToolMade, size: int, type_guid: str) -> None:
    (found,) = parse_signature_lists(tool_made.efitools_hashes[size])
    assert found.type_guid == type_guid
    assert found.signatures[0].data == hashlib.new(f"sha{size}", tool_made.tbs).digest() + bytes(16)


def test_image_digest_of_efitools(tool_made: ToolMade) -> None:
    (found,) = parse_signature_lists(tool_made.efitools_image)
    assert found.type_guid == EFI_CERT_SHA256
    assert len(found.signatures[0].data) == 32


def test_lists_follow_each_other(tool_made: ToolMade) -> None:
    found = parse_signature_lists(tool_made.efitools_cert + tool_made.virt_firmware)
    assert [entry.type_name for entry in found] == ["EFI_CERT_X509", "EFI_CERT_X509", "EFI_CERT_SHA256"]


def test_no_data_is_no_list() -> None:
    assert parse_signature_lists(b"") == ()


def test_unknown_type_is_kept_with_its_header() -> None:
    data = header(UNKNOWN, 28 + 5 + 17, 5, 17) + b"HEADR" + guid_bytes(OWNER) + b"x"
    (found,) = parse_signature_lists(data)
    assert (found.type_name, found.header) == (UNKNOWN, b"HEADR")
    assert found.signatures == (Signature(OWNER, b"x"),)
    assert serialize_signature_lists([found]) == data


def test_guid_is_mixed_endian() -> None:
    # UEFI 2.10 appendix A: the first three fields are little-endian, the rest is a byte string.
    raw = bytes.fromhex("a159c0a5e494a74a87b5ab155c2bf072")
    assert guid_text(raw) == EFI_CERT_X509
    assert guid_bytes(EFI_CERT_X509) == raw


def test_row2_every_truncation_is_refused(tool_made: ToolMade) -> None:
    data = tool_made.efitools_hashes[256]
    for length in range(1, len(data)):
        refused(data[:length])
    refused(data + b"\0")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in (16, 20, 24)
        for value in (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
        if (field, value) != (20, 0)  # the header size is 0
    ],
)
def test_row2_sizes_at_the_edge_of_integers(tool_made: ToolMade, field: int, value: int) -> None:
    data = bytearray(tool_made.virt_firmware)
    data[field : field + 4] = value.to_bytes(4, "little")
    refused(bytes(data))


@pytest.mark.parametrize(
    ("list_size", "header_size", "signature_size"),
    [
        (28 + 48, 2**32 - 28, 48),  # header + 28 wraps to 0 in 32 bits
        (28 + 48, 49, 48),  # header ends behind the list
        (28 + 48, 48, 48),  # the header takes the place of the entry
        (28 + 48, 0, 0),
        (28 + 48, 0, 16),  # owners without data
        (28 + 48, 0, 24),  # divides the list, but is not this type's size
        (28 + 48, 0, 47),
        (27, 0, 48),  # shorter than its own header
        (28 + 49, 0, 48),  # reaches behind the data
        (28 + 48, 16, 32),  # a type without header states one
    ],
)
def test_row2_inconsistent_sizes(list_size: int, header_size: int, signature_size: int) -> None:
    refused(header(EFI_CERT_SHA256, list_size, header_size, signature_size) + bytes(48))


def test_row2_header_larger_than_a_list_of_unknown_type() -> None:
    # 17 bytes of entry minus a header of 34: a negative body that the signature size divides.
    refused(header(UNKNOWN, 28 + 17, 34, 17) + bytes(17 + 34))


def test_row2_x509_list_has_no_header() -> None:
    refused(header(EFI_CERT_X509, 28 + 8 + 40, 8, 40) + bytes(48))


def test_row2_more_than_a_variable_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siglist, "LISTS_LIMIT", 75)
    refused(header(EFI_CERT_SHA256, 28 + 48, 0, 48) + bytes(48))


def test_serialize_refuses_unequal_entries() -> None:
    with pytest.raises(ValueError, match="signature size"):
        serialize_signature_lists([SignatureList(UNKNOWN, b"", 20, (Signature(OWNER, b"12345"),))])


GUIDS = st.binary(min_size=16, max_size=16).map(guid_text)
KNOWN_SIZES = {EFI_CERT_SHA256: 32, EFI_CERT_X509_SHA256: 48}


@st.composite
def signature_lists(draw: Any) -> SignatureList:
    type_guid = draw(st.sampled_from([EFI_CERT_SHA256, EFI_CERT_X509, EFI_CERT_X509_SHA256]) | GUIDS)
    known = type_guid in KNOWN_SIZES
    size = KNOWN_SIZES[type_guid] if known else draw(st.integers(1, 40))
    data = st.binary(min_size=size, max_size=size)
    has_header = not known and type_guid != EFI_CERT_X509
    return SignatureList(
        type_guid,
        draw(st.binary(max_size=8)) if has_header else b"",
        16 + size,
        tuple(draw(st.lists(st.builds(Signature, GUIDS, data), max_size=3))),
    )


def parsed_and_serialized(data: bytes) -> bytes | None:
    """None if refused; any exception but a Refusal fails the test."""
    try:
        return serialize_signature_lists(parse_signature_lists(data))
    except Refusal:
        return None


@given(st.lists(signature_lists(), max_size=4))
def test_what_is_serialized_is_parsed(lists: list[SignatureList]) -> None:
    assert parse_signature_lists(serialize_signature_lists(lists)) == tuple(lists)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_parsed_or_refused(data: bytes) -> None:
    assert parsed_and_serialized(data) in {data, None}


@given(st.lists(signature_lists(), min_size=1, max_size=2), st.data())
def test_damaged_lists_are_parsed_or_refused(lists: list[SignatureList], data: st.DataObject) -> None:
    raw = bytearray(serialize_signature_lists(lists))
    position = data.draw(st.integers(16, 27) | st.integers(0, len(raw) - 1))
    raw[position] = data.draw(st.integers(0, 255))
    assert parsed_and_serialized(bytes(raw)) in {bytes(raw), None}
