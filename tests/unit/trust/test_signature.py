# SPDX-License-Identifier: Apache-2.0
"""Detached signatures, with the openssl program as the other side in both directions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tests.unit.trust.pki import LEAF, issue, openssl
from trustme_init.errors import TrustRefusal
from trustme_init.trust.signature import SIGNATURE_LIMIT, verify_signature

if TYPE_CHECKING:
    from tests.unit.trust.conftest import PssPki

DATA = b'name: "trustme-coreos"\nversion: 1\n' * 20
PSS_OPTIONS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-1")


@dataclass(frozen=True)
class Signer:
    """A leaf, its key as a file for openssl, and how openssl signs with it."""

    leaf: x509.Certificate
    key_file: Path
    options: tuple[str, ...] = ()
    raw: bool = False

    def sign(self, data: bytes, *options: str) -> bytes:
        if self.raw:
            source = self.key_file.with_suffix(".data")
            source.write_bytes(data)
            return openssl("pkeyutl", "-sign", "-rawin", "-inkey", self.key_file, "-in", source)
        digest = ("-sha512",) if not any(option.startswith("-sha") for option in options) else ()
        return openssl(
            "dgst", *digest, *options, "-sign", self.key_file, *(self.options), "-binary", stdin=data
        )

    def openssl_accepts(self, data: bytes, signature: bytes) -> bool:
        place = self.key_file.parent
        (place / "data").write_bytes(data)
        (place / "signature").write_bytes(signature)
        public = place / "public.pem"
        public.write_bytes(openssl("pkey", "-in", self.key_file, "-pubout"))
        if self.raw:
            command = ["pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(public), "-in", "data"]
            command += ["-sigfile", "signature"]
        else:
            command = ["dgst", "-sha512", "-verify", str(public), *self.options]
            command += ["-signature", "signature", "data"]
        result = subprocess.run(["openssl", *command], cwd=place, capture_output=True, check=False)
        return result.returncode == 0


@pytest.fixture(scope="session")
def signers(pss: PssPki, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Signer]:
    place = tmp_path_factory.mktemp("signers")
    made = {"rsa-pss": Signer(pss.leaf, pss.leaf_key, PSS_OPTIONS)}
    keys = {
        "rsa": load_pem_private_key(pss.root_key.read_bytes(), None),
        "p256": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in keys.items():
        path = place / f"{name}.key"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        made[name] = Signer(issue(LEAF, key=key).certificate, path, raw=name == "ed25519")
    return made


@pytest.fixture(params=["rsa-pss", "rsa", "p256", "p384", "ed25519"])
def signer(signers: dict[str, Signer], request: pytest.FixtureRequest) -> Signer:
    return signers[request.param]


def code_of(leaf: x509.Certificate, signature: bytes, data: bytes = DATA) -> str:
    with pytest.raises(TrustRefusal) as caught:
        verify_signature(leaf, signature, data)
    assert caught.value.cause
    return caught.value.code


def test_openssl_signs_and_we_accept(signer: Signer) -> None:
    verify_signature(signer.leaf, signer.sign(DATA), DATA)


def flips(data: bytes, count: int) -> Iterator[bytes]:
    step = max(1, len(data) // count)
    for position in range(0, len(data), step):
        for mask in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[position] ^= mask
            yield bytes(damaged)


def test_row2_any_flipped_byte_is_refused(signer: Signer) -> None:
    signature = signer.sign(DATA)
    for damaged in flips(signature, 60):
        assert code_of(signer.leaf, damaged) == "bad-signature"
    for damaged in flips(DATA, 60):
        assert code_of(signer.leaf, signature, damaged) == "bad-signature"


def test_openssl_refuses_the_same(signer: Signer) -> None:
    signature = signer.sign(DATA)
    assert signer.openssl_accepts(DATA, signature)
    for damaged in (*flips(signature, 2), signature[:-1]):
        assert not signer.openssl_accepts(DATA, damaged)
        assert code_of(signer.leaf, damaged) == "bad-signature"
    assert not signer.openssl_accepts(DATA + b"\n", signature)


def test_we_sign_and_openssl_accepts(signers: dict[str, Signer]) -> None:
    for name, signer in signers.items():
        key = load_pem_private_key(signer.key_file.read_bytes(), None)
        sha512 = hashes.SHA512()
        if isinstance(key, rsa.RSAPrivateKey):
            pss = padding.PSS(padding.MGF1(sha512), 64)
            signature = key.sign(DATA, pss if name == "rsa-pss" else padding.PKCS1v15(), sha512)
        elif isinstance(key, ec.EllipticCurvePrivateKey):
            signature = key.sign(DATA, ec.ECDSA(sha512))
        else:
            assert isinstance(key, ed25519.Ed25519PrivateKey)
            signature = key.sign(DATA)
        verify_signature(signer.leaf, signature, DATA)
        assert signer.openssl_accepts(DATA, signature), name


def test_row2_truncated_and_lengthened(signer: Signer) -> None:
    signature = signer.sign(DATA)
    assert code_of(signer.leaf, b"") == "signature-size"
    assert code_of(signer.leaf, signature + bytes(SIGNATURE_LIMIT)) == "signature-size"
    for length in range(1, len(signature), 7):
        assert code_of(signer.leaf, signature[:length]) == "bad-signature"
    assert code_of(signer.leaf, signature + b"\0") == "bad-signature"
    assert code_of(signer.leaf, bytes(SIGNATURE_LIMIT)) == "bad-signature"


def test_row3_signature_of_another_key(signers: dict[str, Signer]) -> None:
    made = {name: signer.sign(DATA) for name, signer in signers.items()}
    for name, signer in signers.items():
        for other, signature in made.items():
            if other != name:
                assert code_of(signer.leaf, signature) == "bad-signature"


@pytest.mark.parametrize("digest", ["-sha1", "-sha256", "-sha384"])
@pytest.mark.parametrize("kind", ["rsa", "p256", "p384"])
def test_only_sha512(signers: dict[str, Signer], kind: str, digest: str) -> None:
    assert code_of(signers[kind].leaf, signers[kind].sign(DATA, digest)) == "bad-signature"


def test_key_decides_the_scheme(signers: dict[str, Signer]) -> None:
    # A PSS signature by a plain RSA key (as upstream's sign_config.sh makes with ssig.key) does not verify,
    # nor does the reverse.
    plain = Signer(signers["rsa"].leaf, signers["rsa"].key_file, PSS_OPTIONS)
    assert code_of(plain.leaf, plain.sign(DATA)) == "bad-signature"
    key = load_pem_private_key(signers["rsa-pss"].key_file.read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    sha512 = hashes.SHA512()
    assert code_of(signers["rsa-pss"].leaf, key.sign(DATA, padding.PKCS1v15(), sha512)) == "bad-signature"


@pytest.mark.parametrize("options", [
    ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-3"),
    ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"),
    ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:0"),
    (*PSS_OPTIONS, "-sigopt", "rsa_mgf1_md:sha256"),
])  # fmt: skip
def test_parameters_of_pss(signers: dict[str, Signer], options: tuple[str, ...]) -> None:
    other = Signer(signers["rsa-pss"].leaf, signers["rsa-pss"].key_file, options)
    assert code_of(other.leaf, other.sign(DATA)) == "bad-signature"


def test_weak_keys_are_refused_here_too() -> None:
    key = ec.generate_private_key(ec.SECP521R1())
    signature = key.sign(DATA, ec.ECDSA(hashes.SHA512()))
    assert code_of(issue(LEAF, key=key).certificate, signature) == "weak-key"
