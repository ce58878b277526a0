# SPDX-License-Identifier: Apache-2.0
"""Tokens of every kind, good and bad, for the tests of this room."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from trustme_init.tokens import der, pkcs12, softtoken
from trustme_init.tokens.softtoken import PrivateKey, Token

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PIN = "correct horse"
CANARY = "k4nari-PIN-81c2"
FEW = 16
"""Rounds where the subject is not what they cost; `softtoken.ROUNDS` is set to this then."""
PASSWORD_OIDS = {"pbes2": "2a864886f70d01050d", "pbkdf2": "2a864886f70d01050c"}


def openssl(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["openssl", *arguments], cwd=directory, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def certificate_for(key: PrivateKey, name: str = "token") -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(datetime(2030, 1, 1, tzinfo=UTC))
        .sign(key, hashes.SHA256())
    )


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def token(key: PrivateKey | None = None) -> Token:
    key = key or ec.generate_private_key(ec.SECP256R1())
    return Token(certificate_for(key), key, softtoken.ROUNDS, weak_kdf=False)


def encoded(made: Token | None = None, pin: str = PIN) -> bytes:
    return softtoken.reencode(made or token(), pin)


def pem_files(directory: Path, made: Token) -> None:
    """Write `key.pem` and `cert.pem`."""
    (directory / "key.pem").write_bytes(
        made.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    (directory / "cert.pem").write_bytes(made.certificate.public_bytes(Encoding.PEM))


def pbes2(password: str, rounds: int, *, claimed: int | None = None) -> tuple[bytes, Cipher[modes.CBC]]:
    """Return an AlgorithmIdentifier and its cipher; it may claim other rounds than the cipher's key took."""
    salt, iv = os.urandom(16), os.urandom(16)
    kdf = der.element(
        der.SEQUENCE,
        der.element(der.OCTET_STRING, salt),
        der.integer(claimed or rounds),
        der.element(
            der.SEQUENCE,
            der.element(der.OID, bytes.fromhex("2a864886f70d0209")),
            der.element(der.NULL),
        ),
    )
    identifier = der.element(
        der.SEQUENCE,
        der.element(der.OID, bytes.fromhex(PASSWORD_OIDS["pbes2"])),
        der.element(
            der.SEQUENCE,
            der.element(der.SEQUENCE, der.element(der.OID, bytes.fromhex(PASSWORD_OIDS["pbkdf2"])), kdf),
            der.element(
                der.SEQUENCE,
                der.element(der.OID, bytes.fromhex("60864801650304012a")),
                der.element(der.OCTET_STRING, iv),
            ),
        ),
    )
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, rounds, 32)
    return identifier, Cipher(algorithms.AES256(key), modes.CBC(iv))


def key_safe(password: str, *, claimed: int | None = None, contents: bytes | None = None) -> bytes:
    """Return a ContentInfo with an encrypted private key, or with what is to pass for one."""
    identifier, cipher = pbes2(password, FEW, claimed=claimed)
    made = ec.generate_private_key(ec.SECP256R1())
    plain = made.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return pkcs12._data(
        der.element(der.SEQUENCE, shrouded_bag(identifier, contents or _encrypt(cipher, plain)))
    )


def shrouded_bag(identifier: bytes, contents: bytes) -> bytes:
    return der.element(
        der.SEQUENCE,
        der.element(der.OID, bytes.fromhex("2a864886f70d010c0a0102")),
        der.element(
            der.EXPLICIT_0,
            der.element(der.SEQUENCE, identifier, der.element(der.OCTET_STRING, contents)),
        ),
    )


def encrypted_safe(password: str, bags: bytes, *, claimed: int | None = None, version: int = 0) -> bytes:
    """Return a ContentInfo of EncryptedData with these SafeBags."""
    identifier, cipher = pbes2(password, FEW, claimed=claimed)
    return _encrypted_data(identifier, _encrypt(cipher, der.element(der.SEQUENCE, bags)), version)


def legacy_safe() -> bytes:
    """Return what only looks like a part encrypted with RC2."""
    parameters = der.element(der.SEQUENCE, der.element(der.OCTET_STRING, bytes(8)), der.integer(FEW))
    name = der.element(der.OID, bytes.fromhex("2a864886f70d010c0106"))
    return _encrypted_data(der.element(der.SEQUENCE, name, parameters), bytes(64), 0)


def _encrypted_data(identifier: bytes, contents: bytes, version: int) -> bytes:
    info = der.element(
        der.SEQUENCE,
        der.element(der.OID, bytes.fromhex("2a864886f70d010701")),
        identifier,
        der.element(der.IMPLICIT_0, contents),
    )
    return der.element(
        der.SEQUENCE,
        der.element(der.OID, bytes.fromhex("2a864886f70d010706")),
        der.element(der.EXPLICIT_0, der.element(der.SEQUENCE, der.integer(version), info)),
    )


@dataclass
class Node:
    """One element of a DER tree; `inside` are elements, or the bytes of a primitive."""

    tag: int
    inside: list[Node] | bytes

    @classmethod
    def of(cls, data: bytes, closed: bytes) -> Node:
        """Return the tree of one element, with those inside OCTET STRINGs, except inside that of `closed`."""
        tag = data[0]
        contents = der.Reader(data).element(tag)
        hides_der = tag == der.OCTET_STRING and contents[:1] == b"\x30" and contents != closed
        if not (tag & 0x20 or hides_der):
            return cls(tag, contents)
        reader, inside = der.Reader(contents), []
        try:
            while reader.more():
                inside.append(cls.of(reader.raw(contents[reader._at]), closed))
        except der.DerError:
            return cls(tag, contents)
        return cls(tag, inside)

    def encode(self) -> bytes:
        inside = self.inside
        return der.element(
            self.tag, inside if isinstance(inside, bytes) else b"".join(each.encode() for each in inside)
        )

    def everywhere(self) -> Iterator[list[Node]]:
        """Iterate over the lists of elements in this and below it, except attributes, which are free."""
        if not isinstance(self.inside, bytes) and self.tag != der.SET:
            yield self.inside
            for each in self.inside:
                yield from each.everywhere()


def _encrypt(cipher: Cipher[modes.CBC], plain: bytes) -> bytes:
    padder = PKCS7(128).padder()
    encryptor = cipher.encryptor()
    return encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
