# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from trustme_tools.errors import UsageError

_READ_LIMIT: Final = 4096


def add_passphrase(parser: argparse.ArgumentParser) -> None:
    """Add --passphrase-fd."""
    parser.add_argument(
        "--passphrase-fd",
        type=int,
        metavar="N",
        help="read the passphrase of keys, or the PIN of a token, from this open descriptor (first line)",
    )


def read_passphrase(args: argparse.Namespace) -> bytes | None:
    """Return the passphrase from --passphrase-fd, or None without the option."""
    if args.passphrase_fd is None:
        return None
    data = b""
    try:
        while b"\n" not in data and len(data) <= _READ_LIMIT:
            chunk = os.read(args.passphrase_fd, _READ_LIMIT)
            if not chunk:
                break
            data += chunk
    except OSError as exc:
        raise UsageError(
            f"descriptor {args.passphrase_fd} cannot be read: {exc.strerror}",
            "open it, for example: trustme … --passphrase-fd 3 3< passphrase-file",
            code="bad-descriptor",
        ) from exc
    return data.split(b"\n", 1)[0]


def key_place(text: str) -> Path | str:
    """Return the value of --key for argparse: a path, or a PKCS#11 URI as it is."""
    return text if text.startswith("pkcs11:") else Path(text)


def moment(text: str) -> datetime:
    """Parse an ISO 8601 time for argparse and return it in UTC; UTC is also taken where it names no zone."""
    try:
        parsed = datetime.fromisoformat(text)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an ISO 8601 time like 2026-01-31T12:00") from None


def ask_new_passphrase() -> bytes | None:
    """Ask a person twice for a new passphrase; None where there is no terminal."""
    if not sys.stdin.isatty():
        return None
    first = getpass.getpass("New passphrase for all keys: ")
    if first != getpass.getpass("Again: "):
        raise UsageError("the two passphrases differ", "type the same twice", code="passphrases-differ")
    return first.encode()
