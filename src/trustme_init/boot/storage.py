# SPDX-License-Identifier: Apache-2.0
"""Stage `storage`: the store read-only, the data volume opened or, on first boot, created."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trustme_init.storage.volumes import PlainExt4DataVolume, StorePartition, mount_store

if TYPE_CHECKING:
    from trustme_init.machine import Machine


@dataclass(frozen=True, slots=True)
class StorageFact:
    """Mount points of this boot."""

    store: Path
    data: Path
    data_created: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the boot report's form."""
        return {"storage": {"store": str(self.store), "data": str(self.data), "created": self.data_created}}


def open_volumes(machine: Machine, partition: StorePartition) -> StorageFact:
    """Mount both volumes; StorageRefusal names what is missing, foreign or damaged."""
    mount_store(machine, partition)
    data = PlainExt4DataVolume(machine).open_or_create(partition.disk)
    return StorageFact(machine.store, data.path, data.created)
