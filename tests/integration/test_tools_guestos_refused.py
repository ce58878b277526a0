# SPDX-License-Identifier: Apache-2.0
"""GuestOSes that could not start or do not fit are refused, and so are stores that hold a name twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.integration.guestos_kit import RECIPE, build, make_root
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.guestos import check, store
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.directory import PkiDirectory


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> PkiDirectory:
    return create(tmp_path_factory.mktemp("pki") / "made", algorithm=Algorithm.P384, development=True)


@pytest.mark.parametrize(
    "init",
    [
        pytest.param(None, id="nothing there"),
        pytest.param("directory", id="a directory"),
        pytest.param("-> /etc/passwd", id="a link to a file that only the host has"),
        pytest.param("-> init", id="a link to itself"),
        pytest.param("0644", id="not executable"),
    ],
)
def test_a_root_without_its_init_is_refused(tmp_path: Path, pki: PkiDirectory, init: str | None) -> None:
    path = make_root(tmp_path / "root") / "sbin/init"
    path.unlink()
    match init:
        case "directory":
            path.mkdir()
        case "0644":
            path.write_text("#!/bin/sh\n")
        case str():
            path.symlink_to(init.removeprefix("-> "))
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki)
    assert refused.value.code == "no-init"
    assert "/sbin/init" in refused.value.cause
    assert not (tmp_path / "store").exists()


def test_init_is_looked_for_as_the_container_will(tmp_path: Path, pki: PkiDirectory) -> None:
    """An absolute link starts at the root of the GuestOS, and the image that covers the path has it."""
    root = make_root(tmp_path / "root")
    (root / "sbin/init").unlink()
    (root / "sbin/init").symlink_to("/../file1")
    build(tmp_path, pki)
    (root / "sbin/init").unlink()
    programs = tmp_path / "programs"
    programs.mkdir()
    mount = RECIPE[RECIPE.index("[[mounts]]") : RECIPE.rindex("[[mounts]]")]
    text = RECIPE + mount.replace('"root"', '"sbin"').replace('"/"', '"/sbin"')
    sources = {"kernel": tmp_path / "kernel", "sbin": programs}
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki, text, sources=sources, version=2)
    assert refused.value.code == "no-init"
    (programs / "init").write_text("#!/bin/sh\n")
    (programs / "init").chmod(0o755)
    build(tmp_path, pki, text, sources=sources, version=2)


def test_a_guestos_over_the_limit_names_what_is_large(tmp_path: Path, pki: PkiDirectory) -> None:
    with pytest.raises(ToolError) as refused:
        build(tmp_path, pki, size_limit=2**19)
    assert refused.value.code == "guestos-too-large"
    assert "root.img" in refused.value.evidence
    assert not list((tmp_path / "store/operatingsystems").iterdir())
    build(tmp_path, pki, size_limit=2**21)


def other(tmp_path: Path, pki: PkiDirectory, place: str, name: str, version: int) -> Path:
    """Build a GuestOS into a store of its own; return the store."""
    (tmp_path / place).mkdir(exist_ok=True)
    build(tmp_path / place, pki, RECIPE.replace('"tiny"', f'"{name}"'), version=version)
    return tmp_path / place / "store"


def test_stores_of_several_builds_become_one(tmp_path: Path, pki: PkiDirectory) -> None:
    first, second = other(tmp_path, pki, "a", "one", 1), other(tmp_path, pki, "b", "two", 7)
    other(tmp_path, pki, "a", "one", 2)  # two versions of one name from one build are side by side
    target = tmp_path / "all"
    assert main.main(["guestos", "collect", "--out", str(target), str(first), str(second)]) == 0
    stems = [path.stem for path in sorted((target / "operatingsystems").glob("*.conf"))]
    assert stems == ["one-1", "one-2", "two-7"]
    for stem in stems:
        check.verify(
            target / f"operatingsystems/{stem}.conf",
            check.anchors_from([pki.certificate_path("ssig_subca")]),
            at=datetime.now(UTC),
        )


def test_two_guestoses_with_one_name_are_refused_naming_both(tmp_path: Path, pki: PkiDirectory) -> None:
    first, second = other(tmp_path, pki, "a", "one", 1), other(tmp_path, pki, "b", "one", 2)
    with pytest.raises(ToolError) as refused:
        store.collect(tmp_path / "all", [first, second])
    assert refused.value.code == "guestos-twice"
    assert str(first) in refused.value.evidence
    assert str(second) in refused.value.evidence
    assert not (tmp_path / "all").exists()


def test_only_whole_guestoses_are_collected(tmp_path: Path, pki: PkiDirectory) -> None:
    whole = other(tmp_path, pki, "a", "one", 1) / "operatingsystems"
    damages: list[tuple[Callable[[], object], str]] = [
        ((whole / "one-1.conf").unlink, "no-guestos"),
        ((whole / "one-1.sig").unlink, "bad-store"),
        (lambda: shutil.rmtree(whole / "one-1"), "bad-store"),
        (
            lambda: [path.rename(whole / path.name.replace("-1", "-2")) for path in [*whole.iterdir()]],
            "bad-store",
        ),
    ]
    for damage, code in damages:
        shutil.copytree(whole, tmp_path / "kept")
        damage()
        with pytest.raises(ToolError) as refused:
            store.collect(tmp_path / "all", [whole.parent])
        assert refused.value.code == code
        shutil.rmtree(whole)
        (tmp_path / "kept").rename(whole)
