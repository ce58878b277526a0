# SPDX-License-Identifier: Apache-2.0
"""`trustme provision` against booted devices: one walked through each way there is, and twenty at once."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from scripts import provisioning_transcripts
from tests.integration.sandbox import Boot, Device, Factory
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.guestos.signing import pki_signer
from trustme_tools.machine.console import Terminal
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.device import sign_device
from trustme_tools.pki.request import read_request
from trustme_tools.provision import fleet, plan, remote, settings
from trustme_tools.provision.console import ConsoleTransport
from trustme_tools.provision.report import Report
from trustme_tools.provision.transport import Output, Transport, UnixTransport, Word, unreachable

pytestmark = pytest.mark.root
Make = Callable[..., Device]
Change = Callable[[dict[str, Any]], object]
PIN = "canary-pin-4711"
SELF_PROVISIONING = {
    "development": "true",
    "self_provisioning": "true",
    "require": json.dumps(["device-certificate", "token"]),
}
SOCKET = "/run/trustme/compartments/00000000-0000-0000-0000-000000000000/socket/cml-control"


class Station:
    """A provisioning station: its settings file, the PIN file, and what its runs said."""

    def __init__(self, directory: Path, factory: Factory, capfd: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.factory = factory
        self.said = ""
        self._capfd = capfd
        directory.mkdir(exist_ok=True)
        self.settings: dict[str, Any] = {
            "version": 1,
            "guest_anchors": [str(factory.pki.certificate_path("guestos_subca"))],
            "device_anchors": [str(factory.pki.certificate_path("device_subca"))],
            "device_ca": {"pki": str(factory.pki.path)},
            "token": {"pin": self.secret("pin", PIN)},
            "wait": 60,
        }

    def secret(self, name: str, text: str) -> str:
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(f"{text}\n")
        return f"file:{name}"

    def run(self, *words: str, **changes: Any) -> tuple[int, dict[str, Any]]:
        """Provision; return the exit code and the JSON envelope."""
        path = self.directory / "station.yml"
        # JSON is YAML.
        path.write_text(json.dumps(self.settings | changes))
        self._capfd.readouterr()
        code = main.main(["provision", "--json", str(path), *words])
        out, err = self._capfd.readouterr()
        self.said += out + err
        return code, json.loads(out)

    def device(self, *words: str, **changes: Any) -> dict[str, Any]:
        """Provision one device, whatever becomes of it; return its report."""
        code, envelope = self.run(*words, **changes)
        (report,) = envelope["result"]["devices"]
        assert (code == 0) == report["good"] == envelope["result"]["good"], report
        return dict(report)

    def failure(self, *words: str, **changes: Any) -> str:
        """Provision one device and return the code of what stopped it."""
        report = self.device(*words, **changes)
        assert report["error"] is not None, report
        assert report["error"]["cause"]
        return str(report["error"]["code"])


@pytest.fixture
def station(tmp_path: Path, factory: Factory, capfd: pytest.CaptureFixture[str]) -> Station:
    return Station(tmp_path / "station", factory, capfd)


def unix(boot: Boot) -> str:
    return f"unix:{boot.path(SOCKET)}"


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["outcome"] for step in report["steps"]}


def record(station: Station, report: dict[str, Any]) -> x509.Certificate:
    path = station.directory / f"records/{report['device_uuid']}.cert"
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_device_is_walked_from_its_first_boot_to_the_closed_door(
    device: Make, factory: Factory, station: Station
) -> None:
    target = device()
    with target.boot() as boot:
        boot.wait_for("stage 1")
        report = station.device(unix(boot))  # it waits until the device is prepared
        assert report["good"], report
        assert [step["name"] for step in report["steps"]] == [
            *("prepared", "anchors", "certificate", "token", "completion", "closed door"),
        ]
        assert {*outcomes(report).values()} == {"done"}
        status = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert status.completed
        certificate = x509.load_pem_x509_certificate(boot.data("cml/tokens/device.cert").read_bytes())
        assert certificate == record(station, report)
        assert report["device_uuid"] == status.device_uuid
        assert report["device_key_sha256"] == status.device_key_sha256
        assert (
            report["certificate"]["sha256"]
            == report["certificate_sha256"]
            == status.device_certificate_sha256
        )
        assert report["certificate"]["not_after"].startswith(f"{certificate.not_valid_after_utc:%Y-%m-%d}")
        assert report["record_sha256"] == status.record_sha256 != ""
        assert report["marker"] == "TPM NV index"
        assert report["ek_sha256"] == endorsement_key(boot)
        assert report["anchors"] == {
            "guest": [hashlib.sha256(factory.certificate("guestos_subca")).hexdigest()],
            "device": [hashlib.sha256(factory.certificate("device_subca")).hexdigest()],
            "lifecycle": [],
        }
        assert report["token"]["kind"] == "softtoken"
        assert report["token"]["default_pin"] is False
        # Credential activation leaves the maker's word only: a swtpm has no EK certificate here.
        assert [text for text in report["unproven"] if "AK and EK" in text] == []
        assert len(report["unproven"]) == 1
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).token.kind == "softtoken"
        kept = json.loads((station.directory / f"records/{status.device_uuid}.json").read_bytes())
        assert kept == report

        again = station.device(unix(boot))
        assert again["good"], again
        assert again["looked_only"]
        assert again["ek_sha256"] == report["ek_sha256"]
        assert [step["name"] for step in again["steps"]] == ["prepared", "closed door"]
        assert json.loads((station.directory / f"records/{status.device_uuid}.json").read_bytes()) == report


def endorsement_key(boot: Boot) -> str:
    """Have tpm2-tools say which endorsement key the TPM has, as reports name it."""
    path = boot.device.directory / "ek.pem"
    subprocess.run(
        [
            *("tpm2_createek", "-T", boot.tpm.tcti, "-G", "ecc"),
            *("-c", path.with_suffix(".ctx"), "-f", "pem", "-u", path),
        ],
        check=True,
        capture_output=True,
    )
    # There is no resource manager: what is left loaded would be missing to the device.
    subprocess.run(["tpm2_flushcontext", "-T", boot.tpm.tcti, "-t"], check=True)
    spki = load_pem_public_key(path.read_bytes()).public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


# Begun again


def test_a_walk_goes_on_where_it_was_interrupted(device: Make, station: Station) -> None:
    failing = {"sign_command": "false", "certificate": station.settings["device_anchors"][0]}
    with device().boot() as boot:
        boot.wait_prepared()
        assert station.failure(unix(boot), device_ca=failing) == "sign-command-failed"
        assert not (station.directory / "records").exists()
        too_long = {"pin": station.secret("long", "1" * 129)}
        assert station.failure(unix(boot), token=too_long) == "token-bad-pin"
        path = boot.data("cml/tokens/device.cert")
        before = path.read_bytes(), path.stat().st_ino
        report = station.device(unix(boot))
        assert outcomes(report) == {
            "prepared": "done",
            "anchors": "already there",
            "certificate": "already there",
            "token": "done",
            "completion": "done",
            "closed door": "done",
        }
        assert (path.read_bytes(), path.stat().st_ino) == before, "the certificate was pushed again"


def test_a_certificate_that_was_signed_and_not_delivered_is_not_signed_again(
    device: Make, factory: Factory, station: Station
) -> None:
    class Cut(UnixTransport):
        def control(self, words: Sequence[Word], **options: Any) -> Output:
            if "push_cert" in words:
                raise unreachable("the cable was pulled")
            return super().control(words, **options)

    with device().boot() as boot:
        boot.wait_prepared()
        (report,) = provision(station, Cut(boot.path(SOCKET)))
        assert report.error is not None
        assert report.error["code"] == "unreachable"
        (kept,) = (station.directory / "records").glob("*.cert")
        signed = kept.read_bytes()
        done = station.device(unix(boot))
        assert done["good"]
        assert kept.read_bytes() == signed == boot.data("cml/tokens/device.cert").read_bytes()
        assert "of an earlier run" in next(s["detail"] for s in done["steps"] if s["name"] == "certificate")


def test_a_record_that_is_another_key_s_is_not_used(device: Make, station: Station) -> None:
    with device().boot() as boot:
        uuid = boot.wait_prepared()
        records = station.directory / "records"
        records.mkdir()
        stranger = issue_for(station.factory, UUID(uuid))
        (records / f"{uuid}.cert").write_bytes(stranger)
        report = station.device(unix(boot))
        assert report["good"]
        assert (records / f"{uuid}.cert").read_bytes() != stranger


def issue_for(factory: Factory, uuid: UUID) -> bytes:
    """Issue a certificate with a device's UUID for a key that is not its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"UUID:{uuid}")])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    request = read_request(csr.public_bytes(Encoding.PEM))
    signer = pki_signer(factory.pki, "device_subca")
    now = datetime.now(UTC)
    return sign_device(request, signer, certification=None, allow_software_key=True, now=now).pem


