# SPDX-License-Identifier: Apache-2.0
"""Opening a TPM, the storage key, and what happens when the way to the TPM is not to be trusted."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CC,
    TPM2_RC,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPMS_SENSITIVE_CREATE,
    TSS2_Exception,
)

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer, code_of
from trustme_init.errors import DeviceRefusal, Refusal
from trustme_init.tpm import storage_key
from trustme_init.tpm.connection import (
    NO_NUMBER,
    blames_parameter,
    flushed,
    nothing_there,
    open_tpm,
    response_code,
    salted_session,
    tpm_failures,
    tpm_refusal,
)
from trustme_init.tpm.device_key import create_device_key, make_csr
from trustme_init.tpm.endorsement import certify_device_key, create_attestation_key, endorsement_certificate
from trustme_init.tpm.nv_marker import define_marker, read_marker
from trustme_init.tpm.ownership import authorisations, take_ownership
from trustme_init.tpm.storage_key import HANDLE, ensure_storage_key, find_storage_key

ROOT = Path(__file__).resolve().parents[2]
FUZZ_ROUNDS = int(os.environ.get("TRUSTME_FUZZ_ROUNDS", "300"))


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path) as running:
        yield running


def refused(code: str, call: Callable[[], object]) -> DeviceRefusal:
    with pytest.raises(DeviceRefusal) as caught:
        call()
    assert caught.value.code == code, str(caught.value)
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value


# Opening, and names for errors.


@pytest.mark.parametrize("tcti", ["swtpm:path=/nobody/here", "device:/nobody/here", "no-such-tcti:x", ""])
def test_no_tpm_behind_the_address_is_a_refusal(tcti: str) -> None:
    def use() -> None:
        with open_tpm(tcti) as esapi:
            esapi.get_random(1)

    refused("tpm-failed", use)


def test_an_error_in_the_body_is_a_refusal_and_the_connection_is_closed(tpm: SoftwareTpm) -> None:
    def use() -> None:
        with open_tpm(tpm.tcti) as opened:
            kept.append(opened)
            opened.tr_from_tpmpublic(HANDLE)

    kept: list[Any] = []
    refused("tpm-failed", use)
    assert kept[0].is_closed()


@pytest.mark.parametrize(
    ("code", "name"),
    [(0x921, "tpm-lockout"), (0x98E, "tpm-auth-refused"), (0x9A2, "tpm-auth-refused"), (0x101, "tpm-failed")],
)
def test_errors_have_names(code: int, name: str) -> None:
    refusal = tpm_refusal(TSS2_Exception(code), "do it")
    assert refusal.code == name
    assert f"{code:#x}" in refusal.evidence
    assert refusal.remedy


def test_an_error_of_the_software_below_is_not_taken_for_the_tpms() -> None:
    lower = TSS2_Exception(0x000A0000 | 0x18B)
    assert response_code(lower) == NO_NUMBER
    assert not nothing_there(lower)
    assert not blames_parameter(TSS2_Exception(0x000A0000 | 0x1DF))
    assert response_code(TSS2_Exception(0x18B)) == TPM2_RC.HANDLE
    assert nothing_there(TSS2_Exception(0x18B))
    assert blames_parameter(TSS2_Exception(0x1DF))


def test_row29_the_librarys_own_exceptions_are_named_and_not_quoted() -> None:
    with pytest.raises(DeviceRefusal) as caught, tpm_failures("do it"):
        raise ValueError("CANARY")
    assert "ValueError" in caught.value.evidence
    assert "CANARY" not in str(caught.value.as_dict())


def test_a_refusal_passes_unchanged_and_outlives_a_failing_flush(tpm: SoftwareTpm) -> None:
    refusal = DeviceRefusal("marker-foreign", "cause")
    with (
        pytest.raises(DeviceRefusal) as caught,
        open_tpm(tpm.tcti) as esapi,
        tpm_failures("do it"),
        flushed(esapi, ESYS_TR.OWNER),  # cannot be flushed
    ):
        raise refusal
    assert caught.value is refusal


def test_row29_the_librarys_log_is_off_whatever_the_environment_says(
    tpm: SoftwareTpm, tmp_path: Path
) -> None:
    program = f"""
from pathlib import Path
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.ownership import take_ownership
with open_tpm({tpm.tcti!r}) as esapi:
    ours = take_ownership(esapi, Path({str(tmp_path)!r}))
