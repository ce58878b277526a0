# SPDX-License-Identifier: Apache-2.0
"""A key in the TPM that takes a PIN: it agrees on secrets (ECDH on P-256), and the TPM counts who guesses.

It is a child of the storage key, made in the TPM, and does not leave it. Its authorisation value comes from a
PIN; it is used in sessions salted to the storage key only, so that who listens on the bus cannot test
guesses. Rules:

- `noDA` is clear: the TPM counts wrong authorisations (TPM 2.0 Part 1, section 19.8), and at `MAX_TRIES` of
  `ownership` nobody may try any such key until the count has fallen, one in `RECOVERY_TIME`. The count is one
  for the whole TPM. It also rises by one at a start after the power was cut, if such a key had been used.
- No PCR policy: a policy cannot be changed, and the key has to outlive an update of the firmware's `dbx`,
  which changes PCR 7. Another system on this device may therefore guess, at the TPM's pace.
- Blobs come from a disk: a key is believed to be ours with exactly the template's public area only, and
  the TPM vouches for the attributes in it.
- A changed authorisation makes a new private blob. The TPM cannot forget the old one: who has kept a copy of
  it, and knows the PIN of then, can still use the key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_ECC,
    TPM2_PT,
    TPM2_RC,
    TPM2B_ECC_PARAMETER,
    TPM2B_ECC_POINT,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPMS_ECC_PARMS,
    TPMS_ECC_POINT,
    TPMS_SENSITIVE_CREATE,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_PUBLIC,
    TPMT_SYM_DEF_OBJECT,
    TPMU_PUBLIC_ID,
    TPMU_PUBLIC_PARMS,
    TSS2_Exception,
)

from trustme_init.tpm.connection import blames_parameter, flushed, response_code, salted_session, tpm_failures
from trustme_init.tpm.device_key import KeyBlobs
from trustme_init.tpm.sealing import NotOursError
from trustme_init.tpm.storage_key import find_storage_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

AUTH_SIZE: Final = 32
"""Bytes of an authorisation value: those of the name algorithm's digest, the most that a TPM takes."""

_COORDINATE: Final = 32
_ATTRIBUTES: Final = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.DECRYPT
)


class WrongAuthorisationError(Exception):
    """The authorisation value is not the key's, and the TPM has counted that."""


class LockedOutError(Exception):
    """The TPM tries no authorisation now; the text says for how long. Nothing was tried or counted."""


class LockoutState(NamedTuple):
    """What TPM2_GetCapability says of dictionary-attack protection; times in seconds the TPM is on."""

    counter: int
    """Wrong authorisations that are not forgotten yet."""
    limit: int
    interval: int
    """After which one is forgotten."""


class PinKey:
    """A key that is loaded, and the session for its commands, while `loaded` lends them."""

    def __init__(self, esapi: ESAPI, srk: ESYS_TR, handle: ESYS_TR, session: ESYS_TR) -> None:
        self._esapi = esapi
        self._srk = srk
        self._handle = handle
        self._session = session

    def check(self, auth: bytes) -> None:
        """Return if `auth` is the key's authorisation value. Raises as `change_auth`.

        By the cheapest command that takes it, which is without arithmetic on the curve and changes nothing.
        """
        self.change_auth(auth, auth)

    def change_auth(self, old: bytes, new: bytes) -> bytes:
        """Return the key's private blob under another authorisation value (TPM2_ObjectChangeAuth).

        Raises WrongAuthorisationError, LockedOutError; DeviceRefusal.
        """
        with self._authorised(old):
            private = self._esapi.object_change_auth(self._handle, self._srk, new, session1=self._session)
            return bytes(private.marshal())

    def agree(self, auth: bytes, peer: ec.EllipticCurvePublicKey) -> bytes:
        """Return the ECDH secret with a public key on P-256: 32 bytes, the x coordinate.

        Raises as `change_auth`.
        """
        numbers = peer.public_numbers()
        point = TPM2B_ECC_POINT(
            TPMS_ECC_POINT(
                x=TPM2B_ECC_PARAMETER(numbers.x.to_bytes(_COORDINATE, "big")),
                y=TPM2B_ECC_PARAMETER(numbers.y.to_bytes(_COORDINATE, "big")),
            )
        )
        with self._authorised(auth):
            shared = self._esapi.ecdh_zgen(self._handle, point, session1=self._session)
            return bytes(shared.point.x).rjust(_COORDINATE, b"\0")

    @contextlib.contextmanager
    def _authorised(self, auth: bytes) -> Iterator[None]:
        with tpm_failures("use a key that takes a PIN"):
            self._esapi.tr_set_auth(self._handle, auth)
            try:
                yield
            except TSS2_Exception as exc:
                match response_code(exc):
                    case TPM2_RC.AUTH_FAIL:
                        raise WrongAuthorisationError from exc
                    case TPM2_RC.LOCKOUT:
                        raise LockedOutError(_until_when(self._esapi)) from exc
                raise
            finally:
                self._esapi.tr_set_auth(self._handle, b"")


