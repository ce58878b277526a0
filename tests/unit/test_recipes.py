# SPDX-License-Identifier: Apache-2.0
"""recipes/ serves two builders: the Yocto recipes must say what guestos.toml says. No bitbake is needed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from trustme_tools.guestos import recipe as recipes

ROOT: Final = Path(__file__).resolve().parents[2]
LAYER: Final = ROOT / "recipes"
GUESTOSES: Final = sorted(path.parent for path in LAYER.glob("*/guestos.toml"))

OPENEMBEDDED: Final = {
    "base-files": ["base-files"],
    "busybox-static": ["busybox"],
    "libpython3.13-stdlib": ["python3-io"],
    "netcat-openbsd": ["netcat-openbsd"],
    "python3-minimal": [],
    "python3.13-minimal": ["python3-core"],
    "protobuf": ["python3-protobuf"],
    "trustme_init": ["trustme-init-control"],
    "trustme_init.control": [],
    "trustme_init.control.cli": [],
    "trustme_init.proto": [],
}
"""Debian package, wheel or package of ours → the packages of OpenEmbedded that bring the same."""


def content(directory: Path) -> dict[str, Any]:
    document: dict[str, Any] = tomllib.loads((directory / "guestos.toml").read_text())["content"]
    return document


def bb(directory: Path) -> str:
    (found,) = directory.glob("*.bb")
    return found.read_text().replace("\\\n", " ")


def assigned(text: str, variable: str) -> str | None:
    match = re.search(rf'^{variable} \??= "([^"]*)"', text, re.MULTILINE)
    return match[1] if match else None


def test_the_two_guestoses_are_there() -> None:
    assert [directory.name for directory in GUESTOSES] == ["core", "example-service"]


@pytest.mark.parametrize("directory", GUESTOSES, ids=lambda directory: directory.name)
class TestGuestOs:
    def test_the_recipe_is_well_formed_and_named_as_its_bb(self, directory: Path) -> None:
        recipe = recipes.load(directory)
        (file,) = directory.glob("*.bb")
        assert file.stem == recipe.name

    def test_the_packages_are_the_same(self, directory: Path) -> None:
        parts = content(directory)
        names = [
            *parts["packages"],
            *(specifier.partition("==")[0] for specifier in parts.get("python_packages", [])),
            *parts.get("trustme_packages", []),
        ]
        assert (assigned(bb(directory), "IMAGE_INSTALL") or "").split() == [
            package for name in names for package in OPENEMBEDDED[name]
        ]

    def test_the_bb_takes_everything_else_from_guestos_toml(self, directory: Path) -> None:
        """Files, directories, links and removed paths are the work of `trustme guestos finish`."""
        text = bb(directory)
        assert re.search(r"^inherit image guestos$", text, re.MULTILINE)
        for word in (
            "ROOTFS_POSTPROCESS",
            "do_install",
            "SRC_URI",
            "GUESTOS_TOML",
            "GUESTOS_FILES",
            "GUESTOS_DIR",
        ):
            assert word not in text

    def test_files_have_the_two_modes_that_every_builder_gives_them(self, directory: Path) -> None:
        for path in (directory / "files").rglob("*"):
            if path.is_file() and not path.is_symlink():
                program = path.read_bytes().startswith(b"#!")
                assert bool(path.stat().st_mode & 0o100) == program, path
            assert not path.is_symlink(), "where it leads differs between distributions"
            assert path.relative_to(directory / "files").parts[0] in {"etc", "usr"}, (
                "merged /usr: see README.md"
            )

    def test_every_link_of_files_to_busybox_or_program_is_named_once(self, directory: Path) -> None:
        links = content(directory)["busybox_links"]
        assert len(set(links)) == len(links)
        assert links == sorted(links)


def test_the_core_is_signed_by_the_signer_that_db_vouches_for() -> None:
    assert assigned(bb(LAYER / "core"), "GUESTOS_SIGNER") == "ssig_cml"
    assert assigned(bb(LAYER / "example-service"), "GUESTOS_SIGNER") is None
    guestos = (LAYER / "classes/guestos.bbclass").read_text()
    assert assigned(guestos, "GUESTOS_SIGNER") == "guestos"


def test_every_variable_of_the_class_is_in_the_readme() -> None:
    text = (LAYER / "classes/guestos.bbclass").read_text()
    defined = set(re.findall(r"^(GUESTOS_\w+) \?=", text, re.MULTILINE))
    table = set(re.findall(r"^\| `(\w+)`", (LAYER / "README.md").read_text(), re.MULTILINE))
    assert defined
    assert defined <= table
    assert {name for name in table if name.startswith("GUESTOS_")} == defined


def test_the_layer_names_what_its_recipes_need() -> None:
    text = (LAYER / "conf/layer.conf").read_text()
    assert assigned(text, "LAYERSERIES_COMPAT_trustme-recipes") == "wrynose"
    needed = (assigned(text, "LAYERDEPENDS_trustme-recipes") or "").split()
    assert {"core", "trustme-py", "meta-python", "networking-layer"} <= set(needed)
    readme = (LAYER / "README.md").read_text()
    for layer in needed:
        assert f"`{layer}`" in readme


def test_busybox_is_only_changed_for_our_distribution() -> None:
    (append,) = (LAYER / "busybox").glob("*.bbappend")
    for line in append.read_text().splitlines():
        if "SRC_URI" in line:
            assert line.startswith("SRC_URI:append:trustme ")
