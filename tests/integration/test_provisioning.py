# SPDX-License-Identifier: Apache-2.0
"""Provisioning in a booted device: the same boot as ever, natively, with a software TPM."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.integration.sandbox import Boot, Device, Factory
from tests.integration.software_tpm import SoftwareTpm
from trustme_init.control.client import ControlClient
from trustme_init.control.dispatch import NOT_YET
from trustme_init.control.gate import GATE, Socket, allows
from trustme_init.proto.control_pb2 import DEVICE_ANCHOR, GUEST_ANCHOR
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.provisioning import destruction
from trustme_init.provisioning.mode import Mode
from trustme_init.tpm import ownership
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.marker_form import INDEX
from trustme_init.tpm.measure import PCR
from trustme_tools.guestos.build import STORE_DIRECTORY
from trustme_tools.guestos.signing import pki_signer, signed
from trustme_tools.pki import tpm_certification
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.device import sign_device
from trustme_tools.pki.request import read_request

pytestmark = pytest.mark.root
Make = Callable[..., Device]
HERE = Path(__file__).parent
PIN = "correct horse"
STEPS = ("guest-anchor", "device-anchor", "device-certificate", "token")


def pem(factory: Factory, name: str) -> bytes:
    return factory.pki.certificate(name).public_bytes(Encoding.PEM)


def issue(factory: Factory, reply: Reply) -> bytes:
    """Be the signer: check what the device's TPM says of the key, then issue the certificate."""
    request = read_request(reply.device_csr)
    now = datetime.now(UTC)
    certification = tpm_certification.read_certification(reply.device_key_certification)
    checked = tpm_certification.check(certification, request, ek_cas=[], at=now)
    return sign_device(request, pki_signer(factory.pki, "device_subca"), certification=checked, now=now).pem


def take(boot: Boot, factory: Factory, step: str) -> Reply:
    """Do one thing that an operator does."""
    match step:
        case "guest-anchor":
            return boot.request(Request.REGISTER_NEWCA, guestos_rootcert=pem(factory, "guestos_subca"))
        case "device-anchor":
            return boot.request(Request.REGISTER_DEVICE_CA, certificate=pem(factory, "device_subca"))
        case "device-certificate":
            certificate = issue(factory, boot.ask(Request.PULL_DEVICE_CSR))
            return boot.request(Request.PUSH_DEVICE_CERT, device_cert=certificate)
        case _:
            return boot.request(Request.CREATE_TOKEN, device_newpin=PIN)


def provision(boot: Boot, factory: Factory, *, without: Collection[str] = ()) -> None:
    """Do what an operator does, but for the steps named."""
    for step in STEPS:
        if step not in without:
            reply = take(boot, factory, step)
            assert not reply.HasField("refusal"), (step, reply)


def reboot(boot: Boot) -> Reply:
    reply = boot.ask(Request.REBOOT_DEVICE)
    assert boot.wait_end() == signal.SIGHUP
    return reply


def wait_provisioned_device(device: Device, factory: Factory) -> None:
    """Bring a new device to operation."""
    with device.boot() as boot:
        boot.wait_prepared()
        provision(boot, factory)
        assert not reboot(boot).HasField("refusal")


# The walk of an operator


def test_from_first_boot_to_operation_by_a_reboot(device: Make, factory: Factory) -> None:
    target = device()
    with target.boot() as boot:
        uuid = boot.wait_prepared()
        status = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert (status.completed, status.development, status.marker) == (False, False, "TPM NV index")
        assert status.device_uuid == uuid
        assert [each.name for each in status.requirements if each.required] == [
            *("device-certificate", "device-anchor", "guest-anchor", "token"),
        ]
        assert not any(each.met for each in status.requirements)
        provision(boot, factory)
        status = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert all(each.met for each in status.requirements)
        key = status.device_key_sha256
        certificate = x509.load_pem_x509_certificate(boot.data("cml/tokens/device.cert").read_bytes())
        assert (
            status.device_certificate_sha256
            == hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
        )
        assert uuid in certificate.subject.rfc4514_string()
        reply = reboot(boot)
        assert (reply.response, reply.HasField("refusal")) == (Reply.CMD_OK, False)
    with target.boot() as boot:
        boot.wait_running()
        assert boot.report["mode"] == {
            "value": "operational",
            "why": "provisioning was completed",
            "source": "TPM NV index",
        }
        status = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert (status.completed, status.device_uuid, status.device_key_sha256) == (True, uuid, key)
        assert (
            status.record_sha256
            == hashlib.sha256(boot.data("cml/provisioning.json").read_bytes()).hexdigest()
        )
        assert f"record {status.record_sha256}" in measured_mode(boot)


