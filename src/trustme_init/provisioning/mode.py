# SPDX-License-Identifier: Apache-2.0
"""The two modes of a device, and what is known of the present one."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final

FROM_TPM: Final = "TPM NV index"
FROM_FILE: Final = "file on the data volume, for there is no TPM"


class Mode(enum.Enum):
    """What the control interface offers."""

    PROVISIONING = "provisioning"
    OPERATIONAL = "operational"


@dataclass(frozen=True, slots=True)
class ModeFact:
    """The mode of this boot and why."""

    mode: Mode
    why: str
    source: str
    record_sha256: bytes = b""
    """Of the provisioning record that the TPM vouches for."""
    locked: bool = True
    """False: the TPM's marker still has to be locked (a power cut came between writing and locking)."""

    def as_dict(self) -> dict[str, Any]:
        """Return the boot report's form."""
        return {"mode": {"value": self.mode.value, "why": self.why, "source": self.source}}

    @property
    def from_tpm(self) -> bool:
        """Whether a TPM decided; there is none otherwise."""
        return self.source == FROM_TPM

    @property
    def measured(self) -> str:
        """What the measurement of the mode says: mode, source of the decision, record."""
        return f"{self.mode.value}; {self.source}; record {self.record_sha256.hex() or 'none'}"
