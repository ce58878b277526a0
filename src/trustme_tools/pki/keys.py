# SPDX-License-Identifier: Apache-2.0
"""Private keys: made, encrypted, loaded, used.

id-RSASSA-PSS keys (RFC 4055) are made by the openssl program because `cryptography` cannot. It loads
them as plain RSA keys, so whether a key is to be used with PSS is read from its certificate.
"""

from __future__ import annotations

import getpass
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import PublicKeyAlgorithmOID

from trustme_tools.errors import ToolError
from trustme_tools.tooling import run, secret_file

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

DEVELOPMENT_PASSPHRASE: Final = b"trustme-development"
"""Well known on purpose: it keeps the code paths of a real passphrase alive and protects nothing."""
DEVELOPMENT_MARKER: Final = "DEVELOPMENT-ONLY"
PSS_SALT_LENGTH: Final = 64
"""Bytes; the GyroidOS verifier demands exactly the digest length of SHA-512."""
PASSPHRASE_LIMIT: Final = 1024


class KeyType(Enum):
    """What a key is made as; `bits` only matters for the RSA kinds."""

    RSA = "rsa"
    RSA_PSS = "rsa-pss"
    P384 = "p384"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made. `pkcs8` (PEM, not encrypted) is what still knows id-RSASSA-PSS."""

    type: KeyType
    private: PrivateKey
    pkcs8: bytes

    def __repr__(self) -> str:
        return f"NewKey({self.type.value})"


def generate(key_type: KeyType, bits: int) -> NewKey:
    """Make a key; RSA-4096 takes a second or two."""
    if key_type is KeyType.RSA_PSS:
        options = (
            f"rsa_keygen_bits:{bits}",
            "rsa_pss_keygen_md:sha512",
            "rsa_pss_keygen_mgf1_md:sha512",
            f"rsa_pss_keygen_saltlen:{PSS_SALT_LENGTH}",
        )
        arguments = [word for option in options for word in ("-pkeyopt", option)]
        pem = run("openssl", ["genpkey", "-algorithm", "RSA-PSS", *arguments], purpose="make an RSA-PSS key")
        return NewKey(key_type, _checked(serialization.load_pem_private_key(pem, None)), pem)
    private: PrivateKey
    if key_type is KeyType.RSA:
        private = rsa.generate_private_key(65537, bits)
    else:
        private = ec.generate_private_key(ec.SECP384R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return NewKey(key_type, private, pem)


def encrypt(key: NewKey, passphrase: bytes) -> bytes:
    """Return the key as encrypted PKCS#8 PEM: AES-256-CBC, scrypt (except for the well-known passphrase).

    The well-known passphrase gets openssl's quick PBKDF2: stretching it would only cost time.
    """
    if not passphrase or len(passphrase) > PASSPHRASE_LIMIT or b"\n" in passphrase or b"\0" in passphrase:
        raise ToolError(
            f"a passphrase has 1 to {PASSPHRASE_LIMIT} bytes and no line break",
            "choose another one",
            code="bad-passphrase",
        )
    quick = passphrase == DEVELOPMENT_PASSPHRASE
    if quick and key.type is not KeyType.RSA_PSS:
        return key.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase),
        )
    with secret_file(passphrase) as (descriptor, path):
        return run(
            "openssl",
            [
                "pkcs8",
                "-topk8",
                "-v2",
                "aes-256-cbc",
                *([] if quick else ["-scrypt"]),
                "-passout",
                f"file:{path}",
            ],
            purpose="encrypt a private key",
            stdin=key.pkcs8,
            pass_fds=(descriptor,),
        )


def load(path: Path, passphrase: bytes | None = None) -> PrivateKey:
    """Load a PEM private key.

    Without `passphrase`, a key beside a DEVELOPMENT-ONLY file is opened with the well-known one, and a
    person at a terminal is asked. ToolError("key-unreadable", "passphrase-needed", "wrong-passphrase").
    """
    try:
        pem = path.read_bytes()
    except OSError as exc:
        raise ToolError(
            f"the private key {path} cannot be read: {exc.strerror}",
            "name an existing key, for example PKI_DIRECTORY/ssig_cml.key",
            code="key-unreadable",
        ) from exc
    return load_pem(pem, path, passphrase)


def load_pem(pem: bytes, path: Path, passphrase: bytes | None) -> PrivateKey:
    """As `load`, for bytes that were read already; `path` serves messages and the development marker."""
    try:
        if b"ENCRYPTED" not in pem:
            return _checked(serialization.load_pem_private_key(pem, None))
        word = passphrase if passphrase is not None else _passphrase_for(path)
        return _checked(serialization.load_pem_private_key(pem, word))
    except (ValueError, TypeError) as exc:
        wrong = b"ENCRYPTED" in pem
        raise ToolError(
            f"the private key {path} cannot be opened" + (": wrong passphrase?" if wrong else ""),
            "give the right passphrase with --passphrase-fd" if wrong else "name a PEM (PKCS#8) private key",
            code="wrong-passphrase" if wrong else "key-unreadable",
        ) from exc


def _passphrase_for(path: Path) -> bytes:
    if (path.parent / DEVELOPMENT_MARKER).exists():
        return DEVELOPMENT_PASSPHRASE
    if sys.stdin.isatty():
        return getpass.getpass(f"Passphrase of {path}: ").encode()
    raise ToolError(
        f"the private key {path} is encrypted and no passphrase was given",
        "give it with --passphrase-fd N",
        code="passphrase-needed",
    )


def sign(key: PrivateKey, certificate: x509.Certificate, data: bytes) -> bytes:
    """Return the raw SHA-512 signature of `data` in the scheme that the certificate's key demands.

    id-RSASSA-PSS: PSS, MGF1-SHA512, salt 64; rsaEncryption: PKCS#1 v1.5; ECDSA: DER; Ed25519: pure.
    """
    if isinstance(key, rsa.RSAPrivateKey):
        if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
            pss = padding.PSS(padding.MGF1(hashes.SHA512()), PSS_SALT_LENGTH)
            return key.sign(data, pss, hashes.SHA512())
        return key.sign(data, padding.PKCS1v15(), hashes.SHA512())
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(hashes.SHA512()))
    return key.sign(data)


def public_der(key: PrivateKey | x509.Certificate) -> bytes:
    """Return the SubjectPublicKeyInfo for comparison; id-RSASSA-PSS and rsaEncryption look the same."""
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _checked(key: object) -> PrivateKey:
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise ToolError(
            f"keys of the kind {type(key).__name__} are not used here",
            "use RSA, RSA-PSS, ECDSA P-256/P-384 or Ed25519",
            code="unsupported-key",
        )
    return key
