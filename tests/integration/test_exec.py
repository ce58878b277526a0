# SPDX-License-Identifier: Apache-2.0
"""Programs run in a compartment that is up, freezing it, and the control commands for both, for real."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.compartment_kit import UUID, Bench, busybox_root, wait_for
from tests.unit.control.fake_device import FakeDevice
from trustme_init.compartments.exec import enter
from trustme_init.compartments.lifecycle import Compartment, State
from trustme_init.compartments.spec import CompartmentSpec
from trustme_init.control import execution
from trustme_init.control.client import ControlClient
from trustme_init.control.dispatch import Dispatcher
from trustme_init.control.execution import Execution
from trustme_init.control.loop import Loop
from trustme_init.control.server import ControlServer
from trustme_init.control.state import ContainerView
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.cgroup import SUBTREE_GROUPS
from trustme_init.proto.container_pb2 import ContainerState
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.provisioning.mode import Mode

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

HERE = Path(__file__).resolve().parent
PATIENCE = 20.0


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("exec"))


@pytest.fixture(scope="module")
def spec(bench: Bench) -> CompartmentSpec:
    root = busybox_root(bench.work / "root", "")
    for name, target in (("exe", "/proc/self/exe"), ("indirect", "/bin/exe"), ("lost", "/nowhere")):
        (root / "bin" / name).symlink_to(target)
    for program in ("watcher", "probe"):
        source = HERE / f"{program}.c"
        subprocess.run(["gcc", "-static", "-O1", "-o", root / "bin" / program, source], check=True)
    return bench.spec(bench.image(root), argv=("/bin/busybox", "sleep", "1000"))


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def compartment(bench: Bench, spec: CompartmentSpec, loop: Loop) -> Iterator[Compartment]:
    with bench.running(spec) as running:
        running.booted()
        yield running
        settle(loop)


def settle(loop: Loop) -> None:
    """Turn until every program is reaped: until then the compartment's init could not end."""
    turn_until(loop, lambda: len(loop._watches) == 1)


def turn_until(loop: Loop, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        loop.turn(0.05)


def begin(loop: Loop, compartment: Compartment, *words: str, terminal: bool = False) -> Execution:
    assert compartment.running is not None
    entry = enter(compartment.running, compartment.spec, words[0], words, terminal=terminal)
    return Execution(loop, entry)


def output(loop: Loop, program: Execution, until: Callable[[bytes], bool] = lambda _: False) -> bytes:
    """Return what a program says, to its end or until that is enough."""
    said = b""
    deadline = time.monotonic() + PATIENCE
    while not program.over and not until(said):
        assert time.monotonic() < deadline, said
        data = program.read()
        said += data
        if not data:
            ready = threading.Event()
            program.when_ready(ready.set)
            turn_until(loop, ready.is_set)
    return said


def run(loop: Loop, compartment: Compartment, *words: str, terminal: bool = False) -> tuple[int | None, str]:
    program = begin(loop, compartment, *words, terminal=terminal)
    said = output(loop, program).decode()
    program.close()
    assert program.failure is None, program.failure
    return program.status, said


def shell(loop: Loop, compartment: Compartment, script: str, *, terminal: bool = False) -> str:
    status, said = run(loop, compartment, "busybox", "sh", "-c", script, terminal=terminal)
    assert status == 0, said
    return said


# Confinement


def test_row25_a_program_has_exactly_what_init_has(loop: Loop, compartment: Compartment) -> None:
    """Capabilities, filters, ids, limits, and the same namespaces."""
    kinds = "user mnt pid uts ipc net cgroup time"
    script = (
        f"cat /proc/self/status /proc/self/limits; for ns in {kinds}; do readlink /proc/self/ns/$ns; done"
    )
    said = shell(loop, compartment, script).splitlines()
    assert compartment.running is not None
    init = Path(f"/proc/{compartment.running.pid}")
    wanted = (init / "status").read_text().splitlines() + (init / "limits").read_text().splitlines()
    same = re.compile(r"(Cap|NoNewPrivs|Seccomp|Groups|SigBlk|SigIgn|Umask|Max )")
    # In the container's own numbers.
    mine = [line for line in said if same.match(line) and not line.startswith("Max pending")]
    assert mine == [line for line in wanted if same.match(line) and not line.startswith("Max pending")]
    assert "Uid:\t0\t0\t0\t0" in said
    assert said[-8:] == [str((init / "ns" / kind).readlink()) for kind in kinds.split()]


def test_row25_a_program_is_under_the_strict_list_too(
    bench: Bench, spec: CompartmentSpec, loop: Loop
) -> None:
    with bench.running(replace(spec, strict_calls=True)) as compartment:
        said = run(loop, compartment, "probe")[1].splitlines()
        settle(loop)
    assert "strict-unshare 1" in said
    assert "io_uring_setup 1" in said


def test_row23_a_program_has_three_descriptors_and_is_inside(loop: Loop, compartment: Compartment) -> None:
    leaked = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        for terminal in (False, True):
            # The one more is what `ls` reads the directory with.
            said = shell(
                loop, compartment, "ls /proc/self/fd; pwd; readlink /proc/self/root", terminal=terminal
            )
            assert said.split() == ["0", "1", "2", "3", "/", "/"]
    finally:
        os.close(leaked)


def test_a_program_has_the_environment_of_init_and_a_path(loop: Loop, compartment: Compartment) -> None:
    assert "PATH=" not in " ".join(compartment.spec.env)
    status, said = run(loop, compartment, "busybox", "env")
    assert status == 0
    assert sorted(line.partition("=")[0] for line in said.splitlines()) == ["PATH", "container"]
    assert "TERM=xterm" in run(loop, compartment, "busybox", "env", terminal=True)[1]


@pytest.mark.parametrize(
    "name", ["/proc/self/exe", "/bin/exe", "exe", "indirect", "/proc/1/root/bin/busybox"]
)
def test_row22_a_program_is_never_what_the_manager_executes(
    loop: Loop, compartment: Compartment, name: str
) -> None:
    program = begin(loop, compartment, name, "id")
    assert output(loop, program) == b""
    program.close()
    assert program.failure is not None
    assert "symbolic links" in program.failure.evidence


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nothing", "program-missing"),
        ("lost", "program-missing"),
        ("/", "step-failed"),
        ("/etc", "step-failed"),
    ],
)
def test_what_cannot_be_executed_is_said(loop: Loop, compartment: Compartment, name: str, code: str) -> None:
    program = begin(loop, compartment, name)
    assert output(loop, program) == b""
    program.close()
    assert program.failure is not None
    assert program.failure.code == code


