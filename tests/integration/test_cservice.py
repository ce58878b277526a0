# SPDX-License-Identifier: Apache-2.0
"""The core container's PID 1, run by the host's Python in a PID namespace of its own."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CSERVICE = Path(__file__).resolve().parents[2] / "recipes/core/files/usr/sbin/cservice"
BOOT_COMPLETED = b"\0\0\0\x02\x08\x01"
SHUTDOWN = b"\0\0\0\x02\x08\x01"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@contextmanager
def cservice(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run it as PID 1 of a namespace that dies with this process."""
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "/usr/bin/python3", "-IS", CSERVICE],
        env={"CSERVICE_SOCKET": str(path), "PATH": "/usr/sbin:/usr/bin"},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def manager(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        path.unlink(missing_ok=True)
        server.bind(str(path))
        server.listen()
        server.settimeout(5)
        yield server


@contextmanager
def accepted(server: socket.socket) -> Iterator[socket.socket]:
    client, _ = server.accept()
    with client:
        client.settimeout(5)
        yield client


def exact(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += client.recv(length - len(data))
    return data


@pytest.fixture
def short() -> Iterator[Path]:
    # Not tmp_path: the path of a socket has at most 108 characters.
    with tempfile.TemporaryDirectory(prefix="cs") as directory:
        yield Path(directory) / "s"


def test_it_reports_again_to_each_manager_and_ends_on_shutdown(short: Path) -> None:
    with cservice(short) as process:
        for _ in range(2):  # the first manager dies, the second finds it within two seconds
            with manager(short) as server, accepted(server) as client:
                began = time.monotonic()
                assert exact(client, 6) == BOOT_COMPLETED
                assert time.monotonic() - began < 2
        with manager(short) as server, accepted(server) as client:
            assert exact(client, 6) == BOOT_COMPLETED
            for byte in SHUTDOWN:  # however it is cut
                client.send(bytes([byte]))
            assert process.wait(10) == 0


@pytest.mark.parametrize(
    "frame",
    [
        b"\0\0\0\0",  # every field at its default: no code
        b"\0\0\0\x02\x08\x11",  # CONTAINER_CFG_NAME
        b"\0\0\0\x03\x1a\x01x",
        b"\0\0\0\x06\x08\xff\xff\xff\xff\xff",
        struct.pack(">I", 1 << 30),  # oversize: it hangs up and comes back
    ],
)
def test_other_messages_do_not_end_it(short: Path, frame: bytes) -> None:
    with manager(short) as server, cservice(short) as process:
        with accepted(server) as client:
            assert exact(client, 6) == BOOT_COMPLETED
            client.sendall(frame)
            time.sleep(0.1)
            assert process.poll() is None
        with accepted(server) as client:
            assert exact(client, 6) == BOOT_COMPLETED
            client.sendall(SHUTDOWN)
            assert process.wait(10) == 0


def test_a_console_has_a_shell_that_comes_back_and_ctrl_c_is_for_the_shell(short: Path) -> None:
    master, slave = pty.openpty()
    with manager(short) as server:
        process = subprocess.Popen(
            [
                "unshare",
                "--pid",
                "--fork",
                "--mount-proc",
                "--kill-child",
                "setsid",  # PID 1 is the leader of the terminal's session, as the manager makes it
                "--ctty",
                "/usr/bin/python3",
                "-IS",
                CSERVICE,
            ],
            env={"CSERVICE_SOCKET": str(short), "PATH": "/usr/sbin:/usr/bin"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        try:
            os.close(slave)
            with accepted(server) as client:
                assert exact(client, 6) == BOOT_COMPLETED
                wait_text(master, "control list")
                wait_text(master, "# ")
                os.write(master, b"\x03")
                wait_text(master, "# ")
                os.write(master, b"echo one$((1+1))three; (sleep 0.1 &); exit\n")
                wait_text(master, "one2three")
                wait_text(master, "control list", 5)  # the banner of the next shell
                wait_text(master, "# ")
                os.write(master, b"trap '' HUP TERM; echo ready; sleep 1000\n")
                wait_text(master, "ready\r")
                os.write(master, b"\x03")
                assert process.poll() is None
                began = time.monotonic()
                client.sendall(SHUTDOWN)
                assert process.wait(15) == 0
                assert time.monotonic() - began < 10
        finally:
            process.kill()
            process.wait()
            os.close(master)


def wait_text(master: int, text: str, timeout: float = 5) -> None:
    seen = ""
    deadline = time.monotonic() + timeout
    while not re.search(re.escape(text), seen):
        left = deadline - time.monotonic()
        assert left > 0, seen
        assert select.select([master], [], [], left)[0], seen
        seen += os.read(master, 4096).decode(errors="replace")


def test_it_ends_in_good_order_on_sigterm(short: Path) -> None:
    with manager(short) as server, cservice(short) as process, accepted(server) as client:
        assert exact(client, 6) == BOOT_COMPLETED
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert process.wait(10) == 0


def test_it_refuses_to_be_anything_but_pid_1() -> None:
    done = subprocess.run(["/usr/bin/python3", "-IS", CSERVICE], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"init of a container" in done.stderr
