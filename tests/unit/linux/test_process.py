# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.linux.process import (
    CLOSE_RANGE_CLOEXEC,
    bounding_set,
    close_range,
    parse_start_time,
    pidfd_open,
    pidfd_send_signal,
    process_start_time,
)

SRC = Path(__file__).resolve().parents[3] / "src"


def test_start_time_is_that_of_ps() -> None:
    ticks = process_start_time(os.getpid()) / os.sysconf("SC_CLK_TCK")
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    elapsed = subprocess.run(
        ["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    assert abs(uptime - ticks - int(elapsed.stdout)) < 2


@given(st.binary(max_size=20))
def test_a_command_name_cannot_shift_the_fields(name: bytes) -> None:
    fields = b" ".join(b"%d" % number for number in range(4, 30))
    assert parse_start_time(b"1 (" + name + b") S " + fields) == 22


@given(st.binary())
def test_any_stat_is_parsed_or_refused(text: bytes) -> None:
    with suppress(OSError, ValueError):
        parse_start_time(text)


def test_a_process_that_is_gone_is_a_lookup_error() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    fd = pidfd_open(child)
    os.waitpid(child, 0)
    with pytest.raises(ProcessLookupError):
        process_start_time(child)
    with pytest.raises(ProcessLookupError):
        pidfd_send_signal(fd, signal.SIGKILL)
    os.close(fd)


def test_close_range_marks_every_descriptor() -> None:
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from trustme_init.linux.process import close_range
fd = os.open("/dev/null", os.O_RDONLY)
os.set_inheritable(fd, True)
close_range(3, flags={CLOSE_RANGE_CLOEXEC})
assert not os.get_inheritable(fd)
close_range(3)
try:
    os.fstat(fd)
except OSError:
    sys.exit(0)
sys.exit(1)
"""
    assert subprocess.run([sys.executable, "-I", "-c", script], check=False).returncode == 0
    assert callable(close_range)


def test_the_bounding_set_is_the_kernels() -> None:
    text = Path("/proc/self/status").read_text()
    mask = int(next(line for line in text.splitlines() if line.startswith("CapBnd")).split()[1], 16)
    assert sum(1 << number for number in bounding_set()) == mask


def test_a_signal_of_the_c_library_gets_its_default_action() -> None:
    # make starts us by posix_spawn, which leaves signal 32 ignored; here it is made so first.
    code = (
        "import ctypes\n"
        "from trustme_init.linux.process import default_signal\n"
        "from trustme_init.linux.syscalls import SYS_rt_sigaction, syscall\n"
        "ignore = (1).to_bytes(8, 'little') + bytes(24)\n"
        "syscall(SYS_rt_sigaction, 32, ignore, None, 8)\n"
        "def ignored():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1], 16) for line in lines if line.startswith('SigIgn'))\n"
        "assert ignored() >> 31 & 1\n"
        "default_signal(32)\n"
        "assert not ignored() >> 31 & 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(SRC)})
