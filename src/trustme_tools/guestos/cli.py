# SPDX-License-Identifier: Apache-2.0
"""`trustme guestos`: build, finish, collect, sign, verify, show."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from trustme_tools.cli.options import add_passphrase, key_place, moment
from trustme_tools.cli.verbs import Result, add_family, add_verb, progress

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers
    from trustme_tools.guestos.recipe import Recipe


def register(subparsers: Subparsers) -> None:
    """Add the family to the command."""
    verbs = add_family(subparsers, "guestos", "Build, sign, verify and show GuestOSes.")
    build = add_verb(
        verbs,
        "build",
        _build,
        summary="make images, hash trees and the signed configuration of a GuestOS",
        description="Make a GuestOS of a recipe: file system image, dm-verity tree, signed configuration,\n"
        "certificate chain. Its root is the directory ROOT; without one it is built from [content] of the\n"
        "recipe and the files/ beside it. With SOURCE_DATE_EPOCH set, the same input gives the same bytes\n"
        "(ECDSA and RSA-PSS signatures aside, which are random by design).",
        examples="  trustme guestos build recipes/example-service --out store --pki pki --signer guestos\n"
        "  trustme guestos build guestos.toml rootfs/ --out store --key my.key --cert my-chain.pem\n"
        "  trustme guestos build guestos.toml rootfs/ --out store --cert chain.pem \\\n"
        "      --key 'pkcs11:token=release;object=guestos?pin-source=file:/run/pin'\n"
        "  trustme guestos build guestos.toml rootfs/ --out store --cert chain.pem \\\n"
        "      --sign-command 'ssh signer sign-sha512'\n",
    )
    build.add_argument("recipe", type=Path, help="guestos.toml, or the directory it is in")
    build.add_argument(
        "root",
        type=Path,
        nargs="?",
        help="directory that becomes the image at /; made of [content] if left out",
    )
    build.add_argument("--out", type=Path, required=True, metavar="STORE", help="store directory to add to")
    build.add_argument(
        "--version",
        type=int,
        metavar="N",
        help="version of the GuestOS (default: time of SOURCE_DATE_EPOCH or now as YYYYMMDDHHMMSS)",
    )
    build.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="directory (squashfs, erofs) or ready image file of a further image; may be repeated",
    )
    build.add_argument(
        "--size-limit",
        type=_mebibytes,
        metavar="MIB",
        help="refuse a GuestOS with larger images",
    )
    build.add_argument("--cache", type=Path, metavar="DIR", help="where parts made of [content] are kept")
    build.add_argument("--force", action="store_true", help="replace the same version")
    _add_signer(build)

    finish = add_verb(
        verbs,
        "finish",
        _finish,
        summary="do the rest of a recipe's [content] in a root made elsewhere (by a Yocto build)",
        description="Remove what [content] removes, make its directories and links to busybox, copy\n"
        "files/ over it. The packages must be installed already.",
        examples="  trustme guestos finish recipes/example-service rootfs/\n",
    )
    finish.add_argument("recipe", type=Path, help="guestos.toml, or the directory it is in")
    finish.add_argument("root", type=Path, help="directory to change")

    collect = add_verb(
        verbs,
        "collect",
        _collect,
        summary="put the GuestOSes of several stores into one; a name may come from one store only",
        examples="  trustme guestos collect --out store core-store/ example-store/\n",
    )
    collect.add_argument("stores", type=Path, nargs="+", metavar="STORE", help="what `build --out` wrote to")
    collect.add_argument("--out", type=Path, required=True, metavar="STORE", help="store to make")
    collect.add_argument("--force", action="store_true", help="replace an existing store")

    sign = add_verb(
        verbs,
        "sign",
        _sign,
        summary="sign an existing configuration again",
        examples="  trustme guestos sign store/operatingsystems/my-os-1.conf --pki pki\n",
    )
    sign.add_argument(
        "config", type=_config_path, help="NAME-VERSION.conf; .sig and .cert beside it are replaced"
    )
    _add_signer(sign)

    verify = add_verb(
        verbs,
        "verify",
        _verify,
        summary="judge a GuestOS as the device does, and read every block of its images",
        examples="  trustme guestos verify store/operatingsystems/os-1.conf --anchor pki/ssig_subca.cert\n",
    )
    verify.add_argument("config", type=_config_path, help="NAME-VERSION.conf; .sig and .cert beside it")
    verify.add_argument(
        "--anchor",
        action="append",
        type=Path,
        required=True,
        metavar="CERT",
        help="CA to believe (the first of a chain); may be repeated",
    )
    verify.add_argument(
        "--dbx", action="append", default=[], metavar="WHAT", help="revoke as `trustme uefi vars --dbx` does"
    )
    verify.add_argument(
        "--hardware", help="hardware name of the device (default: what the configuration says)"
    )
    verify.add_argument("--at", type=moment, metavar="TIME", help="ISO 8601 time to judge at (default: now)")

    show = add_verb(
        verbs,
        "show",
        _show,
        summary="show a configuration without verifying it",
        examples="  trustme guestos show store/operatingsystems/my-os-1.conf\n",
    )
    show.add_argument("config", type=Path, help="NAME-VERSION.conf")


def _config_path(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".conf":
        raise argparse.ArgumentTypeError(f"{text} is not the .conf of a GuestOS, NAME-VERSION.conf")
    return path


def _mebibytes(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 2**20:
        raise argparse.ArgumentTypeError(f"{text} is not a number of MiB, 1 to {2**20}")
    return int(text) * 2**20


def _add_signer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "signer", "one of: --pki, --key with --cert, --sign-command with --cert"
    )
    group.add_argument("--pki", type=Path, metavar="DIR", help="directory of `trustme pki create`")
    group.add_argument(
        "--signer", default="ssig_cml", metavar="NAME", help="name in --pki (default: ssig_cml)"
    )
    group.add_argument("--key", type=key_place, metavar="KEY", help="PEM private key, or a PKCS#11 URI")
    group.add_argument("--cert", type=Path, metavar="FILE", help="PEM chain, leaf first")
    group.add_argument(
        "--sign-command",
        metavar="COMMAND",
        help="reads the data on stdin, writes the raw SHA-512 signature on stdout; run without a shell",
    )
    group.add_argument(
        "--allow-expired", action="store_true", help="sign even if the chain is not valid at this time"
    )
    add_passphrase(parser)


def _build(args: argparse.Namespace) -> Result:
    from trustme_tools.cli.signer import chosen_signer
    from trustme_tools.errors import UsageError
    from trustme_tools.guestos.build import build_guestos
    from trustme_tools.guestos.recipe import load

    sources = {}
    for pair in args.image:
        name, separator, path = pair.partition("=")
        if not separator:
            raise UsageError(f"--image {pair} is not NAME=PATH", "for example --image modules=modules/")
        sources[name] = Path(path)
    recipe, signer = load(args.recipe), chosen_signer(args)
    built = build_guestos(
        recipe,
        args.root or _root_of(recipe, args),
        args.out,
        signer=signer,
        version=args.version,
        sources=sources,
        size_limit=args.size_limit,
        allow_expired=args.allow_expired,
        force=args.force,
        progress=progress,
    )
    data = {
        "name": built.name,
        "version": built.version,
        "config": built.config_path,
        "images": built.image_directory,
        "root_hashes": dict(built.root_hashes),
        "config_sha256": built.config_digest,
    }
    hashes = "".join(f"\n  {name}: root hash {value}" for name, value in built.root_hashes.items())
    return Result(data, f"{built.config_path}{hashes}")


def _root_of(recipe: Recipe, args: argparse.Namespace) -> Path:
    import trustme_init
    from trustme_tools.guestos import content
    from trustme_tools.guestos.recipe import FILES, file_of
    from trustme_tools.image.cache import Cache, default_root

    source = Path(str(trustme_init.__file__)).parent
    files = file_of(args.recipe).with_name(FILES)
    return content.build_root(Cache(args.cache or default_root()), recipe, files, source)


def _finish(args: argparse.Namespace) -> Result:
    from trustme_tools.guestos.content import finish_root
    from trustme_tools.guestos.recipe import file_of, load

    finish_root(args.root, load(args.recipe), file_of(args.recipe).parent)
    return Result({"root": args.root}, str(args.root))


def _collect(args: argparse.Namespace) -> Result:
    from trustme_tools.guestos.store import collect

    stems = [identity.stem for identity in collect(args.out, args.stores, force=args.force)]
    return Result({"store": args.out, "guestos": stems}, "\n".join(stems))


def _sign(args: argparse.Namespace) -> Result:
    from trustme_tools.cli.signer import chosen_signer
    from trustme_tools.guestos.build import sign_config

    signer = chosen_signer(args)
    sign_config(args.config, signer, allow_expired=args.allow_expired)
    subject = signer.chain[0].subject.rfc4514_string()
    return Result({"config": args.config, "signer": subject}, f"{args.config} signed by {subject}")


def _verify(args: argparse.Namespace) -> Result:
    from trustme_tools.guestos import check
    from trustme_tools.uefi.keys import dbx_lists

    verified = check.verify(
        args.config,
        check.anchors_from(args.anchor, dbx_lists(args.dbx)),
        at=args.at or datetime.now(UTC),
        hardware=args.hardware,
        progress=progress,
    )
    data = {
        "guestos": verified.guest_os.stem,
        "signer": verified.signer.subject,
        "anchor": verified.signer.anchor.subject,
        "anchor_sha256": verified.signer.anchor.sha256_fingerprint,
        "config_sha256": verified.config_digest.hex(),
        "images": {image.image_file: image.root_hash.hex() for image in verified.images},
    }
    return Result(
        data,
        f"{verified.guest_os.stem}: good\n"
        f"  signed by {verified.signer.subject}\n"
        f"  trusted through {verified.signer.anchor.subject}",
    )


def _show(args: argparse.Namespace) -> Result:
    from trustme_tools.guestos import check

    facts = check.describe(check.load_config(args.config))
    return Result(facts, f"{check.text(facts)}\n  (not verified: use `trustme guestos verify`)")
