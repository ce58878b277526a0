# SPDX-License-Identifier: Apache-2.0
"""`trustme lifecycle`: statements that the device's code reads, signatures that openssl agrees with."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.trust.certificate import LIFECYCLE_PURPOSE
from trustme_init.trust.statement import parse_statement
from trustme_tools.cli import main
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.directory import PkiDirectory

UUID = "6f9619ff-8b86-4011-b42d-00cf4fc964ff"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    return create(tmp_path_factory.mktemp("lifecycle") / "pki", algorithm=Algorithm.P384, development=True)


class Trustme:
    """Runs the command; remembers what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> tuple[int, dict[str, Any]]:
        try:
            code = main.main([*map(str, words), "--json"])
        except SystemExit as exc:
            code = int(exc.code or 0)
            return code, {"text": self._capsys.readouterr().err}
        return code, json.loads(self._capsys.readouterr().out)


@pytest.fixture
def trustme(capsys: pytest.CaptureFixture[str]) -> Trustme:
    return Trustme(capsys)


def sha256(pki: PkiDirectory, name: str) -> str:
    return hashlib.sha256(pki.certificate(name).public_bytes(Encoding.DER)).hexdigest()


def openssl(*words: str | Path) -> str:
    done = subprocess.run(["openssl", *map(str, words)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def statement(trustme: Trustme, path: Path, *words: str | Path) -> dict[str, Any]:
    code, document = trustme("lifecycle", "create", *words, "--device", UUID, "--out", path)
    assert code == 0, document
    result: dict[str, Any] = document["result"]
    return result


def test_each_action_is_made_signed_and_judged(trustme: Trustme, pki: PkiDirectory, tmp_path: Path) -> None:
    token = tmp_path / "token.p12"
    token.write_bytes(b"any file")
    new = pki.certificate_path("lifecycle_rootca")
    actions: dict[str, tuple[str | Path, ...]] = {
        "replace-authority": (
            *("--purpose", "guest", "--old", pki.certificate_path("guestos_subca")),
            *("--certificate", new, "--overlap"),
        ),
        "retire-authority": ("--purpose", "device", "--old", sha256(pki, "device_subca").upper()),
        "renew-device-key": (),
        "device-certificate": ("--certificate", pki.certificate_path("guestos")),
        "replace-token": ("--token", token),
    }
    for action, options in actions.items():
        path = tmp_path / f"{action}.json"
        made = statement(trustme, path, action, *options)
        assert (made["action"], made["device_uuid"]) == (action, UUID)
        assert parse_statement(path.read_bytes()).name == action
        assert trustme("lifecycle", "sign", path, "--pki", pki.path)[0] == 0
        code, shown = trustme(
            *("lifecycle", "show", path),
            *("--anchor", f"lifecycle={pki.certificate_path('lifecycle_rootca')}"),
        )
        assert code == 0, shown
        assert shown["result"]["verified"]
        assert shown["result"]["anchor_sha256"] == sha256(pki, "lifecycle_rootca")
    made = json.loads((tmp_path / "replace-authority.json").read_text())
    assert made["old_sha256"] == sha256(pki, "guestos_subca")
    assert made["certificate"] == pki.certificate("lifecycle_rootca").public_bytes(Encoding.PEM).decode()
    assert made["overlap"] is True
    chain = json.loads((tmp_path / "device-certificate.json").read_text())["certificate"]
    assert chain == pki.certificate_path("guestos").read_text()
    assert json.loads((tmp_path / "replace-token.json").read_text())["token_sha256"] == (
        hashlib.sha256(b"any file").hexdigest()
    )


def test_openssl_agrees_with_the_signature(trustme: Trustme, pki: PkiDirectory, tmp_path: Path) -> None:
    path = tmp_path / "renew.json"
    statement(trustme, path, "renew-device-key")
    trustme("lifecycle", "sign", path, "--pki", pki.path)
    key = tmp_path / "key.pem"
    key.write_text(openssl("x509", "-in", path.with_suffix(".cert"), "-noout", "-pubkey"))
    signature = path.with_suffix(".sig")
    assert "Verified OK" in openssl("dgst", "-sha512", "-verify", key, "-signature", signature, path)


def test_a_signer_made_with_openssl_and_a_signing_command(
    trustme: Trustme, pki: PkiDirectory, tmp_path: Path
) -> None:
    """As docs/lifecycle.md has it: a leaf under a GuestOS CA, and a key that never leaves a command."""
    key, request, leaf = (tmp_path / name for name in ("leaf.key", "leaf.csr", "leaf.cert"))
    ca, ca_key = tmp_path / "ca.cert", tmp_path / "ca.key"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-noenc", "-days", "30"),
        *("-subj", "/CN=my GuestOS CA", "-addext", "keyUsage=critical,keyCertSign", "-keyout", ca_key),
        *("-out", ca),
    )
    openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-noenc", "-subj", "/CN=rotation"),
        *("-keyout", key, "-out", request),
    )
    extensions = tmp_path / "extensions.cnf"
    extensions.write_text(
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
        f"extendedKeyUsage={LIFECYCLE_PURPOSE.dotted_string}\n"
    )
    openssl(
        *("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "20"),
        *("-extfile", extensions, "-out", leaf),
    )
    path = tmp_path / "rotate.json"
    new = pki.certificate_path("guestos_subca")
    statement(trustme, path, "replace-authority", "--purpose", "guest", "--old", ca, "--certificate", new)
    command = f"openssl dgst -sha512 -sign {key}"
    assert trustme("lifecycle", "sign", path, "--cert", leaf, "--sign-command", command)[0] == 0
    code, shown = trustme("lifecycle", "show", path, "--anchor", f"guest={ca}")
    assert (code, shown["result"]["anchor_purpose"]) == (0, "guest")
    assert trustme("lifecycle", "show", path, "--anchor", f"device={ca}")[1]["error"]["code"] == (
        "statement-not-entitled"
    )


def test_a_signer_of_software_is_refused_at_the_desk(
    trustme: Trustme, pki: PkiDirectory, tmp_path: Path
) -> None:
    path = tmp_path / "renew.json"
    statement(trustme, path, "renew-device-key")
    code, document = trustme("lifecycle", "sign", path, "--pki", pki.path, "--signer", "guestos")
    assert (code, document["error"]["code"]) == (1, "not-a-lifecycle-signer")
    assert LIFECYCLE_PURPOSE.dotted_string in document["error"]["remedy"]
    assert not path.with_suffix(".sig").exists()


def test_what_a_device_would_refuse_is_not_signed(
    trustme: Trustme, pki: PkiDirectory, tmp_path: Path
) -> None:
    path = tmp_path / "renew.json"
    statement(trustme, path, "renew-device-key")
    path.write_text(path.read_text().replace('"version": 1', '"version": 1, "comment": ""'))
    code, document = trustme("lifecycle", "sign", path, "--pki", pki.path)
    assert (code, document["error"]["code"]) == (1, "statement-malformed")
    named = tmp_path / "renew.cert"
    named.write_text("{}")
    assert trustme("lifecycle", "sign", named, "--pki", pki.path)[1]["error"]["code"] == "bad-name"
    assert trustme("lifecycle", "sign", path)[1]["error"]["code"] == "no-signer"


@pytest.mark.parametrize(
    "words",
    [
        ("replace-authority", "--purpose", "guest"),
        ("replace-authority", "--purpose", "guest", "--old", "a" * 64),
        ("retire-authority", "--old", "a" * 64),
        ("renew-device-key", "--overlap"),
        ("renew-device-key", "--purpose", "guest"),
        ("retire-authority", "--purpose", "guest", "--old", "a" * 64, "--overlap"),
        ("device-certificate",),
        ("replace-token",),
    ],
)
def test_options_that_do_not_fit(trustme: Trustme, tmp_path: Path, words: tuple[str, ...]) -> None:
    out = tmp_path / "x.json"
    code, document = trustme("lifecycle", "create", *words, "--device", UUID, "--out", out)
    assert (code, document["error"]["code"]) == (2, "options-do-not-fit")
    assert not out.exists()


def test_a_device_or_any_has_to_be_said(trustme: Trustme, pki: PkiDirectory, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    assert trustme("lifecycle", "create", "renew-device-key", "--out", out)[0] == 2
    chain = pki.certificate_path("guestos")
    code, document = trustme(
        *("lifecycle", "create", "device-certificate", "--any-device", "--certificate", chain, "--out", out)
    )
    assert (code, document["error"]["code"]) == (1, "statement-for-any-device")
    code, document = trustme("lifecycle", "create", "renew-device-key", "--any-device", "--out", out)
    assert (code, document["result"]["device_uuid"]) == (0, None)
    assert document["result"]["serial"] > 20260101000000
    again = trustme("lifecycle", "create", "renew-device-key", "--any-device", "--out", out)
    assert again[1]["error"]["code"] == "exists"


def test_show_judges_as_a_device_does(trustme: Trustme, pki: PkiDirectory, tmp_path: Path) -> None:
    path = tmp_path / "renew.json"
    statement(trustme, path, "renew-device-key", "--serial", "7")
    assert trustme("lifecycle", "show", path)[1]["result"]["verified"] is False
    trustme("lifecycle", "sign", path, "--pki", pki.path)
    anchor = f"lifecycle={pki.certificate_path('lifecycle_rootca')}"
    show = ("lifecycle", "show", path, "--anchor", anchor)
    for words, code in (
        (("--last-serial", "7"), "statement-replayed"),
        (("--device", "11111111-2222-4333-8444-555555555555"), "statement-other-device"),
        (("--at", "2000-01-01"), "certificate-not-yet-valid"),
    ):
        assert trustme(*show, *words)[1]["error"]["code"] == code
    assert trustme(*show, "--last-serial", "6")[0] == 0
    path.write_text(path.read_text().replace('"serial": 7', '"serial": 8'))
    assert trustme(*show)[1]["error"]["code"] == "bad-signature"
    assert trustme("lifecycle", "show", path, "--anchor", "core=x")[0] == 2


def test_what_people_see(pki: PkiDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rotate.json"
    main.main(
        [
            *("lifecycle", "create", "replace-authority", "--any-device", "--purpose", "guest"),
            *("--old", str(pki.certificate_path("guestos_subca")), "--out", str(path)),
            *("--certificate", str(pki.certificate_path("device_subca"))),
        ]
    )
    text = capsys.readouterr().out
    assert "device     any" in text
    assert sha256(pki, "guestos_subca") in text
    assert "Device Sub CA" in text
