# SPDX-License-Identifier: Apache-2.0
"""A `Signer` in the shape of a private key of `cryptography`, so that the library's builders sign with it.

The library asks a key for the signature of a certificate's bytes and for nothing else; all other methods
refuse. The signature is the one the signer makes of any data: SHA-512, in the scheme of its own certificate.
"""

from __future__ import annotations

from typing import Any, NoReturn, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import PublicKeyAlgorithmOID

from trustme_tools.errors import ToolError
from trustme_tools.guestos.signing import Signer
from trustme_tools.pki.keys import PSS_SALT_LENGTH


class _Remote:
    """What both kinds of key share."""

    def __init__(self, signer: Signer, public: Any) -> None:
        self._signer = signer
        self._public = public

    @property
    def key_size(self) -> int:
        """Bits."""
        size: int = self._public.key_size
        return size

    def public_key(self) -> Any:
        """Return the key of the signer's certificate."""
        return self._public

    def private_numbers(self) -> NoReturn:
        """Refuse: nobody here has them."""
        raise NotImplementedError

    def private_bytes(self, *_: object) -> NoReturn:
        """Refuse: nobody here has them."""
        raise NotImplementedError

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


class _RemoteRsaKey(_Remote, rsa.RSAPrivateKey):
    def decrypt(self, ciphertext: bytes, padding: object) -> NoReturn:
        """Refuse: a signer signs."""
        raise NotImplementedError

    def sign(self, data: Any, _padding: object, _algorithm: object) -> bytes:
        """Return the signer's signature: the scheme is the one `scheme` named."""
        return self._signer.sign(bytes(data))


class _RemoteEllipticKey(_Remote, ec.EllipticCurvePrivateKey):
    @property
    def curve(self) -> ec.EllipticCurve:
        """The curve of the signer's certificate."""
        curve: ec.EllipticCurve = self._public.curve
        return curve

    def exchange(self, algorithm: object, peer_public_key: object) -> NoReturn:
        """Refuse: a signer signs."""
        raise NotImplementedError

    def sign(self, data: Any, _algorithm: object) -> bytes:
        """Return the signer's signature: the scheme is the one `scheme` named."""
        return self._signer.sign(bytes(data))


def scheme(
    signer: Signer,
) -> tuple[rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, padding.PSS | padding.PKCS1v15 | None]:
    """Return the signer as a key, and the RSA padding to ask it for (None for ECDSA); the hash is SHA-512.

    ToolError("unsupported-key") for a signer of another kind.
    """
    certificate = signer.chain[0]
    public = certificate.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
            return _RemoteRsaKey(signer, public), padding.PSS(padding.MGF1(hashes.SHA512()), PSS_SALT_LENGTH)
        return _RemoteRsaKey(signer, public), padding.PKCS1v15()
    if isinstance(public, ec.EllipticCurvePublicKey):
        return _RemoteEllipticKey(signer, public), None
    raise ToolError(
        f"a CA with a key of the kind {type(public).__name__} issues no certificates here",
        "use a CA with an RSA, RSA-PSS or ECDSA key",
        code="unsupported-key",
    )
