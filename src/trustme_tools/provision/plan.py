# SPDX-License-Identifier: Apache-2.0
"""Everything a run needs, loaded and asked for before the first device is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12

from trustme_tools.errors import ToolError
from trustme_tools.guestos import signing
from trustme_tools.guestos.signing import Signer
from trustme_tools.pki.directory import PkiDirectory, load_chain
from trustme_tools.provision.pins import Reader, Secret
from trustme_tools.provision.settings import DeviceCa, NewPin, OwnToken, Settings, TargetSettings, Token

P12_LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Anchor:
    """A CA certificate to be registered; `purpose` is one of `device.PURPOSES`."""

    purpose: str
    pem: bytes
    der: bytes
    sha256: str
    subject: str


@dataclass(frozen=True, slots=True)
class WantedPin:
    """A softtoken with `pin`; `present` opens the one that is there (None: the published PIN)."""

    pin: Secret
    present: Secret | None


@dataclass(frozen=True, slots=True)
class WantedFile:
    """The operator's PKCS#12 file, the password that opens it, and the SHA-256 of its certificate."""

    p12: bytes
    password: Secret
    certificate: str


WantedToken = WantedPin | WantedFile | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is the same for every device of a run, and the token of each target that has its own."""

    settings: Settings
    anchors: tuple[Anchor, ...]
    signer: Signer
    ek_cas: tuple[x509.Certificate, ...]
    common_token: WantedToken
    own_tokens: Mapping[str, WantedToken]

    def token(self, target: str) -> WantedToken:
        """Return what is wanted of a target's token."""
        return self.own_tokens.get(target, self.common_token)


def load(settings: Settings, targets: tuple[TargetSettings, ...]) -> Plan:
    """Load certificates, CA and secrets for the devices `targets`; a person may be asked for PINs.

    ToolError: "certificate-unreadable", "token-file-unreadable", those of `pins.Reader`, of `pki.keys` and of
    `guestos.signing` for the device CA.
    """
    reader = Reader()
    anchors = [_anchor("guest", path) for path in settings.guest_anchors]
    anchors += [_anchor("device", path) for path in settings.device_anchors]
    anchors += [_anchor("lifecycle", path) for path in settings.lifecycle_anchors]
    own = {target.name: target.token for target in targets if target.own_token}
    return Plan(
        settings,
        tuple(anchors),
        _signer(settings.device_ca, reader),
        tuple(certificate for path in settings.ek_cas for certificate in load_chain(path)),
        common_token=None if own.keys() >= {t.name for t in targets} else _token(settings.token, reader),
        own_tokens={name: _token(token, reader) for name, token in own.items()},
    )


def _anchor(purpose: str, path: Path) -> Anchor:
    """Take the first certificate of a file: what `trustme pki create` writes is a chain upwards."""
    certificate = load_chain(path)[0]
    return Anchor(
        purpose,
        certificate.public_bytes(Encoding.PEM),
        certificate.public_bytes(Encoding.DER),
        certificate.fingerprint(hashes.SHA256()).hex(),
        certificate.subject.rfc4514_string(),
    )


def _signer(ca: DeviceCa, reader: Reader) -> Signer:
    passphrase = reader.read(ca.passphrase).reveal().encode() if ca.passphrase is not None else None
    if ca.pki is not None:
        return signing.pki_signer(PkiDirectory(ca.pki), ca.signer, passphrase)
    assert ca.certificate is not None  # noqa: S101 - said by settings.parse, for the type checker
    if ca.key is not None:
        return signing.key_signer(ca.key, ca.certificate, passphrase)
    assert ca.command is not None  # noqa: S101 - same
    return signing.command_signer(ca.command, ca.certificate)


def _token(token: Token, reader: Reader) -> WantedToken:
    match token:
        case None:
            return None
        case NewPin(pin, present):
            return WantedPin(reader.read(pin), reader.read(present) if present is not None else None)
        case OwnToken(path, source):
            return _file(path, reader.read(source))


def _file(path: Path, password: Secret) -> WantedFile:
    try:
        with path.open("rb") as file:
            data = file.read(P12_LIMIT + 1)
        if len(data) > P12_LIMIT:
            raise _unreadable(path, f"larger than {P12_LIMIT} bytes")
        content = load_pkcs12(data, password.reveal().encode())
    except OSError as exc:
        raise _unreadable(path, exc.strerror or "") from exc
    except ValueError:
        # Not the exception: nothing is known of what a library puts in it.
        raise _unreadable(path, "not PKCS#12, or not its password") from None
    if content.key is None or content.cert is None:
        raise _unreadable(path, "it holds no key with its certificate")
    return WantedFile(data, password, content.cert.certificate.fingerprint(hashes.SHA256()).hex())


def _unreadable(path: Path, evidence: str) -> ToolError:
    return ToolError(
        "the token file cannot be used",
        "make it with `openssl pkcs12 -export` from a key and its certificate",
        code="token-file-unreadable",
        evidence=f"{path}: {evidence}",
    )
