# SPDX-License-Identifier: Apache-2.0
"""The verbs of the key lifecycle in operation: signed statements and where the device stands."""

from __future__ import annotations

import argparse
from pathlib import Path

from trustme_init.control.cli.provisioning import CERTIFICATION_SUFFIX
from trustme_init.control.cli.session import Session, ask_secrets, read_file, write_file
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply


def apply_statement(session: Session, options: argparse.Namespace) -> int:
    """APPLY_STATEMENT; with --token its password is asked for, or read from standard input."""
    request = Request(
        command=Request.APPLY_STATEMENT,
        statement=read_file(options.statement),
        statement_signature=read_file(options.signature),
        statement_certificate=read_file(options.certificate),
    )
    if options.token is not None:
        request.token_file = read_file(options.token)
        (request.device_pin,) = ask_secrets("Password of the file: ")
    return _shown(session, session.client.request(request), options.csr)


def status(session: Session, options: argparse.Namespace) -> int:
    """GET_LIFECYCLE_STATUS."""
    return _shown(session, session.client.request(Request(command=Request.GET_LIFECYCLE_STATUS)), options.csr)


def _shown(session: Session, reply: Reply, csr: Path | None) -> int:
    if csr is not None and reply.device_csr:
        write_file(csr, reply.device_csr)
        if reply.device_key_certification:
            write_file(csr.with_name(csr.name + CERTIFICATION_SUFFIX), reply.device_key_certification)
    return session.show(reply)
