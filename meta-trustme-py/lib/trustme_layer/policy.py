# SPDX-License-Identifier: Apache-2.0
"""The text of `/etc/trustme/policy.toml` from the layer's variables.

Bitbake imports this into its own Python: nothing but the standard library, and nothing of the project. The
recipe lets the device's own parser judge the text; a test compares it with the reference image's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

POLICY_VERSION: Final = 1

VARIABLES: Final = (
    # (table, key, variable, kind), in the order of the file
    ("", "development", "TRUSTME_DEVELOPMENT", "boolean"),
    ("", "build_date", "TRUSTME_BUILD_EPOCH", "moment"),
    ("", "hardware", "TRUSTME_HARDWARE", "text"),
    ("core", "guest_os", "TRUSTME_CORE_GUESTOS", "text"),
    ("core", "console", "TRUSTME_CORE_CONSOLE", "text"),
    ("core", "start_timeout_s", "TRUSTME_CORE_START_TIMEOUT", "integer"),
    ("core", "memory_max_mib", "TRUSTME_CORE_MEMORY_MAX", "integer"),
    ("core", "pids_max", "TRUSTME_CORE_PIDS_MAX", "integer"),
    ("platform", "allow_insecure_boot", "TRUSTME_ALLOW_INSECURE_BOOT", "boolean"),
    ("platform", "allow_missing_tpm", "TRUSTME_ALLOW_MISSING_TPM", "boolean"),
    ("devices", "timeout_s", "TRUSTME_DEVICES_TIMEOUT", "integer"),
    ("devices", "modules", "TRUSTME_MODULES", "texts"),
    ("provisioning", "require", "TRUSTME_PROVISIONING_REQUIRE", "texts"),
    ("provisioning", "device_key", "TRUSTME_DEVICE_KEY", "text"),
    ("provisioning", "pin_tries", "TRUSTME_PIN_TRIES", "integer"),
    ("provisioning", "self_provisioning", "TRUSTME_SELF_PROVISIONING", "boolean"),
    ("containers", "allow_unsigned_configs", "TRUSTME_CONTAINERS_ALLOW_UNSIGNED_CONFIGS", "boolean"),
    ("containers", "start_timeout_s", "TRUSTME_CONTAINERS_START_TIMEOUT", "integer"),
    ("containers", "pids_max", "TRUSTME_CONTAINERS_PIDS_MAX", "integer"),
)
"""Every key of the policy and the variable that sets it."""

_BOOLEANS: Final = {"0": False, "1": True}


def names() -> str:
    """Return the variables, separated by spaces: what the text depends on."""
    return " ".join(variable for _, _, variable, _ in VARIABLES)


def text(values: Mapping[str, str | None]) -> str:
    """Return the policy file; ValueError names the variable that has no usable value."""
    tables: dict[str, list[str]] = {"": [f"version = {POLICY_VERSION}"]}
    for table, key, variable, kind in VARIABLES:
        value = values.get(variable)
        # No console is the one thing that may be left out.
        if variable == "TRUSTME_CORE_CONSOLE" and not value:
            continue
        tables.setdefault(table, []).append(f"{key} = {_value(variable, value, kind)}")
    parts = ["\n".join([f"[{name}]", *lines] if name else lines) + "\n" for name, lines in tables.items()]
    return "\n".join(parts)


def _value(variable: str, value: str | None, kind: str) -> str:
    """Return one value as TOML; strings that JSON writes in ASCII are TOML strings too."""
    word = (value or "").strip()
    if kind == "texts":
        return json.dumps(word.split())
    if not word:
        raise ValueError(f"{variable} is not set")
    found: Any = word
    if kind == "boolean":
        if word not in _BOOLEANS:
            raise ValueError(f'{variable} is "{word}", not "0" or "1"')
        found = _BOOLEANS[word]
    elif kind in {"integer", "moment"}:
        if not (word.isascii() and word.isdigit()):
            raise ValueError(f'{variable} is "{word}", not a number')
        found = int(word)
        if kind == "moment":
            return f"{datetime.fromtimestamp(found, UTC):%Y-%m-%dT%H:%M:%SZ}"
    return json.dumps(found)
