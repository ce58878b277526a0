# SPDX-License-Identifier: Apache-2.0
"""`trustme run`: a device on this host."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_tools.cli.verbs import Result, add_verb, progress
from trustme_tools.errors import ToolError, UsageError

if TYPE_CHECKING:
    from trustme_tools.cli.verbs import Subparsers
    from trustme_tools.machine.vm import Outcome, VirtualMachine

_DESCRIPTION = """\
Boot an image directory (the reference builder's, or where Yocto deploys) in a virtual machine: OVMF with
Secure Boot and the image's own keys, a software TPM, KVM where it works and plain emulation elsewhere.
Shows the boot console, then gives this terminal to the core container (Ctrl-] leaves and switches the
machine off).

exit codes: 0 core container was running, 1 refused by firmware or device, or no result in time
"""

_EXAMPLES = """\
  trustme run build/image
  trustme run --image-dir build/tmp/deploy/images/qemux86-64
  trustme run build/image --once                  boot, wait for RUNNING, switch off
  trustme run build/image --state device-1        a device that remembers: disk, TPM, firmware variables
  trustme run build/image --power-cut 'stage 4/7' switch off hard at a line of the boot console
  trustme run build/image --snapshot saved        boot, then save the running machine
  trustme run build/image --resume saved          go on from there in about a second
"""

_POWER_OFF_TIME: Final = 60.0
POWER_OFF_COMMAND: Final = "control reboot"
"""Typed at the core's console. The machine is started with -no-reboot: it switches off instead."""


def register(subparsers: Subparsers) -> None:
    """Add `trustme run`."""
    parser = add_verb(
        subparsers,
        "run",
        _run,
        summary="run an image in a virtual machine with Secure Boot and a TPM",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "image_dir",
        type=Path,
        nargs="?",
        metavar="IMAGE_DIR",
        help="as `trustme image build` makes it, or bitbake's tmp/deploy/images/MACHINE",
    )
    parser.add_argument(
        "--image-dir", type=Path, dest="image_option", metavar="DIR", help="the same, as an option"
    )
    parser.add_argument("--once", action="store_true", help="switch off when the core container runs")
    parser.add_argument(
        "--console", action="store_true", help="stay on the boot console, do not attach to the core"
    )
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="keep disk changes, TPM and firmware variables here"
    )
    parser.add_argument("--tpm-state", type=Path, metavar="DIR", help="keep the TPM here")
    parser.add_argument(
        "--power-cut", type=_pattern, metavar="PATTERN", help="end the machine hard when a boot line matches"
    )
    parser.add_argument("--snapshot", type=Path, metavar="DIR", help="save the running machine here and end")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="start from a saved machine")
    parser.add_argument("--cpu", default="max", help="QEMU's processor model (default: %(default)s)")
    parser.add_argument("--accel", choices=("kvm", "tcg"), help="default: KVM if it works")
    parser.add_argument(
        "--timeout", type=float, default=240.0, metavar="SECONDS", help="for the boot (default: %(default)s)"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="copy the console logs here at the end")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.MULTILINE)
    except re.error as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {exc}") from None


def image_directory(args: argparse.Namespace) -> Path:
    """Return the one image directory that was named; UsageError("no-image-directory")."""
    named: list[Path] = [path for path in (args.image_dir, args.image_option) if path is not None]
    if len(named) != 1:
        raise UsageError(
            f"{len(named)} image directories are named",
            "name one, either as IMAGE_DIR or with --image-dir",
            code="no-image-directory",
        )
    return named[0]


def _run(args: argparse.Namespace) -> Result:
    from trustme_tools.image.cache import Cache, default_root
    from trustme_tools.machine import firmware, images
    from trustme_tools.machine.vm import SavedState, VirtualMachine

    interactive = not (args.once or args.power_cut or args.snapshot or args.console or args.json)
    if interactive and not sys.stdin.isatty():
        raise UsageError(
            "there is no terminal to give to the core container",
            "use --once, or --console to watch the boot only",
            code="no-terminal",
        )
    image = images.load(image_directory(args))
    machine = VirtualMachine(
        image.disk,
        firmware.prepare(Cache(default_root()), image.pki),
        state=args.state,
        tpm_state=args.tpm_state,
        cpu=args.cpu,
        accelerator=args.accel,
        saved=SavedState(args.resume.resolve()) if args.resume else None,
    )
    progress(f"machine: {machine.accelerator.upper()}, {args.cpu}, Secure Boot, TPM; image {image.path}")
    with machine:
        return _drive(machine, args, interactive=interactive)


