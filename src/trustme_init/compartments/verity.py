# SPDX-License-Identifier: Apache-2.0
"""A verified block device of two open files: two loop devices and dm-verity.

Nothing needs to be remembered for taking it down: loops are autoclear and the mapping is removed with
its last user, so `close` right after mounting is enough, and a crash of the manager leaves no orphan.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.errors import CompartmentRefusal, TrustRefusal
from trustme_init.linux import dm
from trustme_init.linux.loop import attach

if TYPE_CHECKING:
    from trustme_init.trust.verity import VerityParameters

_FIRST_READ: Final = 4096


class DeviceMapperVerity:
    """The production VerityBackend."""

    def open(
        self, name: str, data_fd: int, hash_fd: int, parameters: VerityParameters
    ) -> DeviceMapperVerityDevice:
        """Return a device that reads `data_fd`, every block checked.

        A corrupt block is an I/O error for whoever reads it, no more: a reboot loop would hide the reason.
        TrustRefusal("verity-mismatch") if not even the first block fits the root hash; CompartmentRefusal
        ("verity-unavailable") if the kernel cannot do it.
        """
        # The old mapping of a name may linger until its last user is gone: a name is never used again.
        unique = f"trustme-{os.urandom(4).hex()}-{name}"[: dm.NAME_LIMIT]
        with ExitStack() as stack:
            try:
                data = stack.enter_context(attach(data_fd, size=parameters.data_size))
                tree = stack.enter_context(attach(hash_fd))
                mapping = dm.create_verity(
                    unique,
                    f"TRUSTME-VERITY-{os.urandom(16).hex()}",
                    data_dev=os.fstat(data.fd).st_rdev,
                    hash_dev=os.fstat(tree.fd).st_rdev,
                    table=table(parameters),
                )
                stack.callback(dm.remove, unique, deferred=True)
                fd = os.open(mapping.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as exc:
                raise CompartmentRefusal(
                    "verity-unavailable",
                    "the image cannot be put under dm-verity",
                    evidence=f"{name}: {exc.filename}: {exc.strerror}",
                    remedy="use a kernel with loop devices and dm-verity (CONFIG_DM_VERITY)",
                ) from exc
            stack.callback(os.close, fd)
            try:
                os.pread(fd, _FIRST_READ, 0)
            except OSError as exc:
                raise TrustRefusal(
                    "verity-mismatch",
                    "the image does not fit its signed root hash",
                    evidence=f"{name}: block 0: {exc.strerror}",
                    remedy="copy the GuestOS to the store again",
                ) from exc
            # The mapping holds the loops now; only its own descriptor and removal stay with the caller.
            kept = stack.pop_all()
        data.close()
        tree.close()
        return DeviceMapperVerityDevice(mapping.path, kept)


def table(parameters: VerityParameters) -> dm.VerityTable:
    """Return what the kernel is told, from what trust/ found signed."""
    return dm.VerityTable(
        root_hash=parameters.root_hash,
        salt=parameters.salt,
        data_blocks=parameters.data_blocks,
        data_block_size=parameters.data_block_size,
        hash_block_size=parameters.hash_block_size,
        hash_start_block=parameters.hash_start_block,
        algorithm=parameters.algorithm,
        version=parameters.version,
    )


class DeviceMapperVerityDevice:
    """One mapping; `path` is its node, `/dev/dm-N`."""

    def __init__(self, path: Path, held: ExitStack) -> None:
        self._path = path
        self._held = held

    @property
    def path(self) -> Path:
        """The node to mount."""
        return self._path

    def close(self) -> None:
        """Let the mapping go with its last user. Safe to call twice."""
        self._held.close()
