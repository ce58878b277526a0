# SPDX-License-Identifier: Apache-2.0
"""GuestOSes over the control interface: the handlers with a device that is none, and the command's side."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control.fake_device import COREOS, FakeDevice
from trustme_init.control.cli import guestos, output
from trustme_init.control.cli.main import build_parser
from trustme_init.control.cli.session import Format, LocalProblem, Session
from trustme_init.control.client import ControlClient
from trustme_init.control.dispatch import Dispatcher
from trustme_init.control.gate import Socket
from trustme_init.control.installing import (
    GuestOsImage,
    InstallCompleted,
    InstallEvent,
    InstallFailed,
    InstallProgress,
    InstallStarted,
    InstallWaiting,
)
from trustme_init.control.transport import Wait
from trustme_init.errors import ControlRefusal, StorageRefusal, TrustRefusal
from trustme_init.guestos.pieces import Piece
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.proto.control_pb2 import GuestOSImage, GuestOSInstall, GuestOSState

STARTED = InstallStarted("exampleos-3", (GuestOsImage("root.img", 10, 4),))
PROGRESS = InstallProgress("exampleos-3", "fetch", "root.img", 6, 16, 20)
ROOT_HASH = "ab" * 32
CONFIG = f"""name: "exampleos" hardware: "x86" version: 3 description {{ en: "an example" }}
mounts {{ image_file: "root" mount_point: "/" fs_type: "squashfs" mount_type: SHARED_RW image_size: 4096
image_verity_sha256: "{ROOT_HASH}" }}
""".encode()


class Client:
    """A connection to a dispatcher, with a process at its other end."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.replies: list[Reply] = []
        self.log: list[str] = []

    def ask(self, command: Request.Command.ValueType, *, gone: bool = False, **fields: Any) -> list[Reply]:
        body = Request(command=command, **fields).SerializeToString()

        def peer() -> int:
            if gone:
                raise ControlRefusal("caller-gone", "it has ended")
            return os.pidfd_open(os.getpid())

        dispatcher = Dispatcher(self.device, log=self.log.append)
        for part in dispatcher.answer(body, Socket.PRIVILEGED, self._push, peer):
            if isinstance(part, Wait):
                part.start(lambda: None)
            elif isinstance(part, bytes):
                self._push(part)
        return self.replies

    def _push(self, body: bytes) -> bool:
        self.replies.append(Reply.FromString(body))
        return True


@pytest.fixture
def client() -> Client:
    return Client(FakeDevice())


def words(replies: list[Reply]) -> list[str]:
    return [
        Reply.Response.Name(reply.response) if reply.code == Reply.RESPONSE else Reply.Code.Name(reply.code)
        for reply in replies
    ]


def pushed(client: Client, *events: InstallEvent, **fields: Any) -> list[Reply]:
    client.device.installations.events = list(events)
    return client.ask(
        Request.PUSH_GUESTOS_CONFIG,
        guestos_config_file=b"config",
        guestos_config_signature=b"signature",
        guestos_config_certificate=b"certificate",
        **fields,
    )


def test_an_original_client_hears_of_start_and_end_in_this_order(client: Client) -> None:
    replies = pushed(client, STARTED, PROGRESS, InstallCompleted("exampleos-3"))
    assert words(replies) == ["GUESTOS_MGR_INSTALL_STARTED", "GUESTOS_MGR_INSTALL_COMPLETED"]
    assert not any(reply.HasField("guestos_install") for reply in replies)
    (push,) = client.device.installations.pushed
    assert (push.config, push.signature, push.certificate) == (b"config", b"signature", b"certificate")
    assert not push.streamed


def test_who_asks_for_it_hears_of_the_images_and_of_progress(client: Client) -> None:
    replies = pushed(client, InstallWaiting(), STARTED, PROGRESS, guestos_progress=True)
    assert words(replies) == [
        *("GUESTOS_MGR_INSTALL_WAITING", "GUESTOS_MGR_INSTALL_STARTED", "GUESTOS_PROGRESS"),
    ]
    (image,) = replies[1].guestos_install.images
    assert (image.name, image.size, image.have) == ("root.img", 10, 4)
    progress = replies[2].guestos_install
    assert (progress.name, progress.version, progress.phase, progress.file) == (
        *("exampleos", 3, "fetch", "root.img"),
    )
    assert (progress.done, progress.total) == (16, 20)


def test_what_happens_later_comes_later(client: Client) -> None:
    assert words(pushed(client, STARTED)) == ["GUESTOS_MGR_INSTALL_STARTED"]
    heard = client.device.installations.heard
    assert heard is not None
    heard(InstallFailed(StorageRefusal("image-source-unfit", "a cause", evidence="e", remedy="r")))
    assert words(client.replies)[1:] == ["GUESTOS_MGR_INSTALL_FAILED"]
    assert client.replies[1].refusal.code == "image-source-unfit"


