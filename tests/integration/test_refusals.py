# SPDX-License-Identifier: Apache-2.0
"""The boot natively: what it must refuse, each with its own code and nothing started."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.integration.sandbox import MIB, Boot, Device, Factory, x509_list
from trustme_tools.guestos.build import STORE_DIRECTORY, sign_config
from trustme_tools.guestos.signing import KeySigner, pki_signer
from trustme_tools.pki import certificates, keys
from trustme_tools.pki.certificates import Issuer, Role
from trustme_tools.pki.keys import KeyType, NewKey

pytestmark = pytest.mark.root
Make = Callable[..., Device]
STEM = "trustme-coreos-10"
EXPIRED = {"certificate-expired", "certificate-not-valid"}


def refused(device: Device) -> str:
    """Boot, return the refusal's code, and see that nothing was started and nobody asked anything."""
    with device.boot() as boot:
        code = boot.refusal()
        report = boot.report
        assert report["result"] == "refused"
        assert report["refusal"]["code"] == code
        assert report["refusal"]["cause"]
        assert report["refusal"]["remedy"]
        assert not any("cservice" in line for line in boot.processes().values())
        assert not any("RUNNING" in line for line in boot.lines)
        assert_no_terminal_is_read(boot)
    return code


def assert_no_terminal_is_read(boot: Boot) -> None:
    """Row 13: no process has a terminal open, and none is a shell."""
    init = boot.init_pid()
    assert init is not None
    lines = boot.processes()
    assert not any("/sh" in line for line in lines.values())
    for pid in lines:
        opened = open_paths(pid)
        # The manager ends once its screen is shown, and takes the TPM's child with it; PID 1 stays.
        assert opened or pid != init
        assert not any(path.startswith(("/dev/tty", "/dev/pts", "/dev/console")) for path in opened)


