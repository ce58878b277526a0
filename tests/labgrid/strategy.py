# SPDX-License-Identifier: Apache-2.0
"""A labgrid strategy for a board that runs the base system: off, or on with the core container's console."""

from __future__ import annotations

import contextlib
import enum
import socket
import threading
from typing import Any, ClassVar, Final

import attr
from labgrid.factory import target_factory
from labgrid.strategy.common import Strategy, StrategyError, never_retry
from pexpect import TIMEOUT

from trustme_tools.machine.console import Terminal

_CHUNK: Final = 4096
_POLL: Final = 0.05


class Status(enum.Enum):
    """What a board can be."""

    unknown = 0
    off = 1
    on = 2


@target_factory.reg_driver
@attr.s(eq=False)
class TrustmeStrategy(Strategy):  # type: ignore[misc]  # labgrid has no type information
    """Switches the board, and lends its console."""

    bindings: ClassVar = {"power": "PowerProtocol", "console": "ConsoleProtocol"}
    status: Status = attr.ib(default=Status.unknown)

    @never_retry  # type: ignore[untyped-decorator]  # same
    def transition(self, status: str | Status) -> None:
        """Bring the board to a state of Status, by name."""
        wanted = Status[status] if isinstance(status, str) else status
        if wanted is Status.unknown:
            raise StrategyError("nothing leads to unknown")
        if wanted is self.status:
            return
        self.target.activate(self.power)
        if wanted is Status.off:
            self.target.deactivate(self.console)
            self.power.off()
        else:
            self.target.activate(self.console)
            self.power.cycle()
        self.status = wanted

    def terminal(self) -> Terminal:
        """Return the console as `trustme smoke` takes it; the caller closes it."""
        self.target.activate(self.console)
        return LabTerminal(self.console)


class LabTerminal(Terminal):
    """Carries between one of labgrid's console drivers and a socket."""

    def __init__(self, console: Any) -> None:
        ours, self._theirs = socket.socketpair()
        self._theirs.settimeout(_POLL)
        self._console = console
        self._ended = threading.Event()
        self._carrier = threading.Thread(target=self._carry, name="lab-console")
        self._carrier.start()
        super().__init__(ours, self._carrier.is_alive)

    def close(self) -> None:
        """Let go of the console; the driver stays active."""
        super().close()
        self._ended.set()
        self._carrier.join()
        self._theirs.close()

    def _carry(self) -> None:
        # One thread for both directions: drivers are not made for two.
        while not self._ended.is_set():
            with contextlib.suppress(TIMEOUT):
                if data := self._console.read(size=1, timeout=_POLL, max_size=_CHUNK):
                    # Our own side may leave at any time.
                    with contextlib.suppress(BrokenPipeError):
                        self._theirs.sendall(data)
            with contextlib.suppress(TimeoutError):
                if data := self._theirs.recv(_CHUNK):
                    self._console.write(data)
