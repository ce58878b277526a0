# SPDX-License-Identifier: Apache-2.0
"""The `control` command against a dispatcher without a socket: verbs, output, exit codes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.control.fake_device import CORE, CORE_UUID, COREOS, GUEST, GUEST_UUID, FakeDevice
from trustme_init.control.cli import main as cli
from trustme_init.control.cli.verbs import VERBS
from trustme_init.control.client import ControlClient
from trustme_init.control.dispatch import Dispatcher
from trustme_init.control.gate import Socket
from trustme_init.control.handlers.reply import response
from trustme_init.control.state import LogFile
from trustme_init.control.transport import Flush, Listen, Wait
from trustme_init.errors import TrustRefusal
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.provisioning.mode import Mode

PARITY = [
    "list",
    "list_guestos",
    "reload",
    "wipe_device",
    "destroy_system",
    "reboot",
    "set_provisioned",
    "get_provisioned",
    "device_stats",
    "create",
    "remove",
    "change_pin",
    "start",
    "stop",
    "config",
    "update_config",
    "state",
    "freeze",
    "unfreeze",
    "allow_audio",
    "deny_audio",
    "dev_access",
    "wipe",
    "push_guestos_config",
    "remove_guestos",
    "ca_register",
    "pull_csr",
    "push_cert",
    "assign_iface",
    "unassign_iface",
    "ifaces",
    "run",
    "retrieve_logs",
]


class Direct(ControlClient):
    """A client whose device is in this process; keeps what it was sent."""

    device: FakeDevice
    sent: list[Request]
    replies: list[Reply]

    def send(self, message: Request, timeout: float | None = None) -> None:
        self.sent.append(message)
        dispatcher = Dispatcher(self.device, log=lambda _text: None)
        for body in dispatcher.answer(message.SerializeToString(), Socket.PRIVILEGED, lambda _body: False):
            if isinstance(body, Wait | Listen):
                body.start(lambda: None)
            elif not isinstance(body, Flush):
                self.replies.append(Reply.FromString(body))

    def receive(self, timeout: float | None = None) -> Reply:
        return self.replies.pop(0)

    def fileno(self) -> int:
        return 1  # any; nobody waits where something is buffered

    @property
    def buffered(self) -> bool:
        return True


class Command:
    """Runs the command; remembers output and requests."""

    def __init__(self, capsys: pytest.CaptureFixture[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = FakeDevice()
        self.out = self.err = ""
        self.sent: list[Request] = []
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        self._canned: list[Reply] = []
        command = self

        class Bound(Direct):
            def __init__(self, path: Path, *, timeout: float) -> None:
                super().__init__(path, timeout=timeout)
                self.device, self.sent, self.replies = command.device, command.sent, []

            def receive(self, timeout: float | None = None) -> Reply:
                resolving = self.sent[-1].command == Request.GET_CONTAINER_STATUS
                return command._canned.pop(0) if command._canned and not resolving else super().receive()

        monkeypatch.setattr(cli, "ControlClient", Bound)

    def answer(self, *replies: Reply) -> None:
        self._canned = list(replies)

    def stdin(self, text: str) -> None:
        self._monkeypatch.setattr("sys.stdin", io.StringIO(text))

    def __call__(self, *words: str) -> int:
        self.sent.clear()
        code = cli.main(words)
        assert self._capsys is not None
        captured = self._capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return code

    def json(self, *words: str) -> dict[str, object]:
        self(*words, "--json")
        document: dict[str, object] = json.loads(self.out)
        assert document["version"] == 1
        return document


@pytest.fixture
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Command:
    own_capture = "capfdbinary" in request.fixturenames
    return Command(None if own_capture else request.getfixturevalue("capsys"), monkeypatch)


OURS = [
    *("apply_statement", "lifecycle_ca_register", "lifecycle_status"),
    *("activate_credential", "ca_list", "ca_remove", "device_ca_register", "localca_register"),
    *("provisioning_status", "token_create", "token_remove", "token_replace", "token_status", "token_unlock"),
    *("verify_cert", "verify_guestos"),
]


def test_the_verbs_are_those_of_the_original_and_our_own() -> None:
    assert sorted(verb.name for verb in VERBS) == sorted([*PARITY, *OURS])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in PARITY)
    for line in ("exit codes:", "examples:", "/run/socket/cml-control"):
        assert line in text


@pytest.mark.parametrize("verb", [*PARITY, *OURS])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["state", "--bogus"], ["assign_iface", "core0"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2


# Verb → what is sent. The core container is the one named.

CONTAINER_VERBS = {
    "config": Request.GET_CONTAINER_CONFIG,
    "remove": Request.REMOVE_CONTAINER,
    "freeze": Request.CONTAINER_FREEZE,
    "unfreeze": Request.CONTAINER_UNFREEZE,
    "wipe": Request.CONTAINER_WIPE,
    "allow_audio": Request.CONTAINER_ALLOWAUDIO,
    "deny_audio": Request.CONTAINER_DENYAUDIO,
    "ifaces": Request.CONTAINER_LIST_IFACES,
    "state": Request.GET_CONTAINER_STATUS,
    "start": Request.CONTAINER_START,
    "stop": Request.CONTAINER_STOP,
}
PLAIN_VERBS = {
    "list_guestos": Request.LIST_GUESTOS_CONFIGS,
    "reload": Request.RELOAD_CONTAINERS,
    "wipe_device": Request.WIPE_DEVICE,
    "destroy_system": Request.DESTROY_SYSTEM,
    "reboot": Request.REBOOT_DEVICE,
    "set_provisioned": Request.SET_PROVISIONED,
    "get_provisioned": Request.GET_PROVISIONED,
    "device_stats": Request.GET_DEVICE_STATS,
    "list": Request.GET_CONTAINER_STATUS,
    "state": Request.GET_CONTAINER_STATUS,
    "retrieve_logs": Request.GET_LAST_LOG,
}


@pytest.mark.parametrize("name", ["core0", CORE_UUID])
@pytest.mark.parametrize(("verb", "number"), CONTAINER_VERBS.items())
def test_container_verbs_send_one_uuid(command: Command, verb: str, number: int, name: str) -> None:
    command.stdin("")
    command(verb, name)
    assert command.sent[-1].command == number
    assert list(command.sent[-1].container_uuids) == [CORE_UUID]
    assert not command.sent[-1].HasField("container_start_params")


@pytest.mark.parametrize(("verb", "number"), PLAIN_VERBS.items())
def test_plain_verbs(command: Command, verb: str, number: int) -> None:
    command.stdin("")
    command(verb)
    assert [request.command for request in command.sent] == [number]


@pytest.mark.parametrize("verb", sorted(CONTAINER_VERBS))
def test_an_unknown_container(command: Command, verb: str) -> None:
    command.stdin("")
    assert command(verb, "nobody") == 5
    assert command.out == "Container with provided uuid/name does not exist!\n"
    assert command.json(verb, "nobody")["ok"] is False


def test_two_containers_of_one_name(command: Command) -> None:
    command.device.views.append(replace(CORE, uuid="22222222-0000-0000-0000-000000000000"))
    assert command("config", "core0") == 2
    assert "UUID" in command.err


def test_files_are_sent_as_they_are(command: Command, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("c", "s", "p")]
    for path in paths:
        Path(path).write_bytes(b"\xff" + path.encode())
    contents = [Path(path).read_bytes() for path in paths]

    command.device.guests.outcomes["create"] = TrustRefusal("bad-signature", "not what was signed")
    assert command("create", *paths) == 1
    assert "not what was signed (bad-signature)" in command.out
    sent = command.sent[-1]
    assert [
        sent.container_config_file,
        sent.container_config_signature,
        sent.container_config_certificate,
    ] == contents
    command("create", paths[0])
    assert not command.sent[-1].HasField("container_config_signature")
    command("update_config", "core0", *paths)
    assert command.sent[-1].command == Request.CONTAINER_UPDATE_CONFIG
    assert list(command.sent[-1].container_uuids) == [CORE_UUID]
    command("push_guestos_config", *paths)
    assert command.sent[-1].guestos_config_file == contents[0]
    command("ca_register", paths[0])
    assert (command.sent[-1].command, command.sent[-1].guestos_rootcert) == (25, contents[0])
    command("push_cert", paths[0])
    assert (command.sent[-1].command, command.sent[-1].device_cert) == (41, contents[0])
    assert command("create", *paths[:2]) == 2
    assert command("create", str(tmp_path / "missing")) == 2
    assert "No such file" in command.err
    assert command.sent == []


def test_other_parameters(command: Command) -> None:
    command("assign_iface", "core0", "--iface", "eth0", "--persistent")
    assert command.sent[-1].assign_iface_params.iface_name == "eth0"
    assert command.sent[-1].assign_iface_params.persistent
    command("unassign_iface", "core0", "--iface", "eth0")
    assert command.sent[-1].command == Request.CONTAINER_UNASSIGNIFACE
    command("dev_access", "core0", "c 42:42 rwm")
    assert command.sent[-1].dev_rule == "c 42:42 rwm"
    command("remove_guestos", "exampleos")
    assert command.sent[-1].guestos_name == "exampleos"
    command("list", "-s")
    assert command.sent[-1].system_services
    command("start", "core0", "--key=1234", "--setup")
    assert (command.sent[-1].container_start_params.key, command.sent[-1].container_start_params.setup) == (
        "1234",
        True,
    )
    command.stdin("4321\n")
    command("stop", "core0", "--key=")
    assert command.sent[-1].container_start_params.key == "4321"
    command("run", "core0", "nopty", "ls", "-l", "--json")
    sent = command.sent[-1]
    assert (sent.exec_command, list(sent.exec_args), sent.exec_pty) == ("ls", ["ls", "-l", "--json"], False)
    command("retrieve_logs", "--remove")
    assert command.sent[-1].remove_logs


def test_change_pin_reads_three_lines(command: Command) -> None:
    command.stdin("old\nnew\nnew\n")
    assert command("change_pin", "core0") == 1
    assert "it has no token, and is not changed or removed (container-is-core)" in command.out
    assert command.sent[-1].command == Request.CONTAINER_CHANGE_TOKEN_PIN
    assert (command.sent[-1].device_pin, command.sent[-1].device_newpin) == ("old", "new")
    command.stdin("old\nnew\nnew\n")
    assert command("change_pin") == 1
    assert command.sent[-1].command == Request.CHANGE_DEVICE_PIN
    assert list(command.sent[-1].container_uuids) == []
    assert (command.sent[-1].device_pin, command.sent[-1].device_newpin) == ("old", "new")
    for lines in ("old\nnew\nother\n", "old\nnew\n", ""):
        command.stdin(lines)
        assert command("change_pin", "core0") == 2
        assert [request.command for request in command.sent] == [Request.GET_CONTAINER_STATUS]
        assert "old" not in command.err.replace("Old", "")


def test_destructive_verbs_ask_a_person(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, words, sent in (("no\n", (), 0), ("yes\n", (), 1), ("", ("--yes",), 1)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        command("destroy_system", *words)
        assert len(command.sent) == sent


# Output


def test_readable(command: Command) -> None:
    assert command("list") == 0
    head, core, guest = command.out.splitlines()
    assert head.split() == ["NAME", "STATE", "UPTIME", "GUESTOS", "TRUST", "TOKEN", "UUID"]
    assert core.split() == ["core0", "RUNNING", "01:02:05", "trustme-coreos", "SIGNED", CORE_UUID]
    assert "STOPPED" in guest
    command.device.views[1] = replace(GUEST, problem="container-damaged: what is kept", token="unpaired")
    command("list")
    assert command.out.splitlines()[2].split() == [
        "guest",
        "BROKEN",
        "00:00:00",
        "exampleos",
        "unpaired",
        GUEST_UUID,
    ]
    assert command.out.splitlines()[4] == f"  {GUEST_UUID}: container-damaged: what is kept"
    command("list_guestos")
    assert "trustme-coreos  7" in command.out
    command("get_provisioned")
    assert "not provisioned" in command.out
    command("device_stats")
    assert "1024.0" in command.out
    command("config", "core0")
    assert 'guest_os: "trustme-coreos"' in command.out
    assert command("allow_audio", "core0") == 4
    assert "Not supported" in command.out


def test_text_is_the_dump_of_the_original(command: Command) -> None:
    command("--text", "get_provisioned")
    assert command.out == "code: DEVICE_PROVISIONED_STATE\ndevice_is_provisioned: false\n"
    assert command("allow_audio", "core0", "--text") == 4
    assert command.out == "code: RESPONSE\nresponse: CMD_UNSUPPORTED\n"
    command("list_guestos", "--text")
    assert 'name: "trustme-coreos"' in command.out


def test_json(command: Command) -> None:
    document = command.json("list")
    assert (document["verb"], document["ok"], document["exit_code"]) == ("list", True, 0)
    reply = document["reply"]
    assert isinstance(reply, dict)
    assert reply["code"] == "CONTAINER_STATUS"
    assert reply["container_status"][0]["uptime"] == CORE.uptime
    command.device.guestos = [type(COREOS).FromString(COREOS.SerializeToString() + b"\x6a\x02\x00\xff")]
    guestos = command.json("list_guestos")["reply"]
    assert isinstance(guestos, dict)
    assert guestos["guestos_configs"][0]["icon"] == "AP8="


def test_row27_names_of_containers_cannot_write_to_the_terminal(command: Command) -> None:
    command.device.views = [replace(CORE, name="evil\x1b]0;x\x07\nroot RUNNING")]
    for options in ((), ("--json",), ("--text",)):
        command("list", *options)
        assert "\x1b" not in command.out
        assert "\x07" not in command.out
    command("list")
    assert len(command.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (response(Reply.CMD_OK), 0),
        (response(Reply.CMD_FAILED), 1),
        (response(Reply.CMD_UNSUPPORTED), 4),
        (response(Reply.CONTAINER_STOP_OK), 0),
        (response(Reply.CONTAINER_LOCKED_TILL_REBOOT), 1),
        (Reply(code=Reply.CONTAINER_CONFIG), 1),
        (Reply(code=Reply.DEVICE_CSR), 1),
    ],
)
def test_exit_codes(command: Command, reply: Reply, code: int) -> None:
    command.answer(reply)
    assert command("reboot") == code
    assert command.out


@pytest.mark.parametrize("value", Reply.Response.values())
def test_every_response_has_a_sentence(command: Command, value: Reply.Response.ValueType) -> None:
    command.answer(response(value))
    command("reboot")
    assert command.out.endswith(".\n") or command.out.endswith(").\n")


def test_an_installation_is_followed_to_its_end(command: Command, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    command.answer(response(Reply.GUESTOS_MGR_INSTALL_STARTED), response(Reply.GUESTOS_MGR_INSTALL_FAILED))
    assert command("push_guestos_config", *[str(tmp_path / "f")] * 3) == 1
    assert command.out == "Installation started.\nInstallation failed.\n"


def test_output_of_a_program_comes_through(
    command: Command, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    command.answer(
        Reply(code=Reply.EXEC_OUTPUT, exec_output=b"\x1b[1mhello"),
        Reply(code=Reply.EXEC_END, exec_end_reason="0"),
    )
    assert cli.main(["run", "core0", "echo", "hello"]) == 0
    assert capfdbinary.readouterr().out == b"\x1b[1mhello"


def test_pull_csr(command: Command, tmp_path: Path) -> None:
    command.answer(Reply(code=Reply.DEVICE_CSR, device_csr=b"-----BEGIN"))
    assert command("pull_csr", str(tmp_path / "csr")) == 0
    assert (tmp_path / "csr").read_bytes() == b"-----BEGIN"
    command.answer(Reply(code=Reply.DEVICE_CSR, device_csr=b"-----BEGIN"))
    assert command("pull_csr", str(tmp_path / "no" / "csr")) == 2


def test_nothing_there_is_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["-s", str(tmp_path / "none"), "list"]) == 3
    assert "not-running" in capsys.readouterr().err
    assert cli.main(["-s", str(tmp_path / "none"), "list", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "not-running"


# Logs


def test_logs_are_shown_safely_or_written_as_they_are(command: Command, tmp_path: Path) -> None:
    command.device.log_files = [
        LogFile("boot", b"stage 1\n\x1b[31mred\n"),
        LogFile("../../etc/passwd", b"root\n"),
        LogFile("...", b""),
    ]
    assert command("retrieve_logs") == 0
    assert command.out.startswith("==> boot <==\nstage 1\n\\x1b[31mred\n\n==> ../../etc/passwd <==\n")
    assert command.out.endswith("Done.\n")
    assert command("retrieve_logs", str(tmp_path / "logs")) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "logs").iterdir()}
    assert written == {"boot": b"stage 1\n\x1b[31mred\n", "_.._etc_passwd": b"root\n", "log": b""}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "logs").iterdir()} == {0o600}
    document = command.json("retrieve_logs")
    assert document["logs"] == [
        {"name": "boot", "text": "stage 1\n\x1b[31mred\n"},
        {"name": "../../etc/passwd", "text": "root\n"},
        {"name": "...", "text": ""},
    ]
    command("retrieve_logs", "--text")
    assert command.out.count("code: LOG_MESSAGE_FINAL") == 3
    assert command.out.endswith("code: RESPONSE\nresponse: CMD_OK\n")


def test_logs_that_cannot_be_written(command: Command, tmp_path: Path) -> None:
    command.device.log_files = [LogFile("boot", b"x")]
    (tmp_path / "file").touch()
    assert command("retrieve_logs", str(tmp_path / "file")) == 2


def test_logs_in_operational_mode(command: Command) -> None:
    command.device.current_mode = Mode.OPERATIONAL
    assert command("retrieve_logs") == 0
