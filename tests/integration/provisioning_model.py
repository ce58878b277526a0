# SPDX-License-Identifier: Apache-2.0
"""What a device in provisioning should be, and what each operation should make of it.

A model is a few facts (`Model`); an operation with its arguments is a `Call`, which says with which refusal
it ends and what the facts are afterwards. It knows nothing of files, keys or a TPM. The table of the mode
machine stands here a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_public_key

from tests.integration.provisioning_rig import (
    NEW_PIN,
    PIN,
    TRIES,
    WRONG_PIN,
    Look,
    Rig,
    authorities,
    operator_token,
)
from tests.unit.trust import pki
from trustme_init.provisioning.states import State

P, O, D = State  # noqa: E741 - as in the table

EXPECTED: Final[Mapping[str, Mapping[State, State]]] = {
    "activate": {P: P},
    "add-authority": {P: P},
    "apply-statement": {O: O},
    "authorities": {P: P, O: O},
    "complete": {P: O},
    "container": {P: P, O: O},
    "container-change-pin": {P: P, O: O},
    "container-check-pin": {P: P, O: O},
    "container-create": {P: P, O: O},
    "container-open": {P: P, O: O},
    "container-remove": {P: P},
    "container-update": {P: P, O: O},
    "container-wipe": {P: P},
    "containers": {P: P, O: O},
    "csr": {P: P},
    "destroy": {P: D, O: D},
    "guestos-config": {P: P, O: O},
    "guestos-discard": {P: P, O: O},
    "guestos-examine": {P: P, O: O},
    "guestos-list": {P: P, O: O},
    "guestos-publish": {P: P, O: O},
    "guestos-remove": {P: P},
    "guestos-stage": {P: P, O: O},
    "guestos-tidy": {P: P, O: O},
    "lifecycle-status": {P: P, O: O},
    "prepare": {P: P},
    "push-certificate": {P: P},
    "remove-authority": {P: P},
    "settle": {O: O},
    "status": {P: P, O: O},
    "token-change-pin": {P: P, O: O},
    "token-create": {P: P},
    "token-remove": {P: P},
    "token-replace": {P: P},
    "token-status": {P: P, O: O},
    "token-unlock": {P: P, O: O},
    "verify-certificate": {P: P, O: O},
    "verify-guestos": {P: P, O: O},
    "wipe": {P: P},
}
"""The table once more: who changes it, changes it twice."""

DESTROYED: Final = "device-destroyed"
CLOSED: Final = {P: "provisioning-open", O: "provisioning-closed", D: DESTROYED}
"""How an operation is refused that the table does not have in a state."""
SOME_REFUSAL: Final = "(any)"
FOREIGN_UUID: Final = "11111111-1111-4111-8111-111111111111"


@dataclass(frozen=True)
class Model:
    """What a device should be."""

    state: State = P
    anchors: frozenset[tuple[str, str]] = frozenset()
    """Purpose (or "local") and name, as in `Authorities`."""
    certificate: bytes = b""
    issuer: str = ""
    pin: str | None = None
    """None: there is no token."""
    failed: int = 0
    user_data: bool = False

    def names(self, *purposes: str) -> set[str]:
        return {name for purpose, name in self.anchors if purpose in purposes}

    @property
    def met(self) -> list[str]:
        findings = {
            "device-certificate": bool(self.certificate) and self.issuer in self.names("device"),
            "device-anchor": bool(self.names("device")),
            "guest-anchor": bool(self.names("guest", "local")),
            "token": self.pin is not None,
            "token-pin": self.pin is not None,
        }
        return [name for name, met in findings.items() if met]

    def look(self) -> Look:
        """Return what a device should show (not all of what it shows)."""
        return {
            "mode": self.state.value,
            "marker": ("completed", True, True) if self.state is O else ("open", False, False),
            "met": self.met,
            "authorities": sorted(
                ("guest", "local CA", _subject(name))
                if purpose == "local"
                else (purpose, "certificate store", _subject(name))
                for purpose, name in self.anchors
            ),
            "certificate": hashlib.sha256(self.certificate).hexdigest() if self.certificate else "",
            "token": "none" if self.pin is None else "softtoken",
            "pins": [] if self.pin is None else [self.pin],
            "tries": TRIES - self.failed,
            "containers": bool(self.user_data),
        }


def _subject(name: str) -> str:
    return f"CN={name.replace('_', ' ')}"


Judged = tuple[str, Model]
"""The refusal's code, "" for none, and what comes of it."""


