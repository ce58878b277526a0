# SPDX-License-Identifier: Apache-2.0
"""Who signs a GuestOS configuration: a key file, a key in an HSM, a command that reaches a service.

Rules:
- Every signature is checked against the leaf certificate by the device's own code before it is written.
- A chain with a certificate that is not valid now does not sign, unless that is asked for.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.errors import Refusal
from trustme_tools.errors import ToolError
from trustme_tools.pki import keys
from trustme_tools.pki.directory import PkiDirectory, load_chain

CORE_SIGNER: Final = "ssig_cml"
CHAIN_LIMIT: Final = 4
"""Certificates the device accepts in one chain, anchor included."""
SIGNATURE_LIMIT: Final = 4096
"""Bytes taken from a signing command; a signature is far smaller."""


class Signer(Protocol):
    """Makes signatures that belong to `chain[0]`."""

    @property
    def key_name(self) -> str:
        """What signs, for messages: a path, a URI, a command. Never a secret."""
        ...

    @property
    def chain(self) -> Sequence[x509.Certificate]:
        """Certificates, leaf first, without the root."""
        ...

    def sign(self, data: bytes) -> bytes:
        """Return the raw SHA-512 signature of `data`."""
        ...


@dataclass(frozen=True, slots=True)
class KeySigner:
    """Signs with a private key in memory."""

    key: keys.PrivateKey
    chain: tuple[x509.Certificate, ...]
    key_name: str = "the key in memory"

    def sign(self, data: bytes) -> bytes:
        """Return the signature in the scheme of the leaf's key."""
        return keys.sign(self.key, self.chain[0], data)


@dataclass(frozen=True, slots=True)
class CommandSigner:
    """Signs with an external command: data on its stdin, the raw signature on its stdout."""

    command: str
    chain: tuple[x509.Certificate, ...]

    @property
    def key_name(self) -> str:
        """The command: which key it uses, only it knows."""
        return f"the key of the command {self.command}"

    def sign(self, data: bytes) -> bytes:
        """Run the command; ToolError("sign-command-missing") if there is no such program.

        ToolError("sign-command-failed") if it fails or gives no plausible signature.
        """
        try:
            words = shlex.split(self.command)
        except ValueError as exc:
            raise self._failed(str(exc)) from exc
        if not words:
            raise self._failed("the command is empty")
        # The data comes from a file, so that only one pipe is left and neither side can block the other.
        with tempfile.TemporaryFile() as source:
            source.write(data)
            source.seek(0)
            try:
                process = subprocess.Popen(words, stdin=source, stdout=subprocess.PIPE)
            except FileNotFoundError as exc:
                raise ToolError(
                    f"the signing command is not there: {words[0]}",
                    "name a program that is on the PATH, or its whole path; no shell is involved",
                    code="sign-command-missing",
                    evidence=f"the whole command: {self.command}",
                ) from exc
            except OSError as exc:
                raise self._failed(exc.strerror or str(exc)) from exc
            with process:
                assert process.stdout is not None  # noqa: S101 - said by PIPE, for the type checker
                signature = process.stdout.read(SIGNATURE_LIMIT + 1)
                if len(signature) > SIGNATURE_LIMIT:
                    process.kill()
        if len(signature) > SIGNATURE_LIMIT:
            raise self._failed(f"more than {SIGNATURE_LIMIT} bytes on stdout")
        if process.returncode:
            raise self._failed(f"exit code {process.returncode}")
        if not signature:
            raise self._failed("nothing on stdout")
        return signature

    def _failed(self, evidence: str) -> ToolError:
        return ToolError(
            f"the signing command failed: {self.command}",
            "it must read the data on stdin and write the raw SHA-512 signature, nothing else, on stdout",
            code="sign-command-failed",
            evidence=evidence,
        )


