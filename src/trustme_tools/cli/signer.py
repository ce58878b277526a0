# SPDX-License-Identifier: Apache-2.0
"""Who signs, from the options that every signing verb has: --pki, --key, --cert, --sign-command, --signer."""

from __future__ import annotations

import argparse
from pathlib import Path

from trustme_tools.cli.options import read_passphrase
from trustme_tools.errors import UsageError
from trustme_tools.guestos import pkcs11, signing
from trustme_tools.guestos.signing import Signer
from trustme_tools.pki.directory import PkiDirectory


def chosen_signer(args: argparse.Namespace) -> Signer:
    """Return the signer that the options name; UsageError("no-signer") unless they name exactly one."""
    match args.pki, args.key, args.sign_command, args.cert:
        case Path(), None, None, None:
            return signing.pki_signer(PkiDirectory(args.pki), args.signer, read_passphrase(args))
        case None, Path(), None, Path():
            return signing.key_signer(args.key, args.cert, read_passphrase(args))
        case None, str(), None, Path():
            return pkcs11.pkcs11_signer(args.key, args.cert, read_passphrase(args))
        case None, None, str(), Path():
            return signing.command_signer(args.sign_command, args.cert)
    raise UsageError(
        "who signs is not clear",
        "give --pki DIR, or --key FILE (or pkcs11:URI) --cert FILE, or --sign-command COMMAND --cert FILE",
        code="no-signer",
    )
