# SPDX-License-Identifier: Apache-2.0
"""A device's TPM certification of its signing key: read, judged, and completed by credential activation.

The document (JSON, version 1) holds what TPM2_Certify gave for the device key, signed by the attestation key
(AK), and the public areas of both and of the endorsement key (EK), all marshalled as the TPM does, in base64.

    EK CA ─ EK certificate ─ EK ┄┄(credential activation)┄┄ AK ─ attest ┬ name of the device key ─ CSR's key
                                                                        └ extraData = SHA-256 of the CSR

Rules (TPM 2.0 Part 2 sections 8.3, 10.12 and 11.2; Part 3 section 18.2), each a refusal of its own:
- What was signed comes from a TPM (magic) and is about a loaded key (type). Only a *restricted* AK makes that
  mean something: it signs nothing else that starts with the magic.
- AK and device key were made by the TPM and cannot leave it; the device key signs and does nothing else.
- The certified name is that of the device key, whose public part is the CSR's, and the CSR is the very one
  that the certification was made for.
- The EK is a TPM's (restricted decryption), is the one of its certificate, and that is a TPM maker's.

What remains unproven without credential activation: that AK and EK are in one TPM. Anybody can read a
genuine EK certificate off a TPM, and make an "AK" in software that says of itself whatever it likes. So a
certification alone keeps honest devices from mistakes; with `make_challenge` it keeps out dishonest ones.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from trustme_tools.errors import ToolError
from trustme_tools.pki import endorsement
from trustme_tools.pki.request import DeviceRequest
from trustme_tools.pki.tpm_keys import (
    BOUND,
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    HASHES,
    RESTRICTED,
    SIGN,
    TpmKey,
    malformed,
    read_key,
    unmarshal,
)

KIND: Final = "trustme.device-key-certification"
VERSION: Final = 1
DOCUMENT_LIMIT: Final = 64 * 1024
"""Bytes; a real document has about 4 KiB."""
CREDENTIAL_SIZE: Final = 32
"""Bytes of the secret that proves AK and EK to be in one TPM; no more than the digest of the EK's name."""

TPM_GENERATED_VALUE: Final = 0xFF544347
ATTEST_CERTIFY: Final = 0x8017

_FIELDS: Final = ("ek_certificate", "ek_public", "ak_public", "device_public", "attest", "signature")
_PADDINGS: Final = {0x0014: "RSASSA", 0x0016: "RSAPSS"}
_ECDSA: Final = 0x0018


@dataclass(frozen=True, slots=True)
class Certification:
    """The document, taken apart and not judged yet. `attest` is the marshalled TPMS_ATTEST."""

    ek_certificate: bytes | None
    ek: TpmKey
    ak: TpmKey
    device: TpmKey
    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Checked:
    """A certification that met every rule. `ek_anchor` is who vouches for the EK: None, nobody was asked."""

    ek: TpmKey
    ak: TpmKey
    ek_certificate: x509.Certificate | None
    ek_anchor: str | None

    @property
    def unproven(self) -> tuple[str, ...]:
        """What an attacker could still have made up, in words; `confirm` removes the last one."""
        gaps = []
        if self.ek_certificate is None:
            gaps.append("that the EK is that of a genuine TPM: the device has no EK certificate")
        elif self.ek_anchor is None:
            gaps.append("that the EK is that of a genuine TPM: its certificate was not checked (--ek-ca)")
        gaps.append("that AK and EK are in one TPM: only credential activation proves it")
        return tuple(gaps)


class Challenge(NamedTuple):
    """A credential for TPM2_ActivateCredential: both parts marshalled (TPM2B), and the answer (a secret)."""

    credential_blob: bytes
    encrypted_secret: bytes
    expected: bytes

    def __repr__(self) -> str:
        return f"Challenge({self.credential_blob.hex()}, {self.encrypted_secret.hex()}, …)"


def read_certification(data: bytes) -> Certification:
    """Take a document apart.

    ToolError: "certification-malformed", "weak-name-algorithm", "weak-key".
    """
    document = _document(data)
    fields = {name: _decode(name, document[name]) for name in _FIELDS if document[name] is not None}
    if missing := [name for name in _FIELDS if name not in fields and name != "ek_certificate"]:
        raise malformed(f"{', '.join(missing)}: null")
    return Certification(
        ek_certificate=fields.get("ek_certificate"),
        ek=read_key("the endorsement key", fields["ek_public"]),
        ak=read_key("the attestation key", fields["ak_public"]),
        device=read_key("the device key", fields["device_public"]),
        attest=fields["attest"],
        signature=fields["signature"],
    )


