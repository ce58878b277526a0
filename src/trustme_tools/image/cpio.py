# SPDX-License-Identifier: Apache-2.0
"""Write cpio archives ("newc", kernel Documentation/driver-api/early-userspace/buffer-format.rst).

Everything is owned by root, sorted, and carries one time stamp, so equal content gives equal bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

_TRAILER: Final = "TRAILER!!!"
_ALIGN: Final = 4


class Entry(NamedTuple):
    """One member: `mode` with its type bits; `source` is content, or the path to read it from."""

    mode: int
    source: bytes | Path = b""
    device: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Archive:
    """A file system that is being put together in memory; later additions replace earlier ones."""

    timestamp: int
    """Seconds since the epoch, for every member."""
    entries: dict[str, Entry] = field(default_factory=dict)

    def _add(self, path: str, entry: Entry) -> None:
        parent = path.rpartition("/")[0]
        if parent and parent not in self.entries:
            self.directory(parent)
        self.entries[path] = entry

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory and those above it."""
        self._add(path, Entry(stat.S_IFDIR | mode))

    def file(self, path: str, source: bytes | Path, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, Entry(stat.S_IFREG | mode, source))

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a device node."""
        self._add(path, Entry(stat.S_IFCHR | mode, b"", (major, minor)))

    def tree(self, root: Path, path: str = "") -> None:
        """Add everything below `root` at `path`: executables 0755, other files 0644."""
        for member in sorted(root.rglob("*")):
            name = f"{path}/{member.relative_to(root).as_posix()}".lstrip("/")
            if member.is_symlink():
                self.symlink(name, str(member.readlink()))
            elif member.is_dir():
                self.directory(name)
            elif member.is_file():
                self.file(name, member, 0o755 if member.stat().st_mode & 0o100 else 0o644)

    def chunks(self) -> Iterator[bytes]:
        """Yield the archive piece by piece."""
        for number, (path, entry) in enumerate(sorted(self.entries.items()), start=1):
            content = entry.source.read_bytes() if isinstance(entry.source, Path) else entry.source
            yield _header(path, number, entry, self.timestamp, len(content))
            yield content
            yield b"\0" * (-len(content) % _ALIGN)
        yield _header(_TRAILER, 0, Entry(0), 0, 0)

    def bytes(self) -> bytes:
        """Return the whole archive."""
        return b"".join(self.chunks())


def _header(path: str, inode: int, entry: Entry, time: int, size: int) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, time, size, 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    return header + b"\0" * (-len(header) % _ALIGN)
