# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.errors import FirmwareRefusal, Refusal
from trustme_init.firmware.efivars import EFI_GLOBAL_VARIABLE, EFI_IMAGE_SECURITY_DATABASE, EfiVars
from trustme_init.firmware.secureboot import (
    FirmwareFacts,
    SignatureDb,
    check_platform,
    parse_database,
    read_platform,
)

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import ToolMade

AUTHENTICATED = b"\x27\0\0\0"
VOLATILE = b"\x06\0\0\0"


class Firmware:
    """An efivarfs directory whose variables can be set one by one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state("SecureBoot", b"\1")
        self.state("SetupMode", b"\0")
        self.database("db", b"")

    def state(self, name: str, data: bytes, attributes: bytes = VOLATILE) -> None:
        (self.directory / f"{name}-{EFI_GLOBAL_VARIABLE}").write_bytes(attributes + data)

    def database(self, name: str, data: bytes, attributes: bytes = AUTHENTICATED) -> None:
        (self.directory / f"{name}-{EFI_IMAGE_SECURITY_DATABASE}").write_bytes(attributes + data)

    def facts(self) -> FirmwareFacts:
        return read_platform(EfiVars(self.directory))

    def code(self) -> str:
        with pytest.raises(FirmwareRefusal) as caught:
            self.facts()
        assert caught.value.cause
        assert caught.value.remedy
        return caught.value.code


@pytest.fixture
def firmware(tmp_path: Path) -> Firmware:
    return Firmware(tmp_path)


def facts(*, secure_boot: bool, setup_mode: bool) -> FirmwareFacts:
    return FirmwareFacts(secure_boot, setup_mode, SignatureDb(), SignatureDb())


def test_healthy_machine(firmware: Firmware, tool_made: ToolMade) -> None:
    firmware.database("db", tool_made.virt_firmware)
    firmware.database("dbx", tool_made.efitools_hashes[384] + tool_made.efitools_timed)
    found = firmware.facts()
    assert (found.secure_boot, found.setup_mode) == (True, False)
    assert found.db.certificates == (tool_made.der,)
    assert found.db.sha256 == {tool_made.digest, tool_made.digest[::-1]}
    assert found.db.digest == hashlib.sha256(tool_made.virt_firmware).hexdigest()
    assert set(found.dbx.x509_hashes) == {"sha256", "sha384"}
    assert found.dbx.x509_hashes["sha384"] == {hashlib.sha384(tool_made.tbs).digest(): bytes(16)}
    # EFI_TIME: year u16, month, day, hour, minute, second; the time that efitools was given.
    (time,) = found.dbx.x509_hashes["sha256"].values()
    assert time[:7] == (2024).to_bytes(2, "little") + bytes([2, 3, 4, 5, 6])


def test_types_not_understood_are_named(firmware: Firmware) -> None:
    sha1 = bytes.fromhex("12a56c8210cfc94ab187be01496631bd")
    firmware.database("dbx", sha1 + bytes.fromhex("400000000000000024000000") + bytes(36))
    assert firmware.facts().dbx.ignored == ("EFI_CERT_SHA1",)


def test_absent_databases_are_empty(firmware: Firmware) -> None:
    (firmware.directory / f"db-{EFI_IMAGE_SECURITY_DATABASE}").unlink()
    assert firmware.facts().db == firmware.facts().dbx == SignatureDb()


@pytest.mark.parametrize(
    ("name", "code"), [("SecureBoot", "secure-boot-unknown"), ("SetupMode", "setup-mode-unknown")]
)
def test_absent_state_is_refused(firmware: Firmware, name: str, code: str) -> None:
    (firmware.directory / f"{name}-{EFI_GLOBAL_VARIABLE}").unlink()
    assert firmware.code() == code


@pytest.mark.parametrize("data", [b"", b"\2", b"\xff", b"1", b"\1\0", b"\0\0", b"\1" * 4])
@pytest.mark.parametrize("name", ["SecureBoot", "SetupMode"])
def test_state_is_one_byte_of_0_or_1(firmware: Firmware, name: str, data: bytes) -> None:
    firmware.state(name, data)
    assert firmware.code() == "efivar-malformed"


@pytest.mark.parametrize("name", ["SecureBoot", "SetupMode"])
def test_state_written_by_an_operating_system_is_refused(firmware: Firmware, name: str) -> None:
    firmware.state(name, b"\1", attributes=b"\x07\0\0\0")
    assert firmware.code() == "efivar-attributes"


@pytest.mark.parametrize("attributes", [0x07, 0x06, 0x26, 0x37, 0x67, 0x00, 0x80000027])
@pytest.mark.parametrize("name", ["db", "dbx"])
def test_database_that_needs_no_key_to_change_is_refused(
    firmware: Firmware, name: str, attributes: int
) -> None:
    firmware.database(name, b"", attributes=attributes.to_bytes(4, "little"))
    assert firmware.code() == "efivar-attributes"


@pytest.mark.parametrize("name", ["db", "dbx"])
def test_row2_damaged_database_is_refused(firmware: Firmware, tool_made: ToolMade, name: str) -> None:
    firmware.database(name, tool_made.virt_firmware[:-1])
    assert firmware.code() == "signature-list-malformed"


@pytest.mark.parametrize(
    ("secure_boot", "setup_mode", "code"),
    [
        (True, False, None),
        (False, False, "secure-boot-off"),
        (True, True, "setup-mode"),
        (False, True, "setup-mode"),
    ],
)
def test_only_secure_boot_outside_setup_mode_goes_on(
    *, secure_boot: bool, setup_mode: bool, code: str | None
) -> None:
    state = facts(secure_boot=secure_boot, setup_mode=setup_mode)
    check_platform(state, allow_insecure=True)
    if code is None:
        check_platform(state, allow_insecure=False)
        return
    with pytest.raises(FirmwareRefusal) as caught:
        check_platform(state, allow_insecure=False)
    assert caught.value.code == code


@given(st.binary(max_size=120))
def test_arbitrary_databases_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(Refusal):
        parse_database(data)


def test_reading_the_firmware_needs_only_the_standard_library() -> None:
    # The import budget (design decision 9): this runs before anything else is loaded.
    script = (
        f"import sys; sys.path[:] = {sys.path!r}; import trustme_init.firmware.secureboot; "
        "print([name for name in sys.modules if name.split('.')[0] in "
        "{'cryptography', 'google', 'uuid', 'tpm2_pytss', 'pyroute2', 'asyncio'}])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
