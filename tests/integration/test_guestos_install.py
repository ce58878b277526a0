# SPDX-License-Identifier: Apache-2.0
"""Installations from a push to their end: the manager's part, real workers, the vault's operations."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.integration import sandbox
from tests.integration import store_kit as kit
from tests.integration.image_server import certificate
from trustme_init.boot import installation
from trustme_init.boot.installation import Installations, Places
from trustme_init.control.installing import (
    GuestOsPush,
    InstallCompleted,
    InstallEvent,
    InstallFailed,
    InstallProgress,
    InstallStarted,
)
from trustme_init.control.loop import Loop
from trustme_init.control.state import Answered
from trustme_init.errors import Refusal
from trustme_init.guestos import worker
from trustme_init.guestos.pieces import PIECE_LIMIT, Piece
from trustme_init.guestos.plan import directory_url
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.provisioning import guestos as operations
from trustme_tools.guestos.signing import pki_signer, signed

pytestmark = pytest.mark.root
ROOT = Path(__file__).parents[2]
PATIENCE = 60.0


class Push:
    """One push and what is heard of it."""

    def __init__(self) -> None:
        self.events: list[InstallEvent] = []

    @property
    def plain(self) -> list[str]:
        """Everything but progress, by name; of a failure its code."""
        return [
            event.refusal.code if isinstance(event, InstallFailed) else type(event).__name__
            for event in self.events
            if not isinstance(event, InstallProgress)
        ]

    @property
    def over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], InstallCompleted | InstallFailed)


class Rig:
    """A loop with installations, whose vault is in this process."""

    def __init__(self, directory: Path) -> None:
        self.home = directory / "cml"
        self.home.mkdir()
        self.root = directory
        self.loop = Loop()
        self.vault = kit.operations(self.home)
        self.asked: list[str] = []
        self.held: list[Callable[[], None]] | None = None
        self.running: list[Any] = []
        places = Places(self.home, directory / "ca.pem", development=False)
        self.installations = Installations(self.loop, self._ask, places, lambda: self.running)
        self._descriptors = self._open()
        self._children = children()

    def _ask(self, operation: str, arguments: Mapping[str, str | bytes], done: Answered) -> None:
        self.asked.append(operation)

        def answer() -> None:
            try:
                result = operations.OPERATIONS[operation](self.vault, arguments)
            except Refusal as refusal:
                done({}, refusal)
            else:
                done(result, None)

        self.loop.call_soon(answer)

    def push(self, made: kit.Made, *, streamed: bool = False, caller: int | None = None) -> Push:
        """Begin an installation."""
        push = Push()
        files = GuestOsPush(made.signed.config, made.signed.signature, made.signed.certificate, streamed)
        pidfd = os.pidfd_open(os.getpid()) if caller is None else caller
        self.installations.push(files, pidfd, push.events.append)
        return push

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            self.loop.turn(0.05)

    def finish(self, *pushes: Push) -> None:
        """Wait until the pushes have ended, and their processes, and what follows."""
        self.until(lambda: all(push.over for push in pushes))
        self.until(lambda: children() <= self._children and self._open() == self._descriptors)

    def install(self, made: kit.Made) -> Push:
        push = self.push(made)
        self.finish(push)
        return push

    def piece(self, made: kit.Made, name: str, offset: int, data: bytes) -> str:
        """Send a part of an image; return the code of a refusal."""
        answers: list[Refusal | None] = []
        caller = os.pidfd_open(os.getpid())
        self.installations.piece(made.stem, Piece(name, offset, data), caller, answers.append)
        os.close(caller)
        self.until(lambda: answers)
        return "" if answers[0] is None else answers[0].code

    def from_files(self, version: int = 1, **options: Any) -> kit.Made:
        """Make a GuestOS whose images lie in this directory."""
        made = kit.make(version, base_url=f"file://{self.root}/updates", **options)
        made.serve(self.root)
        return made

    @staticmethod
    def _open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def names(self) -> list[str]:
        store = self.home / "operatingsystems"
        return sorted(path.name for path in store.iterdir()) if store.exists() else []

    def worker_pid(self) -> int:
        self.until(lambda: self.installations._worker)
        watched = self.installations._worker
        assert watched is not None
        return watched._worker.pid


def children() -> set[int]:
    """Return our child processes; tests of other modules may have left some."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.installations.close()
    rig.until(lambda: children() <= rig._children)
    rig.loop.close()


