# SPDX-License-Identifier: Apache-2.0
"""The compartment's file tree, made by its own future init inside its own namespaces.

The image is hostile until proven otherwise: /dev, /proc or any other mount point in it may be a symbolic
link, a FIFO, a file. So every place is opened under the new root with openat2 (in-root, no symbolic link at
all), must be a directory, and the mount is attached to that descriptor: no path is looked up twice.
A mount point of the wrong kind is refused, not repaired.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, NamedTuple

from trustme_init.compartments.devices import nodes as device_nodes
from trustme_init.compartments.images import FILE_NAME
from trustme_init.compartments.spec import (
    FILE_KINDS,
    READ_ONLY_KINDS,
    CompartmentSpec,
    VolumeKind,
    VolumeSpec,
)
from trustme_init.errors import CompartmentRefusal
from trustme_init.linux.files import (
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    openat2,
)
from trustme_init.linux.mount import (
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    fsopen_mount,
    mount_setattr,
    move_mount,
    open_tree,
    pivot_root,
    umount,
)

if TYPE_CHECKING:
    from trustme_init.compartments.hostside import HostSide

_STRICT: Final = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
_UNSAFE: Final = (errno.ELOOP, errno.ENOTDIR, errno.EEXIST)
_IN_ROOT: Final = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS


class _KernelMount(NamedTuple):
    place: str
    fstype: str
    attrs: int
    options: dict[str, str | None]
    optional: bool = False
    """Left out where the kernel does not have it."""


CGROUP: Final = "sys/fs/cgroup"
KERNEL_MOUNTS: Final = (
    _KernelMount("proc", "proc", _STRICT, {}),
    _KernelMount("sys", "sysfs", _STRICT | MOUNT_ATTR_RDONLY, {}),
    # Its own cgroup namespace: its group is the root it sees. Read-only unless groups below are delegated.
    _KernelMount(CGROUP, "cgroup2", _STRICT | MOUNT_ATTR_RDONLY, {}),
    _KernelMount("dev", "tmpfs", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, {"mode": "0755", "size": "65536"}),
    _KernelMount("run", "tmpfs", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, {"mode": "0755", "size": "16m"}),
)
DEV_MOUNTS: Final = (
    _KernelMount(
        "pts",
        "devpts",
        MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC,
        {"newinstance": None, "ptmxmode": "0666", "mode": "0620", "gid": "5", "max": "256"},
    ),
    _KernelMount("shm", "tmpfs", _STRICT, {"mode": "1777", "size": "16m"}),
    _KernelMount("mqueue", "mqueue", _STRICT, {}, optional=True),
)
DEV_LINKS: Final = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
    "core": "/proc/kcore",
}

# The usual lists of container runtimes (OCI defaults): what tells about, or acts on, the whole machine.
MASKED: Final = (
    "proc/acpi",
    "proc/asound",
    "proc/interrupts",
    "proc/kcore",
    "proc/keys",
    "proc/latency_stats",
    "proc/sched_debug",
    "proc/scsi",
    "proc/timer_list",
    "proc/timer_stats",
    "sys/devices/virtual/powercap",
    "sys/firmware",
)
READ_ONLY: Final = ("proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger")


def build(spec: CompartmentSpec, host: HostSide) -> int:
    """Mount everything below /root of the stage; return a descriptor of the new root.

    The calling process is root of the compartment's user namespace, in its other namespaces, its root
    directory is the stage. OSError names the place; CompartmentRefusal("mount-point-unsafe",
    "mount-point-missing").
    """
    first, host_fd = host.volumes[0]
    move_mount(_volume(first, host_fd, spec, index=0), "/root")
    root = os.open("/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    writable = first.kind not in READ_ONLY_KINDS
    for entry in KERNEL_MOUNTS:
        if entry.place == CGROUP and spec.delegated:
            entry = entry._replace(attrs=_STRICT)  # noqa: PLW2901 - the row, with what is delegated
        _attach(root, entry.place, _instance(entry), create=writable)
    _populate_dev(root, host, spec)
    _populate_run(root, host)
    _mount_tmp(root)
    for index, (volume, fd) in enumerate(host.volumes[1:], start=1):
        place = str(volume.mount_point)
        if fd is not None and volume.kind in FILE_KINDS:
            _attach_content(root, volume, fd, index=index)
        elif fd is not None and volume.kind in _OVER_PLACE:
            target = open_place(root, place, create=True)
            try:
                layers = _OVER_PLACE[volume.kind](fd, target, index)
            finally:
                os.close(target)
            _attach(root, place, layers, create=False)
        else:
            _attach(root, place, _volume(volume, fd, spec, index=index), create=True)
    _forbid_user_namespaces(root)
    _restrict(root)
    return root


def enter(root: int) -> None:
    """Make `root` the root directory and detach the stage, and with it all that is left of the outside.

    The stage lies on the mount that the host's namespace began with (the initramfs, which can neither be
    moved nor unmounted) and is locked there, because its copy was made together with a user namespace.
    pivot_root hands that lock on to the new root: nobody in here can uncover what is below.
    """
    stage = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchdir(root)
        pivot_root(".", ".")
        # Both now lie at "/", the old one on top; it is reached by descriptor only.
        os.fchdir(stage)
        umount(".", MNT_DETACH)
    finally:
        os.close(stage)
    os.chdir("/")


def check_init(root: int, path: str) -> None:
    """Refuse an init that is not an executable regular file of the root, e.g. a link to /proc/self/exe.

    Links within the root are followed. Nothing else runs in the compartment yet, so this cannot race.
    OSError names the path.
    """
    # NO_XDEV is not for here: /sbin may be a volume of its own. Magic links are what leads out.
    fd = openat2(path, os.O_PATH, dirfd=root, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) or not mode & 0o111:
            raise OSError(errno.EACCES, "is not an executable file", path)
    finally:
        os.close(fd)


def _volume(volume: VolumeSpec, fd: int | None, spec: CompartmentSpec, *, index: int) -> int:
    """Return the detached mount of a volume that hides what is at its mount point."""
    nosuid = MOUNT_ATTR_NOSUID if spec.no_new_privs else 0
    if volume.kind is VolumeKind.TMPFS or fd is None:
        return fsopen_mount(
            "tmpfs",
            source=f"volume{index}",
            options={"mode": "0755", "size": str(volume.size)},
            attrs=MOUNT_ATTR_NODEV | nosuid,
        )
    if volume.kind is not VolumeKind.OVERLAY:
        return fd
    # Made in here and not by the manager: what the overlay copies and creates, it does as the compartment's
    # root, never as the machine's. Layers must lie in a mount tree while the overlay is made: in the stage,
    # where nobody else can reach, below directories of this volume's own.
    lower = _stage_layer("lower", index, fd)
    upper = _stage_layer(
        "upper",
        index,
        fsopen_mount(
            "tmpfs", source="upper", options={"mode": "0755", "size": str(volume.size)}, attrs=_STRICT
        ),
    )
    return _overlay(lower, upper, nosuid)


def _overlay_read_only(image: int, place: int, index: int) -> int:
    """Return the overlay of an image over what is at `place` now, read-only."""
    lower = _stage_layer("lower", index, open_tree("", dirfd=place))
    upper = _stage_layer("upper", index, image)
    return fsopen_mount(
        "overlay",
        source="overlay",
        options={"lowerdir": f"{upper}:{lower}", "userxattr": None, "ro": None},
        attrs=MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID | MOUNT_ATTR_RDONLY,
    )


def _overlay_encrypted(volume: int, place: int, index: int) -> int:
    """Return the overlay whose writable layer is a lasting volume, over what is at `place` now."""
    lower = _stage_layer("lower", index, open_tree("", dirfd=place))
    return _overlay(lower, _stage_layer("upper", index, volume), MOUNT_ATTR_NOSUID)


_OVER_PLACE: Final = {
    VolumeKind.OVERLAY_READ_ONLY: _overlay_read_only,
    VolumeKind.ENCRYPTED_OVERLAY: _overlay_encrypted,
}
"""Kinds that show what is at their mount point too."""


def _stage_layer(kind: str, index: int, fd: int) -> Path:
    path = Path(f"/{kind}/{index}")
    path.mkdir(0o700)
    move_mount(fd, path)
    return path


def _overlay(lower: Path, upper: Path, attrs: int) -> int:
    """Return an overlay with the writable layer in `upper`, which may have been used as that before."""
    data, work = upper / "data", upper / "work"
    try:
        data.mkdir(0o755)
    except FileExistsError:
        pass  # of an earlier start: its owner and mode are the container's own by now
    else:
        # The top of the overlay has those of this layer, and should have those of what it covers.
        covered = lower.stat()
        os.chown(data, covered.st_uid, covered.st_gid)
        data.chmod(stat.S_IMODE(covered.st_mode))
    work.mkdir(0o700, exist_ok=True)
    return fsopen_mount(
        "overlay",
        source="overlay",
        options={
            "lowerdir": str(lower),
            "upperdir": str(data),
            "workdir": str(work),
            # trusted.* attributes need privileges over the machine.
            "userxattr": None,
        },
        attrs=MOUNT_ATTR_NODEV | attrs,
    )


def _attach_content(root: int, volume: VolumeSpec, fd: int, *, index: int) -> None:
    """Attach the one file of a file system at a file of the image, or at a new one."""
    holder = _stage_layer("upper", index, fd)
    content = open_tree(holder / FILE_NAME)
    place = volume.mount_point
    target = open_place(root, str(place.parent), create=True)
    try:
        if volume.kind is VolumeKind.FILE:
            mount_setattr(content, set_=MOUNT_ATTR_RDONLY)
        with suppress(FileExistsError):
            os.close(os.open(place.name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=target))
        if not stat.S_ISREG(os.stat(place.name, dir_fd=target, follow_symlinks=False).st_mode):
            raise OSError(errno.EEXIST, "is not a regular file", place.name)
        _attach_file(target, place.name, content)
    except OSError as exc:
        raise _bad_place(str(place), str(exc.strerror), unsafe=exc.errno in _UNSAFE) from exc
    finally:
        os.close(target)


def _instance(entry: _KernelMount) -> int:
    return fsopen_mount(entry.fstype, source=entry.fstype, options=entry.options, attrs=entry.attrs)


def _attach(root: int, place: str, fd: int, *, create: bool) -> None:
    """Attach the detached mount `fd` at a directory below `root`, close it."""
    target = open_place(root, place, create=create)
    try:
        move_mount(fd, "", dirfd=target)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, place) from exc
    finally:
        os.close(target)
        os.close(fd)


def open_place(root: int, place: str, *, create: bool) -> int:
    """Open a mount point below `root` (O_PATH); made, parents too, if it is missing and `create`.

    CompartmentRefusal("mount-point-unsafe") if any component is a symbolic link or not a directory,
    "mount-point-missing" if it is not there and cannot be made.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    here = os.dup(root)
    walked = PurePosixPath("/")
    try:
        for part in PurePosixPath(place.lstrip("/")).parts:
            walked /= part
            try:
                below = openat2(part, flags, dirfd=here, resolve=_IN_ROOT)
            except FileNotFoundError:
                if not create:
                    raise
                os.mkdir(part, 0o755, dir_fd=here)
                below = openat2(part, flags, dirfd=here, resolve=_IN_ROOT)
            os.close(here)
            here = below
    except OSError as exc:
        os.close(here)
        raise _bad_place(str(walked), str(exc.strerror), unsafe=exc.errno in _UNSAFE) from exc
    return here


