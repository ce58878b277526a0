# SPDX-License-Identifier: Apache-2.0
"""Certificates (RFC 5280) for each role of the PKI: extensions, validity, issuing.

notBefore: a device without a battery-backed clock judges certificates at the build date of its base
system, and build hosts disagree about the time by minutes or by a time zone. Certificates are therefore
dated back by BACKDATE, to midnight. Whoever sets the build date must still keep it at or after the
signer's notBefore: a reproducible build of an old commit with a new PKI has to raise the floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trustme_init.trust.certificate import LIFECYCLE_PURPOSE
from trustme_tools.pki.keys import PSS_SALT_LENGTH, KeyType, NewKey
from trustme_tools.tooling import run, secret_file

BACKDATE: Final = timedelta(days=1)
ROOT_DAYS: Final = 3650
SUB_CA_DAYS: Final = 2190
LEAF_DAYS: Final = 1095

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


class Role(Enum):
    """What a certificate is for; decides its extensions."""

    ROOT_CA = "root CA"
    SUB_CA = "sub CA"
    """Issues leaves only (path length 0)."""
    CODE_SIGNING = "code signing leaf"
    LIFECYCLE = "lifecycle statement leaf"
    PLATFORM = "platform key"
    """PK, KEK, db: never a CA, so that a platform key in db is no anchor for the core container."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who signs: its certificate and key."""

    certificate: x509.Certificate
    key: NewKey


def extension_value(extensions: x509.Extensions, kind: type[_Extension]) -> _Extension | None:
    """Return the value of one extension, or None where it is absent."""
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def default_not_before() -> datetime:
    """Midnight (UTC) at least BACKDATE ago."""
    return (datetime.now(UTC) - BACKDATE).replace(hour=0, minute=0, second=0, microsecond=0)