print(ours.owner.hex(), ours.lockout.hex())
"""
    environment = os.environ | {"TSS2_LOG": "all+trace", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) == 2
    assert done.stderr == ""


# The storage key.


def test_the_storage_key_is_that_of_tpm2_tools(tpm: SoftwareTpm, tmp_path: Path) -> None:
    """The TCG's template in another implementation gives the same key."""
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
    unique = tmp_path / "unique"
    unique.write_bytes((b"\x20\x00" + bytes(128)) * 2)  # TPMS_ECC_POINT as a C structure
    command = ["tpm2_createprimary", "-T", tpm.tcti, "-C", "o", "-G", "ecc256:aes128cfb", "-g", "sha256"]
    command += ["-a", attributes, "-u", str(unique), "-c", str(tmp_path / "srk.ctx"), "-f", "pem"]
    subprocess.run([*command, "-o", str(tmp_path / "srk.pem")], check=True, capture_output=True)
    subprocess.run(["tpm2_flushcontext", "-T", tpm.tcti, "-t"], check=True)
    with open_tpm(tpm.tcti) as esapi:
        public, _, _ = esapi.read_public(ensure_storage_key(esapi))
    assert public.to_pem() == (tmp_path / "srk.pem").read_bytes()


def test_the_storage_key_stays_the_same(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
            names.add(bytes(esapi.tr_get_name(ensure_storage_key(esapi))))
            names.add(bytes(esapi.tr_get_name(find_storage_key(esapi))))
    assert len(names) == 1


def test_no_storage_key_is_named(tpm: SoftwareTpm) -> None:
    with open_tpm(tpm.tcti) as esapi:
        refused("storage-key-missing", lambda: find_storage_key(esapi))


def test_making_the_storage_key_takes_the_owner(tpm: SoftwareTpm) -> None:
    with open_tpm(tpm.tcti) as esapi:
        esapi.hierarchy_change_auth(ESYS_TR.OWNER, b"somebody's")
        esapi.tr_set_auth(ESYS_TR.OWNER, b"")
        refused("tpm-auth-refused", lambda: ensure_storage_key(esapi))
        refused("tpm-auth-refused", lambda: ensure_storage_key(esapi, b"wrong"))
        refused("storage-key-missing", lambda: find_storage_key(esapi))
        ensure_storage_key(esapi, b"somebody's")
        find_storage_key(esapi)


def other_attributes(public: TPM2B_PUBLIC) -> None:
    public.publicArea.objectAttributes &= ~TPMA_OBJECT.NODA


def other_policy(public: TPM2B_PUBLIC) -> None:
    public.publicArea.authPolicy = bytes(32)


def other_cipher(public: TPM2B_PUBLIC) -> None:
    public.publicArea.parameters.eccDetail.symmetric.keyBits.aes = 256


def other_kind(public: TPM2B_PUBLIC) -> None:
    signing = TPM2B_PUBLIC.parse(
        "ecc256:ecdsa-sha256", objectAttributes="userwithauth|sign|fixedtpm|fixedparent|sensitivedataorigin"
    )
    public.publicArea = signing.publicArea


@pytest.mark.parametrize("change", [other_attributes, other_policy, other_cipher, other_kind])
def test_another_object_in_its_place_is_foreign(
    tpm: SoftwareTpm, change: Callable[[TPM2B_PUBLIC], None]
) -> None:
    with open_tpm(tpm.tcti) as esapi:
        template = storage_key._template()
        change(template)
        made, *_ = esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template, ESYS_TR.OWNER)
        with flushed(esapi, made):
            esapi.evict_control(ESYS_TR.OWNER, made, HANDLE)
        refused("storage-key-foreign", lambda: ensure_storage_key(esapi))
        refused("storage-key-foreign", lambda: find_storage_key(esapi))


def test_a_storage_key_with_an_authorisation_value_serves_nobody(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=b"somebody's"))
        made, *_ = esapi.create_primary(sensitive, storage_key._template(), ESYS_TR.OWNER)
        with flushed(esapi, made):
            esapi.evict_control(ESYS_TR.OWNER, made, HANDLE)
    with open_tpm(tpm.tcti) as esapi:
        refused("tpm-auth-refused", lambda: create_device_key(esapi, "ecc-p256"))
        refused("tpm-auth-refused", lambda: take_ownership(esapi, tmp_path))


# The bus.


def test_row18_a_storage_key_swapped_on_the_bus_is_another_tpms(tpm: SoftwareTpm, tmp_path: Path) -> None:
    """Who has the private half of the key that sessions are salted to reads everything in them."""
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, tmp_path)
        genuine, name, qualified = esapi.read_public(find_storage_key(esapi))
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = stranger.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    forged, _ = TPM2B_PUBLIC.unmarshal(genuine.marshal())
    forged.publicArea.unique = TPM2B_PUBLIC.from_pem(pem).publicArea.unique
    true_reply = genuine.marshal() + name.marshal()
    for false_name in (name, forged.get_name()):
        false_reply = forged.marshal() + false_name.marshal()
        with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
            bus.on_reply = lambda reply, false=false_reply: reply.replace(true_reply, false)  # type: ignore[misc]
            with pytest.raises(DeviceRefusal) as caught:
                authorisations(esapi, tmp_path)
            assert caught.value.code in {"tpm-authorisation-lost", "tpm-failed"}
            assert TPM2_CC.StartAuthSession not in bus.codes
            assert bus.replies[0].count(true_reply) == 1
    assert qualified is not None