def events(boot: Boot) -> list[str]:
    lines = boot.path("/run/trustme/measurements.cel").read_text().splitlines()
    return [json.loads(line)["content"]["event"] for line in lines]


def replayed(boot: Boot) -> str:
    """Return the PCR that the measurement log implies."""
    value = bytes(32)
    for line in boot.path("/run/trustme/measurements.cel").read_text().splitlines():
        event = json.dumps(json.loads(line)["content"], sort_keys=True).encode()
        value = hashlib.sha256(value + hashlib.sha256(event).digest()).digest()
    return value.hex()


def measured_mode(boot: Boot) -> str:
    for line in boot.path("/run/trustme/measurements.cel").read_text().splitlines():
        content = json.loads(line)["content"]
        if content["event"] == "mode":
            return str(content["data"])
    raise AssertionError("the mode was not measured")


def test_set_provisioned_closes_the_door_with_its_reply(device: Make, factory: Factory) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        provision(boot, factory)
        with boot.control() as control:
            assert control.request(Request(command=Request.SET_PROVISIONED)).response == Reply.CMD_OK
            again = control.request(Request(command=Request.SET_PROVISIONED))
            assert again.response == Reply.CMD_UNSUPPORTED
            assert control.request(Request(command=Request.GET_PROVISIONED)).device_is_provisioned
        boot.wait_for("provisioning completed: operational mode")
        assert boot.report["mode"]["value"] == "operational"
        assert events(boot)[-1] == "completion"
        assert boot.tpm.pcr(PCR) == replayed(boot), "the completion is measured, in this boot already"


def test_t2_every_command_in_each_mode_over_the_socket(device: Make, factory: Factory) -> None:
    """Exactly what the gate's table closes answers CMD_UNSUPPORTED; all of it, sent for real."""
    ends = {Request.REBOOT_DEVICE, Request.DESTROY_SYSTEM}
    target = device()
    with target.boot() as boot:
        boot.wait_prepared()
        for mode in Mode:
            if mode is Mode.OPERATIONAL:
                provision(boot, factory)
                assert boot.ask(Request.SET_PROVISIONED).response == Reply.CMD_OK
            with boot.control() as control:
                for rule in GATE:
                    if rule.command in ends | NOT_YET:
                        continue
                    unsupported = answers_unsupported(control, rule.command)
                    assert unsupported != allows(rule.command, mode, Socket.PRIVILEGED), (mode, rule.command)


def answers_unsupported(control: ControlClient, command: int) -> bool:
    # c0 can be neither started nor stopped: what is asked about is a container that does not exist.
    request = Request(
        command=command,  # type: ignore[arg-type]  # the rows hold these very values
        container_uuids=["deadbeef-0000-0000-0000-000000000000"],
    )
    reply = control.request(request)
    while reply.HasField("log_message"):
        reply = control.receive()
    return reply.code == Reply.RESPONSE and reply.response == Reply.CMD_UNSUPPORTED


# What is missing


@pytest.mark.parametrize("missing", STEPS)
def test_what_is_missing_is_named_and_keeps_provisioning_open(
    device: Make, factory: Factory, missing: str
) -> None:
    # Without the device anchor no certificate can be judged.
    without = {missing, "device-certificate"} if missing == "device-anchor" else {missing}
    target = device()
    with target.boot() as boot:
        boot.wait_prepared()
        provision(boot, factory, without=without)
        reply = boot.ask(Request.SET_PROVISIONED)
        assert reply.response == Reply.CMD_FAILED
        assert reply.refusal.code == "provisioning-incomplete"
        assert missing in reply.refusal.evidence
        assert not {*STEPS} - without & {*reply.refusal.evidence.split(": ")}
        assert not boot.ask(Request.GET_PROVISIONED).device_is_provisioned
        reply = reboot(boot)
        assert (reply.response, reply.refusal.code) == (Reply.CMD_OK, "provisioning-incomplete")
    with target.boot() as boot:
        boot.wait_prepared()
        assert boot.report["mode"]["value"] == "provisioning"
        for step in STEPS:
            if step in without:
                assert not take(boot, factory, step).HasField("refusal")
        assert boot.ask(Request.SET_PROVISIONED).response == Reply.CMD_OK


