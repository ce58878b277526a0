# SPDX-License-Identifier: Apache-2.0
"""Whether provisioning was ever completed, and the mode that follows from it.

The TPM knows (design decision 5): an NV index that is written once, at completion, and locked for good. It
holds the device's UUID and the SHA-256 of the provisioning record. The file on the data volume is a cache for
people and for software of the original; alone it decides nothing. The whole table:

    NV index    marker file  record, UUID       →
    (anything)  (anything)   tombstone          refused: device-destroyed
    undefined   absent       (anything)         provisioning
    open        absent       (anything)         provisioning
    undefined   present      (anything)         refused: marker-contradiction (TPM cleared or exchanged)
    open        present      (anything)         refused: marker-contradiction
    written     (anything)   as the index says  operational
    written     (anything)   absent             refused: provisioned-data-missing
    written     (anything)   others             refused: provisioned-data-foreign

So no file, present or absent, reopens provisioning: with the index written the answer is never
"provisioning". A record may lie there before completion, for it is written first: it means nothing then.

Without a TPM, which only a development policy allows, the file decides, and every status says so.
"""

from __future__ import annotations

import os
from pathlib import Path

from trustme_init.errors import StorageRefusal
from trustme_init.provisioning import identity, record, states
from trustme_init.provisioning.layout import Layout, save
from trustme_init.provisioning.mode import FROM_FILE, FROM_TPM, Mode, ModeFact
from trustme_init.tpm.marker_form import MarkerContent, MarkerReading


def decide(reading: MarkerReading | None, data: Path) -> ModeFact:
    """Return the mode, by the table above; `reading` is None on a machine without a TPM.

    Raises:
        StorageRefusal: "data-volume-not-mounted", "marker-unreadable", "marker-contradiction",
            "provisioned-data-missing", "provisioned-data-foreign", "provisioning-record-damaged",
            "device-id-damaged".
        ControlRefusal: "device-destroyed".
    """
    layout = Layout(data)
    cached = _file_says(layout)
    if layout.tombstone.exists():
        raise states.destroyed()
    if reading is None:
        return _from_file(completed=cached)
    content = reading.content
    if content is not None:
        _check_data(content, layout)
        return ModeFact(
            Mode.OPERATIONAL, "provisioning was completed", FROM_TPM, content.record_sha256, reading.locked
        )
    if cached:
        raise StorageRefusal(
            "marker-contradiction",
            "the disk says that provisioning was completed, the TPM says that it never was",
            evidence=f"TPM marker {reading.state.value}, {layout.marker.name} present",
            remedy="the TPM was cleared or exchanged, or the disk is another device's: put back what belongs "
            "together, or write the image to the disk again and provision the device anew",
        )
    return ModeFact(Mode.PROVISIONING, "provisioning was never completed", FROM_TPM)


def set_cache(layout: Layout) -> None:
    """Write the marker file durably; nothing but a cache where there is a TPM.

    StorageRefusal: "disk-not-writable".
    """
    save(layout.marker, b"")


def _from_file(*, completed: bool) -> ModeFact:
    if completed:
        return ModeFact(Mode.OPERATIONAL, "provisioning was completed", FROM_FILE)
    return ModeFact(Mode.PROVISIONING, "provisioning was never completed", FROM_FILE)


def _file_says(layout: Layout) -> bool:
    """Return whether the marker file is there; anything but a clear yes or no is a refusal, not a no."""
    if not layout.data.is_mount():
        # An empty mount point has no marker either: that must not read as "never provisioned".
        raise StorageRefusal(
            "data-volume-not-mounted",
            "the provisioning marker cannot be looked for",
            evidence=f"nothing is mounted at {layout.data}",
            remedy="restart the device",
        )
    try:
        os.lstat(layout.marker)
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise StorageRefusal(
            "marker-unreadable",
            "the provisioning marker cannot be read",
            evidence=f"{layout.marker}: {exc.strerror}",
            remedy="the data volume is damaged; restore it, or provision the device anew",
        ) from exc
    return True


def _check_data(content: MarkerContent, layout: Layout) -> None:
    """Refuse a data volume that is not the one that was there at completion."""
    found = record.read(layout.record)
    device_uuid = identity.load(layout.identity)
    if found is None or device_uuid is None:
        missing = layout.record if found is None else layout.identity
        raise provisioned_data_missing(f"{missing} is not there")
    if content.record_sha256 != found.sha256 or {device_uuid, found.device_uuid} != {content.device_uuid}:
        raise StorageRefusal(
            "provisioned-data-foreign",
            "this device was provisioned, but not with the data volume that is in it",
            evidence=f"TPM: {content.device_uuid}; disk: {device_uuid}, record of {found.device_uuid}",
            remedy="put back the disk that belongs to this device",
        )


def provisioned_data_missing(evidence: str) -> StorageRefusal:
    """Return the refusal of a completed device whose data volume is gone or empty."""
    return StorageRefusal(
        "provisioned-data-missing",
        "this device was provisioned, and what it was provisioned with is gone",
        evidence=evidence,
        remedy="put back the disk that belongs to this device; to start over, clear the TPM in the firmware",
    )
