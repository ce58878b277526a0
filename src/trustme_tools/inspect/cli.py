# SPDX-License-Identifier: Apache-2.0
"""`trustme inspect`: one verb for what a device leaves behind or is made of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trustme_tools.cli.verbs import Result, add_verb

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers


def register(subparsers: Subparsers) -> None:
    """Add the verb to the command."""
    parser = add_verb(
        subparsers,
        "inspect",
        _inspect,
        summary="show a disk image, a boot report or a GuestOS config",
        description="Show what a file is about: a disk image (partitions, GuestOSes in its store), a boot\n"
        "report (stages with times, firmware facts, anchors) or a GuestOS configuration.\n"
        "Nothing is verified.",
        examples="  trustme inspect build/image/trustme-base.img\n"
        "  trustme inspect boot.json\n"
        "  trustme inspect store/operatingsystems/trustme-coreos-1.conf\n",
    )
    parser.add_argument("path", type=Path, help="disk image, boot.json or NAME-VERSION.conf")


def _inspect(args: argparse.Namespace) -> Result:
    from trustme_tools.errors import ToolError
    from trustme_tools.guestos import check
    from trustme_tools.inspect import disk, report

    path: Path = args.path
    if path.suffix == ".conf":
        facts = check.describe(check.load_config(path))
        return Result({"kind": "guestos-config", **facts}, check.text(facts))
    if disk.is_disk(path):
        facts = disk.describe(path)
        return Result({"kind": "disk-image", **facts}, disk.text(facts))
    if not report.is_json(path):
        raise ToolError(
            f"{path} is nothing this command knows",
            "name a disk image, a copy of the device's /run/trustme/boot.json or a NAME-VERSION.conf",
            code="unknown-file",
        )
    facts = report.parse(path.read_bytes())
    return Result({"kind": "boot-report", **facts}, report.text(facts))