INSTALLED = ["exampleos-1", "exampleos-1.cert", "exampleos-1.conf", "exampleos-1.sig"]
DONE = ["InstallStarted", "InstallCompleted"]


# From files


def test_a_guestos_is_installed_from_files_with_progress(rig: Rig) -> None:
    made = rig.from_files(hashed={"extra": b"hello"}, verity={"root": kit.content(900)})
    push = rig.install(made)
    assert push.plain == DONE
    assert isinstance(push.events[0], InstallStarted)
    assert [(image.name, image.have) for image in push.events[0].images] == [
        *(("root.hash.img", 0), ("root.img", 0), ("extra.img", 0)),
    ]
    progress = [event for event in push.events if isinstance(event, InstallProgress)]
    assert [event.phase for event in progress] == sorted((event.phase for event in progress), reverse=True)
    last = progress[-1]
    assert last.done == last.total == 900 * kit.BLOCK + 5
    assert rig.names() == INSTALLED
    folder = rig.home / "operatingsystems/exampleos-1"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made.files
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_hash_image_with_upstreams_padding_and_an_unsigned_salt(rig: Rig) -> None:
    made = rig.from_files(salted=False)
    folder = Path(directory_url(str(rig.root / "updates"), made.stem))
    (folder / "root.hash.img").write_bytes(made.files["root.hash.img"] + bytes(1024 * 1024))
    assert rig.install(made).plain == DONE
    installed = rig.home / "operatingsystems/exampleos-1/root.hash.img"
    assert installed.read_bytes() == made.files["root.hash.img"]


def test_a_new_version_replaces_one_that_nobody_uses(rig: Rig) -> None:
    assert rig.install(rig.from_files(1)).plain == DONE
    assert rig.install(rig.from_files(2)).plain == DONE
    rig.until(lambda: rig.names() == [name.replace("-1", "-2") for name in INSTALLED])
    assert rig.install(rig.from_files(1)).plain == ["guestos-rolled-back"]


@pytest.mark.parametrize(
    "case", ["link", "link to folder", "fifo", "device", "folder", "socket", "missing", "short", "long"]
)
def test_row24_only_regular_files_of_the_right_size_are_taken(rig: Rig, case: str) -> None:
    made = rig.from_files()
    folder = Path(directory_url(str(rig.root / "updates"), made.stem))
    image = folder / "root.img"
    data = image.read_bytes()
    image.unlink()
    match case:
        case "link":
            (folder / "real").write_bytes(data)
            image.symlink_to("real")
        case "link to folder":
            image.write_bytes(data)
            folder.rename(folder.with_name("real"))
            folder.symlink_to("real")
        case "fifo":
            os.mkfifo(image)
        case "device":
            os.mknod(image, 0o600 | 0o020000, os.makedev(1, 5))
        case "folder":
            image.mkdir()
        case "socket":
            os.mknod(image, 0o600 | 0o140000)
        case "short":
            image.write_bytes(data[:-1])
        case "long":
            image.write_bytes(data + b"x")
    assert rig.install(made).plain == ["InstallStarted", "image-source-unfit"]
    assert rig.vault.store.installed() == ()