def test_a_device_that_loses_power_before_its_certificate_is_not_lost(device: Make, factory: Factory) -> None:
    """The original stays self-signed for ever; here the same request is there after any power cut."""
    target = device()
    with target.boot() as boot:
        uuid = boot.wait_prepared()
        first = boot.ask(Request.PULL_DEVICE_CSR)
        assert boot.ask(Request.PULL_DEVICE_CSR).device_csr == first.device_csr, "pulled twice"
    with target.boot() as boot:  # killed, not rebooted
        assert boot.wait_prepared() == uuid
        assert boot.ask(Request.PULL_DEVICE_CSR).device_csr == first.device_csr
        boot.request(Request.REGISTER_DEVICE_CA, certificate=pem(factory, "device_subca"))
        reply = boot.request(Request.PUSH_DEVICE_CERT, device_cert=issue(factory, first))
        assert reply.response == Reply.DEVICE_CERT_OK


# The marker


def completed_device(device: Make, factory: Factory, name: str = "device") -> Device:
    target: Device = device(name)
    wait_provisioned_device(target, factory)
    return target


def test_row31_another_tpm_and_a_cleared_one_stop_the_device(device: Make, factory: Factory) -> None:
    target = completed_device(device, factory)
    kept = target.directory / "tpm"
    kept.rename(target.directory / "tpm-kept")
    with target.boot() as boot:
        assert boot.refusal() == "marker-contradiction"
    for path in kept.iterdir():
        path.unlink()
    kept.rmdir()
    (target.directory / "tpm-kept").rename(kept)
    with target.boot() as boot:
        boot.wait_running()
        assert boot.report["mode"]["value"] == "operational"


def test_row31_row11_a_new_disk_in_a_completed_device_stops_it(device: Make, factory: Factory) -> None:
    target = completed_device(device, factory)
    before = target.disk.read_bytes()
    target.make_disk()
    with target.boot() as boot:
        assert boot.refusal() == "provisioned-data-missing"
    table = subprocess.run(
        ["sfdisk", "--json", target.disk], check=True, capture_output=True, text=True
    ).stdout
    assert len(json.loads(table)["partitiontable"]["partitions"]) == 2, "no data volume was made"
    target.disk.write_bytes(before)
    with target.boot() as boot:
        boot.wait_running()


def test_row31_row11_the_disk_of_another_device_stops_it(
    device: Make, factory: Factory, tmp_path: Path
) -> None:
    first, second = (completed_device(device, factory, name) for name in ("first", "second"))
    first.disk.write_bytes(second.disk.read_bytes())
    with first.boot() as boot:
        assert boot.refusal() == "provisioned-data-foreign"


def test_row31_a_disk_from_before_completion_does_not_bring_provisioning_back(
    device: Make, factory: Factory
) -> None:
    target = device()
    with target.boot() as boot:
        boot.wait_prepared()
        provision(boot, factory)
        subprocess.run(["sync"], check=True)
    earlier = target.disk.read_bytes()
    with target.boot() as boot:
        boot.wait_prepared()
        assert not reboot(boot).HasField("refusal")
    target.disk.write_bytes(earlier)
    with target.boot() as boot:
        assert boot.refusal() == "provisioned-data-missing"


def test_row31_an_index_that_somebody_else_defined_first_is_refused(device: Make) -> None:
    target = device()
    with SoftwareTpm(target.directory) as tpm:
        subprocess.run(
            [
                *("tpm2_nvdefine", "-T", tpm.tcti, "-C", "o", "-s", "49"),
                *("-a", "ownerread|ownerwrite|authread|no_da", f"{INDEX:#x}"),
            ],
            check=True,
            capture_output=True,
        )
    with target.boot() as boot:
        assert boot.refusal() == "marker-foreign"