@pytest.mark.parametrize("words", [("",), ("a\0b",), ("sh", "a\0b"), ("sh", "x" * 200_000)])
def test_what_is_no_command_is_refused(compartment: Compartment, words: tuple[str, ...]) -> None:
    assert compartment.running is not None
    with pytest.raises(CompartmentRefusal) as caught:
        enter(compartment.running, compartment.spec, words[0], words, terminal=False)
    assert caught.value.code == "command-malformed"


def test_row22_nothing_of_the_manager_is_seen_while_a_program_is_entered(
    loop: Loop, compartment: Compartment
) -> None:
    """A program of the container looks at every process in turn, meanwhile others are entered."""
    spy = begin(loop, compartment, "watcher")
    said = output(loop, spy, lambda text: b"looked" in text)
    for _ in range(60):
        run(loop, compartment, "busybox", "true")
        said += spy.read()
    spy.close()
    assert said.count(b"looked") >= 2
    assert re.search(rb"looked \d+ saw [1-9]", said)  # it is not blind: it sees those of its own kind
    assert set(re.sub(rb"looked \d+ saw \d+", b"", said).split(b"\n")) == {b""}


# Input, output, end


def test_status_and_signal_are_told(loop: Loop, compartment: Compartment) -> None:
    assert run(loop, compartment, "busybox", "sh", "-c", "exit 3")[0] == 3
    assert run(loop, compartment, "busybox", "sh", "-c", "kill -9 $$")[0] == -9


def test_input_is_passed_on_and_ends(loop: Loop, compartment: Compartment) -> None:
    for terminal in (False, True):
        program = begin(loop, compartment, "busybox", "tr", "a-z", "A-Z", terminal=terminal)
        program.write(b"hello\n")
        program.write(b"")
        assert b"HELLO" in output(loop, program)
        assert program.status == 0
        program.close()


def test_a_lot_of_output_arrives_whole(loop: Loop, compartment: Compartment) -> None:
    program = begin(loop, compartment, "busybox", "seq", "1", "200000")
    said = output(loop, program)
    program.close()
    assert said == b"".join(b"%d\n" % number for number in range(1, 200_001))


