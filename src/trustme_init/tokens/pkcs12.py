# SPDX-License-Identifier: Apache-2.0
"""A PKCS#12 file (RFC 7292) as the device reads and writes it: what it costs is known before it is paid.

`cryptography` does the encryption. What it cannot do is done here: say how many rounds a file asks for, tell
a wrong password from a damaged file, and make a MAC that is as hard to guess by as the encryption (its own
has 2048 rounds whatever one asks for, and whoever guesses takes the cheapest way).

Rules:
- The file is DER, and protected by a password MAC (section 4, MacData). Without one, damage and a wrong
  password are the same thing, and anybody can change the file.
- The MAC is verified before anything is decrypted.
- There is exactly one private key: encrypted, in a part that is not itself encrypted, as every known writer
  has it. So every key derivation stands in the open; the library gets the file in an order in which it has
  found this key before it decrypts the other parts, and derives nothing for a key hidden in those.
- Known derivations only: PBES2 with PBKDF2 (RFC 8018), and the PKCS#12 ones that OpenSSL used to make.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from typing import Final, NamedTuple

from trustme_init.errors import TokenRefusal
from trustme_init.tokens import der
from trustme_init.tokens.der import DerError, Reader

SALT_BYTES: Final = 16

# Contents of OBJECT IDENTIFIERs.
_DATA: Final = bytes.fromhex("2a864886f70d010701")
_ENCRYPTED_DATA: Final = bytes.fromhex("2a864886f70d010706")
_BAG: Final = bytes.fromhex("2a864886f70d010c0a01")
"""The bag types are this and one byte (RFC 7292, section 4.2)."""
_KEY_BAG: Final = _BAG + b"\1"
_SHROUDED_KEY_BAG: Final = _BAG + b"\2"
_CERTIFICATE_BAG: Final = _BAG + b"\3"
_X509: Final = bytes.fromhex("2a864886f70d01091601")
_PBES2: Final = bytes.fromhex("2a864886f70d01050d")
_PBKDF2: Final = bytes.fromhex("2a864886f70d01050c")
_HMACS: Final = {
    bytes.fromhex("2a864886f70d0207"): "sha1",
    bytes.fromhex("2a864886f70d0208"): "sha224",
    bytes.fromhex("2a864886f70d0209"): "sha256",
    bytes.fromhex("2a864886f70d020a"): "sha384",
    bytes.fromhex("2a864886f70d020b"): "sha512",
}
_CIPHERS: Final = {
    bytes.fromhex("60864801650304012a"): "aes-256-cbc",
    bytes.fromhex("608648016503040116"): "aes-192-cbc",
    bytes.fromhex("608648016503040102"): "aes-128-cbc",
    bytes.fromhex("2a864886f70d0307"): "3des-cbc",
}
_PBE: Final = {
    bytes.fromhex("2a864886f70d010c0103"): "3des-cbc",
    bytes.fromhex("2a864886f70d010c0104"): "3des-112-cbc",
    bytes.fromhex("2a864886f70d010c0105"): "rc2-128-cbc",
    bytes.fromhex("2a864886f70d010c0106"): "rc2-40-cbc",
}
_MAC_HASHES: Final = {
    bytes.fromhex("2b0e03021a"): "sha1",
    bytes.fromhex("608648016503040204"): "sha224",
    bytes.fromhex("608648016503040201"): "sha256",
    bytes.fromhex("608648016503040202"): "sha384",
    bytes.fromhex("608648016503040203"): "sha512",
}
_OID_OF_MAC_HASH: Final = {name: oid for oid, name in _MAC_HASHES.items()}
_MAC_ID: Final = 3
"""What the key is for (RFC 7292, appendix B.3)."""
_DERIVED_BYTES: Final = 64
"""More than any cipher here takes; PBKDF2's output length is another way to ask for work."""


class Derivation(NamedTuple):
    """One way to test a password against the file: what it protects, how it derives, how often it repeats."""

    protects: str
    """"mac", "key" or "certificates"."""
    kdf: str
    """"pbkdf2-<hash>" or "pkcs12-<hash>"."""
    cipher: str
    """Of what is protected; empty for the MAC."""
    rounds: int


