# SPDX-License-Identifier: Apache-2.0
"""Compartments for real: namespaces, mounts, confinement, seen from inside and from the host."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from tests.integration.adapters import UserspaceVerity, UserspaceVerityDevice
from tests.integration.compartment_kit import DONE, MIB, UUID, Bench, busybox_root, section, wait_for
from trustme_init.compartments import lifecycle
from trustme_init.compartments.confine import CORE_CAPABILITIES
from trustme_init.compartments.lifecycle import Compartment, State
from trustme_init.compartments.rootfs import MASKED
from trustme_init.compartments.spec import UID_BASE, CompartmentSpec, VolumeKind, VolumeSpec
from trustme_init.errors import CompartmentRefusal, Refusal, TrustRefusal
from trustme_init.linux.process import bounding_set, process_start_time
from trustme_init.trust.guestos import MountType
from trustme_init.trust.verity import VerityParameters

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

FACTS = """
echo '== status =='; b cat /proc/self/status
echo '== ids =='; b cat /proc/self/uid_map /proc/self/gid_map
echo '== mounts =='; b cat /proc/self/mounts
echo '== dev =='; b find /dev -type c -o -type b | b sort
echo '== owner =='; b stat -c %u:%g / /bin/busybox /etc
echo '== network =='; b ip -o addr
echo '== hostname =='; b hostname
echo '== cgroup =='; b cat /proc/self/cgroup
echo '== processes =='; b ps -o pid | b wc -l
echo '== limits =='; b cat /proc/self/limits
echo '== masked =='
for place in @MASKED@; do
  if b test -d /$place; then echo "$place: $(b ls -A /$place | b wc -l)"
  elif b test -e /$place; then echo "$place: $(b head -c 16 /$place | b wc -c)"; fi
done
echo '== attempts =='
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "$name: DONE"; else echo "$name: refused"; fi; }
try mknod b mknod /blk b 7 0
try mknod_chr b mknod /mem c 1 1
try mount b mount -t tmpfs none /data
try bind b mount -o bind /bin /data
try remount b mount -o remount,rw /sys
try umount_proc_sys b umount /proc/sys
try umount_cgroup b umount /sys/fs/cgroup
try umount_root b umount -l /
try chroot b chroot /bin /busybox true
try userns b unshare -U b true
try mountns b unshare -m b true
try netns b unshare -n b true
try hostname b hostname evil
try sysrq b sh -c 'echo h > /proc/sysrq-trigger'
try core_pattern b sh -c 'echo "|/bin/sh" > /proc/sys/kernel/core_pattern'
try userns_limit b sh -c 'echo 100 > /proc/sys/user/max_user_namespaces'
try cgroup_procs b sh -c 'echo 1 > /sys/fs/cgroup/cgroup.procs'
try cgroup_limit b sh -c 'echo max > /sys/fs/cgroup/pids.max'
try cgroup_child b mkdir /sys/fs/cgroup/child
try release_agent b sh -c 'echo /x > /sys/fs/cgroup/release_agent'
try uevent_helper b sh -c 'echo /x > /sys/kernel/uevent_helper'
try socket_dir b touch /run/socket/x
try link_down b ip link set lo down
try dmesg b dmesg
try settime b sh -c 'date -s 2001-01-01; test $(date +%Y) = 2001'
try image_write b sh -c 'echo x > /written'
"""
KERNEL_MOUNTS = {
    "/": "overlay",
    "/proc": "proc",
    "/sys": "sysfs",
    "/sys/fs/cgroup": "cgroup2",
    "/dev": "tmpfs",
    "/dev/pts": "devpts",
    "/dev/shm": "tmpfs",
    "/dev/mqueue": "mqueue",
    "/run": "tmpfs",
    "/tmp": "tmpfs",
}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one compartment finds out about itself."""
    script = FACTS.replace("@MASKED@", " ".join(MASKED))
    return Bench(tmp_path_factory.mktemp("facts")).facts(script)


def status(lines: list[str]) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def mounts(lines: list[str]) -> dict[str, tuple[str, set[str]]]:
    rows = [line.split() for line in lines]
    return {row[1]: (row[2], set(row[3].split(","))) for row in rows}


