# SPDX-License-Identifier: Apache-2.0
"""Make the whole PKI of a product in one directory; file names as GyroidOS has them where it has them.

    ssig_rootca ─ ssig_subca (goes to db) ─ ssig_cml      software signing: core GuestOSes
    gen_rootca ┬ guestos_subca ─ guestos                  the customer's GuestOSes
               └ device_subca                             device certificates
    lifecycle_rootca ─ lifecycle                          statements for devices in operation
    PK   KEK   DB                                         Secure Boot; DB signs the boot image

`X.cert` is the chain from X upwards without the root (a root and a platform key stand alone), `X.key`
its encrypted key. Signing with PK, KEK and DB is always RSA, which is all that firmware is sure to verify.
Of `rsapss4096` the leaves and the GuestOS CA are id-RSASSA-PSS; the roots and what goes to db stay RSA:
EDK2-based firmware refuses to enrol a certificate in db whose key is of another kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_tools.errors import UsageError
from trustme_tools.pki import certificates
from trustme_tools.pki.certificates import LEAF_DAYS, ROOT_DAYS, SUB_CA_DAYS, Issuer, Role
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.pki.keys import (
    DEVELOPMENT_MARKER,
    DEVELOPMENT_PASSPHRASE,
    KeyType,
    NewKey,
    encrypt,
    generate,
)
from trustme_tools.publish import PRIVATE, staged_directory, write_new

ORGANIZATION_LIMIT: Final = 64
"""Characters (ub-organization-name, RFC 5280 appendix A.1)."""
_MARKER_TEXT: Final = """\
Everything in this directory is for development only: the keys are encrypted with the well-known
passphrase "trustme-development". Never enrol these certificates on a device that leaves the desk.
"""


class Algorithm(Enum):
    """What `--algorithm` offers: keys of CAs, of leaves, and bits of the RSA ones among them."""

    RSA4096 = "rsa4096"
    RSAPSS4096 = "rsapss4096"
    P384 = "p384"


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    common_name: str
    role: Role
    issuer: str | None
    days: int
    in_db: bool = False


_ENTRIES: Final = (
    _Entry("ssig_rootca", "Software Signing Root CA", Role.ROOT_CA, None, ROOT_DAYS),
    _Entry("ssig_subca", "Software Signing Sub CA", Role.SUB_CA, "ssig_rootca", SUB_CA_DAYS, in_db=True),
    _Entry("ssig_cml", "CML Signing Certificate", Role.CODE_SIGNING, "ssig_subca", LEAF_DAYS),
    _Entry("gen_rootca", "Customer Root CA", Role.ROOT_CA, None, ROOT_DAYS),
    _Entry("guestos_subca", "GuestOS Signing Sub CA", Role.SUB_CA, "gen_rootca", SUB_CA_DAYS),
    _Entry("guestos", "GuestOS Signing Certificate", Role.CODE_SIGNING, "guestos_subca", LEAF_DAYS),
    _Entry("device_subca", "Device Sub CA", Role.SUB_CA, "gen_rootca", SUB_CA_DAYS),
    _Entry("lifecycle_rootca", "Lifecycle Root CA", Role.ROOT_CA, None, ROOT_DAYS),
    _Entry("lifecycle", "Lifecycle Signing Certificate", Role.LIFECYCLE, "lifecycle_rootca", LEAF_DAYS),
    _Entry("PK", "PK", Role.PLATFORM, None, ROOT_DAYS),
    _Entry("KEK", "KEK", Role.PLATFORM, None, ROOT_DAYS),
    _Entry("DB", "DB", Role.PLATFORM, None, ROOT_DAYS, in_db=True),
)
NAMES: Final = tuple(entry.name for entry in _ENTRIES)


def create(
    directory: Path,
    *,
    algorithm: Algorithm = Algorithm.RSA4096,
    passphrase: bytes | None = None,
    development: bool = False,
    organization: str = "trustme-py",
    platform_bits: int | None = None,
    not_before: datetime | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda _text: None,
) -> PkiDirectory:
    """Make the PKI in `directory`, which appears complete or not at all.

    `passphrase` encrypts every key; with `development` it is the well-known one and the directory says
    so. `platform_bits` is the RSA size of PK, KEK and DB (default 4096, or 2048 beside P-384).
    UsageError if neither or both are given, or if no certificate can carry `organization`;
    ToolError("exists") unless `force`.
    """
    if development == (passphrase is not None):
        raise UsageError(
            "a PKI needs either a passphrase or --development",
            "give --passphrase-fd N (or type it at the prompt), or --development for well-known keys",
            code="passphrase-or-development",
        )
    if not 0 < len(organization) <= ORGANIZATION_LIMIT or not organization.isprintable():
        raise UsageError(
            f"no certificate can carry the organization {organization!r}",
            f"give 1 to {ORGANIZATION_LIMIT} printable characters",
            code="bad-organization",
        )
    secret = passphrase if passphrase is not None else DEVELOPMENT_PASSPHRASE
    bits = platform_bits or (2048 if algorithm is Algorithm.P384 else 4096)
    start = not_before or certificates.default_not_before()
    issued: dict[str, Issuer] = {}
    # The directory comes first: a place that cannot be written to shows before the keys are made.
    with staged_directory(directory, force=force) as staging:
        keys = _generate_all(algorithm, bits, progress)
        for entry in _ENTRIES:
            certificate = certificates.issue(
                entry.role,
                certificates.name(_common_name(entry, development=development), organization),
                keys[entry.name],
                issued[entry.issuer] if entry.issuer is not None else None,
                not_before=start,
                days=entry.days,
            )
            issued[entry.name] = Issuer(certificate, keys[entry.name])
        progress("encrypting keys")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            encrypted = pool.map(lambda entry: encrypt(keys[entry.name], secret), _ENTRIES)
        for entry, key_file in zip(_ENTRIES, encrypted, strict=True):
            chain = b"".join(pem.public_bytes(Encoding.PEM) for pem in _chain(entry, issued))
            write_new(staging / f"{entry.name}.cert", chain)
            write_new(staging / f"{entry.name}.key", key_file, PRIVATE)
        if development:
            write_new(staging / DEVELOPMENT_MARKER, _MARKER_TEXT.encode())
    return PkiDirectory(directory)


def _generate_all(algorithm: Algorithm, bits: int, progress: Callable[[str], None]) -> dict[str, NewKey]:
    def make(entry: _Entry) -> NewKey:
        key_type, size = _key_type(entry, algorithm, bits)
        progress(f"making key {entry.name} ({key_type.value}{f' {size}' if size else ''})")
        return generate(key_type, size)

    # OpenSSL makes keys without holding the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(NAMES, pool.map(make, _ENTRIES), strict=True))


def _key_type(entry: _Entry, algorithm: Algorithm, bits: int) -> tuple[KeyType, int]:
    if entry.role is Role.PLATFORM:
        return KeyType.RSA, bits
    if algorithm is Algorithm.P384:
        return KeyType.P384, 0
    if algorithm is Algorithm.RSAPSS4096 and entry.role is not Role.ROOT_CA and not entry.in_db:
        return KeyType.RSA_PSS, 4096
    return KeyType.RSA, 4096


def _common_name(entry: _Entry, *, development: bool) -> str:
    return f"{entry.common_name}{' (development)' if development else ''}"


def _chain(entry: _Entry, issued: dict[str, Issuer]) -> list[x509.Certificate]:
    """Return the certificate and its issuers without the root; a self-signed one stands alone."""
    chain = [issued[entry.name].certificate]
    by_name = {known.name: known for known in _ENTRIES}
    while entry.issuer is not None:
        entry = by_name[entry.issuer]
        if entry.issuer is not None:
            chain.append(issued[entry.name].certificate)
    return chain
