# SPDX-License-Identifier: Apache-2.0
"""Disk and memory figures for the control interface."""

from __future__ import annotations

import os
from pathlib import Path

from trustme_init.control.state import DeviceStatsView


def device_stats(store: Path, data: Path, *, meminfo: Path = Path("/proc/meminfo")) -> DeviceStatsView:
    """Return sizes in bytes: `disk_system` is the data volume, `disk_containers` the GuestOS store."""
    system, containers = os.statvfs(data), os.statvfs(store)
    memory = {}
    for line in meminfo.read_text().splitlines():
        key, _, rest = line.partition(":")
        memory[key] = int(rest.split()[0]) * 1024
    return DeviceStatsView(
        disk_system=_total(system),
        disk_system_free=_free(system),
        disk_system_used=_total(system) - system.f_bfree * system.f_frsize,
        disk_containers=_total(containers),
        disk_containers_free=_free(containers),
        disk_containers_used=_total(containers) - containers.f_bfree * containers.f_frsize,
        mem_total=memory.get("MemTotal"),
        mem_free=memory.get("MemFree"),
        mem_available=memory.get("MemAvailable"),
    )


def _total(figures: os.statvfs_result) -> int:
    return figures.f_blocks * figures.f_frsize


def _free(figures: os.statvfs_result) -> int:
    return figures.f_bavail * figures.f_frsize
