# SPDX-License-Identifier: Apache-2.0
"""`trustme uefi`: vars, esl, auth, add-db, add-dbx, esp, show."""

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
    _add_timestamp(auth)
    add_passphrase(auth)

    _add_additions(verbs)
    _add_esp(verbs)

    show = add_verb(
        verbs,
        "show",
        _show,
        summary="show the keys in an OVMF store, an efivars directory, an .esl or an .auth file",
        description="Show every entry with its type, subject, SHA-256 and owner; of a machine's efivars\n"
        "also the attributes of the variables. Nothing is verified.",
        examples="  trustme uefi show vars.fd\n"
        "  trustme uefi show enrol/db.auth --json\n"
        "  trustme uefi show /sys/firmware/efi/efivars\n",
    )
    show.add_argument("path", type=Path)


def _add_additions(verbs: Subparsers) -> None:
    db = _addition(
        verbs,
        "db",
        "add a third party's anchor to a prepared db",
        "A CA in db is a full anchor: what it signs starts as a boot image and as a core GuestOS. So\n"
        "the file is only taken with the SHA-256 that its owner told you (of the file, or of the one\n"
        "certificate in it), and only if the device would take it as an anchor.",
        "  trustme uefi add-db ssig_subca.esl --sha256 6bd1…9c --to enrol --pki pki\n"
        "  trustme uefi add-db partner-ca.pem --sha256 6B:D1:…:9C --to vars.fd --out partner.fd\n"
        "  trustme uefi add-db bootloader.pem --sha256 6bd1…9c --to vars.fd --boot-only\n",
    )
    db.add_argument(
        "--boot-only",
        action="store_true",
        help="take what is no CA: the firmware starts what it signed, and nothing else believes it",
    )
    dbx = _addition(
        verbs,
        "dbx",
        "add revocations to a prepared dbx",
        "A certificate in dbx revokes itself and all it issued, a digest whatever has it.",
        "  trustme uefi add-dbx dbxupdate.esl --sha256 6bd1…9c --to enrol --pki pki\n"
        "  trustme uefi add-dbx stolen.pem --sha256 6bd1…9c --to vars.fd\n",
    )
    dbx.set_defaults(boot_only=False)


def _addition(
    verbs: Subparsers, variable: str, summary: str, about: str, examples: str
) -> argparse.ArgumentParser:
    verb = add_verb(
        verbs,
        f"add-{variable}",
        _add_to,
        summary=summary,
        description=f"{about}\nIn a directory of `trustme uefi auth`, {variable}.auth is signed again when\n"
        "the list is complete.",
        examples=examples,
    )
    verb.set_defaults(variable=variable)
    verb.add_argument("file", type=Path, metavar="FILE", help=".esl, or a certificate in PEM or DER")
    verb.add_argument("--sha256", required=True, metavar="HEX", help="what its owner told you it is")
    verb.add_argument(
        "--to", type=Path, required=True, metavar="TARGET", help="directory or variable store to add to"
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="store to write (default: TARGET itself)")
    verb.add_argument("--force", action="store_true", help="replace an existing --out")
    verb.add_argument("--pki", type=Path, metavar="DIR", help="where the KEK is, to sign an update again")
    _add_timestamp(verb)
    add_passphrase(verb)
    return verb


