# SPDX-License-Identifier: Apache-2.0
"""Device certificates without a TPM: what is taken from a request, and who may issue what."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from math import prod
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku
from cryptography.x509.oid import NameOID

from tests.unit.trust.pki import usage
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.guestos.signing import KeySigner, pki_signer
from trustme_tools.pki.device import DEVICE_DAYS, DeviceCertificate, sign_device
from trustme_tools.pki.directory import PkiDirectory, load_chain
from trustme_tools.pki.purpose import describe_purpose
from trustme_tools.pki.request import REQUEST_LIMIT, read_request
from trustme_tools.pki.strength import has_roca_mark, weakness

DEVICE = UUID("0b2c4a6e-5d1f-4c38-9a77-3f0e6d1b2c4a")
NOW = datetime.now(UTC)
KEY = ec.generate_private_key(ec.SECP256R1())
Extensions = Sequence[tuple[x509.ExtensionType, bool]]


def uuid_names(*texts: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(text) for text in texts])


HONEST: Extensions = (
    (uuid_names(f"UUID:{DEVICE}"), False),
    (x509.ExtendedKeyUsage([Eku.CLIENT_AUTH]), False),
    (usage("digital_signature"), True),
)


def request(
    extensions: Extensions = HONEST, *, key: Any = KEY, name: str = "device", algorithm: Any = None
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(key, algorithm or hashes.SHA256()).public_bytes(Encoding.PEM)


def issue(pki: PkiDirectory, data: bytes, **options: Any) -> DeviceCertificate:
    signer = options.pop("signer", None) or pki_signer(pki, "device_subca")
    words = {"certification": None, "allow_software_key": True, "now": NOW, **options}
    return sign_device(read_request(data), signer, **words)


def code_of(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ToolError) as refused:
        call(*arguments, **options)
    assert refused.value.remedy
    return refused.value.code


def test_the_certificate_is_written_by_the_ca(pki: PkiDirectory) -> None:
    issued = issue(pki, request())
    leaf, authority = x509.load_pem_x509_certificates(issued.pem)
    assert authority == pki.certificate("device_subca")
    leaf.verify_directly_issued_by(authority)
    values = {type(each.value): (each.critical, each.value) for each in leaf.extensions}
    assert values[x509.SubjectAlternativeName] == (False, uuid_names(f"UUID:{DEVICE}"))
    assert values[x509.ExtendedKeyUsage] == (False, x509.ExtendedKeyUsage([Eku.CLIENT_AUTH]))
    assert values[x509.KeyUsage] == (True, usage("digital_signature"))
    assert values[x509.BasicConstraints] == (True, x509.BasicConstraints(ca=False, path_length=None))
    subject_key = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert values[x509.AuthorityKeyIdentifier][1].key_identifier == subject_key.digest
    assert values[x509.SubjectKeyIdentifier][1] == x509.SubjectKeyIdentifier.from_public_key(KEY.public_key())
    assert len(values) == 6
    assert leaf.subject.rfc4514_string() == f"CN={DEVICE},O=trustme-py"
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=DEVICE_DAYS)
    assert leaf.not_valid_before_utc <= NOW - timedelta(hours=23)
    assert issued.software_key
    assert describe_purpose(leaf) == f"authenticates a client, device {DEVICE}"


def test_row08_what_an_attacker_asks_for_is_not_granted(pki: PkiDirectory) -> None:
    """Talos CVE-2022-36103: a request for a worker's certificate got the rights it asked for."""
    greedy: Extensions = (
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (usage("digital_signature", "key_cert_sign"), True),
        (x509.ExtendedKeyUsage([Eku.CLIENT_AUTH, Eku.CODE_SIGNING, Eku.ANY_EXTENDED_KEY_USAGE]), True),
        (
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(f"UUID:{DEVICE}"), x509.DNSName("backend.example")]
            ),
            False,
        ),
        (x509.NameConstraints([x509.DNSName("example")], None), True),
        (x509.SubjectKeyIdentifier(b"another key"), False),
    )
    asked = read_request(request(greedy, name="backend.example"))
    assert asked.not_granted == (
        "to be a CA",
        "key usage key_cert_sign",
        f"purpose {Eku.CODE_SIGNING.dotted_string}",
        f"purpose {Eku.ANY_EXTENDED_KEY_USAGE.dotted_string}",
        "name backend.example",
        "extension 2.5.29.30",
    )
    greedy_leaf = issue(pki, request(greedy, name="backend.example")).certificate
    honest_leaf = issue(pki, request()).certificate
    assert list(greedy_leaf.extensions) == list(honest_leaf.extensions)
    assert greedy_leaf.subject == honest_leaf.subject


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["https://example/"],
        [f"UUID:{DEVICE}", f"UUID:{UUID(int=7)}"],
        [f"UUID:{DEVICE}", f"uuid:{UUID(int=7)}"],
        [f"UUID:{{{DEVICE}}}"],
        [f"UUID:{DEVICE.hex}"],
        ["UUID:"],
        [f"UUID:{UUID(int=0)}"],
    ],
)
def test_row08_a_request_that_does_not_name_one_device_is_refused(names: list[str]) -> None:
    extensions: Extensions = [(uuid_names(*names), False)] if names else []
    assert code_of(read_request, request(extensions)) == "request-uuid"


