# SPDX-License-Identifier: Apache-2.0
"""The signed policy file of a build: `/etc/trustme/policy.toml` inside the UKI.

It is the only place that can weaken a rule, and only in a development build. It is as strict as a wire
format: an unknown key, a wrong type or a missing value is a refusal, so that a misspelt rule can never
silently be the lenient default.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from trustme_init.errors import PolicyRefusal

POLICY_VERSION: Final = 1
POLICY_LIMIT: Final = 64 * 1024
MIB: Final = 1024 * 1024

REQUIREMENTS: Final = ("device-certificate", "device-anchor", "guest-anchor", "token", "token-pin")
"""What a build can demand before provisioning may be completed; `provisioning.requirements` judges them."""
DEVICE_KEYS: Final = ("ecc-p256", "rsa-2048")


@dataclass(frozen=True, slots=True)
class Policy:
    """What this build demands. Sizes in bytes, times in seconds."""

    development: bool
    build_date: datetime
    """Clock floor: no certificate is judged at an earlier time."""
    hardware: str
    """Must equal `hardware` of every signed GuestOS configuration."""
    core_guest_os: str
    core_console: Path | None
    core_start_timeout: float
    core_memory_max: int
    core_pids_max: int
    allow_insecure_boot: bool
    """Go on with Secure Boot off or in setup mode. Development builds only."""
    allow_missing_tpm: bool
    """Go on, unmeasured, on a machine without a TPM. Development builds only."""
    device_timeout: float
    modules: tuple[str, ...]
    requirements: frozenset[str]
    """Names of REQUIREMENTS."""
    device_key: str
    """One of DEVICE_KEYS."""
    pin_tries: int
    """Wrong PINs until a token is locked, over all boots."""
    self_provisioning: bool
    """Make a device certificate and a token with the published PIN by itself. Development builds only."""
    allow_unsigned_configs: bool
    """Take container configurations that nobody signed. Development builds only."""
    container_start_timeout: float
    """From a container's first instruction to its BOOT_COMPLETED."""
    container_pids_max: int

    @property
    def allows_insecure_boot(self) -> bool:
        """The rule as it is applied: a production build never allows it, whatever the file says."""
        return self.development and self.allow_insecure_boot

    @property
    def allows_missing_tpm(self) -> bool:
        """The rule as it is applied, likewise."""
        return self.development and self.allow_missing_tpm

    @property
    def provisions_itself(self) -> bool:
        """The rule as it is applied, likewise."""
        return self.development and self.self_provisioning

    @property
    def allows_unsigned_configs(self) -> bool:
        """The rule as it is applied, likewise."""
        return self.development and self.allow_unsigned_configs


def load(path: Path) -> Policy:
    """Read the policy of this build; PolicyRefusal if it cannot be read or is not exactly well-formed."""
    try:
        with path.open("rb") as file:
            text = file.read(POLICY_LIMIT + 1)
    except OSError as exc:
        raise PolicyRefusal(
            "policy-unreadable",
            "the signed policy file cannot be read",
            evidence=f"{path}: {exc.strerror}",
            remedy="rebuild the base system: the policy is part of the signed boot image",
        ) from exc
    return parse(text)


