# SPDX-License-Identifier: Apache-2.0
"""From one request body to its replies: screen, parse, gate, handler. Sans-io; never raises.

- Not a protobuf message, or one that would be costly to parse: CMD_FAILED.
- No command, a number we do not know, refused by the gate, or not there yet: CMD_UNSUPPORTED. So is the
  empty frame, whose message has no command.
- A handler that fails: CMD_FAILED, and the reason in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Final

from google.protobuf.message import DecodeError

from trustme_init.control import gate
from trustme_init.control.framing import REPLY_LIMIT
from trustme_init.control.handlers import (
    containers,
    device,
    exec,  # noqa: A004 - the family's name
    freezer,
    guestos,
    interfaces,
    lifecycle,
    logs,
    provisioning,
    tokens,
)
from trustme_init.control.handlers.reply import Context, Converse, Handler, Replies, response
from trustme_init.control.screen import screen_request
from trustme_init.control.sockets import no_peer
from trustme_init.control.state import DeviceState
from trustme_init.control.throttle import Log, ThrottledLog
from trustme_init.control.transport import Answer, Flush, Listen, Wait
from trustme_init.errors import ControlRefusal
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController

Push = Callable[[bytes], bool]

HANDLERS: Final[Mapping[int, Handler]] = {
    Request.LIST_GUESTOS_CONFIGS: guestos.list_configs,
    Request.PUSH_GUESTOS_CONFIG: guestos.push_config,
    Request.PUSH_GUESTOS_IMAGE: guestos.push_image,
    Request.REMOVE_GUESTOS: guestos.remove,
    Request.LIST_CONTAINERS: containers.list_containers,
    Request.GET_CONTAINER_STATUS: containers.status,
    Request.GET_CONTAINER_CONFIG: containers.config,
    Request.GET_LAST_LOG: logs.last_log,
    Request.GET_DEVICE_STATS: device.stats,
    Request.REBOOT_DEVICE: device.reboot,
    Request.GET_PROVISIONED: device.provisioned,
    Request.WIPE_DEVICE: device.wipe,
    Request.DESTROY_SYSTEM: device.destroy,
    Request.CONTAINER_START: containers.start,
    Request.CONTAINER_STOP: containers.stop,
    Request.CONTAINER_FREEZE: freezer.freeze,
    Request.CONTAINER_UNFREEZE: freezer.unfreeze,
    Request.CONTAINER_ASSIGNIFACE: interfaces.move(into=True),
    Request.CONTAINER_UNASSIGNIFACE: interfaces.move(into=False),
    Request.CONTAINER_LIST_IFACES: interfaces.list_interfaces,
    Request.CONTAINER_EXEC_CMD: exec.execute,
    Request.CONTAINER_EXEC_INPUT: exec.unexpected_input,
    Request.GET_PROVISIONING_STATUS: provisioning.status,
    Request.SET_PROVISIONED: provisioning.complete,
    Request.PULL_DEVICE_CSR: provisioning.pull_csr,
    Request.PUSH_DEVICE_CERT: provisioning.push_certificate,
    Request.REGISTER_NEWCA: provisioning.register("guest"),
    Request.REGISTER_LOCALCA: provisioning.register("local"),
    Request.REGISTER_DEVICE_CA: provisioning.register("device"),
    Request.LIST_AUTHORITIES: provisioning.authorities,
    Request.REMOVE_AUTHORITY: provisioning.remove_authority,
    Request.VERIFY_DEVICE_CERT: provisioning.verify_certificate,
    Request.VERIFY_GUESTOS: provisioning.verify_guestos,
    Request.ACTIVATE_CREDENTIAL: provisioning.activate,
    Request.GET_TOKEN_STATUS: tokens.status,
    Request.CREATE_TOKEN: tokens.create,
    Request.UNLOCK_TOKEN: tokens.unlock,
    Request.REPLACE_TOKEN: tokens.replace,
    Request.REMOVE_TOKEN: tokens.remove,
    Request.REGISTER_LIFECYCLE_CA: provisioning.register("lifecycle"),
    Request.APPLY_STATEMENT: lifecycle.apply,
    Request.GET_LIFECYCLE_STATUS: lifecycle.status,
    Request.CHANGE_DEVICE_PIN: tokens.change_device_pin,
    Request.CONTAINER_CHANGE_TOKEN_PIN: containers.change_pin,
    Request.CONTAINER_CMLD_HANDLES_PIN: containers.handles_pin,
    Request.CREATE_CONTAINER: containers.create,
    Request.CONTAINER_UPDATE_CONFIG: containers.update,
    Request.REMOVE_CONTAINER: containers.remove,
    Request.CONTAINER_WIPE: containers.wipe,
    Request.RELOAD_CONTAINERS: containers.reload,
}

NOT_YET: Final = frozenset(
    {
        Request.CONTAINER_SNAPSHOT,
        Request.CONTAINER_ALLOWAUDIO,
        Request.CONTAINER_DENYAUDIO,
        Request.CONTAINER_DEV_ACCESS,
    }
)
"""Commands that the gate allows in some mode and that have no handler so far."""


def refused(_context: Context) -> Replies:
    """The gate's answer."""
    yield response(DaemonToController.CMD_UNSUPPORTED)


