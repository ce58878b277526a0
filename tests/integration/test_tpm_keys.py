# SPDX-License-Identifier: Apache-2.0
"""Device key, attestation key and endorsement key in swtpm; openssl and tpm2-tools are the oracles."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID
from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2B_DATA,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_NV_PUBLIC,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE,
    TPMA_NV,
    TPMA_OBJECT,
    TPMS_ATTEST,
    TPMS_NV_PUBLIC,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF_OBJECT,
    utils,
)

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer
from trustme_init.errors import DeviceRefusal
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.device_key import (
    KINDS,
    KeyBlobs,
    create_device_key,
    make_csr,
    self_signed_certificate,
    spki,
)
from trustme_init.tpm.endorsement import (
    activate_credential,
    certify_device_key,
    create_attestation_key,
    endorsement_certificate,
)
from trustme_init.tpm.ownership import clear
from trustme_init.tpm.storage_key import ensure_storage_key, find_storage_key

DEVICE = UUID("00112233-4455-6677-8899-aabbccddeeff")
NOW = datetime(2030, 1, 2, tzinfo=UTC)
ECC_INDEX, RSA_INDEX = 0x01C0000A, 0x01C00002
PLATFORM_INDEX = (
    TPMA_NV.PPWRITE
    | TPMA_NV.PPREAD
    | TPMA_NV.OWNERREAD
    | TPMA_NV.AUTHREAD
    | TPMA_NV.NO_DA
    | TPMA_NV.PLATFORMCREATE
)
OWNER_INDEX = TPMA_NV.OWNERWRITE | TPMA_NV.OWNERREAD | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path) as running:
        yield running


@pytest.fixture
def esapi(tpm: SoftwareTpm) -> Iterator[Any]:
    with open_tpm(tpm.tcti) as opened:
        ensure_storage_key(opened)
        yield opened


def refused(code: str, call: Callable[[], object]) -> DeviceRefusal:
    with pytest.raises(DeviceRefusal) as caught:
        call()
    assert caught.value.code == code, str(caught.value)
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def csr(esapi: Any, blobs: KeyBlobs) -> bytes:
    return make_csr(esapi, blobs, device_uuid=DEVICE, common_name="device", organization="example")


# The device key.


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_as_openssl_reads_it(esapi: Any, tmp_path: Path, kind: str) -> None:
    blobs = create_device_key(esapi, kind)
    (tmp_path / "csr.pem").write_bytes(csr(esapi, blobs))
    text = run("openssl", "req", "-in", tmp_path / "csr.pem", "-noout", "-verify", "-text")
    assert "Subject: O = example, CN = device" in text
    assert f"URI:UUID:{DEVICE}" in text
    assert "X509v3 Key Usage: critical\n                    Digital Signature\n" in text
    assert "X509v3 Extended Key Usage: \n                    TLS Web Client Authentication\n" in text
    assert "ecdsa-with-SHA256" in text or "sha256WithRSAEncryption" in text
    public = run("openssl", "req", "-in", tmp_path / "csr.pem", "-noout", "-pubkey")
    assert load_pem_public_key(public.encode()) == load_der_public_key(spki(blobs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_self_signed_certificate_as_openssl_reads_it(esapi: Any, tmp_path: Path, kind: str) -> None:
    blobs = create_device_key(esapi, kind)
    path = tmp_path / "device.pem"
    serials = set()
    for _ in range(2):
        path.write_bytes(
            self_signed_certificate(
                esapi, blobs, device_uuid=DEVICE, common_name="device", not_before=NOW, days=10
            )
        )
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        serials.add(certificate.serial_number)
    assert len(serials) == 2
    assert (certificate.not_valid_before_utc, certificate.not_valid_after_utc) == (
        NOW,
        NOW + timedelta(days=10),
    )
    at = str(int(NOW.timestamp()) + 1)
    run("openssl", "verify", "-attime", at, "-purpose", "sslclient", "-CAfile", path, path)
    text = run("openssl", "x509", "-in", path, "-noout", "-text")
    assert "CA:FALSE" in text
    assert f"URI:UUID:{DEVICE}" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_cannot_leave_and_only_signs(esapi: Any, kind: str) -> None:
    public, _ = TPM2B_PUBLIC.unmarshal(create_device_key(esapi, kind).public)
    attributes = public.publicArea.objectAttributes
    wanted = ["FIXEDTPM", "FIXEDPARENT", "SENSITIVEDATAORIGIN", "USERWITHAUTH", "NODA", "SIGN_ENCRYPT"]
    assert int(attributes) == sum(int(getattr(TPMA_OBJECT, name)) for name in wanted)


def test_the_key_outlasts_a_reset(tmp_path: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        ensure_storage_key(esapi)
        blobs = create_device_key(esapi, "ecc-p256")
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        assert csr(esapi, blobs)


def test_another_kind_is_an_error_of_the_caller(esapi: Any) -> None:
    with pytest.raises(ValueError, match="not a kind"):
        create_device_key(esapi, "dsa")


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "a\x1b[2Jb"])
def test_a_name_that_cannot_stand_in_a_certificate(esapi: Any, name: str) -> None:
    blobs = create_device_key(esapi, "ecc-p256")
    said = refused(
        "certificate-name-unfit", lambda: make_csr(esapi, blobs, device_uuid=DEVICE, common_name=name)
    )
    assert said.evidence.isprintable()


@pytest.mark.parametrize("part", ["public", "private"])
@pytest.mark.parametrize("change", [lambda _: b"", lambda blob: blob[:-1], lambda blob: blob + b"\0"])
def test_damaged_blobs_are_named(esapi: Any, part: str, change: Callable[[bytes], bytes]) -> None:
    blobs = create_device_key(esapi, "ecc-p256")
    damaged = blobs._replace(**{part: change(getattr(blobs, part))})
    refused("device-key-damaged", lambda: csr(esapi, damaged))
    if part == "public":
        refused("device-key-damaged", lambda: spki(damaged))


def test_row08_every_flipped_bit_of_the_blobs_is_refused(esapi: Any) -> None:
    blobs = create_device_key(esapi, "ecc-p256")
    for part in ("public", "private"):
        blob = getattr(blobs, part)
        for place in range(0, len(blob), 3):
            changed = blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :]
            with pytest.raises(DeviceRefusal) as caught:
                csr(esapi, blobs._replace(**{part: changed}))
            assert caught.value.code in {"device-key-foreign", "device-key-damaged"}


def test_row08_keys_of_another_tpm_are_foreign(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with SoftwareTpm(tmp_path / name) as tpm, open_tpm(tpm.tcti) as esapi:
            ensure_storage_key(esapi)
            made.append(create_device_key(esapi, "ecc-p256"))
    with SoftwareTpm(tmp_path / "two") as tpm, open_tpm(tpm.tcti) as esapi:
        refused("device-key-foreign", lambda: csr(esapi, made[0]))
        refused("device-key-foreign", lambda: csr(esapi, KeyBlobs(made[0].public, made[1].private)))
        assert csr(esapi, made[1])


def test_keys_of_a_cleared_tpm_are_gone(esapi: Any) -> None:
    blobs = create_device_key(esapi, "ecc-p256")
    clear(esapi, b"")
    refused("storage-key-missing", lambda: csr(esapi, blobs))
    refused("storage-key-missing", lambda: create_device_key(esapi, "ecc-p256"))
    ensure_storage_key(esapi)
    refused("device-key-foreign", lambda: csr(esapi, blobs))


def test_row08_a_key_made_elsewhere_and_imported_is_foreign(esapi: Any) -> None:
    """Whoever can talk to the TPM can import a key of which he has a copy below the storage key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public = TPM2B_PUBLIC.from_pem(
        public_pem,
        objectAttributes=TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.NODA | TPMA_OBJECT.SIGN_ENCRYPT,
    )
    duplicate = TPM2B_PRIVATE(TPM2B_SENSITIVE.from_pem(private_pem).marshal())
    private = esapi.import_(
        find_storage_key(esapi),
        TPM2B_DATA(),
        public,
        duplicate,
        TPM2B_ENCRYPTED_SECRET(),
        TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL),
    )
    imported = KeyBlobs(public.marshal(), private.marshal())
    refused("device-key-foreign", lambda: csr(esapi, imported))
    ours, _ = TPM2B_PUBLIC.unmarshal(create_device_key(esapi, "ecc-p256").public)
    public.publicArea.objectAttributes = ours.publicArea.objectAttributes
    refused("device-key-foreign", lambda: csr(esapi, imported._replace(public=public.marshal())))