def test_input_that_is_not_read_has_a_limit(loop: Loop, compartment: Compartment) -> None:
    program = begin(loop, compartment, "busybox", "sleep", "1000")
    taken = execution.INPUT_LIMIT // 65536
    for _ in range(taken):
        program.write(b"x" * 65536)
    output(loop, program, lambda _: program.started)
    with pytest.raises(CompartmentRefusal) as caught:
        program.write(b"x" * 65536 * 2)  # more than what a pipe has taken meanwhile
    program.close()
    assert caught.value.code == "input-overflow"


def test_a_terminal_is_of_the_containers_own_devpts(loop: Loop, compartment: Compartment) -> None:
    said = shell(
        loop, compartment, "tty; test -t 0 && test -t 1 && test -t 2; stat -c %t:%T /dev/tty", terminal=True
    )
    assert said.split() == ["/dev/pts/0", "5:0"]


def test_a_program_that_leaves_others_behind_ends_all_the_same(loop: Loop, compartment: Compartment) -> None:
    """Its output stays open in another process, which goes on writing."""
    program = begin(loop, compartment, "busybox", "sh", "-c", "(while :; do echo x; done) & exit 4")
    output(loop, program)
    assert program.status == 4
    program.close()
    assert compartment.running is not None
    for pid in set(compartment.running.cgroup.pids()) - {compartment.running.pid}:
        os.kill(pid, 9)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("moment", ["at once", "running"])
def test_giving_up_ends_the_program_and_all_of_its_group(
    loop: Loop, compartment: Compartment, moment: str, *, terminal: bool
) -> None:
    script = "echo up; sleep 1000 | sleep 1000; true"
    program = begin(loop, compartment, "busybox", "sh", "-c", script, terminal=terminal)
    if moment == "running":
        output(loop, program, lambda said: b"up" in said)
    program.close()
    settle(loop)
    running = compartment.running
    assert running is not None
    wait_for(lambda: running.cgroup.pids() == (running.pid,))


def test_the_compartment_can_end_while_programs_run_in_it(
    bench: Bench, spec: CompartmentSpec, loop: Loop
) -> None:
    with bench.running(spec) as compartment:
        programs = [begin(loop, compartment, "busybox", "sleep", "1000") for _ in range(5)]
        turn_until(loop, lambda: all(program.started for program in programs[:3]))
        compartment.kill()
        settle(loop)
        assert compartment.wait(PATIENCE)
        assert {program.status for program in programs if program.ended} == {-9}
        for program in programs:
            program.close()


def test_nothing_is_left_after_many_programs(loop: Loop, compartment: Compartment) -> None:
    def held() -> tuple[int, str]:
        settle(loop)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), children

    run(loop, compartment, "busybox", "true")
    before = held()
    for _ in range(10):
        run(loop, compartment, "busybox", "true", terminal=True)
        run(loop, compartment, "busybox", "true")
        program = begin(loop, compartment, "nothing")
        output(loop, program)
        program.close()
        begin(loop, compartment, "busybox", "sleep", "1000").close()
    assert held() == before


def test_row34_an_entrant_that_does_not_come_through_is_given_up(
    monkeypatch: pytest.MonkeyPatch, loop: Loop, compartment: Compartment
) -> None:
    """A program frozen before it is executed: nothing waits but whoever asked."""
    monkeypatch.setattr(execution, "ENTER_TIMEOUT", 0.2)
    assert compartment.running is not None
    compartment.running.cgroup.freeze(frozen=True)
    program = begin(loop, compartment, "busybox", "true")
    assert output(loop, program) == b""
    program.close()
    assert program.failure is not None
    compartment.running.cgroup.freeze(frozen=False)


# Freezing and delegation


def test_a_compartment_freezes_and_goes_on(loop: Loop, compartment: Compartment) -> None:
    program = begin(loop, compartment, "busybox", "sh", "-c", "while :; do echo x; sleep 0.01; done")
    output(loop, program, lambda said: b"x" in said)
    watch = compartment.freeze()
    loop.add_reader(watch.fileno(), lambda: None)
    turn_until(loop, lambda: compartment.frozen(watch.read()))
    loop.remove(watch.fileno())
    watch.close()
    while program.read():
        pass
    loop.turn(0.1)
    assert program.read() == b""  # ten times the time that it takes for a line
    with pytest.raises(CompartmentRefusal):
        compartment.freeze()
    compartment.thaw()
    assert b"x" in output(loop, program, lambda said: b"x" in said)
    program.close()


