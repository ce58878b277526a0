# SPDX-License-Identifier: Apache-2.0
"""TPM certifications: a swtpm makes genuine ones, a forger without a TPM everything else.

Each check of `tpm_certification` has a document here that is wrong in that one thing. The forger signs with
its own "AK", so that not the signature but the check in question refuses it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tpm2_pytss import (
    TPM2_ALG,
    TPM2B_PUBLIC,
    TPMA_OBJECT,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF_OBJECT,
    TSS2_Exception,
)

from tests.integration.certifying_tpm import (
    AK_ATTRIBUTES,
    DEVICE,
    DEVICE_ATTRIBUTES,
    CertifyingTpm,
    Document,
    Forger,
    certifying_tpm,
    claim,
    der,
    manufactured_tpm,
    request_of,
    sign_as_tpm,
    spki,
)
from trustme_init.errors import DeviceRefusal
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.device_key import KINDS, create_device_key, make_csr
from trustme_init.tpm.device_key import spki as device_spki
from trustme_init.tpm.endorsement import activate_credential, certify_device_key, create_attestation_key
from trustme_init.tpm.storage_key import ensure_storage_key
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.pki.endorsement import EK_PURPOSE
from trustme_tools.pki.request import read_request
from trustme_tools.pki.tpm_certification import (
    Challenge,
    Checked,
    check,
    confirm,
    make_challenge,
    read_certification,
)

# Ahead of whatever these tests make, also at the end of a long run that began with reading this file.
NOW = datetime.now(UTC) + timedelta(hours=6)
"""A moment at which certificates that this run makes are valid."""


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CertifyingTpm]:
    with certifying_tpm(tmp_path_factory.mktemp("certifying")) as running:
        yield running


@pytest.fixture(scope="module")
def other_tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CertifyingTpm]:
    with certifying_tpm(tmp_path_factory.mktemp("other")) as running:
        yield running


@pytest.fixture(scope="module")
def genuine(tpm: CertifyingTpm) -> Document:
    return tpm.certification()


@pytest.fixture
def forger(genuine: Document) -> Forger:
    return Forger(genuine)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    return create(tmp_path_factory.mktemp("pki") / "made", algorithm=Algorithm.P384, development=True)


def judge(document: Document | bytes, request: bytes, *cas: x509.Certificate, at: datetime = NOW) -> Checked:
    data = document if isinstance(document, bytes) else document.json()
    return check(read_certification(data), read_request(request), ek_cas=cas, at=at)


def refusal(document: Document | bytes, request: bytes, *cas: x509.Certificate, at: datetime = NOW) -> str:
    with pytest.raises(ToolError) as refused:
        judge(document, request, *cas, at=at)
    assert refused.value.remedy
    return refused.value.code


def test_a_genuine_certification_is_believed(tpm: CertifyingTpm, genuine: Document) -> None:
    checked = judge(genuine, tpm.request, tpm.authority)
    assert checked.ek_anchor == tpm.authority.subject.rfc4514_string()
    assert checked.ek_certificate == x509.load_der_x509_certificate(tpm.ek_certificate)
    assert [text.partition(":")[0] for text in checked.unproven] == ["that AK and EK are in one TPM"]


def test_without_an_ek_ca_the_gap_is_named(tpm: CertifyingTpm, genuine: Document) -> None:
    assert len(judge(genuine, tpm.request).unproven) == 2
    without = judge(genuine.json(ek_certificate=None), tpm.request)
    assert without.ek_certificate is None
    assert "no EK certificate" in without.unproven[0]


def test_the_forger_is_right_in_everything_else(tpm: CertifyingTpm, forger: Forger) -> None:
    """So a refusal below is that of one check. Nothing in it is true: hence credential activation."""
    assert judge(forger.document(), forger.request, tpm.authority)


# --- each check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("magic", [0xFF544346, 0, 0x00544347])
def test_what_no_tpm_made_is_refused(forger: Forger, magic: int) -> None:
    assert refusal(forger.document(magic=magic), forger.request) == "attest-magic"


def test_an_attestation_of_another_type_is_refused(tpm: CertifyingTpm, genuine: Document) -> None:
    """A genuine quote, signed by the genuine AK, over the right digest."""
    attest, signature = tpm.quote(hashlib.sha256(der(tpm.request)).digest())
    document = Document(**{**vars(genuine), "attest": attest, "signature": signature})
    assert refusal(document, tpm.request) == "attest-type"


@pytest.mark.parametrize(
    "bit",
    [
        TPMA_OBJECT.RESTRICTED,
        TPMA_OBJECT.SIGN_ENCRYPT,
        TPMA_OBJECT.FIXEDTPM,
        TPMA_OBJECT.FIXEDPARENT,
        TPMA_OBJECT.SENSITIVEDATAORIGIN,
        TPMA_OBJECT.DECRYPT,
    ],
)
def test_row09_an_attestation_key_with_one_wrong_attribute_is_refused(forger: Forger, bit: int) -> None:
    document = forger.document(ak_attributes=AK_ATTRIBUTES ^ bit)
    assert refusal(document, forger.request) == "ak-attributes"


def test_row09_an_unrestricted_key_of_the_same_tpm_certifies_nothing(tpm: CertifyingTpm) -> None:
    """It could sign anything, also what looks like an attestation."""
    with tpm.made(DEVICE_ATTRIBUTES) as (unrestricted, public):
        document = tpm.certify(hashlib.sha256(der(tpm.request)).digest(), ak=unrestricted, ak_public=public)
    assert refusal(document, tpm.request) == "ak-attributes"


@pytest.mark.parametrize(
    "bit",
    [
        TPMA_OBJECT.SIGN_ENCRYPT,
        TPMA_OBJECT.FIXEDTPM,
        TPMA_OBJECT.FIXEDPARENT,
        TPMA_OBJECT.SENSITIVEDATAORIGIN,
        TPMA_OBJECT.RESTRICTED,
        TPMA_OBJECT.DECRYPT,
    ],
)
def test_row08_a_device_key_with_one_wrong_attribute_is_refused(forger: Forger, bit: int) -> None:
    document = forger.document(device_attributes=DEVICE_ATTRIBUTES ^ bit)
    assert refusal(document, forger.request) == "device-key-attributes"


def test_row08_a_key_that_the_tpm_would_let_go_is_refused(tpm: CertifyingTpm) -> None:
    """Genuine to the last bit: the TPM certifies a key that can be duplicated out of it."""
    movable = TPMA_OBJECT.SENSITIVEDATAORIGIN | TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.SIGN_ENCRYPT
    with tpm.made(movable, scheme=False) as (key, public):
        request = request_of(tpm.signer(key))
        document = tpm.certify(hashlib.sha256(der(request)).digest(), key=key, public=public)
    assert refusal(document, request) == "device-key-attributes"


def test_row08_the_certification_of_another_key_is_refused(tpm: CertifyingTpm) -> None:
    """The document shows a second, fine key of this TPM, the attestation is about the first."""
    with tpm.made(DEVICE_ATTRIBUTES | TPMA_OBJECT.NODA, scheme=False) as (second, public):
        request = request_of(tpm.signer(second))
        document = tpm.certify(hashlib.sha256(der(request)).digest(), public=public)
    assert refusal(document, request) == "name-mismatch"


def test_row08_a_public_area_with_other_claims_than_the_certified_key_is_refused(forger: Forger) -> None:
    """Same key, but attributes that the TPM did not certify: only the name shows it."""
    document = forger.document()
    changed = claim(forger.device, DEVICE_ATTRIBUTES | TPMA_OBJECT.NODA)
    assert (
        refusal(Document(**{**vars(document), "device_public": changed}), forger.request) == "name-mismatch"
    )


def test_row08_the_certification_of_another_request_is_refused(tpm: CertifyingTpm) -> None:
    """Same key, but what the device asked for then was something else."""
    other = request_of(tpm.signer(tpm.device))
    assert other != tpm.request  # ECDSA is random: the same words signed again are another request
    assert refusal(tpm.certification(), other) == "request-mismatch"
    assert refusal(tpm.certify(b""), tpm.request) == "request-mismatch"


def test_row08_a_request_for_a_software_key_with_a_genuine_certification_is_refused(
    tpm: CertifyingTpm,
) -> None:
    request = request_of(ec.generate_private_key(ec.SECP256R1()))
    document = tpm.certify(hashlib.sha256(der(request)).digest())
    assert refusal(document, request) == "key-mismatch"


def test_row09_another_attestation_key_did_not_sign_it(
    tpm: CertifyingTpm, other_tpm: CertifyingTpm, genuine: Document
) -> None:
    document = Document(**{**vars(genuine), "ak_public": other_tpm.ak_public})
    assert refusal(document, tpm.request) == "attest-signature"


def test_every_flipped_byte_is_refused(tpm: CertifyingTpm, genuine: Document) -> None:
    """Of EK and AK the keys: what else they say of themselves, a challenge binds (the AK's name)."""
    fields = {name: value for name, value in vars(genuine).items() if value is not None}
    keys = {"ek_public": 256, "ak_public": 32 + 2 + 32}
    for name, value in fields.items():
        for position in range(len(value) - keys.get(name, len(value)), len(value)):
            changed = bytearray(value)
            changed[position] ^= 0x01
            document = Document(**{**vars(genuine), name: bytes(changed)})
            try:
                judge(document, tpm.request, tpm.authority)
            except ToolError:
                continue
            raise AssertionError(f"byte {position} of {name} may be changed")


@pytest.mark.parametrize("identifier", [TPM2_ALG.SHA1, TPM2_ALG.SHA3_256])
def test_a_signature_by_another_hash_is_refused(forger: Forger, identifier: int) -> None:
    document = forger.document()
    algorithm = hashes.SHA1() if identifier == TPM2_ALG.SHA1 else hashes.SHA3_256()  # noqa: S303 - the point
    document.signature = sign_as_tpm(forger.ak, document.attest, algorithm, identifier)
    assert refusal(document, forger.request) == "weak-signature"


def test_an_hmac_is_no_signature(forger: Forger) -> None:
    document = forger.document()
    signature = TPMT_SIGNATURE(sigAlg=TPM2_ALG.HMAC)
    signature.signature.hmac.hashAlg = TPM2_ALG.SHA256
    document.signature = bytes(signature.marshal())
    assert refusal(document, forger.request) == "certification-malformed"


def test_a_name_by_sha1_is_refused(forger: Forger) -> None:
    document = forger.document(name_algorithm=TPM2_ALG.SHA1)
    assert refusal(document, forger.request) == "weak-name-algorithm"


def test_weak_tpm_keys_are_refused(genuine: Document, tpm: CertifyingTpm) -> None:
    public, _ = TPM2B_PUBLIC.unmarshal(genuine.ek_public)
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - the point
    public.publicArea.unique.rsa = weak.public_key().public_numbers().n.to_bytes(128, "big")
    document = Document(**{**vars(genuine), "ek_public": public.marshal()})
    assert refusal(document, tpm.request) == "weak-key"


# --- the endorsement key ------------------------------------------------------------------------------


def test_row09_the_ek_certificate_of_another_tpm_is_refused(
    tpm: CertifyingTpm, other_tpm: CertifyingTpm, genuine: Document
) -> None:
    swapped = Document(**{**vars(genuine), "ek_certificate": other_tpm.ek_certificate})
    assert refusal(swapped, tpm.request, tpm.authority) == "ek-mismatch"
    assert refusal(swapped, tpm.request) == "ek-mismatch"


def test_row09_the_tpm_of_an_unknown_maker_is_refused(
    tpm: CertifyingTpm, other_tpm: CertifyingTpm, genuine: Document
) -> None:
    assert refusal(genuine, tpm.request, other_tpm.authority) == "ek-untrusted"
    assert judge(genuine, tpm.request, other_tpm.authority, tpm.authority).ek_anchor


def test_an_ek_ca_wants_an_ek_certificate(tpm: CertifyingTpm, genuine: Document) -> None:
    assert refusal(genuine.json(ek_certificate=None), tpm.request, tpm.authority) == "ek-certificate-missing"


def test_an_ek_certificate_is_not_valid_before_its_time(tpm: CertifyingTpm, genuine: Document) -> None:
    early = NOW - timedelta(days=2)
    assert refusal(genuine, tpm.request, tpm.authority, at=early) == "ek-expired"


def test_what_is_no_certificate_is_refused(tpm: CertifyingTpm, genuine: Document) -> None:
    for junk in (b"", b"junk", tpm.ek_certificate[:-1], tpm.ek_certificate + b"\0"):
        document = Document(**{**vars(genuine), "ek_certificate": junk})
        assert refusal(document, tpm.request) == "ek-certificate-malformed"


def extended(*purposes: x509.ObjectIdentifier) -> tuple[x509.ExtensionType, bool]:
    return x509.ExtendedKeyUsage(list(purposes)), False


def encrypts(*, yes: bool) -> tuple[x509.ExtensionType, bool]:
    words = dict.fromkeys(("data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"), False)
    words |= {"encipher_only": False, "decipher_only": False, "content_commitment": False}
    return x509.KeyUsage(digital_signature=not yes, key_encipherment=yes, **words), True


AUTHORITY = (x509.BasicConstraints(ca=True, path_length=None), True)
MAKER = ec.generate_private_key(ec.SECP256R1())
UNKNOWN = (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)


def certificate(
    subject: str, key: Any, *extensions: tuple[x509.ExtensionType, bool], days: int = 10
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else []))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "maker")]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=20))
        .not_valid_after(NOW + timedelta(days=days))
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(MAKER, hashes.SHA256())