def test_row31_only_the_owner_takes_the_index_away_and_nobody_writes_it_again(
    device: Make, factory: Factory
) -> None:
    target = completed_device(device, factory)
    with SoftwareTpm(target.directory) as tpm:
        for words in (
            ("tpm2_nvundefine", "-C", "o", f"{INDEX:#x}"),
            ("tpm2_nvwrite", "-C", "o", "-i", "/dev/zero", f"{INDEX:#x}"),
            ("tpm2_clear", "-c", "l"),
        ):
            tool, *rest = words
            done = subprocess.run([tool, "-T", tpm.tcti, *rest], capture_output=True, check=False)
            assert done.returncode != 0, words
    with target.boot() as boot:
        boot.wait_running()
        assert boot.report["mode"]["value"] == "operational"


# The certificate store


def test_a_guestos_verifies_once_its_anchor_is_there(device: Make, factory: Factory) -> None:
    config = factory.store / STORE_DIRECTORY / "trustme-coreos-10.conf"
    signature, chain = signed(pki_signer(factory.pki, "guestos"), config.read_bytes())
    fields = {
        "guestos_config_file": config.read_bytes(),
        "guestos_config_signature": signature,
        "guestos_config_certificate": chain,
    }
    with device().boot() as boot:
        boot.wait_prepared()
        assert boot.request(Request.VERIFY_GUESTOS, **fields).refusal.code == "no-anchor"
        assert not take(boot, factory, "guest-anchor").HasField("refusal")
        reply = boot.request(Request.VERIFY_GUESTOS, **fields)
        fingerprint = hashlib.sha256(factory.certificate("guestos_subca")).hexdigest()
        assert reply.certificate.anchor_sha256 == fingerprint
        listed = boot.ask(Request.LIST_AUTHORITIES).authorities
        assert [(each.sha256, each.purpose) for each in listed] == [(fingerprint, GUEST_ANCHOR)]
        again = take(boot, factory, "guest-anchor")
        assert again.response == Reply.GUESTOS_MGR_REGISTER_CA_ERROR
        assert again.refusal.code == "authority-already-there"
        removed = boot.request(Request.REMOVE_AUTHORITY, authority_sha256=fingerprint[:12])
        assert removed.response == Reply.CMD_OK
        assert boot.request(Request.VERIFY_GUESTOS, **fields).refusal.code == "no-anchor"


def test_row31_an_anchor_written_to_the_disk_of_a_completed_device_is_not_believed(
    device: Make, factory: Factory
) -> None:
    config = factory.store / STORE_DIRECTORY / "trustme-coreos-10.conf"
    stranger = create(factory.directory / "stranger", algorithm=Algorithm.P384, development=True)
    signature, chain = signed(pki_signer(stranger, "guestos"), config.read_bytes())
    fields = {
        "guestos_config_file": config.read_bytes(),
        "guestos_config_signature": signature,
        "guestos_config_certificate": chain,
    }
    anchor = stranger.certificate("guestos_subca")
    name = hashlib.sha256(anchor.public_bytes(Encoding.DER)).hexdigest()
    target = completed_device(device, factory)
    with target.boot() as boot:
        boot.wait_running()
        boot.data(f"cml/tokens/ca/{name}.pem").write_bytes(anchor.public_bytes(Encoding.PEM))
        subprocess.run(["sync"], check=True)
    with target.boot() as boot:
        boot.wait_running()
        refused = boot.request(Request.VERIFY_GUESTOS, **fields).refusal
        assert refused.code == "untrusted-signer"
        assert "authority-unregistered" in refused.evidence
        listed = {each.sha256: each.source for each in boot.ask(Request.LIST_AUTHORITIES).authorities}
        assert listed[name] == "NOT REGISTERED on this device, not used"
        ours, chain = signed(pki_signer(factory.pki, "guestos"), config.read_bytes())
        fields |= {"guestos_config_signature": ours, "guestos_config_certificate": chain}
        assert boot.request(Request.VERIFY_GUESTOS, **fields).HasField("certificate"), "its own still is"


