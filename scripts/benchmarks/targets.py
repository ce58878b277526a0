# SPDX-License-Identifier: Apache-2.0
"""The targets of issue 2, and the table that holds them against what was reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

MIB: Final = 1024 * 1024


class Target(NamedTuple):
    """One line of the table; `find` takes the figure from the results, KeyError if it was not measured."""

    name: str
    limit: float
    unit: str
    find: Callable[[Mapping[str, Any]], float]


def _time(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda results: float(results["native"]["times_ms"][name]["median"])


def _growth(results: Mapping[str, Any]) -> float:
    """Return how much longer the largest image takes to be put under dm-verity than the smallest, ms."""
    first, *_, last = results["verified_start"]["runs"]
    return float(last["images_ms"] - first["images_ms"])


TARGETS: Final = (
    Target("PID 1's modules imported, after fork and exec", 25, "ms", lambda r: r["first_byte_ms"]["median"]),
    Target("first stage line, after exec", 25, "ms", _time("first stage line")),
    Target("mode decided", 80, "ms", _time("mode decided")),
    Target("core exec", 450, "ms", _time("core exec")),
    Target("PID 1 + manager, PSS", 60, "MiB", lambda r: r["native"]["pss_mib"]["both_alone"]["median"]),
    Target("UKI", 64, "MiB", lambda r: r["sizes"]["uki"] / MIB),
    Target("verified start, largest against smallest image", 50, "ms more", _growth),
)


def judge(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each target what was reached; `reached` is None where it was not measured."""
    verdicts = []
    for target in TARGETS:
        try:
            reached = round(target.find(results), 1)
        except KeyError:
            reached = None
        met = None if reached is None else reached <= target.limit
        verdicts.append(
            {"name": target.name, "target": target.limit, "unit": target.unit, "reached": reached, "met": met}
        )
    return verdicts


def render(results: Mapping[str, Any]) -> str:
    """Return everything a person wants to see at the end of a run."""
    lines = ["", f"{'target':<50}{'limit':>8}{'reached':>10}"]
    for verdict in results["targets"]:
        words = {True: "", False: "  MISSED", None: "  not measured"}[verdict["met"]]
        reached = "-" if verdict["reached"] is None else f"{verdict['reached']:g}"
        lines.append(f"{verdict['name']:<50}{verdict['target']:>8g}{reached:>10} {verdict['unit']}{words}")
    if native := results.get("native"):
        lines += _native(native)
    if imports := results.get("imports"):
        lines += ["", f"{'first imported in':<24}{'modules':>8}{'ms':>8}  dearest"]
        for part, cost in imports.items():
            dearest = ", ".join(f"{name} {ms:g}" for name, ms in list(cost["dearest_ms"].items())[:3])
            lines.append(f"{part:<24}{cost['modules']:>8}{cost['ms']:>8.1f}  {dearest}")
    if provisioning := results.get("provisioning"):
        lines += ["", f"{'provisioning':<42}{'TPM commands':>14}{'swtpm, s':>10}{'chip, s':>10}"]
        lines += [
            f"  {step['name']:<40}{step['commands']:>14}{step['swtpm_s']:>10.3f}{step['chip_s']:>10.2f}"
            for step in provisioning["steps"]
        ]
    if machine := results.get("machine"):
        lines += ["", f"virtual machine ({machine['accelerator']}), ms from the kernel's start"]
        lines += [f"  {name:<22}{ms:>10.0f}" for name, ms in machine["times_ms"].items()]
    if start := results.get("verified_start"):
        lines += ["", "verified start, by size of the core image"]
        lines += [
            f"  {run['mib']:>5} MiB: images {run['images_ms']:.0f} ms, hand-off {run['handoff_ms']:.0f} ms"
            for run in start["runs"]
        ]
    lines += [f"skipped: {text}" for text in results["skipped"]]
    return "\n".join(lines)


def _native(native: Mapping[str, Any]) -> Iterable[str]:
    for title, key in (
        (f"native boot, ms from the exec of PID 1 ({native['boots']} boots)", "times_ms"),
        ("hand-off, ms", "handoff_phases_ms"),
        ("CPU until RUNNING, ms", "cpu_ms"),
        ("memory, MiB", "pss_mib"),
    ):
        yield ""
        yield f"{title:<50}{'median':>8}{'min':>8}{'max':>8}"
        for name, entry in native[key].items():
            yield f"  {name:<48}{entry['median']:>8.1f}{entry['min']:>8.1f}{entry['max']:>8.1f}"
    control = native["control"]
    yield ""
    yield (
        f"control round trips/s: {control['one_connection']:.0f}, "
        f"with a connection each {control['connection_each']:.0f}"
    )
