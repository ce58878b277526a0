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
FAIR_CONTROLLER: Final = "cpu"
"""Used where it is offered: a compartment then competes for the processor as one, however many processes it
has; the manager in the root group, whose every process counts for ten such groups, always gets its turn."""
_REMOVE_PATIENCE: Final = 0.001
"""Seconds before rmdir is tried again: the last task's exit is accounted just after cgroup.events says so."""


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


class KernelControllers:
    """The controllers every compartment is under: memory and pids, and cpu where there is one."""

    def enable(self, parent: Path) -> None:
        """Delegate the controllers to the children of `parent`.

        CompartmentRefusal("controller-missing") if the kernel or a version 1 hierarchy keeps one from us.
        """
        try:
            available = (parent / "cgroup.controllers").read_text().split()
            missing = [name for name in REQUIRED_CONTROLLERS if name not in available]
            if not missing:
                enabled = (parent / "cgroup.subtree_control").read_text().split()
                names = [*REQUIRED_CONTROLLERS, *({FAIR_CONTROLLER} & set(available))]
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

    def limit(self, group: Path, *, memory_max: int, pids_max: int) -> None:
        """Set the limits of `group` (bytes, processes); CompartmentRefusal("limit-failed")."""
        target = Cgroup(group)
        try:
            target.write("memory.max", str(memory_max))
            # The whole compartment goes down rather than limping on without one of its processes.
            target.write("memory.oom.group", "1")
            target.write("pids.max", str(pids_max))
            # Absent where the kernel has no swap: then there is nothing to forbid.
            with suppress(FileNotFoundError):
                target.write("memory.swap.max", "0")
        except OSError as exc:
            raise CompartmentRefusal(
                "limit-failed",
                "a resource limit of the compartment cannot be set",
                evidence=f"{exc.filename}: {exc.strerror}",
                remedy="check the kernel's cgroup options",
            ) from exc


def parse_flat(text: str) -> dict[str, int]:
    """Parse a flat keyed control file (lines of "populated 1"); lines of another shape are ignored."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
