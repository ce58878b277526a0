# SPDX-License-Identifier: Apache-2.0
"""The initramfs, in two cpio archives that the kernel unpacks over one another.

The base (Python, libraries, tools, kernel modules) changes with package versions only and is cached; the
product archive (our package, `/init`, the policy) is made anew in under a second.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.image import modules, packages
from trustme_tools.image.cache import Cache, digest_file
from trustme_tools.image.cpio import Archive
from trustme_tools.image.packages import PYTHON
from trustme_tools.image.target import (
    LIBRARY_DIR,
    LOADER,
    MULTIARCH,
    SITE,
    STDLIB,
    compile_tree,
    is_elf,
    needed_libraries,
)
from trustme_tools.tooling import run

ZSTD_LEVEL: Final = 3
"""Level 19 takes 40 s for 12 % less."""

INIT: Final = b"""\
#!/usr/bin/python3 -I
# SPDX-License-Identifier: Apache-2.0
from trustme_init.boot.pid1 import main

main()
"""

STDLIB_OMITTED: Final = (
    *("EXTERNALLY-MANAGED", "LICENSE.txt", "_distutils_system_mod.py", "sitecustomize.py"),
    *("_aix_support.py", "_android_support.py", "_apple_support.py", "_ios_support.py", "_osx_support.py"),
    *("_pyrepl", "antigravity.py", "curses", "dbm", "ensurepip", "idlelib", "lib2to3", "pydoc_data"),
    *("sqlite3", "test", "this.py", "tkinter", "turtle.py", "turtledemo", "venv", "wsgiref"),
    *("xmlrpc", "config-3.13-x86_64-linux-gnu", "doctest.py", "pydoc.py", "pdb.py", "webbrowser.py"),
    *("__hello__.py", "__phello__", "_sysconfigdata__linux_x86_64-linux-gnu.py"),
)
"""Parts of the standard library that no program on the device can use: tests, teaching, desktops, other
systems. A declared list, because a traced one silently loses what only rare paths import."""

_DYNLOAD_OMITTED: Final = (
    "_codecs_cn",
    "_codecs_hk",
    "_codecs_iso2022",
    "_codecs_jp",
    "_codecs_kr",
    "_codecs_tw",
    "_curses",
    "_dbm",
    "_sqlite3",
    "_test",
    "_xxtest",
    "xxlimited",
    "xxsubtype",
    "readline",
)

PROGRAMS: Final = ("usr/bin/kmod", f"usr/bin/{PYTHON}", "usr/sbin/mke2fs", "usr/sbin/sfdisk")
LINKS: Final[Mapping[str, str]] = {
    "bin": "usr/bin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "sbin": "usr/sbin",
    LOADER: f"../lib/{MULTIARCH}/ld-linux-x86-64.so.2",
    "usr/bin/python3": PYTHON,
    "usr/sbin/mkfs.ext4": "mke2fs",
    "usr/sbin/modprobe": "../bin/kmod",
}
PLUGINS: Final = ("libtss2-tcti-device.so.0",)
"""Opened by name while running, so no program's header shows the need."""

