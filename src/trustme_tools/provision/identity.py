# SPDX-License-Identifier: Apache-2.0
"""Who a device is, from the first step of its provisioning to the last, and that no two are one.

Rules:
- The first status of a device binds the walk to a UUID; its device key and endorsement key are bound when
  they are first seen. Whatever says another one later is another device, and nothing more is done to it.
- In one run a UUID, a device key and an endorsement key belong to one device.
"""

from __future__ import annotations

import threading
from typing import Final
from uuid import UUID

from trustme_tools.errors import ToolError
from trustme_tools.provision.device import Status

UUID_NAME: Final = "UUID"
DEVICE_KEY: Final = "device key"
ENDORSEMENT_KEY: Final = "endorsement key"


class Registry:
    """Which device of a run has which names. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[tuple[str, str], str] = {}

    def claim(self, target: str, kind: str, value: str) -> None:
        """Note that a name is this target's; ToolError("device-twice") if it is another's."""
        with self._lock:
            owner = self._owners.setdefault((kind, value), target)
        if owner != target:
            raise ToolError(
                f"two targets are one device, or say so: {owner} and {target}",
                "see that each target reaches a device of its own; a copied disk or TPM is no new device",
                code="device-twice",
                evidence=f"{kind} {value}",
            )


class Identity:
    """The names of one target's device; `expected_uuid` is what the settings file says, if it does."""

    def __init__(self, target: str, registry: Registry, *, expected_uuid: UUID | None) -> None:
        self._target = target
        self._registry = registry
        self._names: dict[str, str] = {}
        if expected_uuid is not None:
            self._names[UUID_NAME] = str(expected_uuid)

    def bind(self, kind: str, value: str) -> None:
        """Note a name, or compare it with the one noted before.

        ToolError: "device-changed", "device-twice".
        """
        known = self._names.setdefault(kind, value)
        if known != value:
            raise ToolError(
                "this is another device than the one the provisioning began with",
                "see what the target's address leads to; nothing was done to the other device",
                code="device-changed",
                evidence=f"{kind} {value}, expected {known}",
            )
        self._registry.claim(self._target, kind, value)

    def see(self, status: Status) -> Status:
        """Compare a status with what is known, and note what is new in it; return it."""
        self.bind(UUID_NAME, str(status.uuid))
        if status.device_key is not None:
            self.bind(DEVICE_KEY, status.device_key)
        if status.endorsement_key is not None:
            self.bind(ENDORSEMENT_KEY, status.endorsement_key)
        return status

    def name(self, kind: str) -> str | None:
        """Return a name that was noted."""
        return self._names.get(kind)
