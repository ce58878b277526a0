# SPDX-License-Identifier: Apache-2.0
"""Sign with a key that stays in an HSM, a smart card or SoftHSM: PKCS#11, addressed by URI (RFC 7512).

    pkcs11:token=release;object=guestos?module-path=/usr/lib/softhsm/libsofthsm2.so

Rules:
- The URI names one key of one token; none or several are refused.
- A PIN is never in the URI (`pin-value`), in argv or in the environment: it comes from a descriptor, from the
  file that `pin-source` names, or from a person.
- A PIN is tried once: tokens lock themselves after a few wrong ones.
"""

from __future__ import annotations

import getpass
import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import PublicKeyAlgorithmOID

from trustme_tools.errors import Exit, ToolError, UsageError
from trustme_tools.guestos.signing import signing_chain
from trustme_tools.pki.keys import PSS_SALT_LENGTH

SCHEME: Final = "pkcs11:"
DEFAULT_MODULE: Final = "p11-kit-proxy.so"
"""Offers the modules that are configured on the host (p11-kit)."""
PIN_LIMIT: Final = 1024
"""Bytes read from a PIN file."""
_TOKEN: Final = {"token": "label", "serial": "serial", "manufacturer": "manufacturer_id", "model": "model"}
"""URI attribute → attribute of `pkcs11.Token`."""
_KEY: Final = frozenset({"object", "id", "type"})
_QUERY: Final = frozenset({"module-path", "pin-source"})


@dataclass(frozen=True, slots=True)
class KeyUri:
    """A PKCS#11 URI of a private key, taken apart; `text` is its path, which names it in messages."""

    text: str
    token: Mapping[str, bytes]
    """URI attribute (a key of `_TOKEN`) → value; empty if any token will do."""
    label: bytes | None
    identifier: bytes | None
    module: str
    pin_source: Path | None


def parse(uri: str) -> KeyUri:
    """Take a URI apart; UsageError("bad-pkcs11-uri", "pin-in-uri") for what is not understood in full."""
    path, _, query = uri.removeprefix(SCHEME).partition("?")
    where = _attributes(path, ";")
    how = _attributes(query, "&")
    if "pin-value" in how:
        raise UsageError(
            "the PKCS#11 URI has a PIN in it: everybody who can list processes or logs would read it",
            "leave pin-value out; give the PIN with --passphrase-fd, or name a file: pin-source=file:/path",
            code="pin-in-uri",
        )
    for found, known in ((where, {*_TOKEN, *_KEY}), (how, _QUERY)):
        if unknown := sorted(set(found) - known):
            raise _bad(f"{unknown[0]} is not supported here, only {', '.join(sorted(known))}")
    if where.get("type", b"private") != b"private":
        raise _bad("type: only a private key signs")
    if "object" not in where and "id" not in where:
        raise _bad("which key? object= or id= is missing")
    return KeyUri(
        text=f"{SCHEME}{path}",
        token={name: where[name] for name in _TOKEN if name in where},
        label=where.get("object"),
        identifier=where.get("id"),
        module=_text("module-path", how["module-path"]) if "module-path" in how else DEFAULT_MODULE,
        pin_source=_pin_path(_text("pin-source", how["pin-source"])) if "pin-source" in how else None,
    )


