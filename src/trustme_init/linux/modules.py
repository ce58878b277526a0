# SPDX-License-Identifier: Apache-2.0
"""Loading kernel modules by name or alias: one call of modprobe for all of them.

Measured: one `modprobe -a` call costs 2 ms more than nothing, aliases and names together (a `true` costs
0.5 ms). Own code over modules.dep would have to repeat soft dependencies, options, the deny list and three
ways of compression (Debian's modules are .ko.xz) to save them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.errors import DeviceRefusal

if TYPE_CHECKING:
    from collections.abc import Sequence

MODPROBE: Final = Path("/usr/sbin/modprobe")
_ALIAS_LIMIT: Final = 4096
"""Bytes of one modalias file; the longest (input devices) have some hundreds."""
_SAID_LIMIT: Final = 1024
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def load(names: Sequence[str], *, required: bool = False, modprobe: Path = MODPROBE) -> None:
    """Load modules, by name or alias, with what they depend on; what is loaded or built in already is fine.

    With `required` the names are module names, and DeviceRefusal("module-missing") lists each one that is
    afterwards neither loaded nor built in. Without, a name may have no module (most aliases have none).
    """
    wanted = [name for name in names if not is_there(name)] if required else list(names)
    if not wanted:
        return
    said = _run(modprobe, wanted)
    missing = [name for name in wanted if not is_there(name)] if required else []
    if missing:
        raise DeviceRefusal(
            "module-missing",
            f"kernel modules cannot be loaded: {', '.join(missing)}",
            evidence=said or f"not in /lib/modules/{os.uname().release}",
            remedy="put these modules into the boot image, or take them out of the policy's devices.modules",
        )


def coldplug_aliases(sysfs: Path = Path("/sys")) -> tuple[str, ...]:
    """Return the aliases of devices that no driver serves yet, each once, sorted."""
    found: set[str] = set()
    for bus in _children(sysfs / "bus"):
        for device in _children(bus / "devices"):
            if (device / "driver").exists():
                continue
            try:
                with (device / "modalias").open("rb") as file:
                    text = file.read(_ALIAS_LIMIT)
            except OSError:  # no alias, or the device is gone again
                continue
            alias = text.decode("ascii", "replace").strip()
            if alias:
                found.add(alias)
    return tuple(sorted(found))


def _children(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def is_there(name: str, *, sysfs: Path = Path("/sys"), tree: Path | None = None) -> bool:
    """Whether a module is live, or built into the kernel; `tree` is the kernel's /lib/modules directory."""
    canonical = name.replace("-", "_")
    directory = sysfs / "module" / canonical
    if directory.is_dir():
        try:
            return (directory / "initstate").read_text("ascii").strip() == "live"
        except FileNotFoundError:
            return True  # built in
    # A built-in module without parameters has no /sys/module directory.
    builtin = (tree or Path("/lib/modules") / os.uname().release) / "modules.builtin"
    try:
        with builtin.open(encoding="ascii", errors="replace") as file:
            return any(Path(line.strip()).stem.replace("-", "_") == canonical for line in file)
    except FileNotFoundError:
        return False


def _run(modprobe: Path, names: Sequence[str]) -> str:
    """Run modprobe and return the end of what it says (importing `subprocess` would cost more than this)."""
    reader, writer = os.pipe()
    try:
        try:
            pid = os.posix_spawn(
                modprobe,
                [modprobe.name, "--all", "--quiet", "--", *names],
                _ENVIRONMENT,
                file_actions=[(os.POSIX_SPAWN_DUP2, writer, 2)],
            )
        except OSError as exc:
            return f"{modprobe}: {exc.strerror}"
        finally:
            os.close(writer)
        said = b""
        while part := os.read(reader, _SAID_LIMIT):
            said = (said + part)[-_SAID_LIMIT:]
        os.waitpid(pid, 0)
    finally:
        os.close(reader)
    # The exit code only says that some name failed, and an alias may: what counts is what is there
    # afterwards.
    return " / ".join(said.decode("utf-8", "backslashreplace").split("\n")).strip(" /")
