# SPDX-License-Identifier: Apache-2.0
"""Which public keys are too weak to be certified or believed.

Rules:
- RSA of 2048 to 8192 bits with an odd exponent above 2^16 (FIPS 186-5 section 5.1); ECDSA on P-256 or P-384;
  Ed25519.
- No RSA key with the mark of ROCA (CVE-2017-15361): a vendor's TPMs made moduli of which every small prime
  sees a power of 65537 only, and these can be factored. EK and device keys come from just such chips.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from trustme_init.trust.certificate import RSA_BITS

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
_EXPONENT_LIMIT: Final = 1 << 16
_ROCA_GENERATOR: Final = 65537
_ROCA_PRIMES: Final = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
"""Primes modulo which 65537 generates a proper subgroup: one sound modulus in 2^27 lies in all of these."""


def weakness(key: object) -> str | None:
    """Return why a public key is too weak or of a kind that is not used here, or None."""
    match key:
        case rsa.RSAPublicKey():
            numbers = key.public_numbers()
            if key.key_size not in RSA_BITS:
                return f"RSA with {key.key_size} bits"
            if numbers.e <= _EXPONENT_LIMIT or numbers.e % 2 == 0:
                return f"RSA with the public exponent {numbers.e}"
            return "RSA with the mark of CVE-2017-15361 (ROCA)" if has_roca_mark(numbers.n) else None
        case ec.EllipticCurvePublicKey():
            return None if isinstance(key.curve, _CURVES) else f"ECDSA on {key.curve.name}"
        case ed25519.Ed25519PublicKey():
            return None
    return f"a key of the kind {type(key).__name__}"


def has_roca_mark(modulus: int) -> bool:
    """Whether a modulus is a power of 65537 modulo each small prime (Nemec and others, 2017, section 2.4)."""
    return all(modulus % prime in _powers(prime) for prime in _ROCA_PRIMES)


def _powers(prime: int) -> set[int]:
    powers = {1}
    value = _ROCA_GENERATOR % prime
    while value not in powers:
        powers.add(value)
        value = value * _ROCA_GENERATOR % prime
    return powers
