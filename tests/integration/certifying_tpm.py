# SPDX-License-Identifier: Apache-2.0
"""A device's TPM that certifies its signing key, and a forger that has no TPM but knows all the formats.

The TPM is a swtpm that `swtpm_setup` made: with an EK certificate by a CA of its own, as a TPM's maker does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_ECC,
    TPM2_SE,
    TPM2B_DATA,
    TPM2B_ECC_PARAMETER,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPMS_ATTEST,
    TPMS_ECC_PARMS,
    TPMT_ECC_SCHEME,
    TPMT_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF,
    TPMT_SYM_DEF_OBJECT,
    TPMU_ASYM_SCHEME,
    TPMU_PUBLIC_PARMS,
)
from tpm2_pytss.cryptography import tpm_ecc_private_key

from tests.integration.software_tpm import SoftwareTpm

DEVICE = UUID("0b2c4a6e-5d1f-4c38-9a77-3f0e6d1b2c4a")
EK_HANDLE = 0x81010001
EK_NV = 0x01C00002

BOUND = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.SENSITIVEDATAORIGIN
AK_ATTRIBUTES = BOUND | TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.RESTRICTED | TPMA_OBJECT.SIGN_ENCRYPT
DEVICE_ATTRIBUTES = BOUND | TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.SIGN_ENCRYPT


def template(attributes: int, *, scheme: bool = True, name_algorithm: int = TPM2_ALG.SHA256) -> TPM2B_PUBLIC:
    """An ECC P-256 key; with `scheme` it signs by ECDSA with SHA-256 only."""
    parameters = TPMS_ECC_PARMS(
        symmetric=TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL),
        scheme=(
            TPMT_ECC_SCHEME(
                scheme=TPM2_ALG.ECDSA, details=TPMU_ASYM_SCHEME(ecdsa={"hashAlg": TPM2_ALG.SHA256})
            )
            if scheme
            else TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL)
        ),
        curveID=TPM2_ECC.NIST_P256,
    )
    parameters.kdf.scheme = TPM2_ALG.NULL
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=name_algorithm,
            objectAttributes=attributes,
            parameters=TPMU_PUBLIC_PARMS(eccDetail=parameters),
        )
    )


def request_of(key: Any, uuid: UUID = DEVICE) -> bytes:
    """A request (PEM) as a device makes it."""
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"UUID:{uuid}")]), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
    ]
    return make_request(key, extensions)


def make_request(key: Any, extensions: list[tuple[x509.ExtensionType, bool]], name: str = "device") -> bytes:
    """A request (PEM) that says whatever it likes."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER)


@dataclass
class Document:
    """The members of a certification before base64."""

    ek_certificate: bytes | None
    ek_public: bytes
    ak_public: bytes
    device_public: bytes
    attest: bytes
    signature: bytes

    def members(self) -> dict[str, Any]:
        encoded = {
            name: None if value is None else base64.b64encode(value).decode()
            for name, value in vars(self).items()
        }
        return {"kind": "trustme.device-key-certification", "version": 1, **encoded}

    def json(self, **changes: Any) -> bytes:
        return json.dumps({**self.members(), **changes}).encode()


class CertifyingTpm:
    """One TPM with its EK, an attestation key and a device key."""

    def __init__(self, esapi: Any, authority: x509.Certificate) -> None:
        self.authority = authority
        self._esapi = esapi
        self._ek = esapi.tr_from_tpmpublic(EK_HANDLE)
        nv = esapi.tr_from_tpmpublic(EK_NV)
        size = esapi.nv_read_public(nv)[0].nvPublic.dataSize
        self.ek_certificate = bytes(esapi.nv_read(nv, size, auth_handle=ESYS_TR.OWNER))
        self.ek_public = esapi.read_public(self._ek)[0].marshal()
        self.ak, self.ak_public = self.make(AK_ATTRIBUTES, ESYS_TR.ENDORSEMENT)
        self.device, self.device_public = self.make(DEVICE_ATTRIBUTES, scheme=False)
        self.request = request_of(self.signer(self.device))

    def make(self, attributes: int, hierarchy: int = ESYS_TR.OWNER, **options: Any) -> tuple[Any, bytes]:
        """Make a key; returns its handle and its marshalled public area."""
        public = template(attributes, **options)
        # Two keys of one hierarchy differ by what stands in `unique`.
        public.publicArea.unique.ecc.x = hashlib.sha256(f"{attributes}{options}{hierarchy}".encode()).digest()
        handle, made, *_ = self._esapi.create_primary(TPM2B_SENSITIVE_CREATE(), public, hierarchy)
        return handle, made.marshal()

    @contextmanager
    def made(self, attributes: int, **options: Any) -> Iterator[tuple[Any, bytes]]:
        """As `make`, for a while: a TPM has three places for keys."""
        handle, public = self.make(attributes, **options)
        try:
            yield handle, public
        finally:
            self._esapi.flush_context(handle)

    def signer(self, key: Any) -> Any:
        """A key of the TPM as `cryptography` takes it."""
        return tpm_ecc_private_key(self._esapi, key)

    def certify(
        self, extra: bytes, *, key: Any = None, public: bytes = b"", ak: Any = None, ak_public: bytes = b""
    ) -> Document:
        """TPM2_Certify of the device key (or `key`) by the AK (or `ak`)."""
        attest, signature = self._esapi.certify(
            key or self.device, ak or self.ak, TPM2B_DATA(extra), TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
        )
        return Document(
            ek_certificate=self.ek_certificate,
            ek_public=self.ek_public,
            ak_public=ak_public or self.ak_public,
            device_public=public or self.device_public,
            attest=bytes(attest),
            signature=signature.marshal(),
        )

    def certification(self) -> Document:
        return self.certify(hashlib.sha256(der(self.request)).digest())

    def quote(self, extra: bytes) -> tuple[bytes, bytes]:
        """TPM2_Quote by the AK: a genuine attestation of another type."""
        quoted, signature = self._esapi.quote(self.ak, "sha256:0", TPM2B_DATA(extra))
        return bytes(quoted), signature.marshal()

    def activate(self, blob: bytes, secret: bytes, ak: Any = None) -> bytes:
        """TPM2_ActivateCredential, as the EK's default template demands it."""
        session = self._esapi.start_auth_session(
            ESYS_TR.NONE,
            ESYS_TR.NONE,
            TPM2_SE.POLICY,
            TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL),
            TPM2_ALG.SHA256,
        )
        try:
            self._esapi.policy_secret(ESYS_TR.ENDORSEMENT, session, b"", b"", b"", 0)
            answer = self._esapi.activate_credential(
                ak or self.ak,
                self._ek,
                TPM2B_ID_OBJECT.unmarshal(blob)[0],
                TPM2B_ENCRYPTED_SECRET.unmarshal(secret)[0],
                session2=session,
            )
        finally:
            self._esapi.flush_context(session)
        return bytes(answer)


