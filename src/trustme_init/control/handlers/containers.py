# SPDX-License-Identifier: Apache-2.0
"""Lists, status and configuration of containers; creating, changing, starting, stopping, removing them.

Replies are those of interop sections 2.2 and 2.3. Where the original says nothing this does: about unknown
containers, and with every failure why (the reply's `refusal`).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final

from trustme_init.compartments.spec import CORE_UUID
from trustme_init.containers.config import parse
from trustme_init.control.handlers.ask import failure
from trustme_init.control.handlers.reply import Context, Replies, named_uuid, refused, response
from trustme_init.control.handlers.tokens import LOCKED
from trustme_init.control.state import Answered, ContainerView
from trustme_init.control.transport import Wait
from trustme_init.errors import ControlRefusal, Refusal
from trustme_init.proto.container_pb2 import ContainerConfig, ContainerStatus
from trustme_init.proto.control_pb2 import DaemonToController

Code = DaemonToController
Outcome = tuple[Mapping[str, Any], Refusal | None]

_UNLOCKING: Final = ("token-", "wrapped-key-", "container-key-")
"""How the codes of refusals begin that say the token did not do its part."""


def list_containers(context: Context) -> Replies:
    """LIST_CONTAINERS: UUIDs, with those of system services when asked."""
    yield from _known(context)
    yield DaemonToController(
        code=DaemonToController.CONTAINERS_LIST, container_uuids=[view.uuid for view in _visible(context)]
    )


def status(context: Context) -> Replies:
    """GET_CONTAINER_STATUS of the named containers, or of all."""
    yield from _known(context)
    views = _selected(context)
    if views is None:
        yield response(DaemonToController.CMD_FAILED)
        return
    yield DaemonToController(
        code=DaemonToController.CONTAINER_STATUS, container_status=[status_message(view) for view in views]
    )


def config(context: Context) -> Replies:
    """GET_CONTAINER_CONFIG of the named containers, or of all; UUIDs in the same order."""
    yield from _known(context)
    views = _selected(context)
    if views is None:
        yield response(DaemonToController.CMD_FAILED)
        return
    good = [view for view in views if not view.problem]
    yield DaemonToController(
        code=DaemonToController.CONTAINER_CONFIG,
        container_configs=[config_message(view) for view in good],
        container_uuids=[view.uuid for view in good],
    )


def create(context: Context) -> Replies:
    """CREATE_CONTAINER: the configuration and UUID of the new one; both empty when there is none."""
    request = context.request
    yield from _known(context)
    yield from _configured(
        (
            yield from _await(
                lambda done: context.state.guests.create(
                    request.container_config_file,
                    request.container_config_signature,
                    request.container_config_certificate,
                    done,
                )
            )
        )
    )


def update(context: Context) -> Replies:
    """CONTAINER_UPDATE_CONFIG: the new configuration, which a running container takes at its next start."""
    request = context.request
    uuid = yield from _guest(context)
    parts = (
        request.container_config_file,
        request.container_config_signature,
        request.container_config_certificate,
    )
    if isinstance(uuid, Refusal):
        yield from _configured(({}, uuid))
        return
    yield from _configured((yield from _await(lambda done: context.state.guests.update(uuid, parts, done))))


def start(context: Context) -> Replies:
    """CONTAINER_START (interop section 2.3): CONTAINER_START_EEXIST for an unknown one, c0 unsupported."""
    yield from _started_or_stopped(context, _start, _START_CODES)


def stop(context: Context) -> Replies:
    """CONTAINER_STOP: c0 unsupported; CMD_FAILED for an unknown one, on which the original is silent."""
    yield from _started_or_stopped(context, _stop, _STOP_CODES)


def change_pin(context: Context) -> Replies:
    """CONTAINER_CHANGE_TOKEN_PIN, with `device_pin` (empty the first time) and `device_newpin`."""
    request = context.request
    uuid = yield from _guest(context)
    if isinstance(uuid, Refusal):
        yield refused(uuid, Code.CONTAINER_CHANGE_PIN_FAILED)
        return
    _, refusal = yield from _await(
        lambda done: context.state.guests.change_pin(uuid, request.device_pin, request.device_newpin, done)
    )
    if refusal is None:
        yield response(Code.CONTAINER_CHANGE_PIN_SUCCESSFUL)
    else:
        locked = refusal.code in LOCKED
        yield refused(
            refusal, Code.CONTAINER_LOCKED_TILL_REBOOT if locked else Code.CONTAINER_CHANGE_PIN_FAILED
        )


def handles_pin(context: Context) -> Replies:
    """CONTAINER_CMLD_HANDLES_PIN: never, for there is no reader with keys of its own; the client asks."""
    uuid = yield from _guest(context)
    if isinstance(uuid, Refusal):
        yield refused(uuid, Code.CMD_FAILED)
        return
    yield DaemonToController(code=Code.CONTAINER_CMLD_HANDLES_PIN, container_cmld_handles_pin=False)


def remove(context: Context) -> Replies:
    """REMOVE_CONTAINER: a running one is killed first."""
    yield from _done(context, context.state.guests.remove)


def wipe(context: Context) -> Replies:
    """CONTAINER_WIPE: volumes and key; it must not run."""
    yield from _done(context, context.state.guests.wipe)


def reload(context: Context) -> Replies:
    """RELOAD_CONTAINERS."""
    _, refusal = yield from _await(context.state.guests.reload)
    yield response(Code.CMD_OK) if refusal is None else failure(refusal, Code.CMD_FAILED)


def _start(context: Context, uuid: str, pin: str | None, done: Answered) -> None:
    context.state.guests.start(uuid, pin, done)


def _stop(context: Context, uuid: str, pin: str | None, done: Answered) -> None:
    context.state.guests.stop(uuid, pin, done)


_START_CODES: Final = {
    "": Code.CONTAINER_START_OK,
    "container-unknown": Code.CONTAINER_START_EEXIST,
    "container-running": Code.CONTAINER_START_EEXIST,
    "token-pin-missing": Code.CONTAINER_START_PASSWD_WRONG,
    "token-wrong-pin": Code.CONTAINER_START_PASSWD_WRONG,
    "token-unpaired": Code.CONTAINER_START_TOKEN_UNPAIRED,
    "token-uninitialised": Code.CONTAINER_START_TOKEN_UNINIT,
    "unlocking": Code.CONTAINER_START_UNLOCK_FAILED,
    "otherwise": Code.CONTAINER_START_EINTERNAL,
}
_STOP_CODES: Final = {
    "": Code.CONTAINER_STOP_OK,
    "container-unknown": Code.CMD_FAILED,
    "container-not-running": Code.CONTAINER_STOP_FAILED_NOT_RUNNING,
    "token-pin-missing": Code.CONTAINER_STOP_PASSWD_WRONG,
    "token-wrong-pin": Code.CONTAINER_STOP_PASSWD_WRONG,
    "unlocking": Code.CONTAINER_STOP_UNLOCK_FAILED,
    "otherwise": Code.CONTAINER_CTRL_EINTERNAL,
}


def _started_or_stopped(
    context: Context,
    act: Callable[[Context, str, str | None, Answered], None],
    codes: Mapping[str, DaemonToController.Response.ValueType],
) -> Replies:
    yield from _known(context)
    uuid = named_uuid(context.request)
    if uuid is None or context.state.container(uuid) is None:
        yield refused(_unknown(uuid), codes["container-unknown"])
        return
    if uuid == CORE_UUID:
        yield response(Code.CMD_UNSUPPORTED)
        return
    params = context.request.container_start_params
    if params.setup:
        yield refused(
            ControlRefusal(
                "setup-mode-missing",
                "this version does not start containers in setup mode",
                remedy="start it without --setup",
            ),
            codes["otherwise"],
        )
        return
    # The field's default (128 zeros) stands for no PIN: trying it would cost a try.
    pin = params.key if params.HasField("key") else None
    _, refusal = yield from _await(lambda done: act(context, uuid, pin, done))
    if refusal is None:
        yield response(codes[""])
        return
    yield refused(refusal, _code(refusal, codes))


def _code(
    refusal: Refusal, codes: Mapping[str, DaemonToController.Response.ValueType]
) -> DaemonToController.Response.ValueType:
    if refusal.code in LOCKED:
        return Code.CONTAINER_LOCKED_TILL_REBOOT
    if refusal.code in codes:
        return codes[refusal.code]
    return codes["unlocking" if refusal.code.startswith(_UNLOCKING) else "otherwise"]


def _done(context: Context, act: Callable[[str, Answered], None]) -> Replies:
    uuid = yield from _guest(context)
    if isinstance(uuid, Refusal):
        yield refused(uuid, Code.CMD_FAILED)
        return
    _, refusal = yield from _await(lambda done: act(uuid, done))
    yield response(Code.CMD_OK) if refusal is None else failure(refusal, Code.CMD_FAILED)


def _configured(outcome: Outcome) -> Replies:
    """Yield what creating and changing answer with: code CONTAINER_CONFIG, empty when it was refused."""
    said, refusal = outcome
    if refusal is not None:
        yield DaemonToController(
            code=Code.CONTAINER_CONFIG, refusal=refused(refusal, Code.CMD_FAILED).refusal
        )
        return
    yield DaemonToController(
        code=Code.CONTAINER_CONFIG,
        container_configs=[parse(base64.b64decode(said["config"]))],
        container_uuids=[said["uuid"]],
    )


def _await(begin: Callable[[Answered], None]) -> Generator[Wait, None, Outcome]:
    """Begin something and wait for what becomes of it; nobody else waits."""
    answered: list[Outcome] = []

    def start_(resume: Callable[[], None]) -> None:
        def done(result: Mapping[str, Any], refusal: Refusal | None) -> None:
            answered.append((result, refusal))
            resume()

        begin(done)

    yield Wait(start_)
    return answered[0]


def _known(context: Context) -> Generator[Wait, None, None]:
    """Wait until the device knows which containers it has: after a boot that takes a moment."""
    yield Wait(context.state.guests.when_known)


def _guest(context: Context) -> Generator[Wait, None, str | Refusal]:
    """Return the container that a command names; a refusal for an unknown one, or the core."""
    yield from _known(context)
    uuid = named_uuid(context.request)
    if uuid is None or context.state.container(uuid) is None:
        return _unknown(uuid)
    if uuid == CORE_UUID:
        return ControlRefusal(
            "container-is-core",
            "the core container is part of the base system: it has no token, and is not changed or removed",
            evidence=uuid,
            remedy="`control change_pin` without a container changes the device's token",
        )
    return uuid


def _unknown(uuid: str | None) -> ControlRefusal:
    return ControlRefusal(
        "container-unknown",
        "there is no such container",
        evidence=ascii(uuid)[:64] if uuid is not None else "no UUID, or several",
        remedy="`control list` shows those that there are",
    )


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
        problem=view.problem or None,
        token=view.token or None,
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
