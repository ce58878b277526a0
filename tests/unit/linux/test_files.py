# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from trustme_init.linux import files
from trustme_init.linux.syscalls import SYS_close_range, SYS_openat2, syscall


def test_a_failing_call_names_errno_and_file() -> None:
    with pytest.raises(OSError) as caught:
        syscall(SYS_openat2, -100, b"x", None, 0, filename="what")
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "what")
    with pytest.raises(FileNotFoundError):
        files.openat2("/does/not/exist", os.O_RDONLY)


def test_large_and_negative_arguments_arrive_whole() -> None:
    # A 32-bit -1 as the last descriptor would be smaller than the first.
    syscall(SYS_close_range, 2**32 - 2, 2**32 - 1, 0)
    with pytest.raises(OSError) as caught:
        syscall(SYS_close_range, 2**32 - 1, 2**32 - 2, 0)
    assert caught.value.errno == errno.EINVAL


def test_symbolic_links_are_not_followed_anywhere(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real/last").symlink_to("file")
    for name in ("link/file", "real/last"):
        with pytest.raises(OSError) as caught:
            files.openat2(tmp_path / name, os.O_RDONLY)
        assert caught.value.errno == errno.ELOOP
    fd = files.openat2(tmp_path / "link/file", os.O_RDONLY, resolve=0)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_beneath(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").touch()
    directory = os.open(tmp_path / "in", os.O_PATH)
    try:
        for name in ("../out", "/etc"):
            with pytest.raises(OSError) as caught:
                files.openat2(name, os.O_RDONLY, dirfd=directory, resolve=files.RESOLVE_BENEATH)
            assert caught.value.errno == errno.EXDEV
    finally:
        os.close(directory)


def read(path: Path, limit: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return files.read_limited(fd, limit)
    finally:
        os.close(fd)


def test_reading_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read(path, 5) == b"12345"
    assert read(path, 6) == b"12345"
    for limit in (4, 0):
        with pytest.raises(OSError) as caught:
            read(path, limit)
        assert caught.value.errno == errno.EFBIG
    assert read(Path("/proc/self/status"), 65536).startswith(b"Name:")  # its st_size is 0
    with pytest.raises(OSError):
        read(Path("/dev/zero"), 3 * 1024 * 1024)


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_is_written_with_exactly_its_mode(tmp_path: Path, umask: int, mode: int) -> None:
    old = os.umask(umask)
    try:
        files.write_atomic(tmp_path / "secret", b"s", mode)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [tmp_path / "secret"]


def test_a_leftover_and_a_planted_link_are_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / ".state.new").symlink_to("victim")
    files.write_atomic(tmp_path / "state", b"new", 0o600)
    assert (tmp_path / "victim").read_text() == "untouched"
    assert (tmp_path / "state").read_bytes() == b"new"
    assert not (tmp_path / "state").is_symlink()


@pytest.mark.parametrize("cut", ["write", "fsync", "rename"])
def test_a_cut_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    path = tmp_path / "state"
    files.write_atomic(path, b"old", 0o600)

    def power_cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, cut, power_cut)
        with pytest.raises(KeyboardInterrupt):
            files.write_atomic(path, b"new", 0o600)
    assert path.read_bytes() == b"old"
    files.write_atomic(path, b"newer", 0o600)
    assert path.read_bytes() == b"newer"


def test_content_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(fd: int) -> None:
        seen.append("dir" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def spy_rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        seen.append("rename")
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    files.write_atomic(tmp_path / "state", b"x", 0o600)
    assert seen == ["file", "rename", "dir"]


def test_statfs(tmp_path: Path) -> None:
    facts, expected = files.statfs(tmp_path), os.statvfs(tmp_path)
    assert facts.size == expected.f_blocks * expected.f_frsize
    assert facts.type != 0
    assert files.statfs("/proc").type == 0x9FA0
    with pytest.raises(FileNotFoundError) as caught:
        files.statfs("/does/not/exist")
    assert caught.value.filename == "/does/not/exist"


def test_only_a_regular_file_of_its_own_is_read(tmp_path: Path) -> None:
    plain, link, pipe = tmp_path / "plain", tmp_path / "link", tmp_path / "pipe"
    plain.write_bytes(b"12345")
    link.symlink_to(plain)
    os.mkfifo(pipe)
    assert files.read_regular(plain, 5) == b"12345"
    for path, limit, expected in (
        (plain, 4, errno.EFBIG),
        (link, 5, errno.ELOOP),
        (pipe, 5, errno.EINVAL),
        (tmp_path, 5, errno.EINVAL),
        (tmp_path / "none", 5, errno.ENOENT),
    ):
        with pytest.raises(OSError) as caught:
            files.read_regular(path, limit)
        assert caught.value.errno == expected, path