@pytest.mark.parametrize(
    ("extensions", "days", "code"),
    [
        ([extended(EK_PURPOSE)], 10, None),
        ([encrypts(yes=True)], 10, None),
        ([extended(EK_PURPOSE)], -1, "ek-expired"),
        ([extended(x509.ObjectIdentifier("2.23.133.8.3"))], 10, "ek-purpose"),
        ([extended(ExtendedKeyUsageOID.CLIENT_AUTH), encrypts(yes=True)], 10, "ek-purpose"),
        ([encrypts(yes=False)], 10, "ek-purpose"),
        ([], 10, "ek-purpose"),
        ([extended(EK_PURPOSE), AUTHORITY], 10, "ek-purpose"),
        ([extended(EK_PURPOSE), UNKNOWN], 10, "ek-untrusted"),
    ],
)
def test_what_an_ek_certificate_may_say(
    tpm: CertifyingTpm,
    genuine: Document,
    extensions: list[tuple[x509.ExtensionType, bool]],
    days: int,
    code: str | None,
) -> None:
    maker = certificate("maker", MAKER.public_key(), AUTHORITY)
    ek = x509.load_der_x509_certificate(tpm.ek_certificate).public_key()
    made = certificate("", ek, *extensions, days=days).public_bytes(Encoding.DER)
    document = Document(**{**vars(genuine), "ek_certificate": made})
    if code is None:
        assert judge(document, tpm.request, maker).ek_anchor == "CN=maker"
    else:
        assert refusal(document, tpm.request, maker) == code


