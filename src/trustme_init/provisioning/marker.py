# SPDX-License-Identifier: Apache-2.0
"""Whether provisioning was ever completed, and the mode that follows from it.

The marker is behind an interface: here it is a file on the data volume (the interop layout's name); the
TPM's write-locked NV index of design decision 5 takes its place. Every status says which one decided.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from trustme_init.errors import StorageRefusal
from trustme_init.linux.files import write_atomic

MARKER_NAME: Final = "cml/_cml_provisioned_"


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

    def as_dict(self) -> dict[str, Any]:
        """Return the boot report's form."""
        return {"mode": {"value": self.mode.value, "why": self.why, "source": self.source}}


class Marker(Protocol):
    """The one fact that ends provisioning for good."""

    def completed(self) -> bool:
        """Return whether provisioning was completed; StorageRefusal when that cannot be known."""
        ...

    def complete(self) -> None:
        """Record completion durably; there is no way back."""
        ...


class FileMarker:
    """The marker as a file of the data volume."""

    source: Final = "file on the data volume"

    def __init__(self, data: Path) -> None:
        self._data = data
        self._path = data / MARKER_NAME

    def completed(self) -> bool:
        """Return whether the file is there; anything but a clear yes or no is a refusal, not a no."""
        if not self._data.is_mount():
            # An empty mount point has no marker either: that must not read as "never provisioned".
            raise StorageRefusal(
                "data-volume-not-mounted",
                "the provisioning marker cannot be looked for",
                evidence=f"nothing is mounted at {self._data}",
                remedy="restart the device",
            )
        try:
            os.lstat(self._path)
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise StorageRefusal(
                "marker-unreadable",
                "the provisioning marker cannot be read",
                evidence=f"{self._path}: {exc.strerror}",
                remedy="the data volume is damaged; wipe the device and provision it again",
            ) from exc
        return True

    def complete(self) -> None:
        """Create the file durably before returning."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(self._path, b"", 0o600)
        directory = os.open(self._data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)  # the marker's own directory may be new, too
        finally:
            os.close(directory)


def decide(marker: Marker, source: str) -> ModeFact:
    """Return the mode: provisioning when never completed, operational after."""
    if marker.completed():
        return ModeFact(Mode.OPERATIONAL, "provisioning was completed", source)
    return ModeFact(Mode.PROVISIONING, "provisioning was never completed", source)
