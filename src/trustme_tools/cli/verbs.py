# SPDX-License-Identifier: Apache-2.0
"""What every verb of `trustme` shares: its parser, its result and its progress lines.

A verb's handler takes the parsed arguments and returns a `Result` (printed by `main`, readable or as
JSON) or raises ToolError. It never prints its result itself; it may call `progress`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trustme_tools.errors import Exit

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse names it no other way


@dataclass(frozen=True, slots=True)
class Result:
    """What a verb found: `data` for --json, `text` for people, and the exit code."""

    data: Mapping[str, Any]
    text: str = ""
    exit: int = Exit.OK


Handler = Callable[[argparse.Namespace], Result]


def add_family(subparsers: Subparsers, name: str, description: str, *, examples: str = "") -> Subparsers:
    """Add a verb family (`trustme NAME VERB`) and return where its verbs go."""
    parser = subparsers.add_parser(
        name,
        description=description,
        epilog=_examples(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser.add_subparsers(metavar="VERB", required=True, dest="verb")


def add_verb(
    subparsers: Subparsers,
    name: str,
    handler: Handler,
    *,
    summary: str,
    description: str = "",
    examples: str = "",
) -> argparse.ArgumentParser:
    """Add one verb with --json and its examples; the caller adds the verb's own arguments."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description or summary,
        epilog=_examples(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(handler=handler, command_path=parser.prog.partition(" ")[2])
    return parser


def _examples(text: str) -> str:
    return f"examples:\n{text.rstrip()}" if text else ""


def progress(text: str) -> None:
    """Tell the person that something slow is happening; on stderr, so that --json stays clean."""
    sys.stderr.write(f"{text}\n")  # one write: threads report too
    sys.stderr.flush()