@dataclass(frozen=True, slots=True)
class Pkcs11Signer:
    """Signs with a key that cannot be read."""

    uri: KeyUri
    chain: tuple[x509.Certificate, ...]
    pin: bytes | None

    def __repr__(self) -> str:
        return f"Pkcs11Signer({self.uri.text})"

    @property
    def key_name(self) -> str:
        """The URI without its query."""
        return f"the key {self.uri.text}"

    def sign(self, data: bytes) -> bytes:
        """Return the signature in the scheme of the leaf's key, made by the token.

        ToolError: "pkcs11-module", "pkcs11-token", "pkcs11-key", "pkcs11-pin", "pkcs11-failed",
        "key-certificate-mismatch", "unsupported-key", "missing-tool".
        """
        pkcs11 = _library()
        with _translated(pkcs11, self.uri.text):
            token = self._token(pkcs11)
            pin = self._pin()
            # `bytes` would do from python-pkcs11 0.8 on; Yocto has 0.7.
            with token.open(user_pin=pin.decode("utf-8")) as session:
                return self._sign(pkcs11, self._key(pkcs11, session), data)

    def _token(self, pkcs11: Any) -> Any:
        try:
            library = pkcs11.lib(self.uri.module)
        except RuntimeError as exc:
            raise ToolError(
                f"the PKCS#11 module {self.uri.module} cannot be loaded",
                "name the module of your HSM: …?module-path=/path/to/module.so",
                code="pkcs11-module",
                evidence=str(exc),
            ) from exc
        present = [slot.get_token() for slot in library.get_slots(token_present=True)]
        found = [token for token in present if self._fits(token)]
        if len(found) == 1:
            return found[0]
        labels = ", ".join(sorted(str(token.label) for token in present)) or "none"
        raise ToolError(
            f"{len(found) or 'no'} tokens fit {self.uri.text}, there must be exactly one",
            "name it: token=LABEL, or serial=NUMBER",
            code="pkcs11-token",
            evidence=f"tokens present: {labels}",
        )

    def _fits(self, token: Any) -> bool:
        return all(_plain(getattr(token, _TOKEN[name])) == value for name, value in self.uri.token.items())

    def _pin(self) -> bytes:
        if self.pin is not None:
            return self.pin
        if self.uri.pin_source is not None:
            with self.uri.pin_source.open("rb") as file:
                return file.read(PIN_LIMIT).split(b"\n", 1)[0]
        if sys.stdin.isatty():
            return getpass.getpass(f"PIN of {self.uri.text}: ").encode()
        raise ToolError(
            f"the token of {self.uri.text} wants a PIN and none was given",
            "give it with --passphrase-fd N, or name a file in the URI: pin-source=file:/path",
            code="pkcs11-pin",
        )

    def _key(self, pkcs11: Any, session: Any) -> Any:
        wanted: dict[Any, Any] = {pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY}
        if self.uri.label is not None:
            wanted[pkcs11.Attribute.LABEL] = self.uri.label.decode()
        if self.uri.identifier is not None:
            wanted[pkcs11.Attribute.ID] = self.uri.identifier
        found = list(session.get_objects(wanted))
        if len(found) == 1:
            return found[0]
        raise ToolError(
            f"{len(found) or 'no'} private keys fit {self.uri.text}, there must be exactly one",
            "name it: object=LABEL, id=%01, or both",
            code="pkcs11-key",
        )

    def _sign(self, pkcs11: Any, key: Any, data: bytes) -> bytes:
        public = self.chain[0].public_key()
        kinds, mechanism = pkcs11.KeyType, pkcs11.Mechanism
        if isinstance(public, rsa.RSAPublicKey):
            self._require_kind(key, kinds.RSA)
            if self.chain[0].public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
                parameters = (mechanism.SHA512, pkcs11.MGF.SHA512, PSS_SALT_LENGTH)
                return bytes(
                    key.sign(data, mechanism=mechanism.SHA512_RSA_PKCS_PSS, mechanism_param=parameters)
                )
            return bytes(key.sign(data, mechanism=mechanism.SHA512_RSA_PKCS))
        if isinstance(public, ec.EllipticCurvePublicKey):
            self._require_kind(key, kinds.EC)
            size = (public.key_size + 7) // 8
            # FIPS 186-5, 6.4.1: the leftmost bits of the hash, as many as the order has; tokens may not cut.
            raw = bytes(key.sign(hashlib.sha512(data).digest()[:size], mechanism=mechanism.ECDSA))
            half = len(raw) // 2
            return encode_dss_signature(int.from_bytes(raw[:half]), int.from_bytes(raw[half:]))
        if isinstance(public, ed25519.Ed25519PublicKey):
            self._require_kind(key, kinds.EC_EDWARDS)
            return bytes(key.sign(data, mechanism=mechanism.EDDSA))
        raise ToolError(
            f"keys of the kind {type(public).__name__} are not used here",
            "use RSA, RSA-PSS, ECDSA P-256/P-384 or Ed25519",
            code="unsupported-key",
        )

    def _require_kind(self, key: Any, kind: Any) -> None:
        if key.key_type != kind:
            raise ToolError(
                f"{self.key_name} does not belong to the certificate "
                f"{self.chain[0].subject.rfc4514_string()}: it is of another kind",
                "name a key and a certificate of the same pair",
                code="key-certificate-mismatch",
                evidence=f"key: {key.key_type.name}, certificate: {kind.name}",
            )