def test_a_frozen_compartment_is_found_again_and_stopped_awake(
    bench: Bench, spec: CompartmentSpec, loop: Loop, compartment: Compartment
) -> None:
    watch = compartment.freeze()
    turn_until(loop, lambda: compartment.frozen(watch.read()))
    watch.close()
    second = Compartment(spec, bench.machine)
    assert second.adopt()
    assert second.state is State.FROZEN
    second.stop(lambda: True)
    running = compartment.running
    assert running is not None
    wait_for(lambda: running.cgroup.events()["frozen"] == 0)
    assert second.running is not None
    os.close(second.running.pidfd)


def test_row25_groups_below_its_own_are_its_own_and_bounded(
    bench: Bench, spec: CompartmentSpec, loop: Loop
) -> None:
    script = (
        "cd /sys/fs/cgroup; mkdir below && echo $$ > below/cgroup.procs && cat /proc/self/cgroup | grep 0::;"
        "echo 5 > cgroup.max.depth; echo 1 > cgroup.freeze; echo 9999 > cgroup.max.descendants;"
        "n=0; while mkdir g$n; do n=$((n + 1)); done; echo made $n; rmdir g*"
    )
    with bench.running(replace(spec, delegated=True)) as compartment:
        status, said = run(loop, compartment, "busybox", "sh", "-c", script)
        settle(loop)
        assert "0::/below" in said
        assert said.count("ermission denied") == 3
        assert f"made {SUBTREE_GROUPS - 1}" in said
    assert status == 0


# Over the control socket


class Served:
    """A control socket for one compartment; the loop runs in a thread of its own."""

    def __init__(self, path: Path, compartment: Compartment) -> None:
        view = ContainerView(
            uuid=UUID, name="test", state=ContainerState.RUNNING, guest_os="exampleos", created=0
        )
        self.device = FakeDevice(compartments={UUID: compartment}, views=[view])
        self.path = path
        self.said: list[str] = []
        loop = self.device.loop
        dispatcher = Dispatcher(self.device, log=self.said.append)
        self.server = ControlServer(
            loop, path, dispatcher, uid=0, gid=0, privileged=True, log=self.said.append
        )
        self._thread = threading.Thread(target=loop.run)
        self._thread.start()

    def client(self) -> ControlClient:
        return ControlClient(self.path, timeout=PATIENCE)

    def close(self) -> None:
        loop = self.device.loop
        loop.stop()
        self._thread.join(PATIENCE)
        self.server.close()
        settle(loop)
        loop.close()


@pytest.fixture
def served(tmp_path: Path, compartment: Compartment) -> Iterator[Served]:
    made = Served(tmp_path / "control", compartment)
    yield made
    made.close()


def request(command: Request.Command.ValueType, *words: str, **fields: object) -> Request:
    made = Request(command=command, container_uuids=[UUID], **fields)  # type: ignore[arg-type]
    if words:
        made.exec_command = words[0]
        made.exec_args.extend(words)
    return made


def replies(client: ControlClient) -> tuple[bytes, Reply]:
    """Return all output and the reply that ends it."""
    said = b""
    while True:
        reply = client.receive()
        if reply.code != Reply.EXEC_OUTPUT:
            return said, reply
        said += reply.exec_output


@pytest.mark.parametrize("terminal", [False, True])
def test_a_conversation_over_the_socket(served: Served, *, terminal: bool) -> None:
    with served.client() as client:
        client.send(request(Request.CONTAINER_EXEC_CMD, "busybox", "sh", exec_pty=terminal))
        for text in ("echo $((6 * 7))\n", "exit 5\n"):
            client.send(request(Request.CONTAINER_EXEC_INPUT, exec_input=text))
        said, end = replies(client)
        assert b"42" in said
        assert (end.code, end.exec_end_reason, end.exec_status) == (Reply.EXEC_END, "exit status 5", 5)
        # The connection serves on, in order.
        assert client.request(Request(command=Request.LIST_CONTAINERS)).code == Reply.CONTAINERS_LIST
        reply = client.request(request(Request.CONTAINER_EXEC_INPUT, exec_input="late"))
        assert (reply.response, reply.refusal.code) == (Reply.CMD_FAILED, "nothing-runs")


def control(served: Served, *words: str) -> list[str]:
    return [sys.executable, "-m", "trustme_init.control.cli.main", "-s", str(served.path), *words]


