# SPDX-License-Identifier: Apache-2.0
"""Simulated devices: virtual machines with a disk, a TPM and firmware variables of their own each."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from trustme_tools.errors import ToolError
from trustme_tools.machine.console import Terminal
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.vm import VirtualMachine
from trustme_tools.provision.transport import unreachable

OFF_TIME: Final = 90.0
"""Seconds until a machine that reboots has ended: it is started without QEMU's own reboot."""
SHELL_TIME: Final = 30.0


class SimulatedDevice:
    """One machine, switched on when its console is first asked for, and again after each reboot.

    Use as a context manager in one thread: the machine ends with it.
    """

    def __init__(self, name: str, disk: Path, firmware: Firmware, state: Path) -> None:
        self._name = name
        self._disk = disk
        self._firmware = firmware
        self._state = state
        self._machine: VirtualMachine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._machine is not None:
            self._machine.close()

    def adopt(self, machine: VirtualMachine) -> None:
        """Take over a machine that runs already; it keeps its things in the same `state`."""
        self._machine = machine

    @property
    def machine(self) -> VirtualMachine:
        """The machine as it is now; ToolError("machine-off") before it was first switched on."""
        if self._machine is None:
            raise ToolError("the machine was never switched on", code="machine-off")
        return self._machine

    def terminal(self) -> Terminal:
        """Return the core container's console, booting the machine first if it is off.

        ToolError("unreachable"), once, if it has switched itself off since it was last asked for: a reboot
        must not be missed. "not-booted" if it does not come up.
        """
        machine = self._machine
        if machine is not None and not machine.running:
            machine.close()
            self._machine = None
            raise unreachable("the machine has switched itself off")
        if machine is None:
            machine = self._boot()
        return Terminal(machine.core_socket, lambda: machine.running)

    def switch_off(self) -> None:
        """Reboot the device in an orderly way, which ends the machine; end it hard if it does not."""
        if self._machine is None or not self._machine.running:
            return
        terminal = self.terminal()
        try:
            terminal.send("\x03\ncontrol reboot\n")
            self._machine.wait_off(OFF_TIME)
        except ToolError:
            self._machine.cut_power()
        finally:
            terminal.close()

    def _boot(self) -> VirtualMachine:
        machine = self._machine = VirtualMachine(
            self._disk, self._firmware, state=self._state, name=self._name
        )
        machine.start()
        outcome = machine.wait_boot()
        if outcome.kind != "running":
            raise ToolError(
                "the simulated device did not boot",
                "look at its boot console: `trustme run IMAGE_DIR --console`",
                code="not-booted",
                evidence=f"{outcome.kind} {outcome.detail}",
            )
        self._wait_for_shell(machine)
        return machine

    @staticmethod
    def _wait_for_shell(machine: VirtualMachine) -> None:
        """Return when the core's shell has said something: what is typed before is lost."""
        deadline = time.monotonic() + SHELL_TIME
        log = machine.work / "core.log"
        while time.monotonic() < deadline and machine.running:
            if b"#" in (log.read_bytes() if log.exists() else b""):
                return
            time.sleep(0.1)
