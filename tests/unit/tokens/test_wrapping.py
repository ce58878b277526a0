# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
import struct
import traceback

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.tokens import kit
from trustme_init.errors import TokenRefusal
from trustme_init.tokens.softtoken import Token
from trustme_init.tokens.wrapping import unwrap, unwrap_gyroidos, wrap

KEY = bytes(range(96))
CONTAINER = b"1b7f7a7e-6d6a-4d3c-9c53-7d6c0f0a0001"
TOKENS = {
    "rsa": kit.token(kit.rsa_key()),
    "p256": kit.token(ec.generate_private_key(ec.SECP256R1())),
    "p384": kit.token(ec.generate_private_key(ec.SECP384R1())),
}
EACH = pytest.mark.parametrize("kind", TOKENS)


def damaged(token: Token, blob: bytes, context: bytes = CONTAINER) -> TokenRefusal:
    with pytest.raises(TokenRefusal) as caught:
        unwrap(token, blob, context=context)
    assert caught.value.code == "wrapped-key-damaged"
    return caught.value


@EACH
def test_a_wrapped_key_comes_back(kind: str) -> None:
    token = TOKENS[kind]
    for recipient in (token.certificate, token.private_key.public_key()):
        blob = wrap(recipient, KEY, context=CONTAINER)
        assert unwrap(token, blob, context=CONTAINER) == KEY
        assert KEY[:8] not in blob
    assert wrap(token.certificate, KEY, context=CONTAINER) != blob


@EACH
def test_every_bit_of_every_byte_matters(kind: str) -> None:
    token = TOKENS[kind]
    blob = wrap(token.certificate, KEY, context=CONTAINER)
    rng = random.Random(6)  # noqa: S311 - which bit, repeatably
    for place in range(len(blob)):
        changed = bytearray(blob)
        changed[place] ^= 1 << rng.randrange(8)
        damaged(token, bytes(changed))


@EACH
def test_cut_short_or_grown(kind: str) -> None:
    token = TOKENS[kind]
    blob = wrap(token.certificate, KEY, context=CONTAINER)
    for size in range(len(blob)):
        damaged(token, blob[:size])
    damaged(token, blob + b"\0")
    assert "more than" in damaged(token, blob + bytes(5000)).evidence


@EACH
def test_the_form_is_the_documented_one(kind: str) -> None:
    token = TOKENS[kind]
    private = token.private_key
    blob = wrap(token.certificate, KEY, context=CONTAINER)
    magic, version, method, length = struct.unpack(">4sBBH", blob[:8])
    encapsulation, nonce, ciphertext = blob[8 : 8 + length], blob[8 + length :][:12], blob[20 + length :]
    assert (magic, version) == (b"TMWK", 1)
    if isinstance(private, rsa.RSAPrivateKey):
        assert method == 1
        sha256 = hashes.SHA256()
        secret = private.decrypt(encapsulation, padding.OAEP(padding.MGF1(sha256), sha256, label=None))
    else:
        assert method == 2
        shared = private.exchange(
            ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(private.curve, encapsulation)
        )
        own = private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        info = b"trustme wrapped key" + blob[: 8 + length] + own
        secret = HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared)
    assert AESGCM(secret).decrypt(nonce, ciphertext, blob[: 8 + length] + CONTAINER) == KEY


@EACH
def test_other_versions_are_named(kind: str) -> None:
    blob = wrap(TOKENS[kind].certificate, KEY, context=CONTAINER)
    for other in (b"TMWK\2" + blob[5:], b"TMWL" + blob[4:]):
        assert "of version 1" in damaged(TOKENS[kind], other).evidence


@EACH
def test_another_container_or_token(kind: str) -> None:
    token = TOKENS[kind]
    blob = wrap(token.certificate, KEY, context=CONTAINER)
    damaged(token, blob, context=CONTAINER[:-1] + b"2")
    damaged(token, blob, context=b"")
    for other in (*TOKENS.values(), kit.token()):
        if other is not token:
            damaged(other, blob)


