# SPDX-License-Identifier: Apache-2.0
"""The firmware refuses what it must not start, and the device refuses firmware that does not enforce."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trustme_tools.image import build, disk, uki
from trustme_tools.image.cache import Cache
from trustme_tools.machine import firmware
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.images import ImageDirectory
from trustme_tools.machine.vm import Outcome, VirtualMachine
from trustme_tools.pki.directory import PkiDirectory

LIMIT = 90.0

Boot = Callable[..., Outcome]


@pytest.fixture
def boot(machines: Callable[..., VirtualMachine]) -> Boot:
    def run(disk_image: Path, firm: Firmware) -> Outcome:
        return machines(disk_image, firm).wait_boot(LIMIT)

    return run


@pytest.fixture
def with_boot_file(image: ImageDirectory, tmp_path: Path) -> Callable[[Path | None], Path]:
    """Return a copy of the disk that has another boot file."""

    def make(boot_file: Path | None) -> Path:
        copy = tmp_path / "disk.img"
        disk.copy(image.disk, copy)
        disk.replace_esp_file(copy, boot_file)
        return copy

    return make


def test_an_unsigned_uki_is_refused(
    boot: Boot, image: ImageDirectory, enrolled: Firmware, with_boot_file: Callable[..., Path], tmp_path: Path
) -> None:
    uki.strip_signature(image.uki, tmp_path / "unsigned.efi")
    outcome = boot(with_boot_file(tmp_path / "unsigned.efi"), enrolled)
    assert outcome.kind == "firmware-denied", outcome


def test_a_uki_signed_by_another_key_is_refused(  # noqa: PLR0917 - fixtures
    boot: Boot,
    image: ImageDirectory,
    enrolled: Firmware,
    pki: PkiDirectory,
    with_boot_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    # KEK: a good key of the same product, but not one in db.
    other = tmp_path / "other.efi"
    uki.resign(image.uki, other, key_pem=pki.key_pem("KEK"), certificate=pki.certificate_path("KEK"))
    outcome = boot(with_boot_file(other), enrolled)
    assert outcome.kind == "firmware-denied", outcome


def test_one_flipped_bit_is_refused(
    boot: Boot, image: ImageDirectory, enrolled: Firmware, with_boot_file: Callable[..., Path], tmp_path: Path
) -> None:
    data = bytearray(image.uki.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.efi").write_bytes(data)
    outcome = boot(with_boot_file(tmp_path / "flipped.efi"), enrolled)
    assert outcome.kind == "firmware-denied", outcome


def test_a_revoked_signer_is_refused(
    boot: Boot, image: ImageDirectory, cache: Cache, pki: PkiDirectory
) -> None:
    revoking = firmware.prepare(cache, image.pki, dbx=[str(pki.certificate_path(build.UKI_SIGNER))])
    outcome = boot(image.disk, revoking)
    assert outcome.kind == "firmware-denied", outcome


def test_a_missing_boot_file_is_not_taken_for_a_refusal(
    boot: Boot, enrolled: Firmware, with_boot_file: Callable[..., Path]
) -> None:
    outcome = boot(with_boot_file(None), enrolled)
    assert outcome.kind == "firmware-nothing", outcome


def test_secure_boot_off_is_refused_by_the_device(boot: Boot, image: ImageDirectory, cache: Cache) -> None:
    outcome = boot(image.disk, firmware.prepare(cache, image.pki, secure_boot=False))
    assert (outcome.kind, outcome.detail) == ("refused", "secure-boot-off")


def test_setup_mode_is_refused_by_the_device(boot: Boot, image: ImageDirectory, cache: Cache) -> None:
    outcome = boot(image.disk, firmware.prepare(cache, image.pki, setup_mode=True))
    # Without a platform key the firmware enforces nothing; either is the right reason.
    assert outcome.kind == "refused"
    assert outcome.detail in {"setup-mode", "secure-boot-off"}


def test_a_db_without_the_core_anchor_is_refused_by_the_device(
    boot: Boot, image: ImageDirectory, cache: Cache, pki: PkiDirectory
) -> None:
    only_uki = firmware.prepare(
        cache, image.pki, default_db=False, extra_db=[pki.certificate_path(build.UKI_SIGNER)]
    )
    outcome = boot(image.disk, only_uki)
    assert outcome.kind == "refused"
    assert outcome.detail in {"no-anchor", "untrusted-signer"}