def test_a_completed_device_that_is_not_as_asked_for_is_an_error(device: Make, station: Station) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        done = station.device(unix(boot))
        assert done["good"]
        other = station.factory.pki.certificate_path("ssig_subca")
        report = station.device(unix(boot), guest_anchors=[str(other)])
        assert report["error"] is None
        assert not report["good"]
        assert report["completed"]
        assert len(report["mismatches"]) == 2, report["mismatches"]
        (station.directory / f"records/{done['device_uuid']}.cert").write_bytes(
            issue_for(station.factory, UUID(done["device_uuid"]))
        )
        report = station.device(unix(boot))
        assert [text.split()[0] for text in report["mismatches"]] == ["certificate"]


# Ways to a device


def inside(boot: Boot) -> list[str]:
    """Return what runs a shell command line in the core container, as ssh would."""
    pid = str(boot.core_pid())
    environment = ["env", "-i", "PATH=/usr/sbin:/usr/bin", "LANG=C.UTF-8"]
    return ["nsenter", "-t", pid, "-U", "-m", "-u", "-i", "-n", "-p", "--", *environment, "/bin/sh", "-c"]


def test_row29_over_a_command_like_ssh_no_process_ever_shows_the_pin(device: Make, station: Station) -> None:
    seen: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for process in Path("/proc").iterdir():
                for name in ("cmdline", "environ"):
                    try:
                        data = (process / name).read_bytes()
                    except OSError:
                        continue
                    seen.extend([str(process / name)] if PIN.encode() in data else [])

    with device().boot() as boot:
        boot.wait_prepared()
        watcher = threading.Thread(target=watch)
        watcher.start()
        targets = [{"name": "bench-1", "command": inside(boot)}]
        report = station.device(targets=targets)
        ended.set()
        watcher.join()
        assert report["good"], report
        assert seen == []
        assert PIN not in station.said
        for path in station.directory.rglob("*"):
            assert path.name == "pin" or path.is_dir() or PIN.encode() not in path.read_bytes(), path
        assert not list(boot.path("/run/trustme").rglob("trustme-provision-*"))
        core = Path(f"/proc/{boot.core_pid()}/root/tmp")
        assert not list(core.glob("trustme-provision-*")), "files of a call are left in the core container"


