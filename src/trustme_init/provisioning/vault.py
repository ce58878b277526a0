# SPDX-License-Identifier: Apache-2.0
"""The vault: the one process that holds secrets and changes what provisioning has set up.

A child of the manager, forked when it is first needed and ended when it has been idle. Rules:

- One request at a time, in the order they came: two operators at once cannot mix their changes.
- What takes long (key derivation, a TPM chip) happens here; the manager's loop never waits for it.
- PINs and keys are in this process's memory only, which cannot be dumped or traced; the manager passes a
  request on and forgets it. The TPM's and the certificates' parsers run here, not in the manager.
- A request that fails in a way nobody foresaw is a refusal without the exception's text, which might quote
  a secret. A child that dies takes its request with it: every change is old state or new state anyway.

The two speak over a SOCK_SEQPACKET pair: JSON, bytes as base64, at most MESSAGE_LIMIT bytes a message.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol

from trustme_init.errors import DeviceRefusal, Refusal
from trustme_init.linux.process import close_range, set_dumpable

MESSAGE_LIMIT: Final = 512 * 1024
"""Bytes; the largest request is a GuestOS configuration of 256 KiB with its chain, in base64."""
_SO_SNDBUFFORCE: Final = 32
"""include/uapi/asm-generic/socket.h; for root, past the system's own bound."""
REQUEST_TIMEOUT: Final = 180.0
"""Seconds for one request. An RSA key takes a slow TPM chip up to a minute."""
IDLE_TIME: Final = 30.0
"""Seconds without a request after which the child ends and its memory is free again."""

_FIRST: Final = 3
"""The first descriptor that is not standard input, output or error."""

Arguments = Mapping[str, str | bytes]
Done = Callable[["Outcome"], None]


class Service(Protocol):
    """What runs in the child: `provisioning.service.ProvisioningService`."""

    def handle(self, operation: str, arguments: Arguments) -> dict[str, Any]:
        """Do one thing and return what there is to say; Refusal when it is not done."""
        ...


class Scheduler(Protocol):
    """The part of the manager's loop that is needed here."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Run `callback` whenever `fd` is readable."""
        ...

    def remove_reader(self, fd: int) -> None:
        """Stop that."""
        ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> Cancellable:
        """Run `callback` once, `delay` seconds from now."""
        ...


class Cancellable(Protocol):
    """A pending call."""

    def cancel(self) -> None:
        """Never run it."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request: a result, or why there is none."""

    result: Mapping[str, Any]
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    operation: str
    message: bytes
    done: Done


