# SPDX-License-Identifier: Apache-2.0
"""The softtoken: a PKCS#12 file whose key wraps the keys of containers (interop layout: `testuser.p12`).

Rules:
- What the file will cost is read and judged before the PIN is tried: size, rounds, one known form (`pkcs12`).
- A wrong PIN is told from a damaged file by the MAC; nothing else of the file is touched before it fits.
- Whatever a token was made with, what this module writes takes `ROUNDS` for every way to test a PIN.
- The key and its certificate belong together, and are of a strength that may wrap keys.
- No refusal, and no exception below one, holds a PIN or a part of a key.

How dear a guess is. `ROUNDS` is 600,000, both for the encryption (PBKDF2-HMAC-SHA-256; what OWASP asks for
since 2023) and for the MAC (PKCS#12's own derivation, with SHA-512): the two ways to test a PIN on a copied
file, and whoever guesses takes the cheaper. Reckoned with a large graphics card at 2e10 SHA-256 or 7e9
SHA-512 a second (an order of magnitude, not a measurement of ours) that is some 15,000 guesses: a 6-digit
PIN falls in a minute or two, 8 random lower-case letters and digits in years, 10 in thousands of years. No
number of rounds rescues a short PIN; it lives from the counter (`attempts`) and from the file lying on an
encrypted volume. A device pays 0.5 s per unlock (x86 server core: MAC 0.26, key 0.13, checking the key
0.1), and 12 s under full emulation (QEMU's TCG: 5 and 6.7). Twice the rounds would be felt at each start of
a container and gain one bit; OpenSSL's default of 2048 costs a guesser 300 times less. SHA-512 for the MAC,
because it is dearer on a graphics card than SHA-256.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization import pkcs12 as library
from cryptography.x509.oid import NameOID

from trustme_init.errors import TokenRefusal
from trustme_init.tokens import pkcs12

ROUNDS: Final = 600_000
MAC_HASH: Final = "sha512"
ROUNDS_CAP: Final = 4_000_000
"""Of all derivations of a file together: 1.5 s, and 40 s under emulation; `openssl -iter 1000000` fits."""
TOKEN_LIMIT: Final = 64 * 1024
KEY_LIMIT: Final = 3072
"""Bytes of the encrypted private key: RSA-4096 takes 2.5 KiB. Checking a key of 8192 bits takes 3 s."""
PIN_LENGTHS: Final = range(1, 128 + 1)
KEY_BITS: Final = 3072
RSA_BITS: Final = range(2048, 4096 + 1)
FRIENDLY_NAME: Final = "trustme token"
ORGANISATION: Final = "trustme-py"
OAEP: Final = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=None)
"""How a key is encapsulated for an RSA token (`wrapping`)."""

_FACTOR: Final = {
    "pbkdf2-sha256": 1,
    "pbkdf2-sha384": 1,
    "pbkdf2-sha512": 1,
    "pkcs12-sha256": 2,
    "pkcs12-sha384": 1,
    "pkcs12-sha512": 1,
}
"""How many times `ROUNDS` make a derivation as dear as ours (HMAC hashes twice); others never are."""
_CIPHER: Final = "aes-256-cbc"
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
_NO_EXPIRY: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280, section 4.1.2.5: no well-defined expiration date. A container's data must not die of a date."""

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Token:
    """An opened token."""

    certificate: x509.Certificate
    private_key: PrivateKey
    rounds: int
    """The least that any way to test a PIN takes."""
    weak_kdf: bool
    """Whether some way to test a PIN is cheaper than ours."""
    others: tuple[x509.Certificate, ...] = ()
    """Further certificates of the file, kept when it is encoded anew."""

    @property
    def public_key(self) -> PublicKey:
        """The public half of the private key: what `wrapping` asks for, here and below."""
        return self.private_key.public_key()

    def decrypt(self, encapsulated: bytes) -> bytes:
        """Undo RSAES-OAEP with SHA-256; ValueError, also for a key that is not RSA."""
        if not isinstance(self.private_key, rsa.RSAPrivateKey):
            raise ValueError("not an RSA token")  # noqa: TRY004 - the same as for any other wrong content
        return self.private_key.decrypt(encapsulated, OAEP)

    def agree(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        """Return the ECDH secret; ValueError, also for a key of another kind or curve."""
        if not isinstance(self.private_key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an EC token")  # noqa: TRY004 - likewise
        return self.private_key.exchange(ec.ECDH(), peer)


def create(pin: str, *, common_name: str, now: datetime) -> bytes:
    """Return a new token: an RSA-3072 key and a self-signed certificate, CN the device's UUID.

    Raises:
        TokenRefusal: "token-bad-pin".
    """
    check_new_pin(pin)
    key = rsa.generate_private_key(65537, KEY_BITS)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .serial_number(x509.random_serial_number())
        .public_key(key.public_key())
        .not_valid_before(now)
        .not_valid_after(_NO_EXPIRY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _encode(Token(certificate, key, ROUNDS, weak_kdf=False), pin)


def open_token(data: bytes, pin: str) -> Token:
    """Return what a PKCS#12 file holds.

    Raises:
        TokenRefusal: before the PIN is tried "token-too-large", "token-malformed", "token-no-key" and
            "token-kdf-too-costly"; by trying it "token-wrong-pin"; then "token-malformed" (a file that its
            maker damaged), "token-no-key" (no certificate, or of another key) and "token-weak-key".
    """
    file = _affordable(data)
    if not is_text(pin) or not file.is_password(pin):
        raise TokenRefusal(
            "token-wrong-pin",
            "the PIN does not open the token",
            remedy="enter the PIN that was set last",
        )
    try:
        with warnings.catch_warnings():
            # They are about old ciphers, which go at once, and odd certificates, which vouch for nothing.
            warnings.simplefilter("ignore")
            content = library.load_pkcs12(file.for_library(pin), pin.encode())
            certificates = [entry.certificate for entry in (content.cert, *content.additional_certs) if entry]
            for certificate in certificates:
                certificate.public_key()
    except Exception as exc:
        # The content comes from whoever knows the PIN; the library raises more kinds than it documents.
        raise pkcs12.malformed(f"what it encrypts cannot be read: {type(exc).__name__}") from exc
    key = _strong(content.key)
    if content.cert is None:  # the library's `cert` is the one with the key, whatever the file says
        raise TokenRefusal(
            "token-no-key",
            "the token has no certificate for its private key",
            evidence=f"{len(certificates)} certificates",
            remedy="export the key together with the certificate that was issued for it",
        )
    return Token(
        certificate=content.cert.certificate,
        private_key=key,
        rounds=min(each.rounds for each in file.derivations),
        weak_kdf=_is_weak(file),
        others=tuple(entry.certificate for entry in content.additional_certs),
    )


def needs_upgrade(token: Token) -> bool:
    """Whether somebody who copied the token guesses its PIN more cheaply than one of ours."""
    return token.weak_kdf


def reencode(token: Token, pin: str) -> bytes:
    """Return the same key and certificates as this module encodes them, under `pin`.

    Raises:
        TokenRefusal: "token-bad-pin".
    """
    check_new_pin(pin)
    return _encode(token, pin)


def upgraded(token: Token) -> Token:
    """Return the token as it is after `reencode`."""
    return replace(token, rounds=ROUNDS, weak_kdf=False)


@dataclass(frozen=True, slots=True)
class Appearance:
    """What a token shows without its PIN."""

    rounds: int
    weak_kdf: bool
    certificates: tuple[bytes, ...]
    """Those that stand in the open, DER; of a token that we encoded all, its own first."""


def inspect(data: bytes) -> Appearance:
    """Return what can be said about a token without its PIN.

    Raises:
        TokenRefusal: what `open_token` raises before it tries a PIN.
    """
    file = _affordable(data)
    return Appearance(min(each.rounds for each in file.derivations), _is_weak(file), file.certificates)


def check_new_pin(pin: str) -> None:
    """TokenRefusal("token-bad-pin") unless `pin` is 1 to 128 printable characters."""
    if len(pin) not in PIN_LENGTHS or not pin.isprintable():
        raise TokenRefusal(
            "token-bad-pin",
            "this cannot be a PIN",
            evidence=f"{len(pin)} characters" if len(pin) not in PIN_LENGTHS else "not all are printable",
            remedy=f"choose {PIN_LENGTHS[0]} to {PIN_LENGTHS[-1]} printable characters",
        )


def _affordable(data: bytes) -> pkcs12.Pkcs12:
    if len(data) > TOKEN_LIMIT:
        raise too_large(f"more than {TOKEN_LIMIT} bytes")
    file = pkcs12.parse(data)
    rounds = sum(each.rounds for each in file.derivations)
    if rounds > ROUNDS_CAP:
        # The number may be of any length.
        asked = str(rounds) if rounds < 10**12 else "over 10^12"
        raise TokenRefusal(
            "token-kdf-too-costly",
            "the token asks for more computing than a device may be kept busy with",
            evidence=f"{asked} rounds, {ROUNDS_CAP} at most",
            remedy="export it with fewer: `openssl pkcs12 -export -iter 600000`",
        )
    if file.key_size > KEY_LIMIT:
        raise too_large(f"a private key of {file.key_size} bytes, at most {KEY_LIMIT}")
    return file


def too_large(evidence: str) -> TokenRefusal:
    """Return the refusal of a file, or of a key, that is larger than is read."""
    return TokenRefusal(
        "token-too-large",
        "the token is larger than a key and its certificates are",
        evidence=evidence,
        remedy=f"use an RSA key of up to {RSA_BITS[-1]} bits, and leave out certificates of others",
    )


def is_text(pin: str) -> bool:
    """Whether a password can be this: half a surrogate pair has no encoding, and that error quotes it all."""
    return not any("\ud800" <= character <= "\udfff" for character in pin)


def _is_weak(file: pkcs12.Pkcs12) -> bool:
    return any(
        each.kdf not in _FACTOR
        or each.rounds < ROUNDS * _FACTOR[each.kdf]
        or each.cipher not in ("", _CIPHER)
        for each in file.derivations
    )


def _strong(key: object) -> PrivateKey:
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size in RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES):
        return key
    raise TokenRefusal(
        "token-weak-key",
        "the token's key is of a kind or size that may not wrap keys",
        evidence=f"{type(key).__name__}, {getattr(key, 'key_size', 'no')} bits",
        remedy=f"use RSA of {RSA_BITS[0]} to {RSA_BITS[-1]} bits, or ECDSA on P-256 or P-384",
    )


def _encode(token: Token, pin: str) -> bytes:
    """Encode as PKCS#12: the library encrypts, `pkcs12` puts a MAC of the same price around it.

    The certificates stand in the open: they are no secret, `inspect` can name them, and unlocking saves the
    derivation that would hide them.
    """
    encryption = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(ROUNDS)
        .key_cert_algorithm(library.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(pin.encode())
    )
    encoded = library.serialize_key_and_certificates(
        FRIENDLY_NAME.encode(), token.private_key, token.certificate, None, encryption
    )
    file = pkcs12.parse(encoded)
    certificates = tuple(each.public_bytes(Encoding.DER) for each in (token.certificate, *token.others))
    safes = (pkcs12.certificate_safe(certificates, file.key_attributes), file.key_safe)
    return pkcs12.assemble(safes, pin, hash_name=MAC_HASH, rounds=ROUNDS)