@pytest.mark.parametrize("size", [0, 15, 1025])
def test_lengths_that_are_no_key(size: int) -> None:
    with pytest.raises(ValueError, match="a key of"):
        wrap(TOKENS["p256"].certificate, bytes(size), context=b"")


def test_recipients_that_are_no_token() -> None:
    with pytest.raises(ValueError, match="a recipient of kind"):
        wrap(ed25519.Ed25519PrivateKey.generate().public_key(), KEY, context=b"")  # type: ignore[arg-type]


@given(st.binary(max_size=600))
def test_any_bytes(blob: bytes) -> None:
    for token in TOKENS.values():
        damaged(token, blob)
        damaged(token, b"TMWK\1" + blob)
        with pytest.raises(TokenRefusal):
            unwrap_gyroidos(token, blob)


def gyroidos(token: Token, key: bytes = KEY) -> bytes:
    """Wrap as EVP_SealInit with AES-256-CBC does."""
    secret, iv = os.urandom(32), os.urandom(16)
    padder = PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES256(secret), modes.CBC(iv)).encryptor()
    ct = encryptor.update(padder.update(key) + padder.finalize()) + encryptor.finalize()
    ek = kit.rsa_key().public_key().encrypt(secret, padding.PKCS1v15())
    assert token is TOKENS["rsa"]
    return struct.pack("=ii", len(ek), len(ct)) + iv + ek + ct


def gyroidos_refused(blob: bytes, token: Token = TOKENS["rsa"]) -> str:
    with pytest.raises(TokenRefusal) as caught:
        unwrap_gyroidos(token, blob)
    assert caught.value.code == "wrapped-key-damaged"
    return caught.value.evidence


def test_what_the_original_wrapped() -> None:
    blob = gyroidos(TOKENS["rsa"])
    assert len(blob) == 4 + 4 + 16 + 256 + 112
    assert unwrap_gyroidos(TOKENS["rsa"], blob) == KEY
    gyroidos_refused(blob, TOKENS["p256"])
    gyroidos_refused(blob, kit.token(kit.rsa_key(3072)))


def test_what_the_original_wrapped_of_other_lengths() -> None:
    for size in (0, 32, 95, 97, 128):
        gyroidos_refused(gyroidos(TOKENS["rsa"], bytes(size)))


def test_lengths_that_lie() -> None:
    """Negative lengths made the original read out of bounds (gyroidos/cml pull request 581)."""
    blob = gyroidos(TOKENS["rsa"])
    for first, second in (
        (-1, 112),
        (256, -1),
        (256, -112),
        (2**31 - 1, 112),
        (256, 2**31 - 1),
        (-(2**31), 2**31 - 1),
        (255, 113),
        (272, 96),
        (240, 128),
        (256, 96),
        (256, 128),
        (368, 0),
        (0, 368),
    ):
        evidence = gyroidos_refused(struct.pack("=ii", first, second) + blob[8:])
        assert ("modulus" if first != 256 else "lengths") in evidence
    for size in range(len(blob)):
        gyroidos_refused(blob[:size])
    gyroidos_refused(blob + b"\0")
    gyroidos_refused(blob + bytes(16))


def test_row29_no_refusal_holds_a_key() -> None:
    key = b"canary-key-" * 8 + b"12345678"
    token = TOKENS["rsa"]
    ours, theirs = wrap(token.certificate, key, context=CONTAINER), gyroidos(token, key)
    texts = []
    for blob in (ours, theirs):
        for place in range(0, len(blob), 11):
            changed = bytearray(blob)
            changed[place] ^= 1
            try:
                if blob is ours:
                    unwrap(token, bytes(changed), context=CONTAINER)
                else:
                    unwrap_gyroidos(token, bytes(changed))
            except TokenRefusal as refusal:
                texts.append("".join(traceback.format_exception(refusal)))
    assert len(texts) > len(ours) // 11
    assert not any("canary" in text for text in texts)
