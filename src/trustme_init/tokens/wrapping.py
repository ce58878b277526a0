# SPDX-License-Identifier: Apache-2.0
"""Wrapping a container's key with a token, and reading what GyroidOS wrapped.

A wrapped key is, with numbers big-endian:

    "TMWK"  version 1 (1 byte)  method (1)  length (2)  encapsulation of this length  nonce (12)  ciphertext

with AES-256-GCM, the tag of 16 bytes at the end of the ciphertext. All that stands before the nonce, and the
context (which container the key is for), are authenticated with it. A fresh AES key serves one wrapping:
- method 1, an RSA token: encapsulated by RSAES-OAEP with SHA-256 (RFC 8017, section 7.1);
- method 2, an EC token: the encapsulation is an ephemeral public key (uncompressed point), and the AES key
  HKDF-SHA-256 (RFC 5869) of the shared secret, both public keys going into its `info`.

Wrapping needs the public key only, so it works while the token is locked; and anybody who has the certificate
can make a wrapped key. It shows that it is whole and for this token and container, not who made it.
"""

from __future__ import annotations

import os
import struct
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from trustme_init.errors import TokenRefusal
from trustme_init.tokens.softtoken import OAEP, PublicKey, Token

MAGIC: Final = b"TMWK"
VERSION: Final = 1
WRAPPED_LIMIT: Final = 4096
"""Bytes of a wrapped key of either form; ours of a 96-byte key with RSA-4096 has 644."""
KEY_LENGTHS: Final = range(16, 1024 + 1)
GYROIDOS_KEY_BYTES: Final = 96
"""64 for AES-256-XTS and 32 for HMAC-SHA-256 (interop notes, 2.7)."""

_RSA: Final = 1
_ECDH: Final = 2
_HEADER: Final = struct.Struct(">4sBBH")
_NONCE: Final = 12
_AES: Final = 32
_GYROIDOS_HEADER: Final = struct.Struct("=ii16s")
"""Native byte order, as the original writes it on the same machine."""
_AES_BLOCK: Final = 16


