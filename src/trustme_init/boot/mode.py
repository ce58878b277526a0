# SPDX-License-Identifier: Apache-2.0
"""Stage `mode`: provisioning or operational; and the end of a device that was told to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trustme_init.errors import ControlRefusal
from trustme_init.provisioning import marker

if TYPE_CHECKING:
    from trustme_init.boot.storage import StorageFact
    from trustme_init.machine import Machine
    from trustme_init.provisioning.mode import ModeFact
    from trustme_init.tpm.measure import Measurer


def decide(machine: Machine, storage: StorageFact, measurer: Measurer | None) -> ModeFact:
    """Return the mode; refusals as `marker.decide`. A destruction that was cut short is finished first.

    StorageRefusal: "tombstone-forged" in place of "device-destroyed" if this device did not say so.
    """
    try:
        return marker.decide(storage.marker, storage.data)
    except ControlRefusal:
        _finish_destruction(machine, storage, measurer)
        raise


def _finish_destruction(machine: Machine, storage: StorageFact, measurer: Measurer | None) -> None:
    from trustme_init.provisioning import destruction
    from trustme_init.provisioning.layout import Layout

    if measurer is not None:
        measurer.close()  # a TPM behind a socket serves one at a time
    destruction.finish(Layout(storage.data), machine.tcti if measurer is not None else None)
