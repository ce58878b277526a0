# SPDX-License-Identifier: Apache-2.0
"""GuestOSes as openssl and veritysetup see them, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.integration.guestos_kit import RECIPE, build, make_root, verify
from trustme_init.errors import Refusal
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.guestos import check, signing
from trustme_tools.guestos.build import BuiltGuestOs, sign_config, source_date_epoch
from trustme_tools.guestos.signing import KeySigner, command_signer, key_signer, pki_signer
from trustme_tools.pki import certificates
from trustme_tools.pki.certificates import Issuer, Role
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.pki.keys import KeyType, generate


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    return create(tmp_path_factory.mktemp("pki") / "made", algorithm=Algorithm.P384, development=True)


def test_layout_of_the_store(tmp_path: Path, pki: PkiDirectory) -> None:
    built = build(tmp_path, pki)
    assert (built.name, built.version) == ("tiny", 20231114221320)
    found = sorted(str(path.relative_to(tmp_path / "store")) for path in (tmp_path / "store").rglob("*"))
    stem = "operatingsystems/tiny-20231114221320"
    assert found == [
        "operatingsystems",
        stem,
        f"{stem}.cert",
        f"{stem}.conf",
        f"{stem}.sig",
        f"{stem}/kernel.img",
        f"{stem}/root.hash.img",
        f"{stem}/root.img",
    ]
    assert built.config_digest == hashlib.sha256(built.config_path.read_bytes()).hexdigest()
    assert {path.stat().st_mode & 0o777 for path in built.image_directory.iterdir()} == {0o644}


@pytest.mark.parametrize("fs_type", ["squashfs", "erofs"])
def test_same_input_gives_the_same_bytes(tmp_path: Path, pki: PkiDirectory, fs_type: str) -> None:
    text = RECIPE.replace("squashfs", fs_type)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    make_root(tmp_path / "a/root")
    make_root(tmp_path / "b/root", backwards=True)
    first, second = (build(tmp_path / place, pki, text) for place in "ab")
    assert first.config_path.read_bytes() == second.config_path.read_bytes()
    for name in ("root.img", "root.hash.img", "kernel.img"):
        assert (first.image_directory / name).read_bytes() == (second.image_directory / name).read_bytes(), (
            name
        )


def test_veritysetup_agrees_with_what_is_signed(tmp_path: Path, pki: PkiDirectory) -> None:
    built = build(tmp_path, pki)
    facts = check.describe(check.load_config(built.config_path))
    root, kernel = facts["mounts"]
    image, hashes = built.image_directory / "root.img", built.image_directory / "root.hash.img"
    salt = hashlib.sha256(b"trustme-verity-salt-v1\0tiny\x0020231114221320\0root").hexdigest()
    assert root["salt"] == salt
    assert root["image_size"] == image.stat().st_size
    assert root["image_size"] % 4096 == 0
    assert root["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert (kernel["root_hash"], kernel["salt"]) == ("", "")
    assert kernel["sha256"] == hashlib.sha256((built.image_directory / "kernel.img").read_bytes()).hexdigest()
    subprocess.run(["/usr/sbin/veritysetup", "verify", image, hashes, root["root_hash"]], check=True)
    dump = subprocess.run(
        ["/usr/sbin/veritysetup", "dump", hashes], check=True, capture_output=True, text=True
    ).stdout
    assert salt in dump


def leaf_signer(pki: PkiDirectory, key_type: KeyType, bits: int = 2048) -> KeySigner:
    """Return a signer of another kind of key under the sub CA."""
    authority = pki.certificate("ssig_subca")
    issuer_key = generate(KeyType.P384, 0)
    issuer = Issuer(
        certificates.issue(
            Role.SUB_CA, authority.subject, issuer_key, not_before=certificates.default_not_before(), days=10
        ),
        issuer_key,
    )
    key = generate(key_type, bits)
    subject = certificates.name("another leaf", "tests")
    start = certificates.default_not_before()
    leaf = certificates.issue(Role.CODE_SIGNING, subject, key, issuer, not_before=start, days=9)
    return KeySigner(key.private, (leaf,))


@pytest.mark.parametrize(
    ("key_type", "options"),
    [
        (KeyType.RSA, []),
        (KeyType.RSA_PSS, ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:64"]),
        (KeyType.P384, []),
    ],
)
def test_openssl_verifies_the_signature(
    tmp_path: Path, pki: PkiDirectory, key_type: KeyType, options: list[str]
) -> None:
    built = build(tmp_path, pki, signer=leaf_signer(pki, key_type))
    signature, certificate = (built.config_path.with_suffix(suffix) for suffix in (".sig", ".cert"))
    key = subprocess.run(
        ["openssl", "x509", "-in", certificate, "-noout", "-pubkey"], check=True, capture_output=True
    ).stdout
    (tmp_path / "key.pub").write_bytes(key)
    words: list[str | Path] = ["-sha512", "-verify", tmp_path / "key.pub", *options, "-signature", signature]
    subprocess.run(["openssl", "dgst", *words, built.config_path], check=True)


def test_device_code_accepts_it(tmp_path: Path, pki: PkiDirectory) -> None:
    verify(build(tmp_path, pki), pki.certificate_path("ssig_subca"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda built: flip(built.config_path), "bad-signature"),
        (lambda built: flip(built.config_path.with_suffix(".sig")), "bad-signature"),
        (lambda built: flip(built.image_directory / "root.img"), "image-damaged"),
        (lambda built: flip(built.image_directory / "kernel.img"), "image-damaged"),
        (lambda built: flip(built.image_directory / "root.hash.img"), "image-damaged"),
        (lambda built: (built.image_directory / "root.hash.img").unlink(), "image-missing"),
        (lambda built: (built.image_directory / "root.img").unlink(), "image-missing"),
        (lambda built: built.config_path.with_suffix(".sig").unlink(), "file-unreadable"),
        (lambda built: os.truncate(built.image_directory / "root.img", 4096), "image-damaged"),
    ],
)
def test_damage_is_found(
    tmp_path: Path, pki: PkiDirectory, damage: Callable[[BuiltGuestOs], object], code: str
) -> None:
    built = build(tmp_path, pki)
    damage(built)
    with pytest.raises((ToolError, Refusal)) as refused:
        verify(built, pki.certificate_path("ssig_subca"))
    assert refused.value.code == code  # type: ignore[attr-defined] # both kinds have it


def test_trust_is_judged_as_on_the_device(tmp_path: Path, pki: PkiDirectory) -> None:
    built = build(tmp_path, pki)
    anchor = pki.certificate_path("ssig_subca")
    conf = str(built.config_path)
    for options, code in (
        (["--anchor", pki.certificate_path("gen_rootca")], "untrusted-signer"),
        (["--anchor", pki.certificate_path("DB")], "no-anchor"),
        (["--anchor", anchor, "--dbx", pki.certificate_path("ssig_cml")], "certificate-revoked"),
        (["--anchor", anchor, "--dbx", f"tbs:{pki.certificate_path('ssig_cml')}"], "certificate-revoked"),
        (["--anchor", anchor, "--dbx", f"sha256:{built.config_digest}"], "config-revoked"),
        (["--anchor", anchor, "--hardware", "arm"], "wrong-hardware"),
    ):
        assert main.main(["guestos", "verify", conf, *map(str, options)]) == 1, code
    late = datetime.now(UTC) + timedelta(days=1200)
    with pytest.raises(Refusal) as refused:
        verify(built, anchor, at=late)
    assert refused.value.code == "certificate-expired"


def test_verify_names_the_code(tmp_path: Path, pki: PkiDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    built = build(tmp_path, pki)
    words = ["guestos", "verify", str(built.config_path), "--json", "--anchor"]
    assert main.main([*words, str(pki.certificate_path("ssig_subca"))]) == 0
    good = json.loads(capsys.readouterr().out)["result"]
    assert (good["guestos"], good["config_sha256"]) == (built.config_path.stem, built.config_digest)
    assert main.main([*words, str(pki.certificate_path("gen_rootca"))]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "untrusted-signer"


def test_refuses_to_overwrite_and_replaces_by_force(tmp_path: Path, pki: PkiDirectory) -> None:
    built = build(tmp_path, pki)
    before = built.config_path.read_bytes()
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki)
    assert refused.value.code == "exists"
    (tmp_path / "root/new").write_bytes(b"n" * 30_000)
    again = build(tmp_path, pki, force=True)
    assert again.config_path.read_bytes() != before
    verify(again, pki.certificate_path("ssig_subca"))


def test_a_failed_build_leaves_nothing(tmp_path: Path, pki: PkiDirectory) -> None:
    signer = command_signer("false", pki.certificate_path("ssig_cml"))
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki, signer=signer)
    assert refused.value.code == "sign-command-failed"
    assert not list((tmp_path / "store/operatingsystems").iterdir())


def test_key_of_another_certificate_is_refused_naming_both(pki: PkiDirectory) -> None:
    key, certificate = pki.key_path("guestos"), pki.certificate_path("ssig_cml")
    with pytest.raises(ToolError) as refused:
        key_signer(key, certificate)
    assert refused.value.code == "key-certificate-mismatch"
    assert str(key) in refused.value.cause
    assert str(certificate) in refused.value.cause


def test_chain_must_hang_together(tmp_path: Path, pki: PkiDirectory) -> None:
    leaf, authority, root, other = (
        pki.certificate(name).public_bytes(Encoding.PEM)
        for name in ("ssig_cml", "ssig_subca", "ssig_rootca", "guestos_subca")
    )
    path = tmp_path / "chain.pem"
    for chain in (root, leaf + other, authority + leaf, leaf + root):
        path.write_bytes(chain)
        with pytest.raises(ToolError) as refused:
            signing.signing_chain(path)
        assert refused.value.code == "bad-chain"
    path.write_bytes(leaf + authority + root)
    assert [each.subject for each in signing.signing_chain(path)] == [
        pki.certificate(name).subject for name in ("ssig_cml", "ssig_subca")
    ]


def test_signing_command(tmp_path: Path, pki: PkiDirectory) -> None:
    with pki.unlocked_key("ssig_cml") as (descriptor, _):
        key = tmp_path / "leaf.pem"
        key.write_bytes(os.pread(descriptor, 10_000, 0))
    built = build(tmp_path, pki)
    sign_config(
        built.config_path,
        command_signer(f"openssl dgst -sha512 -sign {key}", pki.certificate_path("ssig_cml")),
    )
    verify(built, pki.certificate_path("ssig_subca"))
    good = built.config_path.with_suffix(".sig").read_bytes()
    for command, code in (
        (f"openssl dgst -sha256 -sign {key}", "key-certificate-mismatch"),
        ("cat", "key-certificate-mismatch"),
        ("true", "sign-command-failed"),
        ("/nonexistent/signer", "sign-command-missing"),
    ):
        with pytest.raises(ToolError) as refused:
            sign_config(built.config_path, command_signer(command, pki.certificate_path("ssig_cml")))
        assert refused.value.code == code
    assert built.config_path.with_suffix(".sig").read_bytes() == good


def test_signing_again_with_another_pki(tmp_path: Path, pki: PkiDirectory) -> None:
    built = build(tmp_path, pki)
    before = built.config_path.read_bytes()
    assert (
        main.main(["guestos", "sign", str(built.config_path), "--pki", str(pki.path), "--signer", "guestos"])
        == 0
    )
    assert built.config_path.read_bytes() == before
    verify(built, pki.certificate_path("guestos_subca"))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--key", "k"],
        ["--cert", "c"],
        ["--pki", "p", "--key", "k", "--cert", "c"],
        ["--key", "k", "--sign-command", "s", "--cert", "c"],
    ],
)
def test_who_signs_must_be_clear(tmp_path: Path, words: list[str]) -> None:
    assert main.main(["guestos", "sign", str(tmp_path / "x.conf"), *words]) == 2


def test_sources_must_match_the_recipe(tmp_path: Path, pki: PkiDirectory) -> None:
    for sources in ({}, {"kernel": tmp_path, "surprise": tmp_path}):
        with pytest.raises(ToolError) as refused:
            build(tmp_path, pki, sources=sources)
        assert refused.value.code == "image-sources"
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki, sources={"kernel": tmp_path})
    assert refused.value.code == "no-source-file"
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "root").touch()
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki)
    assert refused.value.code == "no-source-directory"


def test_show_and_inspect(tmp_path: Path, pki: PkiDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    built = build(tmp_path, pki)
    for words in (["guestos", "show"], ["inspect"]):
        assert main.main([*words, str(built.config_path)]) == 0
        text = capsys.readouterr().out
        assert "tiny version 20231114221320 for x86" in text
        assert built.root_hashes["root"] in text


def test_inspect_of_a_disk_image(
    tmp_path: Path, pki: PkiDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build(tmp_path, pki)
    (built.config_path.with_name("Odd name-1.conf")).write_bytes(b"?")
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 64 * 2**20)
    layout = (
        "label: gpt\nstart=2048, size=8192, type=c12a7328-f81f-11d2-ba4b-00a0c93ec93b, name=boot\n"
        "start=10240, size=32768, type=b0f7dc53-36a5-4d2b-9f0f-1a3a6d1e7c01, name=trustme-store\n"
    )
    subprocess.run(["/usr/sbin/sfdisk", "-q", image], input=layout, text=True, check=True)
    subprocess.run(
        ["/usr/sbin/mkfs.ext4", "-q", "-d", tmp_path / "store", "-E", f"offset={10240 * 512}", image, "16M"],
        check=True,
        capture_output=True,
    )
    assert main.main(["inspect", str(image), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert [entry["kind"] for entry in result["partitions"]] == ["EFI system", "store"]
    odd, tiny = result["guestos"]
    assert odd["file"] == "Odd name-1.conf"
    assert "ignored" in odd["error"]
    assert tiny["mounts"][0]["root_hash"] == built.root_hashes["root"]
    assert main.main(["inspect", str(image)]) == 0
    assert "trustme-store" in capsys.readouterr().out


def test_a_signing_chain_is_no_anchor_of_itself(tmp_path: Path, pki: PkiDirectory) -> None:
    built = build(tmp_path, pki)
    with pytest.raises(Refusal) as refused:
        verify(built, built.config_path.with_suffix(".cert"))
    assert refused.value.code == "no-anchor"


def test_only_a_configuration_is_signed(tmp_path: Path, pki: PkiDirectory) -> None:
    path = tmp_path / "letter.conf"
    path.write_text("I owe you nothing")
    with pytest.raises(Refusal):
        sign_config(path, pki_signer(pki))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", ["", "'", "yes", "true", "false", "/tmp"])
def test_commands_that_sign_nothing(pki: PkiDirectory, command: str) -> None:
    with pytest.raises(ToolError) as refused:
        command_signer(command, pki.certificate_path("ssig_cml")).sign(b"data" * 100_000)
    assert refused.value.code == "sign-command-failed"


@pytest.mark.parametrize("command", ["/nonexistent/signer --fast", "no-such-signer"])
def test_a_signing_command_that_is_not_there_is_named(pki: PkiDirectory, command: str) -> None:
    with pytest.raises(ToolError) as refused:
        command_signer(command, pki.certificate_path("ssig_cml")).sign(b"data")
    assert refused.value.code == "sign-command-missing"
    assert command.split(maxsplit=1)[0] in refused.value.cause


def test_a_signature_of_another_key_names_both(tmp_path: Path, pki: PkiDirectory) -> None:
    with pki.unlocked_key("guestos") as (descriptor, _):
        (tmp_path / "other.pem").write_bytes(os.pread(descriptor, 10_000, 0))
    command = f"openssl dgst -sha512 -sign {tmp_path}/other.pem"
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki, signer=command_signer(command, pki.certificate_path("ssig_cml")))
    assert refused.value.code == "key-certificate-mismatch"
    assert command in refused.value.cause
    assert "CN=CML Signing Certificate" in refused.value.cause


def dated_signer(pki: PkiDirectory, start: datetime, days: int, *, of_ca: bool = False) -> KeySigner:
    """Return a signer whose leaf, or the CA above it, has the dates given."""
    now = datetime.now(UTC)
    key, ca_key = generate(KeyType.P384, 0), generate(KeyType.P384, 0)
    long = (now - timedelta(days=400), 800)
    ca_dates, leaf_dates = ((start, days), long) if of_ca else (long, (start, days))
    ca = certificates.issue(
        Role.SUB_CA, certificates.name("dated CA", "t"), ca_key, not_before=ca_dates[0], days=ca_dates[1]
    )
    leaf = certificates.issue(
        Role.CODE_SIGNING,
        certificates.name("dated leaf", "t"),
        key,
        Issuer(ca, ca_key),
        not_before=leaf_dates[0],
        days=leaf_dates[1],
    )
    return KeySigner(key.private, (leaf, ca))


@pytest.mark.parametrize(
    ("begins", "named", "code"),
    [
        (-20, "dated leaf", "certificate-expired"),
        (+5, "dated leaf", "certificate-not-yet-valid"),
        (-20, "dated CA", "certificate-expired"),
        (+5, "dated CA", "certificate-not-yet-valid"),
    ],
)
def test_a_chain_that_is_not_valid_now_signs_only_if_asked(
    tmp_path: Path, pki: PkiDirectory, begins: int, named: str, code: str
) -> None:
    signer = dated_signer(pki, datetime.now(UTC) + timedelta(days=begins), 10, of_ca=named == "dated CA")
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki, signer=signer)
    assert refused.value.code == code
    assert named in refused.value.cause
    assert not list((tmp_path / "store/operatingsystems").iterdir())
    built = build(tmp_path, pki, signer=signer, allow_expired=True)
    before = built.config_path.with_suffix(".sig").read_bytes()
    with pytest.raises(ToolError) as refused:
        sign_config(built.config_path, signer)
    assert refused.value.code == code
    assert built.config_path.with_suffix(".sig").read_bytes() == before
    sign_config(built.config_path, signer, allow_expired=True)
    with pytest.raises(Refusal):  # the device goes by the dates
        verify(built, pki.certificate_path("ssig_subca"))


@pytest.mark.parametrize("value", ["-1", "x", "99999999999999999999", str(2**32)])
def test_epochs_that_no_image_can_carry(value: str) -> None:
    with pytest.raises(ToolError) as refused:
        source_date_epoch({"SOURCE_DATE_EPOCH": value})
    assert refused.value.code == "bad-epoch"
