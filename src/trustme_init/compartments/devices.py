# SPDX-License-Identifier: Apache-2.0
"""Which device nodes a compartment may open, and which it has: an allow-list, kept by the kernel.

- Everybody may use what is harmless by itself: null, zero, full, random, urandom, tty and its own terminals.
- `allow_dev` of a container's configuration adds devices, `assign_dev` such as no other container then has.
- Nothing may be made (mknod): a node is in /dev because it was put there at the start, or not at all.
- What would be the machine, or every container at once, is refused by name, whoever signed it: memory, ports,
  the kernel log, the TPM, device mapper and loop control, and block devices, which carry all the volumes.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.bpf import DeviceRule, attach

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trustme_init.compartments.spec import CompartmentSpec
    from trustme_init.linux.cgroup import Cgroup
    from trustme_init.machine import Machine
    from trustme_init.proto.container_pb2 import ContainerConfig

# Documentation/admin-guide/devices.txt
_MEMORY: Final = 1
_MISC: Final = 10
HARMLESS: Final = (
    DeviceRule("c", _MEMORY, 3),  # null
    DeviceRule("c", _MEMORY, 5),  # zero
    DeviceRule("c", _MEMORY, 7),  # full
    DeviceRule("c", _MEMORY, 8),  # random
    DeviceRule("c", _MEMORY, 9),  # urandom
    DeviceRule("c", 5, 0),  # tty
    DeviceRule("c", 5, 2),  # ptmx
    DeviceRule("c", 136, None),  # pts/*
)
FORBIDDEN: Final = {
    (_MEMORY, 1): "mem",
    (_MEMORY, 2): "kmem",
    (_MEMORY, 4): "port",
    (_MEMORY, 11): "kmsg",
    (_MISC, 144): "nvram",
    (_MISC, 224): "tpm0",
    (_MISC, 236): "device-mapper",
    (_MISC, 237): "loop-control",
}
FORBIDDEN_NAMES: Final = ("tpm", "mapper/", "mem", "kmem", "port", "kmsg", "nvram", "loop", "dm-")
"""Prefixes of node names, for those whose numbers the kernel gives out as it likes (tpmrm0)."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What a compartment may use besides what is harmless."""

    allowed: tuple[DeviceRule, ...] = ()
    assigned: tuple[DeviceRule, ...] = ()
    """Of these, those that it alone may use."""


def from_container(config: ContainerConfig) -> Devices:
    """Return the devices of a verified configuration; CompartmentRefusal("device-forbidden")."""
    assigned = tuple(rule for text in config.assign_dev for rule in _parsed(text))
    return Devices((*(rule for text in config.allow_dev for rule in _parsed(text)), *assigned), assigned)


def _parsed(text: str) -> Iterator[DeviceRule]:
    kind, numbers, access = text.split()
    major, minor = (None if number == "*" else int(number) for number in numbers.split(":"))
    rule = DeviceRule(kind, major, minor, "".join(letter for letter in "rw" if letter in access))
    wide = kind != "c" or major is None or (major in (_MEMORY, _MISC) and minor is None)
    if wide or (major, minor) in FORBIDDEN or (_name(rule) or "").startswith(FORBIDDEN_NAMES):
        raise CompartmentRefusal(
            "device-forbidden",
            "a container cannot have this device",
            evidence=text,
            remedy="name character devices, one by one or by their major number, that serve one container",
        )
    if rule.access:
        yield rule


def restrict(group: Cgroup, spec: CompartmentSpec) -> None:
    """Put a compartment's group under its list; CompartmentRefusal("device-filter-missing")."""
    rules = [*HARMLESS, *spec.devices.allowed]
    if spec.console is not None:
        number = spec.console.stat().st_rdev
        rules.append(DeviceRule("c", os.major(number), os.minor(number)))
    directory = os.open(group.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        attach(directory, rules)
    except OSError as exc:
        raise CompartmentRefusal(
            "device-filter-missing",
            "the kernel does not keep a list of devices for the compartment",
            evidence=f"{exc.filename}: {exc.strerror}",
            remedy="use a kernel with CONFIG_CGROUP_BPF",
        ) from exc
    finally:
        os.close(directory)


def check_exclusive(spec: CompartmentSpec, machine: Machine) -> None:
    """CompartmentRefusal("device-assigned") if a device is another's alone, or to be ours and another has it.

    What the others have is on record beside their state.
    """
    mine, alone = spec.devices.allowed, spec.devices.assigned
    if not mine:
        return
    for path in machine.compartments.glob("*/state.json"):
        if path.parent.name == spec.uuid:
            continue
        theirs = _recorded(path, "devices"), _recorded(path, "assigned_devices")
        for rule, other in [(rule, other) for rule in mine for other in theirs[1]] + [
            (rule, other) for rule in alone for other in theirs[0]
        ]:
            if _overlap(rule, other):
                raise CompartmentRefusal(
                    "device-assigned",
                    "a device of the container is in use by another one, which does not share it",
                    evidence=f"{rule.kind} {rule.major}:{rule.minor}, container {path.parent.name}",
                    remedy="stop the other container, or use allow_dev in both",
                )


def on_record(spec: CompartmentSpec) -> dict[str, list[DeviceRule]]:
    """Return what `check_exclusive` wants to find in a compartment's record."""
    return {"devices": list(spec.devices.allowed), "assigned_devices": list(spec.devices.assigned)}


def _recorded(path: Path, key: str) -> list[DeviceRule]:
    import json

    with suppress(OSError, ValueError, TypeError):
        return [DeviceRule(*entry) for entry in json.loads(path.read_bytes()).get(key, ())]
    return []


def _overlap(one: DeviceRule, other: DeviceRule) -> bool:
    return one.kind == other.kind and all(
        None in pair or pair[0] == pair[1] for pair in ((one.major, other.major), (one.minor, other.minor))
    )


def nodes(rules: Iterable[DeviceRule]) -> dict[str, int]:
    """Return name below /dev and number of the devices that are there and that a rule names one by one."""
    found = {}
    for rule in rules:
        if rule.major is not None and rule.minor is not None:
            name = _name(rule)
            if name is not None:
                found[name] = os.makedev(rule.major, rule.minor)
    return found


def make_nodes(directory: int, wanted: dict[str, int], owner: int) -> None:
    """Make nodes in an open directory, for root of the compartment alone."""
    for name, number in wanted.items():
        for parent in reversed(Path(name).parents[:-1]):
            with suppress(FileExistsError):
                os.mkdir(parent, 0o755, dir_fd=directory)
        os.mknod(name, stat.S_IFCHR | 0o600, number, dir_fd=directory)
        os.chown(name, owner, owner, dir_fd=directory)


def _name(rule: DeviceRule) -> str | None:
    """Return the kernel's name of a device that is there."""
    try:
        text = Path(f"/sys/dev/char/{rule.major}:{rule.minor}/uevent").read_text()
    except OSError:
        return None
    names = [line.removeprefix("DEVNAME=") for line in text.splitlines() if line.startswith("DEVNAME=")]
    return names[0] if names and ".." not in names[0].split("/") else None