DIRECTORIES: Final = ("data", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var")
DEVICE_NODES: Final = (
    # Python aborts before its first line if it finds neither RDRAND nor /dev/urandom.
    ("dev/console", 5, 1, 0o600),
    ("dev/kmsg", 1, 11, 0o600),
    ("dev/null", 1, 3, 0o666),
    ("dev/random", 1, 8, 0o666),
    ("dev/urandom", 1, 9, 0o666),
    ("dev/zero", 1, 5, 0o666),
)


def compress(archive: Archive, target: Path) -> None:
    """Write an archive as one zstd frame, padded so that another may follow."""
    data = run(
        "zstd",
        [f"-{ZSTD_LEVEL}", "--quiet", "--no-progress", "--stdout", "-"],
        purpose="compress the initramfs",
        stdin=archive.bytes(),
    )
    target.write_bytes(data + b"\0" * (-len(data) % 4))


def base(cache: Cache, tree: Path, libraries: Path, *, extra_modules: Sequence[str], timestamp: int) -> Path:
    """Return a directory with `initramfs.cpio.zst`, the part that does not hold our own code."""
    release = packages.kernel_version(tree)
    own = (*modules.DEVICE_MODULES, *modules.VOLUME_MODULES, *modules.NETWORK_MODULES)
    names = [*own, *modules.ACCELERATORS, *extra_modules]

    def build(target: Path) -> None:
        archive = Archive(timestamp)
        with tempfile.TemporaryDirectory(dir=cache.root, prefix=".initramfs-") as name:
            work = Path(name)
            _stage_python(tree, libraries, work)
            modules.install(tree, release, names, work / "modules")
            for directory in DIRECTORIES:
                archive.directory(directory, 0o1777 if directory == "tmp" else 0o755)
            for path, major, minor, mode in DEVICE_NODES:
                archive.character_device(path, major, minor, mode)
            archive.tree(work / "root")
            archive.tree(work / "modules/lib", "usr/lib")
            for program in PROGRAMS:
                archive.file(program, tree / program, 0o755)
            for path, link in LINKS.items():
                archive.symlink(path, link)
            objects = [tree / program for program in PROGRAMS]
            objects += [path for path in sorted((work / "root").rglob("*.so*")) if is_elf(path)]
            objects += [tree / LIBRARY_DIR / plugin for plugin in PLUGINS]
            for library in sorted(needed_libraries(tree, objects) | {*PLUGINS, "ld-linux-x86-64.so.2"}):
                archive.file(f"{LIBRARY_DIR}/{library}", (tree / LIBRARY_DIR / library).resolve(), 0o755)
            archive.file("etc/mke2fs.conf", tree / "etc/mke2fs.conf")
            archive.file("etc/passwd", b"root:x:0:0:root:/root:/usr/sbin/nologin\n")
            archive.file("etc/group", b"root:x:0:\n")
            compress(archive, target / "initramfs.cpio.zst")
        listing = "".join(f"{path}\n" for path in sorted(archive.entries))
        (target / "contents.txt").write_text(listing)

    inputs = [
        *(tree.name, libraries.name, names, timestamp, ZSTD_LEVEL, STDLIB_OMITTED, _DYNLOAD_OMITTED),
        *(PROGRAMS, dict(LINKS), PLUGINS, DIRECTORIES, DEVICE_NODES),
    ]
    return cache.get("initramfs-base", inputs, build)


def _stage_python(tree: Path, libraries: Path, work: Path) -> None:
    """Lay out standard library and libraries below `work`/root, as byte code without sources."""
    root = work / "root"
    stdlib, site = root / STDLIB, root / SITE
    copy_stdlib(tree, stdlib)
    shutil.copytree(libraries / SITE, site, ignore=shutil.ignore_patterns("*.pyi", "*.dist-info", "py.typed"))
    for pattern in ("cffi/*.h", "**/test", "**/tests"):
        for path in list(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for library in sorted(site.rglob("*.so")):
        run("strip", ["--strip-unneeded", library], purpose="strip a library")
    compile_tree(tree, root, [stdlib, site], sourceless=True)


def copy_stdlib(tree: Path, stdlib: Path) -> None:
    """Copy the standard library without what `STDLIB_OMITTED` names; extension modules included."""
    shutil.copytree(
        tree / STDLIB,
        stdlib,
        ignore=lambda directory, names: {
            name
            for name in names
            if name == "__pycache__"
            or (Path(directory) == tree / STDLIB and name in STDLIB_OMITTED)
            or (Path(directory).name == "lib-dynload" and name.startswith(_DYNLOAD_OMITTED))
        },
    )


def product(
    tree: Path,
    source: Path,
    policy: bytes,
    target: Path,
    *,
    timestamp: int,
    init: bytes = INIT,
    download_anchors: bytes = b"",
) -> None:
    """Write the archive with our package (from `source`), `/init` and the policy to `target`.

    `download_anchors`, if any, are PEM: the device checks the servers of GuestOS images by them.
    """
    archive = Archive(timestamp)
    with tempfile.TemporaryDirectory(prefix="trustme-product-") as name:
        root = Path(name)
        package = root / SITE / "trustme_init"
        stage_package(source, package)
        compile_tree(tree, root, [package])
        archive.tree(root)
        archive.file("init", init, 0o755)
        archive.file("etc/trustme/policy.toml", policy)
        if download_anchors:
            archive.file("etc/trustme/download_anchors.pem", download_anchors)
        compress(archive, target)


def stage_package(source: Path, target: Path) -> None:
    """Copy the device package without what only people and type checkers read."""
    if not (source / "__init__.py").is_file():
        raise ToolError(f"{source} is not the device package", code="no-source")
    shutil.copytree(
        source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyi", "*.proto", "py.typed")
    )


def describe(path: Path) -> dict[str, object]:
    """Return size and digest of a built file for the manifest."""
    return {"size": path.stat().st_size, "sha256": digest_file(path)}