@contextmanager
def console_of(boot: Boot, path: Path) -> Iterator[list[bytes]]:
    """Offer the core's console on a unix socket, as QEMU does; yield what the device wrote to it."""
    written: list[bytes] = []
    ended = threading.Event()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(0.1)

    def serve(peer: socket.socket) -> None:
        """Carry between the core's console and one client until either is done."""
        while not ended.is_set():
            ready, _, _ = select.select([boot._core_master, peer.fileno()], [], [], 0.05)
            if boot._core_master in ready:
                written.append(os.read(boot._core_master, 65536))
                peer.sendall(written[-1])
            if peer.fileno() in ready:
                data = peer.recv(65536)
                if not data:
                    return
                while data:
                    data = data[os.write(boot._core_master, data) :]

    def carry() -> None:
        while not ended.is_set():
            # The device may go down (EIO on its terminal), and the client may leave, at any time.
            with suppress(OSError):
                peer, _ = listener.accept()
                # The client may leave first or last: either way its socket is closed here.
                with peer:
                    serve(peer)

    carrier = threading.Thread(target=carry)
    carrier.start()
    try:
        yield written
    finally:
        ended.set()
        carrier.join()
        listener.close()


def test_row29_over_the_core_console_nothing_of_a_secret_is_echoed(
    device: Make, station: Station, tmp_path: Path
) -> None:
    target = device(with_core_console=True)
    with target.boot() as boot, console_of(boot, tmp_path / "console") as written:
        boot.wait_prepared()
        report = station.device(f"console:{tmp_path}/console")
        assert report["good"], report
        text = b"".join(written)
        assert PIN.encode() not in text
        # A request travels in base64: no line that the station sent came back.
        sent = remote.lines({"program": ["control"]})[0][:20]
        assert sent.encode() not in text
        assert b"set_provisioned" not in text
        assert b"stty raw -echo" in text, "this looks at the right console"
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).token.kind == "softtoken"


