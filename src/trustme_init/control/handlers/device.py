# SPDX-License-Identifier: Apache-2.0
"""The device itself: figures, provisioning state, reboot."""

from __future__ import annotations

from trustme_init.control.handlers.ask import ask, failure
from trustme_init.control.handlers.reply import Context, Replies, refused, response
from trustme_init.control.transport import FLUSH
from trustme_init.proto.control_pb2 import DaemonToController, DeviceStats
from trustme_init.provisioning.mode import Mode


def stats(context: Context) -> Replies:
    """GET_DEVICE_STATS."""
    view = context.state.stats()
    yield DaemonToController(
        code=DaemonToController.DEVICE_STATS,
        device_stats=DeviceStats(
            disk_system=view.disk_system,
            disk_system_free=view.disk_system_free,
            disk_system_used=view.disk_system_used,
            disk_containers=view.disk_containers,
            disk_containers_free=view.disk_containers_free,
            disk_containers_used=view.disk_containers_used,
            mem_total=view.mem_total,
            mem_free=view.mem_free,
            mem_available=view.mem_available,
        ),
    )


def provisioned(context: Context) -> Replies:
    """GET_PROVISIONED."""
    yield DaemonToController(
        code=DaemonToController.DEVICE_PROVISIONED_STATE,
        device_is_provisioned=context.state.mode() is Mode.OPERATIONAL,
    )


def wipe(context: Context) -> Replies:
    """WIPE_DEVICE: containers and what they left; the device boots and stays what it is."""
    _, refusal = yield from ask(context, "wipe")
    yield (
        response(DaemonToController.CMD_OK)
        if refusal is None
        else failure(refusal, DaemonToController.CMD_FAILED)
    )


def destroy(context: Context) -> Replies:
    """DESTROY_SYSTEM: CMD_OK once the TPM is cleared and the keys are gone; then a reboot, into a stop."""
    _, refusal = yield from ask(context, "destroy")
    if refusal is not None:
        yield failure(refusal, DaemonToController.CMD_FAILED)
        return
    try:
        yield response(DaemonToController.CMD_OK)
        yield FLUSH
    finally:
        context.state.request_reboot()


def reboot(context: Context) -> Replies:
    """REBOOT_DEVICE: the client hears CMD_OK first, and leaving early does not take the command back.

    An orderly reboot completes provisioning, as the operator's manual says; where something required is
    missing, the reply names it, and the device reboots into provisioning again.
    """
    missing = None
    try:
        if context.state.mode() is Mode.PROVISIONING:
            _, missing = yield from ask(context, "complete")
        yield (
            response(DaemonToController.CMD_OK)
            if missing is None
            else refused(missing, DaemonToController.CMD_OK)
        )
        yield FLUSH
    finally:
        context.state.request_reboot()
