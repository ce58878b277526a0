# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from trustme_init.control.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for fd in ends:
        os.close(fd)


def test_timers_fire_in_order_of_their_deadlines(loop: Loop) -> None:
    seen: list[str] = []
    loop.call_later(0.02, lambda: seen.append("late"))
    loop.call_later(0.02, loop.stop)
    loop.call_later(0.01, lambda: seen.append("early"))
    gone = loop.call_later(0.005, lambda: seen.append("never"))
    gone.cancel()
    assert not gone.active
    begin = time.monotonic()
    loop.run()
    assert seen == ["early", "late"]
    assert 0.02 <= time.monotonic() - begin < 0.5


def test_call_soon_runs_once_per_turn_and_after_what_is_ready(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[str] = []

    def again() -> None:
        seen.append("soon")
        loop.call_soon(again)

    loop.call_soon(again)
    loop.add_reader(pipe[0], lambda: seen.append(os.read(pipe[0], 10).decode()))
    os.write(pipe[1], b"data")
    loop.turn()
    assert seen == ["data", "soon"]
    loop.turn()
    assert seen == ["data", "soon", "soon"]


def test_readers_and_writers_of_one_descriptor(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[str] = []
    loop.add_writer(pipe[1], lambda: seen.append("w"))
    loop.turn(0)
    loop.remove_writer(pipe[1])
    loop.remove_writer(pipe[1])
    loop.turn(0)
    assert seen == ["w"]
    loop.add_reader(pipe[0], lambda: seen.append("old"))
    loop.add_reader(pipe[0], lambda: seen.append("r"))
    os.write(pipe[1], b"x")
    loop.turn(0)
    loop.remove(pipe[0])
    loop.turn(0)
    assert seen == ["w", "r"]


def test_a_callback_may_remove_what_was_ready_in_the_same_turn(loop: Loop) -> None:
    ends = [os.pipe2(os.O_NONBLOCK) for _ in range(2)]
    seen: list[int] = []

    def reader(mine: int, other: int) -> None:
        seen.append(mine)
        loop.remove(other)

    for index in (0, 1):
        mine, other = ends[index][0], ends[1 - index][0]
        loop.add_reader(mine, lambda mine=mine, other=other: reader(mine, other))  # type: ignore[misc]
        os.write(ends[index][1], b"x")
    loop.turn(0)
    assert len(seen) == 1
    for pair in ends:
        loop.remove(pair[0])
        os.close(pair[0])
        os.close(pair[1])


def test_a_reused_descriptor_is_not_served_with_the_old_event(loop: Loop) -> None:
    first, second = os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK)
    seen: list[str] = []

    def swap(fd: int) -> None:
        victim = second[0] if fd == first[0] else first[0]
        loop.remove(fd)
        loop.remove(victim)
        loop.add_reader(victim, lambda: seen.append("fresh watch"))

    for pair in (first, second):
        loop.add_reader(pair[0], lambda fd=pair[0]: swap(fd))  # type: ignore[misc]
        os.write(pair[1], b"x")
    loop.turn(0)
    assert seen == []
    loop.turn(0)
    assert seen == ["fresh watch"]
    for fd in (*first, *second):
        loop.remove(fd)
        os.close(fd)


def test_stop_from_another_thread_wakes_the_loop(loop: Loop) -> None:
    thread = threading.Timer(0.05, loop.stop)
    thread.start()
    begin = time.monotonic()
    loop.run()
    assert time.monotonic() - begin < 5
    thread.join()


def test_signals_arrive_as_callbacks() -> None:
    loop = Loop()
    before = signal.getsignal(signal.SIGUSR1)
    seen: list[int] = []
    try:

        def caught(number: int) -> None:
            seen.append(number)
            loop.stop()

        loop.on_signal(signal.SIGUSR1, caught)
        loop.call_soon(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        loop.run()
    finally:
        loop.close()
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_a_failing_callback_is_the_callers_failure(loop: Loop) -> None:
    loop.call_soon(lambda: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        loop.run()
