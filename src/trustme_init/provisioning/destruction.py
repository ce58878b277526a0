# SPDX-License-Identifier: Apache-2.0
"""The two ways to lose data on purpose: `wipe` (a user's) and `destroy` (the device itself).

Each begins with a note on the data volume, and from then on is done: a boot that finds the note finishes the
work. Destroying begins with the tombstone, which stays: whatever the power does afterwards, the device never
runs again with half of its keys. What it says, nobody can write who cannot unseal the TPM's authorisations:
else a file on the disk would be enough to have the TPM cleared, and a cleared TPM can be provisioned.
"""

from __future__ import annotations

import hashlib
import hmac
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.errors import DeviceRefusal, StorageRefusal
from trustme_init.linux.files import sync_directory
from trustme_init.provisioning.layout import Layout, save
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
_TOMBSTONE_LIMIT: Final = 256


def wipe(layout: Layout) -> tuple[str, ...]:
    """Remove what containers left, durably, and return its names; identity, anchors and the token stay.

    StorageRefusal: "disk-not-writable".
    """
    present = tuple(name for name in USER_DATA if (layout.home / name).exists())
    if present:
        save(layout.wiping, b"")
        finish_wiping(layout)
    return present


def finish_wiping(layout: Layout) -> None:
    """Finish what `wipe` began, if it did; StorageRefusal("disk-not-writable")."""
    if not layout.wiping.exists():
        return
    for name in USER_DATA:
        if (layout.home / name).exists():
            _remove(layout.home / name)
    _remove(layout.wiping)


def destroy(layout: Layout, tcti: str | None) -> None:
    """Clear the TPM and remove everything; it cannot be taken back once the tombstone is there.

    Raises:
        DeviceRefusal: "tpm-authorisation-lost" and others of `ownership`, before anything is changed.
        StorageRefusal: "disk-not-writable".
    """
    if tcti is None:
        save(layout.tombstone, b"")
    else:
        with open_tpm(tcti) as tpm:
            # Asked before the tombstone: where the TPM cannot be cleared, nothing is to happen at all.
            lockout = _lockout(tpm, layout)
            save(layout.tombstone, tombstone_text(lockout))
            ownership.clear(tpm, lockout)
    _remove_all(layout)


def finish(layout: Layout, tcti: str | None) -> None:
    """Finish what a power cut came into; the tombstone is there. What cannot be done any more is left.

    Raises:
        StorageRefusal: "tombstone-forged", and nothing is changed; "disk-not-writable".
    """
    if tcti is not None:
        # What fails here cannot be mended here, and the keys on the disk are to go all the same.
        with suppress(DeviceRefusal), open_tpm(tcti) as tpm:
            lockout = _lockout(tpm, layout)
            if lockout:
                _require_ours(layout, lockout)
            ownership.clear(tpm, lockout)
    _remove_all(layout)


def tombstone_text(lockout: bytes) -> bytes:
    """Return what a tombstone says: that its writer has the TPM's lockout authorisation, which it hides."""
    return hashlib.sha256(b"trustme destroyed " + lockout).hexdigest().encode() + b"\n"


def _require_ours(layout: Layout, lockout: bytes) -> None:
    try:
        with layout.tombstone.open("rb") as file:
            found = file.read(_TOMBSTONE_LIMIT)
    except OSError:
        found = b""
    if not hmac.compare_digest(found, tombstone_text(lockout)):
        raise StorageRefusal(
            "tombstone-forged",
            "a file says that this device was destroyed on command, and this device did not write it",
            evidence=str(layout.tombstone),
            remedy="somebody has written to the disk: put it back as it was, or remove that file",
        )


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
