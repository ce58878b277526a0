# SPDX-License-Identifier: Apache-2.0
"""The settings file of `trustme provision`: YAML, version 1, read as strictly as a wire format.

Rules:
- An unknown key, a key given twice, a wrong type or a missing value is an error that names the key, so that a
  misspelt rule is never silently the lenient default.
- Paths are relative to the file. Secrets are not in it, only where to read them (`pins`); values under keys
  of secrets are never shown.
- What weakens the result (software keys, no credential activation, development builds) is off until the
  file asks for it by name, and the report says that it was asked for.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import yaml

from trustme_tools.errors import UsageError
from trustme_tools.provision import pins
from trustme_tools.provision.pins import Source

VERSION: Final = 1
LIMIT: Final = 256 * 1024
DAYS: Final = 730
WAIT: Final = 300
NAME_LIMIT: Final = 64


@dataclass(frozen=True, slots=True)
class DeviceCa:
    """Who signs: `pki` and `signer`; or `key` and `certificate`; or `command` and `certificate`."""

    pki: Path | None
    signer: str
    key: Path | None
    command: str | None
    certificate: Path | None
    passphrase: Source | None
    days: int


@dataclass(frozen=True, slots=True)
class NewPin:
    """A softtoken with this PIN; `present` opens the one that may be there (None: the published PIN)."""

    pin: Source
    present: Source | None


@dataclass(frozen=True, slots=True)
class OwnToken:
    """The operator's own PKCS#12 file in the place of the device's."""

    p12: Path
    password: Source


Token = NewPin | OwnToken | None
"""What is wanted of the device's token; None: leave it as it is."""


@dataclass(frozen=True, slots=True)
class TargetSettings:
    """One device: how to reach it, and who it has to be if that is known before."""

    name: str
    command: tuple[str, ...] | None
    unix: Path | None
    console: Path | None
    uuid: UUID | None
    endorsement_key: str | None
    """SHA-256 of the endorsement key, hex: of its SubjectPublicKeyInfo, as reports show it."""
    token: Token
    own_token: bool
    """Whether `token` is said for this target; otherwise the common one is meant."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole file. Times in seconds."""

    path: Path
    guest_anchors: tuple[Path, ...]
    device_anchors: tuple[Path, ...]
    lifecycle_anchors: tuple[Path, ...]
    other_anchors: str
    """What to do with anchors that are not named here: "refuse", "remove" or "keep"."""
    device_ca: DeviceCa
    ek_cas: tuple[Path, ...]
    activation: bool
    software_keys: bool
    development_builds: bool
    token: Token
    completion: str
    """"set_provisioned" or "reboot"."""
    records: Path
    wait: int
    targets: tuple[TargetSettings, ...]


def load(path: Path) -> Settings:
    """Read a settings file; UsageError("settings-malformed", "bad-secret-source") names the key."""
    with path.open("rb") as file:
        data = file.read(LIMIT + 1)
    return parse(data, path)


