# SPDX-License-Identifier: Apache-2.0
"""A container's lasting volumes: sparse files that only its key can read or change. Decision record 0009.

Rules:
- What a container has is said by its ledger (`volume_ledger`), which its key authenticates; files are held
  against it, never the other way round. A volume is made only if the ledger does not know it and no file of
  its name is there; a volume that once was ready is never made again, whatever became of it.
- `prepare` begins the ledger of a new key; the key is made durable after that, and `open` comes later still.
  So a key without a ledger is a loss, and so is a ledger that names volumes without a key.
- Every volume has keys of its own, derived from the container's key, its name and a salt: files that changed
  places do not fit.
- The file's superblock is compared with the ledger before the kernel reads it.
- `open` runs in the vault, `release` in the manager once its mounts hold the devices.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from trustme_init.errors import StorageRefusal
from trustme_init.linux.files import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

if TYPE_CHECKING:
    from trustme_init.compartments.volume_ledger import Entry, Ledger, VolumeKeys

FILE_SYSTEM: Final = "ext4"
BLOCK: Final = 4096
"""Bytes: unit of sizes, of encryption, of authentication and of the file system, so nothing is read in order
to be written."""

_EDGE: Final = 256 * 1024
"""Bytes at both ends of a device where mkfs looks for traces of other file systems."""
_MIB: Final = 1024 * 1024
_INSIDE: Final = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
_RESTORE: Final = "restore the container's directory from a backup, or wipe the container to begin anew"


@dataclass(frozen=True, slots=True)
class VolumeRequest:
    """A volume that a container is to have."""

    name: str
    """`image_file` of its mount."""
    size: int
    """Bytes, a multiple of BLOCK."""


@dataclass(frozen=True, slots=True)
class OpenVolume:
    """A volume as a block device with a file system in it, to be mounted."""

    name: str
    device: Path


class VolumeLayer(Protocol):
    """What makes a block device of a file so that nobody without the keys can read or change its content.

    Each method raises OSError, or StorageRefusal where it knows better. `file` is open for reading and
    writing; `name` is the device's and begins with `prefix(uuid)`.
    """

    def file_size(self, size: int) -> int:
        """Return how many bytes of file a device of `size` bytes needs."""
        ...

    def make(self, name: str, file: int, size: int, keys: VolumeKeys) -> Path:
        """Turn a file of zeros into a device; what was never written need not be readable."""
        ...

    def superblock(self, file: int) -> bytes:
        """Return what the layer itself keeps in the file and does not change any more after `make`."""
        ...

    def open(self, name: str, file: int, size: int, keys: VolumeKeys) -> Path:
        """Return the device of a file that `make` has made."""
        ...

    def remove(self, prefix: str, *, deferred: bool) -> None:
        """Remove the devices whose names begin so; `deferred`: each as soon as nobody uses it any more."""
        ...


Formatter = Callable[[Path], None]


def format_ext4(device: Path) -> None:
    """Make the file system of a new volume. StorageRefusal("storage-tool-failed")."""
    from trustme_init.storage.repartition import run_tool

    # A block that was never written cannot be read: it fits no key. So all that is read without having been
    # written, inode tables and journal, is written now, and before that what mkfs changes in part.
    with _opened(device, os.O_RDWR) as fd:
        size = os.lseek(fd, 0, os.SEEK_END)
        for place in (0, size - _EDGE):
            os.pwrite(fd, bytes(_EDGE), place)
    journal = min(max(size // 64, 4 * _MIB), 16 * _MIB) // _MIB
    bytes_per_inode = 8192 if size < 512 * _MIB else 16384
    run_tool(
        [
            "mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-m", "0", "-i", str(bytes_per_inode),
            "-J", f"size={journal}", "-O", "metadata_csum,64bit,sparse_super2,^resize_inode",
            "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard,num_backup_sb=0", str(device),
        ],
    )  # fmt: skip


def prefix(uuid: str) -> str:
    """Return how the names of a container's devices begin."""
    return f"trustme-{uuid}-"


