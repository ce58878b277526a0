# SPDX-License-Identifier: Apache-2.0
"""The first stage: the kernel's own file systems, done once by PID 1 before anything else.

Standard library only; see design decision 7.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final, NamedTuple

from trustme_init.linux.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, mount


class KernelMount(NamedTuple):
    """One entry of the table of kernel file systems."""

    fstype: str
    target: Path
    flags: int
    data: str = ""


TOOL_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_STRICT: Final = MS_NOSUID | MS_NODEV | MS_NOEXEC

EARLY_MOUNTS: Final = (
    KernelMount("proc", Path("/proc"), _STRICT),
    KernelMount("sysfs", Path("/sys"), _STRICT),
    KernelMount("devtmpfs", Path("/dev"), MS_NOSUID | MS_NOEXEC, "mode=0755"),
    KernelMount("tmpfs", Path("/run"), MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755,size=25%"),
    KernelMount("cgroup2", Path("/sys/fs/cgroup"), _STRICT, "nsdelegate,memory_recursiveprot"),
)


def mounted_types() -> dict[str, str]:
    """Return mount point → file system type, the topmost last."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return {}
    return {fields[1]: fields[2] for fields in map(str.split, lines)}


def mount_kernel_filesystems(table: tuple[KernelMount, ...]) -> None:
    """Mount what is not mounted yet; OSError names the mount point.

    EBUSY counts as mounted: the kernel answers so when the same instance is there already.
    """
    present = mounted_types()
    for entry in table:
        if present.get(str(entry.target)) == entry.fstype:
            continue
        entry.target.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            mount(entry.fstype, str(entry.target), entry.fstype, entry.flags, entry.data)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise


def own_environment() -> None:
    """Replace the environment: the kernel makes variables of the words of its command line.

    Some of those words may come from outside the signed image (the boot stub appends what the firmware's
    OEM strings say); what the manager starts later shall not inherit them.
    """
    os.environ.clear()
    os.environ["PATH"] = TOOL_PATH
    # The TPM library writes to standard error what it also returns: the console is for our lines.
    os.environ["TSS2_LOG"] = "all+none"


def quieten_console() -> None:
    """Make SysRq and Ctrl-Alt-Del inert and detach stdin: nobody at a console can interrupt the boot."""
    for name in ("sysrq", "ctrl-alt-del"):
        _set(name, "0")
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    if null != 0:
        os.close(null)


def forbid_module_autoload() -> None:
    """Stop the kernel from calling modprobe by itself: from now on only we decide what is loaded.

    A container could otherwise have any module of the initramfs loaded by naming a protocol or a file system.
    """
    _set("modprobe", "\n")


def _set(name: str, value: str) -> None:
    try:
        Path("/proc/sys/kernel", name).write_text(value)
    except FileNotFoundError:
        return  # a kernel built without the door
