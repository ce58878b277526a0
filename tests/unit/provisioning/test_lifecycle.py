# SPDX-License-Identifier: Apache-2.0
"""The history of statements, and a device without a TPM: what a file alone can and cannot say."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.test_policy import GOOD
from tests.unit.tokens import kit
from tests.unit.trust import pki
from trustme_init import policy as policies
from trustme_init.errors import Refusal, StorageRefusal
from trustme_init.machine import Machine
from trustme_init.provisioning import certstore, lifecycle
from trustme_init.provisioning import history as history_module
from trustme_init.provisioning.history import Entry, History, chain
from trustme_init.provisioning.lifecycle import NextKey
from trustme_init.provisioning.mode import FROM_FILE, Mode, ModeFact
from trustme_init.provisioning.service import ProvisioningService, Surroundings
from trustme_init.tokens import softtoken
from trustme_init.trust.certificate import LIFECYCLE_PURPOSE
from trustme_init.trust.statement import SignedStatement, parse_statement

GUEST, DEVICE, LIFECYCLE, NEW = (
    pki.issue(pki.ROOT.but(subject=name)) for name in ("guest", "device", "lifecycle", "new")
)
SIGNING = pki.Wish(
    "s", key_usage=pki.usage("digital_signature"), purpose=x509.ExtendedKeyUsage([LIFECYCLE_PURPOSE])
)
SIGNER = pki.issue(SIGNING, LIFECYCLE)
UNDER_GUEST = pki.issue(SIGNING, GUEST)
FIRST = Entry(1, "renew-device-key", "ab" * 32)
SECOND = Entry(5, "replace-token", "cd" * 32)


def code(call: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value.code


# The history


def test_the_chain_holds_every_field_in_its_order() -> None:
    assert chain(()) == bytes(32)
    digest = hashlib.sha256(f"1 renew-device-key {'ab' * 32}   ".encode()).digest()
    assert chain((FIRST,)) == hashlib.sha256(bytes(32) + digest).digest()
    others = [
        (replace(FIRST, serial=2), SECOND),
        (replace(FIRST, action="replace-token"), SECOND),
        (replace(FIRST, sha256="ba" * 32), SECOND),
        (replace(FIRST, purpose="guest"), SECOND),
        (replace(FIRST, adds="cd" * 32), SECOND),
        (replace(FIRST, drops="cd" * 32), SECOND),
        (SECOND, FIRST),
        (FIRST,),
        (FIRST, SECOND, SECOND),
    ]
    assert len({chain(each) for each in [*others, (FIRST, SECOND)]}) == len(others) + 1


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "lifecycle", None, tmp_path)


def test_what_is_finished_is_read_again(history: History) -> None:
    assert history.entries() == ()
    signed = SignedStatement(text(serial=1), b"signature", b"chain")
    history.begin(signed)
    assert history.committed(()) == parse_statement(signed.text)
    history.finish([FIRST, SECOND])
    assert history.entries() == (FIRST, SECOND)
    assert history.committed(history.entries()) is None
    assert history.directory.stat().st_mode & 0o777 == 0o700
    assert (history.directory / "history.json").stat().st_mode & 0o777 == 0o600


DAMAGED: dict[str, Any] = {
    "no object": [],
    "another version": {"version": 2, "entries": []},
    "no entries": {"version": 1},
    "entries no list": {"version": 1, "entries": 5},
    "falling": {"version": 1, "entries": [{"serial": 2}, {"serial": 1}]},
    "twice": {"version": 1, "entries": [{"serial": 1}, {"serial": 1}]},
    "serial true": {"version": 1, "entries": [{"serial": True}]},
    "serial text": {"version": 1, "entries": [{"serial": "1"}]},
    "serial zero": {"version": 1, "entries": [{"serial": 0}]},
    "unknown key": {"version": 1, "entries": [{"serial": 1, "comment": ""}]},
    "short digest": {"version": 1, "entries": [{"serial": 1, "sha256": "ab"}]},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_row31_a_damaged_history_is_no_empty_one(history: History, kind: str) -> None:
    document = DAMAGED[kind]
    if isinstance(document, dict) and isinstance(document.get("entries"), list):
        default = {"action": "renew-device-key", "sha256": "ab" * 32}
        document = {**document, "entries": [default | each for each in document["entries"]]}
    history.directory.mkdir()
    (history.directory / "history.json").write_text(json.dumps(document))
    assert code(history.entries) == "lifecycle-history-damaged"


@pytest.mark.parametrize("kind", ["directory", "link", "fifo", "garbage", "large"])
def test_row31_what_is_no_regular_file_is_no_empty_history(history: History, kind: str) -> None:
    history.directory.mkdir()
    path = history.directory / "history.json"
    match kind:
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(history.directory / "nowhere")
        case "fifo":
            os.mkfifo(path)
        case "garbage":
            path.write_bytes(b"\xff{")
        case _:
            path.write_bytes(b" " * (2 * 1024 * 1024))
    assert code(history.entries) == "lifecycle-history-damaged"


# A device without a TPM


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(softtoken, "ROUNDS", kit.FEW)
    monkeypatch.setattr(softtoken, "KEY_BITS", 2048)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "data")
    path = tmp_path / "data"
    path.mkdir()
    return path


def service(data: Path, mode: Mode, *, provisions_itself: bool = False) -> ProvisioningService:
    policy = replace(
        policies.parse(GOOD.encode()), self_provisioning=provisions_itself, build_date=pki.NOW - pki.DAY
    )
    return ProvisioningService(
        Surroundings(
            data,
            None,
            policy,
            pki.anchors(GUEST),
            ModeFact(mode, "", FROM_FILE),
            data / "measurements",
            Machine().volumes,
        )
    )


@pytest.fixture
def device(data: Path) -> ProvisioningService:
    first = service(data, Mode.PROVISIONING)
    first.handle("prepare", {})
    for name, issued in (("guest", GUEST), ("device", DEVICE), ("lifecycle", LIFECYCLE)):
        first.handle("add-authority", {"purpose": name, "certificate": issued.pem})
    return service(data, Mode.OPERATIONAL)


def text(
    *, serial: int, action: str = "renew-device-key", device_uuid: str | None = None, **fields: Any
) -> bytes:
    head = {"kind": "trustme.lifecycle-statement", "version": 1, "device_uuid": device_uuid}
    return json.dumps({**head, "serial": serial, "action": action, **fields}).encode()


def arguments(statement: bytes) -> dict[str, str | bytes]:
    signature: bytes = SIGNER.key.sign(statement, ec.ECDSA(hashes.SHA512()))
    return {
        "statement": statement,
        "signature": signature,
        "certificate": SIGNER.pem,
        "token": b"",
        "pin": "",
    }


def sha256(issued: pki.Issued) -> str:
    return hashlib.sha256(issued.der).hexdigest()


def swap(serial: int, old: pki.Issued, new: pki.Issued, *, overlap: bool = False) -> bytes:
    return text(
        serial=serial,
        action="replace-authority",
        purpose="guest",
        old_sha256=sha256(old),
        certificate=new.pem.decode(),
        overlap=overlap,
    )


def guests(device: ProvisioningService) -> list[str]:
    listed = device.handle("authorities", {})["authorities"]
    return [each["subject"] for each in listed if each["purpose"] == "guest"]


def test_a_file_alone_keeps_serial_numbers(device: ProvisioningService, data: Path) -> None:
    status = device.handle("apply-statement", arguments(swap(3, GUEST, NEW)))
    assert (status["last_serial"], status["applied"], status["in_tpm"]) == (3, 1, False)
    assert guests(device) == ["CN=new"]
    again = service(data, Mode.OPERATIONAL)
    assert (
        code(lambda: again.handle("apply-statement", arguments(swap(3, NEW, GUEST)))) == "statement-replayed"
    )
    again.handle("apply-statement", arguments(swap(4, NEW, GUEST)))
    assert guests(again) == ["CN=guest"]


def test_row33_without_a_tpm_a_pending_statement_is_finished(
    device: ProvisioningService, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise StorageRefusal("test", "the power went", evidence="x", remedy="y")

    with monkeypatch.context() as patch:
        patch.setattr(History, "finish", cut)
        assert code(lambda: device.handle("apply-statement", arguments(swap(3, GUEST, NEW)))) == "test"
    again = service(data, Mode.OPERATIONAL)
    assert again.handle("lifecycle-status", {})["applied"] == 1
    assert guests(again) == ["CN=new"]


def test_a_device_key_in_a_file_is_renewed(device: ProvisioningService, data: Path) -> None:
    uuid = device.handle("status", {})["device_uuid"]
    old = device.handle("status", {})["device_key_sha256"]
    status = device.handle("apply-statement", arguments(text(serial=1)))
    assert not status["certification"]
    wish = pki.Wish(
        uuid,
        key_usage=pki.usage("digital_signature"),
        purpose=pki.CLIENT_AUTH,
        more=((x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"UUID:{uuid}")]), False),),
    )
    pem = pki.issue(wish, DEVICE, x509.load_pem_x509_csr(status["csr"].encode())).pem
    statement = text(serial=2, action="device-certificate", device_uuid=uuid, certificate=pem.decode())
    device.handle("apply-statement", arguments(statement))
    now = device.handle("status", {})
    assert now["device_key_sha256"] == status["next_key_sha256"] != old
    assert not list(data.rglob("*next*"))
    assert (data / "cml/tokens/device.key").stat().st_mode & 0o777 == 0o600


def test_a_next_key_that_signs_for_another_is_not_proven(
    device: ProvisioningService, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.handle("apply-statement", arguments(text(serial=1)))
    place = NextKey.beside(device._key, device._layout)
    place.prove(UUID(int=1))
    present = device._key.request(UUID(int=1))
    monkeypatch.setattr(type(place.key), "request", lambda *_: present)
    monkeypatch.setattr(type(place.key), "public_key", lambda _self: b"another")
    assert code(lambda: place.prove(UUID(int=1))) == "device-key-unproven"


def test_row04_the_core_s_own_anchors_vouch_for_no_statement_even_where_they_vouch_for_every_guestos(
    device: ProvisioningService, data: Path
) -> None:
    device.handle("apply-statement", arguments(swap(1, GUEST, NEW)))  # GUEST is the core's anchor, too
    itself = service(data, Mode.OPERATIONAL, provisions_itself=True)
    statement = text(serial=2, action="retire-authority", purpose="guest", sha256=sha256(GUEST))
    signature: bytes = UNDER_GUEST.key.sign(statement, ec.ECDSA(hashes.SHA512()))
    signed = arguments(statement) | {"signature": signature, "certificate": UNDER_GUEST.pem}
    assert code(lambda: itself.handle("apply-statement", signed)) == "untrusted-signer"


def test_an_anchor_of_another_purpose_is_not_taken_for_the_old_one(device: ProvisioningService) -> None:
    statement = swap(1, DEVICE, NEW)
    assert code(lambda: device.handle("apply-statement", arguments(statement))) == "authority-unknown"


def test_the_store_takes_no_more_than_it_can_hold(
    device: ProvisioningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certstore, "AUTHORITY_LIMIT", 1)
    overlap = swap(1, GUEST, NEW, overlap=True)
    assert code(lambda: device.handle("apply-statement", arguments(overlap))) == "too-many-authorities"
    device.handle("apply-statement", arguments(swap(1, GUEST, NEW)))
    assert guests(device) == ["CN=new"]


def test_a_device_obeys_no_more_statements_than_its_history_holds(
    device: ProvisioningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "ENTRY_LIMIT", 1)
    device.handle("apply-statement", arguments(text(serial=1)))
    assert (
        code(lambda: device.handle("apply-statement", arguments(text(serial=2)))) == "lifecycle-history-full"
    )


def test_row33_a_full_disk_is_a_refusal_and_the_old_state(
    device: ProvisioningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _data: bytes, mode: int = 0o600) -> None:
        raise StorageRefusal("disk-not-writable", f"{mode}", evidence=str(path), remedy="x")

    with monkeypatch.context() as patch:
        patch.setattr(history_module, "save", full)
        refused = code(lambda: device.handle("apply-statement", arguments(swap(1, GUEST, NEW))))
    assert refused == "disk-not-writable"
    assert guests(device) == ["CN=guest"]
    assert device.handle("lifecycle-status", {})["applied"] == 0


def test_row29_no_password_is_kept(device: ProvisioningService, data: Path) -> None:
    p12 = kit.encoded(pin=kit.CANARY)
    uuid = device.handle("status", {})["device_uuid"]
    digest = hashlib.sha256(p12).hexdigest()
    statement = text(serial=1, action="replace-token", device_uuid=uuid, token_sha256=digest)
    device.handle("apply-statement", arguments(statement) | {"token": p12, "pin": kit.CANARY})
    assert device.handle("token-unlock", {"pin": kit.CANARY})["kind"] == "softtoken"
    for path in data.rglob("*"):
        assert not path.is_file() or kit.CANARY.encode() not in path.read_bytes(), path
