# SPDX-License-Identifier: Apache-2.0
"""Which command is answered in which mode on which socket (interop section 2.2), as data.

Rules:

- What is not in the table is refused. A refusal is `RESPONSE CMD_UNSUPPORTED`.
- The table says what is *allowed*; control.dispatch says what exists. Neither hides gaps of the other.
- An unprivileged socket (of a container whose GuestOS may install guests) has three commands, in either mode.

Differences from the original, on purpose: REGISTER_LOCALCA is never open on an unprivileged socket, where
the original lets a container replace the local root of a provisioned device (interop T11).
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.provisioning.mode import Mode


class Socket(enum.Enum):
    """Who is at the other end: the core container, or a container that may install guests."""

    PRIVILEGED = "privileged"
    UNPRIVILEGED = "unprivileged"


ALWAYS: Final = frozenset(Mode)
PROVISIONING: Final = frozenset({Mode.PROVISIONING})
NEVER: Final[frozenset[Mode]] = frozenset()


class Rule(NamedTuple):
    """In which modes one command is answered on each kind of socket."""

    command: int
    privileged: frozenset[Mode]
    unprivileged: frozenset[Mode] = NEVER
    note: str = ""


GATE: Final = (
    Rule(Request.LIST_GUESTOS_CONFIGS, ALWAYS, ALWAYS),
    Rule(Request.LIST_CONTAINERS, ALWAYS),
    Rule(Request.GET_CONTAINER_STATUS, ALWAYS),
    Rule(Request.GET_CONTAINER_CONFIG, ALWAYS),
    Rule(Request.GET_LAST_LOG, ALWAYS),
    Rule(Request.GET_DEVICE_STATS, ALWAYS),
    Rule(Request.PUSH_GUESTOS_CONFIG, ALWAYS, ALWAYS, "verified against the anchors whoever sends it"),
    Rule(Request.RELOAD_CONTAINERS, PROVISIONING),
    Rule(Request.CREATE_CONTAINER, ALWAYS),
    Rule(Request.REMOVE_CONTAINER, PROVISIONING),
    Rule(Request.REGISTER_LOCALCA, PROVISIONING, NEVER, "the original leaves it open to containers (T11)"),
    Rule(Request.REGISTER_NEWCA, PROVISIONING),
    Rule(Request.REMOVE_GUESTOS, PROVISIONING),
    Rule(Request.WIPE_DEVICE, PROVISIONING),
    Rule(Request.REBOOT_DEVICE, ALWAYS),
    Rule(Request.SET_PROVISIONED, PROVISIONING),
    Rule(Request.GET_PROVISIONED, ALWAYS),
    Rule(Request.DESTROY_SYSTEM, ALWAYS),
    Rule(Request.PULL_DEVICE_CSR, PROVISIONING),
    Rule(Request.PUSH_DEVICE_CERT, PROVISIONING),
    Rule(Request.CHANGE_DEVICE_PIN, ALWAYS, NEVER, "of the device's token; deprecated in the original"),
    Rule(Request.CONTAINER_START, ALWAYS),
    Rule(Request.CONTAINER_STOP, ALWAYS),
    Rule(Request.CONTAINER_SWITCH, NEVER, NEVER, "never answered in the original"),
    Rule(Request.CONTAINER_FREEZE, PROVISIONING),
    Rule(Request.CONTAINER_UNFREEZE, PROVISIONING),
    Rule(Request.CONTAINER_WIPE, PROVISIONING),
    Rule(Request.CONTAINER_SNAPSHOT, PROVISIONING),
    Rule(Request.CONTAINER_ALLOWAUDIO, PROVISIONING),
    Rule(Request.CONTAINER_DENYAUDIO, PROVISIONING),
    Rule(Request.CONTAINER_ASSIGNIFACE, PROVISIONING),
    Rule(Request.CONTAINER_UNASSIGNIFACE, PROVISIONING),
    Rule(Request.CONTAINER_LIST_IFACES, ALWAYS),
    Rule(Request.CONTAINER_EXEC_CMD, PROVISIONING),
    Rule(Request.CONTAINER_EXEC_INPUT, PROVISIONING),
    Rule(Request.CONTAINER_UPDATE_CONFIG, ALWAYS),
    Rule(Request.CONTAINER_CHANGE_TOKEN_PIN, ALWAYS),
    Rule(Request.CONTAINER_CMLD_HANDLES_PIN, ALWAYS),
    Rule(Request.CONTAINER_DEV_ACCESS, PROVISIONING),
    Rule(Request.GET_PROVISIONING_STATUS, ALWAYS, NEVER, "ours, as all from here on"),
    Rule(Request.LIST_AUTHORITIES, ALWAYS),
    Rule(Request.REMOVE_AUTHORITY, PROVISIONING),
    Rule(Request.REGISTER_DEVICE_CA, PROVISIONING),
    Rule(Request.VERIFY_DEVICE_CERT, ALWAYS),
    Rule(Request.ACTIVATE_CREDENTIAL, PROVISIONING),
    Rule(Request.VERIFY_GUESTOS, ALWAYS),
    Rule(Request.GET_TOKEN_STATUS, ALWAYS),
    Rule(Request.CREATE_TOKEN, PROVISIONING),
    Rule(Request.UNLOCK_TOKEN, ALWAYS),
    Rule(Request.REPLACE_TOKEN, PROVISIONING),
    Rule(Request.REMOVE_TOKEN, PROVISIONING),
    Rule(Request.REGISTER_LIFECYCLE_CA, PROVISIONING),
    Rule(Request.APPLY_STATEMENT, ALWAYS, NEVER, "refused by name in provisioning, where none is needed"),
    Rule(Request.GET_LIFECYCLE_STATUS, ALWAYS),
    Rule(Request.PUSH_GUESTOS_IMAGE, ALWAYS, ALWAYS, "for the process whose GuestOS is being installed"),
)

_RULES: Final = {rule.command: rule for rule in GATE}


def allows(command: int, mode: Mode, socket: Socket) -> bool:
    """Whether `command` is answered; False for any number the table does not name."""
    rule = _RULES.get(command)
    if rule is None:
        return False
    return mode in (rule.privileged if socket is Socket.PRIVILEGED else rule.unprivileged)


def as_markdown() -> str:
    """Return the table as the text of `docs/control-gate.md`."""
    heads = [f"{socket.value}, {mode.value}" for socket in Socket for mode in Mode]
    lines = [
        "# Control gate",
        "",
        "Generated from `src/trustme_init/control/gate.py`; a test compares the two. Which command is",
        "answered in which mode on which socket. Everything else gets `RESPONSE CMD_UNSUPPORTED`.",
        "",
        f"| # | Command | {' | '.join(heads)} | Note |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for rule in GATE:
        name = Request.Command.Name(rule.command)  # type: ignore[arg-type]  # the rows hold these very values
        cells = ["yes" if allows(rule.command, mode, socket) else "-" for socket in Socket for mode in Mode]
        lines.append(f"| {rule.command} | {name} | {' | '.join(cells)} | {rule.note} |")
    return "\n".join(lines) + "\n"
