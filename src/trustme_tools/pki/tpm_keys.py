# SPDX-License-Identifier: Apache-2.0
"""The public area of a TPM key: read from its marshalled form, named, and turned into an ordinary key.

Rules (TPM 2.0 Part 2 sections 8.3 and 12.2, Part 1 section 16):
- A structure fills its bytes exactly and is in the one form the TPM itself makes: unmarshalled and marshalled
  again it is the same. So a name that is computed from the bytes is the name of what was judged.
- Names are made with SHA-256, SHA-384 or SHA-512: with a broken hash two keys could have one name.
- The key itself is not too weak (`strength`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from trustme_tools.errors import ToolError
from trustme_tools.pki.strength import weakness

if TYPE_CHECKING:
    from tpm2_pytss import TPM2B_PUBLIC

HASHES: Final[Mapping[int, str]] = {0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
"""TPM_ALG_ID to the hashes that are accepted anywhere in a certification."""

FIXED_TPM: Final = 1 << 1
FIXED_PARENT: Final = 1 << 4
SENSITIVE_DATA_ORIGIN: Final = 1 << 5
RESTRICTED: Final = 1 << 16
DECRYPT: Final = 1 << 17
SIGN: Final = 1 << 18

ATTRIBUTES: Final[Mapping[int, str]] = {
    FIXED_TPM: "fixedTPM",
    FIXED_PARENT: "fixedParent",
    SENSITIVE_DATA_ORIGIN: "sensitiveDataOrigin",
    RESTRICTED: "restricted",
    DECRYPT: "decrypt",
    SIGN: "sign",
}
"""TPMA_OBJECT bits that say where a key was made, whether it can leave, and what it may be used for."""

BOUND: Final = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN
"""Made by the TPM itself, and never to leave it."""

_REMEDY: Final = "have the device certify its key again; nothing but a TPM makes these structures"


@dataclass(frozen=True, slots=True)
class TpmKey:
    """A public area: `marshalled` is the TPM2B_PUBLIC, `name` the TPM's name of it (algorithm, digest)."""

    role: str
    """What it is for, in refusals: "the attestation key"."""
    marshalled: bytes
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    attributes: int
    name: bytes

    @property
    def spki(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return self.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the SubjectPublicKeyInfo: how people compare keys."""
        return hashlib.sha256(self.spki).hexdigest()

    def require(self, code: str, *, present: int, absent: int) -> None:
        """Refuse the key with `code` unless it has all attributes `present` and none of `absent`."""
        missing = [text for bit, text in ATTRIBUTES.items() if bit & present and not bit & self.attributes]
        excess = [text for bit, text in ATTRIBUTES.items() if bit & absent and bit & self.attributes]
        if missing or excess:
            wrong = [f"{text} is missing" for text in missing] + [f"{text} is set" for text in excess]
            raise ToolError(
                f"{self.role} does not have the attributes that prove anything",
                "have the device make its keys anew with a released base system",
                code=code,
                evidence=", ".join(wrong),
            )


def read_key(role: str, data: bytes) -> TpmKey:
    """Read a marshalled TPM2B_PUBLIC.

    ToolError: "certification-malformed", "weak-name-algorithm", "weak-key".
    """
    from tpm2_pytss import TPM2B_PUBLIC

    public = unmarshal(TPM2B_PUBLIC, data, role)
    area = public.publicArea
    algorithm = HASHES.get(int(area.nameAlg))
    if algorithm is None:
        raise ToolError(
            f"{role} has a name that two keys could have",
            "make keys with the name algorithm SHA-256",
            code="weak-name-algorithm",
            evidence=f"TPM_ALG_ID {int(area.nameAlg):#06x}",
        )
    key = _public_key(public, role)
    if (reason := weakness(key)) is not None:
        raise ToolError(
            f"{role} is too weak", "use ECC P-256 or RSA-2048 keys", code="weak-key", evidence=reason
        )
    # The name is over the TPMT_PUBLIC, which is what follows the two bytes of the size.
    name = int(area.nameAlg).to_bytes(2, "big") + hashlib.new(algorithm, data[2:]).digest()
    return TpmKey(role, data, key, int(area.objectAttributes), name)


def unmarshal(kind: Any, data: bytes, what: str) -> Any:
    """Unmarshal a structure that fills `data` exactly; ToolError("certification-malformed")."""
    from tpm2_pytss import TSS2_Exception

    try:
        structure, length = kind.unmarshal(data)
        exact = length == len(data) and structure.marshal() == data
    except (TSS2_Exception, ValueError, TypeError, OverflowError) as exc:
        raise malformed(f"{what}: {exc}") from exc
    if not exact:
        raise malformed(f"{what}: not the marshalled form of a {kind.__name__}")
    return structure


def _public_key(public: TPM2B_PUBLIC, role: str) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        key = load_der_public_key(public.to_der())
    except (ValueError, TypeError) as exc:  # among them a point that is not on its curve
        raise malformed(f"{role}: {exc}") from exc
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise malformed(f"{role}: neither RSA nor ECC")
    return key


def malformed(evidence: str) -> ToolError:
    """Return the refusal of a certification that cannot be read."""
    return ToolError(
        "the TPM certification of the key is malformed",
        _REMEDY,
        code="certification-malformed",
        evidence=evidence,
    )
