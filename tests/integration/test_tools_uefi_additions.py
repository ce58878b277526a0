# SPDX-License-Identifier: Apache-2.0
"""A third party's anchor, revocations, the enrolment stick; oracles are efitools, openssl and mtools."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trustme_init.firmware.secureboot import parse_database
from trustme_init.firmware.siglist import EFI_CERT_SHA256, guid_bytes, parse_signature_lists
from trustme_init.trust.anchors import Purpose, Revocations, anchor_set
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.uefi.keys import certificate_lists, dbx_lists, key_lists
from trustme_tools.uefi.show import auth_payload
from trustme_tools.uefi.store import read_store, write_store
from trustme_tools.uefi.update import parse_update, verify_update

STRANGER = "77fa9abd-0359-4d32-bd60-28f4e78f784b"
NOW = datetime.now(UTC)
STORE_SIZE = 0x84000
VARIABLES_SIZE = 0x40000


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    return create(tmp_path_factory.mktemp("pki") / "made", algorithm=Algorithm.P384, development=True)


@pytest.fixture(scope="module")
def partner(tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    place = tmp_path_factory.mktemp("partner") / "made"
    return create(place, algorithm=Algorithm.P384, development=True, organization="Partner")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pki: PkiDirectory) -> Path:
    """`enrol`, a directory of signed updates, and `vars.fd`, an EDK2 variable store (UEFI PI, 3.2.1)."""
    place = tmp_path_factory.mktemp("prepared")
    time = ["--timestamp", "2026-02-03T04:05:06"]
    assert trustme("auth", "--pki", pki.path, "--out", place / "enrol", *time) == 0
    volume = bytes(16) + guid_bytes("fff12b8d-7696-4c8b-a985-2747075b4f50")
    volume += struct.pack("<QIIHHHBBIIII", STORE_SIZE, 0x4856465F, 0x4FEFF, 72, 0, 0, 0, 2, 132, 0x1000, 0, 0)
    variables = guid_bytes("aaf32c78-947b-439a-a180-2e144ec37792")
    variables += struct.pack("<IBBHI", VARIABLES_SIZE - 72, 0x5A, 0xFE, 0, 0)
    empty = place / "empty.fd"
    empty.write_bytes((volume + variables).ljust(STORE_SIZE, b"\xff"))
    write_store(empty, place / "vars.fd", key_lists(pki), secure_boot=True)
    return place


@pytest.fixture
def enrolment(tmp_path: Path, made: Path) -> Path:
    shutil.copytree(made / "enrol", tmp_path / "enrol")
    return tmp_path / "enrol"


@pytest.fixture
def store(tmp_path: Path, made: Path) -> Path:
    shutil.copy(made / "vars.fd", tmp_path / "vars.fd")
    return tmp_path / "vars.fd"


def trustme(*words: object) -> int:
    return main.main(["uefi", *map(str, words)])


def tool(*words: object) -> bytes:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True).stdout


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def der(pki: PkiDirectory, name: str) -> bytes:
    return pki.certificate(name).public_bytes(Encoding.DER)


def esl(path: Path, *certificates: Path) -> Path:
    """As efitools write it."""
    data = b""
    for certificate in certificates:
        tool("cert-to-efi-sig-list", "-g", STRANGER, certificate, path)
        data += path.read_bytes()
    path.write_bytes(data)
    return path


def database(target: Path, name: str) -> bytes:
    if target.is_dir():
        return (target / f"{name}.esl").read_bytes()
    return next(variable.data for variable in read_store(target) if variable.name == name)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: object, exit_code: int = 1) -> str:
        capsys.readouterr()
        assert trustme(*words, "--json") == exit_code
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["remedy"]
        code: str = error["code"]
        return code

    return run


# --- db -------------------------------------------------------------------------------------------------


def test_a_third_partys_anchor_goes_to_db_and_its_update(
    tmp_path: Path,
    enrolment: Path,
    pki: PkiDirectory,
    partner: PkiDirectory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """GyroidOS signs DB.auth before ssig_subca is in the list; here the update has everything."""
    offer = esl(tmp_path / "partner.esl", partner.certificate_path("ssig_subca"))
    untouched = {
        path.name: path.read_bytes() for path in enrolment.iterdir() if not path.name.startswith("db.")
    }
    words = ["add-db", offer, "--sha256", sha256(offer), "--to", enrolment, "--pki", pki.path]
    assert trustme(*words) == 0
    shown = capsys.readouterr().out
    assert "a full anchor: vouches for core software and for boot images" in shown
    assert partner.certificate("ssig_subca").fingerprint(hashes.SHA256()).hex() in shown
    complete = (enrolment / "db.esl").read_bytes()
    assert complete == key_lists(pki)["db"] + offer.read_bytes()
    update = (enrolment / "db.auth").read_bytes()
    assert auth_payload(update) == complete
    verify_update("db", update, [der(pki, "KEK")])
    assert parse_update(update).timestamp >= NOW - timedelta(seconds=2)
    assert untouched == {name: (enrolment / name).read_bytes() for name in untouched}
    anchors = anchor_set(Purpose.CORE, parse_database(complete).certificates, Revocations(), source="db")
    assert der(partner, "ssig_subca") in [anchor.certificate for anchor in anchors.anchors]


def test_efitools_find_every_certificate_in_the_update(
    tmp_path: Path, enrolment: Path, pki: PkiDirectory, partner: PkiDirectory
) -> None:
    certificate = partner.certificate_path("ssig_subca")
    digest = hashlib.sha256(der(partner, "ssig_subca")).hexdigest()
    assert trustme("add-db", certificate, "--sha256", digest, "--to", enrolment, "--pki", pki.path) == 0
    payload = tmp_path / "payload.esl"
    payload.write_bytes(auth_payload((enrolment / "db.auth").read_bytes()))
    tool("sig-list-to-certs", payload, tmp_path / "found")
    found = {path.read_bytes() for path in tmp_path.glob("found-*.der")}
    assert found == {der(pki, "DB"), der(pki, "ssig_subca"), der(partner, "ssig_subca")}


def test_into_a_store(
    tmp_path: Path,
    store: Path,
    pki: PkiDirectory,
    partner: PkiDirectory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer = esl(tmp_path / "partner.esl", partner.certificate_path("ssig_subca"))
    before = read_store(store)
    words = ["add-db", offer, "--sha256", sha256(offer), "--to", store]
    assert trustme(*words, "--out", tmp_path / "new.fd", "--json") == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert [entry["owner"] for entry in result["added"]] == [STRANGER]
    assert read_store(store) == before
    assert trustme(*words) == 0
    after = {variable.name: variable for variable in read_store(store)}
    assert after["db"].data == key_lists(pki)["db"] + offer.read_bytes()
    unchanged = [variable for variable in before if variable.name != "db"]
    assert [after[variable.name] for variable in unchanged] == unchanged
    assert after["db"].time == next(variable.time for variable in before if variable.name == "db")


def test_a_store_keeps_the_time_of_its_db(tmp_path: Path, store: Path, partner: PkiDirectory) -> None:
    """Set back, it would let an older update apply: one that lacks a revocation, for example."""
    later = "ea070203040506000000000000000000"
    entry = {"name": "db", "guid": "d719b2cb-3d3a-4596-a3bc-dad00e67656f", "attr": 0x27, "time": later}
    edit = tmp_path / "edit.json"
    edit.write_text(json.dumps({"version": 2, "variables": [{**entry, "data": database(store, "db").hex()}]}))
    program = Path(sys.executable).parent / "virt-fw-vars"
    tool(program, "-i", store, "-o", store, "-d", "db", "--set-json", edit)
    path = partner.certificate_path("ssig_subca")
    assert trustme("add-db", path, "--sha256", sha256(path), "--to", store) == 0
    assert next(variable.time for variable in read_store(store) if variable.name == "db") == later


@pytest.mark.parametrize("form", ["file", "fingerprint", "openssl"])
def test_the_digest_is_that_of_the_file_or_of_the_one_certificate(
    tmp_path: Path, enrolment: Path, pki: PkiDirectory, partner: PkiDirectory, form: str
) -> None:
    pem = partner.certificate_path("ssig_subca")
    openssl = tool("openssl", "x509", "-in", pem, "-noout", "-fingerprint", "-sha256").decode()
    digest = {
        "file": sha256(pem),
        "fingerprint": hashlib.sha256(der(partner, "ssig_subca")).hexdigest(),
        "openssl": openssl.partition("=")[2].strip(),
    }[form]
    assert trustme("add-db", pem, "--sha256", digest, "--to", enrolment, "--pki", pki.path) == 0


def test_another_digest_is_refused(
    tmp_path: Path,
    enrolment: Path,
    pki: PkiDirectory,
    partner: PkiDirectory,
    refused: Callable[..., str],
) -> None:
    two = esl(
        tmp_path / "two.esl", partner.certificate_path("ssig_subca"), partner.certificate_path("gen_rootca")
    )
    before = {path.name: path.read_bytes() for path in enrolment.iterdir()}
    one = hashlib.sha256(der(partner, "ssig_subca")).hexdigest()
    where = ["--to", enrolment, "--pki", pki.path]
    for digest in ("00" * 32, sha256(pki.certificate_path("DB")), one):
        assert refused("add-db", two, "--sha256", digest, *where) == "digest-mismatch"
    flipped = bytearray(two.read_bytes())
    flipped[-1] ^= 1
    digest = sha256(two)
    two.write_bytes(flipped)
    assert refused("add-db", two, "--sha256", digest, *where) == "digest-mismatch"
    for text in ("", "12", "zz" * 32, digest[:-1]):
        assert refused("add-db", two, "--sha256", text, *where, exit_code=2) == "bad-digest"
    assert before == {path.name: path.read_bytes() for path in enrolment.iterdir()}


def test_what_is_there_is_not_added_again(  # noqa: PLR0917 - fixtures
    tmp_path: Path,
    enrolment: Path,
    pki: PkiDirectory,
    partner: PkiDirectory,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours = esl(tmp_path / "ours.esl", pki.certificate_path("ssig_subca"))
    where = ["--to", enrolment, "--pki", pki.path]
    assert refused("add-db", ours, "--sha256", sha256(ours), *where) == "already-there"
    first, second = (partner.certificate_path(name) for name in ("ssig_subca", "gen_rootca"))
    mixed = esl(tmp_path / "mixed.esl", pki.certificate_path("ssig_subca"), first, first, second)
    assert trustme("add-db", mixed, "--sha256", sha256(mixed), *where, "--json") == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert [entry["subject"] for entry in result["added"]] == [
        partner.certificate(name).subject.rfc4514_string() for name in ("ssig_subca", "gen_rootca")
    ]
    assert len(result["already_there"]) == 2
    assert len(parse_database(database(enrolment, "db")).certificates) == 4
    assert refused("add-db", mixed, "--sha256", sha256(mixed), *where) == "already-there"


def test_of_a_chain_the_first_certificate_counts(
    enrolment: Path, pki: PkiDirectory, partner: PkiDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """GyroidOS: ssig_subca.cert is the sub CA and its root."""
    chain = enrolment.with_name("chain.pem")
    names = ("ssig_subca", "ssig_rootca")
    chain.write_bytes(b"".join(partner.certificate(name).public_bytes(Encoding.PEM) for name in names))
    words = ["add-db", chain, "--sha256", sha256(chain), "--to", enrolment, "--pki", pki.path]
    assert trustme(*words) == 0
    assert "1 left out" in capsys.readouterr().err
    found = parse_database(database(enrolment, "db")).certificates
    assert der(partner, "ssig_subca") in found
    assert der(partner, "ssig_rootca") not in found


KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(
    path: Path, *extensions: tuple[x509.ExtensionType, bool], days: int = 10, key: Any = KEY
) -> Path:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Partner")])
    builder = (
        x509.CertificateBuilder(name, name, key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - timedelta(days=20))
        .not_valid_after(NOW + timedelta(days=days))
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))
    return path


AUTHORITY = (x509.BasicConstraints(ca=True, path_length=None), True)


@pytest.mark.parametrize(
    ("extensions", "options", "code"),
    [
        ([], {}, "not-a-ca"),
        ([(x509.BasicConstraints(ca=False, path_length=None), True)], {}, "not-a-ca"),
        ([AUTHORITY], {"days": -1}, "certificate-expired"),
        ([AUTHORITY], {"key": ec.generate_private_key(ec.SECP521R1())}, "weak-key"),
        ([AUTHORITY, (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)], {}, "ca-purpose"),
        (
            [AUTHORITY, (x509.NameConstraints([x509.DNSName("a.example")], None), True)],
            {},
            "name-constraints",
        ),
    ],
)
def test_what_is_no_anchor_is_refused_or_named(  # noqa: PLR0917 - fixtures
    tmp_path: Path,
    store: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    extensions: list[tuple[x509.ExtensionType, bool]],
    options: dict[str, Any],
    code: str,
) -> None:
    path = certificate(tmp_path / "offer.der", *extensions, **options)
    before = database(store, "db")
    words = ["add-db", path, "--sha256", sha256(path), "--to", store]
    assert refused(*words) == code
    assert database(store, "db") == before
    assert trustme(*words, "--boot-only", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)["result"]["added"]
    assert entry["effect"].startswith("boot only:")
    # The tool's word is the device's: it takes no such certificate for an anchor.
    anchors = anchor_set(
        Purpose.CORE, parse_database(database(store, "db")).certificates, Revocations(), source="db"
    )
    if code != "certificate-expired":  # judged when a signer is, since it depends on the time
        assert path.read_bytes() not in [anchor.certificate for anchor in anchors.anchors]


def test_a_digest_is_a_program_and_no_anchor(
    tmp_path: Path, store: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "program.esl"
    path.write_bytes(dbx_lists(["sha256:" + "ab" * 32, "sha256:" + "cd" * 32]))
    words = ["add-db", path, "--sha256", sha256(path), "--to", store]
    assert refused(*words) == "not-a-ca"
    assert trustme(*words, "--boot-only") == 0
    assert capsys.readouterr().out.count("the one program that has this digest") == 2
    assert parse_database(database(store, "db")).sha256 == {b"\xab" * 32, b"\xcd" * 32}


def test_one_bad_entry_refuses_the_file(
    tmp_path: Path, store: Path, partner: PkiDirectory, refused: Callable[..., str]
) -> None:
    before = database(store, "db")
    path = esl(tmp_path / "mixed.esl", partner.certificate_path("ssig_subca"), partner.certificate_path("DB"))
    assert refused("add-db", path, "--sha256", sha256(path), "--to", store) == "not-a-ca"
    assert database(store, "db") == before


def test_row16_what_dbx_revokes_does_not_get_into_db(
    tmp_path: Path,
    enrolment: Path,
    pki: PkiDirectory,
    partner: PkiDirectory,
    refused: Callable[..., str],
) -> None:
    root, sub = partner.certificate_path("ssig_rootca"), partner.certificate_path("ssig_subca")
    where = ["--to", enrolment, "--pki", pki.path]
    assert trustme("add-dbx", root, "--sha256", sha256(root), *where) == 0
    for options in ([], ["--boot-only"]):
        assert refused("add-db", sub, "--sha256", sha256(sub), *where, *options) == "revoked"
    digest = tmp_path / "digest.esl"
    digest.write_bytes(dbx_lists(["sha256:" + "ab" * 32]))
    assert trustme("add-dbx", digest, "--sha256", sha256(digest), *where) == 0
    assert refused("add-db", digest, "--sha256", sha256(digest), *where, "--boot-only") == "revoked"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "no-entries"),
        (b"nothing like a list", "bad-lists"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "certificate-unreadable"),
        (b"\x30\x03\x02\x01\x01", "certificate-unreadable"),
        (certificate_lists([])[:0] + b"\x00" * 28, "bad-lists"),
    ],
)
def test_what_offers_nothing_is_refused(
    tmp_path: Path, store: Path, refused: Callable[..., str], content: bytes, code: str
) -> None:
    path = tmp_path / "offer"
    path.write_bytes(content)
    assert refused("add-db", path, "--sha256", sha256(path), "--to", store) == code


@pytest.mark.parametrize(
    "type_guid", ["826ca512-cf10-4ac9-b187-be01496631bd", "3bd2a492-96c0-4079-b420-fcf98ef103ed"]
)
def test_entries_that_vouch_for_nothing_are_refused(
    tmp_path: Path, store: Path, refused: Callable[..., str], type_guid: str
) -> None:
    size = 16 + (20 if type_guid.startswith("826") else 48)
    path = tmp_path / "offer.esl"
    path.write_bytes(guid_bytes(type_guid) + struct.pack("<III", 28 + size, 0, size) + bytes(size))
    words = ["add-db", path, "--sha256", sha256(path), "--to", store, "--boot-only"]
    assert refused(*words) == "unknown-entry"


def test_a_certificate_the_device_cannot_read_is_refused(
    tmp_path: Path, store: Path, refused: Callable[..., str]
) -> None:
    made = certificate(tmp_path / "made.der", AUTHORITY).read_bytes()
    size = 16 + len(made) + 1
    path = tmp_path / "offer.esl"
    head = guid_bytes("a5c059a1-94e4-4aa7-87b5-ab155c2bf072") + struct.pack("<III", 28 + size, 0, size)
    path.write_bytes(head + bytes(16) + made + b"\0")
    words = ["add-db", path, "--sha256", sha256(path), "--to", store]
    assert refused(*words) == refused(*words, "--boot-only") == "bad-certificate"


# --- the target -----------------------------------------------------------------------------------------


@pytest.fixture
def offer(tmp_path: Path, partner: PkiDirectory) -> list[object]:
    path = esl(tmp_path / "partner.esl", partner.certificate_path("ssig_subca"))
    return ["add-db", path, "--sha256", sha256(path)]


def test_only_the_kek_of_the_directory_signs(
    enrolment: Path, partner: PkiDirectory, offer: list[object], refused: Callable[..., str]
) -> None:
    before = {path.name: path.read_bytes() for path in enrolment.iterdir()}
    assert refused(*offer, "--to", enrolment) == "kek-needed"
    assert refused(*offer, "--to", enrolment, "--pki", partner.path) == "kek-mismatch"
    assert before == {path.name: path.read_bytes() for path in enrolment.iterdir()}


def test_unsigned_lists_need_no_kek(
    tmp_path: Path, pki: PkiDirectory, offer: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists"
    assert trustme("esl", "--pki", pki.path, "--out", lists) == 0
    assert trustme(*offer, "--to", lists) == 0
    assert {path.suffix for path in lists.iterdir()} == {".esl"}


def test_an_update_that_firmware_would_not_take_is_refused(
    enrolment: Path, pki: PkiDirectory, offer: list[object], refused: Callable[..., str]
) -> None:
    where = ["--to", enrolment, "--pki", pki.path]
    for time in ("2026-02-03T04:05:06", "2020-01-01"):
        assert refused(*offer, *where, "--timestamp", time) == "time-not-later"
    assert trustme(*offer, *where, "--timestamp", "2026-02-03T04:05:07") == 0


def test_two_additions_in_one_second(
    tmp_path: Path, enrolment: Path, pki: PkiDirectory, partner: PkiDirectory
) -> None:
    times = []
    for name in ("ssig_subca", "gen_rootca", "ssig_rootca"):
        path = partner.certificate_path(name)
        assert trustme("add-db", path, "--sha256", sha256(path), "--to", enrolment, "--pki", pki.path) == 0
        times.append(parse_update((enrolment / "db.auth").read_bytes()).timestamp)
    assert times == sorted(set(times))


def test_an_update_that_is_not_its_list_is_refused(
    enrolment: Path, pki: PkiDirectory, offer: list[object], refused: Callable[..., str]
) -> None:
    (enrolment / "db.esl").write_bytes(key_lists(pki)["db"] * 2)
    assert refused(*offer, "--to", enrolment, "--pki", pki.path) == "lists-differ"
    (enrolment / "db.auth").write_bytes(b"short")
    assert refused(*offer, "--to", enrolment, "--pki", pki.path) == "not-an-update"


def test_what_is_no_prepared_set_is_refused(
    tmp_path: Path, enrolment: Path, offer: list[object], refused: Callable[..., str]
) -> None:
    assert refused(*offer, "--to", tmp_path) == "not-an-enrolment"
    assert refused(*offer, "--to", tmp_path / "nothing") == "not-a-store"
    assert refused(*offer, "--to", enrolment, "--out", tmp_path / "x", exit_code=2) == "failed"
    (enrolment / "KEK.esl").unlink()
    assert refused(*offer, "--to", enrolment) == "not-an-enrolment"


def test_a_store_without_keys_is_refused(
    tmp_path: Path, store: Path, pki: PkiDirectory, offer: list[object], refused: Callable[..., str]
) -> None:
    write_store(store, tmp_path / "bare.fd", {}, secure_boot=False)
    assert refused(*offer, "--to", tmp_path / "bare.fd") == "not-an-enrolment"
    assert refused(*offer, "--to", store, "--out", tmp_path / "bare.fd") == "exists"


def test_a_failure_leaves_the_directory_as_it_was(
    enrolment: Path, pki: PkiDirectory, offer: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in enrolment.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trustme_tools.uefi.enrolment.write_new", fail)
    assert trustme(*offer, "--to", enrolment, "--pki", pki.path) == 1
    assert before == {path.name: path.read_bytes() for path in enrolment.iterdir()}
    assert [path.name for path in enrolment.parent.iterdir() if path.name.startswith(".")] == []


def test_dbx_says_what_it_revokes(
    enrolment: Path, pki: PkiDirectory, partner: PkiDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--to", enrolment, "--pki", pki.path, "--json"]
    ours, theirs = pki.certificate_path("ssig_rootca"), partner.certificate_path("guestos")
    effects = []
    for path in (ours, theirs):
        assert trustme("add-dbx", path, "--sha256", sha256(path), *where) == 0
        effects += [entry["effect"] for entry in json.loads(capsys.readouterr().out)["result"]["added"]]
    subject = pki.certificate("ssig_subca").subject.rfc4514_string()
    assert effects == [f"revokes what is in db: {subject}", "revokes nothing that is in db itself"]
    update = (enrolment / "dbx.auth").read_bytes()
    assert auth_payload(update) == (enrolment / "dbx.esl").read_bytes()
    verify_update("dbx", update, [der(pki, "KEK")])


# --- signed updates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "signer"), [("PK", "PK"), ("KEK", "PK"), ("db", "KEK")])
def test_an_update_verifies_under_its_signer_only(
    enrolment: Path, pki: PkiDirectory, partner: PkiDirectory, name: str, signer: str
) -> None:
    update = (enrolment / f"{name}.auth").read_bytes()
    verify_update(name, update, [der(partner, signer), der(pki, signer)])
    others = [der(pki, other) for other in ("PK", "KEK", "DB") if other != signer]
    for signers in ([], others, [der(partner, signer)]):
        with pytest.raises(ToolError) as caught:
            verify_update(name, update, signers)
        assert caught.value.code == "update-not-valid"


def test_an_update_is_for_one_variable_one_time_and_one_content(enrolment: Path, pki: PkiDirectory) -> None:
    update = (enrolment / "db.auth").read_bytes()
    kek = [der(pki, "KEK")]
    changed = [update[:5] + bytes([update[5] ^ 1]) + update[6:], update[:-1] + bytes([update[-1] ^ 1])]
    for name, data in [("dbx", update), *(("db", data) for data in changed)]:
        with pytest.raises(ToolError) as caught:
            verify_update(name, data, kek)
        assert caught.value.code == "update-not-valid"
    heads = [update[:at] + bytes([update[at] ^ 1]) + update[at + 1 :] for at in (20, 22, 24, 39)]
    too_long = update[:16] + b"\xff\xff\xff\xff" + update[20:]
    for data in (b"", update[:39], too_long, b"\0" * 200, update[:2] + b"\x0d" + update[3:], *heads):
        with pytest.raises(ToolError) as caught:
            verify_update("db", data, kek)
        assert caught.value.code == "not-an-update"


# --- the stick --------------------------------------------------------------------------------------------


EXPECTED = {
    *(f"keys/{name}.{kind}" for name in ("PK", "KEK", "db") for kind in ("auth", "esl")),
    *(f"loader/keys/auto/{name}.auth" for name in ("PK", "KEK", "db")),
    "keys/README.txt",
    "loader/loader.conf",
}


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_the_stick_has_what_firmware_looks_for(tmp_path: Path, enrolment: Path) -> None:
    stick, out = tmp_path / "stick.img", tmp_path / "read"
    loader = tmp_path / "systemd-bootx64.efi"
    loader.write_bytes(b"MZ" + bytes(3000))
    assert trustme("esp", enrolment, "--out", stick, "--loader", loader, "--enrol", "force") == 0
    table = json.loads(tool("sfdisk", "--json", stick))["partitiontable"]
    (partition,) = table["partitions"]
    assert (table["label"], partition["type"]) == ("gpt", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B")
    start, size = partition["start"] * 512, partition["size"] * 512
    esp = tmp_path / "esp.fat"
    esp.write_bytes(stick.read_bytes()[start : start + size])
    assert b"FAT32" in esp.read_bytes()[:512]
    tool("fsck.vfat", "-n", esp)
    out.mkdir()
    tool("mcopy", "-s", "-i", f"{stick}@@{start}", "::*", out)
    found = files(out)
    assert set(found) == {*EXPECTED, "EFI/BOOT/BOOTX64.EFI"}
    for name in ("PK", "KEK", "db"):
        update = (enrolment / f"{name}.auth").read_bytes()
        assert found[f"keys/{name}.auth"] == found[f"loader/keys/auto/{name}.auth"] == update
    assert found["EFI/BOOT/BOOTX64.EFI"] == loader.read_bytes()
    assert b"secure-boot-enroll force\n" in found["loader/loader.conf"]
    digest = hashlib.sha256(parse_database((enrolment / "db.esl").read_bytes()).certificates[0]).hexdigest()
    assert digest.encode() in found["keys/README.txt"]
    assert stick.stat().st_mode & 0o777 == 0o644


def test_the_stick_as_a_directory(
    tmp_path: Path, enrolment: Path, pki: PkiDirectory, partner: PkiDirectory, refused: Callable[..., str]
) -> None:
    revoked = partner.certificate_path("ssig_subca")
    where = ["--to", enrolment, "--pki", pki.path]
    assert trustme("add-dbx", revoked, "--sha256", sha256(revoked), *where) == 0
    assert trustme("esp", enrolment, "--out", tmp_path / "tree", "--tree") == 0
    found = files(tmp_path / "tree")
    assert set(found) == EXPECTED | {"keys/dbx.auth", "keys/dbx.esl", "loader/keys/auto/dbx.auth"}
    assert b"secure-boot-enroll manual\n" in found["loader/loader.conf"]
    assert refused("esp", enrolment, "--out", tmp_path / "tree", "--tree") == "exists"


def test_the_update_that_ends_secure_boot_is_not_on_the_stick(tmp_path: Path, enrolment: Path) -> None:
    assert (enrolment / "PK-remove.auth").exists()
    assert trustme("esp", enrolment, "--out", tmp_path / "tree", "--tree") == 0
    removal = (enrolment / "PK-remove.auth").read_bytes()
    assert removal not in files(tmp_path / "tree").values()


def test_a_set_that_does_not_fit_together_is_refused(
    tmp_path: Path, enrolment: Path, partner: PkiDirectory, refused: Callable[..., str]
) -> None:
    other = tmp_path / "other"
    assert trustme("auth", "--pki", partner.path, "--out", other) == 0
    for name, code in (("db", "update-not-valid"), ("PK", "update-not-valid"), ("KEK", "update-not-valid")):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(enrolment, mixed)
        for kind in ("auth", "esl"):
            shutil.copy(other / f"{name}.{kind}", mixed)
        assert refused("esp", mixed, "--out", tmp_path / "stick.img") == code
    shutil.copy(other / "db.auth", enrolment)
    assert refused("esp", enrolment, "--out", tmp_path / "stick.img") == "lists-differ"
    (enrolment / "db.auth").unlink()
    assert refused("esp", enrolment, "--out", tmp_path / "stick.img") == "not-an-enrolment"
    assert refused("esp", tmp_path / "nothing", "--out", tmp_path / "stick.img") == "not-an-enrolment"
    assert not (tmp_path / "stick.img").exists()


def test_bad_places_of_the_stick(tmp_path: Path, enrolment: Path, refused: Callable[..., str]) -> None:
    text = tmp_path / "text"
    text.write_text("no program")
    assert refused("esp", enrolment, "--out", text) == "exists"
    stick = tmp_path / "stick.img"
    assert refused("esp", enrolment, "--out", stick, "--loader", text) == "not-an-efi-program"
    assert {path.name for path in tmp_path.iterdir()} == {"enrol", "text"}
    assert trustme("esp", enrolment, "--out", text, "--force") == 0


# --- show -------------------------------------------------------------------------------------------------


def test_show_of_a_machine_names_attributes_and_every_entry(
    tmp_path: Path, pki: PkiDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "efivars"
    directory.mkdir()
    security, platform = "d719b2cb-3d3a-4596-a3bc-dad00e67656f", "8be4df61-93ca-11d2-aa0d-00e098032b8c"
    lists = key_lists(pki, dbx=["sha256:" + "ab" * 32, f"tbs:{pki.certificate_path('guestos')}"])
    for name, guid, attributes, data in (
        ("db", security, 0x27, lists["db"]),
        ("dbx", security, 0x07, lists["dbx"]),
        ("SecureBoot", platform, 0x06, b"\1"),
        ("SetupMode", platform, 0x07, b"\0"),
    ):
        (directory / f"{name}-{guid}").write_bytes(struct.pack("<I", attributes) + data)
    assert trustme("show", directory, "--json") == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["attributes"]["db"] == {
        "value": 0x27,
        "names": ["NV", "BS", "RT", "AT"],
        "as_specified": True,
    }
    specified = {name: found["as_specified"] for name, found in result["attributes"].items()}
    assert specified == {"db": True, "dbx": False, "SecureBoot": True, "SetupMode": False}
    assert [(entry["ca"], entry["subject"]) for entry in result["variables"]["db"]] == [
        (False, pki.certificate("DB").subject.rfc4514_string()),
        (True, pki.certificate("ssig_subca").subject.rfc4514_string()),
    ]
    digest, tbs = result["variables"]["dbx"]
    assert digest["sha256"] == "ab" * 32
    expected = hashlib.sha256(pki.certificate("guestos").tbs_certificate_bytes).hexdigest()
    assert (tbs["tbs_digest"], tbs["revoked_from"]) == (expected, "00" * 16)
    assert trustme("show", directory) == 0
    shown = capsys.readouterr().out
    assert "dbx: 2 entries  (NV|BS|RT, NOT what the specification demands)" in shown
    assert "db: 2 entries  (NV|BS|RT|AT)" in shown
    for name in ("DB", "ssig_subca"):
        assert pki.certificate(name).fingerprint(hashes.SHA256()).hex() in shown


def test_show_of_a_store_names_attributes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trustme("show", store, "--json") == 0
    found = json.loads(capsys.readouterr().out)["result"]["attributes"]
    assert {name: entry["value"] for name, entry in found.items()} == {"PK": 0x27, "KEK": 0x27, "db": 0x27}


def test_show_of_a_certificate_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.esl"
    head = guid_bytes("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
    path.write_bytes(head + struct.pack("<III", 28 + 20, 0, 20) + bytes(16) + b"junk")
    assert trustme("show", path, "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)["result"]["variables"]["odd"]
    assert entry["malformed"]
    assert entry["sha256"] == hashlib.sha256(b"junk").hexdigest()
    assert parse_signature_lists(dbx_lists(["sha256:" + "00" * 32]))[0].type_guid == EFI_CERT_SHA256
