# SPDX-License-Identifier: Apache-2.0
"""The PKCS#11 token: a smart card, USB token or HSM, through the module of its maker (PKCS #11 v3.1, OASIS).

The hardware holds a key pair on P-256 that this module made there, not extractable, and agrees on secrets
with it (CKM_ECDH1_DERIVE): method 2 of `wrapping`, as the TPM token. `pkcs11-token.json` says which hardware
and which key; it holds no secret. The PIN is the hardware's own user PIN, for all keys on it.

Rules:
- The module is native code with access to all that its process has: its path comes from the signed policy.
- The hardware counts wrong PINs. So does ours (`attempts`), as for any kind of token; but who may remove a
  token and make it anew begins a new count of ours. The hardware's last try is never ours to take: who locks
  it loses every key on it, and a typing error must not.
- "Already logged in" is no proof of a PIN: it is refused.
- The module is initialised for one use and finalised after it (C_Finalize), which ends every session, also
  one whose login failed. So there is one use at a time.
- The public half is read from the hardware at each use, and is the one that was made.
- Removing the token removes our file. The key pair stays in the hardware: that takes its PIN, and its own
  tools.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trustme_init.errors import DeviceRefusal, Refusal, TokenRefusal
from trustme_init.tokens.place import PKCS11, TOKEN_FILES, TokenPlace, TokenStatus
from trustme_init.tokens.softtoken import check_new_pin, is_text
from trustme_init.tokens.store import DEVELOPMENT_PIN

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

FILE_LIMIT: Final = 4096
KEY_LABEL: Final = "trustme token"
"""CKA_LABEL begins with it; the name of what the key is for follows."""

_VERSION: Final = 1
_FILE_KIND: Final = "trustme.pkcs11-token"
_ID_BYTES: Final = 16
_POINT: Final = 65
"""Bytes of an uncompressed point on P-256. CKA_EC_POINT is an OCTET STRING of it; of old modules, bare."""
_DER_POINT: Final = bytes((0x04, _POINT))
_SECRET_BITS: Final = 256

_in_use: Final[set[Path]] = set()
"""The modules that are initialised now."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Which token of which module, as the policy names it."""

    module: Path
    label: str
    """CK_TOKEN_INFO.label, without the padding."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the file says."""

    serial: bytes
    """CK_TOKEN_INFO.serialNumber."""
    key_id: bytes
    """CKA_ID of both halves."""
    public_sha256: str
    """Of the uncompressed point."""
    default_pin: bool | None


