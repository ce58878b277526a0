# SPDX-License-Identifier: Apache-2.0
"""The service socket inside a container (interop section 8, c_service): its init reports, we answer and push.

The longest connected client gets the events. After the manager restarts, the service connects again; a
SHUTDOWN that found nobody is delivered to the first who comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from trustme_init.control.framing import SERVICE_LIMIT
from trustme_init.control.loop import Loop
from trustme_init.control.throttle import Log
from trustme_init.control.transport import Answer, Connection, FrameServer, Limits
from trustme_init.errors import ControlRefusal
from trustme_init.proto.c_service_pb2 import CmldToServiceMessage as ToService
from trustme_init.proto.c_service_pb2 import ServiceToCmldMessage as FromService

SERVICE_LIMITS: Final = Limits(
    clients=8,
    clients_per_process=8,
    request=SERVICE_LIMIT,
    held=8 * SERVICE_LIMIT,
    queued=SERVICE_LIMIT,
    idle_time=None,  # a service stays connected for the container's whole life
    keep_first=True,
)


@dataclass(frozen=True, slots=True)
class ServiceCallbacks:
    """What a container's service may say and ask. Short and non-blocking, like every callback of the loop."""

    boot_completed: Callable[[], None]
    """May come more than once: a service that connects again says so again."""
    name: Callable[[], str]
    """Host name for the container."""
    dns: Callable[[], str]
    """DNS server for the container, may be empty."""


class ServiceServer(FrameServer):
    """Serves one container's service at `path`, mode 0600, owned by the container's root."""

    def __init__(
        self,
        loop: Loop,
        path: Path,
        callbacks: ServiceCallbacks,
        *,
        uid: int,
        gid: int,
        log: Log,
        limits: Limits = SERVICE_LIMITS,
    ) -> None:
        self._callbacks = callbacks
        self._shutdown_owed = False
        super().__init__(loop, path, uid=uid, gid=gid, limits=limits, log=log)

    def shutdown(self) -> bool:
        """Ask the container to shut down; False when nobody is connected (the first who connects is told)."""
        self._shutdown_owed = not any(_push_shutdown(client) for client in self.clients[:1])
        return not self._shutdown_owed

    def connected(self, connection: Connection) -> None:
        """Tell a late service what it missed."""
        if self._shutdown_owed:
            self._shutdown_owed = not _push_shutdown(connection)

    def respond(self, connection: Connection, body: bytes) -> Answer:  # noqa: ARG002 - same for every client
        """Answer one message; what is not a message closes the connection, an unknown code is passed over."""
        try:
            message = FromService.FromString(body)
        except DecodeError as exc:
            raise ControlRefusal("request-malformed", "a service message is not protobuf") from exc
        code = message.code if message.HasField("code") else 0
        if code == FromService.BOOT_COMPLETED:
            self._callbacks.boot_completed()
        elif code == FromService.CONTAINER_CFG_NAME_REQ:
            yield ToService(
                code=ToService.CONTAINER_CFG_NAME, container_cfg_name=self._callbacks.name()
            ).SerializeToString()
        elif code == FromService.CONTAINER_CFG_DNS_REQ:
            yield ToService(
                code=ToService.CONTAINER_CFG_DNS, container_cfg_dns=self._callbacks.dns()
            ).SerializeToString()


def _push_shutdown(connection: Connection) -> bool:
    return connection.push(ToService(code=ToService.SHUTDOWN).SerializeToString())
