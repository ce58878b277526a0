# SPDX-License-Identifier: Apache-2.0
"""The native part: the product boots in the tests' sandbox, from a compiled copy, as it is shipped."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.integration.compartment_kit import unified
from tests.integration.sandbox import Boot, Device, Factory
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request

ROOT: Final = Path(__file__).resolve().parents[2]
CONTROL_SECONDS: Final = 1.0
_SANDBOX: Final = ("adapters.py", "loopblock.py", "sandbox_init.py")
_KIB: Final = 1024


def summary(values: Iterable[float]) -> dict[str, float]:
    """Return median, least and greatest, rounded to what is meaningful."""
    numbers = list(values)
    return {
        "median": round(statistics.median(numbers), 2),
        "min": round(min(numbers), 2),
        "max": round(max(numbers), 2),
    }


def compiled_copy(target: Path) -> Path:
    """Copy the device package and the sandbox to `target` and compile them as an image does."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src/trustme_init", target / "src/trustme_init", ignore=ignore)
    (target / "tests/integration").mkdir(parents=True)
    for name in _SANDBOX:
        shutil.copy(ROOT / "tests/integration" / name, target / "tests/integration")
    (target / "scripts/benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/benchmarks/sandbox_boot.py", target / "scripts/benchmarks")
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", target],
        check=True,
    )
    return target


def first_byte(copy: Path, count: int) -> list[float]:
    """Return milliseconds from before fork and exec until PID 1's modules are imported, `count` times."""
    script = (
        f"import sys, os; sys.path.insert(0, {str(copy / 'src')!r})\n"
        "import trustme_init.boot.pid1\nos.write(1, b'.')\n"
    )
    times = []
    for _ in range(count):
        reader, writer = os.pipe()
        started = time.perf_counter_ns()
        with subprocess.Popen([sys.executable, "-I", "-c", script], stdout=writer, env={}) as process:
            os.close(writer)
            byte = os.read(reader, 1)
            times.append((time.perf_counter_ns() - started) / 1e6)
        os.close(reader)
        if process.returncode != 0 or byte != b".":
            raise RuntimeError("trustme_init.boot.pid1 cannot be imported")
    return times


def boots(directory: Path, copy: Path, count: int) -> dict[str, Any]:
    """Boot one device `count` times after its first boot; return every measure of the native part."""
    factory_directory = directory / "factory"
    factory_directory.mkdir()
    script = copy / "scripts/benchmarks/sandbox_boot.py"
    device = Device(Factory.make(factory_directory), directory / "device")
    device.make_disk()
    device.init = (sys.executable, "-I", script)
    try:
        first = _boot(device)
        runs = [_boot(device, extra=_control if number == 0 else None) for number in range(count)]
    finally:
        _remove_groups(unified() / directory.name)
    return {
        "boots": count,
        "first_boot": first["times"],
        "times_ms": _table([run["times"] for run in runs]),
        "handoff_phases_ms": _table([run["phases"] for run in runs]),
        "cpu_ms": _table([run["cpu"] for run in runs]),
        "pss_mib": _table([run["pss"] for run in runs]),
        "control": runs[0]["extra"],
    }


def _remove_groups(top: Path) -> None:
    """Remove the control groups of the sandboxes, the deepest first."""
    for group in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
        group.rmdir()
    if top.exists():
        top.rmdir()


def _table(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: summary(row[name] for row in rows) for name in rows[0]}


def _boot(device: Device, extra: Callable[[Boot], Any] | None = None) -> dict[str, Any]:
    with device.boot() as boot:
        boot.wait_running()
        init, manager = boot.init_pid() or 0, boot.manager_pid()
        begun = json.loads((device.directory / "work/begun.json").read_text())
        cpu = {
            "pid1": _cpu_ms(init) - begun["cpu_ms"],
            "manager": _cpu_ms(manager),
            "manager_children": _children_cpu_ms(manager),
        }
        memory = pss(init, manager)
        report = boot.report
        more = extra(boot) if extra is not None else None
        boot.ask(Request.REBOOT_DEVICE)
        boot.wait_end()
    times, phases = _times(report, begun["exec_ms"])
    return {"times": times, "phases": phases, "cpu": cpu, "pss": memory, "extra": more}


def _times(report: dict[str, Any], executed: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return stage times and what is derived from them, in milliseconds, from the exec of `/init` on."""
    stages = {stage["name"]: stage for stage in report["stages"]}
    end = {name: stage["started_ms"] + stage["ms"] for name, stage in stages.items()}
    times = {f"stage {name}": float(stage["ms"]) for name, stage in stages.items()}
    times |= {
        "start of PID 1": stages["early"]["started_ms"] - executed,
        "start of the manager": stages["devices"]["started_ms"] - end["early"],
        "first stage line": end["early"] - executed,
        "mode decided": end["mode"] - executed,
        "core exec": end["handoff"] - executed,
        "RUNNING": report["running_ms"] - executed,
    }
    return times, dict(report["handoff"]["phases_ms"])


def _cpu_ms(pid: int) -> float:
    """Return the CPU time of a process without its children (proc(5): schedstat is in nanoseconds)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e6


def _children_cpu_ms(pid: int) -> float:
    """Return the CPU time of a process's ended children, to the kernel's 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) * 1000 / os.sysconf("SC_CLK_TCK")


def pss(init: int, manager: int) -> dict[str, float]:
    """Return the proportional set size of both, MiB, and what the pair would have alone on a machine.

    The benchmark itself maps the same libraries, which makes the kernel's figure too small: for `alone`
    each file's pages are counted once for the pair, as if nobody else had them.
    """
    sizes = {}
    anonymous = 0.0
    files: dict[str, float] = defaultdict(float)
    for name, pid in (("pid1", init), ("manager", manager)):
        rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        sizes[name] = rollup["Pss"] / _KIB
        anonymous += rollup["Pss_Anon"]
        for mapping, size in _file_pages(pid).items():
            files[mapping] = max(files[mapping], size)
    return {**sizes, "both": sum(sizes.values()), "both_alone": (anonymous + sum(files.values())) / _KIB}


def _file_pages(pid: int) -> dict[str, float]:
    """Return KiB of file pages by mapping."""
    found: dict[str, float] = defaultdict(float)
    mapping = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            mapping = " ".join([*rest[1:2], *rest[4:]])
        elif first == "Rss:":
            found[mapping] += int(rest[0])
        elif first == "Anonymous:":
            found[mapping] -= int(rest[0])
    return found


def _fields(lines: Iterable[str]) -> dict[str, int]:
    return {name: int(text.split()[0]) for name, _, text in (line.partition(":") for line in lines)}


def _control(boot: Boot) -> dict[str, float]:
    """Return requests per second; client and manager share the machine's processors."""
    request = Request(command=Request.GET_PROVISIONED)
    with boot.control() as control:
        kept = _rate(lambda: control.request(request))
    return {"one_connection": kept, "connection_each": _rate(lambda: boot.ask(Request.GET_PROVISIONED))}


def _rate(call: Callable[[], object]) -> float:
    count, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < CONTROL_SECONDS:
        call()
        count += 1
    return round(count / took, 1)
