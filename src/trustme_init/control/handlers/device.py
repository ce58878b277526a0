# SPDX-License-Identifier: Apache-2.0
"""The device itself: figures, provisioning state, reboot."""

from __future__ import annotations

from trustme_init.control.handlers.reply import Context, Replies, response
from trustme_init.control.transport import FLUSH
from trustme_init.proto.control_pb2 import DaemonToController, DeviceStats
from trustme_init.provisioning.marker import Mode


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


def reboot(context: Context) -> Replies:
    """REBOOT_DEVICE: the client hears CMD_OK first, and leaving early does not take the command back."""
    try:
        yield response(DaemonToController.CMD_OK)
        yield FLUSH
    finally:
        context.state.request_reboot()
