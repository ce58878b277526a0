# SPDX-License-Identifier: Apache-2.0
"""The control socket as real clients, good and bad, find it. The server is a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trustme_init.control.cli.main import main as control
from trustme_init.control.client import ControlClient
from trustme_init.control.framing import REQUEST_LIMIT
from trustme_init.control.loop import Loop
from trustme_init.control.sockets import listen
from trustme_init.errors import ControlRefusal
from trustme_init.proto.c_service_pb2 import CmldToServiceMessage as ToService
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply

ROOT = Path(__file__).parents[2]
PATIENCE = 10.0
LATENCY = 0.5
"""Seconds a good client may wait while others misbehave, on two shared cores; typically it is under 0.01."""
MIB = 1 << 20

GET_PROVISIONED = b"\0\0\0\x02\x08\x21"
NOT_PROVISIONED = b"\0\0\0\x05\x08\x29\xc8\x02\x00"
UNSUPPORTED = b"\0\0\0\x04\x08\x0d\x68\x07"
CMD_OK = b"\0\0\0\x04\x08\x0d\x68\x1d"
CMD_FAILED = b"\0\0\0\x04\x08\x0d\x68\x1e"


class Server:
    """The process of control_device.py."""

    def __init__(self, directory: Path, limits: dict[str, object]) -> None:
        self.directory = directory
        self.lines: queue.Queue[str] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.control_device", str(directory), json.dumps(limits)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.expect("ready")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip())

    def expect(self, text: str, patience: float = PATIENCE) -> str:
        """Return the next line that holds `text`; earlier ones are dropped."""
        deadline = time.monotonic() + patience
        while True:
            try:
                line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"nothing said {text!r}") from None
            if text in line:
                return line

    def connect(self, name: str = "control") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self.directory / name))  # blocking: with a time-out a full backlog is an error
        except BaseException:
            sock.close()
            raise
        sock.settimeout(PATIENCE)
        return sock

    def client(self, name: str = "control") -> ControlClient:
        return ControlClient(self.directory / name, timeout=PATIENCE)

    def memory(self) -> int:
        """Peak resident bytes so far."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            assert self._ended() == 0, "the server ends in order after everything it was given"

    def kill(self) -> None:
        self.process.kill()
        self._ended()

    def _ended(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server with other limits; short socket paths of its own."""
    import tempfile

    with contextlib.ExitStack() as stack:

        def start(**limits: object) -> Server:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="control-"))
            server = Server(Path(directory), limits)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def server(start: Start) -> Server:
    return start()


def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError(data)
        data += piece
    return data


def frame(sock: socket.socket) -> bytes:
    prefix = exactly(sock, 4)
    return prefix + exactly(sock, struct.unpack(">I", prefix)[0])


def answered_or_closed(sock: socket.socket) -> bytes | None:
    """Return a frame, None when the connection was closed; anything else (a hang) fails."""
    try:
        return frame(sock)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return None


def good_client_latency(server: Server, requests: int = 20) -> float:
    """Return the longest time a well-behaved client waits for any of its answers, connecting each time."""
    worst = 0.0
    for _ in range(requests):
        begin = time.monotonic()
        with server.connect() as sock:
            sock.sendall(GET_PROVISIONED)
            assert frame(sock) == NOT_PROVISIONED
        worst = max(worst, time.monotonic() - begin)
    return worst


# A client written for the original protocol: bytes written out by hand, no class of ours


def test_a_client_of_the_original_protocol_works_unchanged(server: Server) -> None:
    core = b"00000000-0000-0000-0000-000000000000"
    with server.connect() as sock:
        # GET_CONTAINER_STATUS(3) of one UUID: field 1 varint, field 10 string.
        sock.sendall(struct.pack(">I", 40) + b"\x08\x03" + b"\x52\x24" + core)
        reply = frame(sock)[4:]
        assert reply.startswith(b"\x08\x03\x3a"), "code CONTAINER_STATUS, then field 7"
        assert reply[4:].startswith(b"\x0a\x24" + core + b"\x12\x05core0\x18\x01\x20\x04\x28\x8d\x1d\x30")
        assert reply.endswith(b"\x3a\x0etrustme-coreos\x40\x01\x48\x01")

        # LIST_CONTAINERS(2); then LIST_GUESTOS_CONFIGS(1) on the same connection.
        sock.sendall(b"\0\0\0\x02\x08\x02")
        reply = frame(sock)[4:]
        assert reply.startswith(b"\x08\x02\x32\x24" + core + b"\x32\x24")
        sock.sendall(b"\0\0\0\x02\x08\x01")
        assert frame(sock)[4:].startswith(b"\x08\x01\x2a")

        # GET_CONTAINER_CONFIG(4): color is fixed32 field 6 and always there (protobuf-c insists).
        sock.sendall(struct.pack(">I", 40) + b"\x08\x04" + b"\x52\x24" + core)
        reply = frame(sock)[4:]
        assert reply.startswith(b"\x08\x04\x32\x24" + core + b"\x42")
        assert b"\x0a\x05core0\x12\x0etrustme-coreos" in reply
        assert b"\x35\0\0\0\0" in reply

        # GET_DEVICE_STATS(6), GET_PROVISIONED(33), SET_PROVISIONED(32).
        sock.sendall(b"\0\0\0\x02\x08\x06")
        assert frame(sock)[4:].startswith(b"\x08\x1e\xa2\x01")
        sock.sendall(GET_PROVISIONED)
        assert frame(sock) == NOT_PROVISIONED
        # A refusal is CMD_FAILED(30) and, in a field that such a client skips, why.
        sock.sendall(b"\0\0\0\x02\x08\x20")
        assert frame(sock)[4:].startswith(b"\x08\x0d\x68\x1e\xe2\x12")

        # GET_LAST_LOG(5): LOG_MESSAGE_FINAL(12) with name and text, then RESPONSE CMD_OK.
        sock.sendall(b"\0\0\0\x02\x08\x05")
        assert frame(sock)[4:] == b"\x08\x0c\x62\x1a\x0a\x04boot\x12\x12line 1\n\x1b[2Jline 2\n"
        assert frame(sock) == CMD_OK

        # CONTAINER_START(101) of an unknown container: CONTAINER_START_EEXIST(6), and why in the same field.
        sock.sendall(b"\0\0\0\x05\x08\x65\x52\x01x")
        assert frame(sock)[4:].startswith(b"\x08\x0d\x68\x06\xe2\x12")


def test_several_requests_in_one_write_are_answered_in_order(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall((GET_PROVISIONED + b"\0\0\0\0") * 100)
        for _ in range(100):
            assert frame(sock) == NOT_PROVISIONED
            assert frame(sock) == UNSUPPORTED, "an empty frame is a message without a command"


def test_a_client_that_shuts_down_its_side_still_gets_its_answers(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(GET_PROVISIONED * 3)
        sock.shutdown(socket.SHUT_WR)
        for _ in range(3):
            assert frame(sock) == NOT_PROVISIONED
        assert sock.recv(1) == b""


# The socket itself


def test_the_socket_is_private_and_a_successor_takes_over_in_one_step(start: Start) -> None:
    server = start()
    path = server.directory / "control"
    mode = path.stat()
    assert stat.S_ISSOCK(mode.st_mode)
    assert stat.S_IMODE(mode.st_mode) == 0o600
    assert (mode.st_uid, mode.st_gid) == (os.getuid(), os.getgid())

    server.kill()
    assert path.exists(), "a killed server leaves its socket"
    begin = time.monotonic()
    successor = Server(server.directory, {})
    assert good_client_latency(successor, 1) < LATENCY
    assert time.monotonic() - begin < 2
    successor.close()
    assert list(server.directory.iterdir()) == [], "an orderly end leaves nothing, also not beside"


@pytest.mark.parametrize("umask", [0, 0o777])
def test_row30_the_mode_does_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        sock, _ = listen(tmp_path / "s", uid=os.getuid(), gid=os.getgid())
    finally:
        os.umask(before)
    with sock:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    sock, _ = listen(deep / "s", uid=os.getuid(), gid=os.getgid())
    with sock, ControlClient(deep / "s", timeout=0.2) as client, pytest.raises(ControlRefusal) as caught:
        client.request(Request(command=Request.GET_PROVISIONED))
    assert caught.value.code == "timed-out"


def test_a_socket_that_cannot_be_made_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(ControlRefusal) as caught:
        listen(tmp_path / "missing" / "s", uid=0, gid=0)
    assert caught.value.code == "socket-unavailable"


@pytest.mark.root
def test_row9_another_user_is_refused_even_if_the_mode_would_let_it_in(server: Server) -> None:
    server.directory.chmod(0o755)
    (server.directory / "control").chmod(0o666)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        with contextlib.suppress(BaseException), server.connect() as sock:
            os._exit(0 if answered_or_closed(sock) is None else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "uid 65534" in server.expect("refused")
    assert good_client_latency(server, 1) < LATENCY


# Hostile clients


def test_row34_split_byte_by_byte(server: Server) -> None:
    with server.connect() as sock:
        for byte in GET_PROVISIONED * 2:
            sock.sendall(bytes([byte]))
            time.sleep(0.001)
        assert frame(sock) == NOT_PROVISIONED
        assert frame(sock) == NOT_PROVISIONED


@pytest.mark.parametrize("length", [REQUEST_LIMIT + 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_row34_oversize_closes_and_allocates_nothing(server: Server, length: int) -> None:
    before = server.memory()
    with server.connect() as sock:
        sock.sendall(GET_PROVISIONED + struct.pack(">I", length))
        assert frame(sock) == NOT_PROVISIONED, "what came before is answered"
        assert answered_or_closed(sock) is None
    assert server.memory() - before < MIB
    assert good_client_latency(server, 1) < LATENCY


def test_row34_truncated_frames_are_closed(server: Server) -> None:
    for size in range(1, len(GET_PROVISIONED)):
        with server.connect() as sock:
            sock.sendall(GET_PROVISIONED[:size])
            sock.shutdown(socket.SHUT_WR)
            assert answered_or_closed(sock) is None


def test_row34_a_thousand_malformed_frames(server: Server) -> None:
    answered = closed = 0
    sock = server.connect()
    for number in range(1000):
        body = os.urandom(number % 200)
        bad = [
            struct.pack(">I", len(body)) + body,
            struct.pack(">I", REQUEST_LIMIT + number) + body,
            b"\0\0\0\0",
            b"\0\0\0\x05\x08\x03\x52\x7fx",
        ][number % 4]
        try:
            sock.sendall(bad)
            reply = answered_or_closed(sock)
        except (BrokenPipeError, ConnectionResetError):
            reply = None
        if reply is None:
            closed += 1
            sock.close()
            sock = server.connect()
        else:
            answered += 1
    sock.close()
    assert (answered, closed) == (750, 250)
    assert good_client_latency(server) < LATENCY
    assert server.descriptors() < 20
    lines = 0
    with contextlib.suppress(queue.Empty):
        while True:
            server.lines.get_nowait()
            lines += 1
    assert 0 < lines < 100, "the log is limited"


def test_row34_slow_loris_is_cut_off_and_delays_nobody(start: Start) -> None:
    server = start(frame_time=0.5)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(10)]
        begin = time.monotonic()
        for sock in slow:
            sock.sendall(b"\0\0\x10\0")
        while time.monotonic() - begin < 0.4:
            for sock in slow:
                sock.sendall(b"x")
            assert good_client_latency(server, 1) < LATENCY
        for sock in slow:
            assert answered_or_closed(sock) is None
        assert time.monotonic() - begin < 2


def test_row34_two_hundred_silent_clients_do_not_lock_a_good_one_out(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        hostile = [stack.enter_context(server.connect()) for _ in range(200)]
        assert good_client_latency(server) < LATENCY
        # They came from this one process: it keeps its last 16, and the good client is one of the newest.
        closed = 0
        for sock in hostile:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                closed += sock.recv(1) == b""
        assert closed >= 200 - 16
        assert server.descriptors() < 40


def test_row34_two_hundred_processes_do_not_lock_a_good_one_out(server: Server) -> None:
    """Each of 200 processes holds one connection with a started frame; 64 connections are the limit."""
    children = []
    stop_read, stop_write = os.pipe()
    ready_read, ready_write = os.pipe()
    try:
        for _ in range(200):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    os.close(stop_write)
                    sock = server.connect()
                    sock.sendall(b"\0\0")
                    os.write(ready_write, b"x")
                    os.read(stop_read, 1)
                os._exit(0)
            children.append(child)
        ready = 0
        while ready < 200:
            ready += len(os.read(ready_read, 200))
        assert good_client_latency(server) < LATENCY
        with server.connect() as steady:
            for _ in range(10):
                steady.sendall(GET_PROVISIONED)
                assert frame(steady) == NOT_PROVISIONED
        assert server.descriptors() < 90
    finally:
        os.close(stop_write)
        for child in children:
            os.waitpid(child, 0)
        for fd in (stop_read, ready_read, ready_write):
            os.close(fd)


def test_row34_a_client_that_never_reads(start: Start) -> None:
    """Its replies stop being made, it is cut off, and nobody else waits; memory stays small."""
    server = start(write_time=0.5)
    before = server.memory()
    with server.connect() as sock:
        sock.settimeout(0.2)
        request = b"\0\0\0\x02\x08\x01" * 1000
        with contextlib.suppress(TimeoutError):
            while True:
                sock.sendall(request)
        assert good_client_latency(server) < LATENCY
        assert server.memory() - before < 8 * MIB
        deadline = time.monotonic() + 5
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    sock.sendall(b"\0")
                time.sleep(0.05)
            pytest.fail("still connected")
    server.expect("too slow")


def test_row34_large_unfinished_requests_share_one_budget(server: Server) -> None:
    """Eight clients send 15 of 16 MiB and wait: 32 MiB is what the server holds."""
    with contextlib.ExitStack() as stack:
        payload = struct.pack(">I", REQUEST_LIMIT) + bytes(15 * MIB)
        for _ in range(8):
            sock = stack.enter_context(server.connect())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(payload)
            assert good_client_latency(server, 1) < LATENCY
        server.expect("too much data held")
        assert server.memory() < 160 * MIB


def test_row34_a_request_made_to_be_costly_delays_nobody(server: Server) -> None:
    body = b"\x08\x03" + b"\x52\x00" * (REQUEST_LIMIT // 2 - 1)
    with server.connect() as sock:
        sock.sendall(struct.pack(">I", len(body)) + body)
        assert good_client_latency(server, 5) < LATENCY
        assert frame(sock) == CMD_FAILED


def test_row34_a_flood_of_requests_is_served_in_turn(server: Server) -> None:
    """Ten clients pipeline without end; a good one gets its turn."""
    stop = threading.Event()

    def flood() -> None:
        with server.connect() as sock:
            sock.settimeout(0.5)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    sock.sendall(GET_PROVISIONED * 50)
                    exactly(sock, len(NOT_PROVISIONED) * 50)

    threads = [threading.Thread(target=flood) for _ in range(10)]
    for thread in threads:
        thread.start()
    try:
        assert good_client_latency(server) < LATENCY
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_row34_connect_and_vanish(server: Server) -> None:
    for number in range(300):
        with server.connect() as sock:
            if number % 3:
                sock.sendall(GET_PROVISIONED[: number % 7] if number % 2 else GET_PROVISIONED * 5)
    assert good_client_latency(server) < LATENCY
    assert server.descriptors() < 20


def test_row34_out_of_descriptors_is_survived(server: Server) -> None:
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (server.descriptors() + 4, 4096))
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(server.connect())
        busy = server.cpu()
        time.sleep(0.5)
        assert server.cpu() - busy < 0.25, "no spinning on accept"
        assert good_client_latency(server, 3) < 2 * LATENCY
    server.expect("cannot accept")


def test_row34_idle_clients_are_let_go_and_cost_no_time(start: Start) -> None:
    server = start(idle_time=0.3)
    with server.connect() as sock:
        sock.sendall(GET_PROVISIONED)
        assert frame(sock) == NOT_PROVISIONED
        begin = time.monotonic()
        assert answered_or_closed(sock) is None
        assert 0.2 < time.monotonic() - begin < 2


def test_a_connected_but_idle_client_costs_no_cpu(server: Server) -> None:
    with server.connect():
        before = server.cpu()
        time.sleep(0.5)
        assert server.cpu() - before <= 0.02


def test_the_unprivileged_socket_is_gated(server: Server) -> None:
    with server.connect("guest") as sock:
        sock.sendall(b"\0\0\0\x02\x08\x02")
        assert frame(sock) == UNSUPPORTED
        sock.sendall(b"\0\0\0\x02\x08\x01")
        assert frame(sock)[4:].startswith(b"\x08\x01\x2a")


# Logs and reboot


def test_a_long_log_arrives_whole_with_bounded_memory(start: Start, tmp_path: Path) -> None:
    server = start()
    server.close()
    big = server.directory / "big.log"
    big.write_bytes(b"".join(b"line %d\n" % number for number in range(3_000_000)))
    size = big.stat().st_size
    assert size > 30 * MIB
    server = Server(server.directory, {})
    before = server.memory()
    got = 0
    with server.client() as client:
        for reply in client.logs(remove=True):
            got += len(reply.log_message.msg) if reply.log_message.name == "big" else 0
    assert got == size
    assert reply.response == Reply.CMD_OK
    assert server.memory() - before < 8 * MIB
    assert "'boot', 'big'" in server.expect("effect: remove")
    server.close()
    big.unlink()


def test_logs_are_removed_once_taken(server: Server) -> None:
    with server.connect() as sock:
        # GET_LAST_LOG with remove_logs
        sock.sendall(b"\0\0\0\x05\x08\x05\xe8\x02\x01")
        assert b"boot" in frame(sock)
        assert frame(sock) == CMD_OK
    server.expect("effect: remove")


def test_logs_are_kept_when_the_client_leaves_before_the_end(start: Start) -> None:
    server = start()
    server.close()
    (server.directory / "big.log").write_bytes(bytes(8 * MIB))
    server = Server(server.directory, {})
    try:
        with server.connect() as sock:
            sock.sendall(b"\0\0\0\x05\x08\x05\xe8\x02\x01")
            assert b"boot" in frame(sock)
        assert good_client_latency(server) < LATENCY
        with pytest.raises(AssertionError, match="nothing"):
            server.expect("effect: remove", patience=0.2)
    finally:
        server.close()
        (server.directory / "big.log").unlink()


def test_reboot_answers_first(server: Server) -> None:
    with server.client() as client:
        assert client.request(Request(command=Request.REBOOT_DEVICE)).response == Reply.CMD_OK
    server.expect("effect: reboot")


def test_reboot_is_not_taken_back_by_leaving(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(b"\0\0\0\x02\x08\x1f")
    server.expect("effect: reboot")


# Service socket


def test_service_reports_and_asks(server: Server) -> None:
    with server.connect("service") as sock:
        sock.sendall(b"\0\0\0\x02\x08\x01")
        server.expect("boot completed")
        sock.sendall(b"\0\0\0\x02\x08\x12\0\0\0\x02\x08\x13")
        name = ToService.FromString(frame(sock)[4:])
        assert (name.code, name.container_cfg_name) == (ToService.CONTAINER_CFG_NAME, "core0")
        dns = ToService.FromString(frame(sock)[4:])
        assert (dns.code, dns.container_cfg_dns) == (ToService.CONTAINER_CFG_DNS, "192.0.2.1")


def test_service_shutdown_goes_to_the_first_client_whatever_the_others_do(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.connect("service"))
        others = [stack.enter_context(server.connect("service")) for _ in range(50)]
        others[-1].sendall(b"\0\0\0\x02\x08\x12")
        assert ToService.FromString(frame(others[-1])[4:]).container_cfg_name == "core0"
        server.process.send_signal(signal.SIGUSR1)
        assert "True" in server.expect("shutdown told")
        assert frame(first) == b"\0\0\0\x02\x08\x01"
        assert server.descriptors() < 30


def test_service_shutdown_waits_for_a_service_that_is_not_there(server: Server) -> None:
    server.process.send_signal(signal.SIGUSR1)
    assert "False" in server.expect("shutdown told")
    with server.connect("service") as sock:
        assert frame(sock) == b"\0\0\0\x02\x08\x01"
    with server.connect("service") as sock:
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)


@pytest.mark.parametrize("bad", [b"\0\0\0\x01\xff", b"\xff\xff\xff\xff", b"\0\x01\0\x01"])
def test_row34_service_garbage_closes_that_client_only(server: Server, bad: bytes) -> None:
    with server.connect("service") as good, server.connect("service") as hostile:
        hostile.sendall(bad)
        assert answered_or_closed(hostile) is None
        good.sendall(b"\0\0\0\x02\x08\x63\0\0\0\0\0\0\0\x02\x08\x12")
        assert ToService.FromString(frame(good)[4:]).container_cfg_name == "core0", (
            "unknown codes passed over"
        )


# The command


def test_the_command_against_a_real_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str]:
        code = control(["-s", str(server.directory / "control"), *words])
        return code, capsys.readouterr().out

    code, out = run("list")
    assert code == 0
    assert out.splitlines()[1].split()[:4] == ["core0", "RUNNING", "01:02:05", "trustme-coreos"]
    code, out = run("list", "--text")
    assert "code: CONTAINER_STATUS" in out
    code, out = run("--json", "state", "core0")
    assert json.loads(out)["reply"]["container_status"][0]["state"] == "RUNNING"
    code, out = run("start", "core0")
    assert code == 4
    code, out = run("remove", "nonexistent-container")
    assert (code, out) == (5, "Container with provided uuid/name does not exist!\n")
    code, out = run("retrieve_logs")
    assert code == 0
    assert "\\x1b[2Jline 2\n" in out
    assert "\x1b" not in out
    code, out = run("reboot", "--text")
    assert out.startswith("code: RESPONSE\nresponse: CMD_OK\n")


def test_loop_is_closed_with_no_descriptor_left() -> None:
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    Loop().close()
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before
