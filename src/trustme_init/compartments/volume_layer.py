# SPDX-License-Identifier: Apache-2.0
"""dm-crypt over dm-integrity over a loop device: the production VolumeLayer. Decision record 0009.

Every block of 4096 bytes is encrypted with AES-256-XTS and its ciphertext authenticated with HMAC-SHA-256,
which knows the block's number and the volume's salt; journal and superblock are authenticated as well. The
tables are ours, in whole: nothing on the disk chooses a cipher, a length or a flag. Not used, because each
lets somebody who writes the disk have his own data accepted: discards, recalculation, the bitmap instead of
the journal.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.compartments.volumes import BLOCK
from trustme_init.linux import dm, modules
from trustme_init.linux.loop import attach
from trustme_init.linux.uevent import wait_until

if TYPE_CHECKING:
    from trustme_init.compartments.volume_ledger import VolumeKeys

MODULES: Final = ("dm_crypt", "dm_integrity")
ALGORITHMS: Final = ("crypto-xts", "crypto-aes", "crypto-hmac", "crypto-sha256")
"""Aliases: the kernel does not load modules by itself any more, and which ones have these differs."""

INTEGRITY: Final = ":integrity"
"""Suffix of the lower device's name; no volume's name has a colon."""
INTERLEAVE: Final = 32768 * dm.SECTOR
"""Bytes of data in one piece, before which their tags lie."""
TAG: Final = 32
_SUPERBLOCK: Final = 4096
"""Bytes, its authentication code included."""
_GONE_TIMEOUT: Final = 5.0
"""Seconds for the kernel to let go of a volume whose last user has just ended."""


def journal_size(size: int) -> int:
    """Return the bytes of journal for a volume: all its writes pass through it."""
    return min(max(size // 64 // BLOCK * BLOCK, 256 * 1024), 4 * 1024 * 1024)


class DeviceMapperLayer:
    """See the module."""

    def __init__(self) -> None:
        self._loaded = False

    def file_size(self, size: int) -> int:
        """Return what the file must have for superblock, journal and tags, rounded up with some room."""
        pieces = -(-size // INTERLEAVE)
        tags = pieces * (INTERLEAVE // BLOCK) * TAG
        return size + tags + journal_size(size) + 64 * 1024

    def make(self, name: str, file: int, size: int, keys: VolumeKeys) -> Path:
        """Map a file of zeros: the kernel writes superblock and journal when it finds nothing but zeros."""
        return self.open(name, file, size, keys)

    def superblock(self, file: int) -> bytes:
        """Return the superblock; with a journal, dm-integrity writes it once and never again."""
        return os.pread(file, _SUPERBLOCK, 0)

    def open(self, name: str, file: int, size: int, keys: VolumeKeys) -> Path:
        """Map the file of a volume."""
        self._load_modules()
        _wait_until_gone(name)
        with ExitStack() as undo:
            with attach(file, read_only=False, block_size=BLOCK) as loop:
                lower = dm.create(
                    name + INTEGRITY,
                    _uuid(name + INTEGRITY),
                    _integrity(os.fstat(loop.fd).st_rdev, size, keys),
                    secret=True,
                )
            undo.callback(dm.remove, name + INTEGRITY)
            upper = dm.create(name, _uuid(name), _crypt(lower.device, size, keys), secret=True)
            undo.pop_all()
        return upper.path

    def remove(self, prefix: str, *, deferred: bool) -> None:
        """Remove what was mapped under a prefix, the upper device before the lower one."""
        try:
            found = [name for name in dm.names() if name.startswith(prefix)]
        except FileNotFoundError:
            return  # a kernel without device mapper has mapped nothing
        for name in sorted(found, key=lambda name: name.endswith(INTEGRITY)):
            try:
                dm.remove(name, deferred=deferred)
            except OSError as exc:
                if exc.errno != errno.ENXIO:  # gone meanwhile
                    raise

    def _load_modules(self) -> None:
        if not self._loaded:
            modules.load(ALGORITHMS)
            modules.load(MODULES, required=True)
            self._loaded = True


def _uuid(name: str) -> str:
    return f"TRUSTME-VOLUME-{name.removeprefix('trustme-')}"


def _integrity(device: int, size: int, keys: VolumeKeys) -> dm.Target:
    """Documentation/admin-guide/device-mapper/dm-integrity.rst."""
    options = (
        f"internal_hash:hmac(sha256):{keys.authentication.hex()}",
        f"journal_mac:hmac(sha256):{keys.journal.hex()}",
        # The codes also cover section numbers, superblock and a salt.
        "fix_hmac",
        "fix_padding",
        f"block_size:{BLOCK}",
        f"interleave_sectors:{INTERLEAVE // dm.SECTOR}",
        f"journal_sectors:{journal_size(size) // dm.SECTOR}",
    )
    words = (_word(device), "0", "-", "J", str(len(options)), *options)
    return dm.Target(0, size // dm.SECTOR, "integrity", " ".join(words))


def _crypt(device: int, size: int, keys: VolumeKeys) -> dm.Target:
    """Documentation/admin-guide/device-mapper/dm-crypt.rst."""
    words = ("aes-xts-plain64", keys.encryption.hex(), "0", _word(device), "0", "1", f"sector_size:{BLOCK}")
    return dm.Target(0, size // dm.SECTOR, "crypt", " ".join(words))


def _word(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _wait_until_gone(name: str) -> None:
    """Wait until an earlier mapping of the volume, which is on its way out, has gone. OSError(EBUSY)."""

    def gone() -> bool | None:
        return True if {name, name + INTEGRITY}.isdisjoint(dm.names()) else None

    if gone() is None and wait_until(gone, _GONE_TIMEOUT, subsystem="block") is None:
        raise OSError(errno.EBUSY, "is still open", name)
