# SPDX-License-Identifier: Apache-2.0
"""What GuestOSes the device holds."""

from __future__ import annotations

from trustme_init.control.handlers.reply import Context, Replies
from trustme_init.proto.control_pb2 import DaemonToController


def list_configs(context: Context) -> Replies:
    """LIST_GUESTOS_CONFIGS: the verified configurations, every version."""
    yield DaemonToController(
        code=DaemonToController.GUESTOS_CONFIGS_LIST,
        guestos_configs=[view.config for view in context.state.guestos_list()],
    )