def _bad_place(place: str, why: str, *, unsafe: bool) -> CompartmentRefusal:
    return CompartmentRefusal(
        "mount-point-unsafe" if unsafe else "mount-point-missing",
        "a mount point in the image is not what it has to be" if unsafe else "a mount point is missing",
        evidence=f"{place}: {why}",
        remedy="make every mount point a directory of the image, and that of a single file a file",
    )


def _populate_dev(root: int, host: HostSide, spec: CompartmentSpec) -> None:
    dev = open_place(root, "dev", create=False)
    try:
        for entry in DEV_MOUNTS:
            try:
                instance = _instance(entry)
            except OSError as exc:
                if entry.optional and exc.errno == errno.ENODEV:
                    continue
                raise
            os.mkdir(entry.place, 0o755, dir_fd=dev)
            _attach(dev, entry.place, instance, create=False)
        _populate_nodes(dev, host, spec)
        nodes = [*host.devices]
        if host.console is not None:
            nodes.append(("console", host.console))
        for name, fd in nodes:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=dev))
            _attach_file(dev, name, fd)
        for name, target in DEV_LINKS.items():
            os.symlink(target, name, dir_fd=dev)
    finally:
        os.close(dev)


def _populate_nodes(dev: int, host: HostSide, spec: CompartmentSpec) -> None:
    """Put the nodes of the configuration where the base system has them."""
    if host.nodes is None:
        return
    move_mount(host.nodes, "/nodes")  # whence they can be taken one by one
    for name in device_nodes(spec.devices.allowed):
        source = Path("/nodes", name)
        if not source.exists():
            continue
        place, plain = os.path.split(name)
        directory = open_place(dev, place, create=True)
        try:
            os.close(os.open(plain, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=directory))
            _attach_file(directory, plain, open_tree(source))
        finally:
            os.close(directory)