class Pkcs11Token(TokenPlace):
    """The token that `directory` describes, with `limit` wrong PINs allowed; a `TokenKind`.

    What needs the hardware raises DeviceRefusal: "pkcs11-library-missing", "pkcs11-module-unusable",
    "pkcs11-failed", "token-absent"; TokenRefusal: "token-in-use", "token-hardware-locked", "token-final-try".
    """

    def __init__(self, directory: Path, limit: int, hardware: Hardware) -> None:
        super().__init__(directory, TOKEN_FILES[PKCS11], FILE_LIMIT, limit)
        self._hardware = hardware

    def status(self) -> TokenStatus:
        """Return what is known without asking the hardware; a damaged file is a fault in it."""
        return self._status(PKCS11, lambda: self._load().default_pin)

    def create(self, pin: str, *, common_name: str, now: datetime | None = None) -> None:  # noqa: ARG002
        """Make a key pair in the hardware, with its present user PIN; durable on return.

        A power cut may leave a key pair there that nothing uses, labelled with `common_name`.

        Raises:
            TokenRefusal: "token-already-there", "token-not-stored", and what `Attempts.try_pin` raises.
        """
        with self._changing(make=True):
            self._require_none()
            if self._is_new():
                self._attempts.reset()
            with self._logged_in(None, pin, write=True) as (serial, session):
                key_id = os.urandom(_ID_BYTES)
                public = _generate(session, key_id, f"{KEY_LABEL} {common_name}")
                self._store(_Kept(serial, key_id, _sha256(public), pin == DEVELOPMENT_PIN))

    @contextmanager
    def open(self, pin: str) -> Iterator[OpenPkcs11Token]:
        """Lend the opened token; the hardware is logged out when the body ends.

        Raises:
            TokenRefusal: "token-missing", "token-malformed", "token-foreign", and what `Attempts.try_pin`
                raises.
        """
        with ExitStack() as held:
            with self._changing():
                kept = self._load()
                _, session = held.enter_context(self._logged_in(kept, pin))
                private, public = _pair(session, kept)
            yield OpenPkcs11Token(private, public)

    def change_pin(self, old: str, new: str) -> None:
        """Set the hardware's user PIN, for all keys on it (C_SetPIN).

        Raises:
            TokenRefusal: "token-bad-pin" (for the new one; the hardware has rules of its own), and what
                `open` raises.
        """
        check_new_pin(new)
        with self._changing():
            kept = self._load()
            with self._logged_in(kept, old, write=True) as (_, session):
                # What is known of the PIN is forgotten first: a cut must not leave a false word about it.
                self._store(replace(kept, default_pin=None))
                try:
                    _set_pin(session, old, new)
                except TokenRefusal:
                    self._store(kept)
                    raise
                self._store(replace(kept, default_pin=new == DEVELOPMENT_PIN))

    def remove(self) -> None:
        """Forget the token, with its count. TokenRefusal("token-not-stored")."""
        if not self._directory.is_dir():
            return
        with self._changing():
            for path in (self._path, self._attempts_path):
                self._remove(path)

    @contextmanager
    def _logged_in(self, kept: _Kept | None, pin: str, *, write: bool = False) -> Iterator[tuple[bytes, Any]]:
        """Lend the hardware's serial number and a session, after one try of the PIN."""
        with ExitStack() as held:
            held.enter_context(_translated())
            token = _find(held.enter_context(_module(self._hardware.module)), self._hardware.label, kept)
            _require_tries(token)
            session = self._attempts.try_pin(lambda: _login(token, pin, write=write))
            held.enter_context(session)
            yield bytes(token.serial), session

    def _store(self, kept: _Kept) -> None:
        document = {
            "kind": _FILE_KIND,
            "version": _VERSION,
            "serial": base64.b64encode(kept.serial).decode(),
            "key_id": kept.key_id.hex(),
            "public_sha256": kept.public_sha256,
            "default_pin": kept.default_pin,
        }
        self._write(self._path, json.dumps(document, indent=1).encode() + b"\n")

    def _load(self) -> _Kept:
        text = self._read()
        try:
            return _decode(text)
        except (ValueError, TypeError, LookupError, RecursionError) as exc:
            raise TokenRefusal(
                "token-malformed",
                "the token's file is damaged",
                evidence=f"{self._path.name}: {type(exc).__name__}",
                remedy="put the token's file back, or remove the token and set a new one up",
            ) from exc