def test_a_path_leads_nowhere_outside_the_callers_root(rig: Rig, tmp_path: Path) -> None:
    """The caller is confined to a directory; `..`, absolute paths and links stay in there."""
    jail = tmp_path / "jail"
    jail.mkdir()
    made = kit.make(1, base_url="file://../../../updates")
    made.serve(jail)
    outside = kit.make(2, base_url=f"file://{tmp_path}/outside")
    outside.serve(tmp_path, "outside")
    linked = kit.make(3, base_url="file://linked")
    made_there = linked.serve(tmp_path, "outside")
    (jail / "linked").symlink_to(made_there.parents[2])
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, time; os.chroot({str(jail)!r}); print(1, flush=True); time.sleep(99)",
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        pushes = []
        for each in (made, outside, linked):
            pushes.append(push := rig.push(each, caller=os.pidfd_open(process.pid)))
            rig.until(lambda push=push: push.over)  # type: ignore[misc]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [push.plain[-1] for push in pushes] == [
        *("InstallCompleted", "image-source-unfit", "image-source-unfit"),
    ]


def test_a_caller_that_has_ended_has_no_files(rig: Rig) -> None:
    process = subprocess.Popen(["true"])
    caller = os.pidfd_open(process.pid)
    process.wait()
    push = rig.push(rig.from_files(), caller=caller)
    rig.finish(push)
    assert push.plain == ["InstallStarted", "caller-gone"]


def test_wrong_content_is_removed_and_the_next_push_starts_anew(rig: Rig) -> None:
    made = rig.from_files()
    folder = Path(directory_url(str(rig.root / "updates"), made.stem))
    for name in made.files:
        wrong = bytearray(made.files[name])
        wrong[-kit.BLOCK] ^= 1
        (folder / name).write_bytes(wrong)
        assert rig.install(made).plain == ["InstallStarted", "verity-mismatch"]
        assert rig.names() == []
        (folder / name).write_bytes(made.files[name])
    assert rig.install(made).plain == DONE


def test_an_installation_goes_on_with_what_an_earlier_one_has_fetched(rig: Rig) -> None:
    made = rig.from_files()
    folder = Path(directory_url(str(rig.root / "updates"), made.stem))
    (folder / "root.img").unlink()
    assert rig.install(made).plain[-1] == "image-source-unfit"
    rig.vault.stage(made.signed, repair=False)
    staged = rig.home / "operatingsystems/.staging-exampleos-1/images"
    (staged / "root.img").write_bytes(made.files["root.img"][:5000])
    made.serve(rig.root)
    push = rig.install(made)
    assert isinstance(push.events[0], InstallStarted)
    assert [image.have for image in push.events[0].images] == [0, 5000]
    assert push.plain == DONE


def test_the_same_push_again_looks_at_the_images_and_repairs_them(rig: Rig) -> None:
    made = rig.from_files()
    assert rig.install(made).plain == DONE
    asked = len(rig.asked)
    assert rig.install(made).plain == DONE
    assert "guestos-publish" not in rig.asked[asked:]
    image = rig.home / "operatingsystems/exampleos-1/root.img"
    image.write_bytes(kit.content(5, "damaged"))
    assert rig.install(made).plain == DONE
    assert image.read_bytes() == made.files["root.img"]
    image.unlink()
    assert rig.install(made).plain == DONE
    assert image.read_bytes() == made.files["root.img"]


# Several at once, and processes that end


def test_two_pushes_of_the_same_are_one_installation(rig: Rig) -> None:
    made = rig.from_files()
    pushes = [rig.push(made) for _ in range(3)]
    rig.finish(*pushes)
    assert all(push.plain[-1] == "InstallCompleted" for push in pushes)
    assert rig.asked.count("guestos-publish") == 1
    assert rig.names() == INSTALLED


