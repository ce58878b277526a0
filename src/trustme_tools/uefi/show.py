# SPDX-License-Identifier: Apache-2.0
"""What Secure Boot variables hold, from an OVMF store, an efivarfs directory, an .esl or an .auth file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cryptography import x509

from trustme_init.firmware.efivars import (
    EFI_GLOBAL_VARIABLE,
    EFI_VARIABLE_BOOTSERVICE_ACCESS,
    EFI_VARIABLE_NON_VOLATILE,
    EFI_VARIABLE_RUNTIME_ACCESS,
    EFI_VARIABLE_TIME_BASED_AUTHENTICATED_WRITE_ACCESS,
    EfiVars,
)
from trustme_init.firmware.secureboot import DATABASE_ATTRIBUTES, STATE_ATTRIBUTES
from trustme_init.firmware.siglist import (
    DIGEST_SIZES,
    EFI_CERT_SHA256,
    EFI_CERT_X509,
    Signature,
    SignatureList,
    parse_signature_lists,
)
from trustme_init.trust import certificate as device_rules
from trustme_tools.errors import ToolError
from trustme_tools.pki.certificates import extension_value
from trustme_tools.uefi.keys import read_lists
from trustme_tools.uefi.store import KEY_VARIABLES, read_store
from trustme_tools.uefi.update import parse_update

_FLAGS: Final = ("SecureBoot", "SetupMode")
_STORE_FLAGS: Final = ("SecureBootEnable",)
_FILES: Final = frozenset({".esl", ".auth"})
_ATTRIBUTES: Final[Mapping[int, str]] = {
    EFI_VARIABLE_NON_VOLATILE: "NV",
    EFI_VARIABLE_BOOTSERVICE_ACCESS: "BS",
    EFI_VARIABLE_RUNTIME_ACCESS: "RT",
    0x08: "HR",
    0x10: "AW",
    EFI_VARIABLE_TIME_BASED_AUTHENTICATED_WRITE_ACCESS: "AT",
    0x40: "APPEND",
    0x80: "EA",
}
"""EFI_VARIABLE_ATTRIBUTES as people abbreviate them (UEFI 2.10 section 8.2.1)."""


def describe(path: Path) -> dict[str, Any]:
    """Return the facts of `path`: variable name to entries (or to an integer for flags)."""
    if not path.exists():
        raise ToolError(
            f"there is no {path}",
            "name an OVMF store, an efivars directory, an .esl or an .auth file",
            code="not-a-store",
        )
    if path.is_dir():
        return _describe_efivars(path)
    if path.suffix == ".esl":
        return {path.stem: _facts(read_lists(path))}
    if path.suffix == ".auth":
        return {path.stem: entries(auth_payload(path.read_bytes()))}
    found: dict[str, Any] = {}
    for variable in read_store(path):
        if KEY_VARIABLES.get(variable.name) == variable.guid:
            found[variable.name] = entries(variable.data)
        elif variable.name in _STORE_FLAGS:
            found[variable.name] = int.from_bytes(variable.data, "little")
    return found


def auth_payload(data: bytes) -> bytes:
    """Return what follows the EFI_VARIABLE_AUTHENTICATION_2 of an update; ToolError("not-an-update")."""
    return parse_update(data).payload


def entries(data: bytes) -> list[dict[str, Any]]:
    """Return one dictionary per entry of the signature lists in `data`."""
    return _facts(parse_signature_lists(data))


def _facts(lists: Iterable[SignatureList]) -> list[dict[str, Any]]:
    return [signature_facts(entry, signature) for entry in lists for signature in entry.signatures]


def attributes(path: Path) -> dict[str, dict[str, Any]]:
    """Return the attributes of each key variable and flag of an efivars directory or a store.

    Name to `value`, its bits in words, and whether they are what the specification demands (UEFI 2.10 section
    3.3): others mean that somebody else than the firmware made the variable. Files (.esl, .auth) have none.
    """
    if path.suffix in _FILES:
        return {}
    if path.is_dir():
        efivars = EfiVars(path)
        wanted = {**dict.fromkeys(_FLAGS, EFI_GLOBAL_VARIABLE), **KEY_VARIABLES}
        found = {name: efivars.read(name, guid) for name, guid in wanted.items()}
        values = {name: variable.attributes for name, variable in found.items() if variable is not None}
    else:
        values = {
            variable.name: variable.attributes
            for variable in read_store(path)
            if KEY_VARIABLES.get(variable.name) == variable.guid
        }
    return {
        name: {
            "value": value,
            "names": [text for bit, text in _ATTRIBUTES.items() if value & bit],
            "as_specified": value == (STATE_ATTRIBUTES if name in _FLAGS else DATABASE_ATTRIBUTES),
        }
        for name, value in values.items()
    }


def text(facts: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> str:
    """Return the facts for people; `found` are the `attributes` of the variables."""
    lines = []
    for name, value in facts.items():
        note = _attribute_note(found[name]) if name in found else ""
        if isinstance(value, int):
            lines.append(f"{name}: {'yes' if value else 'no'}{note}")
            continue
        lines.append(f"{name}: {len(value)} {'entry' if len(value) == 1 else 'entries'}{note}")
        for entry in value:
            what = entry.get("subject") or entry["data"]
            lines.append(
                f"  {entry['type']:22} {entry['sha256'][:16] if 'sha256' in entry else '':16}  {what}"
            )
            digest = f"  sha256 {entry['sha256']}" if "sha256" in entry else ""
            lines.append(f"    owner {entry['owner']}{digest}")
    return "\n".join(lines) if lines else "no Secure Boot variables"


def _attribute_note(found: Mapping[str, Any]) -> str:
    wrong = "" if found["as_specified"] else ", NOT what the specification demands"
    return f"  ({'|'.join(found['names']) or 'no attributes'}{wrong})"


def signature_facts(entry: SignatureList, signature: Signature) -> dict[str, Any]:
    """Return one entry: `type`, `owner`, and of a certificate `subject`, `sha256`, `not_after`, `ca`.

    Of anything else `data`; of a certificate that the device would not parse also why it is `malformed`.
    """
    fact: dict[str, Any] = {"type": entry.type_name, "owner": signature.owner}
    if entry.type_guid == EFI_CERT_X509:
        return fact | _certificate_facts(signature.data)
    fact["data"] = signature.data.hex()
    if entry.type_guid == EFI_CERT_SHA256:
        fact["sha256"] = fact["data"]
    elif entry.type_guid in DIGEST_SIZES:
        size = DIGEST_SIZES[entry.type_guid]
        fact |= {"tbs_digest": signature.data[:size].hex(), "revoked_from": signature.data[size:].hex()}
    return fact


def _certificate_facts(der: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(der).hexdigest()
    try:
        certificate = device_rules.load(der)
    except device_rules.MalformedCertificateError as exc:
        return {"data": der.hex(), "sha256": digest, "malformed": str(exc)}
    basic = extension_value(certificate.extensions, x509.BasicConstraints)
    return {
        "subject": certificate.subject.rfc4514_string(),
        "sha256": digest,
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "ca": basic is not None and basic.ca,
    }


def _describe_efivars(directory: Path) -> dict[str, Any]:
    efivars = EfiVars(directory)
    found: dict[str, Any] = {}
    for name in _FLAGS:
        variable = efivars.read(name, EFI_GLOBAL_VARIABLE)
        if variable is not None:
            found[name] = int.from_bytes(variable.data[:1], "little")
    for name, guid in KEY_VARIABLES.items():
        variable = efivars.read(name, guid)
        if variable is not None:
            found[name] = entries(variable.data)
    return found