class FileVolumes:
    """The VolumeBackend: rules and files are here, the protection of their content is the layer's."""

    def __init__(self, layer: VolumeLayer, *, make_file_system: Formatter = format_ext4) -> None:
        self._layer = layer
        self._make_file_system = make_file_system

    def prepare(self, uuid: str, directory: Path, key: bytes) -> None:
        """Begin to keep volumes under a new key, before that is made durable.

        StorageRefusal("volume-key-lost") if volumes are there already: they belong to a key that is gone.
        """
        from trustme_init.compartments.volume_ledger import Ledger

        files = sorted(path.name for path in directory.glob("*.img"))
        if files or Ledger.is_lost(directory):
            raise StorageRefusal(
                "volume-key-lost",
                "the container has volumes, but its key is gone",
                evidence=f"{directory}: {', '.join(files)[:200] or 'none of their files'}",
                remedy="restore the key from a backup; wiping the container gives up what is in its volumes",
            )
        Ledger.create(directory, uuid, key)

    def open(
        self, uuid: str, directory: Path, requests: Sequence[VolumeRequest], key: bytes
    ) -> tuple[OpenVolume, ...]:
        """Open the volumes, making those that are new; what is returned is usable until `release`.

        `directory` holds the container's files, `key` are its 96 bytes. Nothing stays open after a refusal.
        StorageRefusal: "volume-key-malformed", "volume-key-wrong", "volume-ledger-missing",
        "volume-ledger-damaged", "volume-missing", "volume-foreign", "volume-size-changed",
        "volume-superblock-damaged", "volume-content-damaged", "volume-busy", "volume-unavailable",
        "volume-not-writable", "storage-tool-failed".
        """
        from trustme_init.compartments.volume_ledger import Ledger

        if not requests:
            return ()
        ledger = Ledger.load(directory, uuid, key)
        opened: list[OpenVolume] = []
        try:
            with _directory(directory) as folder:
                for request in requests:
                    device = self._open(ledger, folder, request)
                    opened.append(OpenVolume(request.name, device))
        except BaseException:
            with suppress(OSError, StorageRefusal):  # the first failure is the one to tell
                self._layer.remove(prefix(uuid), deferred=False)
            raise
        return tuple(opened)

    def release(self, uuid: str) -> None:
        """Let the devices go as soon as nothing mounted holds them; harmless when there are none."""
        try:
            self._layer.remove(prefix(uuid), deferred=True)
        except OSError as exc:
            raise _unavailable(uuid, exc) from exc

    def _open(self, ledger: Ledger, folder: int, request: VolumeRequest) -> Path:
        entry = ledger.entries.get(request.name)
        if entry is not None and entry.size != request.size:
            raise StorageRefusal(
                "volume-size-changed",
                "a volume was made with another size than it is now to have",
                evidence=f"{request.name}: {entry.size} bytes, asked for {request.size}",
                remedy="ask for the old size again, or wipe the container to begin anew",
            )
        try:
            if entry is None or not entry.ready:
                return self._make(ledger, folder, request, begun=entry is not None)
            with _file(folder, request.name, os.O_RDWR) as file:
                return self._open_ready(ledger, file, request.name, entry)
        except OSError as exc:
            raise _unavailable(request.name, exc) from exc

    def _make(self, ledger: Ledger, folder: int, request: VolumeRequest, *, begun: bool) -> Path:
        """Make a volume, or once more one whose making was cut short: nobody has used that yet."""
        if not begun and _exists(folder, request.name):
            raise StorageRefusal(
                "volume-foreign",
                "a file lies where a new volume is to be made, and the container does not know it",
                evidence=_file_name(request.name),
                remedy="remove this file; it belongs to another container or another device",
            )
        entry = ledger.begin(request.name, request.size)
        with suppress(FileNotFoundError):
            os.unlink(_file_name(request.name), dir_fd=folder)
        with _file(folder, request.name, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            os.truncate(file, self._layer.file_size(request.size))
            keys = ledger.keys(request.name, entry)
            path = self._layer.make(ledger.device(request.name), file, request.size, keys)
            self._make_file_system(path)
            with _opened(path, os.O_RDWR) as device:
                os.fsync(device)
            os.fsync(file)
            os.fsync(folder)
            ledger.complete(request.name, self._layer.superblock(file))
        return path

    def _open_ready(self, ledger: Ledger, file: int, name: str, entry: Entry) -> Path:
        size, wanted = os.fstat(file).st_size, self._layer.file_size(entry.size)
        if size != wanted:
            raise StorageRefusal(
                "volume-size-changed",
                "the file of a volume is not as long as it was made",
                evidence=f"{_file_name(name)}: {size} bytes, made with {wanted}",
                remedy=_RESTORE,
            )
        if not entry.fits(self._layer.superblock(file)):
            raise StorageRefusal(
                "volume-superblock-damaged",
                "the file of a volume does not begin as it was made",
                evidence=_file_name(name),
                remedy=_RESTORE,
            )
        path = self._layer.open(ledger.device(name), file, entry.size, ledger.keys(name, entry))
        try:
            with _opened(path, os.O_RDONLY) as device:
                os.pread(device, BLOCK, 0)
        except OSError as exc:
            raise StorageRefusal(
                "volume-content-damaged",
                "a volume cannot be read with its key",
                evidence=f"{_file_name(name)}: block 0: {exc.strerror}",
                remedy=_RESTORE,
            ) from exc
        return path


def _file_name(name: str) -> str:
    return f"{name}.img"


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    try:
        fd = openat2(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise StorageRefusal(
            "volume-missing",
            "the container's directory cannot be opened",
            evidence=f"{path}: {exc.strerror}",
            remedy=_RESTORE,
        ) from exc
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _file(folder: int, name: str, flags: int) -> Iterator[int]:
    """Open the file of a volume: a regular file, by no link; 0600 if it is made."""
    mode = 0o600 if flags & os.O_CREAT else 0
    try:
        fd = openat2(_file_name(name), flags, dirfd=folder, mode=mode, resolve=_INSIDE)
    except OSError as exc:
        if flags & os.O_CREAT:
            raise
        raise _missing(name, str(exc.strerror)) from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _missing(name, "is not a regular file")
        yield fd
    finally:
        os.close(fd)


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(_file_name(name), dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _missing(name: str, why: str) -> StorageRefusal:
    return StorageRefusal(
        "volume-missing",
        "the file of a volume cannot be opened",
        evidence=f"{_file_name(name)}: {why}",
        remedy=_RESTORE,
    )


def _unavailable(name: str, exc: OSError) -> StorageRefusal:
    if exc.errno in {errno.ENOSPC, errno.EROFS, errno.EDQUOT}:
        return StorageRefusal(
            "volume-not-writable",
            "a volume cannot be made or opened, because the data volume cannot be written to",
            evidence=f"{name}: {exc.strerror}",
            remedy="make room on the data volume",
        )
    if exc.errno == errno.EBUSY:
        return StorageRefusal(
            "volume-busy",
            "a volume is still in use",
            evidence=f"{name}: {exc.filename}: {exc.strerror}",
            remedy="stop the container first; if it is stopped, wait until its last process is gone",
        )
    return StorageRefusal(
        "volume-unavailable",
        "the kernel does not make the volume's device",
        evidence=f"{name}: {exc.filename}: {exc.strerror}",
        remedy="use a kernel with loop devices, dm-integrity, dm-crypt, AES-XTS and HMAC-SHA-256",
    )
