# SPDX-License-Identifier: Apache-2.0
"""What a device's disk looks like: partition types, names and sizes.

Image builders and the device agree here.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

ESP_TYPE: Final = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
"""EFI system partition (UEFI 2.10, table 5.7)."""
ESP_NAME: Final = "boot"

STORE_TYPE: Final = UUID("b0f7dc53-36a5-4d2b-9f0f-1a3a6d1e7c01")
STORE_NAME: Final = "trustme-store"

DATA_TYPE: Final = UUID("b0f7dc53-36a5-4d2b-9f0f-1a3a6d1e7c02")
DATA_NAME: Final = "trustme-data"
"""A complete data volume: never formatted again, whatever its state."""
DATA_NAME_NEW: Final = "trustme-data.new"
"""A data volume in the making: never held data, and is made anew."""

MIB: Final = 1024 * 1024
DATA_SIZE_MIN: Final = 256 * MIB
"""Free bytes below which no data volume is made; image builders leave at least this."""
ALIGNMENT: Final = MIB
"""Start and length of partitions made here are multiples of this (flash erase blocks, RAID stripes)."""

STORE_GUESTOS_DIR: Final = "operatingsystems"
"""In the store: `<name>-<version>.{conf,sig,cert}` and `<name>-<version>/<image>.img`, `.hash.img`."""
