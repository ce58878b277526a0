# SPDX-License-Identifier: Apache-2.0
"""`trustme provision`: from first boot to operation, for one device or many."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_tools.cli.verbs import Result, add_verb, progress
from trustme_tools.errors import Exit, UsageError

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers
    from trustme_tools.provision.fleet import Target
    from trustme_tools.provision.settings import Settings

_DESCRIPTION: Final = """\
Walk devices through provisioning: register the anchors, have the TPM prove the device key, sign and install
the device certificate, set the token up, complete, and see that the door is closed. Begin again at any time:
what is done is not done twice. docs/provisioning.md explains the settings file and what stops a device.

TARGET is a name from the settings file, unix:PATH (a control socket of this host) or console:PATH (a core
container's console behind a unix socket). Without one, all targets of the settings file are provisioned.
"""

_EXAMPLES: Final = """\
  trustme provision station.yml bench-1
  trustme provision station.yml --parallel 4 --json > reports.json
  trustme provision station.yml bench-1 3< pin-file           with `pin: fd:3`
  trustme provision station.yml --simulate build/image --count 20 --parallel 4
"""
_COUNT_LIMIT: Final = 1000


def register(subparsers: Subparsers) -> None:
    """Add `trustme provision`."""
    parser = add_verb(
        subparsers,
        "provision",
        _run,
        summary="walk devices from first boot to operation",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("settings", type=Path, metavar="CONFIG", help="settings file (YAML)")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="which devices (default: all of CONFIG)")
    parser.add_argument(
        "--parallel", type=_count, default=1, metavar="N", help="devices at once (default: %(default)s)"
    )
    parser.add_argument(
        "--simulate", type=Path, metavar="IMAGE_DIR", help="provision virtual machines of this image instead"
    )
    parser.add_argument(
        "--count", type=_count, metavar="N", help="with --simulate: how many machines (default: 1)"
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="with --simulate: keep the machines here, each in its directory",
    )


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= _COUNT_LIMIT:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {_COUNT_LIMIT}")
    return value


def _run(args: argparse.Namespace) -> Result:
    from trustme_tools.provision import fleet, plan, report, settings

    read = settings.load(args.settings)
    with ExitStack() as held:
        targets = _targets(args, read, held)
        loaded = plan.load(read, tuple(target.settings for target in targets))
        reports = fleet.provision(loaded, targets, parallel=args.parallel, tell=progress)
    good = sum(each.good for each in reports)
    text = "\n\n".join(report.as_text(each) for each in reports)
    summary = f"\n\n{good} of {len(reports)} provisioned" if len(reports) > 1 else ""
    return Result(
        {"good": good == len(reports), "devices": [each.as_dict() for each in reports]},
        f"{text}{summary}",
        Exit.OK if good == len(reports) else Exit.FAILED,
    )


def _targets(args: argparse.Namespace, settings: Settings, held: ExitStack) -> list[Target]:
    from trustme_tools.provision import fleet

    if args.simulate is None and (args.count is not None or args.state is not None):
        raise UsageError("--count and --state are for simulated devices", "add --simulate IMAGE_DIR")
    if args.simulate is not None and args.targets:
        raise UsageError("either TARGETs or --simulate", "leave one of them out")
    if args.simulate is not None:
        return _simulated(args, held)
    known = {target.name: target for target in settings.targets}
    chosen = [known.get(name) or fleet.named(name) for name in args.targets] or list(settings.targets)
    if not chosen:
        raise UsageError(
            "there is nothing to provision",
            "give the settings file targets, or name a TARGET",
            code="no-target",
        )
    if len({target.name for target in chosen}) != len(chosen):
        raise UsageError("a target is named twice", "name each once", code="target-twice")
    return [fleet.real(target) for target in chosen]


def _simulated(args: argparse.Namespace, held: ExitStack) -> list[Target]:
    from trustme_tools.image.cache import Cache, default_root
    from trustme_tools.machine import acceleration, firmware, images
    from trustme_tools.provision import fleet

    image = images.load(args.simulate)
    firm = firmware.prepare(Cache(default_root()), image.pki)
    state = args.state or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="trustme-devices-")))
    progress(f"machines: {acceleration.choose().upper()}, Secure Boot, a TPM each; image {args.simulate}")
    names = [f"sim-{number}" for number in range(1, (args.count or 1) + 1)]
    return [fleet.simulated(name, image.disk, firm, state / name) for name in names]
