# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests: quick ones made here on P-256, others by the openssl program."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku

from trustme_init.trust.anchors import Anchor, AnchorSet, Purpose, Revocations
from trustme_init.trust.certificate import fingerprint

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
CODE_SIGNING = x509.ExtendedKeyUsage([Eku.CODE_SIGNING])
CLIENT_AUTH = x509.ExtendedKeyUsage([Eku.CLIENT_AUTH])


def usage(*names: str) -> x509.KeyUsage:
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: name in names for name in every})


CERT_SIGN = usage("key_cert_sign", "crl_sign")


@dataclass(frozen=True)
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: Any

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)


@dataclass(frozen=True)
class Wish:
    """What a certificate shall say. `ca` None leaves basicConstraints out."""

    subject: str
    ca: bool | None = False
    path_length: int | None = None
    key_usage: x509.KeyUsage | None = None
    purpose: x509.ExtendedKeyUsage | None = None
    more: tuple[tuple[x509.ExtensionType, bool], ...] = ()
    not_before: datetime = NOW - 10 * DAY
    not_after: datetime = NOW + 10 * DAY
    serial: int = 4711

    def but(self, **changes: Any) -> Wish:
        return replace(self, **changes)


ROOT = Wish("root", ca=True, key_usage=CERT_SIGN)
SUB = Wish("sub", ca=True, key_usage=CERT_SIGN)
LEAF = Wish("leaf", key_usage=usage("digital_signature"))


def issue(wish: Wish, issuer: Issued | None = None, key: Any = None) -> Issued:
    """Make a certificate; self-signed without issuer, on a new P-256 key unless one is given."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    signer = issuer.key if issuer else key
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, wish.subject)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(wish.serial)
        .not_valid_before(wish.not_before)
        .not_valid_after(wish.not_after)
    )
    extensions: list[tuple[x509.ExtensionType, bool]] = list(wish.more)
    if wish.ca is not None:
        extensions.append((x509.BasicConstraints(wish.ca, wish.path_length), True))
    if wish.key_usage is not None:
        extensions.append((wish.key_usage, True))
    if wish.purpose is not None:
        extensions.append((wish.purpose, False))
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Issued(builder.sign(signer, algorithm), key)


def anchors(
    *issued: Issued | x509.Certificate,
    revocations: Revocations | None = None,
    purpose: Purpose = Purpose.CORE,
) -> AnchorSet:
    """Return a set made without the checks of `anchor_set`, so that the later ones are seen to act."""
    certificates = [each.certificate if isinstance(each, Issued) else each for each in issued]
    return AnchorSet(
        purpose,
        tuple(
            Anchor(
                certificate.public_bytes(Encoding.DER),
                certificate.subject.rfc4514_string(),
                fingerprint(certificate.public_bytes(Encoding.DER)),
                purpose,
                "test",
            )
            for certificate in certificates
        ),
        revocations or Revocations(),
    )


def bundle(*issued: Issued | x509.Certificate) -> bytes:
    certificates = [each.certificate if isinstance(each, Issued) else each for each in issued]
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def openssl(*arguments: str | Path, stdin: bytes | None = None) -> bytes:
    result = subprocess.run(["openssl", *map(str, arguments)], input=stdin, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


class OpensslCa:
    """Certificates with keys that the library cannot put into one: id-RSASSA-PSS; or signs with: SHA-1."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def key(self, name: str, algorithm: str = "RSA-PSS", bits: int = 2048) -> Path:
        path = self.place / f"{name}.key"
        if not path.exists():
            option = f"rsa_keygen_bits:{bits}"
            openssl("genpkey", "-algorithm", algorithm, "-pkeyopt", option, "-out", path)
        return path

    def issue(
        self,
        name: str,
        key: Path,
        extensions: Sequence[str],
        issuer: tuple[x509.Certificate, Path] | None = None,
        *options: str,
    ) -> x509.Certificate:
        """Return a certificate of 30 days from today, version 1 without extensions.

        `options` go to the signing. The library warns about what it will refuse one day; that is wanted here.
        """
        request = self.place / "request.pem"
        config = self.place / "extensions.cnf"
        config.write_text("\n".join(extensions) + "\n")
        openssl("req", "-new", "-key", key, "-subj", f"/CN={name}", "-out", request)
        common: tuple[str | Path, ...] = ("x509", "-req", "-in", request, "-days", "30")
        if extensions:
            common += ("-extfile", config)
        if "-set_serial" not in options:
            common += ("-set_serial", "77")
        if issuer is None:
            pem = openssl(*common, "-signkey", key, *options)
        else:
            certificate, issuer_key = issuer
            path = self.place / "issuer.pem"
            path.write_bytes(certificate.public_bytes(Encoding.PEM))
            pem = openssl(*common, "-CA", path, "-CAkey", issuer_key, *options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x509.load_pem_x509_certificate(pem)