@pytest.mark.parametrize(
    "extensions",
    [[], [(x509.BasicConstraints(ca=False, path_length=None), True)], [AUTHORITY, encrypts(yes=False)]],
)
def test_an_ek_ca_is_a_ca(
    tpm: CertifyingTpm, genuine: Document, extensions: list[tuple[x509.ExtensionType, bool]]
) -> None:
    ek = x509.load_der_x509_certificate(tpm.ek_certificate).public_key()
    made = certificate("", ek, extended(EK_PURPOSE)).public_bytes(Encoding.DER)
    document = Document(**{**vars(genuine), "ek_certificate": made})
    assert (
        refusal(document, tpm.request, certificate("maker", MAKER.public_key(), *extensions))
        == "ek-untrusted"
    )


@pytest.mark.parametrize(
    "bit", [TPMA_OBJECT.RESTRICTED, TPMA_OBJECT.DECRYPT, TPMA_OBJECT.FIXEDTPM, TPMA_OBJECT.SIGN_ENCRYPT]
)
def test_an_endorsement_key_with_one_wrong_attribute_is_refused(
    tpm: CertifyingTpm, genuine: Document, bit: int
) -> None:
    public, _ = TPM2B_PUBLIC.unmarshal(genuine.ek_public)
    public.publicArea.objectAttributes ^= bit
    document = Document(**{**vars(genuine), "ek_public": public.marshal()})
    assert refusal(document, tpm.request) == "ek-attributes"