def _attach_file(directory: int, name: str, fd: int) -> None:
    target = openat2(name, os.O_PATH | os.O_NOFOLLOW, dirfd=directory, resolve=_IN_ROOT)
    try:
        move_mount(fd, "", dirfd=target)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, name) from exc
    finally:
        os.close(target)


def _populate_run(root: int, host: HostSide) -> None:
    run = open_place(root, "run", create=False)
    try:
        os.mkdir("socket", 0o755, dir_fd=run)
        _attach(run, "socket", os.dup(host.socket_dir), create=False)
    finally:
        os.close(run)


def _mount_tmp(root: int) -> None:
    """Put a tmpfs on /tmp where that is an empty directory; anything else there is the image's own affair."""
    try:
        tmp = openat2("tmp", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dirfd=root, resolve=_IN_ROOT)
    except OSError:
        return
    try:
        with os.scandir(tmp) as entries:
            if next(entries, None) is not None:
                return
        fd = fsopen_mount(
            "tmpfs",
            source="tmp",
            options={"mode": "1777", "size": "16m"},
            attrs=MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
        )
        _attach(root, "tmp", fd, create=False)
    finally:
        os.close(tmp)


def _forbid_user_namespaces(root: int) -> None:
    """No user namespace below this one: it would give every capability back over new mounts and networks.

    The limit belongs to this namespace, and /proc/sys is read-only and sys_resource gone when init starts.
    """
    fd = openat2("proc/sys/user/max_user_namespaces", os.O_WRONLY, dirfd=root, resolve=_IN_ROOT)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def _restrict(root: int) -> None:
    """Mask and write-protect what the kernel shows of the whole machine."""
    null = openat2("dev/null", os.O_PATH, dirfd=root, resolve=_IN_ROOT)
    try:
        for place in MASKED:
            target = _kernel_place(root, place)
            if target is None:
                continue
            if stat.S_ISDIR(os.fstat(target).st_mode):
                cover = fsopen_mount(
                    "tmpfs",
                    source="mask",
                    options={"size": "4096", "nr_inodes": "2", "mode": "0555"},
                    attrs=_STRICT | MOUNT_ATTR_RDONLY,
                )
            else:
                cover = open_tree("", dirfd=null)
                mount_setattr(cover, set_=MOUNT_ATTR_RDONLY)
            _cover(target, cover, place)
        for place in READ_ONLY:
            target = _kernel_place(root, place)
            if target is None:
                continue
            cover = open_tree("", dirfd=target)
            mount_setattr(cover, set_=_STRICT | MOUNT_ATTR_RDONLY)
            _cover(target, cover, place)
    finally:
        os.close(null)


def _cover(target: int, cover: int, place: str) -> None:
    try:
        move_mount(cover, "", dirfd=target)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, place) from exc
    finally:
        os.close(target)
        os.close(cover)


def _kernel_place(root: int, place: str) -> int | None:
    """Open a place of our own proc or sysfs; None if this kernel does not have it."""
    top, _, rest = place.partition("/")
    mounted = openat2(top, os.O_PATH | os.O_DIRECTORY, dirfd=root, resolve=_IN_ROOT)
    try:
        return openat2(rest, os.O_PATH, dirfd=mounted, resolve=_IN_ROOT | RESOLVE_NO_XDEV)
    except FileNotFoundError:
        return None
    finally:
        os.close(mounted)