def test_a_refused_push_says_why(client: Client) -> None:
    (reply,) = pushed(client, InstallFailed(TrustRefusal("bad-signature", "a cause")))
    assert (words([reply]), reply.refusal.code) == (["GUESTOS_MGR_INSTALL_FAILED"], "bad-signature")


def test_a_client_that_is_gone_installs_nothing(client: Client) -> None:
    (reply,) = client.ask(Request.PUSH_GUESTOS_CONFIG, gone=True)
    assert (words([reply]), reply.refusal.code) == (["GUESTOS_MGR_INSTALL_FAILED"], "caller-gone")
    assert client.device.installations.pushed == []
    assert words(client.ask(Request.PUSH_GUESTOS_IMAGE, gone=True)[1:]) == ["CMD_FAILED"]


def test_a_piece_is_handed_on_and_answered(client: Client) -> None:
    fields: dict[str, Any] = {"guestos_name": "exampleos", "guestos_version": 3, "image_file": "root.img"}
    before = len(list(Path("/proc/self/fd").iterdir()))
    client.ask(Request.PUSH_GUESTOS_IMAGE, **fields, image_offset=2**63, image_data=b"data")
    assert client.device.installations.pieces == [("exampleos-3", Piece("root.img", 2**63, b"data"))]
    client.device.installations.refusal = ControlRefusal("image-piece-unfit", "a cause")
    client.ask(Request.PUSH_GUESTOS_IMAGE, **fields)
    assert words(client.replies) == ["CMD_OK", "CMD_FAILED"]
    assert client.replies[1].refusal.code == "image-piece-unfit"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_removal(client: Client) -> None:
    client.ask(Request.REMOVE_GUESTOS, guestos_name="exampleos")
    assert client.device.installations.removed == ["exampleos"]
    client.device.installations.refusal = ControlRefusal("guestos-in-use", "a cause")
    client.ask(Request.REMOVE_GUESTOS, guestos_name="exampleos")
    client.device.installations.refusal = ControlRefusal("provisioning-closed", "over")
    client.ask(Request.REMOVE_GUESTOS, guestos_name="exampleos")
    assert words(client.replies) == ["CMD_OK", "CMD_FAILED", "CMD_UNSUPPORTED"]


def listed(version: int, why: str = "") -> dict[str, Any]:
    return {"name": "exampleos", "version": version, "size": 3 * 2**20, "why": why}


def test_the_list_has_the_good_configurations_and_the_state_of_all(client: Client) -> None:
    client.device.answers["guestos-list"] = {"guestos": [listed(2, "bad-signature"), listed(3)], "staged": []}
    client.device.answers["guestos-config"] = {"config": base64.b64encode(CONFIG).decode()}
    (reply,) = client.ask(Request.LIST_GUESTOS_CONFIGS)
    assert [(each.name, each.version) for each in reply.guestos_configs] == [
        *((COREOS.name, 7), ("exampleos", 3)),
    ]
    assert [(each.version, each.core, each.why_not) for each in reply.guestos_states] == [
        *((7, True, ""), (2, False, "bad-signature"), (3, False, "")),
    ]
    assert client.device.asked[-1] == ("guestos-config", {"stem": "exampleos-3"})
    client.device.answers["guestos-config"] = TrustRefusal("certificate-expired", "since the list was made")
    reply = client.ask(Request.LIST_GUESTOS_CONFIGS)[-1]
    assert [each.why_not for each in reply.guestos_states] == ["", "bad-signature", "certificate-expired"]
    assert len(reply.guestos_configs) == 1
    client.device.answers["guestos-list"] = StorageRefusal("guestos-unreadable", "a cause")
    reply = client.ask(Request.LIST_GUESTOS_CONFIGS)[-1]
    assert (len(reply.guestos_configs), reply.refusal.code) == (1, "guestos-unreadable")


# The command


class Scripted(ControlClient):
    """A client whose device says what it was told to."""

    def __init__(self, *replies: Reply) -> None:
        super().__init__(Path("unused"))
        self._script: Iterator[Reply] = iter(replies)
        self.sent: list[Request] = []

    def send(self, message: Request, timeout: float | None = None) -> None:
        self.sent.append(message)

    def receive(self, timeout: float | None = None) -> Reply:
        return next(self._script)


def response(code: Reply.Response.ValueType) -> Reply:
    return Reply(code=Reply.RESPONSE, response=code)


