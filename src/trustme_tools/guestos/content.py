# SPDX-License-Identifier: Apache-2.0
"""The root tree of a GuestOS from its recipe: `[content]` of guestos.toml, and `files/` beside it.

Two builders use this. The reference builder makes the whole tree of Debian packages (`build_root`); a Yocto
build installs its own packages and then has the rest done by the same code (`finish_root`).
recipes/core/README.md says what each step does.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_tools.errors import ToolError
from trustme_tools.guestos.recipe import FILES, Content, Recipe
from trustme_tools.tooling import run

if TYPE_CHECKING:
    from trustme_tools.image.cache import Cache

_DEVICE_PACKAGE: Final = "trustme_init"
_APPLET_LISTS: Final = "etc/busybox.links*"
"""What Yocto's busybox was built with, a path per line; Debian's has no such file and has all we use."""
_LEFTOVERS: Final = ("packages.txt", "boot", "etc/apt", "etc/fstab", "etc/hostname", "etc/resolv.conf")
"""What fetching leaves in a tree; host name and resolver are those of the build host."""
_MERGED: Final = ("bin", "lib", "lib64", "sbin")
_SHARED: Final = frozenset({"tmp", "var/tmp"})
"""Directories that everybody may write to, whoever made them first."""
_LINK_LIMIT: Final = 40
"""As many symbolic links as the kernel follows."""


def content_of(recipe: Recipe) -> Content:
    """Return what the recipe's root consists of; ToolError("no-content") if it is built elsewhere."""
    if recipe.content is None:
        raise ToolError(
            f"the recipe {recipe.name} has no [content]",
            "name the directory that becomes its root as well",
            code="no-content",
        )
    return recipe.content


def build_root(cache: Cache, recipe: Recipe, files: Path, source: Path) -> Path:
    """Return the root tree of `recipe`: packages, libraries, our packages from `source`, then `files`."""
    from trustme_tools.image.cache import digest_tree
    from trustme_tools.image.target import SITE, compile_tree

    content = content_of(recipe)
    tree = _base(cache, recipe.name, content)
    chosen = _our_files(content, source)

    def build(target: Path) -> None:
        root = target / "root"
        run("cp", ["-a", f"{tree}/root", root], purpose="copy the base of the GuestOS")
        site = root / SITE
        for path in chosen:
            destination = site / path.relative_to(source.parent)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, destination)
        if chosen:
            compile_tree(root, root, [site / _DEVICE_PACKAGE])
        if files.is_dir():
            copy_files(files, root)
        merge_usr(root)

    contents = {str(path.relative_to(source)): path.read_text() for path in chosen}
    inputs = [tree.name, contents, digest_tree(files), list(_MERGED)]
    return cache.get(f"{recipe.name}-root", inputs, build) / "root"


def finish_root(root: Path, recipe: Recipe, recipe_directory: Path) -> None:
    """Do with a root made elsewhere what does not depend on who packed its programs.

    Removed paths, directories, links to busybox, `files/`. ToolError("no-busybox", "applet-missing",
    "link-in-the-way").
    """
    content = content_of(recipe)
    prepare(root, content)
    link_applets(root, content)
    files = recipe_directory / FILES
    if files.is_dir():
        copy_files(files, root)
    merge_usr(root)


def prepare(root: Path, content: Content) -> None:
    """Remove what is not wanted; make the directories that must be there."""
    from trustme_tools.image.packages import clean_tree

    clean_tree(root, content.remove)
    for directory in content.directories:
        path = root / directory
        if not path.is_dir():
            path.mkdir()
            path.chmod(0o755)  # whatever the umask is
        if directory in _SHARED:
            path.chmod(0o1777)


def merge_usr(root: Path) -> None:
    """Make the links of a merged /usr that no package has made because none had such a directory."""
    for name in _MERGED:
        if (root / "usr" / name).is_dir() and not os.path.lexists(root / name):
            (root / name).symlink_to(f"usr/{name}")