def test_a_console_that_loses_a_byte_is_noticed(device: Make, tmp_path: Path) -> None:
    target = device(with_core_console=True)
    with target.boot() as boot, console_of(boot, tmp_path / "console"):
        boot.wait_prepared()
        transport = ConsoleTransport(lambda: Terminal(tmp_path / "console", lambda: True))
        assert transport.control(["list"], stdin=b"", timeout=30).code == 0

        class Lossy(Terminal):
            def send(self, text: str) -> None:
                changed = text.replace("A", "B", 1) if text.startswith(remote.REQUEST) else text
                super().send(changed)

        transport.close()
        lossy = ConsoleTransport(lambda: Lossy(tmp_path / "console", lambda: True))
        with pytest.raises(ToolError) as refused:
            lossy.control(["token_create"], stdin=b"1234567\n1234567\n", timeout=30)
        assert "did not arrive whole" in refused.value.evidence
        assert boot.ask(Request.GET_TOKEN_STATUS).token.kind == "none", "it was run all the same"
        # The next session finds a console that works, also where the one before ended badly.
        assert transport.control(["list"], stdin=b"", timeout=30).code == 0
        transport.close()


def test_completion_by_a_reboot_is_seen_from_the_other_side(
    device: Make, station: Station, tmp_path: Path
) -> None:
    link = tmp_path / "control"
    target = device()
    result: list[dict[str, Any]] = []
    with target.boot() as boot:
        boot.wait_prepared()
        link.symlink_to(boot.path(SOCKET))
        walking = threading.Thread(
            target=lambda: result.append(station.device(f"unix:{link}", completion="reboot"))
        )
        walking.start()
        assert boot.wait_end(60) == signal.SIGHUP
    link.unlink()
    with target.boot() as boot:
        boot.wait_running()
        link.symlink_to(boot.path(SOCKET))
        walking.join()
        (report,) = result
        assert report["good"], report
        assert boot.report["mode"]["value"] == "operational"


# Devices that are not what they say


def provision(station: Station, *ways: Transport, parallel: int = 1, **changes: Any) -> list[Report]:
    """Provision over ways that a test has made."""
    path = station.directory / "station.yml"
    path.write_text(json.dumps(station.settings | changes))
    read = settings.load(path)
    targets = [
        fleet.Target(fleet.named(f"unix:{number}"), lambda way=way: nullcontext(way))  # type: ignore[misc]
        for number, way in enumerate(ways)
    ]
    loaded = plan.load(read, tuple(target.settings for target in targets))
    return fleet.provision(loaded, targets, parallel=parallel, tell=lambda _: None)


class Liar(UnixTransport):
    """A device whose answers to one verb are changed on the way."""

    def __init__(self, path: Path, verb: str, change: Change, after: int = 0) -> None:
        super().__init__(path)
        self.verb, self.change, self.after, self.asked = verb, change, after, 0
        self.verbs: list[str] = []

    def control(self, words: Sequence[Word], **options: Any) -> Output:
        output = super().control(words, **options)
        self.verbs.append(str(words[3]))
        if words[3] != self.verb:
            return output
        self.asked += 1
        if self.asked <= self.after:
            return output
        envelope = json.loads(output.stdout)
        self.change(envelope)
        return Output(envelope["exit_code"], json.dumps(envelope).encode(), b"")


def status_with(name: str, value: Any) -> Change:
    return lambda envelope: envelope["reply"]["provisioning"].__setitem__(name, value)


def reply_with(name: str, value: Any) -> Change:
    return lambda envelope: envelope["reply"].__setitem__(name, value)


def opened(envelope: dict[str, Any]) -> None:
    envelope |= {"exit_code": 0, "ok": True, "reply": {"code": "DEVICE_CSR", "device_csr": "AAAA"}}


