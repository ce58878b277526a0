# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from trustme_init.firmware.secureboot import parse_database
from trustme_init.trust.anchors import Purpose, Revocations, anchor_set
from trustme_init.trust.chain import verify_chain
from trustme_tools.errors import ToolError, UsageError
from trustme_tools.image.build import copy_pki
from trustme_tools.pki import keys
from trustme_tools.pki.create import NAMES, Algorithm, create
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.uefi.keys import key_lists


def test_names_and_modes(pki: PkiDirectory) -> None:
    expected = {f"{name}.{kind}" for name in NAMES for kind in ("key", "cert")} | {"DEVELOPMENT-ONLY"}
    assert {path.name for path in pki.path.iterdir()} == expected
    assert pki.is_development
    for name in NAMES:
        assert pki.key_path(name).stat().st_mode & 0o777 == 0o600
        assert b"ENCRYPTED PRIVATE KEY" in pki.key_path(name).read_bytes()
        assert keys.public_der(pki.key(name)) == keys.public_der(pki.certificate(name))


def test_certificate_fields(pki: PkiDirectory) -> None:
    leaf = pki.certificate("ssig_cml")
    basic = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca) == (True, False)
    assert (usage.critical, usage.value.digital_signature, usage.value.content_commitment) == (
        True,
        True,
        True,
    )
    assert not usage.value.key_cert_sign
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CODE_SIGNING]
    for name, path_length in (
        ("ssig_rootca", 1),
        ("ssig_subca", 0),
        ("guestos_subca", 0),
        ("device_subca", 0),
    ):
        authority = pki.certificate(name)
        constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert (constraints.ca, constraints.path_length) == (True, path_length)
        assert authority.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    for name, issuer in (
        ("ssig_cml", "ssig_subca"),
        ("ssig_subca", "ssig_rootca"),
        ("ssig_rootca", "ssig_rootca"),
    ):
        identifier = (
            pki.certificate(name).extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        )
        subject = pki.certificate(issuer).extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        assert identifier.key_identifier == subject.digest


def test_validity_is_dated_back_to_a_midnight(pki: PkiDirectory) -> None:
    now = datetime.now(UTC)
    for name in NAMES:
        certificate = pki.certificate(name)
        start = certificate.not_valid_before_utc
        assert (start.hour, start.minute, start.second) == (0, 0, 0)
        assert timedelta(days=1) <= now - start < timedelta(days=2, hours=1)
    assert pki.certificate("ssig_cml").not_valid_after_utc < pki.certificate("ssig_subca").not_valid_after_utc


def test_chains_leave_the_root_out(pki: PkiDirectory) -> None:
    assert [certificate.subject for certificate in pki.chain("ssig_cml")] == [
        pki.certificate("ssig_cml").subject,
        pki.certificate("ssig_subca").subject,
    ]
    assert len(pki.chain("ssig_rootca")) == len(pki.chain("ssig_subca")) == len(pki.chain("DB")) == 1


def test_platform_keys_are_rsa_and_no_ca(pki: PkiDirectory) -> None:
    for name in ("PK", "KEK", "DB"):
        certificate = pki.certificate(name)
        assert isinstance(certificate.public_key(), rsa.RSAPublicKey)
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert certificate.signature_hash_algorithm is not None
        assert certificate.signature_hash_algorithm.name == "sha256"


def test_the_device_takes_the_sub_ca_from_db_and_trusts_the_leaf(pki: PkiDirectory) -> None:
    db = parse_database(key_lists(pki)["db"])
    anchors = anchor_set(Purpose.CORE, db.certificates, Revocations(), source="db")
    assert [anchor.certificate for anchor in anchors.anchors] == [
        pki.certificate("ssig_subca").public_bytes(Encoding.DER)
    ]
    verify_chain(pki.certificate_path("ssig_cml").read_bytes(), anchors, at=datetime.now(UTC))


def test_refuses_to_overwrite(pki: PkiDirectory) -> None:
    before = pki.certificate("PK")
    with pytest.raises(ToolError) as refused:
        create(pki.path, algorithm=Algorithm.P384, development=True)
    assert refused.value.code == "exists"
    assert pki.certificate("PK") == before


def test_interrupted_creation_leaves_nothing(tmp_path: Path) -> None:
    def stop(_text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "pki", algorithm=Algorithm.P384, development=True, progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("development", [True, False])
def test_passphrase_or_development(tmp_path: Path, *, development: bool) -> None:
    with pytest.raises(UsageError):
        create(
            tmp_path / "pki",
            algorithm=Algorithm.P384,
            development=development,
            passphrase=b"word" if development else None,
        )


def test_real_passphrase_is_stretched_and_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = create(tmp_path / "pki", algorithm=Algorithm.P384, passphrase=b"correct horse")
    assert not made.is_development
    made.key("ssig_cml", b"correct horse")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    for passphrase, code in ((b"wrong", "wrong-passphrase"), (None, "passphrase-needed")):
        with pytest.raises(ToolError) as refused:
            made.key("ssig_cml", passphrase)
        assert refused.value.code == code
        assert "horse" not in str(refused.value)


@pytest.mark.parametrize("passphrase", [b"", b"two\nlines", b"x" * 1025, b"nul\0"])
def test_unusable_passphrases(tmp_path: Path, passphrase: bytes) -> None:
    with pytest.raises(ToolError) as refused:
        create(tmp_path / "pki", algorithm=Algorithm.P384, passphrase=passphrase)
    assert refused.value.code == "bad-passphrase"


def test_no_key_in_a_representation(pki: PkiDirectory) -> None:
    key = keys.generate(keys.KeyType.P384, 0)
    assert "PRIVATE" not in repr(key)


@pytest.mark.parametrize("organization", ["", "x" * 65, "two\nlines"])
def test_an_organization_no_certificate_can_carry(tmp_path: Path, organization: str) -> None:
    with pytest.raises(UsageError) as refused:
        create(tmp_path / "pki", algorithm=Algorithm.P384, development=True, organization=organization)
    assert refused.value.code == "bad-organization"


def test_a_long_organization(tmp_path: Path) -> None:
    name = "Beispielhafte Sicherheitssysteme für Überwachung GmbH & Co. KG"
    made = create(tmp_path / "pki", algorithm=Algorithm.P384, development=True, organization=name)
    assert made.certificate("guestos").subject.rfc4514_string().endswith(f"O={name}")


def test_a_place_that_cannot_be_written_to_shows_at_once(tmp_path: Path) -> None:
    def stop(text: str) -> None:
        raise AssertionError(text)

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        create(tmp_path / "file/pki", algorithm=Algorithm.P384, development=True, progress=stop)


def test_no_pki(tmp_path: Path) -> None:
    nowhere = PkiDirectory(tmp_path / "nowhere")
    for use in (nowhere.certificate, nowhere.key):
        with pytest.raises(ToolError) as refused:
            use("DB")
        assert refused.value.code == "no-pki"


@pytest.mark.parametrize("development", [True, False])
def test_private_keys_lie_in_development_images_only(
    tmp_path: Path, pki: PkiDirectory, *, development: bool
) -> None:
    copy_pki(pki, tmp_path / "pki", private_keys=development)
    names = {path.suffix for path in (tmp_path / "pki").iterdir()}
    assert (".key" in names) == development
    assert PkiDirectory(tmp_path / "pki").certificate("DB") == pki.certificate("DB")
