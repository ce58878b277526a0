# SPDX-License-Identifier: Apache-2.0
"""Choose kernel modules with all they depend on, uncompressed, with fresh module tables."""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.tooling import run

DEVICE_MODULES: Final = (
    "virtio_blk",
    "virtio_rng",
    "efivarfs",
    "dm_mod",
    "dm_verity",
    "loop",
    "squashfs",
    "erofs",
    "overlay",
)
"""What the device needs that Debian's cloud kernel does not have built in."""

VOLUME_MODULES: Final = ("dm_crypt", "dm_integrity", "xts")
"""For containers' lasting volumes; in the image, but not loaded before there is one."""

NETWORK_MODULES: Final = ("veth",)
"""For containers' interfaces, likewise."""

ACCELERATORS: Final = ("aesni_intel", "crc32c_intel", "sha256_ssse3")
"""Loaded when the processor has the instructions (modules.alias), by the kernel or with what needs them."""

_TABLES: Final = ("modules.builtin", "modules.builtin.modinfo", "modules.order")


def normal(name: str) -> str:
    """Return a module's name as the kernel prints it."""
    return name.replace("-", "_")


def install(tree: Path, release: str, names: Sequence[str], target: Path) -> tuple[str, ...]:
    """Put modules of a fetched tree below `target`/lib/modules; return every name that is there.

    A name that is built into the kernel is fine; ToolError("module-unknown") for one that is nowhere.
    """
    source = tree / "usr/lib/modules" / release
    files = {normal(path.name.partition(".ko")[0]): path for path in source.rglob("*.ko*")}
    builtin = {normal(Path(line).stem) for line in (source / "modules.builtin").read_text().splitlines()}
    base = target / "lib/modules" / release
    base.mkdir(parents=True)
    for table in _TABLES:
        shutil.copy(source / table, base)
    chosen: dict[str, None] = {}
    pending = list(names)
    while pending:
        name = normal(pending.pop())
        if name in chosen or name in builtin:
            continue
        if name not in files:
            raise ToolError(f"the kernel {release} has no module {name}", code="module-unknown")
        chosen[name] = None
        path = files[name]
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        destination = base / path.relative_to(source).with_suffix("" if path.suffix == ".xz" else path.suffix)
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(data)
        pending.extend(_dependencies(destination))
    run("depmod", ["-b", target, release], purpose="make the module tables")
    for unused in base.glob("modules.*.bin"):
        if unused.name in {"modules.builtin.bin", "modules.builtin.alias.bin", "modules.symbols.bin"}:
            unused.unlink()
    return tuple(sorted(chosen))


def _dependencies(module: Path) -> list[str]:
    """Return what a module names in its own `depends` note."""
    text = run("modinfo", ["-F", "depends", module], purpose="read a kernel module").decode().strip()
    return [name for name in text.split(",") if name]