@contextmanager
def certifying_tpm(directory: Path) -> Iterator[CertifyingTpm]:
    """A new TPM with an EK certificate, and its keys."""
    with manufactured_tpm(directory) as (tcti, authority), ESAPI(tcti) as esapi:
        yield CertifyingTpm(esapi, authority)


@contextmanager
def manufactured_tpm(directory: Path) -> Iterator[tuple[str, x509.Certificate]]:
    """A new TPM with an EK certificate: its TCTI, and its maker's CA, which lives in `directory` too."""
    state, ca = directory / "tpm", directory / "maker"
    state.mkdir()
    ca.mkdir()
    (directory / "localca.conf").write_text(
        f"statedir = {ca}\nsigningkey = {ca}/key.pem\nissuercert = {ca}/cert.pem\ncertserial = {ca}/serial\n"
    )
    (directory / "options").write_text(
        "--platform-manufacturer test\n--platform-version 1\n--platform-model test\n"
    )
    (directory / "setup.conf").write_text(
        f"create_certs_tool = swtpm_localca\ncreate_certs_tool_config = {directory}/localca.conf\n"
        f"create_certs_tool_options = {directory}/options\nactive_pcr_banks = sha256\n"
    )
    words = ["--tpm2", "--tpmstate", state, "--create-ek-cert", "--config", directory / "setup.conf"]
    subprocess.run(["swtpm_setup", *map(str, words)], check=True, capture_output=True)
    authority = x509.load_pem_x509_certificate((ca / "cert.pem").read_bytes())
    with SoftwareTpm(directory) as tpm:
        yield tpm.tcti, authority


class Forger:
    """Keys in software that claim to be a TPM's, and attestations signed by them."""

    def __init__(self, genuine: Document) -> None:
        self.genuine = genuine
        self.ak = ec.generate_private_key(ec.SECP256R1())
        self.device = ec.generate_private_key(ec.SECP256R1())
        self.request = request_of(self.device)

    def document(
        self,
        *,
        ak_attributes: int = AK_ATTRIBUTES,
        device_attributes: int = DEVICE_ATTRIBUTES,
        magic: int = 0xFF544347,
        extra: bytes | None = None,
        name_algorithm: int = TPM2_ALG.SHA256,
        **changes: Any,
    ) -> Document:
        """A document that is right in everything but what is asked for."""
        ak_public = claim(self.ak, ak_attributes)
        device_public = claim(self.device, device_attributes, name_algorithm=name_algorithm)
        attest, _ = TPMS_ATTEST.unmarshal(self.genuine.attest)
        attest.extraData = TPM2B_DATA(extra or hashlib.sha256(der(self.request)).digest())
        if name_algorithm == TPM2_ALG.SHA256:
            attest.attested.certify.name = TPM2B_PUBLIC.unmarshal(device_public)[0].get_name()
        raw = magic.to_bytes(4, "big") + attest.marshal()[4:]
        made = {
            "ek_certificate": self.genuine.ek_certificate,
            "ek_public": self.genuine.ek_public,
            "ak_public": ak_public,
            "device_public": device_public,
            "attest": raw,
            "signature": sign_as_tpm(self.ak, raw),
        }
        return Document(**{**made, **changes})


def claim(key: Any, attributes: int, **options: Any) -> bytes:
    """The public area (TPM2B_PUBLIC) of a software key that claims `attributes`."""
    public = template(attributes, **options)
    numbers = key.public_key().public_numbers()
    public.publicArea.unique.ecc.x = TPM2B_ECC_PARAMETER(numbers.x.to_bytes(32, "big"))
    public.publicArea.unique.ecc.y = TPM2B_ECC_PARAMETER(numbers.y.to_bytes(32, "big"))
    return bytes(public.marshal())


def sign_as_tpm(key: Any, data: bytes, algorithm: Any = None, identifier: int = TPM2_ALG.SHA256) -> bytes:
    """A TPMT_SIGNATURE (ECDSA) by a software key."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(algorithm or hashes.SHA256())))
    signature = TPMT_SIGNATURE(sigAlg=TPM2_ALG.ECDSA)
    signature.signature.ecdsa.hash = identifier
    signature.signature.ecdsa.signatureR = r.to_bytes(32, "big")
    signature.signature.ecdsa.signatureS = s.to_bytes(32, "big")
    return bytes(signature.marshal())


def spki(certificate: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