class OpenPkcs11Token:
    """A `wrapping.OpenToken` whose key is in the hardware; it serves while `Pkcs11Token.open` lends it."""

    def __init__(self, private: Any, public: bytes) -> None:
        self._private = private
        self._public = public

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half, as the hardware has it."""
        from cryptography.hazmat.primitives.asymmetric import ec

        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), self._public)

    def decrypt(self, encapsulated: bytes) -> bytes:  # noqa: ARG002 - the key is EC
        """Raise ValueError, as for any content that is another token's."""
        raise ValueError("not an RSA token")

    def agree(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        """Return the ECDH secret, 32 bytes. DeviceRefusal "pkcs11-failed"."""
        import pkcs11
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        point = peer.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        attribute = pkcs11.Attribute
        with _translated():
            shared = self._private.derive_key(
                pkcs11.KeyType.GENERIC_SECRET,
                _SECRET_BITS,
                mechanism=pkcs11.Mechanism.ECDH1_DERIVE,
                mechanism_param=(pkcs11.KDF.NULL, None, point),
                # It goes on to be a key in this process, and nothing of it stays in the hardware.
                template={attribute.TOKEN: False, attribute.SENSITIVE: False, attribute.EXTRACTABLE: True},
            )
            return bytes(shared[attribute.VALUE])


@contextmanager
def _module(path: Path) -> Iterator[Any]:
    """Lend the initialised module."""
    try:
        import pkcs11
    except ImportError as exc:
        raise DeviceRefusal(
            "pkcs11-library-missing",
            "this base system cannot use PKCS#11 tokens",
            evidence=str(exc),
            remedy="build a base system that has python-pkcs11 and the module of the token's maker",
        ) from exc
    if path in _in_use:
        raise _busy("this process uses another token of the module")
    try:
        library = pkcs11.lib(str(path))
    except (pkcs11.PKCS11Error, RuntimeError) as exc:
        raise DeviceRefusal(
            "pkcs11-module-unusable",
            "the PKCS#11 module cannot be loaded",
            evidence=f"{path}: {str(exc) or type(exc).__name__}",
            remedy="build a base system whose policy names the module of the token's maker, and which has it",
        ) from exc
    _in_use.add(path)
    try:
        yield library
    finally:
        _in_use.discard(path)
        library.finalize()


def _find(library: Any, label: str, kept: _Kept | None) -> Any:
    """Return the one token with this label, and, once it is known, this serial number."""
    present = [slot.get_token() for slot in library.get_slots(token_present=True)]
    named = [token for token in present if token.label == label]
    found = [token for token in named if kept is None or bytes(token.serial) == kept.serial]
    if len(found) == 1:
        return found[0]
    if named and kept is not None and not found:
        raise _foreign("a token of this label is there, with another serial number")
    raise DeviceRefusal(
        "token-absent",
        f"{len(found) or 'no'} tokens are plugged in that have the label of ours",
        evidence=f"{label!a} is wanted; there are {[token.label for token in present]!a}",
        remedy="plug in the one token that was set up for this device",
    )


def _require_tries(token: Any) -> None:
    from pkcs11 import TokenFlag

    if token.flags & TokenFlag.USER_PIN_LOCKED:
        raise _locked("the token says so")
    if token.flags & TokenFlag.USER_PIN_FINAL_TRY:
        raise TokenRefusal(
            "token-final-try",
            "one more wrong PIN would lock the hardware, and every key in it",
            evidence="the token says that one try is left",
            remedy="enter the PIN with the maker's own tools (`pkcs11-tool --login --test`), then here again",
        )


def _login(token: Any, pin: str, *, write: bool) -> Any:
    """Return a session of the logged-in user. One C_Login at most, and none that cannot be right."""
    import pkcs11

    # An empty PIN may mean "ask at the pin pad" to a module, and half a surrogate pair has no encoding.
    if not pin or not is_text(pin):
        raise _wrong_pin()
    try:
        return token.open(rw=write, user_pin=pin)
    except (pkcs11.PinIncorrect, pkcs11.PinLenRange, pkcs11.PinInvalid) as exc:
        raise _wrong_pin() from exc
    except pkcs11.PinLocked as exc:
        raise _locked(type(exc).__name__) from exc
    except (pkcs11.UserAlreadyLoggedIn, pkcs11.AnotherUserAlreadyLoggedIn) as exc:
        raise _busy(type(exc).__name__) from exc


def _generate(session: Any, key_id: bytes, label: str) -> bytes:
    """Make a key pair in the hardware; return its point, uncompressed."""
    from pkcs11 import Attribute, KeyType, Mechanism
    from pkcs11.util.ec import encode_named_curve_parameters

    curve = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
    )
    public, private = curve.generate_keypair(
        store=True,
        id=key_id,
        label=label,
        mechanism=Mechanism.EC_KEY_PAIR_GEN,
        public_template={Attribute.VERIFY: False},
        private_template={
            Attribute.PRIVATE: True,
            Attribute.SENSITIVE: True,
            Attribute.EXTRACTABLE: False,
            Attribute.DERIVE: True,
            Attribute.SIGN: False,
        },
    )
    _require_kept_in(private)
    return _point(public)