def test_pushes_wait_for_their_turn_and_too_many_are_refused(rig: Rig) -> None:
    first = kit.make(1, name="streamed")
    holding = rig.push(first, streamed=True)
    rig.until(lambda: holding.plain == ["InstallStarted"])
    others = [kit.make(1, name=f"os{n}", base_url=f"file://{rig.root}/updates") for n in range(9)]
    for each in others:
        each.serve(rig.root)
    pushes = [rig.push(each) for each in others]
    rig.until(lambda: all(push.events for push in pushes))
    assert [push.plain for push in pushes] == [["InstallWaiting"]] * 8 + [["installations-busy"]]
    answers: list[Refusal | None] = []
    rig.installations.remove("os0", lambda _result, refusal: answers.append(refusal))
    assert answers[0] is not None
    assert answers[0].code == "guestos-in-use"
    for name, data in first.files.items():
        assert rig.piece(first, name, 0, data) == ""
    rig.finish(holding, *pushes)
    assert holding.plain == DONE
    assert [push.plain for push in pushes[:8]] == [["InstallWaiting", *DONE]] * 8


@pytest.mark.parametrize("phase", ["fetch", "check"])
def test_a_killed_worker_ends_its_installation_and_the_next_push_completes_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    made = rig.from_files()

    def stuck(*_: Any) -> Any:
        return lambda _reporter: time.sleep(PATIENCE)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "fetcher" if phase == "fetch" else "checker", stuck)
        push = rig.push(made)
        if phase == "fetch":
            rig.until(lambda: push.plain == ["InstallStarted"])
        else:
            current = rig.installations._current
            rig.until(lambda: (current := rig.installations._current) and current.phase == "check")
            assert current is None or current.stem == made.stem
        os.kill(rig.worker_pid(), signal.SIGKILL)
        rig.finish(push)
    assert push.plain == ["InstallStarted", "installer-ended"]
    assert rig.vault.store.installed() == ()
    again = rig.install(made)
    assert again.plain == DONE
    assert isinstance(again.events[0], InstallStarted)
    # What was fetched is not lost because its check did not come to an end.
    assert [image.have == image.size for image in again.events[0].images] == [phase == "check"] * 2


def test_an_installation_that_stalls_is_ended(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "STALL_TIME", 0.2)
    made = kit.make(1)
    push = rig.push(made, streamed=True)  # and the client sends nothing
    rig.finish(push)
    assert push.plain == ["InstallStarted", "installation-stalled"]


def test_closing_ends_the_worker_and_frees_everything(rig: Rig) -> None:
    push = rig.push(kit.make(1), streamed=True)
    rig.until(lambda: push.plain == ["InstallStarted"])
    rig.installations.close()
    rig.until(lambda: children() <= rig._children and Rig._open() == rig._descriptors)
    assert not push.over


