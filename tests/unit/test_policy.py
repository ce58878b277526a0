# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init import policy
from trustme_init.errors import PolicyRefusal

GOOD = """
version = 1
development = true
build_date = 2026-11-24T00:00:00Z
hardware = "x86"
[core]
guest_os = "trustme-coreos"
console = "/dev/hvc1"
start_timeout_s = 120
memory_max_mib = 512
pids_max = 256
[platform]
allow_insecure_boot = true
allow_missing_tpm = true
[devices]
timeout_s = 60
modules = ["virtio_blk"]
[provisioning]
require = ["device-certificate", "token"]
device_key = "ecc-p256"
pin_tries = 10
self_provisioning = true
[containers]
allow_unsigned_configs = true
start_timeout_s = 300
pids_max = 1024
"""
LENIENT = ("allow_insecure_boot", "allow_missing_tpm", "self_provisioning", "allow_unsigned_configs")
PRODUCTION = GOOD.replace("= true", "= false")


def refusal(text: str) -> PolicyRefusal:
    with pytest.raises(PolicyRefusal) as caught:
        policy.parse(text.encode())
    assert caught.value.code == "policy-malformed"
    return caught.value


def test_reads_every_key() -> None:
    parsed = policy.parse(GOOD.encode())
    assert parsed.development
    assert parsed.build_date == datetime(2026, 11, 24, tzinfo=UTC)
    assert parsed.core_memory_max == 512 * 1024 * 1024
    assert parsed.core_console == Path("/dev/hvc1")
    assert parsed.allows_insecure_boot
    assert parsed.allows_missing_tpm
    assert parsed.modules == ("virtio_blk",)
    assert parsed.requirements == {"device-certificate", "token"}
    assert parsed.device_key == "ecc-p256"
    assert parsed.pin_tries == 10
    assert parsed.provisions_itself
    assert parsed.allows_unsigned_configs
    assert (parsed.container_start_timeout, parsed.container_pids_max) == (300, 1024)


def test_console_is_optional() -> None:
    assert policy.parse(GOOD.replace('console = "/dev/hvc1"\n', "").encode()).core_console is None


@pytest.mark.parametrize(
    "line", [line for line in GOOD.splitlines() if "=" in line and "console" not in line]
)
def test_a_missing_key_is_refused_by_name(line: str) -> None:
    assert line.split(" =", maxsplit=1)[0] in refusal(GOOD.replace(line, "")).evidence


@pytest.mark.parametrize("table", ["", "core", "platform", "devices", "provisioning", "containers"])
def test_an_unknown_key_is_refused_by_name(table: str) -> None:
    text = f"unknown = 1\n{GOOD}" if not table else GOOD.replace(f"[{table}]", f"[{table}]\nunknown = 1")
    assert refusal(text).evidence.endswith(f"{table}.unknown" if table else "unknown")


@pytest.mark.parametrize("rule", LENIENT)
def test_a_production_build_cannot_be_lenient(rule: str) -> None:
    assert policy.parse(PRODUCTION.encode()).development is False
    assert rule in refusal(PRODUCTION.replace(f"{rule} = false", f"{rule} = true")).evidence


def test_a_wrong_type_is_refused() -> None:
    # True is an int to Python; a misspelt rule must not become a number or the other way round.
    refusal(GOOD.replace("development = true", "development = 1"))
    refusal(GOOD.replace("pids_max = 256", "pids_max = true"))
    refusal(GOOD.replace("version = 1", "version = 2"))
    refusal(GOOD.replace("00:00:00Z", "00:00:00"))
    refusal(GOOD.replace('"token"]', '"tokens"]'))
    refusal(GOOD.replace('"token"]', '"token", "token"]'))
    refusal(GOOD.replace("ecc-p256", "ecc-p192"))
    refusal("x" * (policy.POLICY_LIMIT + 1))


@given(st.binary(max_size=300))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(PolicyRefusal):
        policy.parse(data)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusal) as caught:
        policy.load(tmp_path / "policy.toml")
    assert caught.value.code == "policy-unreadable"