def check(
    certification: Certification,
    request: DeviceRequest,
    *,
    ek_cas: Sequence[x509.Certificate] = (),
    at: datetime,
) -> Checked:
    """Judge a certification of the key in `request`.

    `ek_cas` are the CAs of TPM makers that are believed; with none the EK certificate is only compared with
    the EK. `at` (aware) is when certificates have to be valid. ToolError: "ak-attributes",
    "device-key-attributes", "weak-signature", "attest-signature", "attest-magic", "attest-type",
    "name-mismatch", "request-mismatch", "key-mismatch", "ek-attributes", "ek-mismatch",
    "ek-certificate-missing", "certification-malformed", or a code of `endorsement`.
    """
    from tpm2_pytss import TPMS_ATTEST

    certification.ak.require("ak-attributes", present=BOUND | RESTRICTED | SIGN, absent=DECRYPT)
    certification.device.require("device-key-attributes", present=BOUND | SIGN, absent=RESTRICTED | DECRYPT)
    _verify(certification)
    # Both come first in the structure; the library refuses or misreads what has other values there.
    _require_head(certification.attest)
    attest = unmarshal(TPMS_ATTEST, certification.attest, "attest")
    certified = bytes(attest.attested.certify.name)
    if certified != certification.device.name:
        raise _mismatch(
            "name-mismatch",
            "the TPM certified another key than the device key of the document",
            f"certified {certified.hex()}, expected {certification.device.name.hex()}",
        )
    digest = hashlib.sha256(request.der).digest()
    if bytes(attest.extraData) != digest:
        raise _mismatch(
            "request-mismatch",
            "the TPM certification was made for another certificate request",
            f"made for {bytes(attest.extraData).hex() or 'none'}, SHA-256 of this one {digest.hex()}",
        )
    if certification.device.spki != _spki(request.public_key):
        raise _mismatch(
            "key-mismatch",
            "the key of the certificate request is not the one that the TPM certified",
            f"certified key sha256:{certification.device.sha256}",
        )
    return _check_endorsement(certification, ek_cas, at)


def make_challenge(checked: Checked) -> Challenge:
    """Encrypt a fresh secret so that only the TPM that has the EK, and in it the AK, gives it back.

    MakeCredential of TPM 2.0 Part 1 section 24; the device answers with TPM2_ActivateCredential. Anything but
    a certification that was checked has an EK of unknown properties, so nothing else is taken.
    ToolError("ek-attributes") if the EK protects nothing.
    """
    from tpm2_pytss import TPM2B_PUBLIC
    from tpm2_pytss.utils import make_credential

    expected = secrets.token_bytes(CREDENTIAL_SIZE)
    public = unmarshal(TPM2B_PUBLIC, checked.ek.marshalled, checked.ek.role)
    blob, secret = make_credential(public, expected, checked.ak.name)
    return Challenge(blob.marshal(), secret.marshal(), expected)


def confirm(challenge: Challenge, answer: bytes) -> None:
    """Accept the answer of a device; ToolError("credential-not-activated") if it is not the secret."""
    if not hmac.compare_digest(challenge.expected, answer):
        raise ToolError(
            "the device's attestation key is not in the TPM of its endorsement key",
            "treat the device as manipulated, or repeat if the answer belongs to another challenge",
            code="credential-not-activated",
        )


