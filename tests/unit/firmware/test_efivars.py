# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.errors import FirmwareRefusal, Refusal
from trustme_init.firmware import efivars
from trustme_init.firmware.efivars import EFI_GLOBAL_VARIABLE, EfiVariable, EfiVars, parse_variable

FILE = f"SetupMode-{EFI_GLOBAL_VARIABLE}"


def code_of(directory: Path) -> str:
    with pytest.raises(FirmwareRefusal) as caught:
        EfiVars(directory).read("SetupMode", EFI_GLOBAL_VARIABLE)
    assert caught.value.remedy
    return caught.value.code


def test_attributes_are_little_endian_before_the_data(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\x27\x01\0\x80data")
    assert EfiVars(tmp_path).read("SetupMode", EFI_GLOBAL_VARIABLE) == EfiVariable(0x80000127, b"data")


def test_absent_variable_is_none(tmp_path: Path) -> None:
    assert EfiVars(tmp_path).read("SetupMode", EFI_GLOBAL_VARIABLE) is None


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    assert code_of(tmp_path / "efivars") == "efivars-unavailable"


@pytest.mark.parametrize("size", range(4))
def test_row2_no_complete_attribute_word(tmp_path: Path, size: int) -> None:
    (tmp_path / FILE).write_bytes(bytes(size))
    assert code_of(tmp_path) == "efivar-malformed"


def test_row2_largest_variable_and_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efivars, "VARIABLE_LIMIT", 100)
    (tmp_path / FILE).write_bytes(bytes(104))
    variable = EfiVars(tmp_path).read("SetupMode", EFI_GLOBAL_VARIABLE)
    assert variable is not None
    assert len(variable.data) == 100
    (tmp_path / FILE).write_bytes(bytes(105))
    assert code_of(tmp_path) == "efivar-too-large"


def test_row2_sparse_file_of_four_gigabytes(tmp_path: Path) -> None:
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(2**32)
    assert code_of(tmp_path) == "efivar-too-large"


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(bytes(5))
    (tmp_path / FILE).symlink_to("elsewhere")
    assert code_of(tmp_path) == "efivar-unreadable"


def test_directory_in_place_of_a_variable_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    assert code_of(tmp_path) == "efivar-unreadable"


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    assert code_of(tmp_path) == "efivar-malformed"


@pytest.mark.parametrize(("name", "guid"), [("../x", EFI_GLOBAL_VARIABLE), ("db", "../../etc/passwd")])
def test_names_cannot_leave_the_directory(tmp_path: Path, name: str, guid: str) -> None:
    with pytest.raises(ValueError, match="not a variable name"):
        EfiVars(tmp_path).read(name, guid)


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_split_or_refused(raw: bytes) -> None:
    try:
        variable = parse_variable("x", raw)
    except Refusal:
        assert len(raw) < 4
    else:
        assert variable.attributes.to_bytes(4, "little") + variable.data == raw
