# SPDX-License-Identifier: Apache-2.0
"""Lists, status and configuration of containers; start and stop as far as they exist.

Where the original says nothing about an unknown UUID this does: status and configuration answer for those
that are known, and CMD_FAILED when none of the named ones is.
"""

from __future__ import annotations

from collections.abc import Sequence

from trustme_init.control.handlers.reply import Context, Replies, named_uuid, response
from trustme_init.control.state import ContainerView
from trustme_init.proto.container_pb2 import ContainerConfig, ContainerStatus
from trustme_init.proto.control_pb2 import DaemonToController


def list_containers(context: Context) -> Replies:
    """LIST_CONTAINERS: UUIDs, with those of system services when asked."""
    yield DaemonToController(
        code=DaemonToController.CONTAINERS_LIST, container_uuids=[view.uuid for view in _visible(context)]
    )


def status(context: Context) -> Replies:
    """GET_CONTAINER_STATUS of the named containers, or of all."""
    views = _selected(context)
    if views is None:
        yield response(DaemonToController.CMD_FAILED)
        return
    yield DaemonToController(
        code=DaemonToController.CONTAINER_STATUS, container_status=[status_message(view) for view in views]
    )


def config(context: Context) -> Replies:
    """GET_CONTAINER_CONFIG of the named containers, or of all; UUIDs in the same order."""
    views = _selected(context)
    if views is None:
        yield response(DaemonToController.CMD_FAILED)
        return
    yield DaemonToController(
        code=DaemonToController.CONTAINER_CONFIG,
        container_configs=[config_message(view) for view in views],
        container_uuids=[view.uuid for view in views],
    )


def start(context: Context) -> Replies:
    """CONTAINER_START (interop section 2.3): CONTAINER_START_EEXIST for an unknown one, c0 unsupported."""
    yield response(
        DaemonToController.CMD_UNSUPPORTED if _exists(context) else DaemonToController.CONTAINER_START_EEXIST
    )


def stop(context: Context) -> Replies:
    """CONTAINER_STOP: c0 unsupported; CMD_FAILED for an unknown one, on which the original is silent."""
    yield response(DaemonToController.CMD_UNSUPPORTED if _exists(context) else DaemonToController.CMD_FAILED)


def _exists(context: Context) -> bool:
    """Whether the command names one container. Today every such container is c0."""
    uuid = named_uuid(context.request)
    return uuid is not None and context.state.container(uuid) is not None


def _visible(context: Context) -> Sequence[ContainerView]:
    services = context.request.system_services
    return [view for view in context.state.containers() if services or not view.system_service]


def _selected(context: Context) -> Sequence[ContainerView] | None:
    uuids = context.request.container_uuids
    if not uuids:
        return _visible(context)
    known = {view.uuid: view for view in context.state.containers()}
    # Each container once, however often it is named: a small request must not make a large reply.
    return [known[uuid] for uuid in dict.fromkeys(uuids) if uuid in known] or None


def status_message(view: ContainerView) -> ContainerStatus:
    """Return a status with every field, all of which the protocol requires."""
    return ContainerStatus(
        uuid=view.uuid,
        name=view.name,
        type=view.type,
        state=view.state,
        uptime=view.uptime,
        created=view.created,
        guestos=view.guest_os,
        trust_level=view.trust,
        cryptfs_mode=view.cryptfs_mode,
    )


def config_message(view: ContainerView) -> ContainerConfig:
    """Return a configuration that can be serialised: required fields that texts omit get their default."""
    if view.config is not None:
        message = ContainerConfig()
        message.CopyFrom(view.config)
    else:
        message = ContainerConfig(
            name=view.name,
            guest_os=view.guest_os,
            guestos_version=view.guestos_version,
            ram_limit=view.ram_limit,
            init_env=view.init_env,
            token_type=view.token_type,
        )
    for name in ("color", "type", "token_type"):
        if not message.HasField(name):
            setattr(message, name, getattr(message, name))
    return message
