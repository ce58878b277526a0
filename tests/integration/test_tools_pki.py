# SPDX-License-Identifier: Apache-2.0
"""The PKI as openssl sees it, for every algorithm, and the command as a person uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from trustme_tools.pki.create import NAMES, Algorithm, create
from trustme_tools.pki.directory import PkiDirectory

PASSPHRASE = "canary-7f3a passphrase"


@pytest.fixture(scope="module", params=list(Algorithm), ids=lambda algorithm: algorithm.value)
def pki(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    return create(tmp_path_factory.mktemp("pki") / "made", algorithm=request.param, development=True)


def openssl(*arguments: str | Path, data: bytes = b"") -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], input=data, capture_output=True, check=True)
    return done.stdout.decode()


def trustme(
    *arguments: str | Path, umask: int = -1, pass_fds: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    source = Path(__file__).parents[2] / "src"
    return subprocess.run(
        [sys.executable, "-m", "trustme_tools", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        umask=umask,
        pass_fds=pass_fds,
        env={**os.environ, "PYTHONPATH": str(source)},
    )


@pytest.mark.parametrize(
    ("leaf", "authority", "root"),
    [("ssig_cml", "ssig_subca", "ssig_rootca"), ("guestos", "guestos_subca", "gen_rootca")],
)
def test_openssl_accepts_the_chains(pki: PkiDirectory, leaf: str, authority: str, root: str) -> None:
    path = pki.certificate_path
    openssl("verify", "-x509_strict", "-partial_chain", "-trusted", path(authority), path(leaf))
    openssl("verify", "-x509_strict", "-CAfile", path(root), "-untrusted", path(leaf), path(leaf))
    openssl("verify", "-x509_strict", "-CAfile", path("gen_rootca"), path("device_subca"))


def test_openssl_sees_the_key_types(pki: PkiDirectory, request: pytest.FixtureRequest) -> None:
    texts = {name: openssl("x509", "-in", pki.certificate_path(name), "-noout", "-text") for name in NAMES}
    leaf_type = {"rsa4096": "rsaEncryption", "rsapss4096": "rsassaPss", "p384": "id-ecPublicKey"}
    for name in ("ssig_cml", "guestos"):
        assert f"Public Key Algorithm: {leaf_type[request.node.callspec.id]}" in texts[name]
        assert "Digital Signature, Non Repudiation" in texts[name]
        assert "Code Signing" in texts[name]
    for name in ("PK", "KEK", "DB"):
        assert "Public Key Algorithm: rsaEncryption" in texts[name]
        assert "Signature Algorithm: sha256WithRSAEncryption" in texts[name]
    assert not any("sha1" in text.lower() for text in texts.values())


def test_openssl_opens_the_keys(pki: PkiDirectory) -> None:
    for name in NAMES:
        openssl("pkey", "-in", pki.key_path(name), "-passin", "pass:trustme-development", "-noout")


def test_openssl_accepts_a_device_certificate(tmp_path: Path, pki: PkiDirectory) -> None:
    """Of every kind of CA, the id-RSASSA-PSS one too."""
    csr, key, path = tmp_path / "device.csr", tmp_path / "device.key", pki.certificate_path
    name = "subjectAltName=URI:UUID:0b2c4a6e-5d1f-4c38-9a77-3f0e6d1b2c4a"
    openssl(
        *("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key),
        *("-subj", "/CN=backend/O=Somebody else", "-addext", name, "-out", csr),
    )
    done = trustme("pki", "sign-device", csr, "--pki", pki.path, "--allow-software-key")
    assert done.returncode == 0, done.stderr
    leaf = tmp_path / "device.cert"
    openssl("verify", "-x509_strict", "-CAfile", path("gen_rootca"), "-untrusted", leaf, leaf)
    openssl("verify", "-x509_strict", "-partial_chain", "-trusted", path("device_subca"), leaf)
    openssl(
        *("verify", "-purpose", "sslclient", "-CAfile", path("gen_rootca"), "-untrusted", leaf, leaf),
    )
    shown = openssl("x509", "-in", leaf, "-noout", "-subject", "-ext", "subjectAltName,extendedKeyUsage")
    assert "CN = 0b2c4a6e-5d1f-4c38-9a77-3f0e6d1b2c4a" in shown
    assert "URI:UUID:0b2c4a6e-5d1f-4c38-9a77-3f0e6d1b2c4a" in shown
    assert "TLS Web Client Authentication" in shown
    assert "backend" not in shown


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_keys_are_private_under_any_umask(tmp_path: Path, umask: int) -> None:
    done = trustme("pki", "create", tmp_path / "pki", "--algorithm", "p384", "--development", umask=umask)
    assert done.returncode == 0, done.stderr
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "pki").iterdir()}
    assert modes == {".key": 0o600, ".cert": 0o644, "": 0o644}
    assert "DEVELOPMENT ONLY" in done.stdout


def test_passphrase_comes_by_descriptor_and_is_nowhere_else(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, f"{PASSPHRASE}\nsecond line".encode())
    os.close(writing)
    made = tmp_path / "pki"
    done = trustme(
        "pki",
        "create",
        made,
        "--algorithm=p384",
        "--passphrase-fd",
        str(reading),
        "--json",
        pass_fds=(reading,),
    )
    os.close(reading)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["command"] == "pki create"
    assert document["result"]["development"] is False
    assert set(document["result"]["certificates"]) == set(NAMES)
    key = (made / "ssig_cml.key").read_bytes()
    assert "scrypt" in openssl("asn1parse", data=key).lower()
    openssl("pkey", "-in", made / "ssig_cml.key", "-passin", f"pass:{PASSPHRASE}", "-noout")
    for text in (done.stdout, done.stderr, *(path.read_text() for path in made.iterdir())):
        assert PASSPHRASE not in text


def test_refusals_of_the_command(tmp_path: Path) -> None:
    assert trustme("pki", "create", tmp_path / "pki", "--algorithm", "p384").returncode == 2
    (tmp_path / "pki").mkdir()
    done = trustme("pki", "create", tmp_path / "pki", "--algorithm", "p384", "--development", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "exists"
    assert "--force" in done.stderr
    assert not list((tmp_path / "pki").iterdir())


def test_a_missing_program_exits_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    done = trustme("pki", "create", tmp_path / "pki", "--algorithm", "rsapss4096", "--development")
    assert done.returncode == 3
    assert "apt-get install openssl" in done.stderr
