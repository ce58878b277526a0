# SPDX-License-Identifier: Apache-2.0
"""Devices in operation, and who signs statements for them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.integration.provisioning_rig import Rig, authorities, certificate
from tests.unit.trust import pki
from tests.unit.trust.pki import Issued
from trustme_init.trust.certificate import LIFECYCLE_PURPOSE

SIGNER: Final = pki.Wish(
    "signer",
    key_usage=pki.usage("digital_signature"),
    purpose=x509.ExtendedKeyUsage([LIFECYCLE_PURPOSE]),
)


@cache
def lifecycle_ca() -> Issued:
    """Return the CA that is the lifecycle anchor."""
    return pki.issue(pki.ROOT.but(subject="lifecycle"))


@cache
def signer(under: str) -> Issued:
    """Return who signs statements under one of the CAs of `authorities`, or under the lifecycle CA."""
    issuer = lifecycle_ca() if under == "lifecycle" else getattr(authorities(), under)
    return pki.issue(SIGNER, issuer)


def sha256(issued: Issued) -> str:
    """Return what an anchor goes by."""
    return hashlib.sha256(issued.der).hexdigest()


def document(rig: Rig | None, serial: int, action: str, **fields: Any) -> dict[str, Any]:
    """Return a statement for a device, or for any."""
    device_uuid = rig.handle("status")["device_uuid"] if rig is not None else None
    head = {"kind": "trustme.lifecycle-statement", "version": 1, "device_uuid": device_uuid}
    return {**head, "serial": serial, "action": action, **fields}


def replacement(old: Issued, new: Issued, purpose: str, *, overlap: bool = False) -> dict[str, Any]:
    """Return what "replace-authority" says."""
    return {
        "purpose": purpose,
        "old_sha256": sha256(old),
        "certificate": new.pem.decode(),
        "overlap": overlap,
    }


def signed(by: Issued, statement: dict[str, Any] | bytes) -> dict[str, str | bytes]:
    """Return the arguments of "apply-statement"."""
    text = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    signature: bytes = by.key.sign(text, ec.ECDSA(hashes.SHA512()))
    return {"statement": text, "signature": signature, "certificate": by.pem, "token": b"", "pin": ""}


def apply(rig: Rig, by: str, serial: int, action: str, **fields: Any) -> dict[str, Any]:
    """Have a device obey a statement."""
    return rig.handle("apply-statement", signed(signer(by), document(rig, serial, action, **fields)))


def refused(rig: Rig, by: str, serial: int, action: str, **fields: Any) -> str:
    """Return the code of the refusal of a statement."""
    return rig.attempt("apply-statement", signed(signer(by), document(rig, serial, action, **fields)))


def certified(rig: Rig, request: str, ca: Issued, serial: int = 5) -> str:
    """Be the signer of a device's certificate; its PEM."""
    return certificate(request.encode(), ca, rig.handle("status")["device_uuid"], serial).decode()


def make_operational(rig: Rig) -> None:
    """Bring a new device to operation, with a lifecycle anchor; the power is on."""
    rig.boot()
    rig.fill()
    rig.handle("add-authority", {"purpose": "lifecycle", "certificate": lifecycle_ca().pem})
    rig.handle("complete")


def tree(root: Path) -> dict[str, bytes]:
    """Return every file of a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