class Vault:
    """The child as the manager sees it. Belongs to the thread of the loop."""

    def __init__(self, scheduler: Scheduler, make_service: Callable[[], Service]) -> None:
        self._scheduler = scheduler
        self._make_service = make_service
        self._socket: socket.socket | None = None
        self._pid = 0
        self._pidfd = -1
        self._queue: deque[_Request] = deque()
        self._current: _Request | None = None
        self._timer: Cancellable | None = None

    def submit(self, operation: str, arguments: Arguments, done: Done) -> None:
        """Have `operation` done; `done` is called from the loop with what became of it, exactly once."""
        message = json.dumps(
            {
                "operation": operation,
                "text": {name: value for name, value in arguments.items() if isinstance(value, str)},
                "bytes": {
                    name: base64.b64encode(value).decode()
                    for name, value in arguments.items()
                    if isinstance(value, bytes)
                },
            }
        ).encode()
        if len(message) > MESSAGE_LIMIT:
            done(_refused("request-too-large", "what was sent is larger than anything that can be meant"))
            return
        self._queue.append(_Request(operation, message, done))
        self._next()

    @property
    def pid(self) -> int:
        """The child's process, 0 when there is none."""
        return self._pid

    def close(self) -> None:
        """End the child. What it was doing is done or not done; whoever waits is told."""
        self._end_child()
        waiting = [self._current, *self._queue]
        self._current = None
        self._queue.clear()
        for request in waiting:
            if request is not None:
                request.done(_refused("vault-ended", "the device is going down"))

    def _next(self) -> None:
        if self._current is not None or not self._queue:
            return
        self._set_timer(None)
        request = self._current = self._queue.popleft()
        try:
            if self._socket is None:
                self._socket = self._start()
            # One message is outstanding at most, and it fits the buffer: this never waits.
            self._socket.send(request.message)
        except OSError as exc:
            self._finish(
                _refused("vault-ended", "the process that holds the secrets is gone", str(exc.strerror))
            )
            return
        self._set_timer(REQUEST_TIMEOUT)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        for side in (ours, theirs):
            side.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * MESSAGE_LIMIT)
        # A handler of the manager must not run in the child.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _become_vault(theirs, self._make_service)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        ours.setblocking(False)
        self._scheduler.add_reader(ours.fileno(), self._readable)
        self._reap_later(self._pid)
        return ours

    def _reap_later(self, pid: int) -> None:
        """Reap a child whenever it ends: inside a TPM driver, that is when the command does."""
        pidfd = self._pidfd = os.pidfd_open(pid)

        def reap() -> None:
            self._scheduler.remove_reader(pidfd)
            os.close(pidfd)
            if self._pidfd == pidfd:
                self._pidfd, self._pid = -1, 0
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

        self._scheduler.add_reader(pidfd, reap)

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            message = self._socket.recv(MESSAGE_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._end_child()
            if self._current is not None:
                self._finish(_refused("vault-ended", "the process that holds the secrets ended"))
            return
        self._finish(_decode(message))

    def _finish(self, outcome: Outcome) -> None:
        request, self._current = self._current, None
        self._set_timer(IDLE_TIME)
        if request is not None:
            request.done(outcome)
        self._next()

    def _set_timer(self, delay: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if delay is None else self._scheduler.call_later(delay, self._expired)

    def _expired(self) -> None:
        self._end_child()
        if self._current is not None:
            self._finish(
                _refused(
                    "vault-timed-out",
                    "it took too long and was given up",
                    f"{self._current.operation}: more than {REQUEST_TIMEOUT:.0f} s",
                )
            )

    def _end_child(self) -> None:
        self._set_timer(None)
        if self._socket is None:
            return
        self._scheduler.remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._pidfd, self._pid = -1, 0  # reaped when it has ended


def _refused(code: str, cause: str, evidence: str = "") -> Outcome:
    return Outcome(
        {},
        DeviceRefusal(code, cause, evidence=evidence, remedy="try again; read the device's log if it stays"),
    )


def _decode(message: bytes) -> Outcome:
    try:
        document = json.loads(message)
        if "refusal" not in document:
            return Outcome(document["result"])
        said = document["refusal"]
        refusal = Refusal(said["code"], said["cause"], evidence=said["evidence"], remedy=said["remedy"])
    except (ValueError, KeyError, TypeError) as exc:
        return _refused("vault-malformed-reply", "the vault's answer makes no sense", type(exc).__name__)
    return Outcome({}, refusal)


# The child.


def _become_vault(connection: socket.socket, make_service: Callable[[], Service]) -> NoReturn:
    status = 1
    try:
        set_dumpable(enabled=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # The manager's sockets, loop and process descriptors are none of our business.
        kept = connection.fileno()
        if kept > _FIRST:
            close_range(_FIRST, kept - 1)
        close_range(kept + 1)
        connection.setblocking(True)
        serve(connection, make_service())
        status = 0
    finally:
        os._exit(status)


def serve(connection: socket.socket, service: Service) -> None:
    """Answer requests until the manager closes its end."""
    while message := connection.recv(MESSAGE_LIMIT):
        connection.send(json.dumps(_answer(service, message)).encode())


def _answer(service: Service, message: bytes) -> dict[str, Any]:
    try:
        request = json.loads(message)
        arguments: dict[str, str | bytes] = dict(request["text"])
        arguments |= {name: base64.b64decode(value) for name, value in request["bytes"].items()}
        return {"result": service.handle(request["operation"], arguments)}
    except Refusal as refusal:
        return {"refusal": refusal.as_dict()}
    except Exception as exc:  # noqa: BLE001 - see the rules above
        import traceback

        last = traceback.extract_tb(exc.__traceback__)[-1]
        return {
            "refusal": {
                "code": "vault-failed",
                "cause": "the device met something that it was not made for",
                "evidence": f"{type(exc).__name__} in {last.name}, line {last.lineno}",
                "remedy": "report this with the log of this boot",
            }
        }
