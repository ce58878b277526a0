# SPDX-License-Identifier: Apache-2.0
"""An enrolment stick in real firmware: EDK2 in setup mode takes the keys from it, through systemd-boot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from trustme_init.firmware.secureboot import parse_database
from trustme_tools.cli import main
from trustme_tools.image import packages
from trustme_tools.image.cache import Cache
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.vm import VirtualMachine
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.uefi.store import read_store

LIMIT = 90.0


def trustme(*words: object) -> None:
    assert main.main([str(word) for word in words]) == 0


def test_firmware_enrols_the_stick_with_the_third_party(
    machines: Callable[..., VirtualMachine],
    cache: Cache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = packages.fetch(cache, "base-packages", packages.BASE)
    # EDK2 enrols certificates with RSA keys only.
    ours = create(tmp_path / "ours", algorithm=Algorithm.RSA4096, development=True)
    partner = create(tmp_path / "partner", algorithm=Algorithm.RSA4096, development=True)
    anchor = partner.certificate("ssig_subca").public_bytes(Encoding.DER)
    enrol, stick = tmp_path / "enrol", tmp_path / "stick.img"
    trustme("uefi", "auth", "--pki", ours.path, "--out", enrol)
    digest = hashlib.sha256(anchor).hexdigest()
    words = ["--sha256", digest, "--to", enrol, "--pki", ours.path]
    trustme("uefi", "add-db", partner.certificate_path("ssig_subca"), *words)
    loader = tree / "usr/lib/systemd/boot/efi/systemd-bootx64.efi"
    trustme("uefi", "esp", enrol, "--out", stick, "--loader", loader, "--enrol", "force")

    share = tree / "usr/share/OVMF"
    setup_mode = Firmware(share / "OVMF_CODE_4M.secboot.fd", share / "OVMF_VARS_4M.fd")
    state = tmp_path / "state"
    machine = machines(stick, setup_mode, state=state, tpm=False)
    machine.wait_off(LIMIT)
    assert "successfully enrolled" in machine.serial.text + machine.boot.text

    found = {variable.name: variable for variable in read_store(state / "vars.fd")}
    for name in ("PK", "KEK", "db"):
        assert found[name].data == (enrol / f"{name}.esl").read_bytes()
    assert anchor in parse_database(found["db"].data).certificates
    capsys.readouterr()
    trustme("uefi", "show", state / "vars.fd")
    assert "SecureBootEnable: yes" in capsys.readouterr().out