class OpenToken(Protocol):
    """A token whose PIN was right, as far as wrapping needs its key; `softtoken.Token` is one.

    Both methods raise ValueError for contents that the key cannot be used with, and refusals.
    """

    @property
    def public_key(self) -> PublicKey:
        """The public half."""
        ...

    def decrypt(self, encapsulated: bytes) -> bytes:
        """Undo RSAES-OAEP with SHA-256, where the key is RSA."""
        ...

    def agree(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        """Return the ECDH secret with a public key on the same curve, where the key is EC."""
        ...


def wrap(recipient: x509.Certificate | PublicKey, key: bytes, *, context: bytes) -> bytes:
    """Return `key` (16 to 1024 bytes) wrapped for the token with this certificate or public key.

    `context` says what the key is for (the container's UUID); the same must be given to `unwrap`.
    ValueError for a key of another length, or a recipient that is no token's: mistakes of the caller.
    """
    if len(key) not in KEY_LENGTHS:
        raise ValueError(f"a key of {len(key)} bytes")
    public = recipient.public_key() if isinstance(recipient, x509.Certificate) else recipient
    if isinstance(public, rsa.RSAPublicKey):
        secret = AESGCM.generate_key(256)
        head = _head(_RSA, public.encrypt(secret, OAEP))
    elif isinstance(public, ec.EllipticCurvePublicKey):
        ephemeral = ec.generate_private_key(public.curve)
        head = _head(_ECDH, _point(ephemeral.public_key()))
        secret = _agreed(ephemeral.exchange(ec.ECDH(), public), head, public)
    else:
        raise ValueError(f"a recipient of kind {type(public).__name__}")  # noqa: TRY004 - as documented
    nonce = os.urandom(_NONCE)
    return head + nonce + AESGCM(secret).encrypt(nonce, key, _associated(head, context))


def unwrap(token: OpenToken, blob: bytes, *, context: bytes) -> bytes:
    """Return the key that `wrap` wrapped for this token and context.

    Raises:
        TokenRefusal: "wrapped-key-damaged" where a bit of it, the token or the context is another one; what
            the token's own methods raise.
    """
    if len(blob) > WRAPPED_LIMIT:
        raise _damaged(f"more than {WRAPPED_LIMIT} bytes")
    if len(blob) < _HEADER.size:
        raise _damaged("its header is cut off")
    magic, version, method, length = _HEADER.unpack_from(blob)
    if magic != MAGIC or version != VERSION:
        raise _damaged("it does not begin as a wrapped key of version 1")
    head, rest = blob[: _HEADER.size + length], blob[_HEADER.size + length :]
    public = token.public_key
    try:
        if method == _RSA and isinstance(public, rsa.RSAPublicKey):
            secret = token.decrypt(head[_HEADER.size :])
        elif method == _ECDH and isinstance(public, ec.EllipticCurvePublicKey):
            theirs = ec.EllipticCurvePublicKey.from_encoded_point(public.curve, head[_HEADER.size :])
            secret = _agreed(token.agree(theirs), head, public)
        else:
            raise _damaged("it is for a token of another kind")
        return AESGCM(secret).decrypt(rest[:_NONCE], rest[_NONCE:], _associated(head, context))
    except (ValueError, InvalidTag) as exc:
        raise _damaged("it does not decrypt") from exc


def unwrap_gyroidos(token: Token, blob: bytes) -> bytes:
    """Return the 96-byte key of a wrapped-key file as GyroidOS writes it (interop notes, 2.7).

    That form has no MAC: a changed file is mostly, but not surely, refused; wrap the key anew with `wrap`.

    Raises:
        TokenRefusal: "wrapped-key-damaged", also for a token that is not RSA.
    """
    private = token.private_key
    if not isinstance(private, rsa.RSAPrivateKey):
        raise _damaged("the original wraps with RSA tokens only")
    if not _GYROIDOS_HEADER.size <= len(blob) <= WRAPPED_LIMIT:
        raise _damaged(f"{len(blob)} bytes")
    encapsulated_size, size, iv = _GYROIDOS_HEADER.unpack_from(blob)
    body = blob[_GYROIDOS_HEADER.size :]
    if encapsulated_size != private.key_size // 8:
        raise _damaged("its encrypted key is not as long as the token's modulus")
    if size < _AES_BLOCK or size % _AES_BLOCK or encapsulated_size + size != len(body):
        raise _damaged("its lengths do not add up")
    try:
        secret = private.decrypt(body[:encapsulated_size], padding.PKCS1v15())
        if len(secret) != _AES:
            raise ValueError("not an AES-256 key")
        decryptor = Cipher(algorithms.AES256(secret), modes.CBC(iv)).decryptor()
        padded = decryptor.update(body[encapsulated_size:]) + decryptor.finalize()
        unpadder = PKCS7(_AES_BLOCK * 8).unpadder()
        key = unpadder.update(padded) + unpadder.finalize()
    except ValueError as exc:
        raise _damaged("it does not decrypt") from exc
    if len(key) != GYROIDOS_KEY_BYTES:
        raise _damaged("what it holds has not the length of a container's key")
    return key


def _head(method: int, encapsulation: bytes) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, method, len(encapsulation)) + encapsulation


def _associated(head: bytes, context: bytes) -> bytes:
    # The head has a length of its own, so the two cannot be taken for one another.
    return head + context


def _agreed(shared: bytes, head: bytes, static: ec.EllipticCurvePublicKey) -> bytes:
    info = b"trustme wrapped key" + head + _point(static)
    return HKDF(hashes.SHA256(), _AES, salt=None, info=info).derive(shared)


def _point(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _damaged(evidence: str) -> TokenRefusal:
    return TokenRefusal(
        "wrapped-key-damaged",
        "a wrapped key is damaged, or was wrapped by another token or for another container",
        evidence=evidence,
        remedy="restore the container's key file, or use the token that wrapped it",
    )
