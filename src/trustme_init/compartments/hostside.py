# SPDX-License-Identifier: Apache-2.0
"""Everything a compartment gets from outside, opened by the manager as detached mounts before it forks.

The compartment's own process never looks up a path of the host: it attaches descriptors. What is not in
`HostSide` does not exist for it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trustme_init.compartments.devices import make_nodes, nodes
from trustme_init.compartments.images import mount_file, mount_image
from trustme_init.compartments.spec import DEVICE_KINDS, CompartmentSpec, VolumeSpec
from trustme_init.compartments.volumes import FILE_SYSTEM
from trustme_init.errors import CompartmentRefusal, StorageRefusal
from trustme_init.linux.mount import (
    MOUNT_ATTR__ATIME,
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    fsopen_mount,
    mount_setattr,
    open_tree,
)

if TYPE_CHECKING:
    from trustme_init.machine import Machine

DEVICES: Final = ("full", "null", "random", "tty", "urandom", "zero")
"""Nodes of /dev, besides the pseudo terminals of its own and the console. All are harmless by themselves."""

STAGE_DIRECTORIES: Final = ("lower", "upper", "root", "proc", "sys", "nodes")
"""Places in the stage, the tmpfs that is the compartment's root until its own root is complete."""

_DEV: Final = Path("/dev")


@dataclass(frozen=True, slots=True)
class HostSide:
    """Descriptors of detached mounts (all close-on-exec), and of the log file."""

    stage: int
    proc: int
    sys: int
    devices: tuple[tuple[str, int], ...]
    nodes: int | None
    """Directory with those of the configuration; see `devices`."""
    console: int | None
    socket_dir: int
    volumes: tuple[tuple[VolumeSpec, int | None], ...]
    """In the order of the specification; the descriptors are yet to be idmapped. None: made inside."""
    log: int | None


def gather(spec: CompartmentSpec, machine: Machine, directory: int, stack: ExitStack) -> HostSide:
    """Open all of it; `stack` closes it. CompartmentRefusal or TrustRefusal names what is missing."""

    def keep(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    try:
        # The images first: nothing else is worth opening if one of them is not what was signed.
        volumes: list[tuple[VolumeSpec, int | None]] = []
        try:
            for volume in spec.volumes:
                fd = _volume(volume, spec, machine, directory)
                volumes.append((volume, None if fd is None else keep(fd)))
        finally:
            # The vault opened their devices for this. From now on each lives as long as its mount, or, if
            # there is none, ends here.
            if any(volume.kind in DEVICE_KINDS for volume in spec.volumes):
                machine.volumes.release(spec.uuid)
        spec.socket_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        return HostSide(
            stage=keep(_stage(spec.uid_base)),
            # A kernel rule (mount_too_revealing): a user namespace may mount proc or sysfs only while it sees
            # one that hides nothing. These two are that, and go with the stage.
            proc=keep(_bind(Path("/proc"))),
            sys=keep(_bind(Path("/sys"))),
            devices=tuple((name, keep(_device(_DEV / name))) for name in DEVICES),
            nodes=_nodes(spec, keep),
            console=keep(_terminal(spec.console, spec.uid_base)) if spec.console is not None else None,
            socket_dir=keep(
                _bind(
                    spec.socket_dir,
                    MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
                )
            ),
            volumes=tuple(volumes),
            log=keep(_log(spec.log)) if spec.console is None and spec.log is not None else None,
        )
    except OSError as exc:
        raise CompartmentRefusal(
            "host-side-missing",
            "something the compartment needs from the base system is not there",
            evidence=f"{exc.filename}: {exc.strerror}",
            remedy="check the kernel's device and file system options",
        ) from exc


def _volume(volume: VolumeSpec, spec: CompartmentSpec, machine: Machine, directory: int) -> int | None:
    if volume.image is not None:
        label = f"{spec.name}-{volume.image.image_file}"
        return mount_image(volume.image, directory, machine.verity, name=label)
    if volume.file is not None:
        return mount_file(volume.file, directory)
    if volume.device is not None:
        return _mount_device(volume, volume.device)
    return None


def _mount_device(volume: VolumeSpec, device: Path) -> int:
    try:
        return fsopen_mount(
            FILE_SYSTEM,
            source=str(device),
            # What cannot be read fits no key: nothing more is written to a volume of which that is known.
            options={"errors": "remount-ro"},
            attrs=MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOATIME,
        )
    except OSError as exc:
        raise StorageRefusal(
            "volume-not-mountable",
            "the file system of an encrypted volume cannot be mounted; it is left as it is",
            evidence=f"{volume.mount_point}: {exc.strerror}",
            remedy="restore the container's directory from a backup, or wipe the container to begin anew",
        ) from exc


@contextmanager
def _closed_on_error(fd: int) -> Iterator[int]:
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


def _bind(path: Path, attrs: int = 0) -> int:
    with _closed_on_error(open_tree(path)) as fd:
        # Private: what is mounted below later must neither arrive here nor go back to the host. The access
        # time mode is set because the rule above compares it.
        mount_setattr(fd, set_=attrs, clear=MOUNT_ATTR__ATIME, propagation=MS_PRIVATE)
        return fd


def _device(path: Path) -> int:
    if not stat.S_ISCHR(path.lstat().st_mode):
        raise OSError(errno.ENODEV, "is not a character device", str(path))
    return _bind(path, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)


def _nodes(spec: CompartmentSpec, keep: Callable[[int], int]) -> int | None:
    wanted = {name: number for name, number in nodes(spec.devices.allowed).items() if name not in DEVICES}
    if not wanted:
        return None
    # Not those of /dev, whose owner is root of the machine, nor made in the compartment, where the kernel
    # honours no device node.
    made = keep(
        fsopen_mount(
            "tmpfs",
            source="nodes",
            options={"mode": "0755", "size": "65536"},
            attrs=MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC,
        )
    )
    make_nodes(made, wanted, spec.uid_base)
    return made


def _terminal(path: Path, owner: int) -> int:
    with _closed_on_error(_device(path)) as fd:
        # The terminal is handed over for good: root of the compartment must be able to open it.
        node = Path(f"/proc/self/fd/{fd}")
        os.chown(node, owner, owner)
        node.chmod(0o600)
        return fd


def _stage(owner: int) -> int:
    instance = fsopen_mount(
        "tmpfs",
        source="stage",
        options={"mode": "0755", "size": "65536"},
        attrs=MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
    )
    with _closed_on_error(instance) as fd:
        for name in STAGE_DIRECTORIES:
            os.mkdir(name, 0o755, dir_fd=fd)
            os.chown(name, owner, owner, dir_fd=fd)
        return fd


def _log(path: Path) -> int:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Its pages are charged to the compartment that writes them, so its memory limit bounds it.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
    return os.open(path, flags, 0o600)
