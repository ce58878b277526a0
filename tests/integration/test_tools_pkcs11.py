# SPDX-License-Identifier: Apache-2.0
"""Signing with a key in a token: SoftHSM2 stands for the HSM, the device's code judges the signatures."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from trustme_init.trust.signature import verify_signature
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.guestos import check
from trustme_tools.guestos.pkcs11 import Pkcs11Signer, pkcs11_signer
from trustme_tools.guestos.signing import signed
from trustme_tools.pki import certificates
from trustme_tools.pki.certificates import Issuer, Role
from trustme_tools.pki.keys import KeyType, NewKey, generate

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN = "canary-pin-7351"
SO_PIN = "canary-so-pin-9274"
KINDS = [KeyType.RSA, KeyType.RSA_PSS, KeyType.P384]


@dataclass(frozen=True)
class Token:
    """A SoftHSM2 token with a key of each kind, and a chain for each key."""

    directory: Path
    ca: Path

    def uri(self, label: str, query: str = "") -> str:
        return f"pkcs11:token=release;object={label}?module-path={MODULE}{query}"

    def chain(self, label: str) -> Path:
        return self.directory / f"{label}.pem"


def softhsm(*words: str | Path) -> None:
    subprocess.run(["softhsm2-util", *map(str, words)], check=True, capture_output=True)


def put(key: NewKey, label: str, identifier: str, directory: Path) -> None:
    """Bring a key into the token."""
    path = directory / f"{label}.p8"
    # Plain RSA also for id-RSASSA-PSS, as tokens have it: the certificate says what the key is for.
    path.write_bytes(key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    softhsm("--import", path, "--token", "release", "--pin", PIN, "--label", label, "--id", identifier)
    path.unlink()


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Token]:
    directory = tmp_path_factory.mktemp("hsm")
    (directory / "tokens").mkdir()
    configuration = directory / "softhsm2.conf"
    configuration.write_text(f"directories.tokendir = {directory}/tokens\nlog.level = ERROR\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(configuration))
        softhsm("--init-token", "--free", "--label", "release", "--so-pin", SO_PIN, "--pin", PIN)
        softhsm("--init-token", "--free", "--label", "other", "--so-pin", SO_PIN, "--pin", PIN)
        start = certificates.default_not_before()
        ca_key = generate(KeyType.P384, 0)
        ca = certificates.issue(Role.SUB_CA, certificates.name("CA", "t"), ca_key, not_before=start, days=30)
        (directory / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
        for number, kind in enumerate(KINDS, 1):
            key = generate(kind, 2048)
            leaf = certificates.issue(
                Role.CODE_SIGNING,
                certificates.name(f"leaf {kind.value}", "t"),
                key,
                Issuer(ca, ca_key),
                not_before=start,
                days=20,
            )
            (directory / f"{kind.value}.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
            put(key, kind.value, f"0{number}", directory)
        for identifier in ("0a", "0b"):
            put(generate(KeyType.P384, 0), "twice", identifier, directory)
        shutil.copy(directory / "p384.pem", directory / "twice.pem")
        yield Token(directory, directory / "ca.pem")


def signer(token: Token, label: str, pin: str | None = PIN, **parts: str) -> Pkcs11Signer:
    uri = parts.get("uri", token.uri(label))
    return pkcs11_signer(uri, token.chain(parts.get("chain", label)), pin.encode() if pin else None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_takes_the_signature(token: Token, kind: KeyType) -> None:
    one = signer(token, kind.value)
    signature, _ = signed(one, b"data")
    verify_signature(one.chain[0], signature, b"data")


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("pkcs11:token=release;id=%03", ""),
        ("pkcs11:object=p384", ""),  # the other token is empty, but it is a token: not one
        ("pkcs11:token=release;object=p384;type=private;model=SoftHSM%20v2", ""),
        ("pkcs11:token=release;id=%03;object=p384", ""),
    ],
)
def test_the_key_is_found_by_what_the_uri_says(token: Token, path: str, query: str) -> None:
    one = signer(token, "p384", uri=f"{path}?module-path={MODULE}{query}")
    if "token=" in path:
        signed(one, b"data")
    else:
        with pytest.raises(ToolError) as refused:
            one.sign(b"data")
        assert refused.value.code == "pkcs11-token"


@pytest.mark.parametrize(
    ("label", "parts", "code", "named"),
    [
        ("p384", {"uri": f"pkcs11:object=p384;token=gone?module-path={MODULE}"}, "pkcs11-token", "release"),
        ("p384", {"uri": f"pkcs11:object=gone;token=release?module-path={MODULE}"}, "pkcs11-key", "gone"),
        ("twice", {}, "pkcs11-key", "2 private keys"),
        (
            "p384",
            {"uri": "pkcs11:object=p384?module-path=/absent.so"},
            "pkcs11-module",
            "/absent.so",
        ),
        ("p384", {"chain": "rsa"}, "key-certificate-mismatch", "leaf rsa"),
        ("rsa", {"chain": "p384"}, "key-certificate-mismatch", "leaf p384"),
        ("rsa", {"chain": "rsa-pss"}, "key-certificate-mismatch", "leaf rsa-pss"),
    ],
)
def test_refused(token: Token, label: str, parts: dict[str, str], code: str, named: str) -> None:
    with pytest.raises(ToolError) as refused:
        signed(signer(token, label, **parts), b"data")
    assert refused.value.code == code
    assert named in refused.value.cause + refused.value.evidence
    if code == "key-certificate-mismatch":
        assert f"object={label}" in refused.value.cause, "both are named"


def test_a_wrong_pin_is_tried_once_and_not_shown(token: Token) -> None:
    with pytest.raises(ToolError) as refused:
        signer(token, "p384", "canary-wrong-1").sign(b"data")
    assert (refused.value.code, refused.value.evidence) == ("pkcs11-pin", "PinIncorrect")
    shown = repr(signer(token, "p384")) + str(refused.value.as_dict())
    assert "canary" not in shown


def test_without_a_pin_there_is_no_signature(token: Token) -> None:
    with pytest.raises(ToolError) as refused:
        signer(token, "p384", None).sign(b"data")
    assert refused.value.code == "pkcs11-pin"


def test_pin_from_the_file_of_the_uri(token: Token, tmp_path: Path) -> None:
    (tmp_path / "pin").write_text(f"{PIN}\n")
    signed(signer(token, "p384", None, uri=token.uri("p384", f"&pin-source=file:{tmp_path}/pin")), b"data")
    with pytest.raises(FileNotFoundError):  # main() names the path
        signer(token, "p384", None, uri=token.uri("p384", "&pin-source=file:/nonexistent")).sign(b"data")


def test_a_guestos_signed_by_the_command_with_the_pin_on_a_descriptor(token: Token, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sbin").mkdir(parents=True)
    shutil.copy("/bin/true", root / "sbin/init")
    recipe = tmp_path / "guestos.toml"
    recipe.write_text(
        'version = 1\nname = "tiny"\nhardware = "x86"\ndescription = "t"\ninit_path = "/sbin/init"\n'
        '[[mounts]]\nimage_file = "root"\nmount_point = "/"\nfs_type = "squashfs"\nmount_type = "SHARED"\n'
    )
    store = tmp_path / "store"
    with (tmp_path / "pin").open("w+") as file:
        file.write(f"{PIN}\n")
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        words = [
            "guestos",
            "build",
            recipe,
            root,
            "--out",
            store,
            "--version",
            1,
            "--key",
            token.uri("rsa-pss"),
        ]
        words += ["--cert", token.chain("rsa-pss"), "--passphrase-fd", file.fileno()]
        assert main.main(list(map(str, words))) == 0
    anchors = check.anchors_from([token.ca])
    check.verify(store / "operatingsystems/tiny-1.conf", anchors, at=datetime.now(UTC))
    left = b"".join(path.read_bytes() for path in store.rglob("*") if path.is_file())
    assert PIN.encode() not in left
