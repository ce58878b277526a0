# SPDX-License-Identifier: Apache-2.0
"""Where the hardware is: the one value through which the rest of the code sees a machine.

Production uses the defaults. The native test sandbox builds one with other places and adapters and runs
the same stage table; nothing here (or behind it) can switch a check off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trustme_init.compartments.volumes import OpenVolume, VolumeRequest
    from trustme_init.linux.cgroup import Limits
    from trustme_init.trust.verity import VerityParameters


class BlockLayer(Protocol):
    """Disks and their partitions as the kernel (or a test's loop devices) presents them."""

    def disks(self) -> Sequence[Path]:
        """Return the whole-disk device nodes, in a stable order."""
        ...

    def partition_device(self, disk: Path, number: int, first_byte: int, size_bytes: int) -> Path:
        """Return the node of one partition; DeviceRefusal("partition-node-missing") if it never appears."""
        ...

    def settle(self, disk: Path) -> None:
        """Make the kernel agree with a partition table that was just changed."""
        ...


class VerityDevice(Protocol):
    """An open, verified block device; `path` can be mounted until `close`."""

    @property
    def path(self) -> Path:
        """Block device whose every read is checked against the root hash."""
        ...

    def close(self) -> None:
        """Give the device up as soon as its last user is gone."""
        ...


class VerityBackend(Protocol):
    """What makes a verified block device of an image and its hash tree."""

    def open(self, name: str, data_fd: int, hash_fd: int, parameters: VerityParameters) -> VerityDevice:
        """Return a device for `data_fd` checked by `hash_fd`; TrustRefusal if the root does not fit."""
        ...


class VolumeBackend(Protocol):
    """What keeps a container's lasting volumes: `compartments.volumes`, over a layer that fits the kernel."""

    def prepare(self, uuid: str, directory: Path, key: bytes) -> None:
        """Begin to keep volumes under a new key, before that is made durable."""
        ...

    def open(
        self, uuid: str, directory: Path, requests: Sequence[VolumeRequest], key: bytes
    ) -> tuple[OpenVolume, ...]:
        """Open the volumes, making those that are new; StorageRefusal, and then none is open."""
        ...

    def release(self, uuid: str) -> None:
        """Let their devices go as soon as nothing mounted holds them."""
        ...


class CgroupControllers(Protocol):
    """The resource controllers every compartment must be under."""

    def enable(self, parent: Path) -> None:
        """Delegate the controllers to the children of `parent`; CompartmentRefusal if one is missing."""
        ...

    def limit(self, group: Path, limits: Limits) -> None:
        """Set the limits of `group`; CompartmentRefusal if one cannot be kept."""
        ...


class NetworkBackend(Protocol):
    """What moves and sets up the interfaces of containers."""

    def warm(self) -> int | None:
        """Get ready; return what is readable as soon as a call will not wait, None if that is now."""
        ...

    def call(self, operation: str, namespaces: Sequence[int], **arguments: object) -> Any:
        """Have `compartments.netlink` do one thing; CompartmentRefusal("network-failed")."""
        ...


def _kernel_block_layer() -> BlockLayer:
    from trustme_init.linux.block import KernelBlockLayer

    return KernelBlockLayer()


def _device_mapper() -> VerityBackend:
    from trustme_init.compartments.verity import DeviceMapperVerity

    return DeviceMapperVerity()


def _encrypted_files() -> VolumeBackend:
    from trustme_init.compartments.volume_layer import DeviceMapperLayer
    from trustme_init.compartments.volumes import FileVolumes

    return FileVolumes(DeviceMapperLayer())


def _network_helper() -> NetworkBackend:
    from trustme_init.compartments.netlink import NetworkHelper

    return NetworkHelper()


def _kernel_controllers() -> CgroupControllers:
    from trustme_init.linux.cgroup import KernelControllers

    return KernelControllers()


@dataclass(frozen=True, slots=True)
class Machine:
    """Places and adapters; every default is the real thing."""

    sysfs: Path = Path("/sys")
    efivars: Path = Path("/sys/firmware/efi/efivars")
    cgroup_root: Path = Path("/sys/fs/cgroup")
    policy: Path = Path("/etc/trustme/policy.toml")
    console: Path = Path("/dev/console")
    """Where stage lines and the failure screen go; written, never read."""
    core_console: Path | None = None
    """Terminal handed to the core container as fds 0-2 (policy `core.console` overrides the default)."""
    run: Path = Path("/run/trustme")
    store: Path = Path("/run/trustme/store")
    data: Path = Path("/data")
    tcti: str = "device:/dev/tpmrm0"
    block: BlockLayer = field(default_factory=_kernel_block_layer)
    verity: VerityBackend = field(default_factory=_device_mapper)
    volumes: VolumeBackend = field(default_factory=_encrypted_files)
    controllers: CgroupControllers = field(default_factory=_kernel_controllers)
    network: NetworkBackend = field(default_factory=_network_helper)

    @property
    def download_anchors(self) -> Path:
        """Authorities of the servers that images come from, PEM: beside the policy, and signed like it."""
        return self.policy.with_name("download_anchors.pem")

    @property
    def report(self) -> Path:
        """The boot report."""
        return self.run / "boot.json"

    @property
    def measurement_log(self) -> Path:
        """What was extended into the TPM, as CEL-JSON records."""
        return self.run / "measurements.cel"

    @property
    def compartments(self) -> Path:
        """State and sockets of compartments, one directory per UUID."""
        return self.run / "compartments"

    @property
    def log_dir(self) -> Path:
        """The device's own logs, which GET_LAST_LOG returns, one file per log."""
        return self.run / "log"

    @property
    def compartment_log_dir(self) -> Path:
        """What compartments write, likewise; a file system of its own, because it is they who fill it."""
        return self.run / "compartment-log"
