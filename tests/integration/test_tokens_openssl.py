# SPDX-License-Identifier: Apache-2.0
"""Tokens between the device and the openssl program, at their real price."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12

from tests.unit.tokens import kit
from tests.unit.tokens.kit import NOW, PIN, openssl
from trustme_init.errors import TokenRefusal
from trustme_init.tokens import pkcs12, softtoken
from trustme_init.tokens.softtoken import Token, needs_upgrade, open_token
from trustme_init.tokens.store import TokenStore
from trustme_init.tokens.wrapping import unwrap_gyroidos

UUID = "4c4c4544-0051-3610-8052-b4c04f4a3232"


def by_prompt(directory: Path, command: str, *answers: str) -> None:
    """Run a command line that asks for passwords; without a terminal, openssl reads them from its input."""
    subprocess.run(
        command.split(),
        cwd=directory,
        check=True,
        capture_output=True,
        text=True,
        input="".join(f"{answer}\n" for answer in answers),
        start_new_session=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def rsa_token() -> Token:
    return kit.token(kit.rsa_key())


def exported(directory: Path, made: Token, *options: str, pin: str = PIN) -> bytes:
    kit.pem_files(directory, made)
    openssl(
        directory,
        *("pkcs12", "-export", "-inkey", "key.pem", "-in", "cert.pem", "-out", "out.p12"),
        *("-passout", f"pass:{pin}", *options),
    )
    return (directory / "out.p12").read_bytes()


def refused(data: bytes, pin: str = PIN) -> str:
    with pytest.raises(TokenRefusal) as caught:
        open_token(data, pin)
    return caught.value.code


def test_the_manuals_two_commands_yield_a_token_that_goes_on_being_used(tmp_path: Path) -> None:
    TokenStore(tmp_path, 10).create(PIN, common_name=UUID, now=NOW)
    before = TokenStore(tmp_path, 10).unlock(PIN)
    by_prompt(tmp_path, "openssl pkcs12 -in testuser.p12 -out mycert.pem -nodes", PIN)
    by_prompt(tmp_path, "openssl pkcs12 -export -out testuser.p12 -in mycert.pem", "other", "other")

    status = TokenStore(tmp_path, 10).status()
    assert (status.rounds, status.default_pin, status.certificate_sha256) == (2048, None, None)
    with pytest.raises(TokenRefusal) as caught:
        TokenStore(tmp_path, 10).unlock(PIN)
    assert (caught.value.code, caught.value.evidence) == ("token-wrong-pin", "9 of 10 tries left")
    after = TokenStore(tmp_path, 10).unlock("other")
    assert after.certificate == before.certificate
    assert after.private_key.private_numbers() == before.private_key.private_numbers()
    status = TokenStore(tmp_path, 10).status()
    assert (status.rounds, status.default_pin, status.tries_left) == (600_000, False, 10)
    assert status.certificate_sha256
    TokenStore(tmp_path, 10).change_pin("other", PIN)
    by_prompt(tmp_path, "openssl pkcs12 -in testuser.p12 -out again.pem -nodes", PIN)


def test_openssl_sees_the_price_that_we_state(tmp_path: Path, rsa_token: Token) -> None:
    (tmp_path / "own.p12").write_bytes(kit.encoded(rsa_token))
    out = openssl(tmp_path, "pkcs12", "-info", "-in", "own.p12", "-passin", f"pass:{PIN}", "-nodes")
    assert "MAC: sha512, Iteration 600000" in out
    assert "Shrouded Keybag: PBES2, PBKDF2, AES-256-CBC, Iteration 600000, PRF hmacWithSHA256" in out
    assert set(re.findall(r"Iteration (\d+)", out)) == {"600000"}
    assert "friendlyName: trustme token" in out
    ids = re.findall(r"localKeyID: ([0-9A-F ]+)", out)
    assert len(ids) == 2
    assert len(set(ids)) == 1
    pem = out[out.index("-----BEGIN CERTIFICATE") : out.index("-----END CERTIFICATE-----") + 26]
    assert x509.load_pem_x509_certificate(pem.encode()) == rsa_token.certificate


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-legacy",),
        ("-legacy", "-descert"),
        ("-legacy", "-keypbe", "PBE-SHA1-RC2-128", "-certpbe", "PBE-SHA1-2DES"),
        ("-keypbe", "AES-128-CBC", "-certpbe", "AES-192-CBC", "-macalg", "sha1"),
        ("-keypbe", "DES-EDE3-CBC", "-certpbe", "NONE"),
        ("-macalg", "sha384", "-iter", "1"),
        ("-macalg", "sha512", "-name", "gyroidos test user"),
        ("-macalg", "sha224", "-nomaciter"),
    ],
    ids=" ".join,
)
def test_whatever_openssl_exports_is_read_and_encoded_anew(
    tmp_path: Path, rsa_token: Token, options: tuple[str, ...]
) -> None:
    data = exported(tmp_path, rsa_token, *options)
    opened = open_token(data, PIN)
    assert opened.certificate == rsa_token.certificate
    assert opened.rounds <= 2048
    assert needs_upgrade(opened)
    assert refused(data, "x") == "token-wrong-pin"


def test_what_openssl_exports_with_enough_rounds_stays(tmp_path: Path) -> None:
    made = kit.token(ec.generate_private_key(ec.SECP384R1()))
    opened = open_token(exported(tmp_path, made, "-macalg", "sha512", "-iter", "600000"), PIN)
    assert (opened.rounds, needs_upgrade(opened)) == (600_000, False)
    options = ("-macalg", "sha512", "-iter", "600000", "-certpbe", "NONE", "-keypbe", "AES-128-CBC")
    assert needs_upgrade(open_token(exported(tmp_path, made, *options), PIN))
    # The default MAC is half as dear for the same number: one hash a round, HMAC takes two.
    assert needs_upgrade(open_token(exported(tmp_path, made, "-iter", "600000"), PIN))


def test_what_openssl_exports_that_is_no_token(tmp_path: Path, rsa_token: Token) -> None:
    assert refused(exported(tmp_path, rsa_token, "-nokeys")) == "token-no-key"
    assert refused(exported(tmp_path, rsa_token, "-nocerts")) == "token-no-key"
    assert refused(exported(tmp_path, rsa_token, "-nomac")) == "token-malformed"
    assert refused(exported(tmp_path, rsa_token, "-keypbe", "NONE")) == "token-malformed"
    assert refused(exported(tmp_path, rsa_token, "-iter", "2000000")) == "token-kdf-too-costly"
    assert refused((tmp_path / "key.pem").read_bytes()) == "token-malformed"


def test_a_chain_is_kept(tmp_path: Path, rsa_token: Token) -> None:
    other = kit.token()
    data = exported(tmp_path, rsa_token)
    (tmp_path / "chain.pem").write_text(
        other.certificate.public_bytes(Encoding.PEM).decode() + (tmp_path / "cert.pem").read_text()
    )
    data = exported(tmp_path, rsa_token, "-certfile", "chain.pem")
    opened = open_token(data, PIN)
    assert opened.certificate == rsa_token.certificate
    assert other.certificate in opened.others


@pytest.mark.parametrize("pin", ["pässwörd", "🔑 密码", "p a s s"])
def test_pins_mean_the_same_to_openssl(tmp_path: Path, pin: str) -> None:
    """In a UTF-8 locale: it takes the bytes of its input for UTF-8, as the device does."""
    made = kit.token()
    (tmp_path / "own.p12").write_bytes(kit.encoded(made, pin))
    openssl(tmp_path, "pkcs12", "-in", "own.p12", "-passin", f"pass:{pin}", "-nodes", "-out", "x.pem")
    assert open_token(exported(tmp_path, made, pin=pin), pin).certificate == made.certificate


@pytest.mark.parametrize("hash_name", ["sha1", "sha224", "sha256", "sha384", "sha512"])
def test_our_mac_is_theirs(tmp_path: Path, hash_name: str) -> None:
    file = pkcs12.parse(kit.encoded())
    for rounds in (2, 1000):
        data = pkcs12.assemble(file._open_safes, PIN, hash_name=hash_name, rounds=rounds)
        (tmp_path / "own.p12").write_bytes(data)
        out = openssl(tmp_path, "pkcs12", "-info", "-in", "own.p12", "-passin", f"pass:{PIN}", "-noout")
        assert f"MAC: {hash_name}, Iteration {rounds}" in out


def test_a_key_wrapped_with_openssl_as_the_original_does(tmp_path: Path, rsa_token: Token) -> None:
    kit.pem_files(tmp_path, rsa_token)
    key, secret, iv = os.urandom(96), os.urandom(32), os.urandom(16)
    (tmp_path / "plain").write_bytes(key)
    (tmp_path / "secret").write_bytes(secret)
    openssl(
        tmp_path,
        *("pkeyutl", "-encrypt", "-certin", "-inkey", "cert.pem", "-in", "secret", "-out", "ek"),
    )
    openssl(
        tmp_path,
        *("enc", "-aes-256-cbc", "-K", secret.hex(), "-iv", iv.hex(), "-in", "plain", "-out", "ct"),
    )
    ek, ct = (tmp_path / "ek").read_bytes(), (tmp_path / "ct").read_bytes()
    blob = struct.pack("=ii", len(ek), len(ct)) + iv + ek + ct
    assert unwrap_gyroidos(rsa_token, blob) == key


def test_the_library_finds_the_open_key_before_it_decrypts_other_parts(tmp_path: Path) -> None:
    """The reason for the order in `Pkcs12.for_library`: openssl itself derives for the hidden key first."""
    file = pkcs12.parse(kit.encoded())
    identifier, _ = kit.pbes2(PIN, kit.FEW, claimed=softtoken.ROUNDS_CAP)
    hidden = kit.encrypted_safe(PIN, kit.shrouded_bag(identifier, bytes(160)))
    data = pkcs12.assemble((hidden, *file._open_safes), PIN, hash_name="sha256", rounds=2)
    with pytest.raises(ValueError):
        load_pkcs12(data, PIN.encode())
    assert open_token(data, PIN)