STRANGER = "0b2c4a6e-5d1f-4c38-9a77-3f0e6d1b2c4a"
WRONG = base64.b64encode(bytes(32)).decode()


LIES: tuple[tuple[str, Change, int, str], ...] = (
    ("activate_credential", reply_with("activated_secret", WRONG), 0, "credential-not-activated"),
    ("activate_credential", lambda e: e["reply"].pop("activated_secret"), 0, "credential-not-activated"),
    ("pull_csr", lambda e: e["reply"].pop("device_key_certification"), 0, "software-key"),
    ("provisioning_status", status_with("endorsement_key_sha256", "ab" * 32), 0, "ek-not-reported"),
    ("provisioning_status", status_with("device_uuid", STRANGER), 0, "uuid-mismatch"),
    ("provisioning_status", status_with("device_uuid", STRANGER), 1, "device-changed"),
    ("provisioning_status", status_with("device_uuid", STRANGER), 6, "device-changed"),
    ("provisioning_status", status_with("device_key_sha256", "ab" * 32), 3, "device-changed"),
    ("provisioning_status", status_with("device_certificate_sha256", ""), 0, "certificate-not-taken"),
    ("provisioning_status", status_with("device_uuid", "not one"), 0, "bad-answer"),
    ("provisioning_status", status_with("marker", "a file"), 0, "no-tpm"),
    ("ca_list", reply_with("authorities", []), 1, "not-as-asked"),
    ("ca_list", reply_with("authorities", [{"purpose": "GOD", "sha256": "ab" * 32}]), 0, "bad-answer"),
)
"""Verb, change of its answers, how many are left as they are, what the station says."""


def test_row08_nothing_is_completed_on_a_device_that_is_not_what_it_says(
    device: Make, station: Station
) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        boot.ask(Request.PULL_DEVICE_CSR)  # makes its keys
        for number, (verb, change, after, code) in enumerate(LIES):
            liar = Liar(boot.path(SOCKET), verb, change, after)
            (report,) = provision(station, liar, records=f"records-{number}")
            assert report.error is not None, (number, report)
            assert report.error["code"] == code, (number, report.error)
            assert "set_provisioned" not in liar.verbs
            records = station.directory / f"records-{number}"
            assert verb in {"provisioning_status", "ca_list"} or not records.exists(), "it was signed"
            assert not list(records.glob("*.json"))
        assert not boot.ask(Request.GET_PROVISIONED).device_is_provisioned


def test_row08_a_challenge_that_another_tpm_answers_is_refused(device: Make, station: Station) -> None:
    """Device one, with the endorsement key of device two behind it: the relay is what activation is for."""
    first, second = device("first"), device("second")
    with first.boot() as one, second.boot() as two:
        one.wait_prepared()
        two.wait_prepared()

        class Relay(UnixTransport):
            def control(self, words: Sequence[Word], **options: Any) -> Output:
                if "activate_credential" in words:
                    return UnixTransport(two.path(SOCKET)).control(words, **options)
                return super().control(words, **options)

        two.ask(Request.PULL_DEVICE_CSR)  # makes its keys
        (report,) = provision(station, Relay(one.path(SOCKET)))
        assert report.error is not None
        assert not (station.directory / "records").exists()
        assert one.ask(Request.GET_PROVISIONING_STATUS).provisioning.device_certificate_sha256 == ""


def test_row08_a_target_that_leads_elsewhere_in_the_middle_is_left_alone(
    device: Make, station: Station, tmp_path: Path
) -> None:
    """The signing command itself turns the link to another device: what comes after must not reach that."""
    link = tmp_path / "control"
    first, second = device("first"), device("second")
    with first.boot() as one, second.boot() as two:
        one.wait_prepared()
        two.wait_prepared()
        link.symlink_to(one.path(SOCKET))
        script = tmp_path / "sign"
        script.write_text(
            f"#!/bin/sh\nln -sfn {two.path(SOCKET)} {link}\n"
            f"exec openssl dgst -sha512 -passin pass:trustme-development "
            f"-sign {station.factory.pki.key_path('device_subca')}\n"
        )
        script.chmod(0o700)
        ca = {"sign_command": str(script), "certificate": station.settings["device_anchors"][0]}
        assert station.failure(f"unix:{link}", device_ca=ca) == "device-changed"
        assert two.ask(Request.LIST_AUTHORITIES).authorities == []
        status = two.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert (status.completed, status.device_certificate_sha256) == (False, "")


