# SPDX-License-Identifier: Apache-2.0
"""`guestos.toml`: what becomes the signed configuration of a GuestOS, and what its root image contains.

As strict as the formats of the device: an unknown key, a wrong type or a missing value is refused with
its name. The keys are explained in recipes/core/README.md.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trustme_init.proto.guestos_pb2 import GuestOSMount
from trustme_init.trust.selection import NAME_PATTERN
from trustme_tools.errors import ToolError

RECIPE_VERSION: Final = 1
FILE_NAME: Final = "guestos.toml"
FILES: Final = "files"
"""In the directory of a recipe: what is copied over the root of the GuestOS."""
_IDENTITY: Final = re.compile(NAME_PATTERN)
"""GuestOS and hardware names, as the device accepts them."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Image names and the like: they become file names."""

IMAGE_TYPES: Final = frozenset({"SHARED", "SHARED_RW", "OVERLAY_RW", "FLASH", "STORE_ONLY"})
"""Mount types that have an image file."""
MOUNT_TYPES: Final = IMAGE_TYPES | {"EMPTY"}
"""What a recipe may use: the types GyroidOS keeps in its certified builds."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One `[[mounts]]` table, field for field a GuestOSMount. Sizes in MiB."""

    image_file: str
    mount_point: str
    fs_type: str
    mount_type: str
    def_size: int | None = None
    min_size: int | None = None
    max_size: int | None = None
    mount_data: str | None = None

    @property
    def has_image(self) -> bool:
        """Whether an image file belongs to this mount (a tmpfs or an empty volume has none)."""
        return self.mount_type in IMAGE_TYPES and self.fs_type != "tmpfs"

    def message(self) -> GuestOSMount:
        """Return the mount as the configuration carries it, without what the image decides."""
        message = GuestOSMount(
            image_file=self.image_file,
            mount_point=self.mount_point,
            fs_type=self.fs_type,
            mount_type=GuestOSMount.Type.Value(self.mount_type),
        )
        for name in ("def_size", "min_size", "max_size", "mount_data"):
            value = getattr(self, name)
            if value is not None:
                setattr(message, name, value)
        return message


@dataclass(frozen=True, slots=True)
class Content:
    """The `[content]` table, read by the image builder only."""

    suite: str
    packages: tuple[str, ...] = ()
    python_packages: tuple[str, ...] = ()
    trustme_packages: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    busybox_links: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe. `content` is None for a GuestOS whose root is built elsewhere."""

    name: str
    hardware: str
    description: str
    init_path: str
    mounts: tuple[Mount, ...]
    init_param: tuple[str, ...] = ()
    init_env: tuple[str, ...] = ()
    min_ram_limit: int | None = None
    def_ram_limit: int | None = None
    upstream_version: str | None = None
    update_base_url: str | None = None
    content: Content | None = field(default=None)


def file_of(path: Path) -> Path:
    """Return the recipe file that `path` stands for: a directory is taken for the guestos.toml in it."""
    return path / FILE_NAME if path.is_dir() else path


def load(path: Path) -> Recipe:
    """Read a recipe, a guestos.toml or its directory; ToolError("recipe-unreadable", "recipe-malformed")."""
    path = file_of(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ToolError(
            f"the recipe {path} cannot be read",
            "name a guestos.toml, for example recipes/core/guestos.toml",
            code="recipe-unreadable",
            evidence=str(exc),
        ) from exc
    return parse(text, source=str(path))


def parse(text: str, *, source: str = "recipe") -> Recipe:
    """Judge the text of a recipe; ToolError("recipe-malformed") names the key."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise _malformed(source, str(exc)) from exc
    root = _Table(source, "", document)
    version = root.integer("version", 1, 1_000_000)
    if version != RECIPE_VERSION:
        raise _malformed(source, f"version: {version}, this program reads {RECIPE_VERSION}")
    recipe = Recipe(
        name=root.name("name", _IDENTITY),
        hardware=root.name("hardware", _IDENTITY),
        description=root.text("description"),
        init_path=root.absolute_path("init_path"),
        init_param=root.texts("init_param"),
        init_env=root.texts("init_env"),
        min_ram_limit=root.optional_integer("min_ram_limit", 1, 2**32 - 1),
        def_ram_limit=root.optional_integer("def_ram_limit", 1, 2**32 - 1),
        upstream_version=root.optional_text("upstream_version"),
        update_base_url=root.optional_text("update_base_url"),
        mounts=tuple(_mount(table) for table in root.tables("mounts")),
        content=_content(root.optional_table("content")),
    )
    root.finish()
    _check_mounts(source, recipe.mounts)
    for entry in recipe.init_env:
        if "=" not in entry[1:]:
            raise _malformed(source, f"init_env: {entry!r} is not NAME=VALUE")
    return recipe


