# SPDX-License-Identifier: Apache-2.0
"""How replies are shown: sentences and tables, versioned JSON, or the original's protobuf text dump.

Every text that came from the device is made visible first: names and log lines may be a container's.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from trustme_init.control.sanitise import visible
from trustme_init.proto.container_pb2 import ContainerState, ContainerTrust
from trustme_init.proto.control_pb2 import AnchorPurpose, GuestOSState
from trustme_init.proto.control_pb2 import DaemonToController as Reply

JSON_VERSION: Final = 1

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
UNSUPPORTED: Final = 4
UNKNOWN_CONTAINER: Final = 5

EXIT_CODES: Final = f"""\
exit codes:
  {OK}  the device did it
  {FAILED}  the device said that it failed
  {USAGE}  wrong usage, or a local file that cannot be read or written
  {UNREACHABLE}  no usable answer: not running, not permitted, timed out, hung up or malformed
  {UNSUPPORTED}  not supported in the device's present mode, on this socket, or by this device
  {UNKNOWN_CONTAINER}  there is no such container
"""

_SENTENCES: Final = {
    Reply.CMD_OK: "Done.",
    Reply.CMD_FAILED: "The device could not do it; its log says why (control retrieve_logs).",
    Reply.CMD_UNSUPPORTED: "Not supported: not in this mode, not on this socket, or not by this device.",
    Reply.CONTAINER_START_OK: "Start begun; `control state` tells when the container is RUNNING.",
    Reply.CONTAINER_START_LOCK_FAILED: "Not started: its token could not be locked.",
    Reply.CONTAINER_START_UNLOCK_FAILED: "Not started: its token could not be unlocked.",
    Reply.CONTAINER_START_PASSWD_WRONG: "Not started: wrong PIN.",
    Reply.CONTAINER_START_EEXIST: "Not started: unknown, or already running.",
    Reply.CONTAINER_START_EINTERNAL: "Not started: internal error, see the device's log.",
    Reply.CONTAINER_START_TOKEN_UNINIT: "Not started: its token is not initialised.",
    Reply.CONTAINER_START_TOKEN_UNPAIRED: "Not started: its token is not paired yet (control change_pin).",
    Reply.CONTAINER_STOP_OK: "Stop begun; `control state` tells when the container is STOPPED.",
    Reply.CONTAINER_STOP_LOCK_FAILED: "Not stopped: its token could not be locked.",
    Reply.CONTAINER_STOP_UNLOCK_FAILED: "Not stopped: its token could not be unlocked.",
    Reply.CONTAINER_STOP_PASSWD_WRONG: "Not stopped: wrong PIN.",
    Reply.CONTAINER_STOP_FAILED_NOT_RUNNING: "Not stopped: it is not running.",
    Reply.CONTAINER_CTRL_EINTERNAL: "Internal error, see the device's log.",
    Reply.CONTAINER_CHANGE_PIN_FAILED: "The PIN was not changed.",
    Reply.CONTAINER_CHANGE_PIN_SUCCESSFUL: "The PIN was changed.",
    Reply.CONTAINER_LOCKED_TILL_REBOOT: "Too many wrong PINs: locked.",
    Reply.CONTAINER_USB_PIN_ENTRY_FAIL: "No PIN from the entry device.",
    Reply.DEVICE_PROVISIONING_ERROR: "The device could not be provisioned.",
    Reply.DEVICE_CERT_ERROR: "The device certificate was refused.",
    Reply.DEVICE_CERT_OK: "The device certificate was accepted.",
    Reply.GUESTOS_MGR_INSTALL_STARTED: "Installation started.",
    Reply.GUESTOS_MGR_INSTALL_FAILED: "Installation failed.",
    Reply.GUESTOS_MGR_INSTALL_WAITING: "Installation waits.",
    Reply.GUESTOS_MGR_INSTALL_COMPLETED: "Installation completed.",
    Reply.GUESTOS_MGR_REGISTER_CA_ERROR: "The certificate authority was refused.",
    Reply.GUESTOS_MGR_REGISTER_CA_OK: "The certificate authority was accepted.",
}

_GOOD: Final = frozenset(
    {
        Reply.CMD_OK,
        Reply.CONTAINER_START_OK,
        Reply.CONTAINER_STOP_OK,
        Reply.CONTAINER_CHANGE_PIN_SUCCESSFUL,
        Reply.DEVICE_CERT_OK,
        Reply.GUESTOS_MGR_INSTALL_STARTED,
        Reply.GUESTOS_MGR_INSTALL_WAITING,
        Reply.GUESTOS_MGR_INSTALL_COMPLETED,
        Reply.GUESTOS_MGR_REGISTER_CA_OK,
    }
)


def exit_code(reply: Reply) -> int:
    """Return the exit code that a reply means."""
    if reply.code == Reply.RESPONSE:
        if reply.response == Reply.CMD_UNSUPPORTED:
            return UNSUPPORTED
        return OK if reply.response in _GOOD else FAILED
    if reply.code == Reply.CONTAINER_CONFIG:
        return OK if reply.container_configs else FAILED
    if reply.code == Reply.DEVICE_CSR:
        return OK if reply.device_csr else FAILED
    if reply.code == Reply.LIFECYCLE_STATUS:
        return FAILED if reply.HasField("refusal") else OK
    return OK


def as_text(message: Message) -> str:
    """Return the protobuf text dump that the original prints; non-ASCII and control bytes come escaped."""
    return text_format.MessageToString(message)


def as_json(verb: str, code: int, **parts: Any) -> str:
    """Return the envelope: `version`, `verb`, `ok`, `exit_code` and the given parts."""
    envelope = {"version": JSON_VERSION, "verb": verb, "ok": code == OK, "exit_code": code, **parts}
    return json.dumps(envelope, indent=2) + "\n"


def as_dict(message: Message) -> dict[str, Any]:
    """Return the set fields by their protocol names: enums by name, bytes in base64, numbers as numbers."""
    result: dict[str, Any] = {}
    for field, value in message.ListFields():
        items = [_plain(field, item) for item in value] if field.is_repeated else None
        result[field.name] = _plain(field, value) if items is None else items
    return result


def _plain(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Message):
        return as_dict(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    return visible(value) if isinstance(value, bytes) else value


def readable(reply: Reply) -> str:
    """Return a reply as a table or sentence."""
    shown = _READERS.get(reply.code)
    return as_text(reply) if shown is None else shown(reply) + "\n"


def _response(reply: Reply) -> str:
    sentence = _SENTENCES[reply.response]
    return f"{sentence}\n{refusal(reply)}" if reply.HasField("refusal") else sentence


def refusal(reply: Reply) -> str:
    """Return why the device did not do it, a line each for what, evidence and remedy."""
    said = reply.refusal
    lines = [("why", f"{said.cause} ({said.code})"), ("evidence", said.evidence), ("remedy", said.remedy)]
    return "\n".join(f"  {name}: {visible(text)}" for name, text in lines if text)


def _containers(reply: Reply) -> str:
    shown = table(
        ("NAME", "STATE", "UPTIME", "GUESTOS", "TRUST", "TOKEN", "UUID"),
        [
            (
                status.name,
                "BROKEN" if status.problem else ContainerState.Name(status.state),
                _duration(status.uptime),
                status.guestos,
                "" if status.problem else ContainerTrust.Name(status.trust_level),
                status.token,
                status.uuid,
            )
            for status in reply.container_status
        ],
    )
    broken = [
        f"  {visible(status.uuid)}: {visible(status.problem)}"
        for status in reply.container_status
        if status.problem
    ]
    return "\n".join([shown, *(("Not to be started:", *broken) if broken else ())])


def _guestos(reply: Reply) -> str:
    configs = {(config.name, config.version): config for config in reply.guestos_configs}
    states = {(state.name, state.version): state for state in reply.guestos_states}
    rows = []
    for key in dict.fromkeys([*states, *configs]):
        config, state = configs.get(key), states.get(key)
        rows.append(
            (
                key[0],
                str(key[1]),
                _guestos_state(state),
                f"{state.size / (1 << 20):.1f}" if state is not None and state.size else "",
                config.hardware if config is not None else "",
                str(len(config.mounts)) if config is not None else "",
                config.description.en if config is not None else "",
            )
        )
    shown = table(("NAME", "VERSION", "STATE", "MIB", "HARDWARE", "IMAGES", "DESCRIPTION"), rows)
    return f"{shown}\n{refusal(reply)}" if reply.HasField("refusal") else shown


def _guestos_state(state: GuestOSState | None) -> str:
    """Return a word; a device of the original says nothing but that it has them."""
    if state is None:
        return "installed"
    if state.core:
        return "core"
    return f"NOT USED: {state.why_not}" if state.why_not else "installed"


def _uuids(reply: Reply) -> str:
    return "\n".join(visible(uuid) for uuid in reply.container_uuids)


def _configs(reply: Reply) -> str:
    if not reply.container_configs:
        sentence = "The device did not accept the configuration."
        return f"{sentence}\n{refusal(reply)}" if reply.HasField("refusal") else sentence
    return "\n".join(as_text(config).rstrip("\n") for config in reply.container_configs)


def _provisioned(reply: Reply) -> str:
    if reply.device_is_provisioned:
        return "The device is provisioned (operational mode)."
    return "The device is not provisioned (provisioning mode)."


def _stats(reply: Reply) -> str:
    stats = as_dict(reply.device_stats)
    return table(
        ("WHAT", "MIB"),
        [(name.replace("_", " "), f"{value / (1 << 20):.1f}") for name, value in stats.items()],
    )


def _ifaces(reply: Reply) -> str:
    return "\n".join(visible(name) for name in reply.container_ifaces) or "No interfaces."


def _handles_pin(reply: Reply) -> str:
    return (
        "The device asks for the PIN." if reply.container_cmld_handles_pin else "The client asks for the PIN."
    )


def _csr(reply: Reply) -> str:
    if reply.device_csr:
        key = "a key in its TPM" if reply.device_key_certification else "a software key"
        return f"Certificate signing request received, for {key}."
    sentence = "The device has no signing request."
    return f"{sentence}\n{refusal(reply)}" if reply.HasField("refusal") else sentence


def _provisioning(reply: Reply) -> str:
    status = reply.provisioning
    facts = [
        ("state", "completed (operational)" if status.completed else "not completed (provisioning)"),
        ("decided by", status.marker),
        ("build", "DEVELOPMENT" if status.development else "production"),
        ("device", status.device_uuid),
        ("device key", status.device_key_sha256),
        ("device certificate", status.device_certificate_sha256),
        ("endorsement key", status.endorsement_key_sha256),
        ("record", status.record_sha256),
    ]
    checklist = table(
        ("", "REQUIREMENT", "NEEDED", "DETAIL"),
        [
            ("x" if each.met else "-", each.name, "yes" if each.required else "no", each.detail)
            for each in status.requirements
        ],
    )
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {visible(value)}" for name, value in facts if value]
    return "\n".join([*lines, "", checklist])


def _authorities(reply: Reply) -> str:
    if not reply.authorities:
        return "No authorities are registered."
    return table(
        ("PURPOSE", "SHA-256", "UNTIL", "SOURCE", "SUBJECT"),
        [
            (
                AnchorPurpose.Name(each.purpose).removesuffix("_ANCHOR").lower(),
                each.sha256[:16],
                _day(each.not_after),
                each.source,
                each.subject,
            )
            for each in reply.authorities
        ],
    )


def _certificate(reply: Reply) -> str:
    info = reply.certificate
    lines = [
        f"Good: {visible(info.subject)}",
        f"  sha256: {visible(info.sha256)}",
        f"  anchor: {visible(info.anchor_sha256)}",
        f"  until:  {_day(info.not_after)}",
    ]
    return "\n".join([*lines, f"  device: {visible(info.device_uuid)}"] if info.device_uuid else lines)


def _token(reply: Reply) -> str:
    token = reply.token
    if token.kind == "none":
        return "The device has no token."
    pin = "set by its owner"
    if not token.HasField("default_pin"):
        pin = "not known before the token was unlocked once"
    elif token.default_pin:
        pin = "the published one of development builds"
    return (
        f"Token: {visible(token.kind)}\n  certificate: {visible(token.certificate_sha256)}\n"
        f"  PIN: {pin}; {token.tries_left} tries left\n  KDF rounds: {token.kdf_rounds}"
    )


def _lifecycle(reply: Reply) -> str:
    status = reply.lifecycle
    known = "the TPM knows them" if status.in_tpm else "only a file knows them, for there is no TPM"
    lines = [f"Statements obeyed: {status.applied}, the last with serial {status.last_serial}; {known}."]
    if status.next_key_sha256:
        lines.append(f"The next device key waits for its certificate: {visible(status.next_key_sha256)}")
    if reply.HasField("refusal"):
        lines += ["No statement is obeyed, and nothing is done with keys, anchors or token:", refusal(reply)]
    return "\n".join(lines)


def _activated(_reply: Reply) -> str:
    return "The TPM answered the challenge."


def _day(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"
    except (OverflowError, OSError, ValueError):
        return str(seconds)


_READERS: Final = {
    Reply.RESPONSE: _response,
    Reply.CONTAINER_STATUS: _containers,
    Reply.CONTAINERS_LIST: _uuids,
    Reply.CONTAINER_CONFIG: _configs,
    Reply.GUESTOS_CONFIGS_LIST: _guestos,
    Reply.DEVICE_PROVISIONED_STATE: _provisioned,
    Reply.DEVICE_STATS: _stats,
    Reply.CONTAINER_IFACES: _ifaces,
    Reply.CONTAINER_CMLD_HANDLES_PIN: _handles_pin,
    Reply.DEVICE_CSR: _csr,
    Reply.PROVISIONING_STATUS: _provisioning,
    Reply.AUTHORITIES_LIST: _authorities,
    Reply.CERTIFICATE_INFO: _certificate,
    Reply.TOKEN_STATUS: _token,
    Reply.CREDENTIAL_ACTIVATED: _activated,
    Reply.LIFECYCLE_STATUS: _lifecycle,
}


def table(head: Sequence[str], rows: Sequence[Sequence[str | bytes]]) -> str:
    """Return left-aligned columns under a head line."""
    lines = [head, *([visible(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (
        f"{days}d {hours:02}:{minutes:02}:{seconds:02}" if days else f"{hours:02}:{minutes:02}:{seconds:02}"
    )