def open_paths(pid: int) -> list[str]:
    """Return what a process has open; nothing of one that has ended."""
    paths = []
    with suppress(FileNotFoundError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed while we looked
                paths.append(str(fd.readlink()))
    return paths


@pytest.fixture
def store(factory: Factory, tmp_path: Path) -> Path:
    """A copy of the good store that a test may damage."""
    return shutil.copytree(factory.store, tmp_path / "store")


# Firmware


@pytest.mark.parametrize(
    ("firmware", "code"),
    [
        ({"secure_boot": 0}, "secure-boot-off"),
        ({"setup_mode": 1}, "setup-mode"),
        ({"secure_boot": 2}, "efivar-malformed"),
        ({"db": b""}, "no-anchor"),
        ({"db": b"\x00" * 27}, "signature-list-malformed"),
    ],
)
def test_row13_unacceptable_firmware(device: Make, firmware: dict[str, Any], code: str) -> None:
    target = device()
    target.set_firmware(**firmware)
    assert refused(target) == code


def test_missing_firmware_variables(device: Make) -> None:
    target = device()
    shutil.rmtree(target.efivars)
    assert refused(target) == "efivars-unavailable"


@pytest.mark.parametrize("name", ["ssig_subca", "ssig_cml", "ssig_rootca"])
def test_row16_a_revoked_signer(device: Make, factory: Factory, name: str) -> None:
    target = device()
    target.set_firmware(dbx=x509_list(factory.certificate(name)))
    assert refused(target) in {"no-anchor", "certificate-revoked"}


def test_an_insecure_machine_boots_only_with_a_development_policy(device: Make) -> None:
    target = device(policy={"development": "true", "insecure": "true"})
    target.set_firmware(secure_boot=0)
    with target.boot() as boot:
        boot.wait_running()
        assert boot.report["development"] is True
        assert any("DEVELOPMENT BUILD" in line for line in boot.lines)


def test_a_production_policy_cannot_allow_an_insecure_machine(device: Make) -> None:
    target = device(policy={"development": "false", "insecure": "true"})
    target.set_firmware(secure_boot=0)
    assert refused(target) == "policy-malformed"


# TPM


def test_a_machine_without_a_tpm(device: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    target = device(tcti="device:/dev/tpmrm-of-nobody")
    assert refused(target) == "tpm-missing"
    lenient = device(
        "lenient", tcti="device:/dev/tpmrm-of-nobody", policy={"development": "true", "no_tpm": "true"}
    )
    with lenient.boot() as boot:
        boot.wait_running()
        assert boot.report["tpm"] is False


def test_a_tpm_that_does_not_answer(device: Make, tmp_path: Path) -> None:
    assert refused(device(tcti=f"swtpm:path={tmp_path}/nobody")) == "tpm-failed"


# The core GuestOS


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = (flip, truncate, empty, remove)
PARTS = (f"{STEM}.conf", f"{STEM}.sig", f"{STEM}.cert", f"{STEM}/root.img", f"{STEM}/root.hash.img")
EXPECTED = {
    f"{STEM}.conf": {"bad-signature", "config-size", "guestos-missing"},
    f"{STEM}.sig": {"bad-signature", "signature-size", "guestos-incomplete"},
    f"{STEM}.cert": {
        "bad-signature",
        "chain-broken",
        "chain-malformed",
        "chain-too-large",
        "untrusted-signer",
        "weak-signature",
        "guestos-incomplete",
    },
    f"{STEM}/root.img": {"verity-mismatch", "image-size-mismatch", "image-unreadable"},
    f"{STEM}/root.hash.img": {"verity-mismatch", "image-size-mismatch", "image-unreadable"},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_row03_damaged_parts(device: Make, store: Path, part: str, damage: Callable[[Path], None]) -> None:
    damage(store / STORE_DIRECTORY / part)
    target = device()
    target.make_disk(store)
    assert refused(target) in EXPECTED[part]


@pytest.mark.parametrize("part", PARTS)
def test_row03_a_part_of_another_version(
    device: Make, factory: Factory, store: Path, tmp_path: Path, part: str
) -> None:
    other = tmp_path / "other"
    small = tmp_path / "root"
    shutil.copytree(factory.root, small, symlinks=True)
    (small / "etc/other").write_text("another version")
    factory.build_core(other, version=11, root=small)
    source = other / STORE_DIRECTORY / part.replace("-10", "-11")
    shutil.copy(source, store / STORE_DIRECTORY / part)
    target = device()
    target.make_disk(store)
    if part.endswith(".cert"):
        # The chain of the same signer: it is the same file, and the GuestOS is still whole.
        with target.boot() as boot:
            boot.wait_running()
    else:
        expected = {"bad-signature", "verity-mismatch", "image-size-mismatch"}
        assert refused(target) in expected


def test_row32_another_version_filed_under_this_one(device: Make, store: Path, factory: Factory) -> None:
    directory = store / STORE_DIRECTORY
    for suffix in (".conf", ".sig", ".cert", ""):
        (directory / f"{STEM}{suffix}").rename(directory / f"trustme-coreos-99{suffix}")
    target = device()
    target.make_disk(store)
    assert refused(target) == "wrong-identity"


def test_the_highest_complete_version_is_chosen_and_never_an_older_one(
    device: Make, factory: Factory, store: Path
) -> None:
    factory.build_core(store, version=12)
    (store / STORE_DIRECTORY / "trustme-coreos-13.conf").write_text("half a version")
    target = device()
    target.make_disk(store, store_mib=256)
    with target.boot() as boot:
        boot.wait_running()
        assert boot.report["core"]["version"] == 12
        assert boot.report["core"]["ignored_in_store"] == ["incomplete trustme-coreos-13"]
    flip(store / STORE_DIRECTORY / "trustme-coreos-12.sig")
    target.make_disk(store, store_mib=256)
    assert refused(target) == "bad-signature"


def issue(factory: Factory, *, issuer: str, days: int, start: datetime) -> KeySigner:
    """Make a code-signing leaf under a CA of the factory's PKI."""
    key = keys.generate(KeyType.P384, 384)
    authority = factory.pki.certificate(issuer)
    issued = certificates.issue(
        Role.CODE_SIGNING,
        certificates.name("A Leaf", "Test"),
        key,
        Issuer(authority, NewKey(KeyType.P384, factory.pki.key(issuer), b"")),
        not_before=start,
        days=days,
    )
    leaf: x509.Certificate = issued
    return KeySigner(key.private, (leaf, authority))


def resign(store: Path, signer: KeySigner) -> None:
    # Our own tool would refuse an expired leaf; an attacker's does not.
    sign_config(store / STORE_DIRECTORY / f"{STEM}.conf", signer, allow_expired=True)


def test_row16_a_leaf_of_another_authority(device: Make, factory: Factory, store: Path) -> None:
    resign(store, pki_signer(factory.pki, "guestos"))
    target = device()
    target.make_disk(store)
    assert refused(target) == "untrusted-signer"


def test_row17_an_expired_leaf(device: Make, factory: Factory, store: Path) -> None:
    start = datetime.now(tz=UTC) - timedelta(days=60)
    resign(store, issue(factory, issuer="ssig_subca", days=30, start=start))
    target = device()
    target.make_disk(store)
    assert refused(target) in EXPIRED


def test_hardware_must_match(device: Make) -> None:
    target = device()
    text = target.policy_file.read_text().replace('hardware = "x86"', 'hardware = "other"')
    target.policy_file.write_text(text)
    assert refused(target) == "wrong-hardware"


def test_row24_a_fifo_in_the_store_is_not_waited_for(device: Make, store: Path) -> None:
    signature = store / STORE_DIRECTORY / f"{STEM}.sig"
    signature.unlink()
    os.mkfifo(signature)
    target = device()
    target.make_disk(store)
    assert refused(target) == "core-file-unreadable"


def test_row24_a_link_in_the_store_is_not_followed(device: Make, store: Path) -> None:
    config = store / STORE_DIRECTORY / f"{STEM}.conf"
    config.rename(config.with_suffix(".real"))
    config.symlink_to(f"{STEM}.real")
    target = device()
    target.make_disk(store)
    assert refused(target) == "core-file-unreadable"


def test_a_core_that_never_reports_is_a_timeout(device: Make, factory: Factory, tmp_path: Path) -> None:
    root = shutil.copytree(factory.root, tmp_path / "root", symlinks=True)
    init = root / "usr/sbin/cservice"
    init.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent = tmp_path / "silent"
    factory.build_core(silent, version=10, root=root)
    target = device(policy={"start_timeout": 2})
    target.make_disk(silent)
    with target.boot() as boot:
        assert boot.refusal() == "core-start-timeout"


# The disk


def test_a_missing_store(device: Make) -> None:
    target = device()
    target.make_disk()
    subprocess.run(["sfdisk", "-q", "--delete", target.disk, "2"], check=True)
    assert refused(target) == "store-missing"


def test_two_stores(device: Make) -> None:
    target = device()
    target.make_disk()
    line = "size=16MiB, type=b0f7dc53-36a5-4d2b-9f0f-1a3a6d1e7c01, name=trustme-store\n"
    subprocess.run(["sfdisk", "-q", "--append", target.disk], input=line, text=True, check=True)
    assert refused(target) == "store-ambiguous"


def test_a_corrupt_store(device: Make) -> None:
    target = device()
    target.make_disk()
    with target.disk.open("r+b") as disk:
        disk.seek(17 * MIB)
        disk.write(os.urandom(MIB))
    assert refused(target) == "store-damaged"


def test_a_full_store_boots_as_any_other(device: Make, store: Path) -> None:
    # It is mounted read-only: nothing on the boot path needs room in it.
    used = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    target = device()
    target.make_disk(store, store_mib=used // MIB + 12)
    with target.boot() as boot:
        boot.wait_running()


def test_no_room_for_the_data_volume(device: Make) -> None:
    target = device()
    target.make_disk(size_mib=300)
    assert refused(target) == "no-space-for-data-volume"


def test_row11_a_damaged_data_volume_is_never_formatted(device: Make) -> None:
    target = device()
    with target.boot() as boot:
        boot.wait_running()
    table = subprocess.run(["sfdisk", "-d", target.disk], capture_output=True, text=True, check=True).stdout
    start = next(int(line.split("start=")[1].split(",")[0]) for line in table.splitlines() if "7C02" in line)
    with target.disk.open("r+b") as disk:
        disk.seek(start * 512)
        disk.write(bytes(MIB))
    assert refused(target) == "data-volume-damaged"
    with target.disk.open("rb") as disk:
        disk.seek(start * 512)
        assert disk.read(MIB) == bytes(MIB)
