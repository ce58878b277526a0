# SPDX-License-Identifier: Apache-2.0
"""Run a program of the host and hand it secrets without argv, environment or disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

from trustme_tools.errors import MissingToolError, ToolError

PACKAGES: Final[Mapping[str, str]] = {
    "cp": "coreutils",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "fallocate": "util-linux",
    "gzip": "gzip",
    "hash-to-efi-sig-list": "efitools",
    "mcopy": "mtools",
    "mdel": "mtools",
    "mke2fs": "e2fsprogs",
    "mkfs.erofs": "erofs-utils",
    "mkfs.vfat": "dosfstools",
    "mksquashfs": "squashfs-tools",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "modinfo": "kmod",
    "openssl": "openssl",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "sbattach": "sbsigntool",
    "sbsign": "sbsigntool",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "sign-efi-sig-list": "efitools",
    "strip": "binutils",
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
    "tar": "tar",
    "unshare": "util-linux",
    "veritysetup": "cryptsetup-bin",
    "xz": "xz-utils",
    "zstd": "zstd",
}
"""Which Debian package has a program; for the remedy of MissingToolError. Others are in .venv."""

_STDERR_LINES: Final = 6
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


def _search_path() -> str:
    """Return PATH and what it lacks for users who are not root."""
    places = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), "/usr/sbin", "/sbin"]
    return os.pathsep.join(places)


def find(program: str) -> str:
    """Return the path of `program`; also looks beside this Python (a venv) and in sbin."""
    found = shutil.which(program, path=_search_path())
    if found is None:
        raise MissingToolError(program, PACKAGES.get(program))
    return found


def run(
    program: str,
    arguments: Sequence[str | Path],
    *,
    purpose: str,
    stdin: bytes = b"",
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] = _NOTHING,
    without: Sequence[str] = (),
) -> bytes:
    """Run `program` and return its stdout; ToolError("tool-failed") with the end of stderr otherwise.

    `purpose` completes "cannot …" in the message. The locale is C and the time zone UTC, so that output
    can be parsed and images do not depend on who builds them; `environment` adds variables and `without`
    names some to leave out.
    """
    settings = {**os.environ, "PATH": _search_path(), "LC_ALL": "C.UTF-8", "TZ": "UTC", **environment}
    for name in without:
        settings.pop(name, None)
    done = subprocess.run(
        [find(program), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        check=False,
        pass_fds=pass_fds,
        env=settings,
    )
    if done.returncode:
        tail = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-_STDERR_LINES:]
        raise ToolError(
            f"cannot {purpose}: {program} failed with code {done.returncode}",
            f"read what {program} says above; run it by hand if it is not clear",
            code="tool-failed",
            evidence=" | ".join(tail),
        )
    return done.stdout


@contextmanager
def secret_file(data: bytes) -> Iterator[tuple[int, str]]:
    """Yield (descriptor, path) of an anonymous memory file; pass the descriptor on with `pass_fds`."""
    descriptor = os.memfd_create("trustme-secret", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor, f"/dev/fd/{descriptor}"
    finally:
        os.close(descriptor)
