# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from trustme_init.control import gate
from trustme_init.control.dispatch import HANDLERS, NOT_YET
from trustme_init.control.gate import Socket, allows
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.provisioning.mode import Mode

P, O = Mode.PROVISIONING, Mode.OPERATIONAL  # noqa: E741 - the letters of the table below

# Written out from interop section 2.2 a second time, independently of gate.py.
BOTH_MODES = {1, 2, 3, 4, 5, 6, 20, 22, 31, 33, 34, 101, 102, 112, 115, 116, 117}
PROVISIONING_ONLY = {21, 23, 24, 25, 26, 30, 32, 40, 41, *range(104, 112), 113, 114, 118}
NEVER = {103}
# Ours: 42 is deprecated there and means the device's token here; from 300 on there is nothing there.
BOTH_MODES |= {42, 300, 301, 304, 306, 310, 312, 321, 322, 330}
PROVISIONING_ONLY |= {302, 303, 305, 311, 313, 314, 320}
UNPRIVILEGED = {1, 20, 330}

ALL = set(Request.Command.values())


def test_every_command_is_in_the_table_once() -> None:
    assert [rule.command for rule in gate.GATE] == sorted(ALL)


@pytest.mark.parametrize("command", sorted(ALL))
def test_each_cell_is_what_the_protocol_notes_say(command: int) -> None:
    assert allows(command, P, Socket.PRIVILEGED) == (command in BOTH_MODES | PROVISIONING_ONLY)
    assert allows(command, O, Socket.PRIVILEGED) == (command in BOTH_MODES)
    for mode in Mode:
        assert allows(command, mode, Socket.UNPRIVILEGED) == (command in UNPRIVILEGED)


def test_the_three_lists_above_cover_the_protocol() -> None:
    assert BOTH_MODES | PROVISIONING_ONLY | NEVER == ALL


def test_t11_a_container_can_never_register_a_local_authority() -> None:
    assert not any(allows(Request.REGISTER_LOCALCA, mode, Socket.UNPRIVILEGED) for mode in Mode)


@pytest.mark.parametrize("command", [0, -1, 7, 43, 119, 299, 307, 315, 323, 2**31 - 1])
def test_unknown_numbers_are_refused(command: int) -> None:
    assert not any(allows(command, mode, socket) for mode in Mode for socket in Socket)


def test_every_allowed_command_has_a_handler_or_is_named_as_missing() -> None:
    assert HANDLERS.keys() | NOT_YET == ALL - NEVER
    assert not HANDLERS.keys() & NOT_YET


def test_the_document_is_what_the_table_says() -> None:
    document = Path(__file__).parents[3] / "docs" / "control-gate.md"
    assert document.read_text(encoding="utf-8") == gate.as_markdown(), (
        "write it again with trustme_init.control.gate.as_markdown()"
    )
