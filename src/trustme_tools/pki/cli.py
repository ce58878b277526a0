# SPDX-License-Identifier: Apache-2.0
"""`trustme pki`: create, show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trustme_tools.cli.options import add_passphrase, ask_new_passphrase, read_passphrase
from trustme_tools.cli.verbs import Result, add_family, add_verb, progress

if TYPE_CHECKING:
    from cryptography import x509

    from trustme_tools.cli.verbs import Subparsers
    from trustme_tools.pki.directory import PkiDirectory

_ALGORITHMS = ("rsa4096", "rsapss4096", "p384")


def register(subparsers: Subparsers) -> None:
    """Add the family to the command."""
    verbs = add_family(subparsers, "pki", "Keys and certificates of a product or a development setup.")
    create = add_verb(
        verbs,
        "create",
        _create,
        summary="make every key and certificate a product needs",
        description="Make the software-signing PKI (root, sub CA for db, leaf), the customer PKI (root,\n"
        "GuestOS CA and leaf, device CA) and the Secure Boot keys PK, KEK and DB in one new directory.",
        examples="  trustme pki create pki --development\n"
        "  trustme pki create /secure/pki --algorithm rsapss4096 --organization 'Example GmbH'\n"
        "  trustme pki create /secure/pki --passphrase-fd 3 3< passphrase-file\n",
    )
    create.add_argument("directory", type=Path, help="directory to make")
    create.add_argument(
        "--algorithm",
        choices=_ALGORITHMS,
        default="rsa4096",
        help="kind of the signing keys (default: rsa4096)",
    )
    create.add_argument(
        "--development",
        action="store_true",
        help='protect the keys by the well-known passphrase "trustme-development" and mark them as such',
    )
    create.add_argument(
        "--organization", default="trustme-py", help="O= of every subject (default: trustme-py)"
    )
    create.add_argument(
        "--platform-key-bits",
        type=int,
        choices=(2048, 3072, 4096),
        help="RSA size of PK, KEK and DB: some firmware takes 2048 only (default: 4096; 2048 with p384)",
    )
    create.add_argument("--force", action="store_true", help="replace an existing directory")
    add_passphrase(create)
    show = add_verb(
        verbs,
        "show",
        _show,
        summary="list the certificates of a PKI directory",
        examples="  trustme pki show pki\n",
    )
    show.add_argument("directory", type=Path)


def _create(args: argparse.Namespace) -> Result:
    from trustme_tools.errors import UsageError
    from trustme_tools.pki.create import Algorithm, create

    passphrase = read_passphrase(args)
    if passphrase is not None and args.development:
        raise UsageError("--development has its own passphrase", "leave --passphrase-fd out")
    if passphrase is None and not args.development:
        passphrase = ask_new_passphrase()
    pki = create(
        args.directory,
        algorithm=Algorithm(args.algorithm),
        passphrase=passphrase,
        development=args.development,
        organization=args.organization,
        platform_bits=args.platform_key_bits,
        force=args.force,
        progress=progress,
    )
    result = _describe(pki)
    note = "DEVELOPMENT ONLY: the passphrase of these keys is well known\n" if pki.is_development else ""
    return Result(result.data, f"{result.text}\n{note}")


def _show(args: argparse.Namespace) -> Result:
    from trustme_tools.pki.directory import PkiDirectory

    return _describe(PkiDirectory(args.directory))


def _describe(pki: PkiDirectory) -> Result:
    from trustme_tools.pki.create import NAMES

    certificates = {name: _facts(pki.certificate(name)) for name in NAMES}
    lines = [
        f"{name:14} {facts['key']:18} until {facts['not_after'][:10]}  "
        f"{facts['sha256'][:16]}…  {facts['subject']}"
        for name, facts in certificates.items()
    ]
    data = {"directory": pki.path, "development": pki.is_development, "certificates": certificates}
    return Result(data, "\n".join(lines))


def _facts(certificate: x509.Certificate) -> dict[str, Any]:
    from cryptography.hazmat.primitives import hashes

    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "key": describe_key(certificate),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


def describe_key(certificate: x509.Certificate) -> str:
    """Return the key's kind and size for people, for example `rsassaPss 4096`."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.x509.oid import PublicKeyAlgorithmOID

    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        pss = certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS
        return f"{'rsassaPss' if pss else 'rsa'} {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"ecdsa {key.curve.name}"
    return type(key).__name__.removesuffix("PublicKey").lower()