def started(*images: tuple[str, int, int]) -> Reply:
    reply = response(Reply.GUESTOS_MGR_INSTALL_STARTED)
    reply.guestos_install.CopyFrom(
        GuestOSInstall(
            name="exampleos",
            version=3,
            images=[GuestOSImage(name=name, size=size, have=have) for name, size, have in images],
        )
    )
    return reply


PROGRESS_REPLY = Reply(
    code=Reply.GUESTOS_PROGRESS,
    guestos_install=GuestOSInstall(
        name="exampleos", version=3, phase="fetch", file="\x1b[2J", done=1, total=2
    ),
)
COMPLETED = response(Reply.GUESTOS_MGR_INSTALL_COMPLETED)
FAILED = response(Reply.GUESTOS_MGR_INSTALL_FAILED)
OK = response(Reply.CMD_OK)


def run(directory: Path, client: Scripted, *arguments: str, format_: Format = Format.READABLE) -> int:
    for name in ("conf", "sig", "cert"):
        (directory / name).write_bytes(name.encode())
    paths = [str(directory / name) for name in ("conf", "sig", "cert")]
    options = build_parser().parse_args(["push_guestos_config", *paths, *arguments])
    return guestos.push(Session(client, "push_guestos_config", format_), options)


def test_images_are_sent_on_from_what_the_device_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestos, "PIECE", 4)
    (tmp_path / "a.img").write_bytes(b"0123456789")
    (tmp_path / "b.img").write_bytes(b"abc and more than is wanted")
    client = Scripted(
        PROGRESS_REPLY,
        started(("a.img", 10, 3), ("b.img", 3, 0), ("c.img", 9, 9)),
        *(OK, PROGRESS_REPLY, OK, OK, PROGRESS_REPLY, COMPLETED),
    )
    (tmp_path / "c.img").write_bytes(b"whole")
    assert run(tmp_path, client, "--stream", str(tmp_path)) == output.OK
    first, *pieces = client.sent
    assert (first.guestos_streamed, first.guestos_progress) == (True, True)
    assert [(piece.image_file, piece.image_offset, piece.image_data) for piece in pieces] == [
        *(("a.img", 3, b"3456"), ("a.img", 7, b"789"), ("b.img", 0, b"abc")),
    ]
    assert {(piece.guestos_name, piece.guestos_version) for piece in pieces} == {("exampleos", 3)}
    assert capsys.readouterr().out == "Installation started.\nInstallation completed.\n"


@pytest.mark.parametrize("refused", [(FAILED,), (response(Reply.CMD_FAILED), FAILED)])
def test_a_stream_that_is_refused_ends(tmp_path: Path, refused: tuple[Reply, ...]) -> None:
    (tmp_path / "a.img").write_bytes(b"0123456789")
    client = Scripted(started(("a.img", 10, 0)), *refused)
    assert run(tmp_path, client, "--stream", str(tmp_path)) == output.FAILED


@pytest.mark.parametrize("content", [None, b"012"])
def test_an_image_that_is_not_here_is_a_local_problem(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.img").write_bytes(content)
    client = Scripted(started(("../a.img", 10, 3)))
    with pytest.raises(LocalProblem, match=r"a\.img"):
        run(tmp_path, client, "--stream", str(tmp_path))


@pytest.mark.parametrize("format_", [Format.TEXT, Format.JSON])
def test_programs_are_told_nothing_that_an_original_would_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: Format
) -> None:
    client = Scripted(response(Reply.GUESTOS_MGR_INSTALL_STARTED), FAILED)
    assert run(tmp_path, client, format_=format_) == output.FAILED
    assert not client.sent[0].HasField("guestos_progress")
    assert "GUESTOS_MGR_INSTALL_FAILED" in capsys.readouterr().out


def test_row27_progress_of_a_hostile_device_is_shown_harmlessly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    guestos._show_progress(PROGRESS_REPLY)
    assert capsys.readouterr().err == "\r\x1b[KFetching \\x1b[2J: 50 %"


def test_the_table_of_guestoses() -> None:
    reply = Reply(
        code=Reply.GUESTOS_CONFIGS_LIST,
        guestos_configs=[COREOS],
        guestos_states=[
            GuestOSState(name=COREOS.name, version=7, core=True, size=0),
            GuestOSState(name="exampleos", version=2, core=False, size=3 * 2**20, why_not="bad-signature"),
        ],
    )
    lines = [line.split() for line in output.readable(reply).splitlines()]
    assert lines[0] == ["NAME", "VERSION", "STATE", "MIB", "HARDWARE", "IMAGES", "DESCRIPTION"]
    assert lines[1][:4] == ["trustme-coreos", "7", "core", "x86"]
    assert lines[2] == ["exampleos", "2", "NOT", "USED:", "bad-signature", "3.0"]
    # A device of the original tells of no states.
    del reply.guestos_states[:]
    assert "installed" in output.readable(reply)
