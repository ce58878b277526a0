# SPDX-License-Identifier: Apache-2.0
"""Run a program inside a compartment that is up: the processes' side, and what the manager holds of them.

Two processes again, for the reasons of `child.py`: the *entrant* joins the compartment's namespaces and forks
the *program* into its PID namespace. The compartment is awake and hostile meanwhile:

- Both are undumpable until exec: what they still are (the manager's memory, its /proc entries) is closed to
  it.
- Whatever the manager holds is closed before the namespaces are entered, not by exec.
- Nothing is imported after the root directory has changed: it would come from the compartment.
- The terminal is of the compartment's own devpts, and its other end is found through the descriptor.
- The manager never waits: from the program on, all is as slow as the compartment makes it.
- The entrant stays outside the compartment's cgroup, so that nothing in there can end it: were the program
  left without anybody to reap it, the compartment's init could never end.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import signal
import socket
import termios
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from trustme_init.compartments import confine
from trustme_init.compartments.child import NAMESPACES, block_signals
from trustme_init.compartments.report import Sender, words_of
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.files import RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2
from trustme_init.linux.process import (
    CLONE_NEWTIME,
    CLOSE_RANGE_CLOEXEC,
    close_range,
    setns,
)

if TYPE_CHECKING:
    from trustme_init.compartments.spec import CompartmentSpec
    from trustme_init.compartments.start import Running

DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WORDS_LIMIT: Final = 128 * 1024
"""Bytes of a command and its arguments; the kernel takes no longer word either."""
_TIOCGPTPEER: Final = 0x5441
_TIOCSPTLCK: Final = 0x40045431
_MESSAGE: Final = 4096
_FAILED: Final = 127


@dataclass(slots=True)
class Entry:
    """A program that was asked for. The owner closes what is left of it (`close`) and reaps both processes.

    `channel` is readable until both have come as far as exec; call `advance` each time. The program is the
    owner's child only when the entrant has ended and was reaped.
    """

    channel: socket.socket
    entrant: int
    """pidfd."""
    input: int | None
    """Write end of a pipe, or the terminal; non-blocking, like `output`."""
    output: int | None
    program: int | None = None
    """pidfd, once it exists."""
    pid: int = 0
    """Of the program; also its process group, for as long as `program` is not reaped."""

    def advance(self) -> bool:
        """Take what the processes say; True when the program was executed.

        CompartmentRefusal ("step-failed", "program-missing", …) when it was not.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self.channel, _MESSAGE, 1)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, fds = b"", []
        try:
            words = words_of(data.rstrip(b"\n")) if data else []
            if words[:1] == ["program"]:
                self._take_program(int(words[1]), fds)
                return False
        finally:
            for fd in fds:
                os.close(fd)
        if self.program is None:
            raise _refusal("ended before the program was there")
        return True

    def _take_program(self, pid: int, fds: list[int]) -> None:
        # The entrant has not reaped it and waits for us, so that the number is nobody else's.
        self.program = os.pidfd_open(pid)
        self.pid = pid
        if fds:
            terminal = fds.pop()
            os.set_inheritable(terminal, False)
            os.set_blocking(terminal, False)
            self.input = self.output = terminal
        with suppress(OSError):
            self.channel.send(b".", socket.MSG_NOSIGNAL)

    def kill(self) -> None:
        """SIGKILL to the program, which must not have been reaped, and to its process group.

        Before there is one, `close` is enough: the entrant then takes back what it has forked.
        """
        if self.program is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.program, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def close_input(self) -> None:
        """Let a program without a terminal see the end of its input."""
        if self.input is not None and self.input != self.output:
            os.close(self.input)
            self.input = None

    def close(self) -> None:
        """Close channel, input and output; a terminal's session gets SIGHUP. Not the pidfds."""
        self.channel.close()
        for fd in {self.input, self.output} - {None}:
            os.close(fd)  # type: ignore[arg-type]  # None was taken out
        self.input = self.output = None