def _pair(session: Any, kept: _Kept) -> tuple[Any, bytes]:
    """Return the private half, and the point of the public one."""
    from pkcs11 import Attribute, ObjectClass

    halves = []
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        found = list(session.get_objects({Attribute.CLASS: kind, Attribute.ID: kept.key_id}))
        if len(found) != 1:
            raise _foreign(f"it has {len(found)} objects {kind.name} of the key")
        halves += found
    private, public = halves
    point = _point(public)
    if _sha256(point) != kept.public_sha256:
        raise _foreign("its public key is not the one that was made")
    _require_kept_in(private)
    return private, point


def _require_kept_in(private: Any) -> None:
    from pkcs11 import Attribute

    if private[Attribute.EXTRACTABLE] or not private[Attribute.SENSITIVE]:
        raise _foreign("its private key can be read")


def _point(public: Any) -> bytes:
    from pkcs11 import Attribute

    point = bytes(public[Attribute.EC_POINT])
    if len(point) == len(_DER_POINT) + _POINT:
        point = point.removeprefix(_DER_POINT)
    if len(point) != _POINT:
        raise _foreign("its public key is not on P-256")
    return point


def _set_pin(session: Any, old: str, new: str) -> None:
    import pkcs11

    try:
        session.set_pin(old, new)
    except (pkcs11.PinLenRange, pkcs11.PinInvalid, pkcs11.PinTooWeak) as exc:
        raise TokenRefusal(
            "token-bad-pin",
            "the hardware does not take this as a PIN",
            evidence=f"{type(exc).__name__}, for {len(new)} characters",
            remedy="choose one that the token's maker allows; often 4 to 15 digits or letters",
        ) from exc


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what the module refuses into a refusal, by its name only: its text is the module's."""
    try:
        yield
    except Refusal:
        raise
    except Exception as exc:
        import pkcs11

        if not isinstance(exc, pkcs11.PKCS11Error):
            raise
        raise DeviceRefusal(
            "pkcs11-failed",
            "the token did not do what it was asked for",
            evidence=type(exc).__name__,
            remedy="plug the token in again; see what the maker's tools say about it",
        ) from exc


def _sha256(point: bytes) -> str:
    return hashlib.sha256(point).hexdigest()


def _decode(text: bytes) -> _Kept:
    """Return what `Pkcs11Token._store` wrote; ValueError, TypeError or LookupError for anything else."""
    document: Any = json.loads(text)
    if (document["kind"], document["version"]) != (_FILE_KIND, _VERSION):
        raise ValueError("not a PKCS#11 token of this version")
    key_id, public = bytes.fromhex(document["key_id"]), document["public_sha256"]
    flag = document["default_pin"]
    if (
        len(key_id) != _ID_BYTES
        or not isinstance(public, str)
        or not (flag is None or isinstance(flag, bool))
    ):
        raise ValueError("not what we write")
    return _Kept(base64.b64decode(document["serial"], validate=True), key_id, public, flag)


def _wrong_pin() -> TokenRefusal:
    return TokenRefusal(
        "token-wrong-pin", "the PIN does not open the token", remedy="enter the PIN that was set last"
    )


def _locked(evidence: str) -> TokenRefusal:
    return TokenRefusal(
        "token-hardware-locked",
        "the hardware is locked: its PIN was wrong too often, here or elsewhere",
        evidence=evidence,
        remedy="unlock it with its SO PIN or PUK and the maker's own tools",
    )


def _busy(evidence: str) -> TokenRefusal:
    return TokenRefusal(
        "token-in-use",
        "the hardware is in use, so its PIN cannot be tried",
        evidence=evidence,
        remedy="try again when the other use has ended",
    )


def _foreign(evidence: str) -> TokenRefusal:
    return TokenRefusal(
        "token-foreign",
        "the hardware does not hold the key that was made for this device",
        evidence=evidence,
        remedy="plug in the token that was set up here; if its keys were deleted, what they wrapped is lost",
    )