def parse(text: bytes) -> Policy:
    """Judge the bytes of a policy file; PolicyRefusal("policy-malformed") names the key."""
    if len(text) > POLICY_LIMIT:
        raise _malformed(f"larger than {POLICY_LIMIT} bytes")
    try:
        document = tomllib.loads(text.decode())
    except ValueError as exc:
        raise _malformed(str(exc)) from exc
    root = _Table("", document)
    root.integer("version", POLICY_VERSION, POLICY_VERSION)
    development = root.boolean("development")
    build_date = root.moment("build_date")
    hardware = root.text("hardware")
    core = root.table("core")
    platform = root.table("platform")
    devices = root.table("devices")
    provisioning = root.table("provisioning")
    containers = root.table("containers")
    console = core.optional_text("console")
    policy = Policy(
        development=development,
        build_date=build_date,
        hardware=hardware,
        core_guest_os=core.text("guest_os"),
        core_console=Path(console) if console is not None else None,
        core_start_timeout=float(core.integer("start_timeout_s", 1, 3600)),
        core_memory_max=core.integer("memory_max_mib", 32, 1024 * 1024) * MIB,
        core_pids_max=core.integer("pids_max", 16, 65536),
        allow_insecure_boot=platform.boolean("allow_insecure_boot"),
        allow_missing_tpm=platform.boolean("allow_missing_tpm"),
        device_timeout=float(devices.integer("timeout_s", 1, 600)),
        modules=devices.texts("modules"),
        requirements=provisioning.names("require", REQUIREMENTS),
        device_key=provisioning.name("device_key", DEVICE_KEYS),
        pin_tries=provisioning.integer("pin_tries", 3, 100),
        self_provisioning=provisioning.boolean("self_provisioning"),
        allow_unsigned_configs=containers.boolean("allow_unsigned_configs"),
        container_start_timeout=float(containers.integer("start_timeout_s", 1, 3600)),
        container_pids_max=containers.integer("pids_max", 16, 65536),
    )
    for table in (core, platform, devices, provisioning, containers, root):
        table.finish()
    if not development:
        for name, allowed in (
            ("platform.allow_insecure_boot", policy.allow_insecure_boot),
            ("platform.allow_missing_tpm", policy.allow_missing_tpm),
            ("provisioning.self_provisioning", policy.self_provisioning),
            ("containers.allow_unsigned_configs", policy.allow_unsigned_configs),
        ):
            if allowed:
                raise _malformed(f"{name} is for development builds only")
    return policy


def _malformed(evidence: str) -> PolicyRefusal:
    return PolicyRefusal(
        "policy-malformed",
        "the signed policy file is not well-formed",
        evidence=evidence,
        remedy="rebuild the base system with a policy that `trustme image build` accepts",
    )


class _Table:
    """One TOML table, read key by key; `finish` refuses whatever was not asked for."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self._prefix = f"{name}." if name else ""
        self._values = dict(values)

    def _take(self, key: str, kind: type) -> Any:
        value = self._values.pop(key, None)
        if type(value) is not kind:
            raise _malformed(f"{self._prefix}{key}: expected {kind.__name__}, found {value!r}")
        return value

    def text(self, key: str) -> str:
        value: str = self._take(key, str)
        if not value or not value.isprintable():
            raise _malformed(f"{self._prefix}{key}: empty or unprintable")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if key in self._values else None

    def texts(self, key: str) -> tuple[str, ...]:
        values: list[Any] = self._take(key, list)
        if not all(isinstance(value, str) for value in values):
            raise _malformed(f"{self._prefix}{key}: expected a list of strings")
        return tuple(values)

    def name(self, key: str, known: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in known:
            raise _malformed(f"{self._prefix}{key}: {value!a} is none of {', '.join(known)}")
        return value

    def names(self, key: str, known: tuple[str, ...]) -> frozenset[str]:
        values = self.texts(key)
        if len({*values}) != len(values) or not {*values} <= {*known}:
            raise _malformed(f"{self._prefix}{key}: expected each at most once of {', '.join(known)}")
        return frozenset(values)

    def boolean(self, key: str) -> bool:
        value: bool = self._take(key, bool)
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        value: int = self._take(key, int)
        if not low <= value <= high:
            raise _malformed(f"{self._prefix}{key}: {value} is outside {low}..{high}")
        return value

    def moment(self, key: str) -> datetime:
        value: datetime = self._take(key, datetime)
        if value.tzinfo is None:
            raise _malformed(f"{self._prefix}{key}: needs a time zone, use Z")
        return value.astimezone(UTC)

    def table(self, key: str) -> _Table:
        return _Table(f"{self._prefix}{key}", self._take(key, dict))

    def finish(self) -> None:
        if self._values:
            raise _malformed(f"unknown key {self._prefix}{min(self._values)}")
