# SPDX-License-Identifier: Apache-2.0
"""Kernel uevents: how the kernel says that a device appeared (lib/kobject_uevent.c).

The usual way to use them without a race is `wait_until`: subscribe first, look second, wait third.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

NETLINK_KOBJECT_UEVENT: Final = 15
KERNEL_GROUP: Final = 1
"""Multicast group of the kernel; group 2 carries what a udev daemon says, and is not for us."""
SO_RCVBUFFORCE: Final = 33

MESSAGE_LIMIT: Final = 16 * 1024
"""Bytes of one message; the kernel's own limit is a 2 KiB environment after a device path."""
RECEIVE_BUFFER: Final = 4 * 1024 * 1024
"""Bytes queued before the kernel drops: cold-plugging a large machine makes some thousands of messages."""
_UCRED: Final = struct.Struct("=iII")

T = TypeVar("T")


class Uevent(NamedTuple):
    """One message of the kernel."""

    action: str
    devpath: str
    """Path below /sys."""
    subsystem: str
    env: Mapping[str, str]
    """Every KEY=VALUE, the three above included."""


def parse(message: bytes) -> Uevent:
    r"""Read `ACTION@DEVPATH\0KEY=VALUE\0...`; ValueError if it is anything else.

    The head and the ACTION and DEVPATH keys must agree, no key may come twice, and SUBSYSTEM must be there:
    the kernel always sends all of it.
    """
    if len(message) > MESSAGE_LIMIT:
        raise ValueError(f"uevent of {len(message)} bytes, at most {MESSAGE_LIMIT}")
    head, *fields = message.split(b"\0")
    if fields and not fields[-1]:
        fields.pop()
    env: dict[str, str] = {}
    for field in fields:
        key, separator, value = field.decode("utf-8", "backslashreplace").partition("=")
        if not separator or not key or key in env:
            raise ValueError(f"uevent field {field!r} is malformed or repeated")
        env[key] = value
    action, separator, devpath = head.decode("utf-8", "backslashreplace").partition("@")
    if not separator or (env.get("ACTION"), env.get("DEVPATH")) != (action, devpath):
        raise ValueError(f"uevent head {head!r} does not match its fields")
    if "SUBSYSTEM" not in env:
        raise ValueError("uevent without SUBSYSTEM")
    return Uevent(action, devpath, env["SUBSYSTEM"], env)


class UeventSocket:
    """A subscription to the kernel's uevents. Raises OSError where there is no such netlink family."""

    def __init__(self) -> None:
        flags = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, flags, NETLINK_KOBJECT_UEVENT)
        try:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            except PermissionError:  # without CAP_NET_ADMIN the system's own limit applies
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.bind((0, KERNEL_GROUP))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Descriptor to poll for reading."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def read(self, timeout: float = 0.0) -> Uevent | None:
        """Return the next event of the kernel, waiting at most `timeout` seconds; else None.

        None means "nothing to say, look for yourself": the time is up, the kernel had to drop events, or the
        message was not the kernel's or not well-formed.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return self._receive() if poll.poll(max(0.0, timeout) * 1000) else None

    def _receive(self) -> Uevent | None:
        try:
            message, ancillary, flags, sender = self._socket.recvmsg(
                MESSAGE_LIMIT, socket.CMSG_SPACE(_UCRED.size)
            )
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise
            return None
        if flags & socket.MSG_TRUNC or not is_from_kernel(sender, ancillary):
            return None
        try:
            return parse(message)
        except ValueError:
            return None


def is_from_kernel(sender: tuple[int, int], ancillary: list[tuple[int, int, bytes]]) -> bool:
    """Judge a netlink message by its sender (port, groups) and SCM_CREDENTIALS.

    Any process may send to a netlink socket's port; only the kernel itself has port 0 and process 0.
    """
    port, groups = sender
    credentials = [
        data
        for level, kind, data in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(data) == _UCRED.size
    ]
    return (
        port == 0
        and groups == 1 << (KERNEL_GROUP - 1)
        and len(credentials) == 1
        and _UCRED.unpack(credentials[0])[0] == 0
    )


def wait_until(look: Callable[[], T | None], timeout: float, *, subsystem: str | None = None) -> T | None:
    """Return what `look` finds: now, or after some uevent (of `subsystem`) within `timeout` seconds, or None.

    The subscription exists before the first look, so nothing falls between looking and waiting. Raises
    OSError where uevents cannot be had, and whatever `look` raises.
    """
    deadline = time.monotonic() + timeout
    with UeventSocket() as events:
        while True:
            found = look()
            left = deadline - time.monotonic()
            if found is not None or left <= 0:
                return found
            event = events.read(left)
            while event is not None and subsystem not in {None, event.subsystem}:
                event = events.read(deadline - time.monotonic())


def trigger(sys_device: Path, action: str = "add") -> None:
    """Ask the kernel to repeat a device's event: what `udevadm trigger` does. Raises OSError."""
    fd = os.open(sys_device / "uevent", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, action.encode())
    finally:
        os.close(fd)
