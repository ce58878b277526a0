# SPDX-License-Identifier: Apache-2.0
"""The `control` command: what the core container manages the device with.

Needs nothing but Python and protobuf.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trustme_init.control.cli import output
from trustme_init.control.cli.session import Format, LocalProblem, Session
from trustme_init.control.cli.verb import Verb
from trustme_init.control.cli.verbs import VERBS
from trustme_init.control.client import DEFAULT_SOCKET, DEFAULT_TIMEOUT, SLOW_TIMEOUT, ControlClient
from trustme_init.control.sanitise import visible
from trustme_init.errors import ControlRefusal

_EXAMPLES: Final = """\
examples:
  control list                      containers and their states
  control state core0 --json        one container, for a program
  control config core0              its configuration, as protobuf text
  control --text get_provisioned    the reply as the original client prints it
  control retrieve_logs /tmp/logs   the device's logs, one file each

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (see --help)."""
    parser = build_parser()
    options = parser.parse_args(argv)
    verb: Verb = options.verb
    format_ = Format(getattr(options, "format", "readable"))
    timeout = getattr(options, "timeout", SLOW_TIMEOUT if verb.slow else DEFAULT_TIMEOUT)
    with ControlClient(options.socket, timeout=timeout) as client:
        session = Session(client, verb.name, format_)
        try:
            if verb.destroys and not options.yes and not _confirmed(verb):
                return session.complain("nothing was done", output.USAGE)
            return verb.run(session, options)
        except ControlRefusal as refusal:
            code = output.USAGE if refusal.code == "frame-too-large" else output.UNREACHABLE
            return session.complain(visible(str(refusal)), code, refusal)
        except LocalProblem as problem:
            return session.complain(str(problem), problem.exit_code) if str(problem) else problem.exit_code
        except BrokenPipeError:
            # Whoever read our output has enough (`control list | head`); say nothing more, also at exit.
            sys.stdout = None
            return output.FAILED
        except KeyboardInterrupt:
            return 130


def _confirmed(verb: Verb) -> bool:
    """Ask a person; a program (no terminal) has decided already, as with the original."""
    if not sys.stdin.isatty():
        return True
    print(
        f"`control {verb.name}` destroys {verb.destroys}. Type yes to go on: ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().strip() == "yes"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; one subcommand per entry of VERBS."""
    parser = argparse.ArgumentParser(
        prog="control",
        description="Manage the containers of this device over its control socket.",
        epilog=_EXAMPLES + output.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-s",
        "--socket",
        type=Path,
        default=DEFAULT_SOCKET,
        metavar="PATH",
        help=f"control socket (default {DEFAULT_SOCKET})",
    )
    common = _common_options()
    _add_common(parser)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        sub = verbs.add_parser(
            verb.name,
            help=verb.help,
            description=verb.help[0].upper() + verb.help[1:] + ".",
            parents=[common],
            allow_abbrev=False,
        )
        for argument in verb.arguments:
            names = [argument.short, argument.name] if argument.short else [argument.name]
            sub.add_argument(*names, help=argument.help, **argument.options)
        if verb.destroys:
            sub.add_argument("--yes", action="store_true", help="do not ask, also on a terminal")
        sub.set_defaults(verb=verb)
    return parser


def _common_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    _add_common(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add what may stand before or after the verb; a default there would undo what stood here."""
    formats = parser.add_mutually_exclusive_group()
    for name, text in (
        ("json", f"JSON, envelope version {output.JSON_VERSION}"),
        ("text", "protobuf text dump of the whole reply, as the original client prints it"),
    ):
        formats.add_argument(
            f"--{name}", dest="format", action="store_const", const=name, default=argparse.SUPPRESS, help=text
        )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help=f"longest wait for one reply (default {DEFAULT_TIMEOUT:g}, of slow verbs {SLOW_TIMEOUT:g})",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86400:
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
