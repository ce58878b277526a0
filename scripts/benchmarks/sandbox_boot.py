# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the benchmark's sandbox: prepares as the tests' one does, then starts again as a device would.

Called with the JSON file of places it mounts what a booted kernel offers and executes itself anew, so that
nothing is imported yet when the product's PID 1 begins: from that exec on, times are those of `/init`.
"""

import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - before the first import that costs
sys.path[:0] = [f"{ROOT}/src", ROOT]


def prepare(settings: str) -> None:
    """Mount, note the time and the CPU used so far, and execute the second half."""
    import json
    from pathlib import Path

    from tests.integration import sandbox_init

    places = json.loads(Path(settings).read_text())
    sandbox_init.prepare(places)
    os.environ.clear()  # a kernel gives its first process next to nothing
    begun = {
        "exec_ms": time.clock_gettime_ns(time.CLOCK_BOOTTIME) / 1e6,
        "cpu_ms": time.process_time_ns() / 1e6,
    }
    Path(places["work"], "begun.json").write_text(json.dumps(begun))
    os.execv(sys.executable, [sys.executable, "-I", __file__, settings, "boot"])  # noqa: S606 - no shell is wanted


def boot(settings: str) -> None:
    """Be `/init`: everything but PID 1's own modules is imported after its first line."""
    from trustme_init.boot import pid1
    from trustme_init.boot.console import Console

    # The console is the one place that is needed before the machine is known.
    console = os.path.join(os.path.dirname(settings), "console")  # noqa: PTH118, PTH120 - as above

    def machine() -> object:
        import json
        from pathlib import Path

        from tests.integration import adapters, loopblock
        from trustme_init.linux.loop import attach
        from trustme_init.machine import Machine

        class Unverified:
            """Attaches both loop devices as the product does; the device mapper is missing here."""

            def open(self, name: str, data_fd: int, hash_fd: int, parameters: object) -> object:
                del name
                self.hashes = attach(hash_fd)
                return adapters.UserspaceVerityDevice(attach(data_fd, size=parameters.data_size))  # type: ignore[attr-defined]  # VerityParameters, not imported for a name

        places = json.loads(Path(settings).read_text())
        work = Path(places["work"])
        # The host's cgroups are one tree: a group of our own keeps out of the way of tests beside us.
        group = Path("/sys/fs/cgroup", work.parents[1].name)
        group.mkdir(exist_ok=True)
        return Machine(
            cgroup_root=group,
            sysfs=work / "sysfs",
            efivars=Path(places["efivars"]),
            policy=Path(places["policy"]),
            console=Path(places["console"]),
            core_console=None,
            data=work / "data",
            tcti=places["tcti"],
            block=loopblock.LoopBlockLayer(Path(places["disk"])),
            verity=Unverified(),  # type: ignore[arg-type]  # see open
            controllers=adapters.NoControllers(),
        )

    pid1.run(machine, Console(pid1.Path(console)))  # type: ignore[arg-type,attr-defined]  # Machine, imported late


if __name__ == "__main__":
    (boot if len(sys.argv) > 2 else prepare)(sys.argv[1])
