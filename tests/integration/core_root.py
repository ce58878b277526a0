# SPDX-License-Identifier: Apache-2.0
"""A root directory for the core GuestOS made of the host's own Python: the native stand-in for the recipe's.

The programs in it are the real ones (`recipes/core/files`, our `control` client); only where Python and
busybox come from differs from the reference image.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import google.protobuf

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/core"
PYTHON = Path("/usr/bin/python3").resolve()
STDLIB = Path(f"/usr/lib/{PYTHON.name}")
NOT_NEEDED = ("test", "idlelib", "ensurepip", "pydoc_data", "lib2to3", "distutils", "config-*", "__pycache__")


def build(destination: Path) -> None:
    """Fill `destination` with a root file system whose init is the recipe's."""
    content = tomllib.loads((RECIPE / "guestos.toml").read_text())["content"]
    for name in ("bin", "sbin", "lib", "lib64"):
        (destination / "usr" / name).mkdir(parents=True)
        (destination / name).symlink_to(f"usr/{name}")
    for name in content["directories"]:
        (destination / name).mkdir()
    shutil.copytree(RECIPE / "files", destination, symlinks=True, dirs_exist_ok=True)
    _python(destination)
    _busybox(destination, content["busybox_links"])
    packages = destination / "usr/lib/python3/dist-packages"
    protobuf = Path(google.protobuf.__file__).parents[1]
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(protobuf, packages / "google", ignore=ignore)
    shutil.copytree(ROOT / "src/trustme_init", packages / "trustme_init", ignore=ignore)
    subprocess.run(
        [
            *(str(PYTHON), "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"),
            *("-s", str(destination), str(destination / "usr/lib")),
        ],
        check=True,
    )


def _python(destination: Path) -> None:
    shutil.copytree(
        STDLIB,
        destination / f"usr/lib/{PYTHON.name}",
        ignore=shutil.ignore_patterns(*NOT_NEEDED),
        symlinks=True,
    )
    _with_libraries(destination, PYTHON, Path("usr/bin") / PYTHON.name)
    link = destination / "usr/bin/python3"
    link.unlink(missing_ok=True)
    link.symlink_to(PYTHON.name)
    for module in (destination / f"usr/lib/{PYTHON.name}/lib-dynload").glob("*.so"):
        _libraries(destination, module)


def _busybox(destination: Path, applets: list[str]) -> None:
    shutil.copy("/bin/busybox", destination / "usr/bin/busybox")
    for applet in applets:
        link = destination / "usr/bin" / applet
        if not link.exists():
            link.symlink_to("busybox")


def _with_libraries(destination: Path, program: Path, place: Path) -> None:
    shutil.copy(program, destination / place)
    _libraries(destination, program)


def _libraries(destination: Path, binary: Path) -> None:
    out = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
    for path in re.findall(r"(/\S+) \(0x", out):
        target = destination / path.lstrip("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
