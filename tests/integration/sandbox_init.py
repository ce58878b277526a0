# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the native sandbox: makes the places of a Machine, then runs the product's own PID 1.

Started by `sandbox.py` inside new mount and PID namespaces with one argument, a JSON file of paths.
Nothing of the boot is replaced: same stage table, same manager, same refusals, same reboot(2), which in a
PID namespace ends this process with SIGHUP (reboot) or SIGINT (power-off).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "src"), str(HERE.parents[2])]

from tests.integration import adapters, loopblock  # noqa: E402 - a script finds its own tree first
from trustme_init.boot import pid1  # noqa: E402
from trustme_init.boot.console import Console  # noqa: E402
from trustme_init.compartments.volumes import FileVolumes  # noqa: E402
from trustme_init.linux.mount import MS_BIND, MS_NODEV, MS_NOSUID, MS_PRIVATE, MS_REC, mount  # noqa: E402
from trustme_init.machine import Machine  # noqa: E402


def prepare(places: dict[str, str]) -> Machine:
    """Mount what a booted kernel would offer, without touching the host's own settings."""
    mount("none", "/", "", MS_REC | MS_PRIVATE, "")
    mount("proc", "/proc", "proc", 0, "")
    work = Path(places["work"])
    for name in ("sysrq", "ctrl-alt-del", "modprobe"):
        # `early` writes these: they are global, so the sandbox gets files of its own.
        setting = Path("/proc/sys/kernel", name)
        if setting.exists():
            stand_in = work / name
            stand_in.touch()
            mount(str(stand_in), str(setting), "", MS_BIND, "")
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    return Machine(
        sysfs=work / "sysfs",
        efivars=Path(places["efivars"]),
        policy=Path(places["policy"]),
        console=Path(places["console"]),
        core_console=Path(places["core_console"]) if places["core_console"] else None,
        data=work / "data",
        tcti=places["tcti"],
        block=loopblock.LoopBlockLayer(Path(places["disk"])),
        verity=adapters.UserspaceVerity(),
        volumes=FileVolumes(adapters.PlainLayer()),
        controllers=adapters.NoControllers(),
    )


if __name__ == "__main__":
    places = json.loads(Path(sys.argv[1]).read_text())
    machine = prepare(places)

    def with_own_cgroups() -> Machine:
        # The host's cgroup v2 is one tree, mounted by now: a group of our own, beside other sandboxes.
        group = Path("/sys/fs/cgroup", places["cgroup"])
        group.mkdir()
        return dataclasses.replace(machine, cgroup_root=group)

    pid1.run(with_own_cgroups, Console(machine.console))
