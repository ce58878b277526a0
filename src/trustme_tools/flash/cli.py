# SPDX-License-Identifier: Apache-2.0
"""`trustme flash`: an image onto a disk or card."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_tools.cli.verbs import Result, add_verb, progress
from trustme_tools.errors import UsageError

if TYPE_CHECKING:
    from trustme_init.storage import gpt
    from trustme_tools.cli.verbs import Subparsers
    from trustme_tools.flash.device import Disk
    from trustme_tools.flash.source import Image
    from trustme_tools.flash.target import Target
    from trustme_tools.flash.write import Outcome

_DESCRIPTION: Final = """\
Write an image to a whole disk, and read it back to see that it is there. The image is raw or compressed
(gz, xz, zst), or an image directory; a block map (IMAGE.bmap) beside it is used: its checksums are compared
before anything is written, and with what is on the disk afterwards.

Refused, whatever the options: a disk with something mounted or otherwise in use on it, the disk this system
runs from, a partition, a write-protected or too small device, one that is exchanged meanwhile. Everything on
the device is lost: without --yes you are shown model, serial number and size, and type the device's name.

exit codes: 0 written and verified, 1 refused or failed, 2 wrong usage or not confirmed, 3 a host program is
missing, 130 interrupted. After 1 or 130 the device is untouched, or has no partition table.
"""
_EXAMPLES: Final = """\
  trustme flash build/image /dev/sdX
  trustme flash trustme-base.img.zst /dev/disk/by-id/usb-… --yes --json
  truncate -s 2G disk.img && trustme flash build/image disk.img --file --yes
"""
_STEP: Final = 10
"""Percent between two lines of progress where there is no terminal to redraw one."""


def register(subparsers: Subparsers) -> None:
    """Add `trustme flash`."""
    parser = add_verb(
        subparsers,
        "flash",
        _run,
        summary="write an image to a disk or card, and verify it",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="image file, or an image directory")
    parser.add_argument("device", type=Path, metavar="DEVICE", help="the whole disk, like /dev/sdX")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    maps = parser.add_mutually_exclusive_group()
    maps.add_argument("--bmap", type=Path, metavar="FILE", help="the image's block map (default: beside it)")
    maps.add_argument("--no-bmap", action="store_true", help="use no block map, even if there is one")
    parser.add_argument(
        "--any-image", action="store_true", help="also flash what is not an image of this system"
    )
    parser.add_argument("--file", action="store_true", help="DEVICE is a plain file, as large as a disk")


def _run(args: argparse.Namespace) -> Result:
    from trustme_tools.flash import device, source, write

    started = time.monotonic()
    with _opened(args) as (target, disk):
        progress(f"reading and checking {args.image}")
        path = _image_path(args.image)
        image = source.load(path, map_path=args.bmap, use_map=not args.no_bmap, limit=target.size)
        table = write.table_of(image) if not args.any_image else None
        if not args.any_image:
            write.check_ours(table, target.sector_size)
        before = write.older_table(target)
        _confirm(args, disk, target, before)
        if disk is not None:
            # While the question waited for its answer, somebody may have exchanged the card.
            device.check_same(disk, args.device)
        older = [*write.extents_of(before), *(disk.partitions if disk is not None else ())]
        plan = write.plan(image, table, target.size, older)
        outcome = write.flash(image, plan, target, _Meter())
    return _result(args, image, disk, outcome, time.monotonic() - started)


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[tuple[Target, Disk | None]]:
    from trustme_tools.flash import device
    from trustme_tools.flash.target import Target

    if not args.file:
        with device.claimed(args.device) as (fd, disk):
            yield Target(fd, size=disk.size, sector_size=disk.sector_size, is_block=True), disk
        return
    fd = os.open(args.device, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{args.device} is not a plain file", "leave --file out", code="not-a-file")
        yield Target(fd, size=found.st_size, sector_size=512, is_block=False), None
    finally:
        os.close(fd)


def _image_path(path: Path) -> Path:
    """Return the image file: `path`, or the disk of the image directory there."""
    from trustme_tools.machine import images

    return images.load(path).disk if path.is_dir() else path


def _confirm(args: argparse.Namespace, disk: Disk | None, target: Target, before: gpt.Table | None) -> None:
    """Have a person type the device's name; ToolError("not-confirmed")."""
    if args.yes:
        return
    name = disk.name if disk is not None else args.device.name
    if args.json or not sys.stdin.isatty():
        raise UsageError(
            "nobody can be asked whether this is the right device",
            "add --yes if you are sure",
            code="not-confirmed",
            evidence=str(disk or args.device),
        )
    held = ", ".join(ascii(each.name)[1:-1] for each in before.partitions) if before is not None else ""
    progress(f"{disk or f'{name}: a file, {target.size / 1e9:.2f} GB'}")
    progress(f"  it holds now: {held or 'no partition table that can be read'}. All of it will be lost.")
    sys.stderr.write(f"Type the name of the device ({name}) to go on: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip() != name:
        raise UsageError("not confirmed", "nothing was written", code="not-confirmed")


class _Meter:
    """Shows how far the work is, on stderr: one line that is redrawn, or a line now and then."""

    def __init__(self) -> None:
        self._shown = ("", -1)

    def __call__(self, phase: str, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        live = sys.stderr.isatty()
        step = percent if live or percent == 100 else percent // _STEP * _STEP
        if self._shown == (phase, step):
            return
        self._shown = (phase, step)
        end = "\n" if not live or percent == 100 else ""
        start = "\r" if live else ""
        sys.stderr.write(f"{start}{phase} {percent:3} % of {total / 1e6:.1f} MB{end}")
        sys.stderr.flush()


def _result(
    args: argparse.Namespace, image: Image, disk: Disk | None, outcome: Outcome, seconds: float
) -> Result:
    data = {
        "device": args.device,
        "model": disk.model if disk is not None else None,
        "serial": disk.serial if disk is not None else None,
        "device_size": disk.size if disk is not None else args.device.stat().st_size,
        "image": image.path,
        "image_size": image.size,
        "bmap": image.bmap_path,
        "written": outcome.written,
        "zeroed": outcome.zeroed,
        "verified": outcome.verified,
        "discarded": outcome.discarded,
        "seconds": round(seconds, 2),
    }
    text = (
        f"{args.device}: {image.path.name} written and verified in {seconds:.1f} s "
        f"({outcome.written / 1e6:.1f} MB of data, {outcome.zeroed / 1e6:.1f} MB of zeros; "
        f"{'its block map fits' if image.bmap_path else 'no block map'})"
    )
    return Result(data, text)