@dataclass(frozen=True, slots=True)
class _Order:
    """What the entrant is to do."""

    init: int
    """pidfd of the compartment's init."""
    group: Path
    words: tuple[str, ...]
    environment: dict[str, str]
    terminal: bool
    spec: CompartmentSpec


def enter(
    running: Running, spec: CompartmentSpec, command: str, arguments: Sequence[str], *, terminal: bool
) -> Entry:
    """Begin to run `command` (looked for in PATH if it has no slash) with `arguments`, its own name first.

    CompartmentRefusal("command-malformed") for what no program can be called with; OSError if this process
    can make no more descriptors or processes. Everything else is said by `Entry.advance`.
    """
    words = (command, *(arguments or (command,)))
    if not command or any("\0" in word for word in words) or sum(map(len, words)) > WORDS_LIMIT:
        raise CompartmentRefusal(
            "command-malformed",
            "this cannot be run as a program",
            evidence=ascii(command[:64]),
            remedy="name a program, without NUL, and at most 128 KiB with its arguments",
        )
    order = _Order(
        init=running.pidfd,
        group=running.cgroup.path,
        words=words,
        environment=_environment(spec, terminal=terminal),
        terminal=terminal,
        spec=spec,
    )
    confine.check_names(spec.capabilities)  # imports what the children must not import any more

    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    mine.setblocking(False)
    pipes = [] if terminal else _pipes(spec.uid_base)
    mask = block_signals()
    try:
        pid = os.fork()
        if pid == 0:
            stdin, stdout = (pipes[0], pipes[3]) if pipes else (-1, -1)
            _enter(order, theirs, stdin, stdout)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        for fd in (pipes[0], pipes[3]) if pipes else ():
            os.close(fd)
    return Entry(
        mine,
        os.pidfd_open(pid),
        input=pipes[1] if pipes else None,
        output=pipes[2] if pipes else None,
    )


def _environment(spec: CompartmentSpec, *, terminal: bool) -> dict[str, str]:
    """Return init's own environment, with what a command cannot do without."""
    given = dict(entry.split("=", 1) for entry in spec.env)
    return {"PATH": DEFAULT_PATH, **({"TERM": "xterm"} if terminal else {}), **given}


def _pipes(owner: int) -> list[int]:
    """Return stdin's read and write end and stdout's: pipes that root of the compartment may open again."""
    ends = [*os.pipe2(os.O_CLOEXEC), *os.pipe2(os.O_CLOEXEC)]
    for fd in (ends[1], ends[2]):
        os.set_blocking(fd, False)
    for fd in ends:
        os.fchown(fd, owner, owner)
    return ends


# From here on in the children.


def _enter(order: _Order, channel: socket.socket, stdin: int, stdout: int) -> NoReturn:
    report = Sender(channel.fileno())
    status = _FAILED
    try:
        confine.reset_signals()
        confine.hide_memory()
        report.step = "descriptors"
        keep = {channel.fileno(), order.init} | ({stdin, stdout} - {-1})
        _close_all_but(keep)
        report.step = "cgroup"
        Path("/proc/self/oom_score_adj").write_text("0")
        groups = _open_groups(order)
        report.step = "namespaces"
        setns(order.init, NAMESPACES | (CLONE_NEWTIME if order.spec.time_namespace else 0))
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        confine.hide_memory()
        os.chdir("/")
        report.step = "terminal"
        master = -1
        if order.terminal:
            master, stdin = _open_terminal()
            stdout = stdin
        report.step = "fork"
        pid = os.fork()
        if pid == 0:
            if master >= 0:
                os.close(master)
            _become(order, report, groups, (stdin, stdout))
        _hand_over(channel, pid, master)
        status = 0
    except BaseException as exc:  # noqa: BLE001 - a fork of the manager must never unwind into its code
        _tell(report, exc)
    finally:
        os._exit(status)


