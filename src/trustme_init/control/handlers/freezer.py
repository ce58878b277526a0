# SPDX-License-Identifier: Apache-2.0
"""Freeze and thaw a container: CMD_OK when every process of it stands still, or goes on again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from trustme_init.control.handlers.reply import Context, Replies, named_uuid, refused, response
from trustme_init.control.transport import Wait
from trustme_init.errors import CompartmentRefusal, Refusal
from trustme_init.proto.container_pb2 import ContainerState
from trustme_init.proto.control_pb2 import DaemonToController

if TYPE_CHECKING:
    from trustme_init.compartments.lifecycle import Compartment
    from trustme_init.control.loop import Loop
    from trustme_init.linux.cgroup import EventsWatch

FREEZE_TIMEOUT: Final = 10.0
"""Seconds: a process that waits inside the kernel freezes when that wait ends."""


def freeze(context: Context) -> Replies:
    """CONTAINER_FREEZE. What does not stand still in time goes on as if nothing had been asked."""
    try:
        compartment = _named(context)
        freezing = _Freezing(context.state.loop, compartment, compartment.freeze())
    except Refusal as refusal:
        yield refused(refusal, DaemonToController.CMD_FAILED)
        return
    try:
        yield Wait(freezing.settled)
    finally:
        freezing.close()
    if int(compartment.state) == ContainerState.FROZEN:
        yield response(DaemonToController.CMD_OK)
    else:
        yield refused(freezing.refusal(), DaemonToController.CMD_FAILED)


def unfreeze(context: Context) -> Replies:
    """CONTAINER_UNFREEZE."""
    try:
        _named(context).thaw()
    except Refusal as refusal:
        yield refused(refusal, DaemonToController.CMD_FAILED)
        return
    yield response(DaemonToController.CMD_OK)


class _Freezing:
    """Waits until a compartment stands still, ends, or time is up."""

    def __init__(self, loop: Loop, compartment: Compartment, watch: EventsWatch) -> None:
        self._loop = loop
        self._compartment = compartment
        self._watch = watch
        self._resume: Callable[[], None] = lambda: None
        self._timer = loop.call_later(FREEZE_TIMEOUT, self._expired)
        self._closed = False

    def settled(self, resume: Callable[[], None]) -> None:
        self._resume = resume
        self._loop.add_reader(self._watch.fileno(), self._changed)
        self._changed()

    def _changed(self) -> None:
        try:
            frozen = self._compartment.frozen(self._watch.read())
        except OSError:  # the group is gone
            frozen = False
        if frozen or int(self._compartment.state) != ContainerState.FREEZING:
            self._done()

    def _expired(self) -> None:
        self._done()

    def _done(self) -> None:
        resume, self._resume = self._resume, lambda: None
        self._loop.remove(self._watch.fileno())
        resume()

    def refusal(self) -> CompartmentRefusal:
        return CompartmentRefusal(
            "not-frozen",
            "the container did not come to a standstill",
            evidence=f"{self._compartment.state.name}, {FREEZE_TIMEOUT:.0f} s",
            remedy="try again: one of its processes waits inside the kernel, or the container has ended",
        )

    def close(self) -> None:
        """Whoever does not wait for it does not get it: a half-frozen container is nobody's wish."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._loop.remove(self._watch.fileno())
        self._watch.close()
        if int(self._compartment.state) == ContainerState.FREEZING:
            self._compartment.thaw()


def _named(context: Context) -> Compartment:
    """Return the compartment; the core is none that can be frozen: nobody could thaw it."""
    from trustme_init.compartments.spec import CORE_UUID

    uuid = named_uuid(context.request)
    compartment = None if uuid is None or uuid == CORE_UUID else context.state.compartment(uuid)
    if compartment is None:
        raise CompartmentRefusal(
            "no-such-container",
            "there is no such container, or it is the core container",
            evidence=ascii(uuid),
            remedy="see `control list`",
        )
    return compartment
