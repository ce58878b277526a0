# SPDX-License-Identifier: Apache-2.0
"""A device as the provisioning station sees it: its `control`, asked in JSON, and what it says, taken apart.

A device that is being provisioned is not trusted yet. Whatever it says is checked for its form here, and
made harmless before it is shown. A refusal of the device's becomes a ToolError with the device's own code.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

from trustme_init.control.cli.output import JSON_VERSION, OK, UNREACHABLE, UNSUPPORTED
from trustme_init.control.sanitise import visible
from trustme_tools.errors import ToolError
from trustme_tools.provision.pins import Secret
from trustme_tools.provision.transport import Output, Scratch, Transport, Word, unreachable

TIMEOUT: Final = 120.0
"""Seconds for one command: a chip makes keys slowly, and so does an emulated processor."""
ANSWER_LIMIT: Final = 1024 * 1024
_TEXT_LIMIT: Final = 500
PURPOSES: Final = ("guest", "device", "lifecycle")
_REGISTER: Final = {
    "guest": "ca_register",
    "device": "device_ca_register",
    "lifecycle": "lifecycle_ca_register",
}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class Requirement(NamedTuple):
    """One line of the device's checklist."""

    name: str
    met: bool
    required: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Status:
    """What a device says of itself. Digests are SHA-256, hex, and None where there is nothing yet."""

    completed: bool
    development: bool
    marker: str
    uuid: UUID
    requirements: tuple[Requirement, ...]
    device_key: str | None
    certificate: str | None
    endorsement_key: str | None
    record: str | None

    def missing(self) -> list[Requirement]:
        """Return what the device's policy demands and is not there."""
        return [each for each in self.requirements if each.required and not each.met]


class Authority(NamedTuple):
    """A registered anchor; `purpose` is one of PURPOSES."""

    purpose: str
    sha256: str


class TokenState(NamedTuple):
    """The device's token; `default_pin` None: not known."""

    kind: str
    certificate: str | None
    default_pin: bool | None
    kdf_rounds: int | None


class Device:
    """`control` on one device. Every method raises ToolError: see the module, and "unreachable"."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def close(self) -> None:
        """Let go of the way to the device; the next question opens it again."""
        self._transport.close()

    def status(self) -> Status:
        """GET_PROVISIONING_STATUS; ToolError("not-prepared") while the device has no UUID yet."""
        said = _mapping(self._ask("provisioning_status"), "provisioning")
        if "device_uuid" not in said:
            raise ToolError("the device is not prepared yet", "wait for its first boot", code="not-prepared")
        requirements = said.get("requirements", [])
        if not isinstance(requirements, list):
            raise _nonsense("requirements")
        return Status(
            completed=_boolean(said, "completed"),
            development=_boolean(said, "development"),
            marker=_text(said, "marker"),
            uuid=_uuid(said, "device_uuid"),
            requirements=tuple(_requirement(each) for each in requirements),
            device_key=_digest(said, "device_key_sha256"),
            certificate=_digest(said, "device_certificate_sha256"),
            endorsement_key=_digest(said, "endorsement_key_sha256"),
            record=_digest(said, "record_sha256"),
        )

    def authorities(self) -> frozenset[Authority]:
        """LIST_AUTHORITIES."""
        listed = self._ask("ca_list").get("authorities", [])
        if not isinstance(listed, list) or not all(isinstance(each, Mapping) for each in listed):
            raise _nonsense("authorities")
        found = set()
        for each in listed:
            purpose = _text(each, "purpose").removesuffix("_ANCHOR").lower()
            sha256 = _digest(each, "sha256")
            if sha256 is None or purpose not in PURPOSES:
                raise _nonsense(f"an anchor for {purpose}")
            found.add(Authority(purpose, sha256))
        return frozenset(found)

    def register(self, purpose: str, certificate: bytes) -> None:
        """Register a PEM certificate as an anchor for one of PURPOSES."""
        self._ask(_REGISTER[purpose], certificate)

    def remove_authority(self, sha256: str) -> None:
        """REMOVE_AUTHORITY."""
        self._ask("ca_remove", sha256)

    def csr(self) -> tuple[bytes, bytes | None]:
        """PULL_DEVICE_CSR: the request, and what the device's TPM says of its key."""
        reply = self._ask("pull_csr", Scratch.FILE)
        certification = _octets(reply, "device_key_certification")
        return _octets(reply, "device_csr") or b"", certification

    def push_certificate(self, chain: bytes) -> None:
        """PUSH_DEVICE_CERT."""
        self._ask("push_cert", chain)

    def activate(self, credential: bytes, secret: bytes) -> bytes:
        """ACTIVATE_CREDENTIAL: the device's answer."""
        return (
            _octets(self._ask("activate_credential", credential, secret, Scratch.FILE), "activated_secret")
            or b""
        )

    def token(self) -> TokenState:
        """GET_TOKEN_STATUS."""
        return _token(self._ask("token_status"))

    def create_token(self, pin: Secret) -> None:
        """CREATE_TOKEN."""
        self._ask("token_create", secrets=(pin, pin))

    def unlock_token(self, pin: Secret) -> None:
        """UNLOCK_TOKEN: whether a PIN is the right one; a wrong one costs a try."""
        self._ask("token_unlock", secrets=(pin,))

    def change_pin(self, old: Secret, new: Secret) -> None:
        """CHANGE_DEVICE_PIN."""
        self._ask("change_pin", secrets=(old, new, new))

    def replace_token(self, p12: bytes, password: Secret) -> None:
        """REPLACE_TOKEN."""
        self._ask("token_replace", p12, secrets=(password,))

    def complete(self) -> None:
        """SET_PROVISIONED."""
        self._ask("set_provisioned")

    def reboot(self) -> None:
        """REBOOT_DEVICE; the device says in its answer if that does not complete provisioning."""
        reply = self._ask("reboot")
        if "refusal" in reply:
            raise _refused("reboot", reply)

    def is_provisioned(self) -> bool:
        """GET_PROVISIONED."""
        return _boolean(self._ask("get_provisioned"), "device_is_provisioned")

    def is_closed(self, *words: Word) -> bool:
        """Whether a command is answered with CMD_UNSUPPORTED, as one of provisioning is in operation."""
        try:
            self._ask(*words)
        except ToolError as refused:
            if refused.code == "unreachable":
                raise
            return refused.code == "unsupported"
        return False

    def _ask(self, *words: Word, secrets: tuple[Secret, ...] = ()) -> Mapping[str, Any]:
        """Return the fields of the reply; ToolError if the device said no."""
        stdin = "".join(f"{secret.reveal()}\n" for secret in secrets).encode()
        options = ["--json", "--timeout", f"{TIMEOUT:g}"]
        output = self._transport.control([*options, *words], stdin=stdin, timeout=TIMEOUT)
        envelope = _envelope(output)
        verb = str(words[0])
        if output.code == OK:
            return _mapping(envelope, "reply")
        if output.code == UNSUPPORTED:
            raise ToolError(
                f"the device does not offer `control {verb}`",
                "it is not in provisioning mode, or its base system is of another kind",
                code="unsupported",
                evidence=f"exit code {output.code}",
            )
        if output.code == UNREACHABLE:
            error = envelope.get("error")
            raise unreachable(_shown(error.get("cause", "")) if isinstance(error, Mapping) else "")
        raise _refused(verb, envelope.get("reply"))