def test_the_command_passes_input_output_and_status_on(served: Served) -> None:
    done = subprocess.run(
        control(served, "run", "test", "nopty", "busybox", "sh", "-c", "tr a-z A-Z; exit 7"),
        input="h\u00e9llo\n".encode() * 5000,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == "H\u00e9LLO\n".encode() * 5000
    done = subprocess.run(
        control(served, "run", "test", "nopty", "busybox", "sh", "-c", "kill -9 $$"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 128 + 9


def test_the_command_gives_its_terminal_to_the_program_and_takes_it_back(served: Served) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        control(served, "run", "test", "busybox", "sh"), stdin=slave, stdout=slave, stderr=slave
    )
    try:
        os.write(master, b"tty; echo $((40 + 2)); exit 9\n")
        said = b""
        while b"42" not in said:
            assert select.select([master], [], [], PATIENCE)[0], said
            said += os.read(master, 4096)
        assert b"/dev/pts/" in said
        assert process.wait(PATIENCE) == 9
    finally:
        process.kill()
        process.wait()
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_what_else_is_asked_meanwhile_has_its_turn_afterwards(served: Served) -> None:
    with served.client() as client:
        client.send(request(Request.CONTAINER_EXEC_CMD, "busybox", "cat"))
        client.send(Request(command=Request.LIST_CONTAINERS))
        client.send(request(Request.CONTAINER_EXEC_INPUT, exec_input=""))
        # The input stands behind the list, which waits: `cat` never ends, and leaving ends it.
    with served.client() as other:
        assert other.request(Request(command=Request.LIST_CONTAINERS)).code == Reply.CONTAINERS_LIST


def test_row34_a_client_that_does_not_read_delays_nobody_and_its_program_waits(
    served: Served, compartment: Compartment
) -> None:
    with served.client() as slow, served.client() as other:
        slow.send(request(Request.CONTAINER_EXEC_CMD, "busybox", "yes"))
        assert slow.receive().code == Reply.EXEC_OUTPUT
        for _ in range(50):
            assert other.request(Request(command=Request.LIST_CONTAINERS)).code == Reply.CONTAINERS_LIST
        held = sum(client.held for client in served.server.clients)
        assert held < 2 * served.server.limits.queued
    wait_alone(compartment)


def test_row34_a_client_that_leaves_takes_its_program_with_it(
    served: Served, compartment: Compartment
) -> None:
    with served.client() as client:
        client.send(request(Request.CONTAINER_EXEC_CMD, "busybox", "sh", "-c", "echo up; sleep 1000"))
        assert client.receive().exec_output == b"up\n"
    wait_alone(compartment)


def wait_alone(compartment: Compartment) -> None:
    running = compartment.running
    assert running is not None
    wait_for(lambda: running.cgroup.pids() == (running.pid,))


def test_row31_completion_ends_what_provisioning_ran(served: Served) -> None:
    with served.client() as client:
        client.send(request(Request.CONTAINER_EXEC_CMD, "busybox", "sh"))
        client.send(request(Request.CONTAINER_EXEC_INPUT, exec_input="echo up\n"))
        assert client.receive().exec_output == b"up\n"
        served.device.current_mode = Mode.OPERATIONAL
        client.send(request(Request.CONTAINER_EXEC_INPUT, exec_input="touch /escaped; echo again\n"))
        # Not taken as input: it waits for its turn. Any sign of life of the program ends it.
        assert compartment_file(served, "/escaped") is False


def compartment_file(served: Served, name: str) -> bool:
    running = served.device.compartments[UUID].running
    assert running is not None
    time.sleep(0.2)
    return Path(f"/proc/{running.pid}/root{name}").exists()


@pytest.mark.parametrize("case", ["unknown", "none", "two", "frozen"])
def test_row34_there_is_an_answer_where_nothing_can_run(served: Served, case: str) -> None:
    asked = request(Request.CONTAINER_EXEC_CMD, "busybox", "true")
    with served.client() as client:
        if case == "frozen":
            assert client.request(request(Request.CONTAINER_FREEZE)).response == Reply.CMD_OK
        else:
            del asked.container_uuids[:]
            asked.container_uuids.extend({"unknown": ["x"], "none": [], "two": [UUID, UUID]}[case])
        reply = client.request(asked)
        assert (reply.response, reply.refusal.code) == (Reply.CMD_FAILED, "not-running")
        if case == "frozen":
            assert client.request(request(Request.CONTAINER_FREEZE)).response == Reply.CMD_FAILED
            assert client.request(request(Request.CONTAINER_UNFREEZE)).response == Reply.CMD_OK
        reply = client.request(request(Request.CONTAINER_UNFREEZE))
        assert (reply.response, reply.refusal.code) == (Reply.CMD_FAILED, "transition-not-allowed")
