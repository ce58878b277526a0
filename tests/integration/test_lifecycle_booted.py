# SPDX-License-Identifier: Apache-2.0
"""A booted device in operation, natively, with a software TPM: every rotation there is, over its socket."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.integration.provisioning_rig import (
    NEW_PIN,
    PIN,
    WRONG_PIN,
    operator_token,
)
from tests.integration.sandbox import Boot, Device, Factory
from trustme_init.proto.control_pb2 import DEVICE_ANCHOR, GUEST_ANCHOR, LIFECYCLE_ANCHOR
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_tools.guestos import signing
from trustme_tools.guestos.build import STORE_DIRECTORY
from trustme_tools.guestos.signing import KeySigner
from trustme_tools.lifecycle import statements
from trustme_tools.pki import certificates, keys, tpm_certification
from trustme_tools.pki.device import sign_device
from trustme_tools.pki.request import read_request

pytestmark = pytest.mark.root


def statement_signer(factory: Factory, name: str) -> KeySigner:
    """Return who signs statements under a CA of the factory's PKI."""
    ca = factory.pki.certificate(name)
    new = keys.generate(keys.KeyType.P384, 0)
    authority = certificates.Issuer(ca, keys.NewKey(keys.KeyType.P384, factory.pki.key(name), b""))
    leaf = certificates.issue(
        certificates.Role.LIFECYCLE,
        certificates.name(f"rotates {name}", "test"),
        new,
        authority,
        not_before=certificates.default_not_before(),
        days=30,
    )
    return KeySigner(new.private, (leaf, ca))


def device_chain(factory: Factory, reply: Reply, issuer: KeySigner) -> bytes:
    """Be the signer: check what the device's TPM says of the key, then issue the certificate."""
    request = read_request(reply.device_csr)
    now = datetime.now(UTC)
    certification = tpm_certification.read_certification(reply.device_key_certification)
    checked = tpm_certification.check(certification, request, ek_cas=[], at=now)
    return sign_device(request, issuer, certification=checked, now=now).pem


def new_ca(name: str) -> KeySigner:
    key = keys.generate(keys.KeyType.P384, 0)
    certificate = certificates.issue(
        certificates.Role.ROOT_CA,
        certificates.name(name, "test"),
        key,
        not_before=certificates.default_not_before(),
        days=certificates.ROOT_DAYS,
    )
    return KeySigner(key.private, (certificate,))


def ca_pem(ca: KeySigner) -> bytes:
    return ca.chain[0].public_bytes(Encoding.PEM)


def ca_sha256(ca: KeySigner) -> str:
    return hashlib.sha256(ca.chain[0].public_bytes(Encoding.DER)).hexdigest()


class Operator:
    """Gives a booted device statements."""

    def __init__(self, boot: Boot, device_uuid: str) -> None:
        self._boot = boot
        self._uuid = UUID(device_uuid)

    def give(self, by: KeySigner, serial: int, action: str, *, extra: Any = None, **fields: Any) -> Reply:
        text = statements.create(action, device_uuid=self._uuid, serial=serial, fields=fields)
        signature, chain = signing.signed(by, text)
        return self._boot.request(
            Request.APPLY_STATEMENT,
            statement=text,
            statement_signature=signature,
            statement_certificate=chain,
            **(extra or {}),
        )

    def obeyed(self, *arguments: Any, **options: Any) -> Reply:
        reply = self.give(*arguments, **options)
        assert (reply.code, reply.HasField("refusal")) == (Reply.LIFECYCLE_STATUS, False), reply
        return reply


def names_guestos(boot: Boot, fields: dict[str, bytes]) -> str:
    """Return the anchor that a GuestOS verifies by, or why it does not."""
    reply = boot.request(Request.VERIFY_GUESTOS, **fields)
    return str(reply.refusal.code or reply.certificate.anchor_sha256)


def guestos(factory: Factory, by: KeySigner) -> dict[str, bytes]:
    config = (factory.store / STORE_DIRECTORY / "trustme-coreos-10.conf").read_bytes()
    signature, chain = signing.signed(by, config)
    return {
        "guestos_config_file": config,
        "guestos_config_signature": signature,
        "guestos_config_certificate": chain,
    }


def code_signer(ca: KeySigner) -> KeySigner:
    key = keys.generate(keys.KeyType.P384, 0)
    leaf = certificates.issue(
        certificates.Role.CODE_SIGNING,
        certificates.name("signs GuestOSes", "test"),
        key,
        certificates.Issuer(ca.chain[0], keys.NewKey(keys.KeyType.P384, ca.key, b"")),
        not_before=certificates.default_not_before(),
        days=30,
    )
    return KeySigner(key.private, (leaf,))


def wait_operational(device: Device, factory: Factory) -> str:
    """Bring a new device to operation; return its UUID."""
    pki_pem = {
        name: factory.pki.certificate(name).public_bytes(Encoding.PEM)
        for name in ("guestos_subca", "device_subca", "lifecycle_rootca")
    }
    with device.boot() as boot:
        device_uuid = boot.wait_prepared()
        # In provisioning there are direct verbs, and a statement is refused by name.
        assert boot.ask(Request.APPLY_STATEMENT).refusal.code == "provisioning-open"
        boot.request(Request.REGISTER_NEWCA, guestos_rootcert=pki_pem["guestos_subca"])
        boot.request(Request.REGISTER_DEVICE_CA, certificate=pki_pem["device_subca"])
        reply = boot.request(Request.REGISTER_LIFECYCLE_CA, certificate=pki_pem["lifecycle_rootca"])
        assert reply.response == Reply.GUESTOS_MGR_REGISTER_CA_OK, reply
        chain = device_chain(
            factory, boot.ask(Request.PULL_DEVICE_CSR), signing.pki_signer(factory.pki, "device_subca")
        )
        assert boot.request(Request.PUSH_DEVICE_CERT, device_cert=chain).response == Reply.DEVICE_CERT_OK
        boot.request(Request.CREATE_TOKEN, device_newpin=PIN)
        assert boot.ask(Request.SET_PROVISIONED).response == Reply.CMD_OK
        reply = boot.request(Request.REGISTER_LIFECYCLE_CA, certificate=pki_pem["lifecycle_rootca"])
        assert reply.response == Reply.CMD_UNSUPPORTED
        boot.ask(Request.REBOOT_DEVICE)
        boot.wait_end()
    return device_uuid


