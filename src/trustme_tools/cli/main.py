# SPDX-License-Identifier: Apache-2.0
"""The `trustme` command: a table of verb families, loaded only when used."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from trustme_init.errors import Refusal
from trustme_tools.cli.verbs import Result
from trustme_tools.errors import Exit, ToolError, from_os_error

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers

ENVELOPE_VERSION: Final = 1


class Family(NamedTuple):
    """A group of verbs; `module` has `register(subparsers)`, which adds the parser called `name`."""

    name: str
    help: str
    module: str


FAMILIES: Final = (
    Family(
        "pki", "make the keys and certificates of a product or a development setup", "trustme_tools.pki.cli"
    ),
    Family("uefi", "Secure Boot variables: OVMF stores, .esl and .auth files", "trustme_tools.uefi.cli"),
    Family("guestos", "build, sign, verify and show GuestOSes", "trustme_tools.guestos.cli"),
    Family("image", "build the reference image", "trustme_tools.image.cli"),
    Family(
        "run", "run an image in a virtual machine with Secure Boot and a TPM", "trustme_tools.machine.cli"
    ),
    Family("flash", "write an image to a disk or card, and verify it", "trustme_tools.flash.cli"),
    Family(
        "smoke", "boot, provision and reboot an image, and say whether all is well", "trustme_tools.smoke.cli"
    ),
    Family("provision", "walk devices from first boot to operation", "trustme_tools.provision.cli"),
    Family(
        "lifecycle", "statements that change keys and anchors in operation", "trustme_tools.lifecycle.cli"
    ),
    Family("inspect", "show a disk image, a boot report or a GuestOS config", "trustme_tools.inspect.cli"),
    Family("completion", "print the shell completion script", "trustme_tools.cli.completion"),
)

_DESCRIPTION: Final = """\
Host side of trustme-py: keys, Secure Boot variables, GuestOSes, images and virtual machines.
"""

_EPILOG: Final = """\
from nothing to a running device:
  trustme pki create pki --development
  trustme guestos build recipes/core/guestos.toml rootfs/ --out store --pki pki
  trustme image build --help
  trustme run --help

exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 a host program is missing, 130 interrupted
"""


def build_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """Return the parser with one family loaded (`wanted`), or all of them for None.

    The other families are there by name and help only: their modules are not imported.
    """
    parser = argparse.ArgumentParser(
        prog="trustme",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trustme-py {_version()}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, dest="family")
    for family in FAMILIES:
        if wanted is None or wanted == family.name:
            register(subparsers, family)
        else:
            subparsers.add_parser(family.name, help=family.help)
    return parser


def register(subparsers: Subparsers, family: Family) -> None:
    """Load one family's module and let it add its parser."""
    importlib.import_module(family.module).register(subparsers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; errors are printed here and nowhere else."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in arguments if not word.startswith("-")), "")
    args = build_parser(wanted).parse_args(arguments)
    try:
        result: Result = args.handler(args)
    except ToolError as exc:
        return _fail(args, exc.exit, exc.as_dict())
    except Refusal as exc:
        return _fail(args, Exit.FAILED, exc.as_dict())
    except OSError as exc:
        return _fail(args, Exit.FAILED, from_os_error(exc).as_dict())
    except KeyboardInterrupt:
        return _fail(args, Exit.INTERRUPTED, ToolError("interrupted", code="interrupted").as_dict())
    return _succeed(args, result)


def entry() -> None:
    """Console-script entry, also of `python -m trustme_tools`."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as we live
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(main())


def _succeed(args: argparse.Namespace, result: Result) -> int:
    try:
        if args.json:
            _print_envelope(args, {"result": dict(result.data)})
        elif result.text:
            print(_printable(result.text.rstrip("\n")))
        sys.stdout.flush()
    except OSError as exc:
        # Keep the interpreter from complaining at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of a pipe (`| head`) has what it wanted.
        if not isinstance(exc, BrokenPipeError):
            return _fail(args, Exit.FAILED, from_os_error(exc).as_dict())
    return result.exit


def _fail(args: argparse.Namespace, code: Exit, error: dict[str, str]) -> int:
    if args.json:
        _print_envelope(args, {"error": error})
    print(f"trustme: {_printable(error['cause'])}", file=sys.stderr)
    for key in ("evidence", "remedy"):
        if error.get(key):
            print(f"  {key}: {_printable(error[key])}", file=sys.stderr)
    return code


def _print_envelope(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Print the versioned JSON document: `{"version": 1, "command": …, "result" | "error": …}`."""
    document = {"version": ENVELOPE_VERSION, "command": args.command_path, **content}
    print(json.dumps(document, indent=2, default=str))


def _printable(text: str) -> str:
    """Take away what a terminal would obey: names and reports come from devices and strangers."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def _version() -> str:
    try:
        return version("trustme-py")
    except PackageNotFoundError:  # run from a checkout
        return "(not installed)"


if __name__ == "__main__":
    entry()
