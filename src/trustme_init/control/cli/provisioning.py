# SPDX-License-Identifier: Apache-2.0
"""The verbs of provisioning: authorities, the device's certificate, the device's token."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from trustme_init.control.cli.session import LocalProblem, Session, ask_secrets, read_file, write_file
from trustme_init.control.cli.verb import Argument
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request

AUTHORITY: Final = Argument("certificate", "the authority's certificate, PEM", {"type": Path})
CERTIFICATION_SUFFIX: Final = ".tpm"
"""Added to the name of a request for the TPM's word that goes with it."""


def register(command: Request.Command.ValueType) -> Callable[[Session, argparse.Namespace], int]:
    """Return the verb that registers an authority."""
    return lambda session, options: session.ask(
        Request(command=command, guestos_rootcert=read_file(options.certificate))
    )


def remove_authority(session: Session, options: argparse.Namespace) -> int:
    """REMOVE_AUTHORITY."""
    return session.ask(Request(command=Request.REMOVE_AUTHORITY, authority_sha256=options.sha256))


def pull_csr(session: Session, options: argparse.Namespace) -> int:
    """PULL_DEVICE_CSR; the files are written only when both can be."""
    reply = session.client.request(Request(command=Request.PULL_DEVICE_CSR))
    if reply.device_csr:
        write_file(options.file, reply.device_csr)
        if reply.device_key_certification:
            beside = options.file.with_name(options.file.name + CERTIFICATION_SUFFIX)
            write_file(beside, reply.device_key_certification)
    return session.show(reply)


def push_certificate(session: Session, options: argparse.Namespace) -> int:
    """PUSH_DEVICE_CERT."""
    return session.ask(Request(command=Request.PUSH_DEVICE_CERT, device_cert=read_file(options.certificate)))


def verify_certificate(session: Session, options: argparse.Namespace) -> int:
    """VERIFY_DEVICE_CERT."""
    return session.ask(
        Request(command=Request.VERIFY_DEVICE_CERT, certificate=read_file(options.certificate))
    )


def verify_guestos(session: Session, options: argparse.Namespace) -> int:
    """VERIFY_GUESTOS."""
    return session.ask(
        Request(
            command=Request.VERIFY_GUESTOS,
            guestos_config_file=read_file(options.config),
            guestos_config_signature=read_file(options.signature),
            guestos_config_certificate=read_file(options.certificate),
        )
    )


def activate(session: Session, options: argparse.Namespace) -> int:
    """ACTIVATE_CREDENTIAL."""
    reply = session.client.request(
        Request(
            command=Request.ACTIVATE_CREDENTIAL,
            credential_blob=read_file(options.credential),
            encrypted_secret=read_file(options.secret),
        )
    )
    if reply.activated_secret:
        write_file(options.file, reply.activated_secret)
    return session.show(reply)


def create_token(session: Session, _options: argparse.Namespace) -> int:
    """CREATE_TOKEN."""
    pin, again = ask_secrets("PIN: ", "PIN again: ")
    if pin != again:
        raise LocalProblem("the two PINs differ")
    return session.ask(Request(command=Request.CREATE_TOKEN, device_newpin=pin))


def unlock_token(session: Session, _options: argparse.Namespace) -> int:
    """UNLOCK_TOKEN."""
    (pin,) = ask_secrets("PIN: ")
    return session.ask(Request(command=Request.UNLOCK_TOKEN, device_pin=pin))


def replace_token(session: Session, options: argparse.Namespace) -> int:
    """REPLACE_TOKEN."""
    token = read_file(options.file)
    (pin,) = ask_secrets("Password of the file: ")
    return session.ask(Request(command=Request.REPLACE_TOKEN, token_file=token, device_pin=pin))