def _envelope(output: Output) -> Mapping[str, Any]:
    if len(output.stdout) > ANSWER_LIMIT:
        raise _nonsense(f"more than {ANSWER_LIMIT} bytes")
    try:
        envelope = json.loads(output.stdout)
    except (ValueError, RecursionError):
        said = _shown(output.stderr.decode(errors="replace").strip())
        raise unreachable(f"exit code {output.code}, no JSON on standard output: {said}") from None
    if (
        not isinstance(envelope, dict)
        or envelope.get("version") != JSON_VERSION
        or envelope.get("exit_code") != output.code
    ):
        raise _nonsense(f"not an answer of version {JSON_VERSION}")
    return envelope


def _refused(verb: str, reply: object) -> ToolError:
    """Return the device's refusal in its own words."""
    said = reply.get("refusal") if isinstance(reply, Mapping) else None
    if not isinstance(said, Mapping):
        said = {}
    response = reply.get("response", "") if isinstance(reply, Mapping) else ""
    return ToolError(
        _shown(said.get("cause", "")) or f"the device refused `control {verb}`",
        _shown(said.get("remedy", "")),
        code=_shown(said.get("code", "")) or "device-refused",
        evidence=_shown(said.get("evidence", "")) or _shown(response),
    )


def _shown(text: object) -> str:
    return visible(str(text))[:_TEXT_LIMIT]


def _nonsense(evidence: str) -> ToolError:
    return ToolError(
        "the device's answer makes no sense",
        "the device runs another version of the base system, or is not what it says",
        code="bad-answer",
        evidence=_shown(evidence),
    )


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    if not isinstance(value, Mapping):
        raise _nonsense(name)
    return value


def _boolean(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if not isinstance(value, bool):
        raise _nonsense(name)
    return value


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise _nonsense(name)
    return _shown(value)


def _uuid(values: Mapping[str, Any], name: str) -> UUID:
    try:
        uuid = UUID(_text(values, name))
    except ValueError:
        raise _nonsense(name) from None
    if uuid.int == 0:  # the core container's
        raise _nonsense(name)
    return uuid


def _digest(values: Mapping[str, Any], name: str) -> str | None:
    """Return a SHA-256, None where it is absent or empty."""
    value = values.get(name, "")
    if value == "":
        return None
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _nonsense(name)
    return value


def _octets(values: Mapping[str, Any], name: str) -> bytes | None:
    value = values.get(name)
    if value is None:
        return None
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        raise _nonsense(name) from None


def _requirement(values: object) -> Requirement:
    if not isinstance(values, Mapping):
        raise _nonsense("requirements")
    return Requirement(
        _text(values, "name"),
        _boolean(values, "met"),
        _boolean(values, "required"),
        _shown(values.get("detail", "")),
    )


def _token(reply: Mapping[str, Any]) -> TokenState:
    said = _mapping(reply, "token")
    default_pin, rounds = said.get("default_pin"), said.get("kdf_rounds")
    if not isinstance(default_pin, bool | None) or not (rounds is None or type(rounds) is int):
        raise _nonsense("token")
    return TokenState(_text(said, "kind"), _digest(said, "certificate_sha256"), default_pin, rounds)
