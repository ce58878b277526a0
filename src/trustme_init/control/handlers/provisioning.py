# SPDX-License-Identifier: Apache-2.0
"""Provisioning: status and completion, the device's identity, the certificate store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trustme_init.control.handlers.ask import ask, failure
from trustme_init.control.handlers.reply import Context, Handler, Replies, response
from trustme_init.proto.control_pb2 import (
    DEVICE_ANCHOR,
    GUEST_ANCHOR,
    LIFECYCLE_ANCHOR,
    Authority,
    CertificateInfo,
    DaemonToController,
    ProvisioningStatus,
    Requirement,
)

Code = DaemonToController
_PURPOSES = {"guest": GUEST_ANCHOR, "device": DEVICE_ANCHOR, "lifecycle": LIFECYCLE_ANCHOR}


def status(context: Context) -> Replies:
    """GET_PROVISIONING_STATUS: the checklist and the names of everything."""
    result, refusal = yield from ask(context, "status")
    if refusal is not None:
        yield failure(refusal, Code.CMD_FAILED)
        return
    yield DaemonToController(
        code=Code.PROVISIONING_STATUS,
        provisioning=ProvisioningStatus(
            completed=result["completed"],
            development=result["development"],
            marker=result["marker"],
            requirements=[Requirement(**each) for each in result["requirements"]],
            **{name: result[name] for name in _OPTIONAL if result.get(name)},
        ),
    )


_OPTIONAL = (
    "device_uuid",
    "device_key_sha256",
    "device_certificate_sha256",
    "endorsement_key_sha256",
    "record_sha256",
)


def complete(context: Context) -> Replies:
    """SET_PROVISIONED: from the reply on, the mode is operational."""
    _, refusal = yield from ask(context, "complete")
    yield response(Code.CMD_OK) if refusal is None else failure(refusal, Code.CMD_FAILED)


def pull_csr(context: Context) -> Replies:
    """PULL_DEVICE_CSR: the field is absent on failure, as with the original."""
    result, refusal = yield from ask(context, "csr")
    if refusal is not None:
        reply = failure(refusal, Code.CMD_FAILED)
        if reply.response == Code.CMD_UNSUPPORTED:
            yield reply
            return
        yield DaemonToController(code=Code.DEVICE_CSR, refusal=reply.refusal)
        return
    yield DaemonToController(
        code=Code.DEVICE_CSR,
        device_csr=result["csr"].encode(),
        device_key_certification=result["certification"].encode() or None,
    )


def push_certificate(context: Context) -> Replies:
    """PUSH_DEVICE_CERT: DEVICE_CERT_ERROR says why in its refusal; the old certificate stays."""
    _, refusal = yield from ask(context, "push-certificate", certificate=context.request.device_cert)
    yield response(Code.DEVICE_CERT_OK) if refusal is None else failure(refusal, Code.DEVICE_CERT_ERROR)


def register(purpose: str) -> Handler:
    """Return the handler that registers an authority: "guest", "device", "lifecycle", or "local"."""

    def handler(context: Context) -> Replies:
        certificate = context.request.guestos_rootcert or context.request.certificate
        _, refusal = yield from ask(context, "add-authority", certificate=certificate, purpose=purpose)
        if refusal is None:
            yield response(Code.GUESTOS_MGR_REGISTER_CA_OK)
        else:
            yield failure(refusal, Code.GUESTOS_MGR_REGISTER_CA_ERROR)

    return handler


def remove_authority(context: Context) -> Replies:
    """REMOVE_AUTHORITY, by SHA-256 or the beginning of one."""
    _, refusal = yield from ask(context, "remove-authority", sha256=context.request.authority_sha256)
    yield response(Code.CMD_OK) if refusal is None else failure(refusal, Code.CMD_FAILED)


def authorities(context: Context) -> Replies:
    """LIST_AUTHORITIES."""
    result, refusal = yield from ask(context, "authorities")
    if refusal is not None:
        yield failure(refusal, Code.CMD_FAILED)
        return
    yield DaemonToController(
        code=Code.AUTHORITIES_LIST,
        authorities=[
            Authority(**{**each, "purpose": _PURPOSES[each["purpose"]]}) for each in result["authorities"]
        ],
    )


def verify_certificate(context: Context) -> Replies:
    """VERIFY_DEVICE_CERT: another party's certificate, by the device anchors."""
    result, refusal = yield from ask(context, "verify-certificate", certificate=context.request.certificate)
    yield _information(result) if refusal is None else failure(refusal, Code.CMD_FAILED)


def verify_guestos(context: Context) -> Replies:
    """VERIFY_GUESTOS: who signed it, and under which anchor."""
    result, refusal = yield from ask(
        context,
        "verify-guestos",
        config=context.request.guestos_config_file,
        signature=context.request.guestos_config_signature,
        certificate=context.request.guestos_config_certificate,
    )
    yield _information(result) if refusal is None else failure(refusal, Code.CMD_FAILED)


def activate(context: Context) -> Replies:
    """ACTIVATE_CREDENTIAL: the answer to a signer's challenge (TPM 2.0 Part 1, section 24)."""
    result, refusal = yield from ask(
        context,
        "activate",
        credential_blob=context.request.credential_blob,
        encrypted_secret=context.request.encrypted_secret,
    )
    if refusal is not None:
        yield failure(refusal, Code.CMD_FAILED)
        return
    yield DaemonToController(code=Code.CREDENTIAL_ACTIVATED, activated_secret=bytes.fromhex(result["secret"]))


def _information(result: Mapping[str, Any]) -> DaemonToController:
    return DaemonToController(
        code=Code.CERTIFICATE_INFO,
        certificate=CertificateInfo(
            sha256=result["sha256"],
            subject=result["subject"],
            anchor_sha256=result["anchor_sha256"],
            not_after=result["not_after"],
            device_uuid=result["device_uuid"] or None,
        ),
    )
