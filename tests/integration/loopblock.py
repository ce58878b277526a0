# SPDX-License-Identifier: Apache-2.0
"""A `machine.BlockLayer` over one disk image, for kernels that cannot read a GPT.

The disk is a loop device of the whole image, each partition another one with an offset. A second layer on the
same image (a restarted manager) finds the devices of the first one, as it would find the kernel's partitions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from trustme_init.linux import loop


class LoopBlockLayer:
    """Closes every loop device it attached on `close`, as soon as nothing mounted uses them."""

    def __init__(self, image: Path, *, block_size: int = 0, read_only: bool = False) -> None:
        self.image = image
        self._block_size = block_size
        self._read_only = read_only
        self._held: dict[tuple[int, int], loop.Loop] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def disks(self) -> Sequence[Path]:
        return [self._device(0, 0)]

    def partition_device(self, disk: Path, number: int, first_byte: int, size_bytes: int) -> Path:
        assert disk in self.disks()
        assert number > 0
        assert size_bytes > 0
        return self._device(first_byte, size_bytes)

    def settle(self, disk: Path) -> None:
        assert disk in self.disks()

    def close(self) -> None:
        for held in self._held.values():
            # Autoclear: the device goes with its last user, which may be a mount that outlives us.
            held.close()
        self._held.clear()

    def _device(self, offset: int, size: int) -> Path:
        key = (offset, size)
        if key not in self._held:
            self._held[key] = self._find(offset, size) or self._attach(offset, size)
        return self._held[key].path

    def _find(self, offset: int, size: int) -> loop.Loop | None:
        wanted = self.image.stat()
        for entry in sorted(Path("/sys/class/block").glob("loop*/loop")):
            path = Path("/dev", entry.parent.name)
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    backing = loop.backing_of(fd, path)
                except OSError:
                    os.close(fd)
                    continue
                if backing[:4] == (wanted.st_dev, wanted.st_ino, offset, size):
                    return loop.Loop(path, fd)
                os.close(fd)
        return None

    def _attach(self, offset: int, size: int) -> loop.Loop:
        fd = os.open(self.image, (os.O_RDONLY if self._read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            return loop.attach(
                fd, offset=offset, size=size, read_only=self._read_only, block_size=self._block_size
            )
        finally:
            os.close(fd)
