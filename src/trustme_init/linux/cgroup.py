# SPDX-License-Identifier: Apache-2.0
"""Control groups, version 2 only (Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trustme_init.errors import CompartmentRefusal

REQUIRED_CONTROLLERS: Final = ("memory", "pids")
OPTIONAL_CONTROLLERS: Final = ("cpu", "cpuset", "io")
"""Used where they are offered. With cpu a compartment competes for the processor as one, however many
processes it has; the manager in the root group, whose every process counts for ten such groups, always gets
its turn. With io it likewise competes for the disk as one, where the disk's scheduler knows weights, and what
it writes is charged to it; with cpuset it can be kept to some of the processors."""
SUBTREE_GROUPS: Final = 64
SUBTREE_DEPTH: Final = 8
"""What a compartment may make below its own group: each group costs kernel memory and walks over the tree."""
_DELEGATED: Final = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")
"""The files that a delegatee needs (cgroup-v2.rst, "Model of Delegation"); limits are not among them."""
_CPU_PERIOD: Final = 100_000
"""Microseconds, the kernel's default."""
_REMOVE_PATIENCE: Final = 0.001
"""Seconds before rmdir is tried again: the last task's exit is accounted just after cgroup.events says so."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a compartment may use."""

    memory_max: int
    """Bytes."""
    pids_max: int
    """Processes and threads."""
    cpus: str = ""
    """Processors as a list ("0-1,3"), empty for all."""
    cpu_percent: int = 0
    """Of one processor, so 150 is one and a half; 0 for no limit but fairness."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One group; the directory need not exist yet. Every method raises OSError naming the file."""

    path: Path

    def create(self) -> None:
        """Make the directory; an existing empty group is taken over."""
        self.path.mkdir(mode=0o755, exist_ok=True)

    def child(self, name: str) -> Cgroup:
        """Return the group of that name below this one."""
        return Cgroup(self.path / name)

    def add(self, pid: int) -> None:
        """Move a process (all its threads) into the group."""
        self.write("cgroup.procs", str(pid))

    def pids(self) -> tuple[int, ...]:
        """Return the processes in the group itself, not below it, in the caller's PID namespace."""
        return tuple(map(int, (self.path / "cgroup.procs").read_text().split()))

    def contains(self, pid: int) -> bool:
        """Whether a process is in this group or below it."""
        with suppress(OSError):
            for directory in (self.path, *(item for item in self.path.rglob("*") if item.is_dir())):
                if pid in Cgroup(directory).pids():
                    return True
        return False

    def events(self) -> dict[str, int]:
        """Return cgroup.events: "populated" and "frozen"."""
        return parse_flat((self.path / "cgroup.events").read_text())

    @property
    def populated(self) -> bool:
        """Whether a process lives in the group or below it."""
        return bool(self.events().get("populated"))

    def freeze(self, *, frozen: bool) -> None:
        """Begin to stop, or to continue, every process in the group and below; see `EventsWatch`."""
        self.write("cgroup.freeze", str(int(frozen)))

    def delegate(self, owner: int) -> None:
        """Let user `owner` make groups below this one and move its processes between them, within bounds.

        The limits of this group itself stay out of its reach: their files remain ours.
        """
        self.write("cgroup.max.descendants", str(SUBTREE_GROUPS))
        self.write("cgroup.max.depth", str(SUBTREE_DEPTH))
        for place in (self.path, *(self.path / name for name in _DELEGATED)):
            os.chown(place, owner, owner)

    def kill(self) -> None:
        """Send SIGKILL to every process in the group and below, forks that race with it included."""
        self.write("cgroup.kill", "1")

    def wait_empty(self, timeout: float) -> bool:
        """Wait until no process is left, at most `timeout` seconds; return whether that is so."""
        deadline = time.monotonic() + timeout
        fd = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            while True:
                os.lseek(fd, 0, os.SEEK_SET)
                if not parse_flat(os.read(fd, 4096).decode()).get("populated"):
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
        finally:
            os.close(fd)

    def remove(self, *, timeout: float = 1.0) -> None:
        """Remove the empty group and empty groups below it; nothing happens if it does not exist."""
        deadline = time.monotonic() + timeout
        for directory in sorted(self._directories(), key=lambda item: len(item.parts), reverse=True):
            while True:
                try:
                    directory.rmdir()
                except FileNotFoundError:
                    break
                except OSError as exc:
                    if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
                    time.sleep(_REMOVE_PATIENCE)
                else:
                    break

    def _directories(self) -> Iterable[Path]:
        return [self.path, *(item for item in self.path.rglob("*") if item.is_dir())]

    def write(self, name: str, value: str) -> None:
        """Write one control file."""
        fd = os.open(self.path / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, str(self.path / name)) from exc
        finally:
            os.close(fd)


