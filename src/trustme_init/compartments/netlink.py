# SPDX-License-Identifier: Apache-2.0
"""The process that speaks netlink for the manager: pyroute2 takes a quarter of a second to import.

It is forked when the first container asks for more than loopback, closes whatever it inherited, and then
does one thing after the other, in milliseconds. Namespaces come to it as descriptors. It ends when the
manager does.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

from trustme_init.compartments import confine
from trustme_init.compartments.child import block_signals
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.modules import load
from trustme_init.linux.process import CLONE_NEWNET, close_range, setns

if TYPE_CHECKING:
    from pyroute2 import IPRoute

CALL_TIMEOUT: Final = 20.0
"""Seconds: the first call waits for an import, which an emulator makes long."""
_READY: Final = b"ready"
_MODULES: Final = ("veth",)
"""The kernel loads none by itself any more."""
_MESSAGE: Final = 16 * 1024
_NAMESPACES: Final = 2


class NetworkHelper:
    """The manager's end. Not for several threads."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._pid = 0
        self._ready = False

    def warm(self) -> int | None:
        """Make sure that there is a helper; return what is readable as soon as a call will not wait, or None.

        OSError if this process can make no more descriptors or processes.
        """
        if self._socket is None:
            self._start()
        return None if self._ready or self._socket is None else self._socket.fileno()

    def call(self, operation: str, namespaces: Sequence[int], **arguments: object) -> Any:
        """Have one of `_OPERATIONS` done; CompartmentRefusal("network-failed") with the kernel's answer."""
        request = json.dumps({"operation": operation, **arguments}).encode()
        try:
            channel = self._awaited()
            socket.send_fds(channel, [request], list(namespaces))
            reply = channel.recv(_MESSAGE)
        except OSError as exc:
            self.close()
            raise _failed(f"{operation}: {exc.strerror or 'no answer'}") from exc
        if not reply:
            self.close()
            raise _failed(f"{operation}: the network helper has ended")
        answer = json.loads(reply)
        if "failure" in answer:
            raise _failed(f"{operation}: {answer['failure']}")
        return answer["result"]

    def close(self) -> None:
        """End the helper; the next call makes another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._ready = False
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def _awaited(self) -> socket.socket:
        if self._socket is None:
            self._start()
        channel = self._socket
        if channel is None or not (self._ready or channel.recv(_MESSAGE)):
            raise OSError(errno.EPIPE, "the network helper has ended")
        self._ready = True
        return channel

    def _start(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        mask = block_signals()
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _serve(theirs)
        except OSError:
            mine.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        mine.settimeout(CALL_TIMEOUT)
        self._socket = mine


def _failed(evidence: str) -> CompartmentRefusal:
    return CompartmentRefusal(
        "network-failed",
        "an interface of the container cannot be set up",
        evidence=evidence,
        remedy="check the names in its configuration, and that the kernel has virtual interfaces",
    )


# From here on in the helper.


def _serve(channel: socket.socket) -> NoReturn:
    status = 1
    try:
        confine.reset_signals()
        confine.hide_memory()
        close_range(3, channel.fileno() - 1)
        close_range(channel.fileno() + 1)
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        load(_MODULES)
        import pyroute2  # noqa: F401 - what this process is for

        channel.send(_READY)
        while True:
            data, namespaces, _, _ = socket.recv_fds(channel, _MESSAGE, _NAMESPACES)
            if not data:
                break
            channel.send(json.dumps(_answer(data, [own, *namespaces])).encode())
            for fd in namespaces:
                os.close(fd)
        status = 0
    except BaseException:  # noqa: BLE001, S110 - a fork of the manager must never unwind into its code
        pass
    finally:
        os._exit(status)


def _answer(data: bytes, namespaces: list[int]) -> dict[str, Any]:
    from pyroute2.netlink.exceptions import NetlinkError

    request: dict[str, Any] = json.loads(data)
    try:
        return {"result": _OPERATIONS[request.pop("operation")](namespaces, **request)}
    except NetlinkError as exc:
        return {"failure": os.strerror(exc.code)}
    except OSError as exc:
        return {"failure": str(exc.strerror)}
    except (LookupError, TypeError, ValueError) as exc:
        return {"failure": f"{type(exc).__name__}: {exc}"}


@contextmanager
def _inside(own: int, namespace: int) -> Iterator[IPRoute]:
    """Yield netlink of a namespace: a socket belongs for ever to the one that it was made in."""
    from pyroute2 import IPRoute

    setns(namespace, CLONE_NEWNET)
    try:
        route = IPRoute()
    finally:
        setns(own, CLONE_NEWNET)
    try:
        yield route
    finally:
        route.close()


def _pair(
    namespaces: list[int],
    *,
    name: str,
    outer_name: str,
    mac: str | None,
    addresses: list[str] | None,
    prefix: int,
    route: str | None,
) -> bool:
    """Make a pair with one end in each namespace, and bring both ends up."""
    own, inner, outer = namespaces
    peer = {"ifname": name, "net_ns_fd": inner, **({"address": mac} if mac else {})}
    with _inside(own, own) as here:
        # Made where they belong, in one step: there is no moment at which the base system has either.
        here.link("add", ifname=outer_name, kind="veth", net_ns_fd=outer, peer=peer)
    for namespace, interface, address in (
        (outer, outer_name, addresses[0] if addresses else None),
        (inner, name, addresses[1] if addresses else None),
    ):
        with _inside(own, namespace) as there:
            index = there.link_lookup(ifname=interface)[0]
            if address is not None:
                there.addr("add", index=index, address=address, prefixlen=prefix)
            there.link("set", index=index, state="up")
            if route is not None and namespace == inner:
                there.route("add", dst="default", gateway=route)
    return True


def _move_in(namespaces: list[int], *, interface: str) -> bool:
    """Move an interface of the base system, by name or MAC address, into a namespace; False without one."""
    own, inner = namespaces
    with _inside(own, own) as here:
        wanted = {"address": interface.lower()} if ":" in interface else {"ifname": interface}
        found = here.link_lookup(**wanted)
        if not found or found[0] == _LOOPBACK:
            return False
        name = here.link("get", index=found[0])[0].get("ifname")
        here.link("set", index=found[0], net_ns_fd=inner)
    with _inside(own, inner) as there:
        there.link("set", index=there.link_lookup(ifname=name)[0], state="up")
    return True


def _move_out(namespaces: list[int], *, interface: str) -> bool:
    """Move an interface of a namespace back to the base system; False if it has none of this name."""
    own, inner = namespaces
    with _inside(own, inner) as there:
        found = there.link_lookup(ifname=interface)
        if not found or found[0] == _LOOPBACK:
            return False
        there.link("set", index=found[0], net_ns_fd=own)
    return True


_LOOPBACK: Final = 1
_OPERATIONS: Final[dict[str, Callable[..., bool]]] = {
    "pair": _pair,
    "move-in": _move_in,
    "move-out": _move_out,
}
