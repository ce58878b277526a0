# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.control.fake_device import CORE, CORE_UUID, COREOS, GUEST_UUID, SERVICE_UUID, FakeDevice
from trustme_init.control.dispatch import NOT_YET, Dispatcher
from trustme_init.control.gate import Socket
from trustme_init.control.handlers.logs import FRAGMENT, LOG_LIMIT
from trustme_init.control.handlers.reply import Context, Replies, response
from trustme_init.control.state import LogFile
from trustme_init.control.transport import Flush, Wait
from trustme_init.errors import CompartmentRefusal
from trustme_init.proto.container_pb2 import NONE, ContainerConfig
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.provisioning.mode import Mode

UNKNOWN_UUID = "deadbeef-0000-0000-0000-000000000000"


class Asker:
    """A dispatcher, its device and what it logged."""

    def __init__(self, device: FakeDevice | None = None, socket: Socket = Socket.PRIVILEGED) -> None:
        self.device = device or FakeDevice()
        self.socket = socket
        self.log: list[str] = []
        self.dispatcher = Dispatcher(self.device, log=self.log.append)

    def raw(self, body: bytes) -> list[Reply]:
        replies = []
        for part in self.dispatcher.answer(body, self.socket, lambda _body: False):
            match part:
                case Wait(start=start):
                    start(lambda: None)
                case bytes():
                    replies.append(Reply.FromString(part))
        return replies

    def all(self, request: Request) -> list[Reply]:
        return self.raw(request.SerializeToString())

    def one(self, request: Request) -> Reply:
        (reply,) = self.all(request)
        return reply

    def code(self, request: Request) -> int:
        reply = self.one(request)
        assert reply.code == Reply.RESPONSE
        return reply.response


def ask(command: Request.Command.ValueType, *uuids: str, **fields: object) -> Request:
    return Request(command=command, container_uuids=uuids, **fields)  # type: ignore[arg-type]


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([number])


# Always an answer


@given(body=st.binary(max_size=400))
def test_row34_any_bytes_get_an_answer(body: bytes) -> None:
    replies = Asker().raw(body)
    assert replies
    assert all(reply.IsInitialized() for reply in replies)


@given(
    command=st.sampled_from(sorted(Request.Command.values())),
    rest=st.binary(max_size=200),
    mode=st.sampled_from(Mode),
    socket=st.sampled_from(Socket),
)
def test_row34_any_command_with_any_fields_gets_an_answer(
    command: int, rest: bytes, mode: Mode, socket: Socket
) -> None:
    assert Asker(FakeDevice(current_mode=mode), socket).raw(b"\x08" + varint(command) + rest)


@pytest.mark.parametrize("body", [b"", b"\x08\x7f", b"\x08\x00", b"\x52\x02ab"])
def test_row34_no_command_or_an_unknown_one_is_unsupported(body: bytes) -> None:
    (reply,) = Asker().raw(body)
    assert (reply.code, reply.response) == (Reply.RESPONSE, Reply.CMD_UNSUPPORTED)


@pytest.mark.parametrize("body", [b"\xff", b"\x08", b"\x0a\x05ab", b"\x52\x00" * 100_000])
def test_row34_what_cannot_be_parsed_has_failed(body: bytes) -> None:
    asker = Asker()
    (reply,) = asker.raw(body)
    assert (reply.code, reply.response) == (Reply.RESPONSE, Reply.CMD_FAILED)
    assert len(asker.log) == 1


@pytest.mark.parametrize("command", sorted(NOT_YET))
def test_not_yet_is_unsupported_and_silent(command: Request.Command.ValueType) -> None:
    asker = Asker()
    assert asker.code(ask(command, GUEST_UUID)) == Reply.CMD_UNSUPPORTED
    assert asker.log == []


def test_the_mode_gates() -> None:
    calls: list[int] = []

    def handler(context: Context) -> Replies:
        calls.append(context.request.command)
        yield response(Reply.CMD_OK)

    device = FakeDevice()
    dispatcher = Dispatcher(device, log=print, handlers={Request.SET_PROVISIONED: handler})
    body = ask(Request.SET_PROVISIONED).SerializeToString()

    def code(socket: Socket) -> int:
        (part,) = dispatcher.answer(body, socket, lambda _body: False)
        assert isinstance(part, bytes)
        return Reply.FromString(part).response

    assert code(Socket.PRIVILEGED) == Reply.CMD_OK
    assert code(Socket.UNPRIVILEGED) == Reply.CMD_UNSUPPORTED
    device.current_mode = Mode.OPERATIONAL
    assert code(Socket.PRIVILEGED) == Reply.CMD_UNSUPPORTED
    assert calls == [Request.SET_PROVISIONED]


