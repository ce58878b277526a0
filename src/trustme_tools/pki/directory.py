# SPDX-License-Identifier: Apache-2.0
"""A PKI directory as `trustme pki create` makes it: where its certificates and keys are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from trustme_tools.errors import ToolError
from trustme_tools.pki import keys
from trustme_tools.pki.keys import PrivateKey
from trustme_tools.tooling import secret_file

PLATFORM_KEY: Final = "PK"
KEY_EXCHANGE_KEYS: Final = ("KEK",)
DB_CERTIFICATES: Final = ("DB", "ssig_subca")
"""What goes to db, in this order: the signer of the boot image, the anchor of the core container."""


@dataclass(frozen=True, slots=True)
class PkiDirectory:
    """Read access by name (`ssig_cml`, `DB` …)."""

    path: Path

    @property
    def is_development(self) -> bool:
        """Whether its keys are protected by the well-known passphrase only."""
        return (self.path / keys.DEVELOPMENT_MARKER).exists()

    def certificate_path(self, name: str) -> Path:
        """PEM chain of `name`, leaf first."""
        return self.path / f"{name}.cert"

    def key_path(self, name: str) -> Path:
        """Encrypted PEM key of `name`."""
        return self.path / f"{name}.key"

    def chain(self, name: str) -> list[x509.Certificate]:
        """Return the certificates of `name`.cert, leaf first."""
        self._require()
        return load_chain(self.certificate_path(name))

    def certificate(self, name: str) -> x509.Certificate:
        """Return the certificate of `name` itself."""
        return self.chain(name)[0]

    @contextmanager
    def unlocked_key(self, name: str, passphrase: bytes | None = None) -> Iterator[tuple[int, str]]:
        """Yield (descriptor, path) of the key as unencrypted PEM that only exists in memory.

        For programs that want a key file (sbsign, ukify): give them the path and `pass_fds=(descriptor,)`.
        """
        with secret_file(self.key_pem(name, passphrase)) as unlocked:
            yield unlocked

    def key_pem(self, name: str, passphrase: bytes | None = None) -> bytes:
        """Return the key as PEM without encryption: for a tool's anonymous file, never for a disk."""
        key = self.key(name, passphrase)
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def key(self, name: str, passphrase: bytes | None = None) -> PrivateKey:
        """Return the private key of `name`; see `keys.load` about passphrases."""
        self._require()
        return keys.load(self.key_path(name), passphrase)

    def _require(self) -> None:
        if not self.path.is_dir():
            raise ToolError(
                f"{self.path} is not a PKI directory",
                f"make one, for example: trustme pki create {self.path} --development",
                code="no-pki",
            )


def load_chain(path: Path) -> list[x509.Certificate]:
    """Load one or more PEM certificates, or a DER one; ToolError("certificate-unreadable")."""
    try:
        data = path.read_bytes()
        if b"-----BEGIN" in data:
            return x509.load_pem_x509_certificates(data)
        return [x509.load_der_x509_certificate(data)]
    except OSError as exc:
        evidence = str(exc.strerror)
    except ValueError as exc:
        evidence = str(exc)
    raise ToolError(
        f"the certificate {path} cannot be read",
        "name a PEM or DER certificate, for example PKI_DIRECTORY/ssig_cml.cert",
        code="certificate-unreadable",
        evidence=evidence,
    )
