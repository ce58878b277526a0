# SPDX-License-Identifier: Apache-2.0
"""The device's token, brought to what the settings file asks for; a PIN is only tried where that is needed.

Each try with a wrong PIN is one of few, for good: so the device is asked first what is known of its token.
"""

from __future__ import annotations

from trustme_init.tokens.store import DEVELOPMENT_PIN
from trustme_tools.errors import ToolError
from trustme_tools.provision.device import Device, TokenState
from trustme_tools.provision.pins import Secret
from trustme_tools.provision.plan import WantedFile, WantedPin, WantedToken
from trustme_tools.provision.report import DONE, NOT_WANTED, THERE

NONE = "none"
_PUBLISHED = Secret(DEVELOPMENT_PIN)
_WRONG_PIN = "token-wrong-pin"


def settle(device: Device, wanted: WantedToken) -> tuple[str, str]:
    """Bring the token to what is wanted; return the outcome and what was done.

    ToolError: "token-other-pin", "token-not-replaced", and the device's refusals.
    """
    state = device.token()
    match wanted:
        case None:
            return NOT_WANTED, state.kind
        case WantedFile(p12, password, certificate):
            return _file(device, state, p12, password, certificate)
        case WantedPin(pin, present):
            return _pin(device, state, pin, present)


def differences(state: TokenState, wanted: WantedToken) -> list[str]:
    """Return how a token differs from what is wanted, as far as can be told without trying a PIN."""
    if wanted is None:
        return []
    if state.kind == NONE:
        return ["there is no token"]
    if isinstance(wanted, WantedFile):
        same = state.certificate == wanted.certificate
        return [] if same else [f"token certificate {state.certificate}, expected {wanted.certificate}"]
    published = state.default_pin is True and wanted.pin.reveal() != DEVELOPMENT_PIN
    return ["the token's PIN is the published one"] if published else []


def _file(
    device: Device, state: TokenState, p12: bytes, password: Secret, certificate: str
) -> tuple[str, str]:
    if state.kind != NONE and state.certificate == certificate and _opens(device, password):
        return THERE, "the operator's own"
    device.replace_token(p12, password)
    now = device.token().certificate
    if now not in {None, certificate}:  # None: a file may hide its certificate
        raise ToolError(
            "the device's token is not the one that was given to it",
            "look at `control token_status`, and repeat",
            code="token-not-replaced",
            evidence=f"certificate {now}, expected {certificate}",
        )
    return DONE, "replaced by the operator's own"


def _pin(device: Device, state: TokenState, pin: Secret, present: Secret | None) -> tuple[str, str]:
    if state.kind == NONE:
        device.create_token(pin)
        return DONE, "created"
    if state.default_pin is True:
        if pin.reveal() == DEVELOPMENT_PIN:
            return THERE, "with the published PIN"
        device.change_pin(_PUBLISHED, pin)
        return DONE, "PIN changed from the published one"
    if _opens(device, pin):
        return THERE, "with this PIN"
    if present is None:
        raise ToolError(
            "the device has a token with another PIN",
            "give the PIN it has as token.present_pin, or remove the token first (`control token_remove`)",
            code="token-other-pin",
            evidence="the try was counted as a wrong PIN",
        )
    device.change_pin(present, pin)
    return DONE, "PIN changed"


def _opens(device: Device, pin: Secret) -> bool:
    try:
        device.unlock_token(pin)
    except ToolError as refused:
        if refused.code != _WRONG_PIN:
            raise
        return False
    return True
