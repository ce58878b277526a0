# SPDX-License-Identifier: Apache-2.0
"""What Secure Boot variables hold, from an OVMF store, an efivarfs directory, an .esl or an .auth file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from trustme_init.firmware.efivars import EFI_GLOBAL_VARIABLE, EfiVars
from trustme_init.firmware.siglist import EFI_CERT_X509, SignatureList, parse_signature_lists
from trustme_tools.errors import ToolError
from trustme_tools.uefi.keys import read_lists
from trustme_tools.uefi.store import KEY_VARIABLES, read_store

_FLAGS: Final = ("SecureBoot", "SetupMode")
_AUTH_HEADER: Final = 16
"""Bytes of EFI_TIME in front of the WIN_CERTIFICATE, whose length field comes first."""
_STORE_FLAGS: Final = ("SecureBootEnable",)


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
    length = int.from_bytes(data[_AUTH_HEADER : _AUTH_HEADER + 4], "little")
    if len(data) < _AUTH_HEADER + 24 or not 24 <= length <= len(data) - _AUTH_HEADER:
        raise ToolError(
            "this is no authenticated update", "name a file made by `trustme uefi auth`", code="not-an-update"
        )
    return data[_AUTH_HEADER + length :]


def entries(data: bytes) -> list[dict[str, Any]]:
    """Return one dictionary per entry of the signature lists in `data`."""
    return _facts(parse_signature_lists(data))


def _facts(lists: Iterable[SignatureList]) -> list[dict[str, Any]]:
    return [fact for entry in lists for fact in _list_facts(entry)]


def text(facts: dict[str, Any]) -> str:
    """Return the facts for people."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, int):
            lines.append(f"{name}: {'yes' if value else 'no'}")
            continue
        lines.append(f"{name}: {len(value)} {'entry' if len(value) == 1 else 'entries'}")
        for entry in value:
            what = entry.get("subject") or entry["data"]
            lines.append(
                f"  {entry['type']:22} {entry['sha256'][:16] if 'sha256' in entry else '':16}  {what}"
            )
    return "\n".join(lines) if lines else "no Secure Boot variables"


def _list_facts(entry: SignatureList) -> list[dict[str, Any]]:
    facts = []
    for signature in entry.signatures:
        fact: dict[str, Any] = {"type": entry.type_name, "owner": signature.owner}
        if entry.type_guid == EFI_CERT_X509:
            fact.update(_certificate_facts(signature.data))
        else:
            fact["data"] = signature.data.hex()
        facts.append(fact)
    return facts


def _certificate_facts(der: bytes) -> dict[str, Any]:
    try:
        certificate = x509.load_der_x509_certificate(der)
    except ValueError:
        return {"data": der.hex()}
    return {
        "subject": certificate.subject.rfc4514_string(),
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
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