def test_row34_a_failing_handler_is_cmd_failed_and_logged() -> None:
    for failure in (CompartmentRefusal("some-code", "why"), KeyError("x"), RecursionError()):
        asker = Asker(FakeDevice(failure=failure))
        assert asker.code(ask(Request.LIST_CONTAINERS)) == Reply.CMD_FAILED
        assert "LIST_CONTAINERS" in asker.log[0]
        assert type(failure).__name__ in asker.log[0]


def test_row34_a_failing_mode_is_cmd_failed_for_unknown_commands_too() -> None:
    class Broken(FakeDevice):
        def mode(self) -> Mode:
            raise OSError("no marker")

    assert Asker(Broken()).raw(b"")[0].response == Reply.CMD_FAILED
    assert Asker(Broken()).code(ask(Request.GET_PROVISIONED)) == Reply.CMD_FAILED


def test_a_later_message_goes_to_the_connection_that_asked() -> None:
    pushed: list[bytes] = []
    keep: list[Context] = []

    def handler(context: Context) -> Replies:
        keep.append(context)
        yield response(Reply.GUESTOS_MGR_INSTALL_STARTED)

    dispatcher = Dispatcher(FakeDevice(), log=print, handlers={Request.PUSH_GUESTOS_CONFIG: handler})

    def push(body: bytes) -> bool:
        pushed.append(body)
        return True

    assert (
        len(
            list(
                dispatcher.answer(
                    ask(Request.PUSH_GUESTOS_CONFIG).SerializeToString(), Socket.PRIVILEGED, push
                )
            )
        )
        == 1
    )
    assert keep[0].later(response(Reply.GUESTOS_MGR_INSTALL_COMPLETED))
    assert Reply.FromString(pushed[0]).response == Reply.GUESTOS_MGR_INSTALL_COMPLETED


# Containers


def test_list_containers() -> None:
    asker = Asker()
    reply = asker.one(ask(Request.LIST_CONTAINERS))
    assert (reply.code, list(reply.container_uuids)) == (Reply.CONTAINERS_LIST, [CORE_UUID, GUEST_UUID])
    reply = asker.one(ask(Request.LIST_CONTAINERS, system_services=True))
    assert list(reply.container_uuids) == [CORE_UUID, GUEST_UUID, SERVICE_UUID]


def test_status() -> None:
    asker = Asker()
    reply = asker.one(ask(Request.GET_CONTAINER_STATUS))
    assert reply.code == Reply.CONTAINER_STATUS
    assert [status.uuid for status in reply.container_status] == [CORE_UUID, GUEST_UUID]
    core = reply.container_status[0]
    assert (core.name, core.uptime, core.created, core.guestos) == (
        CORE.name,
        CORE.uptime,
        CORE.created,
        CORE.guest_os,
    )
    named = asker.one(ask(Request.GET_CONTAINER_STATUS, SERVICE_UUID, UNKNOWN_UUID, SERVICE_UUID))
    assert [status.uuid for status in named.container_status] == [SERVICE_UUID]


@pytest.mark.parametrize("command", [Request.GET_CONTAINER_STATUS, Request.GET_CONTAINER_CONFIG])
def test_row34_only_unknown_uuids_have_failed(command: Request.Command.ValueType) -> None:
    assert Asker().code(ask(command, UNKNOWN_UUID, "", "x" * 1000)) == Reply.CMD_FAILED
    assert Asker().raw(b"\x08" + bytes([command]) + b"\x52\x02\xff\xfe")[0].response == Reply.CMD_FAILED


def test_row34_naming_one_container_often_does_not_make_a_large_reply() -> None:
    reply = Asker().one(ask(Request.GET_CONTAINER_CONFIG, *[CORE_UUID] * 1000))
    assert len(reply.container_configs) == 1