def not_yet(_context: Context) -> Replies:
    """The answer to what is allowed and does not exist yet: the protocol has no word of its own for it."""
    yield response(DaemonToController.CMD_UNSUPPORTED)


class Dispatcher:
    """Answers requests about one device."""

    def __init__(self, state: DeviceState, *, log: Log, handlers: Mapping[int, Handler] = HANDLERS) -> None:
        self._state = state
        self._log = ThrottledLog(log, "control")
        self._handlers: dict[int, Handler] = {**dict.fromkeys(NOT_YET, not_yet), **handlers}

    def answer(
        self, body: bytes, socket: gate.Socket, push: Push, peer: Callable[[], int] = no_peer
    ) -> Answer:
        """Yield the reply bodies of one request; at least one, unless closed early."""
        try:
            request = parse(body)
        except ControlRefusal as exc:
            self._log(str(exc))
            yield _FAILED
            return
        command = request.command if request.HasField("command") else 0
        ended = False
        try:
            allowed = gate.allows(command, self._state.mode(), socket)
            handler = self._handlers[command] if allowed else refused

            def later(message: DaemonToController) -> bool:
                return push(message.SerializeToString())

            with closing(handler(Context(self._state, request, later, peer))) as replies:
                for reply in replies:
                    if isinstance(reply, Flush | Wait):
                        yield reply
                    elif isinstance(reply, Converse):
                        yield self._listen(reply, socket)
                    else:
                        body = _serialise(reply)
                        ended = reply.code == DaemonToController.RESPONSE
                        yield body
        except Exception as exc:  # noqa: BLE001 - no request can take the manager down
            self._log(f"{_name(command)} failed: {type(exc).__name__}: {exc}")
            if not ended:
                yield _FAILED

    def _listen(self, converse: Converse, socket: gate.Socket) -> Listen:
        def accept(body: bytes) -> bool:
            try:
                request = parse(body)
            except ControlRefusal:
                return False  # it gets its answer when it has its turn
            command = request.command if request.HasField("command") else 0
            return gate.allows(command, self._state.mode(), socket) and converse.accept(request)

        return Listen(converse.start, accept)


def parse(body: bytes) -> Request:
    """Return the request; ControlRefusal("request-malformed" or "request-too-complex")."""
    screen_request(body)
    try:
        return Request.FromString(body)
    except DecodeError as exc:
        raise ControlRefusal(
            "request-malformed", "a request is not a protobuf message", evidence=f"{len(body)} bytes"
        ) from exc


def _serialise(reply: DaemonToController) -> bytes:
    body = reply.SerializeToString()
    if len(body) > REPLY_LIMIT:
        raise ControlRefusal(
            "reply-too-large", "a reply is longer than clients accept", evidence=str(len(body))
        )
    return body


def _name(command: int) -> str:
    value = Request.Command.DESCRIPTOR.values_by_number.get(command)
    return "unknown command" if value is None else value.name


_FAILED: Final = response(DaemonToController.CMD_FAILED).SerializeToString()