def test_row18_a_session_the_tpm_refuses_is_not_replaced_by_none(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, tmp_path)
    refusal = b"\x80\x01" + (10).to_bytes(4, "big") + int(TPM2_RC.SYMMETRIC + 0x3C0).to_bytes(4, "big")
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        bus.on_reply = lambda reply: (
            refusal if code_of(bus.commands[-1]) == TPM2_CC.StartAuthSession else reply
        )
        for call in (
            lambda: authorisations(esapi, tmp_path),
            lambda: define_marker(esapi, ours.owner),
            lambda: create_device_key(esapi, "ecc-p256"),
        ):
            bus.forget()
            refused("tpm-failed", call)
            secret = {TPM2_CC.Unseal, TPM2_CC.NV_DefineSpace, TPM2_CC.Create}
            assert secret.isdisjoint(bus.codes)
            assert bus.codes.count(TPM2_CC.StartAuthSession) == 1


def test_row18_sessions_are_salted_and_encrypt_both_ways(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        srk = ensure_storage_key(esapi)
        bus.forget()
        with salted_session(esapi, srk):
            start = bus.commands[-1]
        assert code_of(start) == TPM2_CC.StartAuthSession
        assert start[10:14] == HANDLE.to_bytes(4, "big")
        assert start.endswith(
            TPM2_ALG.AES.to_bytes(2, "big")
            + (128).to_bytes(2, "big")
            + TPM2_ALG.CFB.to_bytes(2, "big")
            + TPM2_ALG.SHA256.to_bytes(2, "big")
        )


def test_latency_and_the_number_of_commands_can_be_measured(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        bus.latency = 0.05
        begun = time.monotonic()
        read_marker(esapi)
        assert time.monotonic() - begun >= 0.05
        assert len(bus.commands) == 1


def mangled(reply: bytes, chance: random.Random) -> bytes:
    """A reply as no TPM gives it."""
    data = bytearray(reply)
    place = chance.randrange(len(data))
    match chance.randrange(8):
        case 0:
            return chance.randbytes(chance.randrange(64))
        case 1:
            return reply[:place]
        case 2:
            data[place] ^= 1 << chance.randrange(8)
        case 3:
            data[place : place + 2] = b"\xff\xff"
        case 4:
            data[2:6] = chance.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
        case 5:
            data += chance.randbytes(chance.randrange(1, 5000))
        case 6:
            data += bytes(chance.randrange(1, 5000))
            data[2:6] = len(data).to_bytes(4, "big")
        case _:
            del data[max(10, place) :]
            data[2:6] = len(data).to_bytes(4, "big")
    return bytes(data)


def test_row19_malformed_replies_are_refused(tpm: SoftwareTpm, tmp_path: Path) -> None:
    """Each operation with one reply mangled: what it needs, or a refusal; no other exception, no hanging."""
    with open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, tmp_path)
        define_marker(esapi, ours.owner)
        device, ak = create_device_key(esapi, "ecc-p256"), create_attestation_key(esapi)
    operations: list[Callable[[Any], object]] = [
        read_marker,
        endorsement_certificate,
        lambda esapi: authorisations(esapi, tmp_path),
        lambda esapi: take_ownership(esapi, tmp_path),
        lambda esapi: create_device_key(esapi, "ecc-p256"),
        lambda esapi: make_csr(esapi, device, device_uuid=UUID(int=1), common_name="device"),
        lambda esapi: certify_device_key(esapi, device, ak, b"request"),
    ]
    chance = random.Random(19)  # noqa: S311 - to be repeatable
    codes = set()
    with Interposer(tpm, tmp_path) as bus:
        for number in range(FUZZ_ROUNDS):
            victim = chance.randrange(9)
            bus.forget()
            bus.on_reply = lambda reply, victim=victim: (  # type: ignore[misc]
                mangled(reply, chance) if len(bus.replies) == victim + 1 else reply
            )
            try:
                with open_tpm(bus.tcti) as esapi:
                    chance.choice(operations)(esapi)
            except Refusal as refusal:
                codes.add(refusal.code)
            if number % 20 == 0:
                # What a connection that broke leaves behind, a resource manager takes away; swtpm has none.
                for kind in ("-t", "-l", "-s"):
                    subprocess.run(
                        ["tpm2_flushcontext", "-T", tpm.tcti, kind], check=True, capture_output=True
                    )
    assert "tpm-failed" in codes
