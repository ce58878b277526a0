# SPDX-License-Identifier: Apache-2.0
"""The root tree of a GuestOS from its recipe (recipes/core/README.md says what each step does)."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError
from trustme_tools.guestos.recipe import Content, Recipe
from trustme_tools.image import libraries, packages
from trustme_tools.image.cache import Cache, digest_tree
from trustme_tools.image.target import LIBRARY_DIR, SITE, STDLIB, compile_tree
from trustme_tools.tooling import run

_DEVICE_PACKAGE: Final = "trustme_init"


def content_of(recipe: Recipe) -> Content:
    """Return what the recipe's root consists of; ToolError("no-content") if it is built elsewhere."""
    if recipe.content is None:
        raise ToolError(f"the recipe {recipe.name} has no [content]", code="no-content")
    return recipe.content


def build_root(cache: Cache, recipe: Recipe, files: Path, source: Path) -> Path:
    """Return the root tree of `recipe`: packages, libraries, our packages from `source`, then `files`."""
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
        compile_tree(root, root, [site / _DEVICE_PACKAGE])
        run("cp", ["-a", "--no-preserve=ownership", f"{files}/.", root], purpose="copy the recipe's files")

    contents = {str(path.relative_to(source)): path.read_text() for path in chosen}
    return cache.get(f"{recipe.name}-root", [tree.name, contents, digest_tree(files)], build) / "root"


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
    fetched = packages.fetch(cache, f"{name}-packages", content.packages, suite=content.suite)
    pins = dict(specifier.split("==", 1) for specifier in content.python_packages)
    wheels = libraries.install(cache, pins, part=f"{name}-libraries")

    def build(target: Path) -> None:
        root = target / "root"
        run("cp", ["-a", fetched, root], purpose="copy the packages of the GuestOS")
        packages.clean_tree(root, ["packages.txt", "boot", *content.remove])
        for directory in content.directories:
            (root / directory).mkdir(mode=0o755, exist_ok=True)
        shutil.copytree(wheels / SITE, root / SITE, dirs_exist_ok=True)
        for applet in content.busybox_links:
            link = root / "usr/bin" / applet
            if not link.exists() and not link.is_symlink():
                link.symlink_to("busybox")
        compile_tree(root, root, [root / STDLIB, root / SITE], sourceless=True)

    return cache.get(f"{name}-base", [fetched.name, wheels.name, asdict(content), LIBRARY_DIR], build)