def test_an_endorsement_key_that_encrypts_nothing_is_refused(tpm: CertifyingTpm, genuine: Document) -> None:
    public, _ = TPM2B_PUBLIC.unmarshal(genuine.ek_public)
    public.publicArea.parameters.rsaDetail.symmetric = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
    document = Document(**{**vars(genuine), "ek_public": public.marshal()})
    assert refusal(document, tpm.request) == "ek-attributes"


# --- the form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members.update(kind="something"),
        lambda members: members.update(version=2),
        lambda members: members.update(version=True),
        lambda members: members.update(version="1"),
        lambda members: members.update(more=1),
        lambda members: members.pop("attest"),
        lambda members: members.pop("ek_certificate"),
        lambda members: members.update(attest=None),
        lambda members: members.update(signature=5),
        lambda members: members.update(attest=f"{members['attest']} "),
        lambda members: members.update(attest="!!!!"),
        lambda members: members.update(device_public=""),
        lambda members: members.update(device_public=base64.b64encode(b"\0\5abcde").decode()),
        lambda members: members.update(
            ak_public=base64.b64encode(base64.b64decode(members["ak_public"]) + b"\0").decode()
        ),
    ],
)
def test_a_malformed_document_is_refused(
    tpm: CertifyingTpm, genuine: Document, change: Callable[[dict[str, Any]], None]
) -> None:
    members = genuine.members()
    change(members)
    assert refusal(json.dumps(members).encode(), tpm.request) == "certification-malformed"


