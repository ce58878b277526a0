# SPDX-License-Identifier: Apache-2.0
"""Measuring against swtpm, with tpm2-tools as the oracle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.software_tpm import SoftwareTpm
from trustme_init.errors import DeviceRefusal
from trustme_init.tpm.measure import PCR, Measurement, Measurer

EVENTS = (Measurement("mode", "provisioning"), Measurement("core-config", "trustme-coreos 1 ab"))


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path) as running:
        yield running


def replay(log: Path) -> str:
    """Compute the PCR that the log implies."""
    value = bytes(32)
    for number, line in enumerate(log.read_text().splitlines()):
        record = json.loads(line)
        assert record["recnum"] == number
        assert record["pcr"] == PCR
        digest = hashlib.sha256(json.dumps(record["content"], sort_keys=True).encode()).digest()
        assert {"hashAlg": "sha256", "digest": digest.hex()} in record["digests"]
        value = hashlib.sha256(value + digest).digest()
    return value.hex()


def test_the_log_replays_to_the_register(tpm: SoftwareTpm, tmp_path: Path) -> None:
    assert tpm.pcr(PCR) == "00" * 32
    log = tmp_path / "cel"
    with Measurer(tpm.tcti) as measurer:
        measurer.extend(EVENTS, log)
    assert tpm.pcr(PCR) == replay(log)


def test_another_mode_gives_another_register(tpm: SoftwareTpm, tmp_path: Path) -> None:
    log = tmp_path / "cel"
    with Measurer(tpm.tcti) as measurer:
        measurer.extend((Measurement("mode", "operational"), *EVENTS[1:]), log)
    other = tmp_path / "other"
    other.mkdir()
    with SoftwareTpm(other) as second:
        with Measurer(second.tcti) as measurer:
            measurer.extend(EVENTS, other / "cel")
        assert second.pcr(PCR) != tpm.pcr(PCR)


def test_no_tpm_behind_the_address_is_a_refusal(tmp_path: Path) -> None:
    with Measurer(f"swtpm:path={tmp_path / 'nobody'}") as measurer, pytest.raises(DeviceRefusal) as caught:
        measurer.extend(EVENTS, tmp_path / "cel")
    assert caught.value.code == "tpm-failed"
    assert not (tmp_path / "cel").exists()


def test_an_event_too_long_for_the_tpm_is_a_refusal(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with Measurer(tpm.tcti) as measurer, pytest.raises(DeviceRefusal) as caught:
        measurer.extend((Measurement("mode", "x" * 1024),), tmp_path / "cel")
    assert caught.value.code == "tpm-failed"
    assert tpm.pcr(PCR) == "00" * 32