def test_row08_one_device_cannot_be_two(device: Make, station: Station) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        reports = provision(station, UnixTransport(boot.path(SOCKET)), UnixTransport(boot.path(SOCKET)))
        assert reports[0].good
        assert reports[1].error is not None
        assert reports[1].error["code"] == "device-twice"


def test_who_a_device_has_to_be_can_be_said_before(device: Make, station: Station) -> None:
    with device().boot() as boot:
        uuid = boot.wait_prepared()
        target = {"name": "bench-1", "unix": str(boot.path(SOCKET))}
        assert station.failure(targets=[target | {"uuid": STRANGER}]) == "device-changed"
        assert boot.ask(Request.LIST_AUTHORITIES).authorities == []
        assert station.failure(targets=[target | {"ek_sha256": "ab" * 32}]) == "ek-not-expected"
        right = {"uuid": uuid, "ek_sha256": endorsement_key(boot)}
        assert station.device(targets=[target | right])["good"]


def test_a_door_that_stays_open_is_an_error(device: Make, station: Station) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        (report,) = provision(station, Liar(boot.path(SOCKET), "pull_csr", opened, after=1))
        assert report.error is not None
        assert report.error["code"] == "door-open"
        assert not report.good


# What the settings file decides


def test_anchors_that_nobody_named_are_not_completed_with(
    device: Make, factory: Factory, station: Station
) -> None:
    other = factory.pki.certificate("ssig_subca").public_bytes(Encoding.PEM)
    with device().boot() as boot:
        boot.wait_prepared()
        boot.request(Request.REGISTER_NEWCA, guestos_rootcert=other)
        assert station.failure(unix(boot)) == "anchors-unexpected"
        report = station.device(unix(boot), other_anchors="remove")
        assert report["good"]
        assert len(report["anchors"]["guest"]) == 1
        assert any("removed" in note for note in report["notes"])


def test_without_the_challenge_the_report_says_so(device: Make, station: Station) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        liar = Liar(boot.path(SOCKET), "activate_credential", lambda envelope: None)
        (report,) = provision(station, liar, tpm={"credential_activation": "skip"})
        assert report.good
        assert "activate_credential" not in liar.verbs
        assert any("AK and EK" in text for text in report.unproven)


def test_a_ca_that_the_device_would_not_believe_is_noticed_before_the_device_sees_it(
    device: Make, station: Station, tmp_path: Path
) -> None:
    stranger = create(tmp_path / "stranger", algorithm=Algorithm.P384, development=True)
    with device().boot() as boot:
        boot.wait_prepared()
        ca = {"pki": str(stranger.path)}
        assert station.failure(unix(boot), device_ca=ca) == "anchors-do-not-vouch"
        assert boot.ask(Request.GET_PROVISIONING_STATUS).provisioning.device_certificate_sha256 == ""


def test_the_operator_s_own_token(device: Make, station: Station, tmp_path: Path) -> None:
    key, certificate, p12 = (tmp_path / name for name in ("own.key", "own.cert", "own.p12"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=own"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [
            *("openssl", "pkcs12", "-export", "-inkey", key, "-in", certificate, "-out", p12),
            *("-passout", f"file:{station.directory}/pin", "-iter", "200000"),
        ],
        check=True,
        capture_output=True,
    )
    token = {"p12": str(p12), "password": "file:pin"}
    with device().boot() as boot:
        boot.wait_prepared()
        boot.request(Request.CREATE_TOKEN, device_newpin="another one")
        report = station.device(unix(boot), token=token)
        assert report["good"], report
        own = x509.load_pem_x509_certificate(certificate.read_bytes())
        assert report["token"]["certificate_sha256"] in {None, own.fingerprint(hashes.SHA256()).hex()}
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).token.tries_left == 10


def test_a_token_with_another_pin_takes_the_present_one(device: Make, station: Station) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        boot.request(Request.CREATE_TOKEN, device_newpin="another one")
        assert station.failure(unix(boot)) == "token-other-pin"
        token = station.settings["token"] | {"present_pin": station.secret("present", "another one")}
        assert station.device(unix(boot), token=token)["good"]
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).token.tries_left == 10