def _document(data: bytes) -> dict[str, Any]:
    if len(data) > DOCUMENT_LIMIT:
        raise malformed(f"larger than {DOCUMENT_LIMIT} bytes")
    try:
        document = json.loads(data.decode("ascii"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise malformed(str(exc)) from exc
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise malformed(f"not a document of the kind {KIND}")
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise malformed(f"version {version!r}, only {VERSION} is known here")
    if set(document) != {"kind", "version", *_FIELDS}:
        difference = ", ".join(sorted(set(document) ^ {"kind", "version", *_FIELDS}))
        raise malformed(f"members missing or unknown: {difference}")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _decode(name: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise malformed(f"{name}: not a string")
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise malformed(f"{name}: {exc}") from exc
    if base64.b64encode(data).decode() != value:
        raise malformed(f"{name}: not the canonical base64 of its bytes")
    return data


def _require_head(attest: bytes) -> None:
    magic, kind = int.from_bytes(attest[:4], "big"), int.from_bytes(attest[4:6], "big")
    if magic != TPM_GENERATED_VALUE:
        raise _mismatch(
            "attest-magic", "what the attestation key signed was not made by a TPM", f"magic {magic:#010x}"
        )
    if kind != ATTEST_CERTIFY:
        raise _mismatch(
            "attest-type",
            "what the attestation key signed is no certification of a key",
            f"type {kind:#06x}, TPM_ST_ATTEST_CERTIFY is {ATTEST_CERTIFY:#06x}",
        )


def _verify(certification: Certification) -> None:
    """Verify the AK's signature of the attestation; ToolError("attest-signature", "weak-signature")."""
    from tpm2_pytss import TPMT_SIGNATURE

    signature = unmarshal(TPMT_SIGNATURE, certification.signature, "signature")
    scheme, parts, key = int(signature.sigAlg), signature.signature, certification.ak.key
    if scheme != _ECDSA and scheme not in _PADDINGS:
        raise malformed(f"signature: TPM_ALG_ID {scheme:#06x} is no signature of an AK")
    name = HASHES.get(int(parts.any.hashAlg))
    if name is None:
        raise ToolError(
            "the TPM certification is signed with a hash that is not accepted",
            "make an attestation key that signs with SHA-256",
            code="weak-signature",
            evidence=f"TPM_ALG_ID {int(parts.any.hashAlg):#06x}",
        )
    algorithm: hashes.HashAlgorithm = {
        "sha256": hashes.SHA256(),
        "sha384": hashes.SHA384(),
        "sha512": hashes.SHA512(),
    }[name]
    try:
        if isinstance(key, ec.EllipticCurvePublicKey) and scheme == _ECDSA:
            r, s = (int.from_bytes(bytes(part), "big") for part in _ecdsa_parts(parts))
            key.verify(encode_dss_signature(r, s), certification.attest, ec.ECDSA(algorithm))
        elif isinstance(key, rsa.RSAPublicKey) and _PADDINGS.get(scheme) == "RSASSA":
            key.verify(bytes(parts.rsassa.sig), certification.attest, padding.PKCS1v15(), algorithm)
        elif isinstance(key, rsa.RSAPublicKey) and _PADDINGS.get(scheme) == "RSAPSS":
            # The salt is as long as the digest or as the key allows, by revision of the specification.
            pss = padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO)
            key.verify(bytes(parts.rsapss.sig), certification.attest, pss, algorithm)
        else:
            raise InvalidSignature
    except (InvalidSignature, ValueError) as exc:
        raise _mismatch(
            "attest-signature",
            "the TPM certification is not signed by the attestation key",
            f"attestation key sha256:{certification.ak.sha256}",
        ) from exc


def _ecdsa_parts(parts: Any) -> tuple[Any, Any]:
    return parts.ecdsa.signatureR, parts.ecdsa.signatureS


def _check_endorsement(
    certification: Certification, ek_cas: Sequence[x509.Certificate], at: datetime
) -> Checked:
    # Some makers' keys are installed and not made by the TPM: sensitiveDataOrigin is no requirement here.
    certification.ek.require(
        "ek-attributes", present=FIXED_TPM | FIXED_PARENT | RESTRICTED | DECRYPT, absent=SIGN
    )
    _require_symmetric(certification.ek)
    if certification.ek_certificate is None:
        if ek_cas:
            raise ToolError(
                "the device gave no EK certificate, and an EK CA was named to check it with",
                "leave --ek-ca out if this TPM has none; the output then says what is not proven",
                code="ek-certificate-missing",
            )
        return Checked(certification.ek, certification.ak, None, None)
    certificate = endorsement.load(certification.ek_certificate)
    if certification.ek.spki != _spki(certificate.public_key()):
        raise _mismatch(
            "ek-mismatch",
            "the EK certificate is that of another TPM",
            f"certificate for {_described(certificate)}, EK sha256:{certification.ek.sha256}",
        )
    anchor = endorsement.check(certificate, ek_cas, at=at) if ek_cas else None
    subject = anchor.subject.rfc4514_string() if anchor is not None else None
    return Checked(certification.ek, certification.ak, certificate, subject)


def _require_symmetric(ek: TpmKey) -> None:
    """Refuse an EK that would not protect a credential: AES-CFB of 128 bits or more (EK profile B.3)."""
    from tpm2_pytss import TPM2B_PUBLIC

    area = unmarshal(TPM2B_PUBLIC, ek.marshalled, ek.role).publicArea
    symmetric = area.parameters.asymDetail.symmetric
    algorithm, bits, mode = int(symmetric.algorithm), int(symmetric.keyBits.sym), int(symmetric.mode.sym)
    if (algorithm, mode) != (0x0006, 0x0043) or bits not in (128, 192, 256):
        raise ToolError(
            "the endorsement key does not protect a credential",
            "use an EK of the TCG's default templates",
            code="ek-attributes",
            evidence=f"symmetric algorithm {algorithm:#06x}, {bits} bits, mode {mode:#06x}",
        )


def _spki(key: Any) -> bytes:
    der: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der


def _described(certificate: x509.Certificate) -> str:
    return f"key sha256:{hashlib.sha256(_spki(certificate.public_key())).hexdigest()}"


def _mismatch(code: str, cause: str, evidence: str) -> ToolError:
    return ToolError(
        cause,
        "pull request and certification from the device again, together; if it stays, the device is not what "
        "it says",
        code=code,
        evidence=evidence,
    )