def test_row18_a_signature_changed_on_the_bus_is_refused(
    tpm: SoftwareTpm, esapi: Any, tmp_path: Path
) -> None:
    blobs = create_device_key(esapi, "ecc-p256")
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as other:
        bus.on_reply = lambda reply: (
            reply[:-8] + bytes([reply[-8] ^ 1]) + reply[-7:] if bus.codes[-1] == 0x15D else reply
        )
        refused("tpm-failed", lambda: csr(other, blobs))
        refused(
            "tpm-failed",
            lambda: self_signed_certificate(
                other, blobs, device_uuid=DEVICE, common_name="device", not_before=NOW, days=1
            ),
        )


# Attestation and endorsement.


def certification(esapi: Any) -> tuple[KeyBlobs, KeyBlobs, dict[str, Any]]:
    device, ak = create_device_key(esapi, "ecc-p256"), create_attestation_key(esapi)
    document = json.loads(certify_device_key(esapi, device, ak, b"the request's DER"))
    return device, ak, document


def unpacked(document: dict[str, Any], name: str) -> bytes:
    return base64.b64decode(document[name], validate=True)


def test_a_certification_says_what_the_verifier_checks(esapi: Any) -> None:
    device, ak, document = certification(esapi)
    assert document["kind"] == "trustme.device-key-certification"
    assert document["version"] == 1
    assert document["ek_certificate"] is None
    assert unpacked(document, "device_public") == device.public
    assert unpacked(document, "ak_public") == ak.public
    attest, size = TPMS_ATTEST.unmarshal(unpacked(document, "attest"))
    assert size == len(unpacked(document, "attest"))
    assert int(attest.magic) == 0xFF544347
    assert int(attest.type) == 0x8017
    assert bytes(attest.extraData) == hashlib.sha256(b"the request's DER").digest()
    name = TPM2B_PUBLIC.unmarshal(device.public)[0].get_name()
    assert bytes(attest.attested.certify.name) == bytes(name)
    signature, _ = TPMT_SIGNATURE.unmarshal(unpacked(document, "signature"))
    r, s = (
        int.from_bytes(bytes(each), "big")
        for each in (signature.signature.ecdsa.signatureR, signature.signature.ecdsa.signatureS)
    )
    key = load_der_public_key(spki(ak))
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(encode_dss_signature(r, s), unpacked(document, "attest"), ec.ECDSA(hashes.SHA256()))


