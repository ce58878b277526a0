# SPDX-License-Identifier: Apache-2.0
"""The Unified Kernel Image: kernel, initramfs and command line in one file that the firmware verifies."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.image import packages
from trustme_tools.tooling import run, secret_file

COMMAND_LINE: Final = (
    # The last console is the one PID 1 writes to; the serial port also shows a panic.
    "console=ttyS0",
    "console=hvc0",
    # Only a partition table whose checksums and backup agree is used.
    "gpt",
    # Debian locks the kernel down under Secure Boot by itself, others do not.
    "lockdown=integrity",
    # A loaded host without KVM otherwise stops now and then with "IO-APIC + timer doesn't work".
    "no_timer_check",
    "panic=-1",
    "quiet",
    "loglevel=4",
)

OS_RELEASE: Final = """\
ID=trustme-py
NAME=trustme-py
PRETTY_NAME=trustme-py base system {version}
VERSION_ID={version}
"""


def assemble(
    tree: Path,
    initramfs: Sequence[Path],
    target: Path,
    *,
    version: str,
    command_line: Sequence[str] = COMMAND_LINE,
) -> None:
    """Write the unsigned UKI; `initramfs` archives are put one behind the other in this order."""
    release = packages.kernel_version(tree)
    _ukify(
        tree,
        linux=tree / "boot" / f"vmlinuz-{release}",
        initramfs=initramfs,
        texts={
            "cmdline": " ".join(command_line),
            "os-release": OS_RELEASE.format(version=version),
            "uname": release,
        },
        target=target,
    )


def _ukify(
    tree: Path, *, linux: Path, initramfs: Sequence[Path], texts: Mapping[str, str], target: Path
) -> None:
    run(
        sys.executable,
        [
            *(tree / "usr/lib/systemd/ukify", "build"),
            *(f"--linux={linux}", *(f"--initrd={path}" for path in initramfs)),
            *(f"--{name}={text}" for name, text in texts.items()),
            f"--stub={tree}/usr/lib/systemd/boot/efi/linuxx64.efi.stub",
            *("--efi-arch=x64", f"--output={target}"),
        ],
        purpose="assemble the UKI",
        environment={"SOURCE_DATE_EPOCH": "0"},
    )


def sign(unsigned: Path, target: Path, *, key_pem: bytes, certificate: Path) -> None:
    """Sign a PE file for the firmware; `key_pem` is the private key, not encrypted (it is never stored)."""
    with secret_file(key_pem) as (descriptor, path):
        run(
            "sbsign",
            ["--key", path, "--cert", certificate, "--output", target, unsigned],
            purpose="sign the UKI",
            pass_fds=(descriptor,),
        )
    if not target.is_file():
        raise ToolError("sbsign wrote nothing", code="sign-failed")


def strip_signature(signed: Path, target: Path) -> None:
    """Write `signed` without its signatures to `target`."""
    with tempfile.TemporaryDirectory(prefix="trustme-uki-") as name:
        copy = Path(name) / "uki.efi"
        copy.write_bytes(signed.read_bytes())
        run("sbattach", ["--remove", copy], purpose="remove a UKI's signature")
        target.write_bytes(copy.read_bytes())


def resign(signed: Path, target: Path, *, key_pem: bytes, certificate: Path) -> None:
    """Write `signed` to `target` with another key's signature instead of its own."""
    with tempfile.TemporaryDirectory(prefix="trustme-uki-") as name:
        bare = Path(name) / "bare.efi"
        strip_signature(signed, bare)
        sign(bare, target, key_pem=key_pem, certificate=certificate)


def sections(path: Path) -> dict[str, bytes]:
    """Return section name → content of a UKI, without the padding to whole pages."""
    import pefile

    with pefile.PE(path, fast_load=True) as image:
        return {
            section.Name.rstrip(b"\0").decode(): section.get_data(length=section.Misc_VirtualSize)
            for section in image.sections
        }


def rebuild(
    tree: Path,
    signed: Path,
    target: Path,
    *,
    extra_initramfs: Sequence[Path] = (),
    command_line: Sequence[str] | None = None,
) -> None:
    """Write an unsigned UKI made of the parts of `signed`, with more initramfs or another command line.

    Works on a UKI of any origin; ukify and stub come from `tree`.
    """
    parts = sections(signed)
    with tempfile.TemporaryDirectory(prefix="trustme-uki-") as name:
        work = Path(name)
        for part in (".linux", ".initrd"):
            if part not in parts:
                raise ToolError(f"{signed.name} has no section {part}", code="not-a-uki")
            (work / part).write_bytes(parts[part])
        text = parts.get(".cmdline", b"").rstrip(b"\0").decode()
        _ukify(
            tree,
            linux=work / ".linux",
            initramfs=[work / ".initrd", *extra_initramfs],
            texts={
                "cmdline": text if command_line is None else " ".join(command_line),
                "os-release": parts.get(".osrel", b"").decode(),
                "uname": parts.get(".uname", b"").rstrip(b"\0").decode(),
            },
            target=target,
        )