@dataclass(frozen=True, slots=True)
class _Mac:
    hash_name: str
    salt: bytes
    rounds: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Pkcs12:
    """A PKCS#12 file whose form is known; nothing of it is verified or decrypted yet."""

    derivations: tuple[Derivation, ...]
    certificates: tuple[bytes, ...]
    """Those that stand in the open, DER."""
    key_attributes: bytes
    """The SET of attributes that the private key carries; empty if none."""
    key_safe: bytes
    """The ContentInfo with the private key."""
    key_size: int
    """Bytes of the encrypted private key."""
    _content: bytes
    _mac: _Mac
    _open_safes: tuple[bytes, ...]
    _encrypted_safes: tuple[bytes, ...]

    def is_password(self, password: str) -> bool:
        """Whether the MAC is one by this password, at the price of `derivations`' "mac"."""
        mac = self._mac
        key = mac_key(password, mac.salt, mac.rounds, mac.hash_name)
        return hmac.compare_digest(hmac.digest(key, self._content, mac.hash_name), mac.digest)

    def for_library(self, password: str) -> bytes:
        """Return the file as the library may have it, its password being known to be right.

        The part with the key comes first (see the module's rules). The MAC has two rounds (DER has no
        way to write one): it has been verified, and the library computes it once more.
        """
        return assemble((*self._open_safes, *self._encrypted_safes), password, hash_name="sha256", rounds=2)


def mac_key(password: str, salt: bytes, rounds: int, hash_name: str) -> bytes:
    """Derive a MAC key (RFC 7292, appendix B.2): of the hash's length, so that one block of output does."""
    new = getattr(hashlib, hash_name)
    block = new().block_size
    text = password.encode("utf-16-be") + b"\0\0"
    value: bytes = new(bytes([_MAC_ID]) * block + _fill(salt, block) + _fill(text, block)).digest()
    for _ in range(rounds - 1):
        value = new(value).digest()
    return value


def assemble(safes: tuple[bytes, ...], password: str, *, hash_name: str, rounds: int) -> bytes:
    """Return a PFX of these ContentInfos, with a MAC of 2 rounds or more (RFC 7292, section 4)."""
    content = der.element(der.SEQUENCE, *safes)
    salt = os.urandom(SALT_BYTES)
    digest = hmac.digest(mac_key(password, salt, rounds, hash_name), content, hash_name)
    algorithm = der.element(
        der.SEQUENCE, der.element(der.OID, _OID_OF_MAC_HASH[hash_name]), der.element(der.NULL)
    )
    return der.element(
        der.SEQUENCE,
        der.integer(3),
        _data(content),
        der.element(
            der.SEQUENCE,
            der.element(der.SEQUENCE, algorithm, der.element(der.OCTET_STRING, digest)),
            der.element(der.OCTET_STRING, salt),
            der.integer(rounds),
        ),
    )


def certificate_safe(certificates: tuple[bytes, ...], attributes: bytes) -> bytes:
    """Return a ContentInfo with certificates (DER) in the open; the first has the attributes (a SET)."""
    bags = [
        der.element(
            der.SEQUENCE,
            der.element(der.OID, _CERTIFICATE_BAG),
            der.element(
                der.EXPLICIT_0,
                der.element(
                    der.SEQUENCE,
                    der.element(der.OID, _X509),
                    der.element(der.EXPLICIT_0, der.element(der.OCTET_STRING, certificate)),
                ),
            ),
            attributes if index == 0 else b"",
        )
        for index, certificate in enumerate(certificates)
    ]
    return _data(der.element(der.SEQUENCE, *bags))


def parse(data: bytes) -> Pkcs12:
    """Return the parts of a PKCS#12 file without computing anything.

    Raises:
        TokenRefusal: "token-malformed", or "token-no-key" where no private key stands where it should.
    """
    try:
        return _parse(data)
    except DerError as exc:
        raise malformed(str(exc)) from exc


def malformed(evidence: str) -> TokenRefusal:
    """Return the refusal of a file that is no PKCS#12 file as the rules want it."""
    return TokenRefusal(
        "token-malformed",
        "the token is not a PKCS#12 file that this device can read",
        evidence=evidence,
        remedy="make it with `openssl pkcs12 -export`, without options on its algorithms",
    )