def test_row09_the_attestation_key_signs_nothing_but_what_the_tpm_made(esapi: Any) -> None:
    device, ak, _ = certification(esapi)
    refused("device-key-foreign", lambda: csr(esapi, ak))
    refused("device-key-foreign", lambda: certify_device_key(esapi, device, device, b""))
    refused("device-key-foreign", lambda: certify_device_key(esapi, ak, ak, b""))


def test_row09_keys_of_another_tpm_are_not_certified(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with SoftwareTpm(tmp_path / name) as tpm, open_tpm(tpm.tcti) as esapi:
            ensure_storage_key(esapi)
            made.append(certification(esapi))
    with SoftwareTpm(tmp_path / "two") as tpm, open_tpm(tpm.tcti) as esapi:
        refused("device-key-foreign", lambda: certify_device_key(esapi, made[0][0], made[1][1], b""))
        refused("device-key-foreign", lambda: certify_device_key(esapi, made[1][0], made[0][1], b""))


def test_row07_two_devices_share_no_key(tmp_path: Path) -> None:
    """Points and wrapped keys of two TPMs have no eight bytes in common at the same or another place."""
    seen: list[set[bytes]] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with SoftwareTpm(tmp_path / name) as tpm, open_tpm(tpm.tcti) as esapi:
            srk, _, _ = esapi.read_public(ensure_storage_key(esapi))
            device, ak, document = certification(esapi)
            ek, _ = TPM2B_PUBLIC.unmarshal(unpacked(document, "ek_public"))
            points = [srk, ek, *(TPM2B_PUBLIC.unmarshal(blobs.public)[0] for blobs in (device, ak))]
            parts = [bytes(each.publicArea.unique.ecc.x) for each in points]
            # A TPM2B_PRIVATE begins with the sizes of the blob and of its integrity value.
            parts += [device.private[4:], ak.private[4:]]
            seen.append({part[n : n + 8] for part in parts for n in range(len(part) - 7)})
    assert seen[0].isdisjoint(seen[1])
    assert min(map(len, seen)) > 200


@pytest.mark.parametrize(("algorithm", "index"), [("ecc", ECC_INDEX), ("rsa", RSA_INDEX)])
def test_the_endorsement_key_is_that_of_tpm2_tools(
    tpm: SoftwareTpm, tmp_path: Path, algorithm: str, index: int
) -> None:
    pem = tmp_path / "ek.pem"
    run("tpm2_createek", "-T", tpm.tcti, "-c", tmp_path / "ek.ctx", "-G", algorithm, "-f", "pem", "-u", pem)
    certificate = endorsement(pem.read_bytes())
    with open_tpm(tpm.tcti) as esapi:
        flush_all(tpm)
        ensure_storage_key(esapi)
        assert endorsement_certificate(esapi) is None
        put(esapi, index, certificate + b"\xff" * 600)
        assert endorsement_certificate(esapi) == certificate
        _, _, document = certification(esapi)
    assert unpacked(document, "ek_certificate") == certificate
    public, _ = TPM2B_PUBLIC.unmarshal(unpacked(document, "ek_public"))
    assert load_pem_public_key(public.to_pem()) == load_pem_public_key(pem.read_bytes())


def test_ecc_goes_before_rsa(esapi: Any) -> None:
    certificates = [endorsement(some_key()) for _ in range(2)]
    put(esapi, RSA_INDEX, certificates[0])
    assert endorsement_certificate(esapi) == certificates[0]
    put(esapi, ECC_INDEX, certificates[1])
    assert endorsement_certificate(esapi) == certificates[1]


@pytest.mark.parametrize(
    "data", [b"\0" * 700, b"\x30\x82\x04\x00" + bytes(700), b"\x30\x03\x02\x01\x00", b"\x30"]
)
def test_a_certificate_that_is_none_is_named(esapi: Any, data: bytes) -> None:
    put(esapi, ECC_INDEX, data)
    refused("endorsement-certificate-malformed", lambda: endorsement_certificate(esapi))
    device, ak = create_device_key(esapi, "ecc-p256"), create_attestation_key(esapi)
    refused("endorsement-certificate-malformed", lambda: certify_device_key(esapi, device, ak, b""))


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_what_an_owner_put_in_the_makers_place_is_not_read(esapi: Any, offset: int) -> None:
    """Certificate, nonce and template: the last would make us derive an endorsement key of his choice."""
    put(esapi, ECC_INDEX + offset, b"\x30\x82\x00\x01\x00", OWNER_INDEX, ESYS_TR.OWNER)
    assert endorsement_certificate(esapi) is None
    certification(esapi)


def test_a_makers_template_that_protects_nothing_is_refused(esapi: Any) -> None:
    _, template = utils.create_ek_template("EK-ECC256", absent)
    template.publicArea.objectAttributes |= TPMA_OBJECT.USERWITHAUTH
    put(esapi, ECC_INDEX + 2, template.publicArea.marshal())
    device, ak = create_device_key(esapi, "ecc-p256"), create_attestation_key(esapi)
    refused("endorsement-key-unusual", lambda: certify_device_key(esapi, device, ak, b""))


def absent(index: int) -> bytes:
    raise utils.NoSuchIndex(index)


def put(
    esapi: Any,
    index: int,
    data: bytes,
    attributes: TPMA_NV = PLATFORM_INDEX,
    hierarchy: ESYS_TR = ESYS_TR.PLATFORM,
) -> None:
    public = TPMS_NV_PUBLIC(nvIndex=index, nameAlg=TPM2_ALG.SHA256, attributes=attributes, dataSize=len(data))
    handle = esapi.nv_define_space(b"", TPM2B_NV_PUBLIC(nvPublic=public), auth_handle=hierarchy)
    for offset in range(0, len(data), 512):
        esapi.nv_write(handle, data[offset : offset + 512], offset, auth_handle=hierarchy)


def endorsement(pem: bytes) -> bytes:
    """A certificate as a TPM's maker gives it, for the endorsement key in `pem`."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "maker of TPMs")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(load_pem_public_key(pem))  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=9999))
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def some_key() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def flush_all(tpm: SoftwareTpm) -> None:
    run("tpm2_flushcontext", "-T", tpm.tcti, "-t")


# Credential activation.


def challenge(tmp_path: Path, ek: bytes, ak: KeyBlobs) -> tuple[bytes, bytes]:
    """What a host sends, made by tpm2-tools from the two public keys alone."""
    public, _ = TPM2B_PUBLIC.unmarshal(ek)
    name = bytes(TPM2B_PUBLIC.unmarshal(ak.public)[0].get_name()).hex()
    (tmp_path / "ek.pub").write_bytes(public.marshal())
    (tmp_path / "secret").write_bytes(b"a secret that goes back")
    inputs = ("-e", tmp_path / "ek.pub", "-s", tmp_path / "secret", "-n", name)
    run("tpm2_makecredential", "-T", "none", *inputs, "-o", tmp_path / "credential")
    blob, secret = utils.tools_to_credential((tmp_path / "credential").read_bytes())
    return blob.marshal(), secret.marshal()


@pytest.mark.parametrize("algorithm", ["ecc", "rsa"])
def test_row09_the_secret_comes_back_from_the_right_tpm_only(tmp_path: Path, algorithm: str) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with SoftwareTpm(tmp_path / name) as tpm, open_tpm(tpm.tcti) as esapi:
            ensure_storage_key(esapi)
            if algorithm == "rsa":
                put(esapi, RSA_INDEX, endorsement(some_key()))
            _, ak, document = certification(esapi)
            made.append((ak, unpacked(document, "ek_public")))
    (first_ak, first_ek), (second_ak, second_ek) = made
    # What swtpm says of an RSA secret that it cannot decrypt is TPM_RC_FAILURE.
    other_ek = "credential-foreign" if algorithm == "ecc" else "tpm-failed"
    sent = challenge(tmp_path, first_ek, first_ak)
    blob, secret = sent
    with SoftwareTpm(tmp_path / "one") as tpm, open_tpm(tpm.tcti) as esapi:

        def answer(ak: KeyBlobs, challenge: tuple[bytes, bytes]) -> Callable[[], bytes]:
            return lambda: activate_credential(esapi, ak, *challenge)

        assert answer(first_ak, sent)() == b"a secret that goes back"
        refused(other_ek, answer(first_ak, challenge(tmp_path, second_ek, first_ak)))
        refused("credential-foreign", answer(first_ak, challenge(tmp_path, first_ek, second_ak)))
        refused("credential-foreign", answer(create_attestation_key(esapi), sent))
        refused("device-key-foreign", answer(second_ak, sent))
        for malformed in ((b"", secret), (blob, b""), (blob + b"\0", secret), (blob[:-1], secret)):
            refused("credential-foreign", answer(first_ak, malformed))
        assert answer(first_ak, sent)() == b"a secret that goes back"
    with SoftwareTpm(tmp_path / "two") as tpm, open_tpm(tpm.tcti) as esapi:
        refused(other_ek, lambda: activate_credential(esapi, second_ak, *sent))


def test_row18_the_activated_secret_is_not_seen_on_the_bus(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        ensure_storage_key(esapi)
        _, ak, document = certification(esapi)
        sent = challenge(tmp_path, unpacked(document, "ek_public"), ak)
        assert activate_credential(esapi, ak, *sent) == b"a secret that goes back"
        assert b"a secret that goes back" not in b"".join(bus.commands + bus.replies)


def test_nothing_stays_loaded(tpm: SoftwareTpm, esapi: Any) -> None:
    device, ak, _ = certification(esapi)
    csr(esapi, device)
    refused("device-key-foreign", lambda: csr(esapi, ak))
    for kind in ("handles-transient", "handles-loaded-session"):
        assert run("tpm2_getcap", "-T", tpm.tcti, kind).strip() == ""
