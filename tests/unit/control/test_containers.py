# SPDX-License-Identifier: Apache-2.0
"""What the commands on containers ask of the device, and what they answer (interop section 2.3)."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.unit.control.fake_device import CORE_UUID, GUEST_UUID, FakeDevice
from trustme_init.control.dispatch import Dispatcher
from trustme_init.control.gate import Socket
from trustme_init.control.transport import Wait
from trustme_init.errors import ControlRefusal, Refusal, TokenRefusal
from trustme_init.proto.control_pb2 import ContainerStartParams
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.provisioning.mode import Mode

NOBODY = "77777777-2222-3333-4444-555555555555"
TEXT = b'name: "guest" guest_os: "exampleos"'


class Asked:
    """A device and the one reply to each request."""

    def __init__(self, **outcomes: dict[str, Any] | Refusal) -> None:
        self.device = FakeDevice()
        self.device.guests.outcomes |= outcomes

    def __call__(self, command: Request.Command.ValueType, *uuids: str, **fields: Any) -> Reply:
        dispatcher = Dispatcher(self.device, log=lambda _: None)
        body = Request(command=command, container_uuids=uuids, **fields).SerializeToString()
        replies = []
        for each in dispatcher.answer(body, Socket.PRIVILEGED, lambda _: True):
            if isinstance(each, Wait):
                each.start(lambda: None)
            elif isinstance(each, bytes):
                replies.append(Reply.FromString(each))
        (reply,) = replies
        return reply

    @property
    def guests(self) -> list[tuple[Any, ...]]:
        return self.device.guests.asked


def key(pin: str) -> dict[str, ContainerStartParams]:
    return {"container_start_params": ContainerStartParams(key=pin)}


START, STOP = Request.CONTAINER_START, Request.CONTAINER_STOP


@pytest.mark.parametrize(
    ("code", "start", "stop"),
    [
        ("container-running", Reply.CONTAINER_START_EEXIST, Reply.CONTAINER_CTRL_EINTERNAL),
        ("container-not-running", Reply.CONTAINER_START_EINTERNAL, Reply.CONTAINER_STOP_FAILED_NOT_RUNNING),
        ("token-pin-missing", Reply.CONTAINER_START_PASSWD_WRONG, Reply.CONTAINER_STOP_PASSWD_WRONG),
        ("token-wrong-pin", Reply.CONTAINER_START_PASSWD_WRONG, Reply.CONTAINER_STOP_PASSWD_WRONG),
        ("token-locked", Reply.CONTAINER_LOCKED_TILL_REBOOT, Reply.CONTAINER_LOCKED_TILL_REBOOT),
        ("token-attempts-damaged", Reply.CONTAINER_LOCKED_TILL_REBOOT, Reply.CONTAINER_LOCKED_TILL_REBOOT),
        ("token-unpaired", Reply.CONTAINER_START_TOKEN_UNPAIRED, Reply.CONTAINER_STOP_UNLOCK_FAILED),
        ("token-uninitialised", Reply.CONTAINER_START_TOKEN_UNINIT, Reply.CONTAINER_STOP_UNLOCK_FAILED),
        ("token-malformed", Reply.CONTAINER_START_UNLOCK_FAILED, Reply.CONTAINER_STOP_UNLOCK_FAILED),
        ("wrapped-key-damaged", Reply.CONTAINER_START_UNLOCK_FAILED, Reply.CONTAINER_STOP_UNLOCK_FAILED),
        ("container-key-lost", Reply.CONTAINER_START_UNLOCK_FAILED, Reply.CONTAINER_STOP_UNLOCK_FAILED),
        ("volume-size-changed", Reply.CONTAINER_START_EINTERNAL, Reply.CONTAINER_CTRL_EINTERNAL),
        ("vault-ended", Reply.CONTAINER_START_EINTERNAL, Reply.CONTAINER_CTRL_EINTERNAL),
    ],
)
def test_every_refusal_has_its_code_and_says_why(code: str, start: int, stop: int) -> None:
    refusal = TokenRefusal(code, "a cause", evidence="evidence", remedy="a remedy")
    ask = Asked(start=refusal, stop=refusal)
    for command, wanted in ((START, start), (STOP, stop)):
        reply = ask(command, GUEST_UUID, **key("1234"))
        assert (reply.response, reply.refusal.code, reply.refusal.remedy) == (wanted, code, "a remedy")


def test_start_and_stop_pass_the_pin_on_and_take_none_for_none() -> None:
    ask = Asked()
    assert ask(START, GUEST_UUID, **key("1234")).response == Reply.CONTAINER_START_OK
    assert ask(STOP, GUEST_UUID, **key("1234")).response == Reply.CONTAINER_STOP_OK
    ask(START, GUEST_UUID)
    ask(START, GUEST_UUID, container_start_params=ContainerStartParams(no_switch=True))
    assert ask.guests == [
        ("start", GUEST_UUID, "1234"),
        ("stop", GUEST_UUID, "1234"),
        ("start", GUEST_UUID, None),
        ("start", GUEST_UUID, None),  # the field's default of 128 zeros is no PIN that anybody gave
    ]


def test_setup_mode_is_refused_by_name_before_a_pin_is_tried() -> None:
    ask = Asked()
    params = ContainerStartParams(key="1234", setup=True)
    reply = ask(START, GUEST_UUID, container_start_params=params)
    assert (reply.response, reply.refusal.code) == (Reply.CONTAINER_START_EINTERNAL, "setup-mode-missing")
    assert ask.guests == []


@pytest.mark.parametrize("uuids", [(), (NOBODY,), (GUEST_UUID, CORE_UUID)])
@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (START, Reply.CONTAINER_START_EEXIST),
        (STOP, Reply.CMD_FAILED),
        (Request.REMOVE_CONTAINER, Reply.CMD_FAILED),
        (Request.CONTAINER_WIPE, Reply.CMD_FAILED),
        (Request.CONTAINER_CMLD_HANDLES_PIN, Reply.CMD_FAILED),
        (Request.CONTAINER_CHANGE_TOKEN_PIN, Reply.CONTAINER_CHANGE_PIN_FAILED),
    ],
)
def test_row34_an_unknown_container_is_answered(
    command: Request.Command.ValueType, wanted: int, uuids: tuple[str, ...]
) -> None:
    ask = Asked()
    reply = ask(command, *uuids)
    assert (reply.response, reply.refusal.code) == (wanted, "container-unknown")
    assert ask.guests == []


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (START, Reply.CMD_UNSUPPORTED),
        (STOP, Reply.CMD_UNSUPPORTED),
        (Request.REMOVE_CONTAINER, Reply.CMD_FAILED),
        (Request.CONTAINER_WIPE, Reply.CMD_FAILED),
        (Request.CONTAINER_CHANGE_TOKEN_PIN, Reply.CONTAINER_CHANGE_PIN_FAILED),
    ],
)
def test_nothing_is_done_to_the_core(command: Request.Command.ValueType, wanted: int) -> None:
    ask = Asked()
    assert ask(command, CORE_UUID, **key("1234")).response == wanted
    assert ask.guests == []
    update = ask(Request.CONTAINER_UPDATE_CONFIG, CORE_UUID, container_config_file=TEXT)
    assert (list(update.container_configs), update.refusal.code) == ([], "container-is-core")


def test_create_and_update_answer_with_the_configuration_or_with_why_there_is_none() -> None:
    said = {"uuid": GUEST_UUID, "config": base64.b64encode(TEXT).decode()}
    ask = Asked(create=said, update=said)
    fields = {
        "container_config_file": TEXT,
        "container_config_signature": b"signature",
        "container_config_certificate": b"certificate",
    }
    for reply in (
        ask(Request.CREATE_CONTAINER, **fields),
        ask(Request.CONTAINER_UPDATE_CONFIG, GUEST_UUID, **fields),
    ):
        assert reply.code == Reply.CONTAINER_CONFIG
        assert [each.name for each in reply.container_configs] == ["guest"]
        assert list(reply.container_uuids) == [GUEST_UUID]
    assert ask.guests == [
        ("create", TEXT, b"signature", b"certificate"),
        ("update", GUEST_UUID, TEXT, b"signature", b"certificate"),
    ]
    refused = Asked(create=ControlRefusal("container-exists", "there is one"))(
        Request.CREATE_CONTAINER, **fields
    )
    assert (refused.code, list(refused.container_configs)) == (Reply.CONTAINER_CONFIG, [])
    assert (list(refused.container_uuids), refused.refusal.code) == ([], "container-exists")


def test_the_pin_change_answers_with_its_own_codes() -> None:
    fields = {"device_pin": "", "device_newpin": "new"}
    change = Request.CONTAINER_CHANGE_TOKEN_PIN
    ask = Asked()
    assert ask(change, GUEST_UUID, **fields).response == Reply.CONTAINER_CHANGE_PIN_SUCCESSFUL
    assert ask.guests == [("change_pin", GUEST_UUID, "", "new")]
    for code, wanted in (
        ("token-wrong-pin", Reply.CONTAINER_CHANGE_PIN_FAILED),
        ("token-locked", Reply.CONTAINER_LOCKED_TILL_REBOOT),
    ):
        reply = Asked(change_pin=TokenRefusal(code, "a cause"))(change, GUEST_UUID, **fields)
        assert reply.response == wanted


def test_the_rest_is_done_or_failed() -> None:
    for name, command in (("remove", Request.REMOVE_CONTAINER), ("wipe", Request.CONTAINER_WIPE)):
        ask = Asked()
        assert ask(command, GUEST_UUID).response == Reply.CMD_OK
        assert ask.guests == [(name, GUEST_UUID)]
        failed = Asked(**{name: ControlRefusal("container-running", "it runs")})(command, GUEST_UUID)
        assert (failed.response, failed.refusal.code) == (Reply.CMD_FAILED, "container-running")
    assert Asked()(Request.RELOAD_CONTAINERS).response == Reply.CMD_OK
    handles = Asked()(Request.CONTAINER_CMLD_HANDLES_PIN, GUEST_UUID)
    assert (handles.code, handles.container_cmld_handles_pin) == (Reply.CONTAINER_CMLD_HANDLES_PIN, False)


def test_in_operation_what_takes_data_away_is_not_offered() -> None:
    for command in (Request.REMOVE_CONTAINER, Request.CONTAINER_WIPE, Request.RELOAD_CONTAINERS):
        ask = Asked()
        ask.device.current_mode = Mode.OPERATIONAL
        assert ask(command, GUEST_UUID).response == Reply.CMD_UNSUPPORTED
        assert ask.guests == []
