# SPDX-License-Identifier: Apache-2.0
"""Use the device's own Python and dynamic loader on the host, without a chroot and without root.

Byte code must be made by the Python that runs it, and only the device's loader knows which libraries
its programs need. Both run here straight from the fetched tree.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.image.packages import PYTHON
from trustme_tools.tooling import run

MULTIARCH: Final = "x86_64-linux-gnu"
LIBRARY_DIR: Final = f"usr/lib/{MULTIARCH}"
LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"
SITE: Final = "usr/lib/python3/dist-packages"
STDLIB: Final = f"usr/lib/{PYTHON}"
_ELF: Final = b"\x7fELF"


def _loader(tree: Path) -> list[str]:
    # By its real place: the usual one, /lib64, is a link that only leads there in the tree.
    loader = tree / LIBRARY_DIR / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", str(tree / LIBRARY_DIR)]


def python(tree: Path, arguments: Sequence[str | Path], *, purpose: str) -> bytes:
    """Run the tree's Python; it sees its own standard library only."""
    loader, *options = _loader(tree)
    settings = {"PYTHONHOME": str(tree / "usr"), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    words = [*options, tree / "usr/bin" / PYTHON, *arguments]
    return run(loader, words, purpose=purpose, environment=settings)


def compile_tree(tree: Path, root: Path, directories: Sequence[Path], *, sourceless: bool = False) -> None:
    """Compile `directories` (below `root`) with unchecked-hash byte code that names device paths.

    With `sourceless` the byte code takes the place of the source.
    """
    options = ["-s", str(root), "-p", "/", "--invalidation-mode", "unchecked-hash", "-q", "-f"]
    if sourceless:
        options.append("-b")
    script = ["-S", "-s", "-m", "compileall", *options, *map(str, directories)]
    python(tree, script, purpose="compile Python for the device")
    if sourceless:
        for directory in directories:
            for source in directory.rglob("*.py"):
                if source.with_suffix(".pyc").is_file():
                    source.unlink()


def is_elf(path: Path) -> bool:
    """Say whether a regular file is an ELF object."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == _ELF


def needed_libraries(tree: Path, objects: Iterable[Path]) -> set[str]:
    """Return file names below the tree's library directory that `objects` load, transitively."""
    loader, *options = _loader(tree)
    directory = tree / LIBRARY_DIR
    found: set[str] = set()
    for path in objects:
        done = subprocess.run(
            [loader, *options, "--list", str(path)],
            capture_output=True,
            check=False,
            text=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        if done.returncode and "statically linked" in done.stderr + done.stdout:
            continue
        for line in done.stdout.splitlines():
            if "not found" in line:
                raise ToolError(
                    f"{path.name} needs a library that the package list does not bring",
                    "add the package to trustme_tools/image/packages.py",
                    code="library-missing",
                    evidence=line.strip(),
                )
            target = line.partition("=>")[2].split() or line.split()
            if target and target[0].startswith(f"{directory}/"):
                found.add(Path(target[0]).name)
    return found
