# SPDX-License-Identifier: Apache-2.0
"""OVMF variable stores, through virt-firmware's `virt-fw-vars` program.

The program and not its Python modules: those are under the GPL version 2 only, this project is not.
What is in the lists is made here (`uefi.lists`); virt-fw-vars knows the store's format and puts it there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trustme_init.firmware.efivars import EFI_GLOBAL_VARIABLE, EFI_IMAGE_SECURITY_DATABASE
from trustme_init.firmware.secureboot import DATABASE_ATTRIBUTES
from trustme_tools.errors import ToolError
from trustme_tools.publish import write_atomic
from trustme_tools.tooling import run

KEY_VARIABLES: Final[Mapping[str, str]] = {
    "PK": EFI_GLOBAL_VARIABLE,
    "KEK": EFI_GLOBAL_VARIABLE,
    "db": EFI_IMAGE_SECURITY_DATABASE,
    "dbx": EFI_IMAGE_SECURITY_DATABASE,
}
"""Variables that hold keys, and their vendor GUIDs (UEFI 2.10 section 32.3)."""

_SECURE_BOOT_ENABLE: Final = ("SecureBootEnable", "f0a30bc7-af08-4556-99c4-001009c93a44")
"""EDK2's own switch: whether Secure Boot is enforced once a PK is there."""
_CUSTOM_MODE: Final = ("CustomMode", "c076ec0c-7028-4399-a072-71ee5c448b9f")
_ENABLE_ATTRIBUTES: Final = 0x03
"""Non-volatile, boot services only: an operating system never sees it."""
_TIME: Final = "da070101000000000000000000000000"
"""EFI_TIME 2010-01-01 00:00:00 UTC: any signed update is newer."""


@dataclass(frozen=True, slots=True)
class StoreVariable:
    """One variable of a store."""

    name: str
    guid: str
    attributes: int
    data: bytes
    time: str | None = None
    """EFI_TIME of the last signed update (hex), of authenticated variables."""


def read_store(path: Path) -> list[StoreVariable]:
    """Return every variable of an OVMF store (raw or qcow2); ToolError("not-a-store")."""
    if not path.is_file():
        raise ToolError(f"{path} is not there, or not a file", "name an OVMF_VARS file", code="not-a-store")
    try:
        output = run(
            "virt-fw-vars", ["-l", "error", "-i", path, "--output-json", "-"], purpose=f"read {path}"
        )
        variables = json.loads(output)["variables"]
    except (ToolError, ValueError, KeyError) as exc:
        if isinstance(exc, ToolError) and exc.code == "missing-tool":
            raise
        raise ToolError(
            f"{path} is not an EDK2 variable store",
            "name an OVMF_VARS file, for example OVMF_VARS_4M.fd",
            code="not-a-store",
            evidence=exc.evidence if isinstance(exc, ToolError) else str(exc),
        ) from exc
    return [
        StoreVariable(
            entry["name"], entry["guid"], entry["attr"], bytes.fromhex(entry["data"]), entry.get("time")
        )
        for entry in variables
    ]


def write_store(
    template: Path, out: Path, keys: Mapping[str, bytes], *, secure_boot: bool, delete: Sequence[str] = ()
) -> None:
    """Write a copy of the store `template` to `out` with the key variables replaced.

    `keys` maps PK, KEK, db, dbx to signature lists; an empty value removes the variable. Every other
    key variable of the template is removed too: nothing is trusted that is not named.
    """
    read_store(template)
    variables = [
        _entry(name, KEY_VARIABLES[name], DATABASE_ATTRIBUTES, data) for name, data in keys.items() if data
    ]
    variables.append(_entry(*_SECURE_BOOT_ENABLE, _ENABLE_ATTRIBUTES, bytes([secure_boot])))
    variables.append(_entry(*_CUSTOM_MODE, _ENABLE_ATTRIBUTES, b"\0"))
    _run(template, out, variables, [*KEY_VARIABLES, *delete])


def replace_database(store: Path, out: Path, name: str, data: bytes) -> None:
    """Write a copy of `store` to `out` in which the key variable `name` has other data, and nothing else.

    The variable keeps its time: an update that was signed for it later still applies, an older one does not.
    """
    time = next((each.time for each in read_store(store) if each.name == name), None)
    entry = _entry(name, KEY_VARIABLES[name], DATABASE_ATTRIBUTES, data)
    entry["time"] = time or _TIME
    _run(store, out, [entry], [name])


def _run(template: Path, out: Path, variables: Sequence[Mapping[str, Any]], delete: Sequence[str]) -> None:
    removed = [word for name in delete for word in ("--delete", name)]
    with tempfile.TemporaryDirectory(prefix="trustme-vars-") as temporary:
        document = Path(temporary, "variables.json")
        document.write_text(json.dumps({"version": 2, "variables": variables}))
        result = Path(temporary, "vars.fd")
        run(
            "virt-fw-vars",
            ["-l", "error", "-i", template, "-o", result, *removed, "--set-json", document],
            purpose=f"write keys into a copy of {template}",
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, result.read_bytes())


def _entry(name: str, guid: str, attributes: int, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "guid": guid, "attr": attributes, "data": data.hex()}
    if attributes == DATABASE_ATTRIBUTES:
        entry["time"] = _TIME
    return entry