def test_an_anchor_for_devices_vouches_for_no_software_and_the_other_way_round(
    device: Make, factory: Factory
) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        boot.request(Request.REGISTER_NEWCA, guestos_rootcert=pem(factory, "device_subca"))
        certificate = issue(factory, boot.ask(Request.PULL_DEVICE_CSR))
        reply = boot.request(Request.PUSH_DEVICE_CERT, device_cert=certificate)
        assert (reply.response, reply.refusal.code) == (Reply.DEVICE_CERT_ERROR, "no-anchor")
        reply = boot.request(Request.REGISTER_DEVICE_CA, certificate=pem(factory, "device_subca"))
        assert reply.refusal.code == "authority-other-purpose"
        (listed,) = boot.ask(Request.LIST_AUTHORITIES).authorities
        boot.request(Request.REMOVE_AUTHORITY, authority_sha256=listed.sha256)
        boot.request(Request.REGISTER_DEVICE_CA, certificate=pem(factory, "device_subca"))
        purposes = [each.purpose for each in boot.ask(Request.LIST_AUTHORITIES).authorities]
        assert purposes == [DEVICE_ANCHOR]
        assert (
            boot.request(Request.PUSH_DEVICE_CERT, device_cert=certificate).response == Reply.DEVICE_CERT_OK
        )
        peer = boot.request(Request.VERIFY_DEVICE_CERT, certificate=certificate)
        assert (
            peer.certificate.device_uuid == boot.ask(Request.GET_PROVISIONING_STATUS).provisioning.device_uuid
        )


def test_row04_row08_a_refused_certificate_leaves_the_old_one(device: Make, factory: Factory) -> None:
    first, second = device("first"), device("second")
    with first.boot() as boot:
        boot.wait_prepared()
        other = issue(factory, boot.ask(Request.PULL_DEVICE_CSR))
    with second.boot() as boot:
        boot.wait_prepared()
        provision(boot, factory)
        path = boot.data("cml/tokens/device.cert")
        good = path.read_bytes()
        for certificate, code in (
            (other, "device-key-mismatch"),
            (b"", "chain-malformed"),
            (good[:-40], "chain-malformed"),
            (pem(factory, "device_subca"), "leaf-is-ca"),
        ):
            reply = boot.request(Request.PUSH_DEVICE_CERT, device_cert=certificate)
            assert reply.response == Reply.DEVICE_CERT_ERROR
            assert reply.refusal.code == code, reply
            assert path.read_bytes() == good


# The token


def test_the_token_s_pin_over_the_socket(device: Make) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).refusal.code == "token-missing"
        assert boot.request(Request.CREATE_TOKEN, device_newpin=PIN).token.kind == "softtoken"
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).token.tries_left == 10
        wrong = boot.request(Request.UNLOCK_TOKEN, device_pin="wrong")
        assert (wrong.response, wrong.refusal.code) == (Reply.CMD_FAILED, "token-wrong-pin")
        assert boot.ask(Request.GET_TOKEN_STATUS).token.tries_left == 9
        changed = boot.request(Request.CHANGE_DEVICE_PIN, device_pin=PIN, device_newpin="another one")
        assert changed.response == Reply.CONTAINER_CHANGE_PIN_SUCCESSFUL
        assert boot.request(Request.UNLOCK_TOKEN, device_pin="another one").token.tries_left == 10
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).refusal.code == "token-wrong-pin"
        assert boot.ask(Request.REMOVE_TOKEN).token.kind == "none"


def test_row21_wrong_pins_are_counted_over_all_paths_and_reboots(device: Make) -> None:
    target = device()
    with target.boot() as boot:
        boot.wait_prepared()
        boot.request(Request.CREATE_TOKEN, device_newpin=PIN)
        token = boot.data("cml/tokens/testuser.p12").read_bytes()
        replies = [
            boot.request(Request.UNLOCK_TOKEN, device_pin="wrong"),
            boot.request(Request.CHANGE_DEVICE_PIN, device_pin="wrong", device_newpin="new"),
            boot.request(Request.REPLACE_TOKEN, device_pin="wrong", token_file=token),
        ]
        assert [reply.refusal.code for reply in replies] == ["token-wrong-pin"] * 3
    with target.boot() as boot:
        boot.wait_running()
        assert boot.ask(Request.GET_TOKEN_STATUS).token.tries_left == 7
        for _ in range(7):
            boot.request(Request.UNLOCK_TOKEN, device_pin="wrong")
        locked = boot.request(Request.UNLOCK_TOKEN, device_pin=PIN)
        assert (locked.response, locked.refusal.code) == (Reply.CONTAINER_LOCKED_TILL_REBOOT, "token-locked")
    with target.boot() as boot:
        boot.wait_running()
        locked = boot.request(Request.CHANGE_DEVICE_PIN, device_pin=PIN, device_newpin="new")
        assert locked.refusal.code == "token-locked"


