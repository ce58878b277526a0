# SPDX-License-Identifier: Apache-2.0
"""Stage `devices`: load modules and wait, by the kernel's own events, for exactly what is needed.

Needed are the store partition and, unless a development policy says otherwise, the TPM. There is no
sleep and no polling: each look is caused by a uevent, and the one time limit is the policy's.
"""

from __future__ import annotations

import select
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trustme_init.boot.early import KernelMount, mount_kernel_filesystems
from trustme_init.errors import DeviceRefusal, StorageRefusal
from trustme_init.linux import modules
from trustme_init.linux.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY
from trustme_init.linux.uevent import UeventSocket
from trustme_init.storage.volumes import StorePartition, find_store
from trustme_init.tpm.measure import Measurer

if TYPE_CHECKING:
    from trustme_init.machine import Machine
    from trustme_init.policy import Policy

_DEVICE_TCTI: Final = "device:"
_STRICT: Final = MS_NOSUID | MS_NODEV | MS_NOEXEC


@dataclass(frozen=True, slots=True)
class DevicesFact:
    """What was found. `measurer` is None only where the policy allows a machine without a TPM."""

    store: StorePartition
    measurer: Measurer | None
    waited_ms: float

    def as_dict(self) -> dict[str, Any]:
        """Return the boot report's form."""
        return {"tpm": self.measurer is not None, "waited_for_devices_ms": round(self.waited_ms, 1)}


def wait(machine: Machine, policy: Policy) -> DevicesFact:
    """Return once the needed devices are there.

    Raises:
        DeviceRefusal: "tpm-missing", "module-missing".
        StorageRefusal: "store-missing" and whatever else is wrong with the store's partition.
    """
    started = time.monotonic()
    deadline = started + policy.device_timeout
    # The socket is open before the first look: an event can only be seen twice, never missed.
    with UeventSocket() as events:
        _load(machine, policy.modules)
        _mount_firmware(machine)
        measurer = start_measurer(machine)
        missing = _missing(machine, policy, measurer)
        while missing is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([events], [], [], left)[0]:
                raise missing
            event = events.read()
            alias = event.env.get("MODALIAS") if event is not None and event.action == "add" else None
            if alias:
                modules.load([alias])
            if measurer is None:
                measurer = start_measurer(machine)
            missing = _missing(machine, policy, measurer)
    return DevicesFact(find_store(machine), measurer, (time.monotonic() - started) * 1000)


def _load(machine: Machine, required: tuple[str, ...]) -> None:
    modules.load(required, required=True)
    modules.load(modules.coldplug_aliases(machine.sysfs))


def _mount_firmware(machine: Machine) -> None:
    """Mount efivarfs where the kernel offers it and the machine's variables are the kernel's own."""
    home = machine.sysfs / "firmware/efi/efivars"
    if machine.efivars == home and home.parent.is_dir():
        try:
            mount_kernel_filesystems((KernelMount("efivarfs", home, _STRICT | MS_RDONLY),))
        except OSError as exc:
            raise DeviceRefusal(
                "efivarfs-unavailable",
                "the firmware's variables cannot be read",
                evidence=f"{exc.filename}: {exc.strerror}",
                remedy="the base system needs a kernel with efivarfs",
            ) from exc


def _tpm_node(machine: Machine) -> Path | None:
    return Path(machine.tcti.removeprefix(_DEVICE_TCTI)) if machine.tcti.startswith(_DEVICE_TCTI) else None


def start_measurer(machine: Machine) -> Measurer | None:
    """Start the TPM's child as early as its device is there, so that it loads while we go on."""
    node = _tpm_node(machine)
    if node is not None and not node.is_char_device():
        return None
    # Both need `cryptography`: imported before the fork, it is loaded once for the two.
    from trustme_init.boot import platform  # noqa: F401 - imported for its effect

    return Measurer(machine.tcti)


def _missing(
    machine: Machine, policy: Policy, measurer: Measurer | None
) -> DeviceRefusal | StorageRefusal | None:
    """Return what is still missing as the refusal it would be; other refusals are raised at once."""
    try:
        find_store(machine)
    except StorageRefusal as refusal:
        # A stick with a torn table may be there before the system disk is: a disk to come can still be good.
        if refusal.code not in {"store-missing", "partition-table-damaged"}:
            raise
        return refusal
    if measurer is None and not policy.allows_missing_tpm:
        return DeviceRefusal(
            "tpm-missing",
            "this machine has no TPM",
            evidence=f"{_tpm_node(machine)} did not appear in {policy.device_timeout:.0f} s",
            remedy="enable the TPM in the firmware set-up; only a development build goes on without one",
        )
    return None
