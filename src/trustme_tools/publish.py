# SPDX-License-Identifier: Apache-2.0
"""Write results so that what is there is either the old or the new, never a half.

Several files that belong together are made in a staging directory beside their destination, which is
then renamed. Modes come from open(2), whatever the umask is.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644
AT_FDCWD: Final = -100
RENAME_EXCHANGE: Final = 2


def write_new(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Create `path` (it must not exist) with exactly `mode` and make it durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        # The umask can only have removed bits from what open was given, so this never widens `mode`.
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def write_atomic(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Replace `path` in one step."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write_new(beside, data, mode)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextmanager
def staged_directory(destination: Path, *, force: bool, mode: int = 0o755) -> Iterator[Path]:
    """Yield an empty directory beside `destination` that takes its place when the block succeeds.

    An existing destination is refused unless `force`; it is then exchanged in one step, and what was
    there is removed afterwards. A failed block leaves nothing behind.
    """
    refuse_existing(destination, force=force)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".new", dir=destination.parent))
    try:
        staging.chmod(0o700)  # a strange umask may have taken even the owner's bits
        yield staging
        staging.chmod(mode)
        _sync_tree(staging)
        replace_directory(staging, destination)
        sync_directory(destination.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(destination: Path, *, force: bool) -> None:
    """ToolError("exists") if `destination` is there and may not be replaced."""
    if os.path.lexists(destination) and not force:
        raise ToolError(
            f"{destination} exists already",
            "name another place, or give --force to replace it",
            code="exists",
        )


def replace_directory(new: Path, destination: Path) -> None:
    """Rename `new` to `destination`; if that exists the two change places in one step."""
    if not os.path.lexists(destination):
        new.rename(destination)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.renameat2(
        AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(destination), ctypes.c_uint(RENAME_EXCHANGE)
    )
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(destination))


def sync_directory(path: Path) -> None:
    """Make renames in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            descriptor = os.open(Path(directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(directory))
