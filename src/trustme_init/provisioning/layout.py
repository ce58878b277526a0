# SPDX-License-Identifier: Apache-2.0
"""Where provisioning keeps what, below `/data/cml`; the names of interop section 2.5 where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trustme_init.errors import StorageRefusal
from trustme_init.linux.files import sync_directory, write_atomic


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of one data volume."""

    data: Path
    """Where the data volume is mounted."""

    @property
    def home(self) -> Path:
        """Everything of ours."""
        return self.data / "cml"

    @property
    def identity(self) -> Path:
        """The device's UUID."""
        return self.home / "device_id.conf"

    @property
    def marker(self) -> Path:
        """Says that provisioning was completed: a cache of what the TPM knows, where there is one."""
        return self.home / "_cml_provisioned_"

    @property
    def tombstone(self) -> Path:
        """Says that the device was destroyed on command."""
        return self.home / "destroyed"

    @property
    def wiping(self) -> Path:
        """Says that what containers left is being removed."""
        return self.home / "wiping"

    @property
    def record(self) -> Path:
        """What was in place at completion; the TPM knows its digest."""
        return self.home / "provisioning.json"

    @property
    def tokens(self) -> Path:
        """Certificates and the softtoken."""
        return self.home / "tokens"

    @property
    def device_csr(self) -> Path:
        """PEM."""
        return self.tokens / "device.csr"

    @property
    def certification(self) -> Path:
        """What the TPM says of the key in the request, JSON."""
        return self.tokens / "device.csr.tpm"

    @property
    def tpm(self) -> Path:
        """Key blobs and sealed authorisations, of use to this device's TPM only."""
        return self.home / "tpm"

    def make(self) -> None:
        """Make the directories, 0700, durably. Those that exist are left as they are.

        StorageRefusal: "disk-not-writable".
        """
        for directory in (self.home, self.tokens, self.tpm):
            if directory.is_dir():
                continue
            try:
                directory.mkdir(mode=0o700)
                sync_directory(directory.parent)
            except OSError as exc:
                raise not_writable(directory, exc) from exc


def save(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Make a file hold `data`, as `write_atomic`; StorageRefusal("disk-not-writable")."""
    try:
        write_atomic(path, data, mode)
    except OSError as exc:
        raise not_writable(path, exc) from exc


def not_writable(path: Path, error: OSError) -> StorageRefusal:
    """Return the refusal of what cannot be kept, because the disk is full or worse."""
    return StorageRefusal(
        "disk-not-writable",
        "what was to be kept cannot be written",
        evidence=f"{path}: {error.strerror}",
        remedy="make room on the data volume and try again; if it stays, replace the disk",
    )


def remove_durably(path: Path) -> None:
    """Remove a file for good; harmless when it is not there."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)
