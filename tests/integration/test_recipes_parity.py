# SPDX-License-Identifier: Apache-2.0
"""The GuestOSes of recipes/ as the two builders make them, and the example service at work.

The reference builder makes a whole root of Debian packages; a Yocto build has `trustme guestos finish` do the
rest of [content] in a root of its own packages. Here that root holds the same programs: same result.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import trustme_init
from trustme_tools.errors import ToolError
from trustme_tools.guestos import content, recipe
from trustme_tools.guestos.content import build_root, finish_root
from trustme_tools.image.cache import Cache, default_root

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "recipes/example-service"
CORE = ROOT / "recipes/core"
SOURCE = Path(str(trustme_init.__file__)).parent
BOOT_COMPLETED = b"\0\0\0\x02\x08\x01"
SHUTDOWN = b"\0\0\0\x02\x08\x01"
WAIT = 30
"""Seconds to wait for what must happen at all."""


@pytest.fixture(scope="module")
def example() -> Path:
    """The root of the example service as the reference builder makes it."""
    return build_root(Cache(default_root()), recipe.load(EXAMPLE), EXAMPLE / recipe.FILES, SOURCE)


def entries(root: Path) -> dict[str, str]:
    """Return path → type, mode, and link target or content of everything in a tree."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            found[str(path.relative_to(root))] = f"-> {path.readlink()}"
        else:
            data = repr(path.read_bytes()) if stat.S_ISREG(status.st_mode) else ""
            found[str(path.relative_to(root))] = f"{stat.filemode(status.st_mode)} {data}"
    return found


def packages_only(source: Path, target: Path, directory: Path) -> None:
    """Make a root as a package manager leaves it: nothing that [content] or files/ adds."""
    shutil.copytree(source, target, symlinks=True)
    parts = recipe.load(directory).content
    assert parts is not None
    for path in (directory / "files").rglob("*"):
        if not path.is_dir():
            (target / path.relative_to(directory / "files")).unlink()
    shutil.rmtree(target / "usr/share/www")
    for name in parts.busybox_links:
        (target / "usr/bin" / name).unlink()
    for name in parts.directories:
        (target / name).rmdir()
    (target / "usr/share/doc").mkdir()
    (target / "usr/share/doc/removed").touch()


def test_both_builders_make_the_same_root_of_the_same_packages(example: Path, tmp_path: Path) -> None:
    packages_only(example, tmp_path / "root", EXAMPLE)
    finish_root(tmp_path / "root", recipe.load(EXAMPLE), EXAMPLE)
    assert entries(tmp_path / "root") == entries(example)


def test_the_umask_of_a_checkout_is_in_no_image(example: Path, tmp_path: Path) -> None:
    packages_only(example, tmp_path / "root", EXAMPLE)
    checkout = tmp_path / "checkout"
    shutil.copytree(EXAMPLE, checkout)
    for path in checkout.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    finish_root(tmp_path / "root", recipe.load(checkout), checkout)
    assert entries(tmp_path / "root") == entries(example)


def test_nothing_of_the_build_host_is_in_a_root(example: Path) -> None:
    core = build_root(Cache(default_root()), recipe.load(CORE), CORE / recipe.FILES, SOURCE)
    for root in (example, core):
        for name in ("etc/hostname", "etc/resolv.conf", "etc/fstab", "etc/apt"):
            assert not os.path.lexists(root / name)


@pytest.mark.parametrize("directory", [CORE, EXAMPLE], ids=lambda directory: directory.name)
def test_init_and_links_of_a_recipe_work_in_its_root(example: Path, directory: Path) -> None:
    parsed = recipe.load(directory)
    root = (
        example
        if directory == EXAMPLE
        else build_root(Cache(default_root()), parsed, CORE / recipe.FILES, SOURCE)
    )
    assert content.find_file(root, parsed.init_path) is not None
    known = subprocess.run(
        [root / "usr/bin/busybox", "--list"], check=True, capture_output=True, text=True
    ).stdout.split()
    assert parsed.content is not None
    for name in parsed.content.busybox_links:
        link = root / "usr/bin" / name
        assert not link.is_symlink() or name in known, name


def test_an_applet_that_busybox_lacks_is_named(example: Path, tmp_path: Path) -> None:
    """Yocto's busybox is configured at build time; a link to what it lacks would only fail on the device."""
    packages_only(example, tmp_path / "root", EXAMPLE)
    listed = tomllib.loads((EXAMPLE / "guestos.toml").read_text())["content"]["busybox_links"]
    file = tmp_path / "root/etc/busybox.links.nosuid"
    file.write_text("".join(f"/bin/{name}\n" for name in listed if name not in {"httpd", "ip"}))
    with pytest.raises(ToolError) as refused:
        finish_root(tmp_path / "root", recipe.load(EXAMPLE), EXAMPLE)
    assert refused.value.code == "applet-missing"
    assert "httpd, ip" in refused.value.cause
    file.write_text("".join(f"/bin/{name}\n" for name in listed))
    finish_root(tmp_path / "root", recipe.load(EXAMPLE), EXAMPLE)


def test_a_root_without_busybox_or_without_merged_usr_is_refused(example: Path, tmp_path: Path) -> None:
    packages_only(example, tmp_path / "root", EXAMPLE)
    (tmp_path / "root/usr/bin/busybox").rename(tmp_path / "root/busybox")
    with pytest.raises(ToolError) as refused:
        finish_root(tmp_path / "root", recipe.load(EXAMPLE), EXAMPLE)
    assert refused.value.code == "no-busybox"