def names(directory: Path | str) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def readlink(path: Path | str) -> str:
    return str(Path(path).readlink())


def state_of(compartment: Compartment) -> State:
    return compartment.state  # a call, so that mypy does not remember the last answer


def pid_of(compartment: Compartment) -> int:
    assert compartment.running is not None
    return compartment.running.pid


# From inside


def test_row25_capabilities_are_the_allow_list_and_cannot_grow(facts: str) -> None:
    import prctl

    found = status(section(facts, "status"))
    keep = sum(1 << getattr(prctl, f"CAP_{name.upper()}") for name in CORE_CAPABILITIES)
    assert {key: int(found[key], 16) for key in ("CapBnd", "CapPrm", "CapEff")} == {
        "CapBnd": keep,
        "CapPrm": keep,
        "CapEff": keep,
    }
    assert int(found["CapInh"], 16) == int(found["CapAmb"], 16) == 0
    assert found["NoNewPrivs"] == "1"


def test_row25_ids_are_those_of_nobody_else(facts: str) -> None:
    assert [line.split() for line in section(facts, "ids")] == [["0", str(UID_BASE), "65536"]] * 2
    # The image is owned by root; the idmapped mount shows it as the compartment's root.
    assert section(facts, "owner") == ["0:0"] * 3


def test_row25_every_mount_is_nosuid_and_nodev_but_the_device_nodes(facts: str) -> None:
    found = mounts(section(facts, "mounts"))
    for place, (kind, options) in found.items():
        assert "nosuid" in options, place
        # /dev and its tmpfs children belong to a user namespace: the kernel honours no device node on them.
        assert "nodev" in options or kind in ("devtmpfs", "devpts") or place == "/dev", place
    assert {place: found[place][0] for place in KERNEL_MOUNTS} == KERNEL_MOUNTS
    for place in ("/sys", "/sys/fs/cgroup", "/proc/sys", "/proc/bus", "/proc/irq", "/proc/fs", "/run/socket"):
        assert "ro" in found[place][1], place