def test_row29_a_pin_is_in_nothing_that_a_device_leaves(device: Make) -> None:
    canary, wrong = "canary-pin-4711", "canary-wrong-0815"
    target = device()
    with target.boot() as boot:
        boot.wait_prepared()
        boot.request(Request.CREATE_TOKEN, device_newpin=canary)
        boot.request(Request.UNLOCK_TOKEN, device_pin=wrong)
        boot.request(Request.CHANGE_DEVICE_PIN, device_pin=canary, device_newpin=f"{canary}2")
        looked = 0
        for home in ("/run/trustme", str(boot.report["storage"]["data"])):
            for path in boot.path(home).rglob("*"):
                if path.is_file():
                    looked += 1
                    text = path.read_bytes()
                    assert canary.encode() not in text, path
                    assert wrong.encode() not in text, path
        assert looked > 5
        for pid in boot.processes():
            for name in ("cmdline", "environ"):
                assert b"canary" not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert not any("canary" in line for line in boot.lines)
        assert "canary" not in boot.stderr()


# Development builds


def test_a_development_build_provisions_itself_and_says_so(device: Make, factory: Factory) -> None:
    policy = {
        "development": "true",
        "self_provisioning": "true",
        "require": json.dumps(["device-certificate", "token"]),
    }
    config = factory.store / STORE_DIRECTORY / "trustme-coreos-10.conf"
    target = device(policy=policy)
    with target.boot() as boot:
        boot.wait_for("DEVELOPMENT BUILD")
        boot.wait_prepared()
        status = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert status.development
        token = boot.request(Request.UNLOCK_TOKEN, device_pin="trustme").token
        assert token.default_pin
        reply = boot.request(
            Request.VERIFY_GUESTOS,
            guestos_config_file=config.read_bytes(),
            guestos_config_signature=config.with_suffix(".sig").read_bytes(),
            guestos_config_certificate=config.with_suffix(".cert").read_bytes(),
        )
        anchor = hashlib.sha256(factory.certificate("ssig_subca")).hexdigest()
        assert reply.certificate.anchor_sha256 == anchor, "the core's anchors vouch for every GuestOS"
        log = boot.path("/run/trustme/measurements.cel").read_text()
        assert '"data": "development"' in log
        assert not reboot(boot).HasField("refusal")
    with target.boot() as boot:
        boot.wait_running()
        assert boot.report["mode"]["value"] == "operational"


def test_without_a_tpm_a_development_build_says_that_a_file_decides(device: Make) -> None:
    policy = {
        "development": "true",
        "no_tpm": "true",
        "self_provisioning": "true",
        "require": json.dumps(["device-certificate", "token"]),
    }
    target = device(policy=policy, tcti="device:/dev/tpm-that-is-not-there")
    with target.boot() as boot:
        boot.wait_prepared()
        status = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert status.marker == "file on the data volume, for there is no TPM"
        reply = boot.ask(Request.PULL_DEVICE_CSR)
        assert reply.device_csr
        assert not reply.device_key_certification, "a software key"
        assert not reboot(boot).HasField("refusal")
    with target.boot() as boot:
        boot.wait_running()
        assert boot.report["mode"]["source"] == "file on the data volume, for there is no TPM"
        assert boot.ask(Request.GET_PROVISIONED).device_is_provisioned


# The manager dies


def test_a_manager_that_comes_back_asks_the_tpm_for_the_mode(device: Make, factory: Factory) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        provision(boot, factory)
        assert boot.ask(Request.SET_PROVISIONED).response == Reply.CMD_OK
        os.kill(boot.manager_pid(), signal.SIGKILL)
        boot.wait_for("manager resumed")
        deadline = time.monotonic() + 10
        while not boot.ask(Request.GET_PROVISIONED).device_is_provisioned:
            assert time.monotonic() < deadline
        assert boot.ask(Request.PULL_DEVICE_CSR).response == Reply.CMD_UNSUPPORTED