def test_files_never_go_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "root/usr/sbin").mkdir(parents=True)
    (tmp_path / "root/sbin").symlink_to("usr/sbin")
    (tmp_path / "files/sbin").mkdir(parents=True)
    (tmp_path / "files/sbin/service").touch()
    with pytest.raises(ToolError) as refused:
        content.copy_files(tmp_path / "files", tmp_path / "root")
    assert refused.value.code == "link-in-the-way"
    assert "usr/sbin" in refused.value.remedy


LAYERS = os.environ.get("TRUSTME_YOCTO_LAYERS")


@pytest.mark.skipif(not LAYERS, reason="TRUSTME_YOCTO_LAYERS names no checkouts of the upstream layers")
def test_yoctos_busybox_has_every_applet() -> None:
    """Its configuration upstream, and our fragment."""
    (directory,) = Path(LAYERS or "").glob("openembedded-core*/meta/recipes-core/busybox")
    fragments = re.findall(r"file://(\S+\.cfg)", (next(directory.glob("busybox_1*.bb"))).read_text())
    files = [directory / "busybox" / name for name in ("defconfig", *fragments)]
    files.append(ROOT / "recipes/busybox/busybox/guestos.cfg")
    on: dict[str, bool] = {}
    for file in files:
        for line in file.read_text().splitlines():
            if match := re.match(r"(# )?CONFIG_(\w+)(=y)?", line):
                on[match[2]] = match[3] is not None
    names = {"sh": "SH_IS_ASH"}
    for guestos in (CORE, EXAMPLE):
        for applet in tomllib.loads((guestos / "guestos.toml").read_text())["content"]["busybox_links"]:
            assert on.get(names.get(applet, applet.upper())), f"{guestos.name}: {applet}"
    for feature in ("FEATURE_HTTPD_CGI", "FEATURE_SH_MATH", "ASH_PRINTF"):
        assert on[feature], "the example service counts on it"


# --- the example service, in a mount, PID and network namespace of its own ---


@contextlib.contextmanager
def running(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the service as PID 1; it ends with this block."""
    script = (
        'mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && ip link set lo up '
        '&& exec chroot "$1" /sbin/service init'
    )
    process = subprocess.Popen(
        [
            *(
                "unshare",
                "--mount",
                "--pid",
                "--net",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                script,
                "sh",
                root,
            ),
        ],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PORT": "8080"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def manager(root: Path) -> Iterator[socket.socket]:
    """Listen where the service looks for the manager."""
    place = root / "run/socket"
    place.mkdir(exist_ok=True)
    (place / "cml-service").unlink(missing_ok=True)
    # By descriptor: the path of a socket has at most 108 characters.
    descriptor = os.open(place, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.settimeout(WAIT)
            server.bind(f"/proc/self/fd/{descriptor}/cml-service")
            server.listen()
            yield server
    finally:
        os.close(descriptor)


def greeted(server: socket.socket) -> socket.socket:
    client, _ = server.accept()
    client.settimeout(WAIT)
    data = b""
    while len(data) < len(BOOT_COMPLETED):
        received = client.recv(16)
        assert received, "hung up without BOOT_COMPLETED"
        data += received
    assert data == BOOT_COMPLETED
    return client


@pytest.fixture
def container(example: Path, tmp_path: Path) -> Path:
    root = tmp_path / "root"
    shutil.copytree(example, root, symlinks=True)
    return root


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.root
@needs_root
def test_the_example_answers_reports_counts_and_ends(container: Path) -> None:
    for starts in (1, 2):
        with manager(container) as server, running(container) as process, greeted(server) as client:
            for byte in b"\0\0\0\x02\x08\x11" + SHUTDOWN:  # another message first, and however it is cut
                if byte == SHUTDOWN[-1]:
                    assert f"starts: {starts}\n" in page(process)
                client.send(bytes([byte]))
            assert process.wait(WAIT) == 0
        assert (container / "data/starts").read_text() == f"{starts}\n"


@pytest.mark.root
@needs_root
def test_the_example_reports_again_to_each_manager(container: Path) -> None:
    with manager(container) as server, running(container) as process:
        greeted(server).close()
        for junk in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x09\x08"):
            with greeted(server) as client:
                client.send(junk)
                client.shutdown(socket.SHUT_WR)
        with greeted(server) as client:
            client.send(SHUTDOWN)
            assert process.wait(WAIT) == 0


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("damage", ["", "twelve\n", "-3\n"])
def test_a_count_that_is_none_is_left_alone(container: Path, damage: str) -> None:
    (container / "data/starts").write_text(damage)
    with manager(container) as server, running(container) as process, greeted(server) as client:
        client.send(SHUTDOWN)
        assert process.wait(WAIT) == 0
    assert (container / "data/starts").read_text() == damage


def page(process: subprocess.Popen[bytes]) -> str:
    """Return the service's page, fetched inside its network namespace by its own wget."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    words = [
        "nsenter",
        "--target",
        children[0],
        "--net",
        "--root",
        "--wd",
        "/usr/bin/busybox",
        "wget",
        "-qO-",
    ]
    for _ in range(WAIT * 10):
        done = subprocess.run([*words, "http://127.0.0.1:8080/"], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
    raise AssertionError(done.stderr)
