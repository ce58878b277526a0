# SPDX-License-Identifier: Apache-2.0
"""A device's certificate request (PKCS#10, RFC 2986), read for the three things that are taken from it.

Rules:
- The request is signed with its own key, by a hash that is accepted: who asks has the key.
- The key is not too weak (`strength`).
- The device's UUID is in the one `URI:UUID:<uuid>` of its subjectAltName.
- Nothing else of it is believed: subject, purposes, key usage and constraints of the certificate are written
  by the CA. What was asked for beyond that is reported as not granted (Talos CVE-2022-36103 granted it).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from trustme_tools.errors import ToolError
from trustme_tools.pki.certificates import extension_value
from trustme_tools.pki.strength import PublicKey, weakness

REQUEST_LIMIT: Final = 32 * 1024
"""Bytes; a request for an RSA-4096 key has 2 KiB."""
URI_PREFIX: Final = "UUID:"

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_HASHES: Final = frozenset({"sha256", "sha384", "sha512"})
_NOT_GRANTED_LIMIT: Final = 16
_TEXT_LIMIT: Final = 80
_USAGES: Final = (
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)
_LOOKED_AT: Final = (
    x509.BasicConstraints,
    x509.KeyUsage,
    x509.ExtendedKeyUsage,
    x509.SubjectAlternativeName,
    x509.SubjectKeyIdentifier,
)


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """What is taken from a request. `subject` and `not_granted` are only for people to read."""

    der: bytes
    uuid: UUID
    public_key: PublicKey
    subject: str
    not_granted: tuple[str, ...]


def read_request(data: bytes, *, uuid: UUID | None = None) -> DeviceRequest:
    """Read a PEM or DER request; with `uuid` it must be that of this device.

    ToolError: "request-malformed", "request-signature", "weak-signature", "weak-key", "request-uuid",
    "uuid-mismatch".
    """
    request, extensions = _parse(data)
    key = request.public_key()
    if (reason := weakness(key)) is not None:
        raise ToolError(
            "the key of the request is too weak",
            "make the device's key anew: ECC P-256 or RSA-2048",
            code="weak-key",
            evidence=reason,
        )
    assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)  # noqa: S101 - said by weakness(), for the type checker
    _require_possession(request)
    found = _uuid(extensions)
    if uuid is not None and uuid != found:
        raise ToolError(
            "the request is that of another device",
            "pull the request from the device you mean, or give the UUID of this one",
            code="uuid-mismatch",
            evidence=f"request: {found}, --uuid: {uuid}",
        )
    return DeviceRequest(
        der=request.public_bytes(Encoding.DER),
        uuid=found,
        public_key=key,
        subject=request.subject.rfc4514_string()[:_TEXT_LIMIT],
        not_granted=tuple(text[:_TEXT_LIMIT] for text in _not_granted(extensions))[:_NOT_GRANTED_LIMIT],
    )


def _parse(data: bytes) -> tuple[x509.CertificateSigningRequest, x509.Extensions]:
    if len(data) > REQUEST_LIMIT:
        raise _malformed(f"larger than {REQUEST_LIMIT} bytes")
    if data.count(b"-----BEGIN") > 1:
        raise _malformed("the file holds more than one PEM block")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pem = b"-----BEGIN" in data
            request = x509.load_pem_x509_csr(data) if pem else x509.load_der_x509_csr(data)
            extensions = request.extensions
            request.public_key()
            _ = request.subject.rfc4514_string()
        # Unused bits of a signature could be changed without anybody's key.
        if request.public_bytes(Encoding.DER)[-len(request.signature) - 1] != 0:
            raise ValueError("the signature is not a whole number of bytes")
    except Exception as exc:
        # Bytes of a stranger: the library raises what it does not document, warnings among it.
        raise _malformed(str(exc) or type(exc).__name__) from exc
    return request, extensions


def _require_possession(request: x509.CertificateSigningRequest) -> None:
    try:
        algorithm = request.signature_hash_algorithm
        name = algorithm.name if algorithm is not None else None
        valid = request.is_signature_valid
    except (UnsupportedAlgorithm, ValueError, TypeError) as exc:
        raise _unsigned(str(exc)) from exc
    if name is not None and name not in _HASHES:
        raise ToolError(
            "the request is signed with a hash that is not accepted",
            "make the request anew, with SHA-256",
            code="weak-signature",
            evidence=name,
        )
    if not valid:
        raise _unsigned("the signature does not verify under the key of the request")


def _uuid(extensions: x509.Extensions) -> UUID:
    uris = []
    if (names := extension_value(extensions, x509.SubjectAlternativeName)) is not None:
        uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if _is_uuid(uri)]
    if len(uris) != 1:
        raise _bad_uuid(f"{len(uris)} entries URI:{URI_PREFIX}… in subjectAltName, exactly one is needed")
    text = uris[0][len(URI_PREFIX) :]
    if not _UUID.fullmatch(text):
        raise _bad_uuid(f"URI:{uris[0][:_TEXT_LIMIT]} is not a UUID in its canonical form")
    uuid = UUID(text)
    if uuid.int == 0:
        # Of the core container, on every device.
        raise _bad_uuid("the nil UUID names no device")
    return uuid


def _is_uuid(uri: str) -> bool:
    # Lower case too: a second name that some reader would take for the UUID must not slip by.
    return uri[: len(URI_PREFIX)].upper() == URI_PREFIX


def _not_granted(extensions: x509.Extensions) -> Iterator[str]:
    """Name what the request asks for and the certificate will not have."""
    basic = extension_value(extensions, x509.BasicConstraints)
    if basic is not None and basic.ca:
        yield "to be a CA"
    if (usage := extension_value(extensions, x509.KeyUsage)) is not None:
        yield from (f"key usage {name}" for name in _USAGES if getattr(usage, name))
    for purpose in extension_value(extensions, x509.ExtendedKeyUsage) or ():
        if purpose != ExtendedKeyUsageOID.CLIENT_AUTH:
            yield f"purpose {purpose.dotted_string}"
    for name in extension_value(extensions, x509.SubjectAlternativeName) or ():
        if not isinstance(name, x509.UniformResourceIdentifier) or not _is_uuid(name.value):
            yield f"name {name.value}"
    for extension in extensions:
        if not isinstance(extension.value, _LOOKED_AT):
            yield f"extension {extension.oid.dotted_string}"


def _malformed(evidence: str) -> ToolError:
    return ToolError(
        "this is not a certificate request",
        "name the file that `control pull_csr` wrote: one PEM or DER request",
        code="request-malformed",
        evidence=evidence,
    )


def _unsigned(evidence: str) -> ToolError:
    return ToolError(
        "whoever made the request has not shown that it has the key",
        "pull the request from the device again",
        code="request-signature",
        evidence=evidence,
    )


def _bad_uuid(evidence: str) -> ToolError:
    return ToolError(
        "the request does not name one device",
        "pull the request from the device again; its base system writes the UUID into it",
        code="request-uuid",
        evidence=evidence,
    )
