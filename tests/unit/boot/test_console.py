# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trustme_init.boot.console import LOG_LIMIT, Console, printable
from trustme_init.errors import TrustRefusal


@given(st.text())
def test_row27_nothing_printed_can_steer_a_terminal_or_fake_a_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert "\n" not in shown
    assert "\x1b" not in shown


def test_a_console_that_is_not_there_does_not_stop_the_boot(tmp_path: Path) -> None:
    Console(tmp_path / "missing/console").line("hello")


def test_the_screen_names_cause_evidence_and_remedy(tmp_path: Path) -> None:
    device = tmp_path / "console"
    device.touch()
    Console(device).refusal("core", TrustRefusal("bad-signature", "why", evidence="e\x1b[2J", remedy="do"))
    assert device.read_text().splitlines() == [
        "trustme: REFUSED stage=core code=bad-signature",
        "trustme: what: why",
        "trustme: evidence: e\\x1b[2J",
        "trustme: remedy: do",
        "trustme: rebooting in 10 s",
    ]


def test_the_log_is_private_bounded_and_keeps_the_previous_part(tmp_path: Path) -> None:
    console = Console(tmp_path / "none")
    log = tmp_path / "log/boot.log"
    mask = os.umask(0)
    try:
        console.log_to(log)
        line = "x" * 1000
        for _ in range(LOG_LIMIT // 1000 + 10):
            console.note(line)
    finally:
        os.umask(mask)
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.stat().st_size < LOG_LIMIT
    assert (tmp_path / "log/boot.old.log").stat().st_size > LOG_LIMIT // 2


def test_a_log_that_vanishes_harms_nobody_and_begins_anew(tmp_path: Path) -> None:
    console = Console(tmp_path / "none")
    log = tmp_path / "log/boot.log"
    console.log_to(log)
    log.write_bytes(bytes(LOG_LIMIT))
    os.truncate(log, 0)  # as a client may ask for
    console.note("after")
    assert not (tmp_path / "log/boot.old.log").exists()
    log.unlink()
    log.parent.rmdir()
    console.note("lost")


def full_fifo(path: Path) -> int:
    """Make a FIFO in which nothing more fits; return its reading end."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.close(writer)
    return reader


def test_a_line_waits_for_a_slow_console(tmp_path: Path) -> None:
    reader = full_fifo(tmp_path / "console")
    drain = threading.Timer(0.05, lambda: os.read(reader, 1024 * 1024))
    drain.start()
    Console(tmp_path / "console").line("seen")
    drain.join()
    assert os.read(reader, 4096) == b"trustme: seen\n"
    os.close(reader)


def test_a_console_that_has_stopped_does_not_stop_the_boot(tmp_path: Path) -> None:
    reader = full_fifo(tmp_path / "console")
    started = time.monotonic()
    Console(tmp_path / "console").line("never seen")
    assert time.monotonic() - started < 5
    os.close(reader)