def test_row08_the_request_of_another_device_is_refused() -> None:
    assert read_request(request(), uuid=DEVICE).uuid == DEVICE
    assert code_of(read_request, request(), uuid=UUID(int=7)) == "uuid-mismatch"


def test_row08_a_request_nobody_signed_is_refused() -> None:
    """Somebody else's public key under one's own name: no proof of possession."""
    der = bytearray(x509.load_pem_x509_csr(request()).public_bytes(Encoding.DER))
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    at = der.index(point)
    der[at : at + len(point)] = other.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    assert code_of(read_request, bytes(der)) == "request-signature"


def test_every_flipped_byte_of_a_request_is_refused() -> None:
    der = x509.load_pem_x509_csr(request()).public_bytes(Encoding.DER)
    for position in range(len(der)):
        flipped = bytearray(der)
        flipped[position] ^= 0x01
        assert code_of(read_request, bytes(flipped)) in {
            "request-malformed",
            "request-signature",
            "weak-signature",
            "weak-key",
        }, position


def test_unused_bits_of_a_signature_are_refused() -> None:
    """Where the last bit is zero, a reader may call it unused: another request of the same signature."""
    made = (x509.load_pem_x509_csr(request()) for _ in range(64))
    even = next(each for each in made if each.signature[-1] % 2 == 0)
    der = bytearray(even.public_bytes(Encoding.DER))
    der[-len(even.signature) - 1] = 1
    assert x509.load_der_x509_csr(bytes(der)).is_signature_valid
    assert code_of(read_request, bytes(der)) == "request-malformed"


def test_a_der_request_is_the_same() -> None:
    der = x509.load_pem_x509_csr(request()).public_bytes(Encoding.DER)
    assert read_request(der).der == der
    assert read_request(der).uuid == DEVICE


@pytest.mark.parametrize("data", [b"", b"nothing", request() * 2, b"-----BEGIN X-----\n", b"A" * 99999])
def test_what_is_no_request_is_refused(data: bytes) -> None:
    assert code_of(read_request, data[: REQUEST_LIMIT + 1]) == "request-malformed"


def test_weak_requests_are_refused() -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - the point
    for key in (weak, ec.generate_private_key(ec.SECP521R1())):
        assert code_of(read_request, request(key=key)) == "weak-key"
    assert read_request(request(key=rsa.generate_private_key(65537, 2048))).uuid == DEVICE


def test_a_request_signed_with_sha1_is_refused() -> None:
    pem = (Path(__file__).parent / "sha1-request.pem").read_bytes()
    assert code_of(read_request, pem) == "weak-signature"


