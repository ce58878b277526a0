# SPDX-License-Identifier: Apache-2.0
"""GuestOSes: what the device holds, installing, removing.

LIST_GUESTOS_CONFIGS answers with the configurations that can be used, as the original does; beside them,
for who can read it, the state of everything in the store.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from typing import Any

from trustme_init.control.handlers.ask import ask, failure
from trustme_init.control.handlers.reply import Context, Replies, refused, response
from trustme_init.control.installing import (
    GuestOsPush,
    InstallCompleted,
    InstallEvent,
    InstallFailed,
    InstallProgress,
    InstallStarted,
    InstallWaiting,
)
from trustme_init.control.transport import Wait
from trustme_init.errors import ControlRefusal, Refusal
from trustme_init.guestos.pieces import Piece
from trustme_init.proto.control_pb2 import (
    DaemonToController,
    GuestOSImage,
    GuestOSInstall,
    GuestOSState,
)
from trustme_init.proto.guestos_pb2 import GuestOSConfig
from trustme_init.trust.guestos import parse_config
from trustme_init.trust.selection import GuestOsId, parse_stem

Code = DaemonToController


def list_configs(context: Context) -> Replies:
    """LIST_GUESTOS_CONFIGS: the core's, and every version in the store that is good."""
    configs = [view.config for view in context.state.guestos_list()]
    states = [GuestOSState(name=config.name, version=config.version, core=True, size=0) for config in configs]
    result, refusal = yield from ask(context, "guestos-list")
    for each in result["guestos"] if refusal is None else ():
        state = GuestOSState(name=each["name"], version=each["version"], core=False, size=each["size"])
        if each["why"]:
            state.why_not = each["why"]
        else:
            stem = GuestOsId(state.name, state.version).stem
            told, why = yield from ask(context, "guestos-config", stem=stem)
            if why is None:
                configs.append(_parsed(told))
            else:
                state.why_not = why.code
        states.append(state)
    reply = DaemonToController(code=Code.GUESTOS_CONFIGS_LIST, guestos_configs=configs, guestos_states=states)
    if refusal is not None:
        reply.refusal.CopyFrom(failure(refusal, Code.CMD_FAILED).refusal)
    yield reply


def push_config(context: Context) -> Replies:
    """PUSH_GUESTOS_CONFIG: GUESTOS_MGR_INSTALL_STARTED once it is judged, later what became of it."""
    request = context.request
    push = GuestOsPush(
        request.guestos_config_file,
        request.guestos_config_signature,
        request.guestos_config_certificate,
        request.guestos_streamed,
    )
    wanted = request.guestos_progress
    events: list[InstallEvent] = []
    answered = False
    try:
        caller = context.peer()
    except ControlRefusal as refusal:
        yield refused(refusal, Code.GUESTOS_MGR_INSTALL_FAILED)
        return

    def start(resume: Callable[[], None]) -> None:
        def heard(event: InstallEvent) -> None:
            if answered:
                _send(context, event, progress=wanted)
                return
            events.append(event)
            if len(events) == 1:
                resume()

        context.state.installations.push(push, caller, heard)

    yield Wait(start)
    yield _reply(events[0], plain=not (wanted or push.streamed))
    answered = True
    for event in events[1:]:  # what happened while that was written
        _send(context, event, progress=wanted)


def push_image(context: Context) -> Replies:
    """PUSH_GUESTOS_IMAGE: CMD_OK when the next piece can come; the connection is not read until then."""
    request = context.request
    stem = GuestOsId(request.guestos_name, request.guestos_version).stem
    piece = Piece(request.image_file, request.image_offset, request.image_data)
    answers: list[Refusal | None] = []
    caller = context.peer()

    def start(resume: Callable[[], None]) -> None:
        def done(refusal: Refusal | None) -> None:
            answers.append(refusal)
            resume()

        context.state.installations.piece(stem, piece, caller, done)

    try:
        yield Wait(start)
    finally:
        os.close(caller)
    (refusal,) = answers
    yield response(Code.CMD_OK) if refusal is None else refused(refusal, Code.CMD_FAILED)


def remove(context: Context) -> Replies:
    """REMOVE_GUESTOS: every version of that name, unless something needs one of them."""
    answers: list[Refusal | None] = []

    def start(resume: Callable[[], None]) -> None:
        def done(_result: Mapping[str, Any], refusal: Refusal | None) -> None:
            answers.append(refusal)
            resume()

        context.state.installations.remove(context.request.guestos_name, done)

    yield Wait(start)
    (refusal,) = answers
    yield response(Code.CMD_OK) if refusal is None else failure(refusal, Code.CMD_FAILED)


def _parsed(told: Mapping[str, Any]) -> GuestOSConfig:
    """Return a configuration that the vault has judged."""
    return parse_config(base64.b64decode(told["config"]))


def _send(context: Context, event: InstallEvent, *, progress: bool) -> None:
    if progress or not isinstance(event, InstallProgress):
        context.later(_reply(event, plain=not progress))


def _reply(event: InstallEvent, *, plain: bool) -> DaemonToController:
    """Return what is said of an event; `plain` to a client that may not know more than the original does."""
    match event:
        case InstallWaiting():
            return response(Code.GUESTOS_MGR_INSTALL_WAITING)
        case InstallStarted(stem, images):
            reply = response(Code.GUESTOS_MGR_INSTALL_STARTED)
            if plain:
                return reply
            reply.guestos_install.CopyFrom(_install(stem))
            reply.guestos_install.images.extend(
                GuestOSImage(name=name, size=size, have=have) for name, size, have in images
            )
            return reply
        case InstallProgress():
            install = _install(event.stem)
            install.phase, install.file = event.phase, event.file
            install.done, install.total = event.done, event.total
            return DaemonToController(code=Code.GUESTOS_PROGRESS, guestos_install=install)
        case InstallCompleted():
            return response(Code.GUESTOS_MGR_INSTALL_COMPLETED)
        case InstallFailed(refusal):
            return refused(refusal, Code.GUESTOS_MGR_INSTALL_FAILED)


def _install(stem: str) -> GuestOSInstall:
    guest_os = parse_stem(stem)
    if guest_os is None:
        raise ValueError(f"the vault has judged {stem!a}")
    return GuestOSInstall(name=guest_os.name, version=guest_os.version)
