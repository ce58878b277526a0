# SPDX-License-Identifier: Apache-2.0
"""`trustme uefi`: vars, esl, auth, show."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from trustme_tools.cli.options import add_passphrase, moment, read_passphrase
from trustme_tools.cli.verbs import Result, add_family, add_verb, progress

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers

DBX_HELP = (
    "revoke: a certificate FILE with all it issued, tbs:FILE (certificate by digest), image:FILE "
    "(EFI program), sha256:HEX or esl:FILE (signature lists); may be repeated"
)


def register(subparsers: Subparsers) -> None:
    """Add the family to the command."""
    verbs = add_family(subparsers, "uefi", "Secure Boot variables: OVMF stores, .esl and .auth files.")
    variables = add_verb(
        verbs,
        "vars",
        _vars,
        summary="write PK, KEK, db and dbx into an OVMF variable store",
        examples="  trustme uefi vars --ovmf-vars OVMF_VARS_4M.fd --pki pki --out vars.fd\n"
        "  trustme uefi vars --ovmf-vars OVMF_VARS_4M.fd --pki pki --out vars.fd --dbx pki/ssig_cml.cert\n",
    )
    variables.add_argument(
        "--ovmf-vars", type=Path, required=True, metavar="FILE", help="store to start from"
    )
    variables.add_argument("--out", type=Path, required=True, metavar="FILE", help="store to write")
    variables.add_argument("--force", action="store_true", help="replace an existing store")
    _add_content(variables)
    variables.add_argument(
        "--no-secure-boot", action="store_true", help="enrol the keys but do not enforce them"
    )
    variables.add_argument(
        "--setup-mode", action="store_true", help="leave PK out: the firmware takes any key"
    )

    lists = add_verb(
        verbs,
        "esl",
        _esl,
        summary="write unsigned signature lists (PK.esl, KEK.esl, db.esl, dbx.esl)",
        examples="  trustme uefi esl --pki pki --out enrol\n",
    )
    _add_out_directory(lists)
    _add_content(lists)

    auth = add_verb(
        verbs,
        "auth",
        _auth,
        summary="write signed updates for a real machine (PK.auth, KEK.auth, db.auth, …)",
        description="Write .esl and .auth files: PK and KEK signed by PK, db and dbx by KEK, and\n"
        "PK-remove.auth, which puts the machine back into setup mode. Enrol db and KEK first, PK last.",
        examples="  trustme uefi auth --pki pki --out enrol\n"
        "  trustme uefi auth --pki pki --out enrol --passphrase-fd 3 3< passphrase-file\n",
    )
    _add_out_directory(auth)
    _add_content(auth)
    auth.add_argument(
        "--timestamp",
        type=moment,
        metavar="TIME",
        help="ISO 8601 time of the update (default: now); must be later than the variable's",
    )
    add_passphrase(auth)

    show = add_verb(
        verbs,
        "show",
        _show,
        summary="show the keys in an OVMF store, an efivars directory, an .esl or an .auth file",
        examples="  trustme uefi show vars.fd\n  trustme uefi show /sys/firmware/efi/efivars\n",
    )
    show.add_argument("path", type=Path)


def _add_content(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pki", type=Path, required=True, metavar="DIR", help="directory of `trustme pki create`"
    )
    parser.add_argument("--dbx", action="append", default=[], metavar="WHAT", help=DBX_HELP)
    parser.add_argument(
        "--db",
        action="append",
        default=[],
        type=Path,
        metavar="CERT",
        help="one more certificate for db (the first of a chain); may be repeated",
    )
    parser.add_argument(
        "--no-default-db", action="store_true", help="leave DB and ssig_subca out of db; only --db counts"
    )


def _add_out_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--force", action="store_true", help="replace an existing directory")


def _lists(args: argparse.Namespace, *, setup_mode: bool = False) -> dict[str, bytes]:
    from trustme_tools.pki.directory import PkiDirectory
    from trustme_tools.uefi.keys import key_lists

    return key_lists(
        PkiDirectory(args.pki),
        extra_db=args.db,
        default_db=not args.no_default_db,
        dbx=args.dbx,
        setup_mode=setup_mode,
    )


def _vars(args: argparse.Namespace) -> Result:
    from trustme_tools.publish import refuse_existing
    from trustme_tools.uefi.show import describe, text
    from trustme_tools.uefi.store import write_store

    lists = _lists(args, setup_mode=args.setup_mode)
    refuse_existing(args.out, force=args.force)
    write_store(args.ovmf_vars, args.out, lists, secure_boot=not args.no_secure_boot)
    facts = describe(args.out)
    return Result({"store": args.out, "variables": facts}, f"{args.out}\n{text(facts)}")


def _esl(args: argparse.Namespace) -> Result:
    from trustme_tools.uefi.auth import write_lists

    lists = _lists(args)
    _warn(lists)
    names = write_lists(args.out, lists, force=args.force)
    return Result({"directory": args.out, "files": names}, "\n".join(str(args.out / name) for name in names))


def _auth(args: argparse.Namespace) -> Result:
    from trustme_tools.pki.directory import PkiDirectory
    from trustme_tools.uefi.auth import write_authenticated

    timestamp = (args.timestamp or datetime.now(UTC)).replace(microsecond=0)
    lists = _lists(args)
    _warn(lists)
    names = write_authenticated(
        args.out,
        lists,
        PkiDirectory(args.pki),
        timestamp=timestamp,
        passphrase=read_passphrase(args),
        force=args.force,
    )
    data = {"directory": args.out, "files": names, "timestamp": timestamp.isoformat()}
    return Result(data, "\n".join(str(args.out / name) for name in names))


def _warn(lists: dict[str, bytes]) -> None:
    from trustme_tools.uefi.keys import not_enrollable

    for subject in not_enrollable(lists["db"]):
        progress(f"note: firmware based on EDK2 refuses to enrol {subject}: its key is not RSA")


def _show(args: argparse.Namespace) -> Result:
    from trustme_tools.uefi.show import describe, text

    facts = describe(args.path)
    return Result({"path": args.path, "variables": facts}, text(facts))