def _add_esp(verbs: Subparsers) -> None:
    esp = add_verb(
        verbs,
        "esp",
        _esp,
        summary="make an enrolment stick of a directory of `trustme uefi auth`",
        description="Write a disk image with a FAT partition that firmware menus, KeyTool and systemd-boot\n"
        "enrol from. PK-remove.auth is left out: whoever has it can end Secure Boot.",
        examples="  trustme uefi esp enrol --out stick.img --loader systemd-bootx64.efi\n"
        "  trustme uefi esp enrol --out stick.img --loader KeyTool.efi\n"
        "  trustme uefi esp enrol --out /media/stick/files --tree\n",
    )
    esp.add_argument("enrolment", type=Path, metavar="DIR", help="directory of `trustme uefi auth`")
    esp.add_argument("--out", type=Path, required=True, metavar="FILE", help="disk image to write")
    esp.add_argument("--tree", action="store_true", help="write a directory instead, to be copied to a stick")
    esp.add_argument("--force", action="store_true", help="replace an existing --out")
    esp.add_argument(
        "--loader", type=Path, metavar="EFI", help="program to start: systemd-bootx64.efi or KeyTool.efi"
    )
    esp.add_argument(
        "--enrol",
        choices=("manual", "if-safe", "force"),
        default="manual",
        help="what systemd-boot does in setup mode (loader.conf, secure-boot-enroll; default: manual)",
    )


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


def _add_timestamp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timestamp",
        type=moment,
        metavar="TIME",
        help="ISO 8601 time of the update (default: now); must be later than the variable's",
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

    timestamp = _timestamp(args)
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


def _timestamp(args: argparse.Namespace) -> datetime:
    chosen: datetime = args.timestamp or datetime.now(UTC)
    return chosen.replace(microsecond=0)


def _add_to(args: argparse.Namespace) -> Result:
    from trustme_tools.errors import UsageError
    from trustme_tools.pki.directory import PkiDirectory
    from trustme_tools.publish import refuse_existing
    from trustme_tools.uefi.additions import describe, expected_digest, read_offer
    from trustme_tools.uefi.enrolment import Signing, add
    from trustme_tools.uefi.keys import not_enrollable

    if args.out is not None:
        if args.to.is_dir():
            raise UsageError("--out is for stores; a directory is changed in its place", "copy it first")
        refuse_existing(args.out, force=args.force)
    offer = read_offer(args.file, expected_digest(args.sha256))
    signing = Signing(
        PkiDirectory(args.pki) if args.pki is not None else None,
        datetime.now(UTC).replace(microsecond=0),
        args.timestamp.replace(microsecond=0) if args.timestamp is not None else None,
        read_passphrase(args),
    )
    addition = add(args.to, args.variable, offer, signing=signing, boot_only=args.boot_only, out=args.out)
    if args.variable == "db":
        added = {entry.get("subject") for entry in addition.entries}
        _warn_of([subject for subject in not_enrollable(addition.data) if subject in added])
    if offer.left_out:
        progress(f"note: only the first certificate of {args.file} was taken, {offer.left_out} left out")
    where = args.out or args.to
    data = {
        "target": where,
        "variable": args.variable,
        "added": addition.entries,
        "already_there": addition.present,
    }
    lines = [f"added to {args.variable} of {where}:", *describe(addition.entries)]
    if addition.present:
        lines += ["there already:", *describe(addition.present)]
    return Result(data, "\n".join(lines))


def _esp(args: argparse.Namespace) -> Result:
    from trustme_tools.uefi.esp import Enrol, write_esp

    names = write_esp(
        args.enrolment,
        args.out,
        loader=args.loader,
        enrol=Enrol(args.enrol),
        tree=args.tree,
        force=args.force,
    )
    return Result(
        {"out": args.out, "files": names}, "\n".join([str(args.out), *(f"  {name}" for name in names)])
    )


def _warn(lists: dict[str, bytes]) -> None:
    from trustme_tools.uefi.keys import not_enrollable

    _warn_of(not_enrollable(lists["db"]))


def _warn_of(subjects: list[str]) -> None:
    for subject in subjects:
        progress(f"note: firmware based on EDK2 refuses to enrol {subject}: its key is not RSA")


def _show(args: argparse.Namespace) -> Result:
    from trustme_tools.uefi.show import attributes, describe, text

    facts = describe(args.path)
    found = attributes(args.path)
    data = {"path": args.path, "variables": facts, "attributes": found}
    return Result(data, text(facts, found))
