# SPDX-License-Identifier: Apache-2.0
"""One exception tree: every refusal says what, on which evidence, and what a person can do.

`code` is a stable kebab-case name. It is what tests, the boot report and the failure screen use; the
texts may be improved at any time.
"""

from __future__ import annotations


class Refusal(Exception):  # noqa: N818 - the field's word is refusal, and it reads so in every `except`
    """The system declines to go on, for a named reason.

    Evidence never holds a secret: it goes to the console, the boot report and the control interface.
    """

    def __init__(self, code: str, cause: str, *, evidence: str = "", remedy: str = "") -> None:
        super().__init__(code, cause)
        self.code = code
        self.cause = cause
        self.evidence = evidence
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.code}: {self.cause}"
        return f"{text} ({self.evidence})" if self.evidence else text

    def as_dict(self) -> dict[str, str]:
        """Return the refusal as the boot report carries it."""
        return {
            "kind": type(self).__name__,
            "code": self.code,
            "cause": self.cause,
            "evidence": self.evidence,
            "remedy": self.remedy,
        }


class DeviceRefusal(Refusal):
    """A device node, module or kernel facility is not there."""


class FirmwareRefusal(Refusal):
    """What the firmware reports is absent, malformed or not acceptable."""


class PolicyRefusal(Refusal):
    """The signed policy file is malformed or forbids to go on."""


class StorageRefusal(Refusal):
    """A partition or file system is missing, ambiguous, damaged or foreign."""


class TrustRefusal(Refusal):
    """A signature, certificate, configuration or image is not to be believed."""


class CompartmentRefusal(Refusal):
    """A compartment cannot be built, confined or started."""


class ControlRefusal(Refusal):
    """A control request is malformed, unknown or not allowed now."""


class TokenRefusal(Refusal):
    """A token is missing, locked, malformed or the PIN is wrong."""
