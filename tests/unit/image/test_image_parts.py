# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the image builder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from trustme_init import policy as device_policy
from trustme_init.errors import PolicyRefusal
from trustme_tools.errors import ToolError
from trustme_tools.guestos import recipe as recipes
from trustme_tools.image import build, cache, cpio, libraries

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def recipe() -> recipes.Recipe:
    return recipes.load(ROOT / "recipes/core/guestos.toml")


def archive() -> cpio.Archive:
    made = cpio.Archive(1_000_000_000)
    made.file("usr/bin/tool", b"#!x\n", 0o755)
    made.symlink("bin", "usr/bin")
    made.character_device("dev/urandom", 1, 9, 0o666)
    made.directory("tmp", 0o1777)
    made.file("odd", b"12345")
    return made


def test_cpio_lists_as_written_and_is_the_same_every_time() -> None:
    data = archive().bytes()
    assert data == archive().bytes()
    done = subprocess.run(["cpio", "-itv", "--quiet"], input=data, capture_output=True, check=True)
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert [(line[0], line[2], line[3]) for line in lines if line[-1] == "usr/bin/tool"] == [
        ("-rwxr-xr-x", "root", "root")
    ]
    assert {"dev", "usr", "usr/bin"} <= {line[-1] for line in lines}, "parents are made"
    assert any(line[0] == "crw-rw-rw-" and line[-1] == "dev/urandom" for line in lines)
    assert len(data) % 4 == 0


def test_cpio_content_comes_back(tmp_path: Path) -> None:
    subset = cpio.Archive(0)
    subset.file("a/b", bytes(range(256)))
    subprocess.run(["cpio", "-id", "--quiet"], input=subset.bytes(), cwd=tmp_path, check=True)
    assert (tmp_path / "a/b").read_bytes() == bytes(range(256))


def test_the_policy_is_one_the_device_accepts(recipe: recipes.Recipe) -> None:
    options = build.Options(epoch=1_700_000_000, policy={"core.start_timeout_s": 7})
    policy = device_policy.parse(build.policy_text(options, recipe))
    assert policy.core_start_timeout == 7
    assert policy.build_date.timestamp() == 1_700_000_000
    assert not policy.allows_insecure_boot


@pytest.mark.parametrize("key", ["core.typo", "platfrom.allow_insecure_boot"])
def test_a_policy_the_device_would_refuse_is_never_built(recipe: recipes.Recipe, key: str) -> None:
    with pytest.raises(PolicyRefusal):
        build.policy_text(build.Options(policy={key: True}), recipe)


def test_a_release_cannot_be_lenient(recipe: recipes.Recipe) -> None:
    options = build.Options(development=False, policy={"platform.allow_insecure_boot": True})
    with pytest.raises(PolicyRefusal):
        build.policy_text(options, recipe)


def test_a_part_is_built_once_for_the_same_inputs(tmp_path: Path) -> None:
    parts = cache.Cache(tmp_path)
    built: list[str] = []

    def make(target: Path) -> None:
        built.append(target.name)
        (target / "file").write_text("x")

    first = parts.get("part", ["a"], make)
    assert parts.get("part", ["a"], make) == first
    assert parts.get("part", ["b"], make) != first
    assert len(built) == 2


def test_a_failed_part_leaves_nothing(tmp_path: Path) -> None:
    parts = cache.Cache(tmp_path)

    def fail(target: Path) -> None:
        (target / "half").write_text("x")
        raise ToolError("no", code="no")

    with pytest.raises(ToolError):
        parts.get("part", [], fail)
    assert [path.name for path in tmp_path.iterdir()] == ["part.lock"]


def test_only_parts_unused_for_long_are_removed(tmp_path: Path) -> None:
    parts = cache.Cache(tmp_path)
    made = [parts.get("part", [number], lambda _target: None) for number in range(cache.KEEP + 2)]
    assert all(path.is_dir() for path in made)
    for number, path in enumerate(made):
        os.utime(path, (number + 1, number + 1))
    parts.get("part", ["new"], lambda _target: None)
    assert [path.is_dir() for path in made] == [False] * 3 + [True] * (cache.KEEP - 1)


def test_every_device_library_must_be_pinned(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# comment\nname==1.0\n")
    assert libraries.read_pins(file) == {"name": "1.0"}
    file.write_text("name>=1.0\n")
    with pytest.raises(ToolError) as caught:
        libraries.read_pins(file)
    assert caught.value.code == "not-pinned"


def test_a_changed_mode_or_name_changes_the_digest_of_a_tree(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    before = cache.digest_tree(tmp_path)
    (tmp_path / "a").chmod(0o755)
    assert cache.digest_tree(tmp_path) != before