def test_there_is_one_text_for_each_document(tpm: CertifyingTpm, genuine: Document) -> None:
    """Base64 has unused bits where it is padded: other text, same bytes."""
    members = genuine.members()
    name, text = next((name, text) for name, text in members.items() if str(text).endswith("="))
    used = text.rstrip("=")
    changed = used[:-1] + {"A": "B", "Q": "R", "g": "h", "w": "x"}.get(used[-1], chr(ord(used[-1]) + 1))
    members[name] = changed + "=" * (len(text) - len(used))
    assert base64.b64decode(members[name]) == base64.b64decode(text)
    assert refusal(json.dumps(members).encode(), tpm.request) == "certification-malformed"


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"null", b"[" * 40000, b"\xff", b" " * 70000])
def test_what_is_no_document_is_refused(tpm: CertifyingTpm, data: bytes) -> None:
    assert refusal(data, tpm.request) == "certification-malformed"


def test_a_member_twice_is_refused(tpm: CertifyingTpm, genuine: Document) -> None:
    twice = genuine.json().replace(b'{"kind"', b'{"version": 1, "kind"', 1)
    assert json.loads(twice) == genuine.members()
    assert refusal(twice, tpm.request) == "certification-malformed"


# --- credential activation ------------------------------------------------------------------------------


def test_the_tpm_gives_the_secret_back(tpm: CertifyingTpm, genuine: Document) -> None:
    challenge = make_challenge(judge(genuine, tpm.request, tpm.authority))
    confirm(challenge, tpm.activate(challenge.credential_blob, challenge.encrypted_secret))
    assert make_challenge(judge(genuine, tpm.request)).expected != challenge.expected


def test_row09_the_forger_cannot_answer(tpm: CertifyingTpm, forger: Forger) -> None:
    """It has no AK in the TPM whose EK certificate it shows, whatever its document says."""
    challenge = make_challenge(judge(forger.document(), forger.request, tpm.authority))
    with pytest.raises(TSS2_Exception, match="integrity"):
        tpm.activate(challenge.credential_blob, challenge.encrypted_secret)
    for answer in (b"", bytes(32), challenge.expected[:-1]):
        with pytest.raises(ToolError) as refused:
            confirm(challenge, answer)
        assert refused.value.code == "credential-not-activated"
        assert challenge.expected.hex() not in str(refused.value.as_dict())


