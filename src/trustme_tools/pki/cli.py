# SPDX-License-Identifier: Apache-2.0
"""`trustme pki`: create, show, sign-device."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from trustme_tools.cli.options import add_passphrase, ask_new_passphrase, key_place, read_passphrase
from trustme_tools.cli.verbs import Result, add_family, add_verb, progress

if TYPE_CHECKING:
    from cryptography import x509

    from trustme_tools.cli.verbs import Subparsers
    from trustme_tools.pki.directory import PkiDirectory
    from trustme_tools.pki.request import DeviceRequest
    from trustme_tools.pki.tpm_certification import Checked

_DAYS_LIMIT: Final = 36500
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
        summary="list the certificates of a PKI directory or of a file, and what each is for",
        examples="  trustme pki show pki\n  trustme pki show device.cert\n",
    )
    show.add_argument("path", type=Path, help="directory of `trustme pki create`, or a PEM or DER file")
    _add_sign_device(verbs)


def _add_sign_device(verbs: Subparsers) -> None:
    sign = add_verb(
        verbs,
        "sign-device",
        _sign_device,
        summary="issue a device certificate for a request whose key a TPM vouches for",
        description="Check a device's request and the TPM certification that came with it, and issue the\n"
        "certificate with the device CA. Only public key and UUID are taken from the request.\n"
        "The output is the chain to give back with `control push_cert`.",
        examples="  trustme pki sign-device device.csr --pki pki\n"
        "  trustme pki sign-device device.csr --pki pki --ek-ca maker-root.pem --ek-ca maker-ca.pem \\\n"
        "      --uuid 0b2c4a6e-5d1f-4c38-9a77-3f0e6d1b2c4a\n"
        "  trustme pki sign-device device.csr --pki pki --allow-software-key --days 30\n"
        "  trustme pki sign-device device.csr --cert ca.cert --sign-command 'ssh hsm sign-sha512'\n",
    )
    sign.add_argument("request", type=Path, metavar="CSR", help="what `control pull_csr` wrote (PEM or DER)")
    sign.add_argument(
        "--certification",
        type=Path,
        metavar="FILE",
        help="the TPM's certification of the key (default: CSR.tpm, where it exists)",
    )
    sign.add_argument(
        "--ek-ca",
        type=Path,
        action="append",
        default=[],
        metavar="PEM",
        help="CAs of the TPM's maker, roots and intermediates; may be repeated",
    )
    sign.add_argument(
        "--allow-software-key", action="store_true", help="sign a key that no TPM vouches for, and say so"
    )
    sign.add_argument("--uuid", type=UUID, metavar="UUID", help="refuse the request of any other device")
    sign.add_argument(
        "--days",
        type=_days,
        default=730,
        metavar="N",
        help="how long the certificate is valid (default: 730)",
    )
    sign.add_argument(
        "--out", type=Path, metavar="CERT", help="chain to write (default: the request's name with .cert)"
    )
    sign.add_argument("--force", action="store_true", help="replace an existing chain")
    group = sign.add_argument_group(
        "device CA", "one of: --pki, --key with --cert, --sign-command with --cert"
    )
    group.add_argument("--pki", type=Path, metavar="DIR", help="directory of `trustme pki create`")
    group.add_argument(
        "--signer", default="device_subca", metavar="NAME", help="name in --pki (default: device_subca)"
    )
    group.add_argument(
        "--key", type=key_place, metavar="KEY", help="PEM private key of the CA, or a PKCS#11 URI"
    )
    group.add_argument("--cert", type=Path, metavar="FILE", help="PEM chain, the device CA first")
    group.add_argument(
        "--sign-command",
        metavar="COMMAND",
        help="reads the data on stdin, writes the raw SHA-512 signature on stdout; run without a shell",
    )
    add_passphrase(sign)


def _days(text: str) -> int:
    days = int(text) if text.isascii() and text.isdigit() else 0
    if not 0 < days <= _DAYS_LIMIT:
        raise argparse.ArgumentTypeError(f"{text} is not a number of days between 1 and {_DAYS_LIMIT}")
    return days


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
    from trustme_tools.pki.directory import PkiDirectory, load_chain

    if args.path.is_dir() or not args.path.exists():
        return _describe(PkiDirectory(args.path))
    facts = [_facts(certificate) for certificate in load_chain(args.path)]
    blocks = [
        f"{each['subject']}\n"
        f"  for        {each['purpose']}\n"
        f"  issuer     {each['issuer']}\n"
        f"  key        {each['key']}\n"
        f"  valid      {each['not_before'][:10]} to {each['not_after'][:10]}\n"
        f"  sha256     {each['sha256']}"
        for each in facts
    ]
    return Result({"file": args.path, "certificates": facts}, "\n".join(blocks))


def _describe(pki: PkiDirectory) -> Result:
    from trustme_tools.pki.create import NAMES
    from trustme_tools.pki.purpose import ROLES

    certificates = {name: {**_facts(pki.certificate(name)), "role": ROLES[name]} for name in NAMES}
    lines = [
        f"{name:16} {facts['key']:18} until {facts['not_after'][:10]}  "
        f"{facts['sha256'][:16]}…  {facts['subject']}\n"
        f"{'':16} {facts['role']}"
        for name, facts in certificates.items()
    ]
    data = {"directory": pki.path, "development": pki.is_development, "certificates": certificates}
    return Result(data, "\n".join(lines))


def _facts(certificate: x509.Certificate) -> dict[str, Any]:
    from cryptography.hazmat.primitives import hashes

    from trustme_tools.pki.purpose import describe_purpose

    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "key": describe_key(certificate),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
        "purpose": describe_purpose(certificate),
    }


def _sign_device(args: argparse.Namespace) -> Result:
    from trustme_tools.cli.signer import chosen_signer
    from trustme_tools.pki.device import sign_device
    from trustme_tools.pki.request import REQUEST_LIMIT, read_request
    from trustme_tools.publish import refuse_existing, write_atomic

    out = args.out or args.request.with_suffix(".cert")
    refuse_existing(out, force=args.force)
    request = read_request(_bytes(args.request, REQUEST_LIMIT), uuid=args.uuid)
    now = datetime.now(UTC)
    checked = _certification(args, request, now)
    issued = sign_device(
        request,
        chosen_signer(args),
        certification=checked,
        allow_software_key=args.allow_software_key,
        days=args.days,
        now=now,
    )
    write_atomic(out, issued.pem)
    data: dict[str, Any] = {
        "certificate": out,
        "uuid": str(request.uuid),
        "software_key": issued.software_key,
        "not_granted": list(request.not_granted),
        "tpm": _tpm_facts(checked),
        "serial": f"{issued.certificate.serial_number:x}",
        **_facts(issued.certificate),
    }
    return Result(data, _sign_text(out, data, request.not_granted))


def _certification(args: argparse.Namespace, request: DeviceRequest, now: datetime) -> Checked | None:
    """Return the judged certification, or None where none was given and none lies beside the request."""
    from trustme_tools.pki import tpm_certification
    from trustme_tools.pki.directory import load_chain

    path = args.certification or args.request.with_name(f"{args.request.name}.tpm")
    if args.certification is None and not path.exists():
        return None
    data = _bytes(path, tpm_certification.DOCUMENT_LIMIT)
    cas = [certificate for name in args.ek_ca for certificate in load_chain(name)]
    return tpm_certification.check(tpm_certification.read_certification(data), request, ek_cas=cas, at=now)


def _bytes(path: Path, limit: int) -> bytes:
    """Read at most one byte more than `limit`, so that the reader sees the excess."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def _tpm_facts(checked: Checked | None) -> dict[str, Any] | None:
    if checked is None:
        return None
    certificate = checked.ek_certificate
    return {
        "ek_sha256": checked.ek.sha256,
        "ak_sha256": checked.ak.sha256,
        "ek_certificate": _facts(certificate) if certificate is not None else None,
        "ek_vouched_for_by": checked.ek_anchor,
        "unproven": list(checked.unproven),
    }


def _sign_text(out: Path, data: dict[str, Any], not_granted: tuple[str, ...]) -> str:
    lines = [
        str(out),
        f"  device     {data['uuid']}",
        f"  key        {data['key']}",
        f"  valid      {data['not_before'][:10]} to {data['not_after'][:10]}",
        f"  issuer     {data['issuer']}",
        f"  sha256     {data['sha256']}",
    ]
    lines += [f"  not granted: {text}" for text in not_granted]
    tpm = data["tpm"]
    if tpm is None:
        lines.append("  SOFTWARE KEY: no TPM vouches for it; whoever copies it is this device")
        return "\n".join(lines)
    lines.append(f"  EK         sha256:{tpm['ek_sha256']}")
    if tpm["ek_vouched_for_by"] is not None:
        lines.append(f"  EK vouched for by {tpm['ek_vouched_for_by']}")
    lines += [f"  not proven: {text}" for text in tpm["unproven"]]
    return "\n".join(lines)


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