def _parse(data: bytes) -> Pkcs12:
    outer = Reader(data)
    pfx = outer.enter(der.SEQUENCE)
    outer.end()
    if pfx.integer() != 3:
        raise DerError("not version 3")
    content = _content_of(pfx.enter(der.SEQUENCE), _DATA, der.OCTET_STRING)
    if not pfx.more():
        raise DerError("there is no MAC")
    mac = _mac(pfx.enter(der.SEQUENCE))
    pfx.end()

    found = _Found([Derivation("mac", f"pkcs12-{mac.hash_name}", "", mac.rounds)])
    whole = Reader(content)
    safes = whole.enter(der.SEQUENCE)
    whole.end()
    while safes.more():
        found.take(safes.raw(der.SEQUENCE))
    if len(found.key_safes) > 1:
        raise DerError("there are several private keys")
    if not found.key_safes:
        raise TokenRefusal(
            "token-no-key",
            "the token has no encrypted private key",
            evidence=f"{len(found.open_safes)} open and {len(found.encrypted_safes)} encrypted parts",
            remedy="export it with its private key: `openssl pkcs12 -export -in mycert.pem`",
        )
    return Pkcs12(
        derivations=tuple(found.derivations),
        certificates=tuple(found.certificates),
        key_attributes=found.key_attributes,
        key_safe=found.key_safes[0],
        key_size=found.key_size,
        _content=content,
        _mac=mac,
        _open_safes=tuple(found.open_safes),
        _encrypted_safes=tuple(found.encrypted_safes),
    )


class _Found:
    """What the parts of an AuthenticatedSafe hold (RFC 7292, sections 4.1 and 4.2)."""

    def __init__(self, derivations: list[Derivation]) -> None:
        self.derivations = derivations
        self.certificates: list[bytes] = []
        self.key_attributes = b""
        self.key_safes: list[bytes] = []
        self.key_size = 0
        self.open_safes: list[bytes] = []
        self.encrypted_safes: list[bytes] = []

    def take(self, safe: bytes) -> None:
        """Sort one ContentInfo in."""
        if Reader(safe).enter(der.SEQUENCE).element(der.OID) == _ENCRYPTED_DATA:
            self._encrypted(safe)
            return
        whole = Reader(_content_of(Reader(safe).enter(der.SEQUENCE), _DATA, der.OCTET_STRING))
        bags = whole.enter(der.SEQUENCE)
        whole.end()
        while bags.more():
            self._bag(bags.enter(der.SEQUENCE), safe)
        self.open_safes.append(safe)

    def _encrypted(self, safe: bytes) -> None:
        # EncryptedData (RFC 2315, section 13): version 0, then what, how and the bytes
        encrypted = Reader(_content_of(Reader(safe).enter(der.SEQUENCE), _ENCRYPTED_DATA, der.SEQUENCE))
        if encrypted.integer() != 0:
            raise DerError("encrypted data is not version 0")
        info = encrypted.enter(der.SEQUENCE)
        encrypted.end()
        if info.element(der.OID) != _DATA:
            raise DerError("encrypted data is not of plain data")
        self.derivations.append(_encryption("certificates", info.enter(der.SEQUENCE)))
        info.element(der.IMPLICIT_0)
        info.end()
        self.encrypted_safes.append(safe)

    def _bag(self, bag: Reader, safe: bytes) -> None:
        kind = bag.element(der.OID)
        value = bag.enter(der.EXPLICIT_0)
        attributes = bag.raw(der.SET) if bag.more() else b""
        bag.end()
        if kind == _SHROUDED_KEY_BAG:
            # EncryptedPrivateKeyInfo (RFC 5958, section 3)
            key = value.enter(der.SEQUENCE)
            self.derivations.append(_encryption("key", key.enter(der.SEQUENCE)))
            self.key_size = len(key.element(der.OCTET_STRING))
            key.end()
            self.key_safes.append(safe)
            self.key_attributes = attributes
        elif kind == _CERTIFICATE_BAG:
            certificate = value.enter(der.SEQUENCE)
            if certificate.element(der.OID) != _X509:
                raise DerError("a certificate is not an X.509 one")
            wrapped = certificate.enter(der.EXPLICIT_0)
            certificate.end()
            self.certificates.append(wrapped.element(der.OCTET_STRING))
            wrapped.end()
        elif kind == _KEY_BAG:
            raise DerError("a private key is not encrypted")
        else:
            raise DerError("there is something else than a key and certificates")
        value.end()