def test_row09_another_tpm_cannot_answer(
    tpm: CertifyingTpm, other_tpm: CertifyingTpm, genuine: Document
) -> None:
    challenge = make_challenge(judge(genuine, tpm.request))
    with pytest.raises(TSS2_Exception):
        other_tpm.activate(challenge.credential_blob, challenge.encrypted_secret)


def test_a_challenge_does_not_show_its_secret() -> None:
    assert b"secret".hex() not in repr(Challenge(b"a", b"b", b"secret"))
    assert "secret" not in repr(Challenge(b"a", b"b", b"secret"))


# --- the device's own side ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_device_certifies_is_signed_and_activated(
    tmp_path: Path, pki: PkiDirectory, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """From end to end with `trustme_init.tpm`: request, certification, challenge, certificate."""
    csr, maker = tmp_path / "device.csr", tmp_path / "maker.pem"
    with manufactured_tpm(tmp_path) as (tcti, authority), open_tpm(tcti) as esapi:
        ensure_storage_key(esapi)
        device, ak = create_device_key(esapi, kind), create_attestation_key(esapi)
        pem = make_csr(esapi, device, device_uuid=DEVICE, common_name="device")
        document = certify_device_key(esapi, device, ak, der(pem))
        challenge = make_challenge(judge(document, pem, authority))
        answer = activate_credential(esapi, ak, challenge.credential_blob, challenge.encrypted_secret)
        confirm(challenge, answer)
        other = create_attestation_key(esapi)
        with pytest.raises(DeviceRefusal) as refused:
            activate_credential(esapi, other, challenge.credential_blob, challenge.encrypted_secret)
        assert refused.value.code == "credential-foreign"
    csr.write_bytes(pem)
    csr.with_name("device.csr.tpm").write_bytes(document)
    maker.write_bytes(authority.public_bytes(Encoding.PEM))
    words = ["pki", "sign-device", str(csr), "--pki", str(pki.path), "--ek-ca", str(maker), "--json"]
    assert main.main(words) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert (result["uuid"], result["software_key"], result["not_granted"]) == (str(DEVICE), False, [])
    leaf = x509.load_pem_x509_certificates(csr.with_suffix(".cert").read_bytes())[0]
    assert spki(leaf) == device_spki(device)


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_signs_what_the_tpm_certified(
    tmp_path: Path,
    tpm: CertifyingTpm,
    genuine: Document,
    pki: PkiDirectory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    csr, maker = tmp_path / "device.csr", tmp_path / "maker.pem"
    csr.write_bytes(tpm.request)
    csr.with_name("device.csr.tpm").write_bytes(genuine.json())
    maker.write_bytes(tpm.authority.public_bytes(Encoding.PEM))
    words = ["pki", "sign-device", str(csr), "--pki", str(pki.path), "--uuid", str(DEVICE)]
    assert main.main([*words, "--ek-ca", str(maker), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["software_key"] is False
    assert result["tpm"]["ek_vouched_for_by"] == "CN=swtpm-localca"
    assert result["tpm"]["ek_certificate"]["purpose"] == "endorsement key of a TPM"
    ek = x509.load_der_x509_certificate(tpm.ek_certificate)
    assert result["tpm"]["ek_sha256"] == hashlib.sha256(spki(ek)).hexdigest()
    leaf = x509.load_pem_x509_certificates(csr.with_suffix(".cert").read_bytes())[0]
    assert spki(leaf) == spki(x509.load_pem_x509_csr(tpm.request))
    assert main.main([*words, "--force"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not proven:") == 2
    assert "SOFTWARE KEY" not in shown


def test_the_command_writes_nothing_where_it_refuses(
    tmp_path: Path,
    other_tpm: CertifyingTpm,
    tpm: CertifyingTpm,
    pki: PkiDirectory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    csr = tmp_path / "device.csr"
    csr.write_bytes(tpm.request)
    csr.with_name("device.csr.tpm").write_bytes(other_tpm.certification().json())
    words = ["pki", "sign-device", str(csr), "--pki", str(pki.path), "--allow-software-key", "--json"]
    assert main.main(words) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "request-mismatch"
    assert {path.name for path in tmp_path.iterdir()} == {"device.csr", "device.csr.tpm"}