class EventsWatch:
    """Changes of a group's cgroup.events, for a loop: `fileno` is readable when there was one.

    The file itself says so only as an exceptional condition, which selectors do not wait for; an epoll
    descriptor that does is readable in its stead.
    """

    def __init__(self, group: Cgroup) -> None:
        self._file = os.open(group.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._file, select.EPOLLPRI)

    def fileno(self) -> int:
        """Return what to watch."""
        return self._epoll.fileno()

    def read(self) -> dict[str, int]:
        """Return the present events, and wait for the next change from here on."""
        return parse_flat(os.pread(self._file, 4096, 0).decode())

    def close(self) -> None:
        """Give the descriptors up; stop watching `fileno` before."""
        self._epoll.close()
        os.close(self._file)


class KernelControllers:
    """The controllers every compartment is under: memory and pids, and others where they are offered."""

    def enable(self, parent: Path) -> None:
        """Delegate the controllers to the children of `parent`.

        CompartmentRefusal("controller-missing") if the kernel or a version 1 hierarchy keeps one from us.
        """
        try:
            available = (parent / "cgroup.controllers").read_text().split()
            missing = [name for name in REQUIRED_CONTROLLERS if name not in available]
            if not missing:
                enabled = (parent / "cgroup.subtree_control").read_text().split()
                names = [*REQUIRED_CONTROLLERS, *(name for name in OPTIONAL_CONTROLLERS if name in available)]
                wanted = [f"+{name}" for name in names if name not in enabled]
                if wanted:
                    Cgroup(parent).write("cgroup.subtree_control", " ".join(wanted))
        except OSError as exc:
            raise CompartmentRefusal(
                "controller-missing",
                "the cgroup controllers cannot be delegated",
                evidence=f"{exc.filename}: {exc.strerror}",
                remedy="mount cgroup2 alone, with no process in the groups above the compartments",
            ) from exc
        if missing:
            raise CompartmentRefusal(
                "controller-missing",
                "the kernel does not offer a cgroup controller that limits compartments",
                evidence=f"{parent}: missing {', '.join(missing)}, offered: {' '.join(available) or 'none'}",
                remedy="use a kernel with these controllers, and no cgroup version 1 hierarchy for them",
            )

    def limit(self, group: Path, limits: Limits) -> None:
        """Set the limits of `group`; CompartmentRefusal("limit-failed", "controller-missing")."""
        target = Cgroup(group)
        try:
            target.write("memory.max", str(limits.memory_max))
            # The whole compartment goes down rather than limping on without one of its processes.
            target.write("memory.oom.group", "1")
            target.write("pids.max", str(limits.pids_max))
            # Absent where the kernel has no swap: then there is nothing to forbid.
            with suppress(FileNotFoundError):
                target.write("memory.swap.max", "0")
            if limits.cpu_percent:
                _write_optional(target, "cpu.max", f"{limits.cpu_percent * _CPU_PERIOD // 100} {_CPU_PERIOD}")
            if limits.cpus:
                _write_optional(target, "cpuset.cpus", limits.cpus)
        except OSError as exc:
            raise CompartmentRefusal(
                "limit-failed",
                "a resource limit of the compartment cannot be set",
                evidence=f"{exc.filename}: {exc.strerror}",
                remedy="check the limits in its configuration, and the kernel's cgroup options",
            ) from exc


def _write_optional(target: Cgroup, name: str, value: str) -> None:
    try:
        target.write(name, value)
    except FileNotFoundError as exc:
        raise CompartmentRefusal(
            "controller-missing",
            "the configuration asks for a limit that this kernel cannot keep",
            evidence=f"{name}: no such controller",
            remedy=f"use a kernel with the {name.partition('.')[0]} controller, or take the limit out",
        ) from exc


def parse_flat(text: str) -> dict[str, int]:
    """Parse a flat keyed control file (lines of "populated 1"); lines of another shape are ignored."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