@dataclass(frozen=True)
class Call:
    """An operation with arguments, and what the model says of it where the table has it."""

    operation: str
    judge: Callable[[Model], Judged]
    arguments: Callable[[Rig], Mapping[str, str | bytes]] = lambda _: {}

    def judged(self, model: Model) -> Judged:
        """Return what the whole model says, table and all."""
        row = EXPECTED.get(self.operation)
        if row is None:
            return "operation-unknown", model
        if model.state not in row:
            return CLOSED[model.state], model
        code, after = self.judge(model)
        return (code, model if code not in {"", "token-wrong-pin"} else after)


def unchanged(model: Model) -> Judged:
    return "", model


def refused(code: str) -> Callable[[Model], Judged]:
    return lambda model: (code, model)


def complete(model: Model) -> Judged:
    required = {"device-certificate", "device-anchor", "guest-anchor", "token"}
    return ("", replace(model, state=O)) if required <= {*model.met} else ("provisioning-incomplete", model)


COMPLETE: Final = Call("complete", complete)


def add(purpose: str, name: str) -> Call:
    siblings = {"local": ("guest", "local"), "guest": ("guest", "local")}.get(purpose, (purpose,))

    def judge(model: Model) -> Judged:
        if name in model.names(*siblings):
            return "authority-already-there", model
        if name in model.names("guest", "local", "device", "lifecycle"):
            return "authority-other-purpose", model
        kept = {each for each in model.anchors if purpose != "local" or each[0] != "local"}
        return "", replace(model, anchors=frozenset(kept | {(purpose, name)}))

    def arguments(_: Rig) -> Mapping[str, str | bytes]:
        return {"purpose": purpose, "certificate": _ca(name).pem}

    return Call("add-authority", judge, arguments)


def add_bad(content: bytes) -> Call:
    arguments: Mapping[str, str | bytes] = {"purpose": "guest", "certificate": content}
    return Call("add-authority", refused(SOME_REFUSAL), lambda _: arguments)


def remove(name: str) -> Call:
    def judge(model: Model) -> Judged:
        kept = frozenset(each for each in model.anchors if each[1] != name)
        return ("authority-unknown", model) if kept == model.anchors else ("", replace(model, anchors=kept))

    sha256 = hashlib.sha256(_ca(name).der).hexdigest()
    return Call("remove-authority", judge, lambda _: {"sha256": sha256})


def push(issuer: str, serial: int, *, other: str = "") -> Call:
    def pem(rig: Rig) -> bytes:
        return _device_certificate(
            rig.service._key.public_key() if other != "key" else b"",
            rig.layout.identity.read_text()[7:43] if other != "uuid" else FOREIGN_UUID,
            issuer,
            serial,
        )

    def judge(model: Model) -> Judged:
        if not model.names("device"):
            return "no-anchor", model
        if issuer not in model.names("device"):
            return "untrusted-signer", model
        return f"device-{other}-mismatch" if other else "", replace(model, issuer=issuer)

    return Call("push-certificate", judge, lambda rig: {"certificate": pem(rig)})


def push_bad(content: bytes) -> Call:
    return Call("push-certificate", refused(SOME_REFUSAL), lambda _: {"certificate": content})


def verify(issuer: str) -> Call:
    def judge(model: Model) -> Judged:
        if not model.names("device"):
            return "no-anchor", model
        return "" if issuer in model.names("device") else "untrusted-signer", model

    certificate = _device_certificate(b"", FOREIGN_UUID, issuer, 1)
    return Call("verify-certificate", judge, lambda _: {"certificate": certificate})


def _try(model: Model, pin: str | None, given: str) -> str:
    """Return the code of a try of `given` where `pin` is the right one, or nothing is (None)."""
    if model.failed >= TRIES:
        return "token-locked"
    return "" if given == pin else "token-wrong-pin"


def _tried(model: Model, code: str, **changes: Any) -> Judged:
    if code == "token-wrong-pin":
        return code, replace(model, failed=model.failed + 1)
    return code, replace(model, failed=0, **changes)


def unlock(given: str) -> Call:
    def judge(model: Model) -> Judged:
        if model.pin is None:
            return "token-missing", model
        return _tried(model, _try(model, model.pin, given))

    return Call("token-unlock", judge, lambda _: {"pin": given})


def change(given: str, new: str) -> Call:
    def judge(model: Model) -> Judged:
        if not new:
            return "token-bad-pin", model
        if model.pin is None:
            return "token-missing", model
        return _tried(model, _try(model, model.pin, given), pin=new)

    return Call("token-change-pin", judge, lambda _: {"pin": given, "new_pin": new})


