# SPDX-License-Identifier: Apache-2.0
"""What the boot says: stage lines, the log that GET_LAST_LOG returns, and the failure screen.

Written, never read: there is no prompt, no shell and no tty input anywhere on the boot path.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trustme_init.errors import Refusal

PREFIX: Final = "trustme: "
REBOOT_DELAY: Final = 10
"""Seconds a failure screen stays before the device reboots."""
PATIENCE: Final = 0.2
"""Seconds that a line waits for a slow console; one that is stopped (XOFF) must not stop the boot."""
LOG_LIMIT: Final = 1024 * 1024
"""Bytes after which the log file is started anew (one old generation is kept): it lives in memory."""


def printable(text: str) -> str:
    """Return `text` on one line with every control and escape character made visible."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def boottime_ms() -> float:
    """Milliseconds since the kernel started (CLOCK_BOOTTIME)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) / 1e6


class Console:
    """One line at a time to the console device and, once `/run` is there, to a log file."""

    def __init__(self, device: Path) -> None:
        self._device = device
        self._log: Path | None = None

    def log_to(self, path: Path) -> None:
        """Keep a copy of every further line in `path`, mode 0600."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log = path

    def line(self, text: str) -> None:
        """Show and log one line. A console that cannot be written never stops the boot."""
        data = f"{PREFIX}{printable(text)}\n".encode()
        self._write(self._device, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK, data)
        self.note(text)

    def note(self, text: str) -> None:
        """Log one line without showing it."""
        if self._log is None:
            return
        data = f"{boottime_ms():.0f} {printable(text)}\n".encode()
        try:
            # Asked each time: PID 1 and manager write to the same file, and a client may have emptied it.
            if self._log.stat().st_size + len(data) > LOG_LIMIT:
                self._log.rename(self._log.with_suffix(".old.log"))
        except OSError:
            pass  # there is none yet, or no way to make room: a log never stops the boot
        self._write(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, data)

    def trace(self, exc: BaseException) -> str:
        """Log the traceback of what nobody expected; return it in one line, with where it happened."""
        import traceback  # late: a boot that goes well needs it nowhere

        for entry in traceback.format_exception(exc):
            for text in entry.rstrip().splitlines():
                self.note(text)
        where = traceback.extract_tb(exc.__traceback__)[-1]
        return f"{type(exc).__name__}: {exc} at {where.name}:{where.lineno}"

    def refusal(self, stage: str, refusal: Refusal) -> None:
        """Show the failure screen: what, on which evidence, and the remedy."""
        self.line(f"REFUSED stage={stage} code={refusal.code}")
        self.line(f"what: {refusal.cause}")
        if refusal.evidence:
            self.line(f"evidence: {refusal.evidence}")
        if refusal.remedy:
            self.line(f"remedy: {refusal.remedy}")
        self.line(f"rebooting in {REBOOT_DELAY} s")

    @staticmethod
    def _write(path: Path, flags: int, data: bytes) -> None:
        try:
            fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except OSError:
            return
        try:
            deadline = time.monotonic() + PATIENCE
            while data:
                try:
                    data = data[os.write(fd, data) :]
                except BlockingIOError:
                    if not _has_room(fd, deadline - time.monotonic()):
                        return
        except OSError:
            pass
        finally:
            os.close(fd)


def _has_room(fd: int, seconds: float) -> bool:
    """Wait until `fd` takes more; False when the time is up, or there never will be a reader."""
    import select  # late: a console that keeps up needs it nowhere

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return seconds > 0 and any(events == select.POLLOUT for _, events in poll.poll(seconds * 1000))