def test_row25_nothing_of_the_host_is_mounted(facts: str) -> None:
    found = mounts(section(facts, "mounts"))
    expected = {*KERNEL_MOUNTS, "/run/socket", *(f"/{place}" for place in MASKED)}
    expected |= {f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero")}
    expected |= {f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger")}
    assert set(found) <= expected


def test_row14_no_block_device_and_no_device_mapper(facts: str) -> None:
    assert section(facts, "dev") == [
        "/dev/full",
        "/dev/null",
        "/dev/pts/ptmx",
        "/dev/random",
        "/dev/tty",
        "/dev/urandom",
        "/dev/zero",
    ]


def test_row25_nothing_that_reaches_the_machine_succeeds(facts: str) -> None:
    results = dict(line.split(": ") for line in section(facts, "attempts") if ": " in line)
    assert len(results) >= 26
    assert [name for name, result in results.items() if result == "DONE"] == ["image_write"]


def test_masked_places_are_empty(facts: str) -> None:
    lines = section(facts, "masked")
    assert lines
    assert [line for line in lines if not line.endswith(": 0")] == []


def test_own_network_with_loopback_up_hostname_and_cgroup(facts: str) -> None:
    addresses = "\n".join(section(facts, "network"))
    assert "127.0.0.1/8" in addresses
    assert {line.split()[1] for line in section(facts, "network")} == {"lo"}
    assert section(facts, "hostname") == ["test"]
    assert "0::/" in section(facts, "cgroup")


def test_signals_and_limits_are_fresh(facts: str) -> None:
    found = status(section(facts, "status"))
    assert int(found["SigBlk"], 16) == 0
    assert int(found["SigIgn"], 16) == 0
    limits = "\n".join(section(facts, "limits"))
    assert re.search(r"Max core file size +0 +0", limits)
    assert re.search(r"Max open files +1024 ", limits)
    assert found["Umask"] == "0022"


# From the host


def sleeper(bench: Bench, *, console: Path | None = None) -> CompartmentSpec:
    root = bench.work / "root"
    if not root.exists():
        busybox_root(root, "")
    return bench.spec(bench.image(root), argv=("/bin/busybox", "sleep", "1000"), console=console)


def test_row23_only_fds_0_to_2_and_a_working_directory_inside(bench: Bench) -> None:
    leaked = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leaked, True)  # a library that forgets close-on-exec
    try:
        with bench.running(sleeper(bench)) as compartment:
            pid = pid_of(compartment)
            process = Path(f"/proc/{pid}")
            assert names(process / "fd") == ["0", "1", "2"]
            assert readlink(process / "cwd") == "/"
            inside, outside = (process / "root").stat(), Path("/").stat()
            assert (inside.st_dev, inside.st_ino) != (outside.st_dev, outside.st_ino)
            assert (process / "cwd").stat().st_dev == inside.st_dev
            assert (process / "environ").read_bytes() == b"container=trustme\0"
            assert (process / "cmdline").read_bytes() == b"/bin/busybox\0sleep\x001000\0"
            assert (process / "oom_score_adj").read_text() == "0\n"
    finally:
        os.close(leaked)


def test_every_namespace_is_its_own_and_init_is_pid_1(bench: Bench) -> None:
    with bench.running(sleeper(bench)) as compartment:
        pid = pid_of(compartment)
        for kind in ("user", "mnt", "pid", "uts", "ipc", "net", "cgroup"):
            assert readlink(f"/proc/{pid}/ns/{kind}") != readlink(f"/proc/self/ns/{kind}"), kind
        assert re.search(r"^NSpid:\t\d+\t1$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert re.search(rf"^Uid:\t{UID_BASE}\t", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)


def test_row25_not_even_all_capabilities_uncover_what_is_below_the_root(bench: Bench) -> None:
    """The root is locked to what lies under it (the initramfs on a device), the masks' host side is gone."""
    with bench.running(sleeper(bench)) as compartment:
        enter = ["nsenter", "-t", str(pid_of(compartment)), "-U", "-m", "-p", "-C"]
        busybox = [*enter, "/bin/busybox"]
        can = subprocess.run([*busybox, "umount", "/proc/keys"], capture_output=True, text=True, check=False)
        assert can.returncode == 0, can.stderr  # so these are real privileges
        for option in ([], ["-l"]):
            umount = subprocess.run(
                [*busybox, "umount", *option, "/"], capture_output=True, text=True, check=False
            )
            assert umount.returncode != 0
        assert (Path(f"/proc/{pid_of(compartment)}/root/bin/busybox")).exists()
        shown = subprocess.run(
            [*busybox, "cat", "/proc/self/mountinfo"], capture_output=True, text=True, check=True
        )
        kinds = {line.partition(" - ")[2].split()[0] for line in shown.stdout.splitlines()}
        assert "ext4" not in kinds - {socket_file_system(bench)}


def socket_file_system(bench: Bench) -> str:
    out = subprocess.run(["stat", "-f", "-c", "%T", bench.work], capture_output=True, text=True, check=True)
    return {"ext2/ext3": "ext4"}.get(out.stdout.strip(), out.stdout.strip())


def test_row22_the_runtime_is_not_in_the_container(bench: Bench) -> None:
    with bench.running(sleeper(bench)) as compartment:
        pid = pid_of(compartment)
        assert readlink(f"/proc/{pid}/exe") == "/bin/busybox"
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "python" not in mapped
        assert "libc" not in mapped


@pytest.mark.parametrize("target", ["/proc/self/exe", "/proc/1/exe", "/dev/null", "/", "/nowhere"])
def test_row22_init_must_be_a_file_of_the_image(bench: Bench, target: str) -> None:
    root = busybox_root(bench.work / "root", "")
    (root / "sbin/init").unlink()
    (root / "sbin/init").symlink_to(target)
    refusal = refused(bench, bench.spec(bench.image(root)))
    assert refusal.code == "step-failed"
    assert refusal.evidence.startswith("init: ")


def test_a_crash_of_the_manager_leaves_init_running_and_adoptable(bench: Bench, tmp_path: Path) -> None:
    """The manager is a process of its own; SIGKILL; another one finds the compartment."""
    spec = sleeper(bench)
    manager = os.fork()
    if manager == 0:
        try:
            with bench.directory() as directory:
                Compartment(spec, bench.machine).start(directory)
            (tmp_path / "started").touch()
            time.sleep(60)
        finally:
            os._exit(1)
    second = Compartment(spec, bench.machine)
    try:
        wait_for((tmp_path / "started").exists)
        os.kill(manager, signal.SIGKILL)
        os.waitpid(manager, 0)
        assert second.adopt()
        assert state_of(second) is State.BOOTING
        running = second.running
        assert running is not None
        assert not second.wait(0)
        assert process_start_time(running.pid) == running.start_time
        second.booted()
        assert state_of(second) is State.RUNNING
        # A third manager finds RUNNING.
        third = Compartment(second.spec, bench.machine)
        assert third.adopt()
        assert third.state is State.RUNNING
        assert third.started_at == second.started_at
        assert third.running is not None
        os.close(third.running.pidfd)
        third.running = None
    finally:
        bench.end(second)
    assert not Compartment(second.spec, bench.machine).adopt()


def test_adoption_wants_the_same_process(bench: Bench) -> None:
    with bench.running(sleeper(bench)) as compartment:
        path = bench.machine.compartments / UUID / "state.json"
        record = json.loads(path.read_text())
        for key, value in (
            ("pid", 1),
            ("pid", os.getpid()),
            ("start_time", 1),
            ("cgroup", "/"),
            ("version", 2),
        ):
            path.write_text(json.dumps({**record, key: value}))
            assert lifecycle.adopt(UUID, bench.machine) is None, key
        path.write_text("{")
        assert lifecycle.adopt(UUID, bench.machine) is None
        path.write_text(json.dumps(record))
        found = lifecycle.adopt(UUID, bench.machine)
        assert found is not None
        assert compartment.running is not None
        assert found.pid == pid_of(compartment)
        os.close(found.pidfd)


# Life


def test_states_follow_the_protocol_and_stop_ends_it(bench: Bench) -> None:
    seen: list[State] = []
    root = busybox_root(bench.work / "root", "trap 'exit 7' TERM\n: ready")
    (root / "sbin/init").write_text(
        f"#!/bin/sh\ntrap 'exit 7' TERM\necho '{DONE}'\nwhile :; do /bin/busybox sleep 0.05; done\n"
    )
    compartment = Compartment(
        bench.spec(bench.image(root)), bench.machine, on_change=lambda it: seen.append(it.state)
    )
    try:
        with bench.directory() as directory:
            running = compartment.start(directory)
            with pytest.raises(CompartmentRefusal) as caught:
                compartment.start(directory)
            assert caught.value.code == "transition-not-allowed"
        bench.output()
        compartment.booted()
        compartment.booted()
        group = running.cgroup.path
        assert group.name == UUID

        def shutdown() -> bool:
            signal.pidfd_send_signal(running.pidfd, signal.SIGTERM)
            return True

        assert compartment.stop(shutdown) == lifecycle.STOP_TIMEOUT
        assert compartment.stop(shutdown) == 0
        assert compartment.wait(5)
        assert compartment.ended() == 7
        assert seen == [State.STARTING, State.BOOTING, State.RUNNING, State.SHUTDOWN, State.STOPPED]
        assert not group.exists()
        assert not (bench.machine.compartments / UUID / "state.json").exists()
    finally:
        bench.end(compartment)


def test_an_init_that_ignores_shutdown_is_killed_at_the_deadline(bench: Bench) -> None:
    with bench.running(sleeper(bench)) as compartment:
        assert compartment.stop(lambda: True) == lifecycle.STOP_TIMEOUT
        assert not compartment.wait(0.05)
        compartment.expired()
        assert compartment.wait(5)
        assert compartment.ended() == -signal.SIGKILL


def test_it_can_be_started_again_and_again(bench: Bench) -> None:
    spec = sleeper(bench)
    before = names("/proc/self/fd")
    for _ in range(3):
        with bench.running(spec):
            pass
    assert names("/proc/self/fd") == before


def test_a_populated_cgroup_is_not_taken_over(bench: Bench) -> None:
    spec = sleeper(bench)
    with bench.running(spec), bench.directory() as directory:
        with pytest.raises(CompartmentRefusal) as caught:
            Compartment(spec, bench.machine).start(directory)
        assert caught.value.code == "already-running"


# Volumes


@pytest.mark.parametrize("fs_type", ["squashfs", "erofs"])
def test_a_read_only_root_of_either_file_system(bench: Bench, fs_type: str) -> None:
    root = busybox_root(bench.work / "root", "b touch /x || echo read-only; b stat -c %u /bin")
    image = bench.image(root, fs_type=fs_type, mount_type=MountType.SHARED)
    with bench.running(bench.spec(image, kind=VolumeKind.VERIFIED)):
        assert bench.output().splitlines()[-3:] == ["read-only", "0", DONE]


def test_volumes_have_their_content_and_their_limits(bench: Bench) -> None:
    script = """
b cat /data/content/deep/word
b dd if=/dev/zero of=/big bs=1M count=32 2>/dev/null; b stat -c 'root %s' /big
b dd if=/dev/zero of=/data/scratch/big bs=1M count=32 2>/dev/null; b stat -c 'data %s' /data/scratch/big
b rm -rf /etc; b mkdir /etc; b touch /etc/new; b ls /etc
b mv /bin /bin2 && echo renamed; b2=/bin2/busybox; $b2 mv /bin2 /bin
"""
    inner = bench.work / "inner"
    (inner / "deep").mkdir(parents=True)
    (inner / "deep/word").write_text("verified\n")
    root = busybox_root(bench.work / "root", script)
    more = (
        VolumeSpec(
            VolumeKind.VERIFIED,
            PurePosixPath("/data/content"),
            0,
            bench.image(inner, name="inner", mount_point="/data/content", mount_type=MountType.SHARED),
        ),
        VolumeSpec(VolumeKind.TMPFS, PurePosixPath("/data/scratch"), 4 * MIB),
    )
    with bench.running(bench.spec(bench.image(root), *more)):
        lines = bench.output().splitlines()
    assert "verified" in lines
    sizes = dict(line.split() for line in lines if line.startswith(("root ", "data ")))
    assert 6 * MIB <= int(sizes["root"]) <= 8 * MIB
    assert int(sizes["data"]) == 4 * MIB
    assert "new" in lines


def test_the_overlay_is_gone_after_a_stop(bench: Bench) -> None:
    root = busybox_root(bench.work / "root", "b test -e /left && echo KEPT; echo x > /left")
    spec = bench.spec(bench.image(root))
    for _ in range(2):
        with bench.running(spec):
            assert "KEPT" not in bench.output()
        bench.log.unlink()


def test_the_socket_directory_shows_what_the_manager_binds_later(bench: Bench) -> None:
    root = busybox_root(
        bench.work / "root", "while ! b test -S /run/socket/late; do b sleep 0.05; done\nb ls -l /run/socket"
    )
    spec = bench.spec(bench.image(root))
    with bench.running(spec), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        short = os.open(spec.socket_dir, os.O_PATH)  # a socket's path has 108 characters, the test's more
        server.bind(f"/proc/self/fd/{short}/late")
        os.close(short)
        os.chown(spec.socket_dir / "late", UID_BASE, UID_BASE)
        assert re.search(r"^s\S+ +1 0 +0 .* late$", bench.output(), re.MULTILINE)


# Console


def test_the_console_is_a_terminal_of_its_own(bench: Bench) -> None:
    script = """
b tty; b ls -l /dev/console; echo hello > /dev/console; b stty size >/dev/null && echo works
echo hi > /dev/tty && echo controlling
"""
    root = busybox_root(bench.work / "root", script)
    master, slave = pty.openpty()
    try:
        name = os.ttyname(slave)
        os.close(slave)
        with bench.running(bench.spec(bench.image(root), console=Path(name))) as compartment:
            text = b""
            while DONE.encode() not in text:
                assert select.select([master], [], [], 5)[0], text
                text += os.read(master, 4096)
            assert compartment.running is not None
            assert readlink(f"/proc/{pid_of(compartment)}/fd/0") == "/dev/console"
        lines = text.decode().replace("\r", "").splitlines()
        assert {"/dev/console", "hello", "works", "controlling"} <= set(lines)
        assert not bench.log.exists()
    finally:
        os.close(master)


def test_a_console_that_is_no_device_is_refused(bench: Bench) -> None:
    fake = bench.work / "console"
    fake.touch()
    assert refused(bench, sleeper(bench, console=fake)).code == "host-side-missing"
    assert refused(bench, sleeper(bench, console=bench.work / "missing")).code == "host-side-missing"


# Refusals


class Traces:
    """What a failed start could leave behind."""

    def __init__(self, bench: Bench) -> None:
        self.fds = names("/proc/self/fd")
        self.mounts = host_mounts(bench)
        self.children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        self.loops = attached_loops(bench.work)
        self.groups = groups(bench)


def attached_loops(work: Path) -> list[str]:
    backing = (path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file"))
    return [name for name in backing if name.startswith(str(work))]


def groups(bench: Bench) -> list[Path]:
    return sorted((bench.machine.cgroup_root / "trustme").glob("*-*"))


def refused(bench: Bench, spec: CompartmentSpec) -> Refusal:
    """Start, expect a refusal, and that it left no trace, nor any volume open that was opened for it."""
    before = {**vars(Traces(bench)), "loops": []}
    compartment = Compartment(spec, bench.machine)
    try:
        with bench.directory() as directory, pytest.raises(Refusal) as caught:
            compartment.start(directory)
        assert compartment.state is State.STOPPED
        wait_for(lambda: not attached_loops(bench.work), 30)
        assert vars(Traces(bench)) == before
    finally:
        bench.end(compartment)
    return caught.value


def test_a_missing_init_is_a_refusal_with_the_step(bench: Bench) -> None:
    root = busybox_root(bench.work / "root", "")
    refusal = refused(bench, bench.spec(bench.image(root), argv=("/no/such/init",)))
    assert refusal.code == "step-failed"
    assert refusal.evidence == "init: /no/such/init: No such file or directory"


def test_an_init_that_cannot_be_executed_is_a_refusal(bench: Bench) -> None:
    root = busybox_root(bench.work / "root", "")
    (root / "sbin/init").write_text("#!/no/such/interpreter\n")
    refusal = refused(bench, bench.spec(bench.image(root)))
    assert (refusal.code, refusal.evidence.partition(":")[0]) == ("step-failed", "exec")


def test_a_fault_in_any_step_is_a_refusal_without_traces(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of the start fails once, in whichever process it happens."""
    from trustme_init.compartments import child, confine, hostside, rootfs, start

    spec = sleeper(bench)
    places = [
        (hostside, "open_tree"),
        (hostside, "mount_setattr"),
        (hostside, "mount_image"),
        (start, "set_child_subreaper"),
        (start, "mount_setattr"),
        (start, "pidfd_open"),
        (start, "process_start_time"),
        (child, "unshare"),
        (child, "umount"),
        (child, "mount"),
        (child, "move_mount"),
        (child, "_loopback_up"),
        (child, "close_range"),
        (confine, "hide_memory"),
        (confine, "new_session"),
        (confine, "limit_resources"),
        (confine, "drop_privileges"),
        (rootfs, "fsopen_mount"),
        (rootfs, "open_tree"),
        (rootfs, "mount_setattr"),
        (rootfs, "move_mount"),
        (rootfs, "openat2"),
        (rootfs, "pivot_root"),
        (rootfs, "umount"),
        (rootfs, "_forbid_user_namespaces"),
    ]

    def fault(*_args: object, **_options: object) -> None:
        raise OSError(5, "injected", "place")

    for module, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            refusal = refused(bench, spec)
        assert "injected" in refusal.evidence, name
        assert refusal.code in ("step-failed", "host-side-missing", "mount-point-missing"), name


def test_a_builder_that_dies_is_a_refusal_without_traces(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trustme_init.compartments import child, confine

    def die(*_args: object, **_options: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    spec = sleeper(bench)
    for module, name in ((child, "_leave_host"), (confine, "limit_resources"), (os, "execve")):
        with monkeypatch.context() as patch:
            # In the child it is PID 1 of its namespace, which ignores its own SIGKILL: leave instead.
            patch.setattr(module, name, die if name == "_leave_host" else lambda *_, **__: os._exit(9))
            refusal = refused(bench, spec)
        assert refusal.code in ("step-failed", "init-ended"), name


def test_a_start_that_hangs_ends_in_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from trustme_init.compartments import confine, start

    spec = sleeper(bench)
    monkeypatch.setattr(start, "START_TIMEOUT", 0.3)
    monkeypatch.setattr(confine, "limit_resources", lambda: time.sleep(60))
    assert refused(bench, spec).code == "start-timeout"


# Row 1: the image files


def image_setup(bench: Bench) -> CompartmentSpec:
    return bench.spec(bench.image(busybox_root(bench.work / "root", "echo genuine")))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    real = path.with_suffix(".real")
    path.rename(real)
    path.symlink_to(real.name)


@pytest.mark.parametrize("name", ["root.img", "root.hash.img"])
@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (flip, {"verity-mismatch"}),
        (lambda path: os.truncate(path, 0), {"image-size-mismatch", "verity-mismatch"}),
        (
            lambda path: os.truncate(path, path.stat().st_size - 4096),
            {"image-size-mismatch", "verity-mismatch"},
        ),
        (lambda path: path.unlink(), {"image-unreadable"}),
        (replace_by_fifo, {"image-unreadable"}),
        (replace_by_link, {"image-unreadable"}),
        (lambda path: (path.unlink(), path.mkdir()), {"image-unreadable"}),
    ],
    ids=["flipped", "empty", "truncated", "missing", "fifo", "link", "directory"],
)
def test_row01_a_damaged_image_never_starts(
    bench: Bench, name: str, change: Callable[[Path], object], codes: set[str]
) -> None:
    spec = image_setup(bench)
    change(bench.images / name)
    refusal = refused(bench, spec)
    assert isinstance(refusal, TrustRefusal)
    assert refusal.code in codes


def test_row01_a_larger_image_is_refused(bench: Bench) -> None:
    spec = image_setup(bench)
    path = bench.images / "root.img"
    os.truncate(path, path.stat().st_size + 4096)
    assert refused(bench, spec).code == "image-size-mismatch"


class SwappingVerity(UserspaceVerity):
    """Runs an attack at one of the two moments between opening, verifying and mounting."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def open(
        self, name: str, data_fd: int, hash_fd: int, parameters: VerityParameters
    ) -> UserspaceVerityDevice:
        self.before()
        device = super().open(name, data_fd, hash_fd, parameters)
        self.after()
        return device


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("how", ["rename", "link", "directory"])
def test_row01_what_was_opened_is_what_runs(bench: Bench, moment: str, how: str) -> None:
    """Between each pair of steps the name leads to another inode: the verified one runs all the same."""
    verity = SwappingVerity()
    attacked = Bench.__new__(Bench)
    attacked.work, attacked.verity = bench.work / "attacked", verity
    attacked.work.mkdir()
    attacked.__post_init__()
    spec = image_setup(attacked)
    evil = bench.image(busybox_root(bench.work / "evil", "echo EVIL"))
    assert spec.volumes[0].image is not None
    assert evil.root_hash != spec.volumes[0].image.root_hash

    def swap() -> None:
        for name in ("root.img", "root.hash.img"):
            place, other = attacked.images / name, bench.images / name
            if how == "rename":
                os.link(other, attacked.work / "new")
                (attacked.work / "new").rename(place)
            elif how == "link":
                place.unlink()
                place.symlink_to(other)
        if how == "directory":
            attacked.images.rename(attacked.work / "moved")
            bench.images.rename(attacked.images)

    setattr(verity, moment, swap)
    with attacked.running(spec):
        text = attacked.output()
    assert "genuine" in text
    assert "EVIL" not in text


# Row 24: hostile images

KINDS: dict[str, Callable[[Path], object]] = {
    "link-to-root": lambda path: path.symlink_to("/"),
    "link-up": lambda path: path.symlink_to("../../../../../../../.."),
    "link-to-host": lambda path: path.symlink_to("/etc"),
    "link-to-proc": lambda path: path.symlink_to("/proc/self/root"),
    "link-to-fd": lambda path: path.symlink_to("/proc/self/fd/3"),
    "dangling": lambda path: path.symlink_to("/nowhere/at/all"),
    "loop": lambda path: path.symlink_to(path.name),
    "fifo": os.mkfifo,
    "file": lambda path: path.write_text("file"),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
}


@pytest.fixture
def host_snapshot(bench: Bench) -> Iterator[None]:
    """The host's mounts and the places an escape would touch stay as they were."""

    def look() -> tuple[list[str], list[tuple[str, int]]]:
        places = ("/", "/etc", "/dev", "/proc/sys/kernel", "/run", "/tmp")
        return (
            host_mounts(bench),
            [(place, Path(place).stat().st_mode) for place in places],
        )

    before = look()
    yield
    assert look() == before


def host_mounts(bench: Bench) -> list[str]:
    """Return where the host has mounts, without those of other tests that may run beside this one."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if not point.startswith("/tmp/") or point.startswith(str(bench.work))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["dev", "proc", "sys", "run", "data", "data/deep"])
def test_row24_a_hostile_mount_point_is_refused(
    bench: Bench, host_snapshot: None, place: str, kind: str
) -> None:
    root = busybox_root(bench.work / "root", "")
    if (root / place).exists():
        (root / place).rmdir()
    KINDS[kind](root / place)
    volume = VolumeSpec(VolumeKind.TMPFS, PurePosixPath("/data/deep/er"), MIB)
    refusal = refused(bench, bench.spec(bench.image(root), volume))
    assert refusal.code == "mount-point-unsafe"
    assert refusal.evidence.startswith(f"/{place}: ")


ELSEWHERE = ("etc", "tmp", "dev/pts", "dev/console", "dev/null", "run/socket", "sys/fs", "root")


@pytest.mark.parametrize("kind", KINDS)
def test_row24_hostile_content_elsewhere_is_harmless(bench: Bench, host_snapshot: None, kind: str) -> None:
    """What the manager covers, or does not touch, may be anything: it starts and nothing outside changes."""
    root = busybox_root(bench.work / "root", "b cat /proc/self/mounts; b ls -l /dev/")
    for place in ELSEWHERE:
        path = root / place
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            path.rmdir()
        KINDS[kind](path)
    with bench.running(bench.spec(bench.image(root))):
        text = bench.output()
    found = mounts([line for line in text.splitlines() if re.match(r"\S+ /\S* \S+ \S+ 0 0$", line)])
    wanted = {key: value for key, value in KERNEL_MOUNTS.items() if key != "/tmp"}
    assert {key: found[key][0] for key in wanted} == wanted
    assert not any(key.startswith("/etc") for key in found)
    assert re.search(r"^crw.* 1, +3 .* null$", text, re.MULTILINE)


def test_row24_a_missing_mount_point_is_made_only_in_an_overlay(bench: Bench) -> None:
    root = busybox_root(bench.work / "root", "b ls -d /proc/1")
    for name in ("dev", "proc", "sys", "run", "tmp"):
        (root / name).rmdir()
    with bench.running(bench.spec(bench.image(root))):
        assert "/proc/1" in bench.output()
    spec = bench.spec(bench.image(root, mount_type=MountType.SHARED), kind=VolumeKind.VERIFIED)
    refusal = refused(bench, spec)
    assert (refusal.code, refusal.evidence.partition(":")[0]) == ("mount-point-missing", "/proc")


# Cost


def test_a_start_takes_less_than_a_tenth_of_a_second(bench: Bench) -> None:
    """The target is 60 ms; twice that here, since the machine is shared. The phases add up to the whole."""
    spec = sleeper(bench)
    best: dict[str, float] = {"": 1e9}
    for _ in range(5):
        with bench.running(spec) as compartment:
            assert compartment.running is not None
            best = min(best, compartment.running.phases, key=lambda phases: sum(phases.values()))
    sys.stderr.write(f"compartment start: {best}\n")
    assert sum(best.values()) < 120


def test_the_manager_keeps_its_own_privileges_and_signals(bench: Bench) -> None:
    before = (
        bounding_set(),
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        os.getsid(0),
        resource.getrlimit(4),
    )
    with bench.running(sleeper(bench)):
        pass
    after = (
        bounding_set(),
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        os.getsid(0),
        resource.getrlimit(4),
    )
    assert after == before
    assert subprocess.run(["true"], check=True).returncode == 0
