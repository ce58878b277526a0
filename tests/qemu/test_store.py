# SPDX-License-Identifier: Apache-2.0
"""A store that somebody changed while the device was off: refused by a real kernel, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trustme_init.storage.layout import STORE_GUESTOS_DIR
from trustme_tools.image import disk
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.images import ImageDirectory
from trustme_tools.machine.vm import VirtualMachine


def flip(pattern: str, position: float) -> Callable[[Path], None]:
    """Return a change of one bit in the file that matches, at a fraction of its length."""

    def change(tree: Path) -> None:
        (path,) = (tree / STORE_GUESTOS_DIR).glob(pattern)
        data = bytearray(path.read_bytes())
        data[int(len(data) * position)] ^= 1
        path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (flip("*.conf", 0.5), {"bad-signature"}),
        # The first block is the squashfs superblock: the mount itself reads it.
        (flip("*/root.img", 0.0), {"image-not-mountable", "verity-mismatch"}),
    ],
    ids=["config", "image"],
)
def test_one_flipped_bit_in_the_store_is_refused(  # noqa: PLR0917 - fixtures
    machines: Callable[..., VirtualMachine],
    image: ImageDirectory,
    enrolled: Firmware,
    tmp_path: Path,
    change: Callable[[Path], None],
    codes: set[str],
) -> None:
    copy = tmp_path / "disk.img"
    disk.copy(image.disk, copy)
    disk.edit_store(copy, change)
    machine = machines(copy, enrolled)
    outcome = machine.wait_boot()
    assert outcome.kind == "refused", outcome
    assert outcome.detail in codes
    assert "remedy:" in machine.boot.text
