# SPDX-License-Identifier: Apache-2.0
"""The open device: writes bytes and zeros, discards space, and reads what is really on the medium."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Final

from trustme_init.linux import block
from trustme_tools.flash.source import CHUNK

# include/uapi/linux/fs.h
BLKFLSBUF: Final = 0x1261
BLKDISCARD: Final = 0x1277
BLKZEROOUT: Final = 0x127F
_RANGE: Final = struct.Struct("=QQ")
_ZERO_PIECE: Final = 16 * CHUNK
"""Bytes zeroed by one call: a disk that cannot do it by itself is written, and progress is to be seen."""


class Target:
    """A block device, or a plain file in its place, open for reading and writing as `fd`."""

    def __init__(self, fd: int, *, size: int, sector_size: int, is_block: bool) -> None:
        self.size = size
        self.sector_size = sector_size
        self._fd = fd
        self._is_block = is_block

    def read(self, offset: int, size: int) -> bytes:
        """Read as usual (a `gpt.ReadAt`). Raises OSError."""
        return os.pread(self._fd, size, offset)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`. Raises OSError."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def zero(self, offset: int, size: int) -> Iterator[int]:
        """Make bytes zero; yields how many are done. Raises OSError."""
        for start in range(offset, offset + size, _ZERO_PIECE):
            length = min(_ZERO_PIECE, offset + size - start)
            if self._is_block and not (start % self.sector_size or length % self.sector_size):
                # By the disk itself where it can, and it never leaves anything else behind than zeros.
                fcntl.ioctl(self._fd, BLKZEROOUT, _RANGE.pack(start, length))
            else:
                for position in range(start, start + length, CHUNK):
                    self.write(position, bytes(min(CHUNK, start + length - position)))
            yield length

    def discard(self, offset: int, size: int) -> bool:
        """Tell the disk that nobody needs these bytes any more; False if it does not take that."""
        start = -(-offset // self.sector_size) * self.sector_size
        end = (offset + size) // self.sector_size * self.sector_size
        if not self._is_block or end <= start:
            return False
        try:
            fcntl.ioctl(self._fd, BLKDISCARD, _RANGE.pack(start, end - start))
        except OSError:
            return False
        return True

    def sync(self) -> None:
        """Return when all that was written is on the medium. Raises OSError."""
        os.fsync(self._fd)

    def read_back(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield what the medium holds, past the page cache. Raises OSError.

        A plain file's cache is dropped instead: its file system may not know direct reads.
        """
        if self._is_block:
            fcntl.ioctl(self._fd, BLKFLSBUF, 0)
        else:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        if self._is_block:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            # Direct reads want memory, offset and length in whole sectors.
            with mmap.mmap(-1, CHUNK + 2 * self.sector_size) as buffer:
                for start in range(offset, offset + size, CHUNK):
                    yield self._read(buffer, start, min(CHUNK, offset + size - start))
        finally:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)

    def _read(self, buffer: mmap.mmap, offset: int, size: int) -> bytes:
        first = offset // self.sector_size * self.sector_size
        end = min(-(-(offset + size) // self.sector_size) * self.sector_size, self.size)
        with memoryview(buffer) as memory, memory[: end - first] as view:
            got = os.preadv(self._fd, [view], first)
        if got != end - first:
            raise OSError(f"{got} of {end - first} bytes at {first} can be read")
        return buffer[offset - first : offset - first + size]

    def announce(self) -> None:
        """Let the kernel look at the new partition table, where it looks at all."""
        if self._is_block:
            try:
                block.reread_partitions(self._fd)
            except OSError:
                # EINVAL: a disk that the kernel does not scan. What it sees of the disk changes nothing here.
                return
