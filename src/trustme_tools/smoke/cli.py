# SPDX-License-Identifier: Apache-2.0
"""`trustme smoke`: boot, provision, reboot, verdict, for any CI."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_tools.cli.verbs import Result, add_verb, progress
from trustme_tools.errors import Exit, UsageError

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers
    from trustme_tools.machine.images import ImageDirectory
    from trustme_tools.smoke.subject import Subject

_DESCRIPTION: Final = """\
Smoke-test an image: first boot, provisioning over the core container's console, reboot, and a look whether
the device is then as it was asked for, with its door closed. In a virtual machine with Secure Boot and a
software TPM; or on a real device that runs the image, through --console-command or --console. A
development image needs nothing else; for others --settings names the provisioning station's settings file.

exit codes: 0 all steps passed, 1 a step failed (the results say which, with the end of the console)
"""
_EXAMPLES: Final = """\
  trustme smoke build/image --junit smoke.xml --oeqa testresults.json
  trustme smoke build/image --console-command 'socat - /dev/ttyUSB1,b115200,raw,echo=0'
  trustme smoke release --settings station.yml --console /run/lab/board-1.sock
"""


def register(subparsers: Subparsers) -> None:
    """Add `trustme smoke`."""
    parser = add_verb(
        subparsers,
        "smoke",
        _run,
        summary="boot, provision and reboot an image, and say whether all is well",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("image_dir", type=Path, metavar="IMAGE_DIR", help="as for `trustme run`")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--console-command",
        metavar="COMMAND",
        help="a board: its core console is this program's stdin/stdout",
    )
    way.add_argument(
        "--console", type=Path, metavar="PATH", help="a board: its core console is behind this unix socket"
    )
    parser.add_argument("--settings", type=Path, metavar="FILE", help="as for `trustme provision`")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML")
    parser.add_argument(
        "--oeqa", type=Path, metavar="FILE", help="add the results to this testresults.json of OpenEmbedded"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=240.0,
        metavar="SECONDS",
        help="for a board's first answer (default: %(default)s)",
    )


def _run(args: argparse.Namespace) -> Result:
    from trustme_tools.machine import images
    from trustme_tools.provision import settings
    from trustme_tools.smoke import results, walk

    image = images.load(args.image_dir)
    started = datetime.now(UTC)
    with ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="trustme-smoke-")))
        read = settings.load(args.settings) if args.settings else walk.development_settings(image, directory)
        smoke = walk.Smoke(_subject(args, image, directory, held), read, progress)
        cases = smoke.run()
    configuration = results.configuration(image.manifest, started)
    if args.junit is not None:
        results.write(args.junit, results.junit(walk.GROUP, cases, started))
    if args.oeqa is not None:
        results.write_oeqa(args.oeqa, results.oeqa(cases, configuration))
    bad = [case for case in cases if not case.status.good]
    data = {
        "passed": smoke.passed,
        "configuration": configuration,
        "cases": [
            {
                "name": case.name,
                "status": case.status.value,
                "seconds": round(case.seconds, 2),
                "log": case.log,
            }
            for case in cases
        ],
    }
    seconds = sum(case.seconds for case in cases)
    text = "\n".join(f"{case.name}: {case.log}" for case in bad) or f"all well, {seconds:.0f} s"
    return Result(data, f"{args.image_dir}: {text}", Exit.OK if smoke.passed else Exit.FAILED)


def _subject(args: argparse.Namespace, image: ImageDirectory, directory: Path, held: ExitStack) -> Subject:
    from trustme_tools.image.cache import Cache, default_root
    from trustme_tools.machine import firmware
    from trustme_tools.machine.console import Terminal
    from trustme_tools.smoke.subject import Board, ProgramTerminal, Virtual

    if args.console is not None:
        return Board(lambda: Terminal(args.console, lambda: True), timeout=args.timeout)
    if args.console_command is not None:
        command = shlex.split(args.console_command)
        if not command:
            raise UsageError("--console-command is empty", "name a program", code="no-console-command")
        return Board(lambda: ProgramTerminal(command), timeout=args.timeout)
    firm = firmware.prepare(Cache(default_root()), image.pki)
    return held.enter_context(Virtual(image.disk, firm, directory / "device"))