def test_row31_row32_row33_a_rotation_of_each_kind_in_a_booted_device(
    device: Callable[..., Device], factory: Factory
) -> None:
    target = device()
    device_uuid = wait_operational(target, factory)
    by_lifecycle = signing.pki_signer(factory.pki, "lifecycle")
    by_guest = statement_signer(factory, "guestos_subca")
    by_device = statement_signer(factory, "device_subca")
    old_guest, old_device = (
        hashlib.sha256(factory.certificate(name)).hexdigest() for name in ("guestos_subca", "device_subca")
    )
    guest_ca, device_ca = new_ca("new GuestOS CA"), new_ca("new device CA")
    old_os = guestos(factory, signing.pki_signer(factory.pki, "guestos"))
    new_os = guestos(factory, code_signer(guest_ca))
    p12 = operator_token(NEW_PIN)
    earlier = target.directory / "earlier.img"
    subprocess.run(["cp", "--sparse=always", target.disk, earlier], check=True)
    with target.boot() as boot:
        boot.wait_running()
        operator = Operator(boot, device_uuid)
        status = boot.ask(Request.GET_LIFECYCLE_STATUS).lifecycle
        assert (status.applied, status.last_serial, status.in_tpm) == (0, 0, True)
        assert {each.purpose for each in boot.ask(Request.LIST_AUTHORITIES).authorities} == {
            *(GUEST_ANCHOR, DEVICE_ANCHOR, LIFECYCLE_ANCHOR)
        }
        # The GuestOS anchor, by a statement under itself.
        assert names_guestos(boot, old_os) == old_guest
        rotation = {
            "purpose": "guest",
            "old_sha256": old_guest,
            "certificate": ca_pem(guest_ca).decode(),
            "overlap": False,
        }
        ordinary = signing.pki_signer(factory.pki, "guestos")
        refused_reply = operator.give(ordinary, 1, "replace-authority", **rotation)
        assert (refused_reply.response, refused_reply.refusal.code) == (
            Reply.CMD_FAILED,
            "statement-purpose",
        )
        operator.obeyed(by_guest, 1, "replace-authority", **rotation)
        assert names_guestos(boot, new_os) == ca_sha256(guest_ca)
        assert names_guestos(boot, old_os) == "untrusted-signer"
        # Device anchor and device key: new anchor, new key, new certificate, then the old anchor ends.
        operator.obeyed(
            *(by_device, 2, "replace-authority"),
            purpose="device",
            old_sha256=old_device,
            certificate=ca_pem(device_ca).decode(),
            overlap=True,
        )
        old_key = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning.device_key_sha256
        renewal = operator.obeyed(by_device, 3, "renew-device-key")
        assert boot.ask(Request.GET_LIFECYCLE_STATUS).device_csr == renewal.device_csr
        chain = device_chain(factory, renewal, device_ca).decode()
        operator.obeyed(by_device, 4, "device-certificate", certificate=chain)
        provisioning = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert provisioning.device_key_sha256 == renewal.lifecycle.next_key_sha256 != old_key
        operator.obeyed(by_device, 5, "retire-authority", purpose="device", sha256=old_device)
        assert all(each.met for each in boot.ask(Request.GET_PROVISIONING_STATUS).provisioning.requirements)
        # The token.
        named = hashlib.sha256(p12).hexdigest()
        wrong = operator.give(
            *(by_lifecycle, 6, "replace-token"),
            extra={"token_file": p12, "device_pin": WRONG_PIN},
            token_sha256=named,
        )
        assert wrong.refusal.code == "token-wrong-pin"
        replaced = operator.obeyed(
            *(by_lifecycle, 6, "replace-token"),
            extra={"token_file": p12, "device_pin": NEW_PIN},
            token_sha256=named,
        )
        assert (replaced.lifecycle.applied, replaced.lifecycle.last_serial) == (6, 6)
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=NEW_PIN).token.kind == "softtoken"
        boot.ask(Request.REBOOT_DEVICE)
        boot.wait_end()
    with target.boot() as boot:
        boot.wait_running()
        status = boot.ask(Request.GET_LIFECYCLE_STATUS).lifecycle
        assert (status.applied, status.last_serial) == (6, 6)
        again = Operator(boot, device_uuid).give(
            by_lifecycle, 6, "retire-authority", purpose="guest", sha256=ca_sha256(guest_ca)
        )
        assert again.refusal.code == "statement-replayed"
        assert names_guestos(boot, new_os) == ca_sha256(guest_ca)
        provisioning = boot.ask(Request.GET_PROVISIONING_STATUS).provisioning
        assert provisioning.device_key_sha256 == renewal.lifecycle.next_key_sha256
    # The disk of before: it believes in what was replaced, and its token has the old PIN.
    earlier.replace(target.disk)
    with target.boot() as boot:
        boot.wait_running()
        assert names_guestos(boot, old_os) == "lifecycle-rolled-back"
        assert boot.request(Request.UNLOCK_TOKEN, device_pin=PIN).refusal.code == "lifecycle-rolled-back"
        assert boot.ask(Request.GET_LIFECYCLE_STATUS).refusal.code == "lifecycle-rolled-back"
