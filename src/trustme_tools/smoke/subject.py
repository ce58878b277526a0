# SPDX-License-Identifier: Apache-2.0
"""What is smoke-tested: a virtual machine, or a board whose core console a program or a socket leads to."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from trustme_tools.errors import ToolError
from trustme_tools.machine.console import Terminal, plain
from trustme_tools.machine.firmware import Firmware
from trustme_tools.provision.simulate import OFF_TIME, SimulatedDevice

TAIL: Final = 40
"""Lines of a console that are shown when something failed."""
ANSWER_TIME: Final = 10.0
RETRY: Final = 1.0
END_TIME: Final = 3.0
QUIET: Final = 0.2
INTERRUPT: Final = "\x03\n"
BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Subject(Protocol):
    """A device that has not been provisioned, behind its consoles."""

    def switch_on(self) -> str:
        """Return, in words, when the core container runs; ToolError if it does not come to that."""
        ...

    def terminal(self) -> Terminal:
        """Open the core container's console. ToolError("unreachable"), OSError."""
        ...

    def tail(self) -> str:
        """Return the end of what its consoles showed."""
        ...

    def switch_off(self) -> str:
        """Bring the device down if it is ours to bring down; ToolError if it does not go."""
        ...


class Virtual:
    """A virtual machine with Secure Boot and a TPM. Use as a context manager."""

    def __init__(self, disk: Path, firmware: Firmware, state: Path) -> None:
        self._device = SimulatedDevice("smoke", disk, firmware, state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.__exit__(kind, value, trace)

    def switch_on(self) -> str:
        """See Subject."""
        self._device.terminal().close()
        return f"core container RUNNING ({self._device.machine.accelerator.upper()}, Secure Boot, TPM)"

    def terminal(self) -> Terminal:
        """See Subject; boots the machine again where it has rebooted."""
        return self._device.terminal()

    def tail(self) -> str:
        """See Subject."""
        try:
            machine = self._device.machine
        except ToolError:
            return ""
        # Before the first line of ours it is the firmware that says why.
        consoles = [machine.boot.text] if "trustme:" in machine.boot.text else [machine.serial.text]
        core = machine.work / "core.log"
        consoles.append(core.read_text(errors="replace") if core.exists() else "")
        return "\n".join(last_lines(each) for each in consoles)

    def switch_off(self) -> str:
        """See Subject."""
        machine = self._device.machine
        terminal = self._device.terminal()
        try:
            terminal.send("\x03\ncontrol reboot\n")
            machine.wait_off(OFF_TIME)
        finally:
            terminal.close()
        return "went down by itself"


class Board:
    """A real device that is on, or comes on: `connect` opens its core console anew each time."""

    def __init__(self, connect: Callable[[], Terminal], *, timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout
        self._last: Terminal | None = None

    def switch_on(self) -> str:
        """See Subject: wait until a shell answers, which is the core container's."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                boot_id(self)
            except (ToolError, OSError) as exc:
                if time.monotonic() > deadline:
                    raise ToolError(
                        "no shell answers on the core console",
                        "see that the device is on, and that the way leads to the core container's console",
                        code="not-booted",
                        evidence=str(exc),
                    ) from exc
                time.sleep(RETRY)
            else:
                return "core container's shell answers"

    def terminal(self) -> Terminal:
        """See Subject."""
        self._last = self._connect()
        return self._last

    def tail(self) -> str:
        """See Subject."""
        return last_lines(self._last.text) if self._last is not None else ""

    def switch_off(self) -> str:
        """See Subject: whoever switched it on does."""
        return "left on"


class ProgramTerminal(Terminal):
    """A console behind a program's standard input and output, like `socat - /dev/ttyUSB0,raw`."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        super().__init__(ours, lambda: self._process.poll() is None)

    def close(self) -> None:
        """End the program."""
        super().close()
        self._process.terminate()
        try:
            self._process.wait(END_TIME)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def boot_id(subject: Subject) -> str:
    """Return what tells this boot of the device from any other (random(4)).

    ToolError: "no-answer", "bad-answer", and as `Subject.terminal`; OSError.
    """
    terminal = subject.terminal()
    try:
        terminal.send(INTERRUPT)
        terminal.drain(QUIET)
        answer = terminal.run(f"cat {BOOT_ID}", ANSWER_TIME)
    finally:
        terminal.close()
    if answer.code or not (match := _UUID.search(answer.output)):
        raise ToolError(f"the core's shell cannot read {BOOT_ID}", code="bad-answer", evidence=answer.output)
    return match[0]


def last_lines(text: str) -> str:
    """Return the end of what a console showed."""
    return "\n".join(plain(text).strip().splitlines()[-TAIL:])