def link_applets(root: Path, content: Content) -> None:
    """Make the links to busybox, unless there is a program of that name."""
    programs = root / "usr/bin"
    missing = [name for name in content.busybox_links if not os.path.lexists(programs / name)]
    if missing and find_file(root, "/usr/bin/busybox") is None:
        raise ToolError(
            "the GuestOS is to have links to busybox, and there is no /usr/bin/busybox",
            "add busybox to the packages (the image needs merged /usr: DISTRO_FEATURES usrmerge in Yocto)",
            code="no-busybox",
        )
    lists = sorted(root.glob(_APPLET_LISTS))
    known = {Path(line).name for file in lists for line in file.read_text().splitlines()}
    if lists and (absent := sorted(set(missing) - known)):
        raise ToolError(
            f"busybox was built without {', '.join(absent)}",
            "switch the applets on in its configuration (recipes/busybox/busybox/guestos.cfg)",
            code="applet-missing",
        )
    for name in missing:
        (programs / name).symlink_to("busybox")


def copy_files(source: Path, root: Path) -> None:
    """Copy a recipe's `files/` over the root: 0755 for programs and directories, 0644 for the rest.

    Only the executable bit is taken over: the other bits of a checkout depend on somebody's umask.
    ToolError("link-in-the-way") for a directory that is a symbolic link in the root.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        target = root / name
        if path.is_dir() and not path.is_symlink():
            if target.is_symlink():
                raise ToolError(
                    f"{source.name}/{name} is a directory, and /{name} of the GuestOS a link to "
                    f"{target.readlink()}",
                    f"move it to {source.name}/{target.readlink()}",
                    code="link-in-the-way",
                )
            target.mkdir(mode=0o755, exist_ok=True)
            continue
        target.unlink(missing_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        else:
            shutil.copyfile(path, target)
            target.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def find_file(root: Path, path: str) -> Path | None:
    """Return the regular file that `path` is inside `root`, None if there is none.

    Links are followed as the container will: an absolute one starts at `root`, none leads out of it.
    """
    todo = [part for part in path.split("/") if part]
    place: list[str] = []
    links = 0
    while todo:
        part = todo.pop(0)
        if part in (".", ".."):
            place = place[:-1] if part == ".." else place
            continue
        here = root.joinpath(*place, part)
        if not here.is_symlink():
            place.append(part)
            continue
        links += 1
        if links > _LINK_LIMIT:
            return None
        target = str(here.readlink())
        place = [] if target.startswith("/") else place
        todo = [*(piece for piece in target.split("/") if piece), *todo]
    found = root.joinpath(*place)
    return found if found.is_file() else None


def _our_files(content: Content, source: Path) -> list[Path]:
    """Return the Python files of the named packages, without their sub-packages."""
    found: set[Path] = set()
    for name in content.trustme_packages:
        first, *rest = name.split(".")
        directory = source.joinpath(*rest)
        if first != source.name or not (directory / "__init__.py").is_file():
            raise ToolError(f"the recipe names {name}, which is no package of ours", code="no-such-package")
        found.update(directory.glob("*.py"))
    return sorted(found)


def _base(cache: Cache, name: str, content: Content) -> Path:
    """Return everything that does not come from this repository, compiled."""
    from trustme_tools.image import libraries, packages
    from trustme_tools.image.target import LIBRARY_DIR, SITE, STDLIB, compile_tree

    fetched = packages.fetch(cache, f"{name}-packages", content.packages, suite=content.suite)
    pins = dict(specifier.split("==", 1) for specifier in content.python_packages)
    wheels = libraries.install(cache, pins, part=f"{name}-libraries") if pins else None

    def build(target: Path) -> None:
        root = target / "root"
        run("cp", ["-a", fetched, root], purpose="copy the packages of the GuestOS")
        packages.clean_tree(root, _LEFTOVERS)
        prepare(root, content)
        if wheels is not None:
            shutil.copytree(wheels / SITE, root / SITE, dirs_exist_ok=True)
        link_applets(root, content)
        python = [root / directory for directory in (STDLIB, SITE) if (root / directory).is_dir()]
        if python:
            compile_tree(root, root, python, sourceless=True)

    inputs = [fetched.name, wheels.name if wheels else "", asdict(content), LIBRARY_DIR, list(_LEFTOVERS)]
    return cache.get(f"{name}-base", inputs, build)
