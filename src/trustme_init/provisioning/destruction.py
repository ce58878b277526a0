# SPDX-License-Identifier: Apache-2.0
"""The two ways to lose data on purpose: `wipe` (a user's) and `destroy` (the device itself).

Destroying begins with a tombstone on the data volume. Whatever the power does afterwards, the device never
runs again with half of its keys: a boot that finds the tombstone finishes the work and stops.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.errors import DeviceRefusal, StorageRefusal
from trustme_init.linux.files import write_atomic
from trustme_init.provisioning.layout import Layout, sync_directory
from trustme_init.tpm import ownership
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.properties import permanent

if TYPE_CHECKING:
    from tpm2_pytss import ESAPI

USER_DATA: Final = (
    *("containers", "containers_templates", "keys", "operatingsystems"),
    *("files_shared", "shared", "os_update_bak"),
)
"""What belongs to containers, by the names of the interop layout (section 2.5)."""


def wipe(layout: Layout) -> tuple[str, ...]:
    """Remove what containers left, durably, and return its names; identity, anchors and the token stay."""
    removed = tuple(name for name in USER_DATA if (layout.home / name).exists())
    for name in removed:
        _remove(layout.home / name)
    return removed


def destroy(layout: Layout, tcti: str | None) -> None:
    """Clear the TPM and remove everything; it cannot be taken back once the tombstone is there.

    Raises:
        DeviceRefusal: "tpm-authorisation-lost" and others of `ownership`, before anything is changed.
        StorageRefusal: "disk-not-writable".
    """
    if tcti is None:
        write_atomic(layout.tombstone, b"", 0o600)
    else:
        with open_tpm(tcti) as tpm:
            # Asked before the tombstone: where the TPM cannot be cleared, nothing is to happen at all.
            lockout = _lockout(tpm, layout)
            write_atomic(layout.tombstone, b"", 0o600)
            ownership.clear(tpm, lockout)
    _remove_all(layout)


def finish(layout: Layout, tcti: str | None) -> None:
    """Finish what a power cut came into; the tombstone is there. What cannot be done any more is left."""
    if tcti is not None:
        # What fails here cannot be mended here, and the keys on the disk are to go all the same.
        with suppress(DeviceRefusal), open_tpm(tcti) as tpm:
            ownership.clear(tpm, _lockout(tpm, layout))
    _remove_all(layout)


def _lockout(tpm: ESAPI, layout: Layout) -> bytes:
    """Return the authorisation that clears the TPM; none is needed where it never had an owner."""
    if not permanent(tpm).lockout_auth_set:
        return b""
    return ownership.authorisations(tpm, layout.tpm).lockout


def _remove_all(layout: Layout) -> None:
    # The sealed authorisations last: as long as they are needed to clear the TPM, they must be there.
    entries = sorted(layout.home.iterdir(), key=lambda path: (path == layout.tpm, path.name))
    for path in entries:
        if path != layout.tombstone:
            _remove(path)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as exc:
        raise StorageRefusal(
            "disk-not-writable",
            "what was to be removed is still there",
            evidence=f"{path}: {exc.strerror}",
            remedy="try again; if it stays, replace the disk",
        ) from exc
