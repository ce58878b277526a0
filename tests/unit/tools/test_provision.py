# SPDX-License-Identifier: Apache-2.0
"""What `trustme provision` decides without a device: its settings file, its secrets, its lines, its names."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trustme_tools.cli import main
from trustme_tools.errors import ToolError, UsageError
from trustme_tools.provision import fleet, pins, remote, settings, token
from trustme_tools.provision.device import Device, TokenState
from trustme_tools.provision.identity import DEVICE_KEY, Identity, Registry
from trustme_tools.provision.pins import Reader, Secret
from trustme_tools.provision.plan import WantedFile, WantedPin
from trustme_tools.provision.report import Report, as_text
from trustme_tools.provision.transport import CommandTransport, Output, answered, output, request

PIN = "canary-pin-4711"
PATH = Path("/station/station.yml")
MINIMAL: dict[str, Any] = {
    "version": 1,
    "guest_anchors": ["guestos_subca.cert"],
    "device_anchors": ["device_subca.cert"],
    "device_ca": {"pki": "pki"},
    "token": {"pin": "prompt"},
}
UUID_1 = "0b2c4a6e-5d1f-4c38-9a77-3f0e6d1b2c4a"


def parse(**changes: Any) -> settings.Settings:
    document = {key: value for key, value in (MINIMAL | changes).items() if value is not None}
    return settings.parse(yaml.safe_dump(document).encode(), PATH)


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> ToolError:
    with pytest.raises(ToolError) as caught:
        call(*arguments, **options)
    assert caught.value.remedy
    return caught.value


# Settings


def test_what_is_not_said_is_the_strict_rule() -> None:
    read = parse()
    assert read.activation
    assert not read.software_keys
    assert not read.development_builds
    assert read.other_anchors == "refuse"
    assert read.completion == "set_provisioned"
    assert read.guest_anchors == (Path("/station/guestos_subca.cert"),)
    assert read.records == Path("/station/records")


@pytest.mark.parametrize(
    ("changes", "evidence"),
    [
        ({"version": 2}, "version: 2 is outside 1..1"),
        ({"version": True}, "version: expected a whole number, found bool"),
        ({"guest_anchors": None}, "guest_anchors: expected a list, found nothing"),
        ({"guest_anchors": [1]}, "guest_anchors: expected a list of texts"),
        ({"guest_anchor": []}, "unknown key guest_anchor"),
        ({"tpm": {"credential_activaton": "skip"}}, "unknown key tpm.credential_activaton"),
        ({"tpm": {"credential_activation": False}}, "tpm.credential_activation: expected a text, found bool"),
        ({"tpm": {"credential_activation": "no"}}, "'no' is none of required, skip"),
        ({"device_ca": {}}, "device_ca: give pki, or key and certificate"),
        ({"device_ca": {"pki": "a", "key": "b"}}, "device_ca: give pki, or key and certificate"),
        ({"device_ca": {"sign_command": "x"}}, "device_ca: give pki, or key and certificate"),
        ({"device_ca": {"pki": "a", "days": 0}}, "device_ca.days: 0 is outside 1..36500"),
        ({"token": {}}, "token.pin: missing"),
        ({"token": "leave"}, "token: expected keys and values, found str"),
        ({"token": {"pin": "prompt", "p12": "x"}}, "token.password: missing"),
        ({"targets": [{"name": "a"}]}, "give exactly one of command, unix and console"),
        ({"targets": [{"name": "a", "unix": "x", "console": "y"}]}, "give exactly one of"),
        ({"targets": [{"name": "a", "unix": "x", "uuid": "1"}]}, "targets[0].uuid: '1' is not a UUID"),
        ({"targets": [{"name": "a", "unix": "x"}] * 2}, "the name a is there twice"),
        ({"targets": [{"name": "a", "unix": "x", "ek_sha256": "ab"}]}, "is not a SHA-256"),
        ({"targets": [{"name": "a", "command": []}]}, "command: empty"),
    ],
)
def test_a_mistake_in_the_settings_file_is_named(changes: dict[str, Any], evidence: str) -> None:
    error = refused(parse, **changes)
    assert (error.code, error.exit) == ("settings-malformed", 2)
    assert evidence in error.evidence


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nversion: 1\n",
        "version: 1\ntpm: {software_keys: refuse, software_keys: allow}\n",
        "[1, 2",
        "!!python/object/apply:os.system ['true']",
        "just a text",
        "1: 2",
        "a: &x [*x]",
        "\x00",
        "x" * (settings.LIMIT + 1),
    ],
)
def test_bad_yaml_is_refused_without_being_quoted(text: str) -> None:
    error = refused(settings.parse, text.encode(), PATH)
    assert error.code == "settings-malformed"
    assert len(error.evidence) < 200


def test_of_two_values_for_one_key_none_wins() -> None:
    text = yaml.safe_dump(MINIMAL | {"tpm": {"software_keys": "refuse"}})
    error = refused(settings.parse, f"{text}tpm: {{software_keys: allow}}\n".encode(), PATH)
    assert "the key 'tpm' twice" in error.evidence


@pytest.mark.parametrize(
    "changes",
    [
        {"token": {"pin": PIN}},
        {"token": PIN},
        {"token": {"pin": {"is": PIN}}},
        {"token": {"pin": "prompt", "present_pin": PIN}},
        {"device_ca": {"pki": "pki", "passphrase": PIN}},
        {"token": {"p12": "x", "password": f"fd:{PIN}"}},
    ],
)
def test_row29_a_secret_in_the_settings_file_is_refused_and_not_shown(changes: dict[str, Any]) -> None:
    error = refused(parse, **changes)
    assert PIN not in json.dumps(error.as_dict())


def test_row29_a_settings_file_that_is_no_yaml_is_not_quoted() -> None:
    error = refused(settings.parse, f"token: {{pin: {PIN}".encode(), PATH)
    assert PIN not in json.dumps(error.as_dict())


# Secrets


def secret_file(path: Path, data: bytes, mode: int = 0o600) -> pins.Source:
    path.touch(mode=0o600)
    path.write_bytes(data)
    path.chmod(mode)
    return pins.parse(f"file:{path.name}", "token.pin", base=path.parent)


def test_a_secret_is_the_first_line_and_read_once(tmp_path: Path) -> None:
    reader = Reader()
    source = secret_file(tmp_path / "pin", f"{PIN}\nsecond\n".encode())
    assert reader.read(source).reveal() == PIN
    (tmp_path / "pin").unlink()
    assert reader.read(source).reveal() == PIN
    read, write = os.pipe()
    os.write(write, b"other\n")
    os.close(write)
    first = pins.parse(f"fd:{read}", "token.pin", base=tmp_path)
    assert reader.read(first).reveal() == reader.read(first).reveal() == "other"
    os.close(read)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o644])
def test_row29_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    source = secret_file(tmp_path / "pin", PIN.encode(), mode)
    error = refused(Reader().read, source)
    assert error.code == "secret-file-open-to-others"
    assert PIN not in json.dumps(error.as_dict())


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"x" * 1025, PIN.encode() + b"\xff", PIN.encode() + b"\x00", PIN.encode() + b"\x1b[A"],
)
def test_what_cannot_be_a_secret_is_refused_and_not_shown(tmp_path: Path, data: bytes) -> None:
    error = refused(Reader().read, secret_file(tmp_path / "pin", data))
    assert error.code == "bad-secret"
    assert PIN not in json.dumps(error.as_dict())
    assert error.__cause__ is None


def test_a_secret_file_is_a_file_of_its_own(tmp_path: Path) -> None:
    secret_file(tmp_path / "pin", PIN.encode())
    (tmp_path / "link").symlink_to("pin")
    assert refused(Reader().read, pins.parse("file:link", "pin", base=tmp_path)).code == "secret-unreadable"
    os.mkfifo(tmp_path / "fifo", 0o600)
    error = refused(Reader().read, pins.parse("file:fifo", "pin", base=tmp_path))
    assert error.code == "secret-file-open-to-others"
    assert refused(Reader().read, pins.parse("fd:999", "pin", base=tmp_path)).code == "bad-descriptor"


def test_row29_a_secret_does_not_show_itself() -> None:
    wanted = WantedPin(Secret(PIN), None)
    assert PIN not in f"{wanted} {wanted!r} {wanted.pin}"


# Lines


@given(st.binary(max_size=5000))
def test_a_document_comes_out_of_its_lines(data: bytes) -> None:
    document = {"data": base64.b64encode(data).decode()}
    *pieces, end = remote.lines(document, "mark")
    assert all(len(line) <= len("mark") + 1 + remote.PIECE for line in pieces)
    assert remote.joined([line[5:] for line in pieces], end[5:]) == document


@given(st.data())
def test_a_changed_lost_or_added_byte_is_noticed(data: st.DataObject) -> None:
    *pieces, end = (line[1:] for line in remote.lines({"words": ["list"] * 400}))
    text = "".join(pieces)
    position = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(
        st.sampled_from(["", "A", "+", "\n", text[position] * 2]).filter(lambda c: c != text[position])
    )
    with pytest.raises(ToolError) as caught:
        answered([text[:position] + other + text[position + 1 :]], end)
    assert caught.value.code == "unreachable"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"code": 0},
        {"error": "x"},
        {"code": "0", "stdout": "", "stderr": ""},
        {"code": True, "stdout": "", "stderr": ""},
        {"code": 0, "stdout": "*", "stderr": ""},
        {"code": 0, "stdout": 1, "stderr": ""},
    ],
)
def test_an_answer_that_is_none_is_refused(answer: dict[str, Any]) -> None:
    assert refused(output, answer).code == "unreachable"


def test_files_of_a_call_are_the_owner_s_and_gone_after_it() -> None:
    script = (
        "import os,sys; path=sys.argv[1]; print(path, oct(os.stat(os.path.dirname(path)).st_mode & 0o777),"
        " open(path).read(), sys.stdin.read(), os.path.exists(sys.argv[2]))"
    )
    asked = request([sys.executable, "-c", script], [b"content"], b"input", 30)
    asked["words"].append({"scratch": True})
    path, *rest = output(remote.perform(asked)).stdout.decode().split()
    assert rest == ["0o700", "content", "input", "False"]
    assert not Path(path).parent.exists()


def test_a_program_that_is_not_there_or_hangs_is_said() -> None:
    assert "nowhere" in refused(output, remote.perform(request(["/nowhere"], [], b"", 5))).evidence
    slow = remote.perform(request(["sh", "-c", "sleep 10"], [PIN], b"", 0.1))
    assert "no answer in 0.1 s" in slow["error"]
    assert PIN not in json.dumps(slow)


# What a command that is no device answers


def test_a_command_that_says_something_else_first_still_works(tmp_path: Path) -> None:
    program = tmp_path / "control"
    program.write_text('#!/bin/sh\nread line; echo "$1 $line"; exit 4\n')
    program.chmod(0o700)
    noisy = ["sh", "-c", f'echo Welcome; PATH={tmp_path}:$PATH; eval "$0"']
    said = CommandTransport(noisy).control(["verb"], stdin=b"word\n", timeout=20)
    assert said == Output(4, b"verb word\n", b"")


@pytest.mark.parametrize("command", [["false"], ["/nowhere/ssh"], ["echo"], ["sh", "-c", "exit 255"]])
def test_a_command_that_leads_nowhere_is_unreachable(command: list[str]) -> None:
    assert refused(CommandTransport(command).control, ["x"], stdin=b"", timeout=5).code == "unreachable"


class Says:
    """A transport that always answers the same."""

    def __init__(self, code: int, text: Any) -> None:
        self._output = Output(code, text if isinstance(text, bytes) else json.dumps(text).encode(), b"")

    def control(self, words: Any, *, stdin: bytes, timeout: float) -> Output:
        return self._output

    def close(self) -> None:
        return


def envelope(code: int, **parts: Any) -> dict[str, Any]:
    return {"version": 1, "verb": "x", "ok": code == 0, "exit_code": code, **parts}


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (0, b"", "unreachable"),
        (0, b"[" * 100_000, "unreachable"),
        (0, {"version": 2, "exit_code": 0, "reply": {}}, "bad-answer"),
        (4, envelope(0, reply={}), "bad-answer"),
        (0, envelope(0), "bad-answer"),
        (0, b" " * (1024 * 1024 + 1), "bad-answer"),
        (0, envelope(0, reply={"provisioning": {}}), "not-prepared"),
        (
            0,
            envelope(0, reply={"provisioning": {"device_uuid": "00000000-0000-0000-0000-000000000000"}}),
            "bad-answer",
        ),
        (1, envelope(1, reply={"response": "CMD_FAILED"}), "device-refused"),
        (1, envelope(1, reply={"refusal": {"code": "tpm-failed", "cause": "x"}}), "tpm-failed"),
        (3, envelope(3, error={"cause": "nobody"}), "unreachable"),
        (4, envelope(4, reply={}), "unsupported"),
    ],
)
def test_an_answer_is_judged_before_it_is_believed(code: int, text: Any, expected: str) -> None:
    with pytest.raises(ToolError) as caught:
        Device(Says(code, text)).status()
    assert caught.value.code == expected


def test_row27_what_a_device_says_cannot_move_the_cursor() -> None:
    said = {"refusal": {"code": "x\x1b[2J", "cause": "\x1b]0;title\x07" * 200, "evidence": "a\nb"}}
    with pytest.raises(ToolError) as caught:
        Device(Says(1, envelope(1, reply=said))).status()
    assert all(text.isprintable() for text in caught.value.as_dict().values())
    assert len(caught.value.cause) <= 500


def test_only_unsupported_is_a_closed_door() -> None:
    assert Device(Says(4, envelope(4, reply={}))).is_closed("pull_csr")
    assert not Device(Says(0, envelope(0, reply={}))).is_closed("pull_csr")
    assert not Device(Says(1, envelope(1, reply={}))).is_closed("pull_csr")
    with pytest.raises(ToolError):
        Device(Says(3, envelope(3, error={}))).is_closed("pull_csr")


# Names


def test_row08_a_name_is_one_device_s() -> None:
    registry = Registry()
    first = Identity("one", registry, expected_uuid=None)
    second = Identity("two", registry, expected_uuid=UUID(UUID_1))
    first.bind(DEVICE_KEY, "a")
    first.bind(DEVICE_KEY, "a")
    assert refused(second.bind, DEVICE_KEY, "a").code == "device-twice"
    assert refused(first.bind, DEVICE_KEY, "b").code == "device-changed"
    assert refused(second.bind, "UUID", "another").code == "device-changed"


# The token of a completed device


def test_how_a_token_differs_is_told_without_a_try() -> None:
    pin, file = WantedPin(Secret(PIN), None), WantedFile(b"", Secret(PIN), "ab")
    assert token.differences(TokenState("none", None, None, None), pin)
    assert token.differences(TokenState("softtoken", None, True, 1), pin)
    assert not token.differences(TokenState("softtoken", None, False, 1), pin)
    assert not token.differences(TokenState("softtoken", None, True, 1), WantedPin(Secret("trustme"), None))
    assert token.differences(TokenState("softtoken", "cd", False, 1), file)
    assert not token.differences(TokenState("none", None, None, None), None)


# The command


def test_a_report_is_good_only_with_everything_seen() -> None:
    report = Report("x", completed=True, closed=True)
    assert report.good
    assert not Report("x", completed=True).good
    assert not Report("x", closed=True).good
    assert not Report("x", completed=True, closed=True, matches=False).good
    error = {"code": "c", "cause": "why", "evidence": "e", "remedy": "r"}
    bad = Report("x", completed=True, closed=True, error=error)
    assert not bad.good
    assert "why (c)" in as_text(bad)


@pytest.mark.parametrize(
    ("words", "split"),
    [
        (["--count", "2"], 2),
        (["--state", "x"], 2),
        (["--simulate", "x", "target"], 2),
        ([], 0),
        (["nonsense"], 0),
        (["unix:"], 0),
        (["unix:x", "unix:x"], 0),
    ],
)
def test_targets_that_do_not_fit_are_wrong_usage(
    tmp_path: Path, words: list[str], split: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "station.yml"
    path.write_text(json.dumps(MINIMAL))
    # Options first: argparse takes no second group of names after them.
    assert main.main(["provision", *words[:split], str(path), *words[split:]]) == 2
    assert "trustme: " in capsys.readouterr().err


def test_a_target_on_the_command_line_is_a_way() -> None:
    assert fleet.named("unix:/run/x").unix == Path("/run/x")
    assert fleet.named("console:x").console == Path("x")
    with pytest.raises(UsageError):
        fleet.named("ssh:x")


def test_a_terminal_is_needed_to_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pins.parse("prompt", "token.pin", base=tmp_path, new=True)
    with (tmp_path / "x").open("w+") as no_terminal:
        monkeypatch.setattr("sys.stdin", no_terminal)
        assert refused(Reader().read, source).code == "no-terminal"
        monkeypatch.undo()