def test_roca_keys_are_refused() -> None:
    """CVE-2017-15361: primes k*M + (65537^a mod M), M the product of the first 126 primes for RSA-2048."""
    primes = [n for n in range(2, 702) if all(n % d for d in range(2, int(n**0.5) + 1))][:126]
    product = prod(primes)
    factors = [k * product + pow(65537, a, product) for k, a in ((2**53 - 111, 4711), (2**53 - 333, 815))]
    modulus = prod(factors)
    assert modulus.bit_length() == 2048
    assert has_roca_mark(modulus)
    reason = weakness(rsa.RSAPublicNumbers(65537, modulus).public_key())
    assert reason is not None
    assert "ROCA" in reason
    assert not any(has_roca_mark(modulus + 2 * number) for number in range(1, 2000))


@pytest.mark.parametrize("exponent", [3, 17, 65535])
def test_small_public_exponents_are_refused(exponent: int) -> None:
    modulus = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
    assert weakness(rsa.RSAPublicNumbers(exponent, modulus).public_key()) is not None


def test_a_software_key_has_to_be_allowed(pki: PkiDirectory) -> None:
    assert code_of(issue, pki, request(), allow_software_key=False) == "software-key"


@pytest.mark.parametrize(
    ("name", "now", "days", "code"),
    [
        ("ssig_cml", NOW, 730, "issuer-unfit"),
        ("device_subca", NOW + timedelta(days=4000), 1, "issuer-unfit"),
        ("device_subca", NOW - timedelta(days=10), 1, "issuer-unfit"),
        ("device_subca", NOW, 3000, "issuer-expires"),
    ],
)
def test_an_issuer_that_may_not_is_refused(
    pki: PkiDirectory, name: str, now: datetime, days: int, code: str
) -> None:
    assert code_of(issue, pki, request(), signer=pki_signer(pki, name), now=now, days=days) == code


@pytest.mark.parametrize(
    ("extensions", "evidence"),
    [
        ([(x509.BasicConstraints(ca=False, path_length=None), True)], "not a CA"),
        (
            [
                (x509.BasicConstraints(ca=True, path_length=0), True),
                (x509.ExtendedKeyUsage([Eku.CODE_SIGNING]), False),
            ],
            "purposes",
        ),
        (
            [(x509.BasicConstraints(ca=True, path_length=0), True), (usage("crl_sign"), True)],
            "may not sign certificates",
        ),
        ([(x509.BasicConstraints(ca=True, path_length=0), True)], "subject key identifier"),
    ],
)
def test_an_issuer_of_the_wrong_kind_is_refused(
    pki: PkiDirectory, extensions: Extensions, evidence: str
) -> None:
    root = pki.certificate("gen_rootca")
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Other")]))
        .issuer_name(root.subject)
        .public_key(KEY.public_key())
        .serial_number(7)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1000))
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    signer = KeySigner(KEY, (builder.sign(pki.key("gen_rootca"), hashes.SHA384()),))
    with pytest.raises(ToolError) as refused:
        issue(pki, request(), signer=signer)
    assert refused.value.code == "issuer-unfit"
    assert evidence in refused.value.evidence


def test_a_weak_issuer_is_refused(pki: PkiDirectory) -> None:
    key = ec.generate_private_key(ec.SECP521R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Other")])
    builder = (
        x509.CertificateBuilder(pki.certificate("gen_rootca").subject, name, key.public_key(), 7)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1000))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    signer = KeySigner(key, (builder.sign(pki.key("gen_rootca"), hashes.SHA384()),))
    assert code_of(issue, pki, request(), signer=signer) == "issuer-unfit"


def test_a_signer_with_another_key_is_found_out(pki: PkiDirectory) -> None:
    right = pki_signer(pki, "device_subca")
    wrong = KeySigner(ec.generate_private_key(ec.SECP384R1()), right.chain)
    assert code_of(issue, pki, request(), signer=wrong) == "issued-badly"