def test_row29_a_worker_has_no_privileges_and_no_descriptors_of_the_manager(rig: Rig) -> None:
    with (rig.root / "a file of the manager").open("wb"):
        push = rig.push(kit.make(1), streamed=True)
        rig.until(lambda: push.plain == ["InstallStarted"])
        pid = rig.worker_pid()

        def status() -> dict[str, str]:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

        rig.until(lambda: status()["NoNewPrivs"] == "1")
        found = status()
        assert found["Uid"].split() == found["Gid"].split() == [str(worker.NOBODY)] * 4
        assert found["Groups"] == ""
        assert {found[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
        places = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir() if int(path.name) > 2]
        own = {".staging-exampleos-1", "socket:", "pidfd"}
        assert all(any(word in str(place) for word in own) for place in places), places


def test_a_full_disk_is_said_and_the_place_is_kept(rig: Rig, tmp_path: Path) -> None:
    home = tmp_path / "small"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", home], check=True)
    try:
        rig.vault = kit.operations(home)
        rig.installations._places = Places(home, rig.root / "ca.pem", development=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trustme_init.guestos.staging.RESERVE", -(2**40))
            made = rig.from_files(verity={"root": kit.content(900)})
            push = rig.install(made)
        assert push.plain == ["InstallStarted", "guestos-unwritable"]
        assert (home / "operatingsystems/.staging-exampleos-1/images/root.img").stat().st_size > 0
    finally:
        subprocess.run(["umount", home], check=True)


# A stream from the client


def test_images_are_streamed_in_pieces(rig: Rig) -> None:
    made = kit.make(1, verity={"root": kit.content(600)})
    push = rig.push(made, streamed=True)
    rig.until(lambda: push.events)
    for name, data in made.files.items():
        for offset in range(0, len(data), PIECE_LIMIT):
            assert rig.piece(made, name, offset, data[offset : offset + PIECE_LIMIT]) == ""
    rig.finish(push)
    assert push.plain == DONE
    assert (rig.home / "operatingsystems/exampleos-1/root.img").read_bytes() == made.files["root.img"]


@pytest.mark.parametrize(
    ("name", "offset", "size"),
    [
        ("root.img", 1, 10),
        ("root.img", 2**63, 10),
        ("root.img", 0, 0),
        ("root.img", 0, 5 * kit.BLOCK + 1),
        ("other.img", 0, 10),
        ("../root.img", 0, 10),
        ("", 0, 10),
    ],
)
def test_row2_a_piece_that_does_not_fit_ends_the_stream(rig: Rig, name: str, offset: int, size: int) -> None:
    made = kit.make(1)
    push = rig.push(made, streamed=True)
    rig.until(lambda: push.events)
    assert rig.piece(made, name, offset, bytes(size)) == "image-piece-unfit"
    rig.finish(push)
    assert push.plain == ["InstallStarted", "image-piece-unfit"]


def test_a_piece_that_nobody_waits_for_is_refused_and_harms_nothing(rig: Rig) -> None:
    made = kit.make(1)
    assert rig.piece(made, "root.img", 0, b"x") == "image-piece-unfit"
    push = rig.push(made, streamed=True)
    rig.until(lambda: push.events)
    for name, data in (("root.img", bytes(PIECE_LIMIT + 1)), ("x" * 256, b"x")):
        assert rig.piece(made, name, 0, data) == "image-piece-unfit"
    assert rig.piece(kit.make(2), "root.img", 0, b"x") == "image-piece-unfit"
    # Another process than the one that pushed.
    other = subprocess.Popen(["sleep", "60"])
    caller = os.pidfd_open(other.pid)
    answers: list[Refusal | None] = []
    rig.installations.piece(made.stem, Piece("root.img", 0, b"x"), caller, answers.append)
    other.kill()
    other.wait()
    os.close(caller)
    assert answers[0] is not None
    for name, data in made.files.items():
        assert rig.piece(made, name, 0, data) == ""
    rig.finish(push)
    assert push.plain == DONE


# From a server


def test_images_are_fetched_over_tls_by_the_network_of_the_caller(rig: Rig) -> None:
    """The server is in a network namespace of its own, and so is who asks; this process is not."""
    certificate(rig.root)
    script = f"""
import sys
from pathlib import Path
from tests.integration.image_server import serve_forever
files = {{}}
folder = Path({str(rig.root / "updates")!r})
say = lambda url: print(url, flush=True)
class Files(dict):
    def get(self, path):
        file = folder / path.lstrip("/")
        return file.read_bytes() if file.is_file() else None
serve_forever(Files(), Path({str(rig.root / "server.pem")!r}), say)
"""
    server = subprocess.Popen(
        [
            *("unshare", "--net", "--kill-child", "--fork"),
            *("sh", "-c", 'ip link set lo up && exec "$0" -c "$1"', sys.executable, script),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    )
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    inside = int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()[0])
    try:
        made = kit.make(1, base_url=url)
        made.serve(rig.root)
        push = rig.push(made, caller=os.pidfd_open(inside))
        rig.until(lambda: push.over)
        assert push.plain == DONE
        assert rig.names() == INSTALLED
        # The device itself has not reached it, and has kept its own /etc.
        assert Path("/etc/passwd").exists()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        # Ours by now where an earlier test has made this process a subreaper.
        with suppress(ChildProcessError):
            os.waitpid(inside, 0)


# Over the control socket of a booted device, from inside its core container


INSIDE = ("-U", "-m", "-p", "-n", "-i", "-u", "-S", "0", "-G", "0", "--")


class InCore:
    """Runs programs in the core container of a boot."""

    def __init__(self, boot: sandbox.Boot) -> None:
        self._enter = ["nsenter", "-t", str(boot.core_pid()), *INSIDE]

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write files below /data."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        code = "import tarfile, sys; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/data')"
        subprocess.run(
            [*self._enter, "/usr/bin/python3", "-c", code], input=buffer.getvalue(), check=True, timeout=60
        )

    def control(self, *arguments: str) -> tuple[int, str]:
        """Run the command there."""
        command = [*self._enter, "/usr/bin/python3", "-m", "trustme_init.control.cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stdout + done.stderr


def test_row3_row4_row32_an_operator_installs_lists_and_removes(
    device: Callable[..., sandbox.Device], factory: sandbox.Factory
) -> None:
    signer = pki_signer(factory.pki, "guestos")

    def made(version: int, blocks: int = 300) -> kit.Made:
        return kit.make(
            version,
            base_url="file://data/updates",
            verity={"root": kit.content(blocks)},
            signer=lambda config: signed(signer, config),
        )

    def files(made: kit.Made, *, images: bool) -> dict[str, bytes]:
        folder = directory_url("updates", made.stem)
        found = dict(zip(("conf", "sig", "cert"), (made.signed.config, made.signed.signature), strict=False))
        found["cert"] = made.signed.certificate
        return found | ({f"{folder}/{name}": data for name, data in made.files.items()} if images else {})

    push = ("push_guestos_config", "/data/conf", "/data/sig", "/data/cert")
    with device().boot() as boot:
        boot.wait_running()
        boot.wait_prepared()
        core = InCore(boot)
        core.put(files(made(3), images=True))
        code, said = core.control(*push)
        assert (code, "no-anchor" in said) == (1, True)
        boot.request(
            Request.REGISTER_NEWCA,
            guestos_rootcert=factory.pki.certificate("guestos_subca").public_bytes(Encoding.PEM),
        )
        assert not list(boot.data("cml/operatingsystems").glob("*"))
        code, said = core.control(*push)
        assert (code, said.splitlines()[-1]) == (0, "Installation completed."), said
        code, said = core.control("list_guestos")
        lines = [line.split() for line in said.splitlines()]
        assert [line[:3] for line in lines] == [
            ["NAME", "VERSION", "STATE"],
            ["trustme-coreos", "10", "core"],
            ["exampleos", "3", "installed"],
        ]
        # A stream, for what the container has no room for; then an older one, and one that is damaged.
        newer = made(4, 301)
        core.put(files(newer, images=False) | {f"images/{name}": data for name, data in newer.files.items()})
        code, said = core.control(*push, "--stream", "/data/images")
        assert (code, said.splitlines()[-1]) == (0, "Installation completed."), said
        core.put(files(made(3), images=False))
        assert "guestos-rolled-back" in core.control(*push)[1]
        damaged = made(5)
        core.put(files(damaged, images=False) | {"conf": damaged.signed.config + b"#"})
        assert "bad-signature" in core.control(*push)[1]
        reply = boot.ask(Request.LIST_GUESTOS_CONFIGS)
        assert [(each.name, each.version) for each in reply.guestos_configs] == [
            *(("trustme-coreos", 10), ("exampleos", 4)),
        ]
        assert "guestos-is-core" in core.control("remove_guestos", "trustme-coreos")[1]
        assert core.control("remove_guestos", "exampleos") == (0, "Done.\n")
        assert "guestos-missing" in core.control("remove_guestos", "exampleos")[1]
        assert not list(boot.data("cml/operatingsystems").iterdir())
        # A client outside the device's processes is nobody whose files could be taken.
        reply = boot.request(
            Request.PUSH_GUESTOS_CONFIG,
            guestos_config_file=newer.signed.config,
            guestos_config_signature=newer.signed.signature,
            guestos_config_certificate=newer.signed.certificate,
        )
        assert reply.response == Reply.GUESTOS_MGR_INSTALL_STARTED
    shutil.rmtree(boot.device.directory, ignore_errors=True)