def test_a_development_build_is_taken_only_where_the_file_says_so(device: Make, station: Station) -> None:
    with device(policy=SELF_PROVISIONING).boot() as boot:
        boot.wait_prepared()
        assert station.failure(unix(boot)) == "development-build"
        own = boot.data("cml/tokens/device.cert").read_bytes()
        report = station.device(unix(boot), development_builds="allow")
        assert report["good"], report
        assert record(station, report).public_bytes(Encoding.PEM) not in own
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).token.default_pin is False
        assert report["development"]
        assert any("DEVELOPMENT" in note for note in report["notes"])


def test_what_the_device_demands_beyond_the_file_is_named(device: Make, station: Station) -> None:
    policy = {"require": json.dumps(["device-certificate", "device-anchor", "guest-anchor", "token"])}
    with device(policy=policy).boot() as boot:
        boot.wait_prepared()
        report = station.device(unix(boot), token="keep")
        assert report["error"]["code"] == "provisioning-incomplete"
        assert report["error"]["evidence"].startswith("token: ")
        assert not boot.ask(Request.GET_PROVISIONED).device_is_provisioned


def test_a_device_without_a_tpm_needs_to_be_allowed(device: Make, station: Station) -> None:
    policy = SELF_PROVISIONING | {"no_tpm": "true"}
    with device(policy=policy, tcti="device:/dev/tpm-that-is-not-there").boot() as boot:
        boot.wait_prepared()
        assert station.failure(unix(boot), development_builds="allow") == "no-tpm"
        report = station.device(unix(boot), development_builds="allow", tpm={"software_keys": "allow"})
        assert report["good"], report
        assert any("copies it" in text for text in report["unproven"])


# The operator's manual


def test_the_sessions_of_the_manual_are_those_of_today() -> None:
    text = provisioning_transcripts.DOCUMENT.read_text()
    assert provisioning_transcripts.render(text) == text, "run `make docs-provisioning`"


# Many


def test_row08_twenty_devices_at_once_are_twenty_devices(
    device: Make, station: Station, tmp_path: Path
) -> None:
    count = 20
    template = device("template")
    template.make_disk()
    with ExitStack() as running:
        boots = []
        for number in range(count):
            target = device(f"device-{number}")
            subprocess.run(["cp", "--sparse=always", template.disk, target.disk], check=True)
            boots.append(running.enter_context(target.boot()))
            # Not all at once: the first boot makes a file system and keys.
            boots[-1].wait_prepared()
        targets = [
            {"name": f"device-{number}", "unix": str(boot.path(SOCKET))} for number, boot in enumerate(boots)
        ]
        code, envelope = station.run("--parallel", "4", targets=targets)
        reports = envelope["result"]["devices"]
        assert code == 0, [report["error"] for report in reports]
        for name in ("device_uuid", "ek_sha256", "device_key_sha256", "certificate_sha256", "record_sha256"):
            assert len({report[name] for report in reports}) == count, name
        assert len({report["token"]["certificate_sha256"] for report in reports}) == count
        for number, (boot, report) in enumerate(zip(boots, reports, strict=True)):
            assert report["target"] == f"device-{number}"
            status = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
            assert status.completed
            assert report["device_uuid"] == status.device_uuid
            assert report["ek_sha256"] == endorsement_key(boot)
            certificate = x509.load_pem_x509_certificate(boot.data("cml/tokens/device.cert").read_bytes())
            assert certificate == record(station, report)
            assert status.device_uuid in certificate.subject.rfc4514_string()
            spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            assert hashlib.sha256(spki).hexdigest() == report["device_key_sha256"]
            again = boot.ask(Request.PULL_DEVICE_CSR)
            assert again.response == Reply.CMD_UNSUPPORTED
        assert len(list((station.directory / "records").iterdir())) == 2 * count


def test_one_that_fails_stops_no_other(device: Make, station: Station) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        targets = [
            {"name": "gone", "unix": "nowhere"},
            {"name": "there", "unix": str(boot.path(SOCKET))},
        ]
        code, envelope = station.run("--parallel", "2", targets=targets, wait=5)
        gone, there = envelope["result"]["devices"]
        assert code == 1
        assert gone["error"]["code"] == "not-ready"
        assert there["good"]