def _drive(machine: VirtualMachine, args: argparse.Namespace, *, interactive: bool) -> Result:
    try:
        outcome = _watch(machine, args)
        if outcome.kind == "power-cut":
            machine.cut_power()
            return _result(machine, outcome, f"power cut after {outcome.seconds:.1f} s")
        if outcome.kind != "running":
            raise _failure(machine, outcome)
        progress(f"core container RUNNING {outcome.seconds:.1f} s after power-on")
        if args.snapshot is not None:
            machine.save(args.snapshot)
            return _result(machine, outcome, f"saved to {args.snapshot}")
        if args.console:
            _follow(machine)
        elif interactive:
            from trustme_tools.machine.attach import attach

            progress("core console (try `control --help`); Ctrl-] switches the machine off")
            attach(machine.core_socket, lambda: machine.running)
            sys.stdout.write("\r\n")
        if machine.running:
            _switch_off(machine)
        return _result(machine, outcome, "")
    finally:
        if args.logs is not None:
            machine.keep_logs(args.logs)


def _watch(machine: VirtualMachine, args: argparse.Namespace) -> Outcome:
    """Show the boot console until the outcome is known (or --power-cut's line appears)."""
    from trustme_tools.machine.vm import Outcome

    if args.resume is not None:
        return Outcome("running", "resumed", 0.0)
    cut: re.Pattern[str] | None = args.power_cut
    shown = 0
    started = time.monotonic()
    while True:
        outcome = machine.look()
        text = machine.boot.text
        progress_text = text[shown:]
        if progress_text and not args.json:
            sys.stdout.write(progress_text)
            sys.stdout.flush()
        shown = len(text)
        elapsed = time.monotonic() - started
        if cut is not None and cut.search(text):
            return Outcome("power-cut", "", elapsed)
        if outcome is not None:
            return outcome
        if elapsed > args.timeout:
            return Outcome("timeout", f"no result in {args.timeout:.0f} s", elapsed)
        time.sleep(0.02)


def _follow(machine: VirtualMachine) -> None:
    shown = len(machine.boot.text)
    while machine.running:
        text = machine.boot.text
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
        time.sleep(0.1)


def _switch_off(machine: VirtualMachine) -> None:
    """Ask the device to go down; end it hard only if it does not."""
    machine.core.send(f"\r{POWER_OFF_COMMAND}\r")
    try:
        machine.wait_off(_POWER_OFF_TIME)
    except ToolError:
        raise ToolError(
            "the device did not switch itself off",
            "it was ended hard; see its boot log with --logs",
            code="no-power-off",
            evidence=machine.core.text[-300:],
        ) from None


def _failure(machine: VirtualMachine, outcome: Outcome) -> ToolError:
    causes = {
        "refused": "the device refused to go on",
        "firmware-denied": "the firmware refused to start the boot image",
        "firmware-nothing": "the firmware found nothing to start",
        "ended": "the machine ended",
        "timeout": "the core container did not run in time",
    }
    remedies = {
        "refused": "the screen above names evidence and remedy",
        "firmware-denied": "the UKI must be signed by a key whose certificate is in db and not in dbx",
        "firmware-nothing": "the boot partition needs EFI/BOOT/BOOTX64.EFI",
    }
    tail = machine.serial.text.strip().splitlines()[-2:]
    return ToolError(
        causes[outcome.kind],
        remedies.get(outcome.kind, "look at the consoles: --logs DIR"),
        code=outcome.kind,
        evidence=outcome.detail or " | ".join(tail),
    )


def _result(machine: VirtualMachine, outcome: Outcome, text: str) -> Result:
    data = {
        "outcome": outcome.kind,
        "seconds": round(outcome.seconds, 2),
        "accelerator": machine.accelerator,
        "boot": machine.boot.text.splitlines(),
    }
    return Result(data, text)