def name(common_name: str, organization: str) -> x509.Name:
    """Return the subject O=…, CN=…."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def issue(
    role: Role,
    subject: x509.Name,
    key: NewKey,
    issuer: Issuer | None = None,
    *,
    not_before: datetime,
    days: int,
) -> x509.Certificate:
    """Issue a certificate for `key`; self-signed without `issuer`."""
    signer = issuer.key if issuer is not None else key
    issuer_name = issuer.certificate.subject if issuer is not None else subject
    not_after = not_before + timedelta(days=days)
    if KeyType.RSA_PSS in (key.type, signer.type):
        return _issue_with_openssl(role, subject, key, issuer, not_before=not_before, not_after=not_after)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(_basic_constraints(role), critical=True)
        .add_extension(_key_usage(role), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.private.public_key()), critical=False)
        .add_extension(_authority(issuer, signer), critical=False)
    )
    if role is Role.CODE_SIGNING:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
        )
    if role is Role.LIFECYCLE:
        builder = builder.add_extension(x509.ExtendedKeyUsage([LIFECYCLE_PURPOSE]), critical=False)
    if isinstance(signer.private, ed25519.Ed25519PrivateKey):
        return builder.sign(signer.private, None)
    if isinstance(signer.private, rsa.RSAPrivateKey):
        return builder.sign(signer.private, _hash(role, signer), rsa_padding=padding.PKCS1v15())
    return builder.sign(signer.private, _hash(role, signer))


def _hash(role: Role, signer: NewKey) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512:
    if isinstance(signer.private, ec.EllipticCurvePrivateKey):
        return hashes.SHA384()
    # Firmware is only sure to know SHA-256.
    return hashes.SHA256() if role is Role.PLATFORM else hashes.SHA512()


def _basic_constraints(role: Role) -> x509.BasicConstraints:
    path_length = {Role.ROOT_CA: 1, Role.SUB_CA: 0}.get(role)
    return x509.BasicConstraints(ca=path_length is not None, path_length=path_length)


def _key_usage(role: Role) -> x509.KeyUsage:
    authority = role in (Role.ROOT_CA, Role.SUB_CA)
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=role is Role.CODE_SIGNING,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(issuer: Issuer | None, signer: NewKey) -> x509.AuthorityKeyIdentifier:
    if issuer is None:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.private.public_key())
    identifier = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


# --- id-RSASSA-PSS, through the openssl program -----------------------------------------------------

_CA_CONFIG: Final = """\
[req]
distinguished_name = dn
prompt = no
string_mask = utf8only
utf8 = yes
[dn]
CN = replaced
[ca]
default_ca = here
[here]
database = {directory}/index.txt
new_certs_dir = {directory}
rand_serial = yes
unique_subject = no
default_md = sha512
policy = any
x509_extensions = v3
email_in_dn = no
preserve = yes
[any]
organizationName = optional
commonName = supplied
[v3]
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
"""

_EXTENSIONS: Final = {
    Role.ROOT_CA: "basicConstraints=critical,CA:TRUE,pathlen:1\nkeyUsage=critical,keyCertSign,cRLSign\n",
    Role.SUB_CA: "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n",
    Role.CODE_SIGNING: "basicConstraints=critical,CA:FALSE\n"
    "keyUsage=critical,digitalSignature,nonRepudiation\nextendedKeyUsage=codeSigning\n",
    Role.LIFECYCLE: "basicConstraints=critical,CA:FALSE\n"
    f"keyUsage=critical,digitalSignature\nextendedKeyUsage={LIFECYCLE_PURPOSE.dotted_string}\n",
    Role.PLATFORM: "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n",
}


def _issue_with_openssl(
    role: Role,
    subject: x509.Name,
    key: NewKey,
    issuer: Issuer | None,
    *,
    not_before: datetime,
    not_after: datetime,
) -> x509.Certificate:
    """Issue by `openssl ca`: in OpenSSL 3.0 the only verb that takes dates."""
    with TemporaryDirectory(prefix="trustme-ca-") as temporary, secret_file(key.pkcs8) as (key_fd, key_path):
        directory = Path(temporary)
        (directory / "index.txt").touch()
        config = directory / "ca.cnf"
        config.write_text(_CA_CONFIG.format(directory=directory) + _EXTENSIONS[role])
        request = run(
            "openssl",
            ["req", "-new", "-utf8", "-config", config, "-key", key_path, "-subj", _openssl_name(subject)],
            purpose="make a certificate request",
            pass_fds=(key_fd,),
        )
        (directory / "request.csr").write_bytes(request)
        moment = "%Y%m%d%H%M%SZ"
        with _openssl_issuer(directory, issuer, key_fd, key_path) as (fds, words):
            pem = run(
                "openssl",
                [
                    *("ca", "-batch", "-notext", "-config", config, "-in", directory / "request.csr"),
                    *("-startdate", f"{not_before:{moment}}", "-enddate", f"{not_after:{moment}}"),
                    *words,
                ],
                purpose="issue a certificate",
                pass_fds=fds,
            )
    return x509.load_pem_x509_certificate(pem)


@contextmanager
def _openssl_issuer(
    directory: Path, issuer: Issuer | None, key_fd: int, key_path: str
) -> Iterator[tuple[tuple[int, ...], list[str]]]:
    if issuer is None:
        yield (key_fd,), ["-selfsign", "-keyfile", key_path, *_pss_options(KeyType.RSA_PSS)]
        return
    certificate = directory / "issuer.cert"
    certificate.write_bytes(issuer.certificate.public_bytes(Encoding.PEM))
    with secret_file(issuer.key.pkcs8) as (issuer_fd, issuer_path):
        yield (
            (issuer_fd,),
            ["-cert", str(certificate), "-keyfile", issuer_path, *_pss_options(issuer.key.type)],
        )


def _pss_options(key_type: KeyType) -> list[str]:
    if key_type is not KeyType.RSA_PSS:
        return []
    return ["-sigopt", "rsa_padding_mode:pss", "-sigopt", f"rsa_pss_saltlen:{PSS_SALT_LENGTH}"]


def _openssl_name(subject: x509.Name) -> str:
    """Return the subject in openssl's slash form, everything escaped that could end a field."""
    keys = {NameOID.ORGANIZATION_NAME: "O", NameOID.COMMON_NAME: "CN"}
    fields = []
    for attribute in subject:
        value = str(attribute.value)
        escaped = "".join(f"\\{character}" if character in "\\/+=" else character for character in value)
        fields.append(f"/{keys[attribute.oid]}={escaped}")
    return "".join(fields)
