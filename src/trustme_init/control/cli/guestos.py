# SPDX-License-Identifier: Apache-2.0
"""The verbs of GuestOSes: install, with images that the device fetches or that are sent from here; remove."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import BinaryIO, Final

from trustme_init.control.cli.session import Format, LocalProblem, Session, read_file
from trustme_init.control.sanitise import visible
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply
from trustme_init.proto.control_pb2 import GuestOSImage

PIECE: Final = 256 * 1024
"""Bytes that are sent at a time: a frame that a socket's buffer holds about one of."""


def push(session: Session, options: argparse.Namespace) -> int:
    """PUSH_GUESTOS_CONFIG; with `--stream` the images are sent on the same connection."""
    stream: Path | None = options.stream
    request = Request(
        command=Request.PUSH_GUESTOS_CONFIG,
        guestos_config_file=read_file(options.config),
        guestos_config_signature=read_file(options.signature),
        guestos_config_certificate=read_file(options.certificate),
        guestos_streamed=True if stream is not None else None,
        guestos_progress=True if session.format is Format.READABLE else None,
    )
    code = 0
    for reply in session.replies_until_end(request):
        if reply.code == Reply.GUESTOS_PROGRESS:
            _show_progress(reply)
            continue
        code = session.show(reply)
        if stream is not None and reply.response == Reply.GUESTOS_MGR_INSTALL_STARTED:
            refused = _send_images(session, reply, stream)
            if refused is not None:
                code = session.show(refused)
                if refused.response != Reply.CMD_FAILED:
                    break
    return code


def remove(session: Session, options: argparse.Namespace) -> int:
    """REMOVE_GUESTOS."""
    return session.ask(Request(command=Request.REMOVE_GUESTOS, guestos_name=options.name))


def _send_images(session: Session, started: Reply, directory: Path) -> Reply | None:
    """Send what the device does not have yet; return the reply that ends it early."""
    install = started.guestos_install
    for image in install.images:
        path = directory / Path(image.name).name
        try:
            with path.open("rb") as file:
                if refused := _send_image(session, started, image, file):
                    return refused
        except OSError as exc:
            raise LocalProblem(f"{path}: {exc.strerror}") from exc
    return None


def _send_image(session: Session, started: Reply, image: GuestOSImage, file: BinaryIO) -> Reply | None:
    install = started.guestos_install
    offset = image.have
    file.seek(offset)
    while offset < image.size:
        data = file.read(min(PIECE, image.size - offset))
        if not data:
            raise LocalProblem(f"{image.name}: it ends at {offset} of {image.size} bytes")
        session.client.send(
            Request(
                command=Request.PUSH_GUESTOS_IMAGE,
                guestos_name=install.name,
                guestos_version=install.version,
                image_file=image.name,
                image_offset=offset,
                image_data=data,
            )
        )
        offset += len(data)
        while True:
            reply = session.client.receive()
            if reply.code != Reply.GUESTOS_PROGRESS:
                break
            _show_progress(reply)
        if reply.code != Reply.RESPONSE or reply.response != Reply.CMD_OK:
            return reply
    return None


def _show_progress(reply: Reply) -> None:
    """Keep one line up to date, where somebody is looking."""
    if not sys.stderr.isatty():
        return
    install = reply.guestos_install
    word = "Fetching" if install.phase == "fetch" else "Checking"
    share = 100 * install.done // install.total if install.total else 100
    end = "\n" if install.done == install.total else ""
    print(f"\r\x1b[K{word} {visible(install.file)}: {share} %", end=end, file=sys.stderr, flush=True)
