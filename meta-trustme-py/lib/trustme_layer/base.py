# SPDX-License-Identifier: Apache-2.0
"""The steps of trustme-base.bb that need the host tools: a program for the native Python of a build.

Bitbake never imports this; recipes run it with trustme-tools-native in their sysroot, tests run it from the
checkout. Signing, keys, limits and the manifest's format are those of the reference image: the same code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from trustme_init.errors import Refusal
from trustme_init.storage.layout import MIB, STORE_NAME
from trustme_init.trust.guestos import parse_config
from trustme_tools.cli.options import add_passphrase, read_passphrase
from trustme_tools.errors import ToolError, UsageError
from trustme_tools.flash import bmap
from trustme_tools.flash.source import map_file
from trustme_tools.guestos import signing
from trustme_tools.guestos.build import STORE_DIRECTORY
from trustme_tools.image import disk, initramfs, uki
from trustme_tools.image.build import copy_pki
from trustme_tools.machine.images import BMAP, DISK, MANIFEST, MANIFEST_VERSION, PKI, UKI
from trustme_tools.pki.directory import PkiDirectory, load_chain
from trustme_tools.publish import write_atomic
from trustme_tools.tooling import run

_CONFIG: Final = re.compile(r"(?P<name>.+)-(?P<version>\d+)\.conf")


def check_size(path: Path, limit: int) -> None:
    """Refuse a UKI larger than `limit` bytes; ToolError("uki-too-large")."""
    size = path.stat().st_size
    if size > limit:
        raise ToolError(
            f"the UKI has {size / MIB:.1f} MiB, and {limit // MIB} MiB is the limit",
            "take packages out of trustme-initramfs; TRUSTME_UKI_LIMIT is what firmware and disk allow",
            code="uki-too-large",
            evidence=str(path),
        )


def sign_uki(args: argparse.Namespace) -> None:
    """Sign a UKI by a key or a command, and check the result against the certificate."""
    check_size(args.unsigned, args.limit * MIB)
    with tempfile.TemporaryDirectory(prefix="trustme-base-") as name:
        signed = Path(name) / "signed.efi"
        if args.sign_command:
            if args.cert is None:
                raise UsageError("--sign-command needs --cert", code="no-signer")
            certificate = args.cert
            signing.require_valid(load_chain(certificate)[:1], datetime.now(UTC))
            _run_command(args.sign_command, args.unsigned, signed)
        else:
            certificate = _sign_with_key(args, signed)
        _verify(signed, certificate, args)
        write_atomic(args.signed, signed.read_bytes())


def _sign_with_key(args: argparse.Namespace, signed: Path) -> Path:
    passphrase = read_passphrase(args)
    if args.pki is not None:
        directory = PkiDirectory(args.pki)
        key_path, certificate = directory.key_path(args.signer), directory.certificate_path(args.signer)
    elif args.key is not None and args.cert is not None:
        key_path, certificate = args.key, args.cert
    else:
        raise UsageError(
            "who signs is not clear",
            "give --pki DIR, or --key FILE --cert FILE, or --sign-command COMMAND --cert FILE",
            code="no-signer",
        )
    key = load_pair(key_path, certificate, passphrase)
    uki.sign(args.unsigned, signed, key_pem=key, certificate=certificate)
    return certificate


def load_pair(key_path: Path, certificate_path: Path, passphrase: bytes | None) -> bytes:
    """Return a key as PEM after checking it against its certificate; a DB certificate may sign itself.

    ToolError("key-certificate-mismatch", "certificate-expired", "certificate-not-yet-valid").
    """
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from trustme_tools.pki import keys

    certificate = load_chain(certificate_path)[0]
    key = keys.load(key_path, passphrase)
    if keys.public_der(key) != keys.public_der(certificate):
        raise ToolError(
            f"the key {key_path} does not belong to the certificate {certificate_path}",
            "name a key and a certificate of the same pair, for example DB.key and DB.cert",
            code="key-certificate-mismatch",
            evidence=f"certificate: {certificate.subject.rfc4514_string()}",
        )
    signing.require_valid([certificate], datetime.now(UTC))
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _run_command(command: str, unsigned: Path, signed: Path) -> None:
    words = [*shlex.split(command), str(unsigned), str(signed)]
    try:
        done = subprocess.run(words, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as exc:
        raise ToolError(
            f"the signing command is not there: {words[0]}",
            "name a program that is on the PATH of the task, or its whole path; no shell is involved",
            code="sign-command-missing",
            evidence=f"the whole command: {command}",
        ) from exc
    if done.returncode or not signed.is_file():
        raise ToolError(
            f"the signing command failed: {command}",
            "it is called with two more words: the unsigned file, and the file it has to write",
            code="sign-command-failed",
            evidence=f"exit code {done.returncode}" if done.returncode else "it wrote no file",
        )


def _verify(signed: Path, certificate: Path, args: argparse.Namespace) -> None:
    """Check a signature as the firmware will; ToolError("key-certificate-mismatch")."""
    try:
        run("sbverify", ["--cert", certificate, signed], purpose="check the UKI's signature")
    except ToolError as error:
        raise ToolError(
            f"the signature by {args.sign_command or args.key or args.pki} does not fit {certificate}",
            "sign with the key of that certificate",
            code="key-certificate-mismatch",
            evidence=error.evidence,
        ) from error


def finish_disk(wic: Path, target: Path, data_space: int) -> None:
    """Copy what wic made and leave `data_space` free bytes behind the store, like the reference image."""
    disk.copy(wic, target)
    store = disk.partition(target, STORE_NAME)
    os.truncate(target, store.offset + store.size + data_space + disk.GPT_SPACE)
    run(
        "sfdisk",
        ["--quiet", "--relocate", "gpt-bak-std", target],
        purpose="move the backup of the partition table",
    )


def core_facts(store: Path, name: str) -> dict[str, Any]:
    """Return what identifies the newest GuestOS called `name` in a store, as the manifest has it."""
    found = [
        (int(match["version"]), path)
        for path in (store / STORE_DIRECTORY).glob("*.conf")
        if (match := _CONFIG.fullmatch(path.name)) and match["name"] == name
    ]
    if not found:
        raise ToolError(
            f"the store has no core GuestOS {name}",
            "TRUSTME_CORE_GUESTOS must be the name in the guestos.toml of TRUSTME_CORE_RECIPE",
            code="no-core",
            evidence=str(store),
        )
    version, path = max(found)
    config = parse_config(path.read_bytes())
    roots = {
        mount.image_file: mount.image_verity_sha256
        for mount in config.mounts
        if mount.HasField("image_verity_sha256")
    }
    digest = initramfs.describe(path)["sha256"]
    return {"name": name, "version": version, "config_sha256": digest, "root_hashes": roots}


def packages(manifest: Path) -> dict[str, str]:
    """Return package → version of an image's `.manifest` file (NAME ARCHITECTURE VERSION a line)."""
    lines = (line.split() for line in manifest.read_text().splitlines() if line.strip())
    return {fields[0]: fields[2] for fields in lines}