def _content_of(content_info: Reader, kind: bytes, tag: int) -> bytes:
    """Take the content of a ContentInfo (RFC 2315, section 7): one element, nothing beside it."""
    if content_info.element(der.OID) != kind:
        raise DerError("a part is of another type than wanted here")
    explicit = content_info.enter(der.EXPLICIT_0)
    content_info.end()
    content = explicit.element(tag)
    explicit.end()
    return content


def _mac(mac: Reader) -> _Mac:
    digest_info = mac.enter(der.SEQUENCE)
    algorithm = digest_info.enter(der.SEQUENCE)
    hash_name = _known(_MAC_HASHES, algorithm.element(der.OID), "the MAC's algorithm")
    _null_or_nothing(algorithm)
    digest = digest_info.element(der.OCTET_STRING)
    digest_info.end()
    salt = mac.element(der.OCTET_STRING)
    rounds = _rounds(mac) if mac.more() else 1
    mac.end()
    return _Mac(hash_name, salt, rounds, digest)


def _encryption(protects: str, algorithm: Reader) -> Derivation:
    """Read an AlgorithmIdentifier of encryption by password (RFC 8018, appendix A; RFC 7292, appendix C)."""
    scheme = algorithm.element(der.OID)
    parameters = algorithm.enter(der.SEQUENCE)
    algorithm.end()
    if scheme != _PBES2:
        cipher = _known(_PBE, scheme, "an encryption")
        parameters.element(der.OCTET_STRING)
        rounds = _rounds(parameters)
        parameters.end()
        return Derivation(protects, "pkcs12-sha1", cipher, rounds)
    derivation = parameters.enter(der.SEQUENCE)
    encryption = parameters.enter(der.SEQUENCE)
    parameters.end()
    if derivation.element(der.OID) != _PBKDF2:
        raise DerError("a key derivation is not PBKDF2")
    pbkdf2 = derivation.enter(der.SEQUENCE)
    derivation.end()
    pbkdf2.element(der.OCTET_STRING)
    rounds = _rounds(pbkdf2)
    if pbkdf2.follows(der.INTEGER) and pbkdf2.integer() > _DERIVED_BYTES:
        raise DerError("a derived key is longer than any cipher takes")
    prf = "sha1"
    if pbkdf2.more():
        function = pbkdf2.enter(der.SEQUENCE)
        prf = _known(_HMACS, function.element(der.OID), "a key derivation's function")
        _null_or_nothing(function)
    pbkdf2.end()
    cipher = _known(_CIPHERS, encryption.element(der.OID), "a cipher")
    encryption.element(der.OCTET_STRING)
    encryption.end()
    return Derivation(protects, f"pbkdf2-{prf}", cipher, rounds)


def _rounds(reader: Reader) -> int:
    rounds = reader.integer()
    if rounds == 0:
        raise DerError("a number of rounds is zero")
    return rounds


def _known(names: dict[bytes, str], oid: bytes, what: str) -> str:
    if oid not in names:
        raise DerError(f"{what} is unknown: {oid.hex()}")
    return names[oid]


def _null_or_nothing(reader: Reader) -> None:
    if reader.more() and reader.element(der.NULL):
        raise DerError("a NULL is not empty")
    reader.end()


def _fill(text: bytes, block: int) -> bytes:
    """Repeat up to a multiple of the block length."""
    size = -(-len(text) // block) * block
    return (text * (size // len(text) + 1))[:size] if text else b""


def _data(content: bytes) -> bytes:
    return der.element(
        der.SEQUENCE,
        der.element(der.OID, _DATA),
        der.element(der.EXPLICIT_0, der.element(der.OCTET_STRING, content)),
    )
