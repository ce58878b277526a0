# SPDX-License-Identifier: Apache-2.0
"""Detached signatures over raw bytes.

The signer's key alone decides the scheme (as in GyroidOS; nothing beside the signature names one):

    id-RSASSA-PSS   PSS, SHA-512, MGF1 with SHA-512, salt of 64 bytes
    rsaEncryption   PKCS#1 v1.5 with SHA-512
    ECDSA           P-256 or P-384 with SHA-512, DER
    Ed25519         as in RFC 8032 (hashes with SHA-512 itself)
"""

from __future__ import annotations

from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import PublicKeyAlgorithmOID

from trustme_init.errors import TrustRefusal
from trustme_init.trust import certificate as certificates

SIGNATURE_LIMIT: Final = 1024
"""Bytes: an RSA-8192 signature."""
PSS_SALT: Final = 64


def verify_signature(leaf: x509.Certificate, signature: bytes, data: bytes) -> None:
    """Return if `signature` is one of the leaf's key over `data`; the leaf has been judged by `chain`.

    TrustRefusal: "signature-size" (empty, or longer than any), "bad-signature"; "weak-key" as a second line
    of defence.
    """
    if not 0 < len(signature) <= SIGNATURE_LIMIT:
        raise TrustRefusal(
            "signature-size",
            "the signature file is empty or too large",
            evidence=f"{len(signature)} bytes, at most {SIGNATURE_LIMIT}",
            remedy="sign again (`trustme guestos sign`), and copy the signature file as it is",
        )
    if (fault := certificates.form_fault(leaf)) is not None:
        raise TrustRefusal(fault.code, fault.cause, evidence=certificates.subject_text(leaf))
    key = leaf.public_key()
    sha512 = hashes.SHA512()
    try:
        match key:
            case rsa.RSAPublicKey():
                if leaf.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
                    key.verify(signature, data, padding.PSS(padding.MGF1(sha512), PSS_SALT), sha512)
                else:
                    key.verify(signature, data, padding.PKCS1v15(), sha512)
                return
            case ec.EllipticCurvePublicKey():
                key.verify(signature, data, ec.ECDSA(sha512))
                return
            case ed25519.Ed25519PublicKey():
                key.verify(signature, data)
                return
    except InvalidSignature as exc:
        raise _bad(certificates.subject_text(leaf)) from exc
    raise _bad("unknown key type")  # form_fault lets no other key through; never succeed by falling off


def _bad(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "bad-signature",
        "the configuration is not what the signer signed",
        evidence=f"signer {evidence}",
        remedy="sign the configuration again, or copy it to the store again with its own signature",
    )
