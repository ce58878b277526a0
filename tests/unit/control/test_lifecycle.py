# SPDX-License-Identifier: Apache-2.0
"""Statements over the control interface: what is passed on, what comes back, what people see."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control.test_cli import Command
from trustme_init.errors import TokenRefusal, TrustRefusal
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.provisioning.mode import Mode

STATUS: dict[str, Any] = {
    "last_serial": 20261124143000,
    "applied": 3,
    "in_tpm": True,
    "next_key_sha256": "",
    "problem": None,
    "csr": "",
    "certification": "",
}
RENEWED = STATUS | {"next_key_sha256": "ab" * 32, "csr": "request", "certification": "{}"}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    made = Command(capsys, monkeypatch)
    made.device.current_mode = Mode.OPERATIONAL
    return made


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    paths = [tmp_path / name for name in ("s.json", "s.sig", "s.cert")]
    for path in paths:
        path.write_bytes(path.name.encode())
    return [str(path) for path in paths]


def test_the_three_parts_are_passed_on(command: Command, parts: list[str]) -> None:
    command.device.answers["apply-statement"] = STATUS
    assert command("apply_statement", *parts) == 0
    asked = {"statement": b"s.json", "signature": b"s.sig", "certificate": b"s.cert", "token": b"", "pin": ""}
    assert command.device.asked == [("apply-statement", asked)]
    assert "Statements obeyed: 3, the last with serial 20261124143000; the TPM knows them." in command.out


def test_a_token_goes_with_its_password_from_standard_input(
    command: Command, parts: list[str], tmp_path: Path
) -> None:
    token = tmp_path / "t.p12"
    token.write_bytes(b"p12")
    command.device.answers["apply-statement"] = STATUS
    command.stdin("correct horse\n")
    assert command("apply_statement", *parts, "--token", str(token)) == 0
    assert (
        command.device.asked[0][1] | {"token": b"p12", "pin": "correct horse"} == command.device.asked[0][1]
    )
    assert "horse" not in command.out + command.err


@pytest.mark.parametrize("verb", ["apply_statement", "lifecycle_status"])
def test_the_request_for_the_next_key_is_written(
    command: Command, parts: list[str], tmp_path: Path, verb: str
) -> None:
    command.device.answers = {"apply-statement": RENEWED, "lifecycle-status": RENEWED}
    out = tmp_path / "next.csr"
    words = parts if verb == "apply_statement" else []
    assert command(verb, *words, "--csr", str(out)) == 0
    assert (out.read_bytes(), (tmp_path / "next.csr.tpm").read_bytes()) == (b"request", b"{}")
    assert "The next device key waits for its certificate" in command.out


def test_a_refusal_is_shown_by_its_name(command: Command, parts: list[str]) -> None:
    command.device.answers["apply-statement"] = TrustRefusal(
        "statement-replayed", "c", evidence="e", remedy="r"
    )
    assert command("apply_statement", *parts) == 1
    assert "statement-replayed" in command.out
    command.device.answers["apply-statement"] = TokenRefusal("token-locked", "c", evidence="e", remedy="r")
    assert command("apply_statement", *parts, "--json") == 1
    assert json.loads(command.out)["reply"]["response"] == "CONTAINER_LOCKED_TILL_REBOOT"


def test_a_device_whose_disk_is_too_old_says_so(command: Command) -> None:
    problem = {"code": "lifecycle-rolled-back", "cause": "older", "evidence": "e", "remedy": "r", "kind": ""}
    command.device.answers["lifecycle-status"] = STATUS | {"problem": problem}
    assert command("lifecycle_status") == 1
    assert "lifecycle-rolled-back" in command.out
    assert "No statement is obeyed" in command.out
    document = command.json("lifecycle_status")
    assert document["ok"] is False


def test_without_a_tpm_it_says_that_a_file_knows(command: Command) -> None:
    command.device.answers["lifecycle-status"] = STATUS | {"in_tpm": False}
    assert command("lifecycle_status") == 0
    assert "only a file knows them" in command.out


def test_a_lifecycle_anchor_is_registered_in_provisioning(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = tmp_path / "ca.cert"
    ca.write_bytes(b"ca")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert command("lifecycle_ca_register", str(ca)) == 4, "not in operation"
    command.device.current_mode = Mode.PROVISIONING
    command.device.answers["add-authority"] = {"sha256": "", "subject": ""}
    assert command("lifecycle_ca_register", str(ca)) == 0
    assert command.sent[-1].command == Request.REGISTER_LIFECYCLE_CA
    assert command.device.asked[-1] == ("add-authority", {"certificate": b"ca", "purpose": "lifecycle"})