def _mount(table: _Table) -> Mount:
    mount = Mount(
        image_file=table.name("image_file"),
        mount_point=table.absolute_path("mount_point"),
        fs_type=table.name("fs_type"),
        mount_type=table.choice("mount_type", MOUNT_TYPES),
        def_size=table.optional_integer("def_size", 1, 2**32 - 1),
        min_size=table.optional_integer("min_size", 1, 2**32 - 1),
        max_size=table.optional_integer("max_size", 1, 2**32 - 1),
        mount_data=table.optional_text("mount_data"),
    )
    table.finish()
    return mount


def _content(table: _Table | None) -> Content | None:
    if table is None:
        return None
    content = Content(
        suite=table.name("suite"),
        packages=table.texts("packages"),
        python_packages=table.texts("python_packages"),
        trustme_packages=table.texts("trustme_packages"),
        directories=table.texts("directories"),
        busybox_links=table.texts("busybox_links"),
        remove=table.texts("remove"),
    )
    table.finish()
    return content


def _check_mounts(source: str, mounts: tuple[Mount, ...]) -> None:
    for key in ("image_file", "mount_point"):
        values = [getattr(mount, key) for mount in mounts]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise _malformed(source, f"mounts: {key} {twice!r} is there twice")
    if not any(mount.mount_point == "/" and mount.has_image for mount in mounts):
        raise _malformed(source, 'mounts: one with mount_point = "/" and an image is needed')


def _malformed(source: str, evidence: str) -> ToolError:
    return ToolError(
        f"{source} is not a well-formed recipe: {evidence}",
        "see recipes/core/README.md for the keys",
        code="recipe-malformed",
        evidence=evidence,
    )


class _Table:
    """One TOML table, read key by key; `finish` refuses whatever was not asked for."""

    def __init__(self, source: str, prefix: str, values: dict[str, Any]) -> None:
        self._source = source
        self._prefix = prefix
        self._values = dict(values)

    def _bad(self, key: str, evidence: str) -> ToolError:
        return _malformed(self._source, f"{self._prefix}{key}: {evidence}")

    def _take(self, key: str, kind: type) -> Any:
        if key not in self._values:
            raise self._bad(key, "missing")
        value = self._values.pop(key)
        if type(value) is not kind:
            raise self._bad(key, f"expected {kind.__name__}, found {value!r}")
        return value

    def text(self, key: str) -> str:
        value: str = self._take(key, str)
        if not value or not value.isprintable():
            raise self._bad(key, "empty or unprintable")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if key in self._values else None

    def name(self, key: str, pattern: re.Pattern[str] = _NAME) -> str:
        value = self.text(key)
        if not pattern.fullmatch(value):
            raise self._bad(key, f"{value!r} is not a plain name")
        return value

    def absolute_path(self, key: str) -> str:
        value = self.text(key)
        if not value.startswith("/") or ".." in value.split("/"):
            raise self._bad(key, f"{value!r} is not an absolute path without ..")
        return value

    def choice(self, key: str, choices: frozenset[str]) -> str:
        value = self.text(key)
        if value not in choices:
            raise self._bad(key, f"{value!r} is none of {', '.join(sorted(choices))}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        if key not in self._values:
            return ()
        values: list[Any] = self._take(key, list)
        if not all(isinstance(value, str) and value and value.isprintable() for value in values):
            raise self._bad(key, "expected a list of non-empty strings")
        return tuple(values)

    def integer(self, key: str, low: int, high: int) -> int:
        value: int = self._take(key, int)
        if not low <= value <= high:
            raise self._bad(key, f"{value} is outside {low}..{high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return self.integer(key, low, high) if key in self._values else None

    def optional_table(self, key: str) -> _Table | None:
        if key not in self._values:
            return None
        return _Table(self._source, f"{self._prefix}{key}.", self._take(key, dict))

    def tables(self, key: str) -> list[_Table]:
        values: list[Any] = self._take(key, list)
        if not values or not all(isinstance(value, dict) for value in values):
            raise self._bad(key, "expected one or more tables")
        return [
            _Table(self._source, f"{self._prefix}{key}[{index}].", value)
            for index, value in enumerate(values)
        ]

    def finish(self) -> None:
        if self._values:
            raise self._bad(min(self._values), "unknown key")
