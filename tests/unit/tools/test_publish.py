# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from trustme_tools.errors import ToolError
from trustme_tools.publish import staged_directory, write_atomic, write_new


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request: pytest.FixtureRequest) -> object:
    previous = os.umask(request.param)
    yield
    os.umask(previous)


def test_modes_do_not_depend_on_the_umask(umask: None, tmp_path: Path) -> None:
    write_new(tmp_path / "key", b"k", 0o600)
    write_atomic(tmp_path / "cert", b"c")
    with staged_directory(tmp_path / "directory", force=False) as staging:
        assert staging.stat().st_mode & 0o777 == 0o700
        write_new(staging / "file", b"f")
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("key", "cert", "directory")]
    assert modes == [0o600, 0o644, 0o755]


def write_twice(target: Path) -> None:
    with staged_directory(target, force=True) as staging:
        for _ in range(2):
            write_new(staging / "new", b"")


def test_failed_block_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_directory(target, force=False) as staging:
        write_new(staging / "old", b"")
    with pytest.raises(FileExistsError):
        write_twice(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_replacing_needs_force_and_is_one_step(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in ("one", "two"):
        with staged_directory(target, force=True) as staging:
            write_new(staging / name, b"")
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    with pytest.raises(ToolError) as refused, staged_directory(target, force=False):
        pass
    assert refused.value.code == "exists"


def test_write_new_never_replaces_or_follows(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"v")
    (tmp_path / "link").symlink_to(victim)
    for name in ("victim", "link"):
        with pytest.raises(FileExistsError):
            write_new(tmp_path / name, b"x")
    assert victim.read_bytes() == b"v"
