# SPDX-License-Identifier: Apache-2.0
"""`trustme lifecycle`: create, sign, show."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from trustme_tools.cli.options import add_passphrase, key_place, moment
from trustme_tools.cli.verbs import Result, add_family, add_verb

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers

_ACTIONS: Final = {
    "replace-authority": ("purpose", "old", "certificate"),
    "retire-authority": ("purpose", "old"),
    "renew-device-key": (),
    "device-certificate": ("certificate",),
    "replace-token": ("token",),
}
"""What each action needs to be told."""
_OPTIONAL: Final = {"replace-authority": ("overlap",)}
_PURPOSES: Final = ("guest", "device")
_ANCHORS: Final = (*_PURPOSES, "lifecycle")
_NO_VALUE: Final = (None, False)


def register(subparsers: Subparsers) -> None:
    """Add the family to the command."""
    verbs = add_family(
        subparsers,
        "lifecycle",
        "Signed statements that change keys, anchors and token of a device in operation.",
        examples="  trustme lifecycle create renew-device-key --device UUID --out renew.json\n"
        "  trustme lifecycle sign renew.json --pki pki\n"
        "  control apply_statement renew.json renew.sig renew.cert --csr next.csr   (on the device)\n",
    )
    create = add_verb(
        verbs,
        "create",
        _create,
        summary="write a statement",
        description="Write the text of a statement. What it asks for:\n"
        "  replace-authority   believe a new CA instead of an old one; with --overlap beside it\n"
        "  retire-authority    believe a CA no longer\n"
        "  renew-device-key    make a new device key and the request for its certificate\n"
        "  device-certificate  take a new certificate, and with it the key that it is for\n"
        "  replace-token       put another PKCS#12 file in the place of the token",
        examples="  trustme lifecycle create replace-authority --any-device --purpose guest \\\n"
        "      --old pki/guestos_subca.cert --certificate new/guestos_subca.cert --out rotate.json\n"
        "  trustme lifecycle create device-certificate --device UUID \\\n"
        "      --certificate next.cert --out cert.json\n"
        "  trustme lifecycle create replace-token --device UUID --token token.p12 --out token.json\n",
    )
    create.add_argument("action", choices=(*_ACTIONS,), metavar="ACTION", help=", ".join(_ACTIONS))
    device = create.add_mutually_exclusive_group(required=True)
    device.add_argument("--device", type=UUID, metavar="UUID", help="the one device that is to obey it")
    device.add_argument("--any-device", action="store_true", help="every device may obey it")
    create.add_argument(
        "--serial",
        type=int,
        metavar="N",
        help="higher than the last one (`control lifecycle_status`); default: the time as YYYYMMDDHHMMSS",
    )
    create.add_argument("--purpose", choices=_PURPOSES, help="which anchors are meant")
    create.add_argument("--old", metavar="CERT", help="the anchor to replace or retire: file, or its SHA-256")
    create.add_argument(
        "--certificate",
        type=Path,
        metavar="CERT",
        help="the new CA (the first of a chain); the new device chain",
    )
    create.add_argument("--overlap", action="store_true", help="keep the old anchor beside the new one")
    create.add_argument("--token", type=Path, metavar="P12", help="the new token; only its SHA-256 is taken")
    create.add_argument("--out", type=Path, required=True, metavar="FILE", help="statement to write")
    create.add_argument("--force", action="store_true", help="replace an existing statement")

    sign = add_verb(
        verbs,
        "sign",
        _sign,
        summary="sign a statement; signature and chain are put beside it (.sig, .cert)",
        examples="  trustme lifecycle sign rotate.json --pki pki\n"
        "  trustme lifecycle sign rotate.json --cert chain.pem --sign-command 'ssh hsm sign-sha512'\n",
    )
    sign.add_argument("statement", type=Path, help="what `trustme lifecycle create` wrote")
    group = sign.add_argument_group("signer", "one of: --pki, --key with --cert, --sign-command with --cert")
    group.add_argument("--pki", type=Path, metavar="DIR", help="directory of `trustme pki create`")
    group.add_argument(
        "--signer", default="lifecycle", metavar="NAME", help="name in --pki (default: lifecycle)"
    )
    group.add_argument("--key", type=key_place, metavar="KEY", help="PEM private key, or a PKCS#11 URI")
    group.add_argument("--cert", type=Path, metavar="FILE", help="PEM chain, leaf first")
    group.add_argument(
        "--sign-command",
        metavar="COMMAND",
        help="reads the data on stdin, writes the raw SHA-512 signature on stdout; run without a shell",
    )
    add_passphrase(sign)

    show = add_verb(
        verbs,
        "show",
        _show,
        summary="show a statement; with --anchor, judge it as a device does",
        examples="  trustme lifecycle show rotate.json\n"
        "  trustme lifecycle show rotate.json --anchor lifecycle=pki/lifecycle_rootca.cert \\\n"
        "      --anchor guest=pki/guestos_subca.cert --last-serial 20260101000000\n",
    )
    show.add_argument("statement", type=Path, help="statement; .sig and .cert beside it are for --anchor")
    show.add_argument(
        "--anchor",
        type=_anchor,
        action="append",
        default=[],
        metavar="PURPOSE=CERT",
        help=f"what the device believes, PURPOSE being one of {', '.join(_ANCHORS)}; may be repeated",
    )
    show.add_argument(
        "--device", type=UUID, metavar="UUID", help="judge for this device (default: the one named)"
    )
    show.add_argument("--last-serial", type=int, default=0, metavar="N", help="of the statement obeyed last")
    show.add_argument("--at", type=moment, metavar="TIME", help="ISO 8601 time to judge at (default: now)")


def _anchor(text: str) -> tuple[str, Path]:
    purpose, separator, path = text.partition("=")
    if not separator or purpose not in _ANCHORS:
        raise argparse.ArgumentTypeError(f"{text} is not PURPOSE=CERT with one of {', '.join(_ANCHORS)}")
    return purpose, Path(path)


def _create(args: argparse.Namespace) -> Result:
    from trustme_init.trust.statement import parse_statement
    from trustme_tools.lifecycle import statements
    from trustme_tools.publish import refuse_existing, write_atomic

    refuse_existing(args.out, force=args.force)
    text = statements.create(
        args.action,
        device_uuid=args.device,
        serial=args.serial if args.serial is not None else statements.default_serial(),
        fields=_fields(args),
    )
    write_atomic(args.out, text)
    facts = statements.describe(parse_statement(text))
    return Result({"statement": args.out, **facts}, f"{args.out}\n{statements.as_text(facts)}")


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the action says, of exactly the options that it needs."""
    from trustme_tools.errors import UsageError
    from trustme_tools.lifecycle import statements

    wanted = _ACTIONS[args.action]
    options = {name: getattr(args, name) for name in ("purpose", "old", "certificate", "token", "overlap")}
    given = {name for name, value in options.items() if value not in _NO_VALUE}
    allowed = {*wanted, *_OPTIONAL.get(args.action, ())}
    if wrong := [*(name for name in wanted if name not in given), *sorted(given - allowed)]:
        raise UsageError(
            f"{args.action} does not fit together with what is said, or not said, of "
            f"{', '.join(f'--{name}' for name in wrong)}",
            f"{args.action} takes {', '.join(f'--{name}' for name in wanted) or 'none of them'}",
            code="options-do-not-fit",
        )
    match args.action:
        case "replace-authority":
            return {
                "purpose": args.purpose,
                "old_sha256": statements.anchor_sha256(args.old),
                "certificate": statements.authority_pem(args.certificate),
                "overlap": args.overlap,
            }
        case "retire-authority":
            return {"purpose": args.purpose, "sha256": statements.anchor_sha256(args.old)}
        case "device-certificate":
            return {"certificate": statements.chain_pem(args.certificate)}
        case "replace-token":
            import hashlib

            return {"token_sha256": hashlib.sha256(args.token.read_bytes()).hexdigest()}
    return {}