def test_config_is_serialisable_and_parallel_to_uuids() -> None:
    reply = Asker().one(ask(Request.GET_CONTAINER_CONFIG))
    assert reply.code == Reply.CONTAINER_CONFIG
    assert list(reply.container_uuids) == [CORE_UUID, GUEST_UUID]
    core = reply.container_configs[0]
    assert core.HasField("color")
    assert (core.name, core.guest_os, core.guestos_version, core.ram_limit, core.token_type) == (
        "core0",
        "trustme-coreos",
        7,
        512,
        NONE,
    )


def test_a_text_configuration_without_color_is_completed() -> None:
    from dataclasses import replace

    stored = ContainerConfig(name="core0", guest_os="x", allow_dev=["b 8:* rwm"])
    asker = Asker(FakeDevice(views=[replace(CORE, config=stored)]))
    sent = asker.one(ask(Request.GET_CONTAINER_CONFIG, CORE_UUID)).container_configs[0]
    assert sent.HasField("color")
    assert list(sent.allow_dev) == ["b 8:* rwm"]
    assert not stored.HasField("color"), "the stored configuration is left alone"


@pytest.mark.parametrize(
    ("uuids", "start", "stop"),
    [
        ((CORE_UUID,), Reply.CMD_UNSUPPORTED, Reply.CMD_UNSUPPORTED),
        ((UNKNOWN_UUID,), Reply.CONTAINER_START_EEXIST, Reply.CMD_FAILED),
        ((), Reply.CONTAINER_START_EEXIST, Reply.CMD_FAILED),
        ((CORE_UUID, CORE_UUID), Reply.CONTAINER_START_EEXIST, Reply.CMD_FAILED),
    ],
)
def test_row34_start_and_stop_always_answer(uuids: tuple[str, ...], start: int, stop: int) -> None:
    assert Asker().code(ask(Request.CONTAINER_START, *uuids)) == start
    assert Asker().code(ask(Request.CONTAINER_STOP, *uuids)) == stop


# GuestOS, device


def test_guestos_list_on_both_sockets() -> None:
    for socket in Socket:
        reply = Asker(socket=socket).one(ask(Request.LIST_GUESTOS_CONFIGS))
        assert reply.code == Reply.GUESTOS_CONFIGS_LIST
        assert list(reply.guestos_configs) == [COREOS]


def test_stats_and_provisioned() -> None:
    asker = Asker()
    stats = asker.one(ask(Request.GET_DEVICE_STATS))
    assert stats.code == Reply.DEVICE_STATS
    assert (stats.device_stats.disk_system, stats.device_stats.mem_total) == (1000, 1 << 30)
    assert not stats.device_stats.HasField("disk_containers")
    for mode in Mode:
        asker.device.current_mode = mode
        reply = asker.one(ask(Request.GET_PROVISIONED))
        assert reply.code == Reply.DEVICE_PROVISIONED_STATE
        assert reply.device_is_provisioned is (mode is Mode.OPERATIONAL)


def test_reboot_follows_the_reply() -> None:
    asker = Asker()
    answer = asker.dispatcher.answer(
        ask(Request.REBOOT_DEVICE).SerializeToString(), Socket.PRIVILEGED, lambda _b: False
    )
    wait = next(answer)
    assert isinstance(wait, Wait)
    assert asker.device.asked == []
    wait.start(lambda: None)
    assert asker.device.asked == [("complete", {})]
    body = next(answer)
    assert isinstance(body, bytes)
    assert Reply.FromString(body).response == Reply.CMD_OK
    assert Reply.FromString(body).refusal.code == "not-prepared", "what keeps provisioning open is said"
    assert isinstance(next(answer), Flush)
    assert asker.device.reboots == 0
    assert next(answer, None) is None
    assert asker.device.reboots == 1


def test_reboot_happens_when_the_client_leaves_early() -> None:
    asker = Asker()
    answer = asker.dispatcher.answer(
        ask(Request.REBOOT_DEVICE).SerializeToString(), Socket.PRIVILEGED, lambda _b: False
    )
    next(answer)
    answer.close()
    gc.collect()
    assert asker.device.reboots == 1


def test_reboot_asks_nothing_of_the_vault_in_operation() -> None:
    asker = Asker(FakeDevice(current_mode=Mode.OPERATIONAL))
    assert asker.code(ask(Request.REBOOT_DEVICE)) == Reply.CMD_OK
    assert asker.device.asked == []
    assert asker.device.reboots == 1


