# SPDX-License-Identifier: Apache-2.0
"""The verbs of `control` (interop section 2.4): one table, from which parser, help and calls are made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from trustme_init.control.cli import guestos, lifecycle
from trustme_init.control.cli import provisioning as provision
from trustme_init.control.cli.logs import retrieve_logs
from trustme_init.control.cli.run import run
from trustme_init.control.cli.session import LocalProblem, Session, ask_secrets, read_file
from trustme_init.control.cli.verb import Argument, Run, Verb
from trustme_init.proto.control_pb2 import AssignInterfaceParams, ContainerStartParams
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request


def _plain(command: Request.Command.ValueType) -> Run:
    return lambda session, _options: session.ask(Request(command=command))


def _on_container(command: Request.Command.ValueType) -> Run:
    return lambda session, options: session.ask(
        Request(command=command, container_uuids=[session.uuid_of(options.container)])
    )


def _list(session: Session, options: argparse.Namespace) -> int:
    return session.ask(
        Request(command=Request.GET_CONTAINER_STATUS, system_services=options.system_services or None)
    )


def _state(session: Session, options: argparse.Namespace) -> int:
    uuids = [session.uuid_of(options.container)] if options.container else []
    return session.ask(Request(command=Request.GET_CONTAINER_STATUS, container_uuids=uuids))


def _config_triple(options: argparse.Namespace) -> dict[str, bytes]:
    if (options.signature is None) != (options.certificate is None):
        raise LocalProblem("give both a signature and a certificate, or neither")
    triple = {"container_config_file": read_file(options.config)}
    if options.signature is not None:
        triple["container_config_signature"] = read_file(options.signature)
        triple["container_config_certificate"] = read_file(options.certificate)
    return triple


def _create(session: Session, options: argparse.Namespace) -> int:
    request = Request(command=Request.CREATE_CONTAINER)
    for name, data in _config_triple(options).items():
        setattr(request, name, data)
    return session.ask(request)


def _update_config(session: Session, options: argparse.Namespace) -> int:
    request = Request(command=Request.CONTAINER_UPDATE_CONFIG)
    for name, data in _config_triple(options).items():
        setattr(request, name, data)
    request.container_uuids.append(session.uuid_of(options.container))
    return session.ask(request)


def _start_or_stop(command: Request.Command.ValueType) -> Run:
    def run(session: Session, options: argparse.Namespace) -> int:
        uuid = session.uuid_of(options.container)
        key = ask_secrets("PIN: ")[0] if options.key == "" else options.key
        setup = getattr(options, "setup", False) or None
        params = ContainerStartParams(key=key, setup=setup) if key is not None or setup else None
        return session.ask(Request(command=command, container_uuids=[uuid], container_start_params=params))

    return run


def _change_pin(session: Session, options: argparse.Namespace) -> int:
    uuids = [session.uuid_of(options.container)] if options.container else []
    old, new, again = ask_secrets("Old PIN: ", "New PIN: ", "New PIN again: ")
    if new != again:
        raise LocalProblem("the two new PINs differ")
    return session.ask(
        Request(
            command=Request.CONTAINER_CHANGE_TOKEN_PIN if uuids else Request.CHANGE_DEVICE_PIN,
            container_uuids=uuids,
            device_pin=old,
            device_newpin=new,
        )
    )


def _dev_access(session: Session, options: argparse.Namespace) -> int:
    uuid = session.uuid_of(options.container)
    return session.ask(
        Request(command=Request.CONTAINER_DEV_ACCESS, container_uuids=[uuid], dev_rule=options.rule)
    )


def _interface(command: Request.Command.ValueType) -> Run:
    def run(session: Session, options: argparse.Namespace) -> int:
        return session.ask(
            Request(
                command=command,
                container_uuids=[session.uuid_of(options.container)],
                assign_iface_params=AssignInterfaceParams(
                    iface_name=options.iface, persistent=options.persistent
                ),
            )
        )

    return run


CONTAINER: Final = Argument("container", "name or UUID")
_CONFIG: Final = Argument("config", "configuration in protobuf text format", {"type": Path})
_SIGNATURE: Final = Argument("signature", "detached signature over its bytes", {"type": Path})
_CERTIFICATE: Final = Argument(
    "certificate", "PEM certificate, or chain with the signer first", {"type": Path}
)
_TRIPLE: Final = (
    _CONFIG,
    *(Argument(a.name, a.help, {"type": Path, "nargs": "?"}) for a in (_SIGNATURE, _CERTIFICATE)),
)
_KEY: Final = Argument(
    "--key",
    "the token's PIN; without a value (`--key=`) it is asked for, or read from standard input,"
    " which keeps it out of the process list",
    {"metavar": "PIN"},
)
_IFACE: Final = (
    CONTAINER,
    Argument("--iface", "network interface", {"required": True, "metavar": "NAME"}),
    Argument("--persistent", "also after a restart", {"action": "store_true"}),
)

_NEXT_CSR: Final = Argument(
    "--csr",
    "where to put the request for the next device key's certificate, and the TPM's word beside it (FILE.tpm)",
    {"type": Path, "metavar": "FILE"},
)

VERBS: Final = (
    Verb(
        "list",
        "containers with their states",
        _list,
        (Argument("--system-services", "system services too", {"action": "store_true"}, short="-s"),),
    ),
    Verb("list_guestos", "GuestOSes on the device", _plain(Request.LIST_GUESTOS_CONFIGS), slow=True),
    Verb(
        "state",
        "state of one container, or of all",
        _state,
        (Argument("container", "name or UUID", {"nargs": "?"}),),
    ),
    Verb(
        "config",
        "configuration of a container, as protobuf text",
        _on_container(Request.GET_CONTAINER_CONFIG),
        (CONTAINER,),
    ),
    Verb("create", "create a container", _create, _TRIPLE, slow=True),
    Verb(
        "update_config",
        "replace a container's configuration; one that runs takes it at its next start",
        _update_config,
        (CONTAINER, *_TRIPLE),
        slow=True,
    ),
    Verb(
        "remove",
        "remove a container",
        _on_container(Request.REMOVE_CONTAINER),
        (CONTAINER,),
        destroys="the container and its data",
        slow=True,
    ),
    Verb(
        "start",
        "start a container",
        _start_or_stop(Request.CONTAINER_START),
        (CONTAINER, _KEY, Argument("--setup", "start in setup mode", {"action": "store_true"})),
        slow=True,
    ),
    Verb("stop", "stop a container", _start_or_stop(Request.CONTAINER_STOP), (CONTAINER, _KEY), slow=True),
    Verb("freeze", "freeze a container", _on_container(Request.CONTAINER_FREEZE), (CONTAINER,)),
    Verb("unfreeze", "unfreeze a container", _on_container(Request.CONTAINER_UNFREEZE), (CONTAINER,)),
    Verb(
        "wipe",
        "wipe a container's data",
        _on_container(Request.CONTAINER_WIPE),
        (CONTAINER,),
        destroys="the container's data",
        slow=True,
    ),
    Verb(
        "change_pin",
        "change the PIN of the device's token, or of a container's: three lines, old, new, new again",
        _change_pin,
        (Argument("container", "name or UUID; without it, the device's token", {"nargs": "?"}),),
        slow=True,
    ),
    Verb("allow_audio", "give a container audio", _on_container(Request.CONTAINER_ALLOWAUDIO), (CONTAINER,)),
    Verb("deny_audio", "take audio away", _on_container(Request.CONTAINER_DENYAUDIO), (CONTAINER,)),
    Verb(
        "dev_access",
        "change a container's device access",
        _dev_access,
        (CONTAINER, Argument("rule", "for example 'c 42:42 rwm'")),
    ),
    Verb("assign_iface", "give a container an interface", _interface(Request.CONTAINER_ASSIGNIFACE), _IFACE),
    Verb("unassign_iface", "take an interface away", _interface(Request.CONTAINER_UNASSIGNIFACE), _IFACE),
    Verb("ifaces", "interfaces of a container", _on_container(Request.CONTAINER_LIST_IFACES), (CONTAINER,)),
    Verb(
        "run",
        "run a command in a container; its exit status is this command's",
        run,
        (
            CONTAINER,
            Argument(
                "words",
                "`nopty` for no terminal, then the command and its arguments",
                {"nargs": argparse.REMAINDER, "metavar": "[nopty] command ..."},
            ),
        ),
    ),
    Verb(
        "push_guestos_config",
        "install a signed GuestOS; the device fetches its images, or they are sent to it",
        guestos.push,
        (
            _CONFIG,
            _SIGNATURE,
            _CERTIFICATE,
            Argument("--stream", "send the images from here", {"type": Path, "metavar": "DIRECTORY"}),
        ),
        slow=True,
    ),
    Verb(
        "remove_guestos",
        "remove every version of a GuestOS",
        guestos.remove,
        (Argument("name", "GuestOS name"),),
        slow=True,
    ),
    Verb(
        "verify_guestos",
        "whether the device would accept a GuestOS, and by whose word",
        provision.verify_guestos,
        (_CONFIG, _SIGNATURE, _CERTIFICATE),
        slow=True,
    ),
    Verb(
        "provisioning_status",
        "what is in place, and what is missing before provisioning can be completed",
        _plain(Request.GET_PROVISIONING_STATUS),
        slow=True,
    ),
    Verb(
        "ca_register",
        "register a certificate authority for GuestOSes",
        provision.register(Request.REGISTER_NEWCA),
        (provision.AUTHORITY,),
        slow=True,
    ),
    Verb(
        "localca_register",
        "register the one local authority for GuestOSes, in place of the one before",
        provision.register(Request.REGISTER_LOCALCA),
        (provision.AUTHORITY,),
        slow=True,
    ),
    Verb(
        "device_ca_register",
        "register a certificate authority for device certificates",
        provision.register(Request.REGISTER_DEVICE_CA),
        (provision.AUTHORITY,),
        slow=True,
    ),
    Verb(
        "lifecycle_ca_register",
        "register a certificate authority for who may sign statements in operation",
        provision.register(Request.REGISTER_LIFECYCLE_CA),
        (provision.AUTHORITY,),
        slow=True,
    ),
    Verb("ca_list", "registered certificate authorities", _plain(Request.LIST_AUTHORITIES), slow=True),
    Verb(
        "ca_remove",
        "remove a certificate authority",
        provision.remove_authority,
        (Argument("sha256", "its SHA-256, or at least the first 8 digits of it"),),
        slow=True,
    ),
    Verb(
        "pull_csr",
        "fetch the device's certificate signing request, and the TPM's word for its key beside it (FILE.tpm)",
        provision.pull_csr,
        (Argument("file", "where to put it", {"type": Path}),),
        slow=True,
    ),
    Verb(
        "push_cert",
        "install the device's certificate",
        provision.push_certificate,
        (_CERTIFICATE,),
        slow=True,
    ),
    Verb(
        "verify_cert",
        "whether another party's certificate is good by the device authorities",
        provision.verify_certificate,
        (_CERTIFICATE,),
        slow=True,
    ),
    Verb(
        "activate_credential",
        "answer a signer's challenge to the TPM",
        provision.activate,
        (
            Argument("credential", "TPM2B_ID_OBJECT of the challenge", {"type": Path}),
            Argument("secret", "TPM2B_ENCRYPTED_SECRET of the challenge", {"type": Path}),
            Argument("file", "where to put the answer", {"type": Path}),
        ),
        slow=True,
    ),
    Verb(
        "token_status",
        "the device's token, and the tries its PIN has left",
        _plain(Request.GET_TOKEN_STATUS),
        slow=True,
    ),
    Verb("token_create", "make a softtoken: two lines, PIN, PIN again", provision.create_token, slow=True),
    Verb("token_unlock", "whether a PIN opens the token: one line, PIN", provision.unlock_token, slow=True),
    Verb(
        "token_replace",
        "put your own PKCS#12 file in the place of the token: one line, its password",
        provision.replace_token,
        (Argument("file", "the PKCS#12 file", {"type": Path}),),
        slow=True,
    ),
    Verb(
        "token_remove",
        "remove the device's token",
        _plain(Request.REMOVE_TOKEN),
        destroys="the token's key, and whatever it had wrapped",
        slow=True,
    ),
    Verb(
        "apply_statement",
        "change keys, anchors or token of a device in operation, by a signed statement",
        lifecycle.apply_statement,
        (
            Argument("statement", "the statement, JSON (`trustme lifecycle create`)", {"type": Path}),
            _SIGNATURE,
            _CERTIFICATE,
            Argument(
                "--token",
                "the PKCS#12 file of replace-token; one line on standard input, its password",
                {"type": Path, "metavar": "FILE"},
            ),
            _NEXT_CSR,
        ),
        slow=True,
    ),
    Verb(
        "lifecycle_status",
        "the statements that the device obeyed, and the request for its next key",
        lifecycle.status,
        (_NEXT_CSR,),
        slow=True,
    ),
    Verb("get_provisioned", "whether provisioning was completed", _plain(Request.GET_PROVISIONED)),
    Verb("set_provisioned", "complete provisioning, for good", _plain(Request.SET_PROVISIONED), slow=True),
    Verb("device_stats", "disk and memory figures", _plain(Request.GET_DEVICE_STATS)),
    Verb("reload", "read the containers' configurations again", _plain(Request.RELOAD_CONTAINERS), slow=True),
    Verb("reboot", "reboot the device", _plain(Request.REBOOT_DEVICE), slow=True),
    Verb(
        "wipe_device",
        "remove all containers' data",
        _plain(Request.WIPE_DEVICE),
        destroys="all containers' data",
        slow=True,
    ),
    Verb(
        "destroy_system",
        "make everything on the device unreadable",
        _plain(Request.DESTROY_SYSTEM),
        destroys="everything on the device",
        slow=True,
    ),
    Verb(
        "retrieve_logs",
        "fetch the device's logs",
        retrieve_logs,
        (
            Argument(
                "directory", "where to put them, one file each; otherwise shown", {"type": Path, "nargs": "?"}
            ),
            Argument("--remove", "remove them on the device", {"action": "store_true"}),
        ),
    ),
)
