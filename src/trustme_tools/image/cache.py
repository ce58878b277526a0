# SPDX-License-Identifier: Apache-2.0
"""Built parts that survive between builds, each under the hash of everything it is made of.

The cache is a convenience: deleting it, or pointing TRUSTME_CACHE elsewhere, costs time and nothing
else. An entry is a directory that appears by one rename when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from trustme_tools.cli.verbs import progress

KEEP: Final = 3
"""Entries of one part that are kept; others are removed when a new one appears and they were not used
for `MIN_AGE`."""
MIN_AGE: Final = 2 * 3600
"""Seconds; longer than any program that holds a path into the cache runs."""
FORMAT: Final = 1
"""Part of every key: raise it when the way parts are built changes without their inputs changing."""


def default_root() -> Path:
    """Return the cache directory: TRUSTME_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("TRUSTME_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "trustme-py"


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tree(root: Path, *, suffixes: tuple[str, ...] = ()) -> str:
    """Return a SHA-256 over names, modes and contents below `root` (only `suffixes`, when given)."""
    state = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if "__pycache__" in path.parts or (suffixes and path.suffix not in suffixes):
            continue
        name = path.relative_to(root).as_posix().encode()
        if path.is_symlink():
            state.update(b"l\0" + name + b"\0" + str(path.readlink()).encode() + b"\0")
        elif path.is_file():
            executable = b"x" if path.stat().st_mode & 0o100 else b"-"
            state.update(b"f\0" + name + b"\0" + executable + bytes.fromhex(digest_file(path)))
    return state.hexdigest()


class Cache:
    """Directories of built parts below one root."""

    def __init__(self, root: Path, *, refresh: bool = False) -> None:
        self.root = root
        self.refresh = refresh
        """Build every part anew once, as if nothing were there."""
        self.times: dict[str, float] = {}
        """Seconds each part took; 0.0 when it was there already."""

    def get(self, part: str, inputs: Any, build: Callable[[Path], None]) -> Path:
        """Return the directory of `part` made of `inputs` (JSON-able); `build` fills it if it is new."""
        key = hashlib.sha256(json.dumps([FORMAT, part, inputs], sort_keys=True).encode()).hexdigest()[:20]
        entry = self.root / f"{part}-{key}"
        self.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.root / f"{part}.lock"):
            if entry.is_dir() and not (self.refresh and part not in self.times):
                self.times.setdefault(part, 0.0)
                os.utime(entry)
                return entry
            progress(f"building {part} …")
            started = time.monotonic()
            staging = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=self.root))
            try:
                build(staging)
                staging.chmod(0o755)
                if entry.exists():
                    shutil.rmtree(entry)
                staging.rename(entry)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            self.times[part] = time.monotonic() - started
            progress(f"building {part} … {self.times[part]:.1f} s")
            self._prune(part)
        return entry

    def _prune(self, part: str) -> None:
        entries = [path for path in self.root.glob(f"{part}-*") if len(path.name) == len(part) + 21]
        unused_since = time.time() - MIN_AGE
        for old in sorted(entries, key=_last_used)[:-KEEP]:
            if _last_used(old) < unused_since:
                shutil.rmtree(old, ignore_errors=True)


def _last_used(path: Path) -> float:
    return path.stat().st_mtime


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock: two builds at once make each part once."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
