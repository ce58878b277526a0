# SPDX-License-Identifier: Apache-2.0
"""The content of PK, KEK, db and dbx: which certificates and digests, as EFI_SIGNATURE_LISTs.

Every certificate has a list of its own (the sizes of a list's entries are equal), digests share one.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import PublicKeyAlgorithmOID

from trustme_init.errors import Refusal
from trustme_init.firmware.siglist import (
    EFI_CERT_SHA256,
    EFI_CERT_X509,
    EFI_CERT_X509_SHA256,
    EFI_TIME_SIZE,
    Signature,
    SignatureList,
    parse_signature_lists,
    serialize_signature_lists,
)
from trustme_tools.errors import ToolError
from trustme_tools.pki.directory import (
    DB_CERTIFICATES,
    KEY_EXCHANGE_KEYS,
    PLATFORM_KEY,
    PkiDirectory,
    load_chain,
)
from trustme_tools.tooling import run

OWNER: Final = "7b2f8f0e-3c0a-4d59-8e57-5b6f5d1f6c21"
"""SignatureOwner of everything we enrol."""

_OWNER_SIZE: Final = 16
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


def key_lists(
    pki: PkiDirectory,
    *,
    extra_db: Sequence[Path] = (),
    default_db: bool = True,
    dbx: Sequence[str] = (),
    setup_mode: bool = False,
) -> dict[str, bytes]:
    """Return the data of PK, KEK, db and dbx for a PKI.

    `extra_db` are more certificates for db (the first of each file); without `default_db` only those.
    `dbx` are entries as `dbx_lists` reads them. `setup_mode` leaves PK out, so that the firmware takes any
    key.
    """
    db = [pki.certificate(name) for name in DB_CERTIFICATES] if default_db else []
    db += [load_certificate(path) for path in extra_db]
    return {
        "PK": b"" if setup_mode else certificate_lists([pki.certificate(PLATFORM_KEY)]),
        "KEK": certificate_lists(pki.certificate(name) for name in KEY_EXCHANGE_KEYS),
        "db": certificate_lists(db),
        "dbx": dbx_lists(dbx),
    }


def certificate_lists(certificates: Iterable[x509.Certificate]) -> bytes:
    """Return one EFI_CERT_X509 list per certificate, in order."""
    return serialize_signature_lists(
        _single(EFI_CERT_X509, certificate.public_bytes(Encoding.DER)) for certificate in certificates
    )


def dbx_lists(entries: Iterable[str]) -> bytes:
    """Return the data of dbx.

    `sha256:HEX` is a digest as it is (a PE image's Authenticode digest, for example); `tbs:FILE` revokes a
    certificate by the SHA-256 of its TBSCertificate; `image:FILE` an EFI program by its Authenticode
    digest; `esl:FILE` takes whole signature lists; a plain FILE is a certificate that is listed in full,
    with all it issued.
    """
    lists: list[SignatureList] = []
    for text in entries:
        kind, _, value = text.partition(":")
        if kind == "esl":
            lists += read_lists(Path(value))
        else:
            lists.append(_dbx_entry(text, kind, value))
    return serialize_signature_lists(merge_digests(lists))


def _dbx_entry(text: str, kind: str, value: str) -> SignatureList:
    if kind == "sha256":
        if not _DIGEST.fullmatch(value):
            raise ToolError(
                f"{text} is not a SHA-256 digest",
                "give 64 hexadecimal digits after sha256:",
                code="bad-digest",
            )
        return _single(EFI_CERT_SHA256, bytes.fromhex(value))
    if kind == "tbs":
        digest = hashlib.sha256(load_certificate(Path(value)).tbs_certificate_bytes).digest()
        # A time of zero revokes whatever was signed at any time.
        return _single(EFI_CERT_X509_SHA256, digest + bytes(EFI_TIME_SIZE))
    if kind == "image":
        return _single(EFI_CERT_SHA256, authenticode_digest(Path(value)))
    return _single(EFI_CERT_X509, load_certificate(Path(text)).public_bytes(Encoding.DER))


def authenticode_digest(image: Path) -> bytes:
    """Return the SHA-256 Authenticode digest of an EFI program, as efitools computes it.

    ToolError("not-an-efi-program"): efitools gives anything else a digest of zeros, which revokes nothing.
    """
    with tempfile.TemporaryDirectory(prefix="trustme-hash-") as temporary:
        out = Path(temporary, "hash.esl")
        run("hash-to-efi-sig-list", [image, out], purpose=f"compute the Authenticode digest of {image}")
        (entry,) = parse_signature_lists(out.read_bytes())
    digest = entry.signatures[0].data
    if not any(digest):
        raise ToolError(
            f"{image} is not an EFI program",
            "name a PE file, for example a UKI; sha256:HEX takes a digest as it is",
            code="not-an-efi-program",
        )
    return digest


def read_lists(path: Path) -> list[SignatureList]:
    """Read a file of signature lists; ToolError("bad-lists") if it does not hold any."""
    return list(parse_signature_lists(read_lists_data(path)))


def read_lists_data(path: Path) -> bytes:
    """Return the bytes of a file of signature lists, which can be parsed; ToolError("bad-lists")."""
    data = path.read_bytes()
    try:
        parse_signature_lists(data)
    except Refusal as exc:
        raise ToolError(
            f"{path} does not hold EFI signature lists",
            "name an .esl file, for example one that `trustme uefi esl` made",
            code="bad-lists",
            evidence=exc.evidence,
        ) from exc
    return data


def merge_digests(lists: Iterable[SignatureList]) -> list[SignatureList]:
    """Put entries of the same type and size into one list; certificates keep their own."""
    merged: dict[tuple[str, int], list[Signature]] = {}
    certificates = []
    for entry in lists:
        if entry.type_guid == EFI_CERT_X509:
            certificates.append(entry)
        else:
            merged.setdefault((entry.type_guid, entry.signature_size), []).extend(entry.signatures)
    digests = [
        SignatureList(guid, b"", size, tuple(dict.fromkeys(signatures)))
        for (guid, size), signatures in merged.items()
    ]
    return [*certificates, *digests]


def load_certificate(path: Path) -> x509.Certificate:
    """Load a certificate, the first of a chain; ToolError("certificate-unreadable").

    What stands behind it in a file must not become trusted or revoked by the way.
    """
    return load_chain(path)[0]


def not_enrollable(lists: bytes) -> list[str]:
    """Return the subjects of certificates that EDK2 firmware refuses to enrol itself: their key is not RSA.

    They can still be written into an OVMF store from outside, which no firmware code sees.
    """
    subjects = []
    for entry in parse_signature_lists(lists):
        if entry.type_guid == EFI_CERT_X509:
            certificate = x509.load_der_x509_certificate(entry.signatures[0].data)
            plain_rsa = (
                isinstance(certificate.public_key(), rsa.RSAPublicKey)
                and certificate.public_key_algorithm_oid != PublicKeyAlgorithmOID.RSASSA_PSS
            )
            if not plain_rsa:
                subjects.append(certificate.subject.rfc4514_string())
    return subjects


def _single(type_guid: str, data: bytes) -> SignatureList:
    return SignatureList(type_guid, b"", _OWNER_SIZE + len(data), (Signature(OWNER, data),))