def _sign(args: argparse.Namespace) -> Result:
    from trustme_tools.cli.signer import chosen_signer
    from trustme_tools.lifecycle import statements

    signer = chosen_signer(args)
    statement = statements.sign(args.statement, signer)
    subject = signer.chain[0].subject.rfc4514_string()
    facts = statements.describe(statement)
    data = {
        "statement": args.statement,
        "signature": args.statement.with_suffix(".sig"),
        "certificate": args.statement.with_suffix(".cert"),
        "signer": subject,
        **facts,
    }
    return Result(data, f"{args.statement} signed by {subject}\n{statements.as_text(facts)}")


def _show(args: argparse.Namespace) -> Result:
    from trustme_init.trust.anchors import Purpose
    from trustme_init.trust.statement import parse_statement
    from trustme_tools.lifecycle import statements

    facts = statements.describe(parse_statement(statements.read(args.statement)))
    text = statements.as_text(facts)
    if not args.anchor:
        return Result({**facts, "verified": False}, f"{text}\n  (not verified: give --anchor)")
    verified = statements.verify(
        args.statement,
        [(Purpose(purpose), path) for purpose, path in args.anchor],
        at=args.at or datetime.now(UTC),
        device_uuid=args.device,
        last_serial=args.last_serial,
    )
    anchor = verified.anchor
    data = {
        **facts,
        "verified": True,
        "signer": verified.signer,
        "anchor": anchor.subject,
        "anchor_purpose": anchor.purpose.value,
        "anchor_sha256": anchor.sha256_fingerprint,
    }
    return Result(
        data, f"{text}\n  signed by  {verified.signer}\n  under      {anchor.purpose.value}: {anchor.subject}"
    )