def pkcs11_signer(uri: str, certificate_path: Path, pin: bytes | None = None) -> Pkcs11Signer:
    """Return a signer for the key that `uri` names and the chain in `certificate_path`."""
    return Pkcs11Signer(parse(uri), signing_chain(certificate_path), pin)


@contextmanager
def _translated(pkcs11: Any, name: str) -> Iterator[None]:
    """Turn what the token refuses into a ToolError."""
    refusals = pkcs11.exceptions
    pin = refusals.PinIncorrect, refusals.PinLocked, refusals.PinInvalid, refusals.PinLenRange
    try:
        yield
    except pin as exc:
        raise ToolError(
            f"the token of {name} does not take the PIN",
            "give the right one; it was tried once, and tokens lock themselves after a few wrong ones",
            code="pkcs11-pin",
            evidence=type(exc).__name__,
        ) from exc
    except refusals.PKCS11Error as exc:
        raise ToolError(
            f"the token of {name} does not sign",
            "try the key with pkcs11-tool --sign, and see what the maker's tools say of the token",
            code="pkcs11-failed",
            evidence=f"{type(exc).__name__} {exc}".strip(),
        ) from exc


class _MissingLibraryError(ToolError):
    exit = Exit.MISSING_TOOL


def _library() -> Any:
    try:
        import pkcs11
    except ImportError as exc:
        raise _MissingLibraryError(
            "signing with PKCS#11 needs the Python library python-pkcs11",
            "run `make setup` in the checkout, or install python-pkcs11; in Yocto: python3-pkcs11-native",
            code="missing-tool",
            evidence=str(exc),
        ) from exc
    return pkcs11


def _attributes(text: str, separator: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else []:
        name, equals, value = part.partition("=")
        if not equals or name in found:
            raise _bad(f"{name or part!r}: expected NAME=VALUE, each name once")
        found[name] = unquote_to_bytes(value)
    return found


def _text(name: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError as exc:
        raise _bad(f"{name}: not UTF-8") from exc
    if not text or "\0" in text:
        raise _bad(f"{name}: empty, or with a zero byte")
    return text


def _pin_path(value: str) -> Path:
    """RFC 7512 allows a command (`|…`) as well; nothing is run for a PIN here."""
    path = value.removeprefix("file://").removeprefix("file:")
    if not path.startswith("/"):
        raise _bad("pin-source: only file:/absolute/path")
    return Path(path)


def _plain(value: str | bytes) -> bytes:
    """Return a fixed-length field of PKCS#11 without its padding."""
    return (value.encode() if isinstance(value, str) else value).rstrip(b" \0")


def _bad(evidence: str) -> UsageError:
    return UsageError(
        f"the PKCS#11 URI is not understood: {evidence}",
        "for example pkcs11:token=release;object=guestos?module-path=/usr/lib/softhsm/libsofthsm2.so",
        code="bad-pkcs11-uri",
        evidence=evidence,
    )
