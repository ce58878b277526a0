# SPDX-License-Identifier: Apache-2.0
"""The mode machine: which operation is allowed in which state, and the state it leads to. One table.

An operation that is not in a state's column is refused there and changes nothing. An operation that is
refused for another reason, or cut by a power failure before its commit point, leaves the state as it was;
after its commit point the next boot finds the new state. A reboot by itself leads nowhere: what an orderly
reboot does is to try `complete` first.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from trustme_init.errors import ControlRefusal
from trustme_init.provisioning.mode import Mode


class State(enum.Enum):
    """What a device can be as far as provisioning goes, while its base system runs."""

    PROVISIONING = "provisioning"
    OPERATIONAL = "operational"
    DESTROYED = "destroyed"


P, O, D = State  # noqa: E741 - the letters of the table
_ALWAYS: Final = {P: P, O: O}
_FIRST: Final = {P: P}

TABLE: Final[Mapping[str, Mapping[State, State]]] = {
    # operation            in → to
    "prepare": _FIRST,
    "complete": {P: O},
    "settle": {O: O},
    "status": _ALWAYS,
    "csr": _FIRST,
    "push-certificate": _FIRST,
    "activate": _FIRST,
    "verify-certificate": _ALWAYS,
    "verify-guestos": _ALWAYS,
    "add-authority": _FIRST,
    "remove-authority": _FIRST,
    "authorities": _ALWAYS,
    "token-status": _ALWAYS,
    "token-create": _FIRST,
    "token-unlock": _ALWAYS,
    "token-change-pin": _ALWAYS,
    "token-replace": _FIRST,
    "token-remove": _FIRST,
    "apply-statement": {O: O},
    "lifecycle-status": _ALWAYS,
    "wipe": _FIRST,
    "destroy": {P: D, O: D},
    "containers": _ALWAYS,
    "container": _ALWAYS,
    "container-create": _ALWAYS,
    "container-update": _ALWAYS,
    "container-remove": _FIRST,
    "container-wipe": _FIRST,
    "container-open": _ALWAYS,
    "container-change-pin": _ALWAYS,
    "container-check-pin": _ALWAYS,
    "guestos-examine": _ALWAYS,
    "guestos-stage": _ALWAYS,
    "guestos-publish": _ALWAYS,
    "guestos-discard": _ALWAYS,
    "guestos-list": _ALWAYS,
    "guestos-config": _ALWAYS,
    "guestos-remove": _FIRST,
    "guestos-tidy": _ALWAYS,
}


def after(state: State, operation: str) -> State:
    """Return the state that a successful operation leads to.

    Raises:
        ControlRefusal: "operation-unknown", "provisioning-closed" (of provisioning, and that is over),
            "provisioning-open" (of operation, and that has not begun), "device-destroyed".
    """
    row = TABLE.get(operation)
    if row is None:
        raise ControlRefusal("operation-unknown", "there is no such operation", evidence=operation[:64])
    if state in row:
        return row[state]
    if state is State.DESTROYED:
        raise destroyed()
    if state is State.PROVISIONING:
        raise ControlRefusal(
            "provisioning-open",
            "the device is still in provisioning; this is for when that is over",
            evidence=operation,
            remedy="in provisioning, change it directly (`control --help`); no statement is needed",
        )
    raise ControlRefusal(
        "provisioning-closed",
        "provisioning was completed; this is not to be had any more",
        evidence=operation,
        remedy="a new device identity needs a cleared TPM and an empty data volume",
    )


def of_mode(mode: Mode) -> State:
    """Return the state that a mode stands for."""
    return State.PROVISIONING if mode is Mode.PROVISIONING else State.OPERATIONAL


def destroyed() -> ControlRefusal:
    """Return the refusal of a device that was told to end."""
    return ControlRefusal(
        "device-destroyed",
        "this device was destroyed on command: its keys are gone",
        remedy="write the image to the disk again and provision it as a new device",
    )
