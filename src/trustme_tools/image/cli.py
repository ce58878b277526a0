# SPDX-License-Identifier: Apache-2.0
"""`trustme image`: build the reference image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trustme_tools.cli.options import add_passphrase, read_passphrase
from trustme_tools.cli.verbs import Result, add_family, add_verb
from trustme_tools.errors import UsageError

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers

_DESCRIPTION = """\
Build the reference image: a raw disk with a signed Unified Kernel Image and a store with the signed core
container, from Debian packages and this source tree. Built parts are kept in a cache outside the
checkout (TRUSTME_CACHE, by default the user's cache directory); it can be deleted at any time.
"""

_EXAMPLES = """\
  trustme image build --out build/image
  trustme image build --out image --policy core.start_timeout_s=20
  trustme image build --out release --release --pki /media/keys/pki --passphrase-fd 3 3< passphrase
"""


def register(subparsers: Subparsers) -> None:
    """Add `trustme image`."""
    verbs = add_family(subparsers, "image", _DESCRIPTION, examples=_EXAMPLES)
    parser = add_verb(
        verbs,
        "build",
        _build,
        summary="build the reference image",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to put the image directory"
    )
    parser.add_argument(
        "--pki", type=Path, metavar="DIR", help="keys to sign with (default: development keys)"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--development",
        dest="release",
        action="store_false",
        default=False,
        help="a development build (default)",
    )
    kind.add_argument(
        "--release", action="store_true", default=False, help="a release build; needs --pki with its own keys"
    )
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        type=_override,
        metavar="KEY=VALUE",
        help="set a key of the signed policy, value as in TOML, for example platform.allow_missing_tpm=true",
    )
    parser.add_argument(
        "--download-anchors",
        type=Path,
        metavar="FILE",
        help="certificate authorities (PEM) of the servers that the device may fetch GuestOS images from",
    )
    parser.add_argument("--epoch", type=int, metavar="SECONDS", help="build date (default: today, 0:00 UTC)")
    parser.add_argument("--refresh", action="store_true", help="fetch packages and libraries again")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where built parts are kept")
    add_passphrase(parser)


def read_download_anchors(path: Path) -> bytes:
    """Return a file of PEM certificates that the device can use; UsageError("bad-download-anchors")."""
    from cryptography import x509

    try:
        data = path.read_bytes()
        certificates = x509.load_pem_x509_certificates(data)
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"{path} holds no certificate authorities",
            "give a file with one or more PEM certificates",
            code="bad-download-anchors",
            evidence=str(exc)[:200],
        ) from exc
    for certificate in certificates:
        try:
            is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            is_ca = False
        if not is_ca:
            raise UsageError(
                f"{path} holds a certificate that is no authority's",
                "give the authority that has issued the server's certificate",
                code="bad-download-anchors",
                evidence=certificate.subject.rfc4514_string(),
            )
    return data


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _build(args: argparse.Namespace) -> Result:
    from trustme_tools.guestos.build import EPOCH_LIMIT
    from trustme_tools.image.build import Options, build_image
    from trustme_tools.image.cache import Cache, default_root

    if args.epoch is not None and not 0 < args.epoch <= EPOCH_LIMIT:
        raise UsageError(
            f"--epoch {args.epoch} is no build date",
            f"give seconds since 1970, at most {EPOCH_LIMIT}",
            code="bad-epoch",
        )
    cache = Cache(args.cache or default_root(), refresh=args.refresh)
    options = Options(
        development=not args.release,
        epoch=args.epoch,
        policy=dict(args.policy),
        download_anchors=read_download_anchors(args.download_anchors) if args.download_anchors else b"",
    )
    manifest = build_image(
        args.out, cache=cache, options=options, pki_path=args.pki, passphrase=read_passphrase(args)
    )
    sizes = {
        "uki": manifest["files"]["trustme-base.efi"]["size"],
        "initramfs": sum(part["size"] for part in manifest["initramfs"].values()),
    }
    text = (
        f"{args.out}: kernel {manifest['kernel']}, "
        f"core {manifest['core']['name']} {manifest['core']['version']}, "
        f"UKI {sizes['uki'] / 1e6:.1f} MB, initramfs {sizes['initramfs'] / 1e6:.1f} MB"
    )
    return Result({"directory": args.out, "manifest": manifest, "seconds": cache.times}, text)