@tpm_failures("make a key that takes a PIN")
def create(esapi: ESAPI, auth: bytes) -> KeyBlobs:
    """Make a key that takes `auth`; DeviceRefusal "storage-key-missing"."""
    srk = find_storage_key(esapi)
    sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=auth))
    with salted_session(esapi, srk) as session:
        private, public, *_ = esapi.create(srk, sensitive, _template(), session1=session)
    return KeyBlobs(public.marshal(), private.marshal())


@contextlib.contextmanager
def loaded(esapi: ESAPI, blobs: KeyBlobs) -> Iterator[PinKey]:
    """Lend a key. NotOursError for what this TPM did not make; DeviceRefusal "storage-key-missing"."""
    public = _public(blobs.public)
    try:
        private, size = TPM2B_PRIVATE.unmarshal(blobs.private)
    except TSS2_Exception as exc:
        raise NotOursError("its private part is damaged") from exc
    if size != len(blobs.private):
        raise NotOursError("its private part is damaged")
    srk = find_storage_key(esapi)
    with tpm_failures("load a key that takes a PIN"):
        try:
            handle = esapi.load(srk, private, public)
        except TSS2_Exception as exc:
            if blames_parameter(exc):
                raise NotOursError(f"the TPM does not know the key: {exc}") from exc
            raise
    with flushed(esapi, handle), salted_session(esapi, srk) as session:
        yield PinKey(esapi, srk, handle, session)


def public_key(public: bytes) -> ec.EllipticCurvePublicKey:
    """Return the public half; only of what was `loaded` the TPM vouches for it. NotOursError if malformed."""
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        key = load_der_public_key(bytes(_public(public).to_der()))
    except (ValueError, LookupError) as exc:
        raise NotOursError("its public part is no point on the curve") from exc
    return key  # type: ignore[return-value]  # the template has one curve


def lockout_state(esapi: ESAPI) -> LockoutState:
    """Return how far the TPM is from locking; a plain read, for people only. TSS2_Exception, LookupError."""
    first = int(TPM2_PT.LOCKOUT_COUNTER)
    _, answer = esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, first, 3)
    values = {int(each.property): int(each.value) for each in answer.data.tpmProperties}
    return LockoutState(*(values[first + number] for number in range(3)))


def _until_when(esapi: ESAPI) -> str:
    try:
        state = lockout_state(esapi)
    except (TSS2_Exception, LookupError):
        return "the TPM does not say for how long"
    return (
        f"{state.counter} wrong authorisations of {state.limit} at most; "
        f"the TPM forgets one every {state.interval} s that it is on"
    )


def _public(data: bytes) -> TPM2B_PUBLIC:
    try:
        public, size = TPM2B_PUBLIC.unmarshal(data)
        compared, _ = TPM2B_PUBLIC.unmarshal(data)
    except TSS2_Exception as exc:
        raise NotOursError("its public part is damaged") from exc
    if size != len(data):
        raise NotOursError("its public part is damaged")
    compared.publicArea.unique = _template().publicArea.unique
    if compared.marshal() != _template().marshal():
        raise NotOursError("its public part is not of the form that we give")
    return public


def _template() -> TPM2B_PUBLIC:
    scheme = TPMT_ECC_SCHEME(scheme=TPM2_ALG.ECDH)
    scheme.details.ecdh.hashAlg = TPM2_ALG.SHA256
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=_ATTRIBUTES,
            parameters=TPMU_PUBLIC_PARMS(
                eccDetail=TPMS_ECC_PARMS(
                    symmetric=TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL),
                    scheme=scheme,
                    curveID=TPM2_ECC.NIST_P256,
                    kdf=TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL),
                )
            ),
            unique=TPMU_PUBLIC_ID(ecc=TPMS_ECC_POINT(x=b"", y=b"")),
        )
    )
