# SPDX-License-Identifier: Apache-2.0
"""What the firmware says about Secure Boot, and whether that is enough to go on.

`read_platform` only reports; `check_platform` decides. Variables: UEFI 2.10 section 3.3, table 3.1.

Rules:
- `SecureBoot` and `SetupMode` are one byte, 0 or 1, and volatile (BS|RT). A non-volatile one was written
  by somebody who is not the firmware: firmware without Secure Boot lets any system create such a name.
- `db` and `dbx` are NV|BS|RT and time-based authenticated; anything else could be changed without a key.
  An absent one is an empty one: no `dbx` revokes nothing, no `db` trusts nobody (`no-anchor` later).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from trustme_init.errors import FirmwareRefusal
from trustme_init.firmware.efivars import (
    EFI_GLOBAL_VARIABLE,
    EFI_IMAGE_SECURITY_DATABASE,
    EFI_VARIABLE_BOOTSERVICE_ACCESS,
    EFI_VARIABLE_NON_VOLATILE,
    EFI_VARIABLE_RUNTIME_ACCESS,
    EFI_VARIABLE_TIME_BASED_AUTHENTICATED_WRITE_ACCESS,
    EfiVariable,
    EfiVars,
)
from trustme_init.firmware.siglist import (
    DIGEST_SIZES,
    EFI_CERT_SHA256,
    EFI_CERT_X509,
    EFI_CERT_X509_SHA256,
    EFI_CERT_X509_SHA384,
    EFI_CERT_X509_SHA512,
    parse_signature_lists,
)

STATE_ATTRIBUTES: Final = EFI_VARIABLE_BOOTSERVICE_ACCESS | EFI_VARIABLE_RUNTIME_ACCESS
DATABASE_ATTRIBUTES: Final = (
    EFI_VARIABLE_NON_VOLATILE
    | EFI_VARIABLE_BOOTSERVICE_ACCESS
    | EFI_VARIABLE_RUNTIME_ACCESS
    | EFI_VARIABLE_TIME_BASED_AUTHENTICATED_WRITE_ACCESS
)
_TBS_ALGORITHMS: Final = {
    EFI_CERT_X509_SHA256: "sha256",
    EFI_CERT_X509_SHA384: "sha384",
    EFI_CERT_X509_SHA512: "sha512",
}


@dataclass(frozen=True, slots=True)
class SignatureDb:
    """What one signature database holds, by kind."""

    certificates: tuple[bytes, ...] = ()
    """EFI_CERT_X509 entries, DER, in the order of the variable; not parsed here."""
    sha256: frozenset[bytes] = frozenset()
    """EFI_CERT_SHA256 entries: Authenticode digests of PE images, 32 bytes each."""
    x509_hashes: Mapping[str, Mapping[bytes, bytes]] = field(default_factory=dict)
    """Hash name (sha256, sha384, sha512) to {TBSCertificate digest: EFI_TIME of revocation, 16 bytes}."""
    ignored: tuple[str, ...] = ()
    """Names (or GUIDs) of the list types that are present and not understood."""
    digest: str = ""
    """SHA-256 (hex) of the variable's data; empty if the variable is absent."""


@dataclass(frozen=True, slots=True)
class FirmwareFacts:
    """The Secure Boot state of this boot."""

    secure_boot: bool
    setup_mode: bool
    db: SignatureDb
    dbx: SignatureDb


def read_platform(efivars: EfiVars) -> FirmwareFacts:
    """Read the four variables. FirmwareRefusal names what is absent, malformed or badly protected.

    Codes besides those of EfiVars.read and parse_signature_lists: "secure-boot-unknown",
    "setup-mode-unknown" (absent), "efivar-attributes", "efivar-malformed".
    """
    return FirmwareFacts(
        secure_boot=_flag(efivars, "SecureBoot", "secure-boot-unknown"),
        setup_mode=_flag(efivars, "SetupMode", "setup-mode-unknown"),
        db=_database(efivars, "db"),
        dbx=_database(efivars, "dbx"),
    )


def check_platform(facts: FirmwareFacts, *, allow_insecure: bool) -> None:
    """Refuse ("setup-mode", "secure-boot-off") a machine whose firmware did not check this system.

    `allow_insecure` is the signed policy's `allows_insecure_boot`, nothing else.
    """
    if allow_insecure:
        return
    if facts.setup_mode:
        raise FirmwareRefusal(
            "setup-mode",
            "the firmware is in setup mode: anybody can replace its keys",
            evidence="SetupMode=1",
            remedy="enrol a platform key (PK) in the firmware set-up, then boot again",
        )
    if not facts.secure_boot:
        raise FirmwareRefusal(
            "secure-boot-off",
            "the firmware did not check the signature of this system",
            evidence="SecureBoot=0",
            remedy="switch Secure Boot on in the firmware set-up, then boot again",
        )


def parse_database(data: bytes) -> SignatureDb:
    """Sort the entries of a signature database by kind; duplicates keep their first place."""
    certificates: dict[bytes, None] = {}
    sha256: set[bytes] = set()
    x509_hashes: dict[str, dict[bytes, bytes]] = {}
    ignored: dict[str, None] = {}
    for entry in parse_signature_lists(data):
        contents = [signature.data for signature in entry.signatures]
        if entry.type_guid == EFI_CERT_X509:
            certificates.update(dict.fromkeys(contents))
        elif entry.type_guid == EFI_CERT_SHA256:
            sha256.update(contents)
        elif entry.type_guid in _TBS_ALGORITHMS:
            size = DIGEST_SIZES[entry.type_guid]
            hashes = x509_hashes.setdefault(_TBS_ALGORITHMS[entry.type_guid], {})
            for content in contents:
                hashes.setdefault(content[:size], content[size:])
        else:
            ignored[entry.type_name] = None
    return SignatureDb(
        certificates=tuple(certificates),
        sha256=frozenset(sha256),
        x509_hashes=x509_hashes,
        ignored=tuple(ignored),
        digest=hashlib.sha256(data).hexdigest(),
    )


def _flag(efivars: EfiVars, name: str, absent_code: str) -> bool:
    variable = efivars.read(name, EFI_GLOBAL_VARIABLE)
    if variable is None:
        raise FirmwareRefusal(
            absent_code,
            "the firmware does not report its Secure Boot state",
            evidence=f"no variable {name}-{EFI_GLOBAL_VARIABLE}",
            remedy="use UEFI firmware with Secure Boot, and make sure efivarfs is mounted",
        )
    _require_attributes(name, variable, STATE_ATTRIBUTES)
    if variable.data not in {b"\0", b"\1"}:
        raise FirmwareRefusal(
            "efivar-malformed",
            "a Secure Boot state variable is not one byte of 0 or 1",
            evidence=f"{name}={variable.data[:8].hex() or 'empty'} ({len(variable.data)} bytes)",
            remedy="update or reset the firmware",
        )
    return variable.data == b"\1"


def _database(efivars: EfiVars, name: str) -> SignatureDb:
    variable = efivars.read(name, EFI_IMAGE_SECURITY_DATABASE)
    if variable is None:
        return SignatureDb()
    _require_attributes(name, variable, DATABASE_ATTRIBUTES)
    return parse_database(variable.data)


def _require_attributes(name: str, variable: EfiVariable, expected: int) -> None:
    if variable.attributes != expected:
        raise FirmwareRefusal(
            "efivar-attributes",
            "a Secure Boot variable is not protected as the UEFI specification demands",
            evidence=f"{name}: attributes {variable.attributes:#x}, expected {expected:#x}",
            remedy="restore the factory Secure Boot keys in the firmware set-up",
        )
