# SPDX-License-Identifier: Apache-2.0
"""Installing GuestOSes: the manager's part, which moves requests, processes and time, and reads no content.

    push → the vault judges it → (its turn) → the vault stages it → one process fetches → another one checks
         → the vault publishes it → what is obsolete is removed

- One installation at a time; a few wait. The same GuestOS pushed twice is one, with two listeners.
- Whoever pushed may leave: an installation goes on without, unless it lives on what the client sends.
- A process that reports nothing for STALL_TIME is ended. What was fetched stays, for the next push to go on
  with; what turned out to be wrong does not.
"""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trustme_init.control.installing import (
    GuestOsImage,
    GuestOsPush,
    Heard,
    InstallCompleted,
    InstallEvent,
    InstallFailed,
    InstallProgress,
    InstallStarted,
    InstallWaiting,
)
from trustme_init.control.state import Answered
from trustme_init.errors import ControlRefusal, DeviceRefusal, Refusal
from trustme_init.guestos import worker
from trustme_init.guestos.pieces import NAME_LIMIT, PIECE_LIMIT, Piece
from trustme_init.guestos.plan import DEFAULT_BASE_URL, Plan
from trustme_init.guestos.sources import pid_of
from trustme_init.guestos.store import DIRECTORY, IMAGES, STAGING
from trustme_init.provisioning.vault import Scheduler
from trustme_init.trust.selection import GuestOsId

QUEUE_LIMIT: Final = 8
"""Installations that wait for their turn; each holds a configuration of at most 256 KiB."""
STALL_TIME: Final = 120.0
"""Seconds: longer than any wait that the fetcher itself ends (`guestos.download`)."""

NOT_JUDGED: Final = frozenset({"installer-ended", "installation-stalled", "installation-failed"})
"""What becomes of a check that says nothing about the images."""

AskVault = Callable[[str, Mapping[str, str | bytes], Answered], None]


@dataclass(frozen=True, slots=True)
class Places:
    """What installations need to know of the device."""

    home: Path
    """`/data/cml`."""
    anchors: Path
    """PEM: authorities of download servers."""
    development: bool


@dataclass(slots=True)
class _Installation:
    """One push on its way."""

    push: GuestOsPush
    caller: int
    stem: str
    config_sha256: str
    listeners: list[Heard]
    plan: Plan | None = None
    phase: str = ""
    started: InstallStarted | None = None
    piece_done: Callable[[Refusal | None], None] | None = None
    closed: bool = field(default=False)

    def tell(self, event: InstallEvent) -> None:
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self.caller)