def key_signer(key_path: Path, certificate_path: Path, passphrase: bytes | None = None) -> KeySigner:
    """Load a key and its chain; ToolError("key-certificate-mismatch") names both files if they differ."""
    chain = signing_chain(certificate_path)
    key = keys.load(key_path, passphrase)
    if keys.public_der(key) != keys.public_der(chain[0]):
        raise ToolError(
            f"the key {key_path} does not belong to the first certificate of {certificate_path}",
            "name a key and a certificate of the same pair, for example ssig_cml.key and ssig_cml.cert",
            code="key-certificate-mismatch",
            evidence=f"certificate: {chain[0].subject.rfc4514_string()}",
        )
    return KeySigner(key, chain, f"the key {key_path}")


def pki_signer(pki: PkiDirectory, name: str = CORE_SIGNER, passphrase: bytes | None = None) -> KeySigner:
    """Return the signer `name` of a PKI directory; the default signs core GuestOSes."""
    return key_signer(pki.key_path(name), pki.certificate_path(name), passphrase)


def command_signer(command: str, certificate_path: Path) -> CommandSigner:
    """Return a signer that runs `command` for the leaf in `certificate_path`."""
    return CommandSigner(command, signing_chain(certificate_path))


def signing_chain(path: Path) -> tuple[x509.Certificate, ...]:
    """Load a chain, leaf first, and leave the root out; ToolError("bad-chain") if it is not one."""
    certificates = load_chain(path)
    chain = [certificate for certificate in certificates if certificate.subject != certificate.issuer]
    if not chain:
        raise _bad_chain(path, "there is no leaf certificate, only a self-signed one")
    if len(chain) >= CHAIN_LIMIT:
        raise _bad_chain(path, f"{len(chain)} certificates below the root, at most {CHAIN_LIMIT - 1}")
    for certificate, issuer in pairwise(certificates):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature) as exc:
            names = (
                f"{certificate.subject.rfc4514_string()} is not issued by {issuer.subject.rfc4514_string()}"
            )
            raise _bad_chain(path, names) from exc
    return tuple(chain)


def require_valid(chain: Sequence[x509.Certificate], at: datetime) -> None:
    """Refuse a chain that a device would refuse for its dates; `at` is aware.

    ToolError("certificate-expired" or "certificate-not-yet-valid"), the device's own names.
    """
    for certificate in chain:
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if start <= at <= end:
            continue
        expired = at > end
        raise ToolError(
            f"the certificate {certificate.subject.rfc4514_string()} "
            + ("has expired" if expired else "is not valid yet")
            + ": nothing is signed with it",
            "sign with a certificate that is valid, or say that these dates are meant (--allow-expired)",
            code="certificate-expired" if expired else "certificate-not-yet-valid",
            evidence=f"valid {start:%Y-%m-%dT%H:%M:%SZ} to {end:%Y-%m-%dT%H:%M:%SZ}, "
            f"now {at:%Y-%m-%dT%H:%M:%SZ}",
        )


def signed(signer: Signer, data: bytes, *, allow_expired: bool = False) -> tuple[bytes, bytes]:
    """Return (signature, certificate chain as PEM) of `data`, after checking dates and signature.

    ToolError of `require_valid`, unless `allow_expired`; ToolError("key-certificate-mismatch").
    """
    from trustme_init.trust.signature import verify_signature

    if not allow_expired:
        require_valid(signer.chain, datetime.now(UTC))
    signature = signer.sign(data)
    try:
        verify_signature(signer.chain[0], signature, data)
    except Refusal as exc:
        raise ToolError(
            f"the signature of {signer.key_name} does not belong to the certificate "
            f"{signer.chain[0].subject.rfc4514_string()}",
            "sign with the key of that certificate: SHA-512, and the scheme of its key type",
            code="key-certificate-mismatch",
            evidence=str(exc),
        ) from exc
    return signature, b"".join(certificate.public_bytes(Encoding.PEM) for certificate in signer.chain)


def _bad_chain(path: Path, evidence: str) -> ToolError:
    return ToolError(
        f"the certificates in {path} are no signing chain",
        "put the leaf first, then each issuer; the root may be left out",
        code="bad-chain",
        evidence=evidence,
    )