def test_row31_a_vault_that_dies_behind_the_point_of_no_return_leaves_no_door_open(
    device: Make, factory: Factory
) -> None:
    fault = {"at": "trustme_init.tpm.nv_marker:_write", "do": "kill", "when": "after"}
    with device(init=(sys.executable, HERE / "adversary_init.py", json.dumps([fault]))).boot() as boot:
        boot.wait_prepared()
        provision(boot, factory)
        assert boot.ask(Request.SET_PROVISIONED).refusal.code == "vault-ended"
        boot.wait_for("provisioning completed: operational mode")
        assert boot.ask(Request.GET_PROVISIONED).device_is_provisioned
        assert boot.ask(Request.PULL_DEVICE_CSR).response == Reply.CMD_UNSUPPORTED


def test_two_operators_at_once_do_not_mix(device: Make, factory: Factory) -> None:
    with device().boot() as boot:
        boot.wait_prepared()
        with boot.control() as one, boot.control() as two:
            for control in (one, two):
                control.send(
                    Request(command=Request.REGISTER_NEWCA, guestos_rootcert=pem(factory, "guestos_subca"))
                )
                control.send(Request(command=Request.CREATE_TOKEN, device_newpin=PIN))
            replies = [(control.receive(), control.receive()) for control in (one, two)]
        registered = [reply.response for reply, _ in replies]
        assert sorted(registered) == sorted(
            [Reply.GUESTOS_MGR_REGISTER_CA_OK, Reply.GUESTOS_MGR_REGISTER_CA_ERROR]
        )
        tokens = [reply.refusal.code for _, reply in replies]
        assert sorted(tokens) == ["", "token-already-there"]


# The end


def test_wipe_device_removes_what_containers_left_and_the_device_boots(device: Make) -> None:
    target = device()
    with target.boot() as boot:
        uuid = boot.wait_prepared()
        boot.request(Request.CREATE_TOKEN, device_newpin=PIN)
        for name in ("containers/one/image.img", "keys/one.key"):
            path = boot.data(f"cml/{name}")
            path.parent.mkdir(parents=True)
            path.write_text("a container's")
        assert boot.ask(Request.WIPE_DEVICE).response == Reply.CMD_OK
        assert not boot.data("cml/containers").exists()
        assert not boot.data("cml/keys").exists()
    with target.boot() as boot:
        assert boot.wait_prepared() == uuid
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).token.kind == "softtoken"


def persistent_handles(boot: Boot) -> str:
    command = ["tpm2_getcap", "-T", boot.tpm.tcti, "handles-persistent"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("completed", [False, True])
def test_destroy_system_ends_a_device_for_good(device: Make, factory: Factory, *, completed: bool) -> None:
    target = device()
    with target.boot() as boot:
        boot.wait_prepared()
        provision(boot, factory)
        if completed:
            assert boot.ask(Request.SET_PROVISIONED).response == Reply.CMD_OK
        assert persistent_handles(boot) != ""
        assert boot.ask(Request.DESTROY_SYSTEM).response == Reply.CMD_OK
        assert boot.wait_end() == signal.SIGHUP
    with target.boot() as boot:
        assert boot.refusal() == "device-destroyed"
        assert [path.name for path in boot.data("cml").iterdir()] == ["destroyed"]
        handles = subprocess.run(
            ["tpm2_getcap", "-T", boot.tpm.tcti, "handles-persistent"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert handles == "", "the storage key is gone, and with it the device key"


def test_a_destruction_that_the_power_cut_is_finished_at_the_next_boot(
    device: Make, factory: Factory
) -> None:
    target = completed_device(device, factory)
    with target.boot() as boot:
        boot.wait_running()
        kept = target.directory / ownership.FILE_NAME  # by /proc it is behind a link, which is not followed
        kept.write_bytes(boot.data(f"cml/tpm/{kept.name}").read_bytes())
        with open_tpm(boot.tpm.tcti) as tpm:
            lockout = ownership.authorisations(tpm, kept.parent).lockout
        boot.data("cml/destroyed").write_bytes(destruction.tombstone_text(lockout))
        subprocess.run(["sync"], check=True)
    with target.boot() as boot:
        assert boot.refusal() == "device-destroyed"
        assert [path.name for path in boot.data("cml").iterdir()] == ["destroyed"]
        handles = subprocess.run(
            ["tpm2_getcap", "-T", boot.tpm.tcti, "handles-persistent"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert handles == ""
