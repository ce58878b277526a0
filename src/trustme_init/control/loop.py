# SPDX-License-Identifier: Apache-2.0
"""The manager's event loop: descriptors, deadlines and signals in one thread, without asyncio's import cost.

Callbacks are short and never block. An exception from a callback leaves `run`: whoever registers a callback
that handles foreign bytes catches its own failures (control.transport does).
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

Callback = Callable[[], None]

LONGEST_WAIT: Final = 3600.0
"""Upper bound of one wait in seconds; epoll takes milliseconds in an int."""


class Timer:
    """One pending `call_later`; `when` is on CLOCK_MONOTONIC, in seconds."""

    __slots__ = ("_callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self._callback: Callback | None = callback

    @property
    def active(self) -> bool:
        """Whether it is still going to run."""
        return self._callback is not None

    def cancel(self) -> None:
        """Never run it. Harmless when it already ran."""
        self._callback = None

    def fire(self) -> None:
        """Run it once, unless cancelled."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class _Watch:
    __slots__ = ("reader", "writer")

    def __init__(self) -> None:
        self.reader: Callback | None = None
        self.writer: Callback | None = None

    @property
    def events(self) -> int:
        return (selectors.EVENT_READ if self.reader else 0) | (selectors.EVENT_WRITE if self.writer else 0)


class Loop:
    """Runs callbacks when descriptors are ready, deadlines pass or signals arrive.

    Every method but `stop` belongs to the thread that runs the loop. One descriptor has at most one reader
    and one writer; adding again replaces. Remove a descriptor before closing it.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._watches: dict[int, _Watch] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: deque[Callback] = deque()
        self._stopping = False
        self._on_signal: dict[int, Callable[[int], None]] = {}
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.add_reader(self._wake_in, self._woken)

    # Descriptors

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Run `callback` in every turn in which `fd` is readable or has hung up."""
        self._watch(fd, "reader", callback)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Run `callback` in every turn in which `fd` is writable."""
        self._watch(fd, "writer", callback)

    def remove_reader(self, fd: int) -> None:
        """Stop watching `fd` for reading. Harmless when it is not watched."""
        self._watch(fd, "reader", None)

    def remove_writer(self, fd: int) -> None:
        """Stop watching `fd` for writing. Harmless when it is not watched."""
        self._watch(fd, "writer", None)

    def remove(self, fd: int) -> None:
        """Stop watching `fd` altogether."""
        self.remove_reader(fd)
        self.remove_writer(fd)

    def _watch(self, fd: int, side: str, callback: Callback | None) -> None:
        watch = self._watches.get(fd)
        if watch is None:
            if callback is None:
                return
            watch = _Watch()
        before = watch.events
        setattr(watch, side, callback)
        after = watch.events
        if before == after:
            return
        if not after:
            self._selector.unregister(fd)
            del self._watches[fd]
        elif not before:
            self._selector.register(fd, after, watch)
            self._watches[fd] = watch
        else:
            self._selector.modify(fd, after, watch)

    # Time

    def call_later(self, delay: float, callback: Callback) -> Timer:
        """Run `callback` once, `delay` seconds from now; the returned Timer can cancel it."""
        timer = Timer(time.monotonic() + delay, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Run `callback` in the next turn, after whatever became ready by then."""
        self._soon.append(callback)

    # Signals

    def on_signal(self, number: int, callback: Callable[[int], None]) -> None:
        """Run `callback(number)` in a turn after the signal arrived. Main thread only."""
        if not self._on_signal:
            signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        self._on_signal[number] = callback
        signal.signal(number, _ignore)

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            for number in set(os.read(self._wake_in, 4096)):
                callback = self._on_signal.get(number)
                if callback is not None:
                    callback(number)

    # Running

    def run(self) -> None:
        """Turn until `stop`."""
        self._stopping = False
        while not self._stopping:
            self.turn()

    def stop(self) -> None:
        """Make `run` return after the present turn. May be called from another thread."""
        self._stopping = True
        with suppress(BlockingIOError):
            os.write(self._wake_out, b"\0")

    def turn(self, timeout: float = LONGEST_WAIT) -> None:
        """Wait at most `timeout` seconds for something to do and do all of it once."""
        for key, mask in self._selector.select(self._patience(timeout)):
            # An earlier callback of this turn may have removed this descriptor, or closed it and had its
            # number reused: only the watch that was ready is served.
            watch: _Watch = key.data
            if mask & selectors.EVENT_READ and self._watches.get(key.fd) is watch and watch.reader:
                watch.reader()
            if mask & selectors.EVENT_WRITE and self._watches.get(key.fd) is watch and watch.writer:
                watch.writer()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    def _patience(self, timeout: float) -> float:
        if self._soon or self._stopping:
            return 0
        while self._timers and not self._timers[0][2].active:
            heapq.heappop(self._timers)
        if self._timers:
            timeout = min(timeout, self._timers[0][0] - time.monotonic())
        return min(max(timeout, 0), LONGEST_WAIT)

    def close(self) -> None:
        """Give up the loop's own descriptors and signal handlers."""
        if self._on_signal:
            signal.set_wakeup_fd(-1)
            for number in self._on_signal:
                signal.signal(number, signal.SIG_DFL)
            self._on_signal.clear()
        self._selector.close()
        os.close(self._wake_in)
        os.close(self._wake_out)


def _ignore(_number: int, _frame: object) -> None:
    """The wake-up descriptor carries the signal; a handler must exist for Python to write to it."""