def test_a_failure_after_the_response_does_not_make_a_second_one() -> None:
    class Stuck(FakeDevice):
        def request_reboot(self) -> None:
            raise OSError("cannot")

    asker = Asker(Stuck())
    assert asker.code(ask(Request.REBOOT_DEVICE)) == Reply.CMD_OK
    assert "REBOOT_DEVICE" in asker.log[0]


# Logs


def test_logs_in_fragments_with_a_final_one_each(tmp_path: Path) -> None:
    text = "".join(f"line {number} ü\n" for number in range(10_000))
    (tmp_path / "a").write_text(text)
    device = FakeDevice(
        log_files=[LogFile("boot", tmp_path / "a"), LogFile("empty", b""), LogFile("small", b"x\0y\xff\n")]
    )
    replies = Asker(device).all(ask(Request.GET_LAST_LOG))
    assert (replies[-1].code, replies[-1].response) == (Reply.RESPONSE, Reply.CMD_OK)
    logs: dict[str, str] = {}
    for reply in replies[:-1]:
        logs[reply.log_message.name] = logs.get(reply.log_message.name, "") + reply.log_message.msg
        assert len(reply.SerializeToString()) < 3 * FRAGMENT + 100
    assert logs == {"boot": text, "empty": "", "small": "x�y�\n"}
    finals = [reply.log_message.name for reply in replies if reply.code == Reply.LOG_MESSAGE_FINAL]
    assert finals == ["boot", "empty", "small"]
    assert device.removed == []


def test_logs_are_removed_only_after_all_of_them_were_taken() -> None:
    device = FakeDevice(log_files=[LogFile("a", b"1"), LogFile("b", b"2")])
    answer = Asker(device).dispatcher.answer(
        ask(Request.GET_LAST_LOG, remove_logs=True).SerializeToString(), Socket.PRIVILEGED, lambda _b: False
    )
    assert isinstance(next(answer), bytes)
    assert isinstance(next(answer), bytes)
    assert isinstance(next(answer), Flush)
    assert device.removed == []
    last = next(answer)
    assert isinstance(last, bytes)
    assert Reply.FromString(last).response == Reply.CMD_OK
    assert device.removed == ["a", "b"]


def test_a_log_that_vanishes_or_is_a_link_ends_in_cmd_failed_and_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    for path in (tmp_path / "missing", tmp_path / "link"):
        device = FakeDevice(log_files=[LogFile("first", b"1"), LogFile("gone", path)])
        replies = Asker(device).all(ask(Request.GET_LAST_LOG, remove_logs=True))
        assert [reply.code for reply in replies] == [Reply.LOG_MESSAGE_FINAL, Reply.RESPONSE]
        assert replies[-1].response == Reply.CMD_FAILED
        assert device.removed == []


def test_an_unprivileged_socket_gets_no_logs() -> None:
    device = FakeDevice(log_files=[LogFile("a", b"secret")])
    assert Asker(device, Socket.UNPRIVILEGED).code(ask(Request.GET_LAST_LOG)) == Reply.CMD_UNSUPPORTED


def test_row34_a_log_as_long_as_a_file_can_be_still_has_an_end(tmp_path: Path) -> None:
    endless = tmp_path / "guest.log"
    with endless.open("wb") as file:
        os.ftruncate(file.fileno(), 1 << 40)  # what a container can do to its own log
        file.seek(0, os.SEEK_END)
        file.write(b"the newest line")
    device = FakeDevice(log_files=[LogFile("guest.log", endless), LogFile("other.log", b"other")])
    answer = Asker(device).dispatcher.answer(
        ask(Request.GET_LAST_LOG).SerializeToString(), Socket.PRIVILEGED, lambda _body: False
    )
    limit = LOG_LIMIT // FRAGMENT + 8
    parts = (Reply.FromString(part) for part in answer if isinstance(part, bytes))
    # Not a list of them all: most are nothing but replaced zeros.
    last = [part for part in itertools.islice(parts, limit) if part.code != Reply.LOG_MESSAGE_FRAGMENT]
    assert [part.log_message.name for part in last] == ["guest.log", "other.log", ""]
    assert last[0].log_message.msg.endswith("the newest line")
    assert last[-1].response == Reply.CMD_OK