def _hand_over(channel: socket.socket, pid: int, master: int) -> None:
    """Give the program to the manager; it must have a pidfd of it before the number can be another's."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))] if master >= 0 else []
    taken = b""
    with suppress(OSError):
        channel.sendmsg([f"program\x1f{pid}".encode()], ancillary, socket.MSG_NOSIGNAL)
        taken = channel.recv(1)
    if not taken:  # nobody wants it any more
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _tell(report: Sender, exc: BaseException) -> None:
    with suppress(OSError):  # else the manager is gone, or does not want to know any more
        report.failed(exc)


def _close_all_but(keep: set[int]) -> None:
    first = 0
    for fd in sorted(keep):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1
    close_range(first)
    # The numbers 0-2 must not be free: the next open would get one of them.
    for number in range(3):
        if number not in keep:
            os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


def _open_groups(order: _Order) -> list[int]:
    """Open where the program is to be put: the compartment's cgroup, or init's where that was divided."""
    groups = [order.group, *([_group_of_init(order)] if order.spec.delegated else [])]
    return [os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for group in groups]


def _group_of_init(order: _Order) -> Path:
    """Return the group of init, which must not be outside the compartment's."""
    numbers = Path(f"/proc/self/fdinfo/{order.init}").read_text()
    pid = next(line.split()[1] for line in numbers.splitlines() if line.startswith("Pid:"))
    lines = Path(f"/proc/{int(pid)}/cgroup").read_text().splitlines()
    place = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    _, found, below = f"{place}/".partition(f"/{order.group.name}/")
    if not found or ".." in below.split("/"):
        raise OSError(errno.EXDEV, "init is outside its compartment's group", place)
    return order.group / below


def _join(groups: list[int]) -> None:
    for at, group in enumerate(groups):
        try:
            os.write(group, b"0")
        except OSError as exc:
            # No process may be in a group whose controllers are given to groups below it.
            if exc.errno != errno.EBUSY or at + 1 == len(groups):
                raise
        else:
            return


def _open_terminal() -> tuple[int, int]:
    """Open a new terminal of the compartment's own devpts; return its master and its other end."""
    resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    master = openat2("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY, resolve=resolve)
    fcntl.ioctl(master, _TIOCSPTLCK, bytes(4))
    # By the descriptor, not by a path below /dev, which is the compartment's to arrange.
    return master, fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)


def _become(order: _Order, report: Sender, groups: list[int], standard: tuple[int, int]) -> NoReturn:
    stdin, stdout = standard
    try:
        report.step = "cgroup"
        _join(groups)
        report.step = "session"
        confine.new_session()
        if order.terminal:
            fcntl.ioctl(stdin, termios.TIOCSCTTY, 0)
        # Copies above 2 first: a source may itself be one of the numbers that are about to be replaced.
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (stdin, stdout, stdout)]
        for number, fd in enumerate(copies):
            os.dup2(fd, number)
        report.step = "confine"
        confine.limit_resources()
        confine.drop_privileges(order.spec.capabilities, no_new_privs=order.spec.no_new_privs)
        report.step = "call filter"
        confine.filter_calls(strict=order.spec.strict_calls)
        report.step = "exec"
        close_range(3, flags=CLOSE_RANGE_CLOEXEC)
        _execute(order.words[0], order.words[1:], order.environment)
    except BaseException as exc:  # noqa: BLE001 - a fork of the manager must never unwind into its code
        _tell(report, exc)
    finally:
        os._exit(_FAILED)


def _execute(command: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    places = [""] if "/" in command else [place for place in environment["PATH"].split(":") if place]
    failure: OSError | None = None
    for place in places:
        path = f"{place}/{command}" if place else command
        try:
            # Not a link out of the compartment, above all not to what this process itself still executes. The
            # compartment can swap the file afterwards and win what it has anyway: its own rights.
            os.close(openat2(path, os.O_PATH, resolve=RESOLVE_NO_MAGICLINKS))
            os.execve(path, arguments, environment)  # noqa: S606 - what all of this is for
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            failure = failure or exc
    if failure is not None:
        raise failure
    raise CompartmentRefusal(
        "program-missing", "there is no such program in the container", evidence=ascii(command[:64])
    )


def _refusal(evidence: str) -> CompartmentRefusal:
    return CompartmentRefusal(
        "step-failed", "the program's start was cut short", evidence=evidence, remedy="try again"
    )