class Installations:
    """See the module. Belongs to the thread of the loop; implements `control.state.Installing`."""

    def __init__(
        self,
        scheduler: Scheduler,
        ask: AskVault,
        places: Places,
        running: Callable[[], Iterable[GuestOsId]],
    ) -> None:
        self._scheduler = scheduler
        self._ask = ask
        self._places = places
        self._running = running
        self._queue: deque[_Installation] = deque()
        self._current: _Installation | None = None
        self._worker: _Watched | None = None

    # What the control handlers ask for

    def push(self, push: GuestOsPush, caller: int, heard: Heard) -> None:
        """Install a GuestOS; `heard` is told of its beginning, and later of its end. Takes `caller` over."""

        def examined(result: Mapping[str, Any], refusal: Refusal | None) -> None:
            if refusal is None:
                refusal = self._admit(push, caller, heard, result["stem"], result["config_sha256"])
            if refusal is not None:
                os.close(caller)
                heard(InstallFailed(refusal))

        self._ask("guestos-examine", _triple(push), examined)

    def piece(self, stem: str, piece: Piece, caller: int, done: Callable[[Refusal | None], None]) -> None:
        """Hand a part of an image on to the installation that waits for it, from the process that pushed."""
        current = self._current
        if (
            current is None
            or current.stem != stem
            or not current.push.streamed
            or current.phase != "fetch"
            or current.piece_done is not None
            or pid_of(current.caller) != pid_of(caller)
            or self._worker is None
            or len(piece.data) > PIECE_LIMIT
            or len(piece.name.encode()) > NAME_LIMIT
        ):
            done(
                ControlRefusal(
                    "image-piece-unfit",
                    "no installation waits for this part of an image",
                    evidence=f"{stem}: {piece.name!a:.100}, {len(piece.data)} bytes",
                    remedy="push the GuestOS first, streamed, and send one piece after the other",
                )
            )
            return
        current.piece_done = done
        self._worker.send(piece.encoded())

    def remove(self, name: str, done: Answered) -> None:
        """Remove a GuestOS that is not in use, nor being installed."""
        installing = [each.stem for each in self._all() if each.stem.rpartition("-")[0] == name]
        if installing:
            done(
                {},
                ControlRefusal(
                    "guestos-in-use",
                    "this GuestOS is being installed",
                    evidence=", ".join(installing),
                    remedy="wait until its installation has ended",
                ),
            )
            return
        self._ask("guestos-remove", {"name": name, "running": self._running_text()}, done)

    def tidy(self) -> None:
        """Remove what interrupted changes left and nobody needs; also after each installation."""
        if self._current is None:
            self._ask("guestos-tidy", {"running": self._running_text()}, lambda _result, _refusal: None)

    def close(self) -> None:
        """End what is under way. The disk is in a state that the next start goes on from."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None
        for each in self._all():
            each.close()
        self._queue.clear()
        self._current = None

    def _all(self) -> list[_Installation]:
        return [*filter(None, [self._current]), *self._queue]

    def _running_text(self) -> str:
        return "\n".join(each.stem for each in self._running())

    def _admit(
        self,
        push: GuestOsPush,
        caller: int,
        heard: Heard,
        stem: str,
        config_sha256: str,
    ) -> Refusal | None:
        """Begin, or line up; a refusal if there are too many."""
        for each in self._all():
            if (each.stem, each.config_sha256) == (stem, config_sha256):
                os.close(caller)
                each.listeners.append(heard)
                heard(each.started or InstallWaiting())
                return None
        if len(self._queue) >= QUEUE_LIMIT:
            return ControlRefusal(
                "installations-busy",
                f"{QUEUE_LIMIT} installations are waiting already",
                evidence=stem,
                remedy="wait until one has ended",
            )
        new = _Installation(push, caller, stem, config_sha256, [heard])
        if self._current is not None:
            heard(InstallWaiting())
        self._queue.append(new)
        self._next()
        return None

    def _next(self) -> None:
        if self._current is None and self._queue:
            self._current = self._queue.popleft()
            self._stage(self._current, repair=False)

    # The steps

    def _stage(self, current: _Installation, *, repair: bool) -> None:
        def staged(result: Mapping[str, Any], refusal: Refusal | None) -> None:
            if refusal is not None:
                self._finish(current, refusal)
                return
            current.plan = Plan.from_dict(result)
            if result["installed"]:
                current.started = InstallStarted(current.stem, ())
                current.tell(current.started)
                self._check(current, self._places.home / DIRECTORY / current.stem, installed=True)
            else:
                self._fetch(current, current.plan)

        arguments = {**_triple(current.push), "repair": "yes" if repair else ""}
        self._ask("guestos-stage", arguments, staged)

    def _fetch(self, current: _Installation, plan: Plan) -> None:
        images = self._places.home / DIRECTORY / f"{STAGING}{plan.stem}" / IMAGES
        url = "" if current.push.streamed else plan.base_url or DEFAULT_BASE_URL
        job = worker.Fetch(plan, images, url, self._places.anchors, self._places.development)
        caller = current.caller
        started = InstallStarted(current.stem, _present(plan, images))
        if self._begin(current, "fetch", lambda: worker.fetcher(job, caller), keep=caller) and (
            current.started is None
        ):
            current.started = started
            current.tell(started)

    def _check(self, current: _Installation, folder: Path, *, installed: bool) -> None:
        plan = current.plan
        if plan is not None:
            self._begin(
                current, "check-installed" if installed else "check", lambda: worker.checker(plan, folder)
            )

    def _begin(
        self, current: _Installation, phase: str, prepare: Callable[[], worker.Work], keep: int = -1
    ) -> bool:
        current.phase = phase
        try:
            started = worker.spawn(prepare, keep=keep)
        except OSError as exc:
            self._finish(current, _ended(phase, str(exc.strerror)))
            return False
        self._worker = _Watched(
            self._scheduler,
            started,
            lambda message: self._heard(current, message),
            lambda refusal: self._worker_ended(current, refusal),
        )
        return True

    def _heard(self, current: _Installation, message: Mapping[str, Any]) -> None:
        if "taken" in message:
            self._piece_done(current, None)
        elif "progress" in message:
            said = message["progress"]
            current.tell(InstallProgress(current.stem, current.phase.partition("-")[0], **said))

    def _worker_ended(self, current: _Installation, refusal: Refusal | None) -> None:
        self._worker = None
        self._piece_done(current, refusal)
        plan = current.plan
        if plan is None:
            return
        match current.phase:
            case "fetch" if refusal is None:
                self._check(
                    current, self._places.home / DIRECTORY / f"{STAGING}{plan.stem}" / IMAGES, installed=False
                )
            case "check" if refusal is None:
                self._ask(
                    "guestos-publish", {"stem": plan.stem}, lambda _result, said: self._finish(current, said)
                )
            case "check" if refusal is not None and refusal.code not in NOT_JUDGED:
                # Nothing of it is worth going on with.
                wrong = refusal
                self._ask(
                    "guestos-discard",
                    {"stem": plan.stem},
                    lambda _result, _said: self._finish(current, wrong),
                )
            case "check-installed" if refusal is not None:
                self._stage(current, repair=True)
            case _:
                self._finish(current, refusal)

    def _piece_done(self, current: _Installation, refusal: Refusal | None) -> None:
        done, current.piece_done = current.piece_done, None
        if done is not None:
            done(refusal)

    def _finish(self, current: _Installation, refusal: Refusal | None) -> None:
        current.close()
        self._current = None
        current.tell(InstallCompleted(current.stem) if refusal is None else InstallFailed(refusal))
        if refusal is None:
            self.tidy()
        self._next()


class _Watched:
    """A worker that the loop listens to, and ends when it has nothing to say for too long."""

    def __init__(
        self,
        scheduler: Scheduler,
        started: worker.Worker,
        heard: Callable[[Mapping[str, Any]], None],
        ended: Callable[[Refusal | None], None],
    ) -> None:
        self._scheduler = scheduler
        self._worker = started
        self._heard = heard
        self._ended = ended
        self._last: Refusal | None = _ended("worker", "it ended without a last word")
        self._timer = scheduler.call_later(STALL_TIME, self._stalled)
        scheduler.add_reader(started.connection.fileno(), self._readable)

    def send(self, message: bytes) -> None:
        """Pass a message on. One is under way at most, and it fits the buffer: this never waits."""
        with suppress(OSError):  # then it has ended, and that is heard
            self._worker.connection.send(message)

    def end(self) -> None:
        """Kill the worker and have nothing more to do with it."""
        self._timer.cancel()
        self._kill()
        self._scheduler.remove_reader(self._worker.connection.fileno())
        self._worker.connection.close()
        pid, pidfd = self._worker.pid, self._worker.pidfd

        def reap() -> None:
            self._scheduler.remove_reader(pidfd)
            os.close(pidfd)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

        # Inside a file system of the caller's making a process may take its time to die.
        self._scheduler.add_reader(pidfd, reap)

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._worker.pidfd, signal.SIGKILL)

    def _stalled(self) -> None:
        self._last = DeviceRefusal(
            "installation-stalled",
            "the installation did not get on any more",
            evidence=f"nothing for {STALL_TIME:.0f} s",
            remedy="look at where the images come from, and push the GuestOS again: what was fetched stays",
        )
        self._over()

    def _readable(self) -> None:
        try:
            data = self._worker.connection.recv(worker.MESSAGE_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            message = json.loads(data) if data else {}
            if "refusal" in message:
                said = message["refusal"]
                self._last = Refusal(
                    said["code"], said["cause"], evidence=said["evidence"], remedy=said["remedy"]
                )
            elif "done" in message:
                self._last = None
            elif message:
                self._timer.cancel()
                self._timer = self._scheduler.call_later(STALL_TIME, self._stalled)
                self._heard(message)
                return
        except (ValueError, KeyError, TypeError) as exc:
            self._last = _ended("worker", f"its words make no sense: {type(exc).__name__}")
        self._over()

    def _over(self) -> None:
        self.end()
        self._ended(self._last)


def _present(plan: Plan, images: Path) -> tuple[GuestOsImage, ...]:
    found = []
    for file in plan.files:
        have = 0
        with suppress(OSError):
            have = min((images / file.name).lstat().st_size, file.size)
        found.append(GuestOsImage(file.name, file.size, have))
    return tuple(found)


def _triple(push: GuestOsPush) -> dict[str, str | bytes]:
    return {"config": push.config, "signature": push.signature, "certificate": push.certificate}


def _ended(phase: str, evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "installer-ended",
        "the process that installs has ended",
        evidence=f"{phase}: {evidence}",
        remedy="push the GuestOS again: what was fetched stays",
    )