def put_token(pin: str, given: str, *, weak: bool = False) -> Call:
    token = operator_token(pin, weak=weak)
    return Call(
        "token-replace",
        lambda model: _tried(model, _try(model, pin, given), pin=pin),
        lambda _: {"token": token, "pin": given},
    )


def put_bad_token(content: bytes) -> Call:
    return Call(
        "token-replace",
        lambda model: ("token-locked" if model.failed >= TRIES else SOME_REFUSAL, model),
        lambda _: {"token": content, "pin": PIN},
    )


def create(pin: str) -> Call:
    def judge(model: Model) -> Judged:
        if not pin:
            return "token-bad-pin", model
        if model.pin is not None:
            return "token-already-there", model
        return "", replace(model, pin=pin, failed=0)

    return Call("token-create", judge, lambda _: {"pin": pin})


@cache
def _ca(name: str) -> pki.Issued:
    issued: pki.Issued = getattr(authorities(), name)
    return issued


class _Public:
    """A public key in the place of a key pair, for `pki.issue`."""

    def __init__(self, der: bytes) -> None:
        self._der = der

    def public_key(self) -> Any:
        return load_der_public_key(self._der)


@cache
def _device_certificate(key: bytes, device_uuid: str, issuer: str, serial: int) -> bytes:
    """Return a certificate for a key, or for a new one, PEM; the same at each call."""
    wish = pki.Wish(
        device_uuid,
        key_usage=pki.usage("digital_signature"),
        purpose=pki.CLIENT_AUTH,
        more=((_names(device_uuid), False),),
        serial=serial,
    )
    return pki.issue(wish, _ca(issuer), _Public(key) if key else None).pem


def _names(device_uuid: str) -> Any:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"UUID:{device_uuid}")])


def calls() -> dict[str, Call]:
    """Return everything that anybody asks of a device."""
    leaf = pki.issue(pki.LEAF, _ca("guest"))
    expired = pki.issue(pki.ROOT.but(subject="expired", not_after=pki.NOW - 3 * pki.DAY))
    listed = [
        *(Call(name, unchanged) for name in ("prepare", "settle", "status", "authorities", "token-status")),
        *(Call(name, unchanged) for name in ("csr", "lifecycle-status", "guestos-list", "containers")),
        *(
            Call(f"guestos-{name}", refused("argument-missing"))
            for name in ("config", "discard", "examine", "publish", "remove", "stage", "tidy")
        ),
        Call("container", refused("argument-missing")),
        *(
            Call(f"container-{name}", refused("argument-missing"))
            for name in ("change-pin", "check-pin", "create", "open", "remove", "update", "wipe")
        ),
        *(
            Call(name, refused("argument-missing"))
            for name in ("verify-guestos", "apply-statement", "activate")
        ),
        Call("no-such-operation", unchanged),
        COMPLETE,
        Call("wipe", lambda model: ("", replace(model, user_data=False))),
        Call("destroy", lambda _: ("", Model(state=D))),
        *(add(purpose, name) for purpose, name in (("guest", "guest"), ("guest", "other_guest"))),
        *(add(purpose, name) for purpose, name in (("device", "device"), ("device", "other_device"))),
        *(add(purpose, name) for purpose, name in (("local", "local"), ("local", "stranger"))),
        *(add(purpose, name) for purpose, name in (("device", "guest"), ("lifecycle", "stranger"))),
        *(add_bad(content) for content in (b"", leaf.pem, expired.pem, _ca("core").der, leaf.pem * 2)),
        *(remove(name) for name in ("guest", "device", "other_device", "local")),
        *(push("device", serial) for serial in (1, 2)),
        *(push("other_device", 3), push("device", 4, other="key"), push("device", 5, other="uuid")),
        *(push_bad(content) for content in (b"", _ca("device").pem)),
        *(verify(issuer) for issuer in ("device", "stranger")),
        *(unlock(pin) for pin in (PIN, NEW_PIN, WRONG_PIN, WRONG_PIN)),
        *(change(PIN, NEW_PIN), change(NEW_PIN, PIN), change(WRONG_PIN, PIN), change(PIN, "")),
        *(put_token(PIN, PIN), put_token(NEW_PIN, NEW_PIN, weak=True), put_token(PIN, WRONG_PIN)),
        *(put_bad_token(content) for content in (b"", operator_token(PIN)[:-9])),
        *(create(PIN), create("")),
        Call("token-remove", lambda model: ("", replace(model, pin=None, failed=0))),
    ]
    return {f"{number} {call.operation}": call for number, call in enumerate(listed)}


CALLS: Final = calls()
