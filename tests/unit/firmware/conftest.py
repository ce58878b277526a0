# SPDX-License-Identifier: Apache-2.0
"""Signature lists made by independent tools: efitools and virt-firmware, run as programs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import settings

# A shared, busy machine is no reason for a property test to fail.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

OWNER = "77fa9abd-0359-4d32-bd60-28f4e78f784b"


@dataclass(frozen=True)
class ToolMade:
    """The same certificate and hash as each tool writes them."""

    der: bytes
    tbs: bytes
    digest: bytes
    efitools_cert: bytes
    virt_firmware: bytes
    """One certificate and two hashes."""
    efitools_hashes: dict[int, bytes]
    """SHA-2 size to list of the TBS digest, revoked for all time."""
    efitools_timed: bytes
    """SHA-256 of the TBSCertificate with a revocation time."""
    efitools_image: bytes
    """The Authenticode hash of a PE image."""


@pytest.fixture(scope="session")
def certificate() -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "db entry")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .sign(key, hashes.SHA256())
    )


@pytest.fixture(scope="session")
def tool_made(certificate: x509.Certificate, tmp_path_factory: pytest.TempPathFactory) -> ToolMade:
    place = tmp_path_factory.mktemp("siglists")
    pem = place / "cert.pem"
    pem.write_bytes(certificate.public_bytes(Encoding.PEM))
    digest = bytes(range(32))

    def made(*command: str) -> bytes:
        output = place / "output.esl"
        subprocess.run([*command, str(output)], check=True, cwd=place, capture_output=True)
        content = output.read_bytes()
        output.unlink()
        return content

    image = next(Path("/usr/lib/efitools").rglob("HelloWorld.efi"))
    return ToolMade(
        der=certificate.public_bytes(Encoding.DER),
        tbs=certificate.tbs_certificate_bytes,
        digest=digest,
        efitools_cert=made("cert-to-efi-sig-list", "-g", OWNER, str(pem)),
        virt_firmware=made(
            str(Path(sys.executable).with_name("virt-fw-sigdb")),
            *("--add-cert", OWNER, str(pem)),
            *("--add-hash", OWNER, digest.hex(), "--add-hash", OWNER, digest[::-1].hex()),
            "--output",
        ),
        efitools_hashes={
            size: made("cert-to-efi-hash-list", "-g", OWNER, "-s", str(size), str(pem))
            for size in (256, 384, 512)
        },
        efitools_timed=made("cert-to-efi-hash-list", "-t", "2024-02-03 04:05:06", str(pem)),
        efitools_image=made("hash-to-efi-sig-list", str(image)),
    )