def deploy(args: argparse.Namespace) -> None:
    """Put the image directory's four parts into `args.out`; the UKI is there beside it already."""
    finish_disk(args.wic, args.out / DISK, args.data_space * MIB)
    write_atomic(args.out / BMAP, bmap.render(map_file(args.out / DISK)))
    if args.pki is not None and args.pki.is_dir():
        pki = PkiDirectory(args.pki)
        shutil.rmtree(args.out / PKI, ignore_errors=True)
        copy_pki(pki, args.out / PKI, private_keys=args.development and pki.is_development)
    else:
        (args.out / PKI).mkdir(exist_ok=True)
        shutil.copy(args.uki_cert, args.out / PKI / "DB.cert")
    sections = uki.sections(args.uki)
    manifest = {
        "version": MANIFEST_VERSION,
        "image": "trustme-base",
        "image_version": args.image_version,
        "development": args.development,
        "build_date": f"{datetime.fromtimestamp(args.epoch, UTC):%Y-%m-%dT%H:%M:%SZ}",
        "builder": "yocto",
        "hardware": args.hardware,
        "machine": args.machine,
        "kernel": sections[".uname"].rstrip(b"\0").decode(),
        "command_line": sections[".cmdline"].rstrip(b"\0").decode(),
        "core": core_facts(args.store, args.core),
        "files": {DISK: {"size": (args.out / DISK).stat().st_size}, UKI: initramfs.describe(args.uki)},
        "initramfs": {"base": initramfs.describe(args.initramfs)},
        "packages": packages(args.packages),
        "policy": args.policy.read_text(),
    }
    write_atomic(args.out / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trustme-base", description="Steps of the recipe trustme-base.bb.")
    verbs = parser.add_subparsers(required=True)
    sign = verbs.add_parser("sign-uki", help="sign the UKI")
    sign.add_argument("unsigned", type=Path)
    sign.add_argument("signed", type=Path)
    sign.add_argument("--limit", type=int, default=64, metavar="MIB")
    sign.add_argument("--pki", type=Path)
    sign.add_argument("--signer", default="DB")
    sign.add_argument("--key", type=Path)
    sign.add_argument("--cert", type=Path)
    sign.add_argument("--sign-command")
    add_passphrase(sign)
    sign.set_defaults(handler=sign_uki)
    final = verbs.add_parser("deploy", help="finish the disk, write keys and manifest")
    for name in ("out", "wic", "uki", "store", "initramfs", "packages", "policy"):
        final.add_argument(f"--{name}", type=Path, required=True)
    final.add_argument("--pki", type=Path)
    final.add_argument("--uki-cert", type=Path, required=True)
    for name in ("core", "hardware", "machine", "image-version"):
        final.add_argument(f"--{name}", required=True)
    for name in ("epoch", "data-space"):
        final.add_argument(f"--{name}", type=int, required=True)
    final.add_argument("--development", type=lambda text: text == "1", required=True, metavar="0|1")
    final.set_defaults(handler=deploy)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step; 1 and a message in plain words if it is refused."""
    args = _parser().parse_args(argv)
    try:
        args.handler(args)
    except (ToolError, Refusal) as error:
        facts = error.as_dict()
        sys.stderr.write(f"ERROR: {facts['cause']}\n")
        for key in ("evidence", "remedy"):
            if facts.get(key):
                sys.stderr.write(f"  {key}: {facts[key]}\n")
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
