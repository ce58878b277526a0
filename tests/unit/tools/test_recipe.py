# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.proto.guestos_pb2 import GuestOSMount
from trustme_tools.errors import ToolError
from trustme_tools.guestos import recipe

GOOD = """\
version = 1
name = "tiny"
hardware = "x86"
description = "a test"
init_path = "/sbin/init"
init_env = ["A=b"]
[[mounts]]
image_file = "root"
mount_point = "/"
fs_type = "squashfs"
mount_type = "SHARED_RW"
def_size = 64
[[mounts]]
image_file = "data"
mount_point = "/data"
fs_type = "tmpfs"
mount_type = "EMPTY"
"""


def test_good_recipe() -> None:
    parsed = recipe.parse(GOOD)
    assert (parsed.name, parsed.content, parsed.min_ram_limit) == ("tiny", None, None)
    root, data = parsed.mounts
    assert (root.has_image, data.has_image) == (True, False)
    message = root.message()
    assert message.mount_type == GuestOSMount.SHARED_RW
    assert message.def_size == 64
    assert not data.message().HasField("def_size")


def test_recipe_of_the_core() -> None:
    core = recipe.load(Path(__file__).parents[3] / "recipes/core/guestos.toml")
    assert core.name == "trustme-coreos"
    assert core.content is not None
    assert core.content.packages


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("version = 1", "version = 2", "version"),
        ("version = 1", "", "version"),
        ('name = "tiny"', 'nmae = "tiny"', "name"),
        ('name = "tiny"', 'name = "../tiny"', "name"),
        ('name = "tiny"', "name = 1", "name"),
        ('hardware = "x86"', 'hardware = "x86"\nsurprise = 1', "surprise"),
        ('init_path = "/sbin/init"', 'init_path = "/../init"', "init_path"),
        ('["A=b"]', '["A"]', "init_env"),
        ('["A=b"]', "[1]", "init_env"),
        ('mount_type = "SHARED_RW"', 'mount_type = "DEVICE"', "mounts[0].mount_type"),
        ("def_size = 64", "def_size = 0", "mounts[0].def_size"),
        ("def_size = 64", "def_size = true", "mounts[0].def_size"),
        ("def_size = 64", "size = 64", "mounts[0].size"),
        ('image_file = "data"', 'image_file = "root"', "image_file"),
        ('mount_point = "/data"', 'mount_point = "/"', "mount_point"),
        ('mount_point = "/"\n', 'mount_point = "/usr"\n', "mounts"),
        ("[[mounts]]", "[content]\nsuite = 1\n[[mounts]]", "content.suite"),
        ("[[mounts]]", '[content]\nsuite = "trixie"\npakages = []\n[[mounts]]', "content.pakages"),
        ("version = 1", "version = = 1", ""),
    ],
)
def test_refused(old: str, new: str, named: str) -> None:
    assert old in GOOD
    with pytest.raises(ToolError) as refused:
        recipe.parse(GOOD.replace(old, new, 1))
    assert refused.value.code == "recipe-malformed"
    assert named in refused.value.evidence


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("binary", "absent"):
        with pytest.raises(ToolError) as refused:
            recipe.load(tmp_path / name)
        assert refused.value.code == "recipe-unreadable"


LINES = st.sampled_from(
    [*GOOD.splitlines(), "[content]", 'suite = "a"', "x = [", "mounts = 1", 'a = "\\u0000"']
)


@given(st.lists(LINES, max_size=16).map("\n".join) | st.text(max_size=200))
def test_any_text_is_a_recipe_or_refused(text: str) -> None:
    with suppress(ToolError):  # and nothing else
        recipe.parse(text)
