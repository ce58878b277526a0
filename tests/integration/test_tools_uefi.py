# SPDX-License-Identifier: Apache-2.0
"""Secure Boot variables as virt-firmware, efitools and openssl see them."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.firmware.secureboot import parse_database
from trustme_init.firmware.siglist import guid_bytes
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.uefi import auth, keys, show, store
from trustme_tools.uefi.keys import OWNER, certificate_lists, dbx_lists, key_lists

STORE_SIZE = 0x84000
VARIABLES_SIZE = 0x40000


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    return create(tmp_path_factory.mktemp("pki") / "made", algorithm=Algorithm.P384, development=True)


@pytest.fixture
def empty_store(tmp_path: Path) -> Path:
    """An empty EDK2 store: firmware volume header (UEFI PI, 3.2.1), variable store header, erased flash."""
    volume = bytes(16) + guid_bytes("fff12b8d-7696-4c8b-a985-2747075b4f50")
    volume += struct.pack("<QIIHHHBBIIII", STORE_SIZE, 0x4856465F, 0x4FEFF, 72, 0, 0, 0, 2, 132, 0x1000, 0, 0)
    variables = guid_bytes("aaf32c78-947b-439a-a180-2e144ec37792")
    variables += struct.pack("<IBBHI", VARIABLES_SIZE - 72, 0x5A, 0xFE, 0, 0)
    path = tmp_path / "OVMF_VARS.fd"
    path.write_bytes((volume + variables).ljust(STORE_SIZE, b"\xff"))
    return path


def virt_fw_vars(path: Path) -> dict[str, dict[str, Any]]:
    program = Path(sys.executable).parent / "virt-fw-vars"
    done = subprocess.run([program, "-i", path, "--output-json", "-"], check=True, capture_output=True)
    return {entry["name"]: entry for entry in json.loads(done.stdout)["variables"]}


def der(pki: PkiDirectory, name: str) -> bytes:
    return pki.certificate(name).public_bytes(Encoding.DER)


def test_virt_firmware_reads_back_what_was_enrolled(
    tmp_path: Path, pki: PkiDirectory, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.fd"
    digest = hashlib.sha256(b"an image").hexdigest()
    words = ["--ovmf-vars", empty_store, "--out", out, "--pki", pki.path]
    dbx = ["--dbx", pki.certificate_path("ssig_cml"), "--dbx", f"sha256:{digest}"]
    assert main.main(["uefi", "vars", *map(str, [*words, *dbx])]) == 0
    found = virt_fw_vars(out)
    assert set(found) == {"PK", "KEK", "db", "dbx", "SecureBootEnable", "CustomMode"}
    assert found["SecureBootEnable"]["data"] == "01"
    assert {found[name]["attr"] for name in ("PK", "KEK", "db", "dbx")} == {0x27}
    assert found["db"]["guid"] == found["dbx"]["guid"] == "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
    contents = {
        name: parse_database(bytes.fromhex(found[name]["data"])) for name in ("PK", "KEK", "db", "dbx")
    }
    assert contents["PK"].certificates == (der(pki, "PK"),)
    assert contents["KEK"].certificates == (der(pki, "KEK"),)
    assert contents["db"].certificates == (der(pki, "DB"), der(pki, "ssig_subca"))
    assert contents["dbx"].certificates == (der(pki, "ssig_cml"),)
    assert contents["dbx"].sha256 == {bytes.fromhex(digest)}
    assert out.stat().st_size == empty_store.stat().st_size
    assert "SecureBootEnable: yes" in capsys.readouterr().out


def test_store_switches(tmp_path: Path, pki: PkiDirectory, empty_store: Path) -> None:
    words = ["uefi", "vars", "--ovmf-vars", str(empty_store), "--pki", str(pki.path), "--out"]
    assert main.main([*words, str(tmp_path / "setup.fd"), "--setup-mode"]) == 0
    assert "PK" not in virt_fw_vars(tmp_path / "setup.fd")
    assert main.main([*words, str(tmp_path / "off.fd"), "--no-secure-boot"]) == 0
    off = virt_fw_vars(tmp_path / "off.fd")
    assert off["SecureBootEnable"]["data"] == "00"
    assert "PK" in off
    only = ["--no-default-db", "--db", str(pki.certificate_path("DB"))]
    assert main.main([*words, str(tmp_path / "only.fd"), *only]) == 0
    db = parse_database(bytes.fromhex(virt_fw_vars(tmp_path / "only.fd")["db"]["data"]))
    assert db.certificates == (der(pki, "DB"),)


def test_keys_of_the_template_do_not_survive(tmp_path: Path, pki: PkiDirectory, empty_store: Path) -> None:
    other = create(tmp_path / "other", algorithm=Algorithm.P384, development=True)
    dbx = [str(other.certificate_path("guestos"))]
    store.write_store(empty_store, tmp_path / "one.fd", key_lists(other, dbx=dbx), secure_boot=True)
    store.write_store(
        tmp_path / "one.fd", tmp_path / "two.fd", key_lists(pki, setup_mode=True), secure_boot=True
    )
    found = virt_fw_vars(tmp_path / "two.fd")
    assert "PK" not in found
    assert "dbx" not in found
    assert parse_database(bytes.fromhex(found["db"]["data"])).certificates == (
        der(pki, "DB"),
        der(pki, "ssig_subca"),
    )


@pytest.mark.parametrize("content", [b"", b"nothing like a store" * 1000])
def test_other_files_are_no_store(tmp_path: Path, pki: PkiDirectory, content: bytes) -> None:
    path = tmp_path / "vars.fd"
    path.write_bytes(content)
    with pytest.raises(ToolError) as refused:
        store.write_store(path, tmp_path / "out.fd", key_lists(pki), secure_boot=True)
    assert refused.value.code == "not-a-store"
    assert not (tmp_path / "out.fd").exists()


def test_lists_are_those_of_efitools(tmp_path: Path, pki: PkiDirectory) -> None:
    expected = b""
    for name in ("DB", "ssig_subca"):
        out = tmp_path / f"{name}.esl"
        words: list[str | Path] = ["cert-to-efi-sig-list", "-g", OWNER, pki.certificate_path(name), out]
        subprocess.run(words, check=True, capture_output=True)
        expected += out.read_bytes()
    assert key_lists(pki)["db"] == expected


@pytest.fixture(scope="module")
def enrolment(tmp_path_factory: pytest.TempPathFactory, pki: PkiDirectory) -> Path:
    directory = tmp_path_factory.mktemp("auth") / "out"
    words = ["uefi", "auth", "--pki", pki.path, "--out", directory, "--timestamp", "2026-02-03T04:05:06"]
    assert main.main([*map(str, words), "--dbx", f"tbs:{pki.certificate_path('guestos')}"]) == 0
    return directory


def test_lists_are_signed_when_complete(enrolment: Path, pki: PkiDirectory) -> None:
    names = ("PK", "KEK", "db", "dbx")
    expected = {f"{name}.{suffix}" for name in names for suffix in ("esl", "auth")} | {"PK-remove.auth"}
    assert {path.name for path in enrolment.iterdir()} == expected
    for name in names:
        payload = show.auth_payload((enrolment / f"{name}.auth").read_bytes())
        assert payload == (enrolment / f"{name}.esl").read_bytes()
    assert show.auth_payload((enrolment / "PK-remove.auth").read_bytes()) == b""
    db = parse_database(show.auth_payload((enrolment / "db.auth").read_bytes()))
    assert db.certificates == (der(pki, "DB"), der(pki, "ssig_subca"))


GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
SECURITY = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"


@pytest.mark.parametrize(
    ("stem", "guid", "signer"),
    [
        ("PK", GLOBAL, "PK"),
        ("KEK", GLOBAL, "PK"),
        ("db", SECURITY, "KEK"),
        ("dbx", SECURITY, "KEK"),
        ("PK-remove", GLOBAL, "PK"),
    ],
)
def test_openssl_verifies_the_update(
    enrolment: Path, pki: PkiDirectory, stem: str, guid: str, signer: str
) -> None:
    """What is signed: name, vendor GUID, attributes, time, data (UEFI 2.10, section 8.2.2)."""
    update = (enrolment / f"{stem}.auth").read_bytes()
    time, length, revision, kind = struct.unpack_from("<16sIHH", update)
    assert (revision, kind) == (0x0200, 0x0EF1)
    assert uuid.UUID(bytes_le=update[24:40]) == uuid.UUID("4aafd29d-68df-49ee-8aa9-347d375665a7")
    assert struct.unpack("<HBBBBBxIhBx", time) == (2026, 2, 3, 4, 5, 6, 0, 0, 0)
    name = stem.partition("-")[0].encode("utf-16-le")
    signed = name + guid_bytes(guid) + struct.pack("<I", 0x27) + time + show.auth_payload(update)
    content_info = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02" + tlv(0xA0, update[40 : 16 + length])
    content = enrolment.with_name(f"{stem}.signed")
    content.write_bytes(signed)
    certificate = str(pki.certificate_path(signer))
    words = ["openssl", "cms", "-verify", "-binary", "-inform", "DER", "-content", str(content)]
    words += ["-purpose", "any", "-partial_chain", "-certfile", certificate, "-CAfile", certificate]
    done = subprocess.run(words, input=tlv(0x30, content_info), check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag]) + (bytes([size]) if size < 0x80 else bytes([0x80 | len(octets)]) + octets) + value


def test_firmware_that_takes_rsa_only_is_mentioned(
    tmp_path: Path, pki: PkiDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["uefi", "esl", "--pki", str(pki.path), "--out", str(tmp_path / "esl")]) == 0
    noted = capsys.readouterr().err
    assert "Software Signing Sub CA" in noted
    assert "CN=DB" not in noted


def test_dbx_entries(tmp_path: Path, pki: PkiDirectory) -> None:
    leaf = pki.certificate_path("ssig_cml")
    lists = tmp_path / "more.esl"
    lists.write_bytes(certificate_lists([pki.certificate("guestos")]))
    entries = [str(leaf), f"tbs:{leaf}", "sha256:" + "ab" * 32, "sha256:" + "cd" * 32, f"esl:{lists}"]
    found = parse_database(dbx_lists(entries))
    assert set(found.certificates) == {der(pki, "ssig_cml"), der(pki, "guestos")}
    assert found.sha256 == {b"\xab" * 32, b"\xcd" * 32}
    tbs = hashlib.sha256(pki.certificate("ssig_cml").tbs_certificate_bytes).digest()
    assert found.x509_hashes == {"sha256": {tbs: bytes(16)}}
    for bad, code in (("sha256:12", "bad-digest"), ("/nonexistent", "certificate-unreadable")):
        with pytest.raises(ToolError) as refused:
            dbx_lists([bad])
        assert refused.value.code == code


def efivars(directory: Path, values: Mapping[str, bytes]) -> Path:
    directory.mkdir()
    for name, data in values.items():
        guid = SECURITY if name.startswith("db") else GLOBAL
        (directory / f"{name}-{guid}").write_bytes(b"\x27\0\0\0" + data)
    return directory


def test_show_of_an_efivars_directory(
    tmp_path: Path, pki: PkiDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**key_lists(pki), "SecureBoot": b"\1", "SetupMode": b"\0"}
    directory = efivars(tmp_path / "efivars", values)
    assert main.main(["uefi", "show", str(directory), "--json"]) == 0
    variables = json.loads(capsys.readouterr().out)["result"]["variables"]
    assert (variables["SecureBoot"], variables["SetupMode"], variables["dbx"]) == (1, 0, [])
    assert [entry["type"] for entry in variables["db"]] == ["EFI_CERT_X509"] * 2
    assert main.main(["uefi", "show", str(directory)]) == 0
    assert "SecureBoot: yes" in capsys.readouterr().out


def test_a_passphrase_is_needed_for_real_keys(tmp_path: Path) -> None:
    real = create(tmp_path / "pki", algorithm=Algorithm.P384, passphrase=b"word")
    update = auth.authenticate(
        "PK", keys.key_lists(real)["PK"], real, timestamp=datetime.now(UTC), passphrase=b"word"
    )
    assert show.auth_payload(update) == keys.key_lists(real)["PK"]


def test_revoking_what_is_no_efi_program_is_refused(tmp_path: Path) -> None:
    # efitools exits 0 and gives a digest of zeros, which would revoke nothing.
    path = tmp_path / "text"
    path.write_text("no program")
    with pytest.raises(ToolError) as refused:
        dbx_lists([f"image:{path}"])
    assert refused.value.code == "not-an-efi-program"


def test_of_a_chain_only_the_first_certificate_goes_to_db(pki: PkiDirectory) -> None:
    lists = key_lists(pki, default_db=False, extra_db=[pki.certificate_path("ssig_cml")])
    assert parse_database(lists["db"]).certificates == (der(pki, "ssig_cml"),)


def test_bad_files_are_refused_by_name(
    tmp_path: Path, pki: PkiDirectory, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.esl"
    text.write_text("no lists")
    out = tmp_path / "out.fd"
    out.touch()
    vars_ = ["vars", "--ovmf-vars", str(empty_store), "--out", str(out), "--pki", str(pki.path)]
    for words, code in (
        (["show", str(text)], "bad-lists"),
        ([*vars_, "--dbx", f"esl:{text}"], "bad-lists"),
        (["show", str(tmp_path / "nothing")], "not-a-store"),
        (vars_, "exists"),
    ):
        assert main.main(["uefi", *words, "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert main.main(["uefi", *vars_, "--force"]) == 0
