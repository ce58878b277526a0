# SPDX-License-Identifier: Apache-2.0
"""The network interfaces of a container that runs: list them, move one of the device's in and back out."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from trustme_init.control.handlers.reply import Context, Replies, named_uuid, refused, response
from trustme_init.control.transport import Wait
from trustme_init.errors import CompartmentRefusal, Refusal
from trustme_init.proto.control_pb2 import DaemonToController

if TYPE_CHECKING:
    from trustme_init.compartments.start import Running
    from trustme_init.control.handlers.reply import Handler
    from trustme_init.control.loop import Loop


def list_interfaces(context: Context) -> Replies:
    """CONTAINER_LIST_IFACES: the names that the container itself sees, loopback included."""
    from trustme_init.compartments.network import names

    try:
        found = names(_running(context).pid)
    except (Refusal, OSError) as exc:
        yield refused(_as_refusal(exc), DaemonToController.CMD_FAILED)
        return
    yield DaemonToController(code=DaemonToController.CONTAINER_IFACES, container_ifaces=found)


def move(*, into: bool) -> Handler:
    """Return the handler of CONTAINER_ASSIGNIFACE, or of CONTAINER_UNASSIGNIFACE.

    It holds until the container ends: what is to last belongs into its signed configuration, so `persistent`
    is refused.
    """

    def handler(context: Context) -> Replies:
        params = context.request.assign_iface_params
        try:
            if params.persistent:
                raise CompartmentRefusal(
                    "not-persistent",
                    "an interface is assigned for good by the container's configuration only",
                    remedy="put it into net_ifaces and update the configuration",
                )
            _running(context)
            ready = context.state.network.warm()
            if ready is not None:
                yield Wait(partial(_when_readable, context.state.loop, ready))
            _move(context, params.iface_name, into=into)
        except (Refusal, OSError) as exc:
            yield refused(_as_refusal(exc), DaemonToController.CMD_FAILED)
            return
        yield response(DaemonToController.CMD_OK)

    return handler


def _when_readable(loop: Loop, fd: int, resume: Callable[[], None]) -> None:
    copy = os.dup(fd)  # more than one may wait for the same

    def readable() -> None:
        loop.remove(copy)
        os.close(copy)
        resume()

    loop.add_reader(copy, readable)


def _move(context: Context, interface: str, *, into: bool) -> None:
    from trustme_init.compartments import network

    running = _running(context)
    if not interface or not network.move(running, interface, context.state.network, into=into):
        raise CompartmentRefusal(
            "no-such-interface",
            "there is no interface of this name to move",
            evidence=ascii(interface),
            remedy="see `control ifaces`; an interface that a container has is not the device's any more",
        )


def _running(context: Context) -> Running:
    uuid = named_uuid(context.request)
    compartment = None if uuid is None else context.state.compartment(uuid)
    if compartment is None or compartment.running is None:
        raise CompartmentRefusal(
            "not-running",
            "the container does not run",
            evidence="unknown" if compartment is None else compartment.state.name,
            remedy="start it",
        )
    return compartment.running


def _as_refusal(exc: Refusal | OSError) -> Refusal:
    if isinstance(exc, Refusal):
        return exc
    return CompartmentRefusal(
        "not-running", "the container has just ended", evidence=f"{exc.filename}: {exc.strerror}"
    )