def test_the_certificate_does_not_begin_before_its_ca(pki: PkiDirectory) -> None:
    authority = pki.certificate("device_subca")
    leaf = issue(pki, request(), now=authority.not_valid_before_utc + timedelta(hours=1)).certificate
    assert leaf.not_valid_before_utc == authority.not_valid_before_utc


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def csr(tmp_path: Path) -> Path:
    path = tmp_path / "device.csr"
    path.write_bytes(request())
    return path


def run(*words: object) -> int:
    return main.main(["pki", "sign-device", *map(str, words)])


def test_the_command_says_software_key(
    pki: PkiDirectory, csr: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(csr, "--pki", pki.path, "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "software-key"
    assert not csr.with_suffix(".cert").exists()
    assert run(csr, "--pki", pki.path, "--allow-software-key", "--json") == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert (result["software_key"], result["tpm"], result["uuid"]) == (True, None, str(DEVICE))
    assert len(load_chain(csr.with_suffix(".cert"))) == 2
    assert run(csr, "--pki", pki.path, "--allow-software-key", "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "exists"
    assert run(csr, "--pki", pki.path, "--allow-software-key", "--force") == 0
    assert "SOFTWARE KEY" in capsys.readouterr().out


def test_a_named_certification_must_be_there(pki: PkiDirectory, csr: Path) -> None:
    words = ["--pki", pki.path, "--allow-software-key", "--certification", csr.with_suffix(".nothing")]
    assert run(csr, *words) == 1
    assert not csr.with_suffix(".cert").exists()


def test_a_certification_that_is_there_is_judged_even_where_a_software_key_is_allowed(
    pki: PkiDirectory, csr: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csr.with_name("device.csr.tpm").write_text("{}")
    assert run(csr, "--pki", pki.path, "--allow-software-key", "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "certification-malformed"
    assert not csr.with_suffix(".cert").exists()


def test_an_external_command_signs(pki: PkiDirectory, csr: Path) -> None:
    words = ["openssl", "dgst", "-sha512", "-sign", pki.key_path("device_subca")]
    command = shlex.join([*map(str, words), "-passin", "pass:trustme-development"])
    where = ["--cert", pki.certificate_path("device_subca"), "--sign-command", command]
    assert run(csr, *where, "--allow-software-key") == 0
    leaf, authority = load_chain(csr.with_suffix(".cert"))
    leaf.verify_directly_issued_by(authority)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (shlex.join([sys.executable, "-c", "print('nonsense')"]), "issued-badly"),
        ("false", "sign-command-failed"),
    ],
)
def test_a_command_that_signs_badly_is_found_out(
    pki: PkiDirectory, csr: Path, capsys: pytest.CaptureFixture[str], command: str, code: str
) -> None:
    where = ["--cert", pki.certificate_path("device_subca"), "--sign-command", command]
    assert run(csr, *where, "--allow-software-key", "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert not csr.with_suffix(".cert").exists()


def test_who_signs_has_to_be_clear(pki: PkiDirectory, csr: Path) -> None:
    assert run(csr, "--allow-software-key") == 2
    assert run(csr, "--allow-software-key", "--pki", pki.path, "--cert", "x") == 2


@pytest.mark.parametrize("days", ["0", "-1", "1e3", "99999", "many"])
def test_days_are_a_sensible_number(csr: Path, days: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(csr, "--days", days)
    assert stopped.value.code == 2


def test_show_says_what_a_certificate_is_for(
    pki: PkiDirectory, csr: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(csr, "--pki", pki.path, "--allow-software-key") == 0
    capsys.readouterr()
    assert main.main(["pki", "show", str(csr.with_suffix(".cert"))]) == 0
    shown = capsys.readouterr().out
    assert f"authenticates a client, device {DEVICE}" in shown
    assert "CA that issues no further CA" in shown
    assert main.main(["pki", "show", str(pki.path), "--json"]) == 0
    certificates = json.loads(capsys.readouterr().out)["result"]["certificates"]
    assert certificates["ssig_cml"]["purpose"] == "signs software"
    assert "db" in certificates["ssig_subca"]["role"]
    assert certificates["gen_rootca"]["purpose"] == "root CA of one level of CAs"
