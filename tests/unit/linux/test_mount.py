# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.linux.mount import (
    MNT_DETACH,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    children_of_root,
    fsopen_mount,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    umount,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

INITRAMFS = """\
1 1 0:2 / / rw - rootfs rootfs rw
20 1 0:19 / /proc rw,nosuid - proc proc rw
21 1 0:20 / /sys rw - sysfs sysfs rw
22 21 0:21 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
23 1 0:22 / /with\\040blank\\134 rw shared:1 - tmpfs tmpfs rw
"""


def test_children_of_root_are_the_mounts_directly_below_it() -> None:
    assert children_of_root(INITRAMFS) == ["/proc", "/sys", "/with blank\\"]


def test_children_of_root_agree_with_findmnt() -> None:
    found = children_of_root(Path("/proc/self/mountinfo").read_text())
    ids = dict(
        line.split(maxsplit=1)
        for line in subprocess.run(
            ["findmnt", "-rno", "ID,TARGET"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    )
    assert set(found) <= set(ids.values())


@pytest.mark.parametrize("text", ["", "1 2\n", "20 1 0:19 / /proc rw - proc proc rw\n"])
def test_a_mountinfo_without_root_is_an_error(text: str) -> None:
    with pytest.raises(OSError, match="no mount at /"):
        children_of_root(text)


@given(st.text())
def test_any_mountinfo_is_parsed_or_refused(text: str) -> None:
    with suppress(OSError):
        children_of_root(text)


@pytest.mark.root
@needs_root
def test_a_detached_mount_is_configured_attached_and_gone_with_its_descriptor(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    fd = fsopen_mount(
        "tmpfs", source="unit", options={"size": "65536", "mode": "0700"}, attrs=MOUNT_ATTR_NOEXEC
    )
    os.mkdir("inside", dir_fd=fd)
    mount_setattr(fd, set_=MOUNT_ATTR_RDONLY)
    move_mount(fd, target)
    try:
        assert [path.name for path in target.iterdir()] == ["inside"]
        with pytest.raises(OSError, match="Read-only"):
            (target / "inside/x").touch()
        copy = open_tree(target)
        other = tmp_path / "other"
        other.mkdir()
        place = os.open(other, os.O_PATH)
        move_mount(copy, "", dirfd=place)
        os.close(place)
        os.close(copy)
        assert (other / "inside").is_dir()
        umount(str(other))
    finally:
        umount(str(target), MNT_DETACH)
        os.close(fd)


@pytest.mark.root
@needs_root
def test_errors_name_the_file_system_the_kernels_reason_and_the_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"Invalid argument.*nonsense.*'tmpfs'"):
        fsopen_mount("tmpfs", options={"nonsense": "1"})
    with pytest.raises(OSError, match="nosuchfs"):
        fsopen_mount("nosuchfs")
    with pytest.raises(OSError, match="missing"):
        mount(str(tmp_path), str(tmp_path / "missing"), None, MS_BIND)
    with pytest.raises(OSError, match="missing"):
        open_tree(tmp_path / "missing")


@pytest.mark.root
@needs_root
def test_umount_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    mount("unit", str(tmp_path / "target"), "tmpfs")
    try:
        with pytest.raises(OSError, match="link"):
            umount(str(tmp_path / "link"))
    finally:
        umount(str(tmp_path / "target"))