def parse(data: bytes, path: Path) -> Settings:
    """Judge the bytes of a settings file; `path` is where it lies, for paths in it."""
    if len(data) > LIMIT:
        raise _malformed(f"larger than {LIMIT} bytes")
    try:
        document = yaml.load(data, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as exc:
        # Not str(exc): that quotes the file.
        mark = exc.problem_mark
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise _malformed(f"{exc.problem}{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise _malformed(type(exc).__name__) from None
    root = _Table("", document, path.absolute().parent)
    root.integer("version", VERSION, VERSION)
    ca = _device_ca(root.table("device_ca"))
    tpm = root.table("tpm", optional=True)
    settings = Settings(
        path=path,
        guest_anchors=root.paths("guest_anchors"),
        device_anchors=root.paths("device_anchors"),
        lifecycle_anchors=root.paths("lifecycle_anchors", optional=True),
        other_anchors=root.word("other_anchors", ("refuse", "remove", "keep")),
        device_ca=ca,
        ek_cas=tpm.paths("ek_cas", optional=True),
        activation=tpm.word("credential_activation", ("required", "skip")) == "required",
        software_keys=tpm.word("software_keys", ("refuse", "allow")) == "allow",
        development_builds=root.word("development_builds", ("refuse", "allow")) == "allow",
        token=_token(root, "token"),
        completion=root.word("completion", ("set_provisioned", "reboot")),
        records=root.path("records", "records"),
        wait=root.integer("wait", 1, 86400, WAIT),
        targets=tuple(_target(each) for each in root.tables("targets")),
    )
    tpm.finish()
    root.finish()
    names = [target.name for target in settings.targets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise _malformed(f"targets: the name {repeated[0]} is there twice")
    return settings


def _device_ca(table: _Table) -> DeviceCa:
    ca = DeviceCa(
        pki=table.path("pki") if "pki" in table else None,
        signer=table.text("signer", "device_subca"),
        key=table.path("key") if "key" in table else None,
        command=table.text("sign_command") if "sign_command" in table else None,
        certificate=table.path("certificate") if "certificate" in table else None,
        passphrase=table.secret("passphrase"),
        days=table.integer("days", 1, 36500, DAYS),
    )
    table.finish()
    match ca.pki, ca.key, ca.command, ca.certificate:
        case (Path(), None, None, None) | (None, Path(), None, Path()) | (None, None, str(), Path()):
            return ca
    raise _malformed("device_ca: give pki, or key and certificate, or sign_command and certificate")


def _token(parent: _Table, key: str) -> Token:
    if parent.is_word(key, "keep"):
        return None
    table = parent.table(key)
    token: Token
    if "p12" in table:
        password = table.secret("password")
        if password is None:
            raise _malformed(f"{table.prefix}password: missing")
        token = OwnToken(table.path("p12"), password)
    else:
        pin = table.secret("pin", new=True)
        if pin is None:
            raise _malformed(f"{table.prefix}pin: missing; or say p12 and password, or `{key}: keep`")
        token = NewPin(pin, table.secret("present_pin"))
    table.finish()
    return token


def _target(table: _Table) -> TargetSettings:
    name = table.text("name")
    if len(name) > NAME_LIMIT:
        raise _malformed(f"{table.prefix}name: longer than {NAME_LIMIT} characters")
    own_token = "token" in table
    target = TargetSettings(
        name=name,
        command=table.texts("command") if "command" in table else None,
        unix=table.path("unix") if "unix" in table else None,
        console=table.path("console") if "console" in table else None,
        uuid=table.uuid("uuid"),
        endorsement_key=table.sha256("ek_sha256"),
        token=_token(table, "token") if own_token else None,
        own_token=own_token,
    )
    table.finish()
    if sum(way is not None for way in (target.command, target.unix, target.console)) != 1:
        raise _malformed(f"{table.prefix}{name}: give exactly one of command, unix and console")
    if target.command == ():
        raise _malformed(f"{table.prefix}command: empty")
    return target


def _malformed(evidence: str) -> UsageError:
    return UsageError(
        "the settings file is not well-formed",
        "docs/provisioning.md explains every key",
        code="settings-malformed",
        evidence=evidence,
    )


class _StrictLoader(yaml.SafeLoader):
    """YAML without types of its own, and without keys that are given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - as the library calls it
        """Refuse what the library would let win or lose silently."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!a} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _Table:
    """One mapping, read key by key; `finish` refuses whatever was not asked for."""

    def __init__(self, name: str, values: object, base: Path) -> None:
        self.prefix = f"{name}." if name else ""
        self._base = base
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise _malformed(f"{name or 'the file'}: expected keys and values")
        self._values = dict(values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def _take(self, key: str, kind: type, default: object = None) -> Any:
        value = self._values.pop(key, default)
        if type(value) is not kind:
            found = "nothing" if value is None else type(value).__name__
            raise _malformed(f"{self.prefix}{key}: expected {_KINDS[kind]}, found {found}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value: str = self._take(key, str, default)
        if not value or not value.isprintable():
            raise _malformed(f"{self.prefix}{key}: empty or unprintable")
        return value

    def texts(self, key: str, *, optional: bool = False) -> tuple[str, ...]:
        values: list[Any] = self._take(key, list, [] if optional else None)
        if not all(isinstance(value, str) and value and value.isprintable() for value in values):
            raise _malformed(f"{self.prefix}{key}: expected a list of texts")
        return tuple(values)

    def path(self, key: str, default: str | None = None) -> Path:
        return self._base / self.text(key, default)

    def paths(self, key: str, *, optional: bool = False) -> tuple[Path, ...]:
        return tuple(self._base / text for text in self.texts(key, optional=optional))

    def word(self, key: str, known: tuple[str, ...]) -> str:
        """Return one of `known`; the first is the default."""
        value = self.text(key, known[0])
        if value not in known:
            raise _malformed(f"{self.prefix}{key}: {value!a} is none of {', '.join(known)}")
        return value

    def is_word(self, key: str, word: str) -> bool:
        """Take `key` if it is `word`."""
        if self._values.get(key) != word:
            return False
        del self._values[key]
        return True

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value: int = self._take(key, int, default)
        if not low <= value <= high:
            raise _malformed(f"{self.prefix}{key}: {value} is outside {low}..{high}")
        return value

    def uuid(self, key: str) -> UUID | None:
        if key not in self:
            return None
        text = self.text(key)
        try:
            return UUID(text)
        except ValueError:
            raise _malformed(f"{self.prefix}{key}: {text!a} is not a UUID") from None

    def sha256(self, key: str) -> str | None:
        if key not in self:
            return None
        text = self.text(key).lower()
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            raise _malformed(f"{self.prefix}{key}: {text!a} is not a SHA-256 in 64 hexadecimal digits")
        return text

    def secret(self, key: str, *, new: bool = False) -> Source | None:
        if key not in self:
            return None
        return pins.parse(self._values.pop(key), f"{self.prefix}{key}", base=self._base, new=new)

    def table(self, key: str, *, optional: bool = False) -> _Table:
        value = self._take(key, dict, {} if optional else None)
        return _Table(f"{self.prefix}{key}", value, self._base)

    def tables(self, key: str) -> list[_Table]:
        values: list[Any] = self._take(key, list, [])
        return [
            _Table(f"{self.prefix}{key}[{number}]", value, self._base) for number, value in enumerate(values)
        ]

    def finish(self) -> None:
        if self._values:
            raise _malformed(f"unknown key {self.prefix}{min(self._values)}")


_KINDS: Final = {str: "a text", list: "a list", dict: "keys and values", int: "a whole number"}
