# SPDX-License-Identifier: Apache-2.0
"""Stage `storage`: the store read-only, the data volume opened or, on first boot, created.

A device whose TPM says that it was provisioned has a data volume: there, none is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trustme_init.provisioning.marker import provisioned_data_missing
from trustme_init.storage.volumes import PlainExt4DataVolume, StorePartition, mount_store

if TYPE_CHECKING:
    from trustme_init.machine import Machine
    from trustme_init.tpm.marker_form import MarkerReading
    from trustme_init.tpm.measure import Measurer


@dataclass(frozen=True, slots=True)
class StorageFact:
    """Mount points of this boot."""

    store: Path
    data: Path
    data_created: bool
    marker: MarkerReading | None
    """What the TPM says of provisioning; None on a machine without one."""

    def as_dict(self) -> dict[str, Any]:
        """Return the boot report's form."""
        return {"storage": {"store": str(self.store), "data": str(self.data), "created": self.data_created}}


def open_volumes(machine: Machine, partition: StorePartition, measurer: Measurer | None) -> StorageFact:
    """Mount both volumes; StorageRefusal names what is missing, foreign or damaged.

    "provisioned-data-missing" where the TPM knows of a data volume and there is none.
    """
    mount_store(machine, partition)
    marker = read_marker(measurer)
    volume = PlainExt4DataVolume(machine)
    if marker is not None and marker.completed and not volume.exists(partition.disk):
        raise provisioned_data_missing(f"{partition.disk} has no complete data volume")
    data = volume.open_or_create(partition.disk)
    return StorageFact(machine.store, data.path, data.created, marker)


def read_marker(measurer: Measurer | None) -> MarkerReading | None:
    """Ask the TPM for the provisioning marker; None on a machine without one."""
    return None if measurer is None else measurer.marker()
