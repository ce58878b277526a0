# SPDX-License-Identifier: Apache-2.0
"""The marker read without the TPM library: it agrees with the library, or leaves the word to it."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer
from trustme_init.errors import DeviceRefusal
from trustme_init.tpm import nv_marker, ownership, quick_marker
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.marker_form import INDEX, SIZE, MarkerContent, MarkerReading, MarkerState
from trustme_init.tpm.measure import Measurer

CONTENT = MarkerContent(UUID("11111111-2222-4333-8444-555555555555"), bytes(range(32)))
OURS = "ownerwrite|ownerread|authread|no_da|writedefine"


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path) as running:
        yield running


def by_library(tcti: str) -> MarkerReading:
    with open_tpm(tcti) as esapi:
        return nv_marker.read_marker(esapi)


def agree(tcti: str) -> MarkerReading:
    reading = quick_marker.read(tcti)
    assert reading is not None
    said = by_library(tcti)
    assert reading == said
    return reading


def test_every_state_is_the_one_the_library_sees(tpm: SoftwareTpm, tmp_path: Path) -> None:
    assert agree(tpm.tcti).state is MarkerState.ABSENT
    with open_tpm(tpm.tcti) as esapi:
        owner = ownership.take_ownership(esapi, tmp_path).owner
        nv_marker.define_marker(esapi, owner)
    assert agree(tpm.tcti).state is MarkerState.OPEN
    with open_tpm(tpm.tcti) as esapi:
        nv_marker.complete_marker(esapi, owner, CONTENT)
    reading = agree(tpm.tcti)
    assert (reading.state, reading.content, reading.locked) == (MarkerState.COMPLETED, CONTENT, True)


def define(
    tpm: SoftwareTpm, *, size: int = SIZE, attributes: str = OURS, extra: tuple[str, ...] = ()
) -> None:
    command = ["tpm2_nvdefine", "-T", tpm.tcti, "-C", "o", "-s", str(size), "-a", attributes, *extra]
    subprocess.run([*command, f"{INDEX:#x}"], check=True, capture_output=True)


def write(tpm: SoftwareTpm, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "data").write_bytes(data)
    subprocess.run(
        ["tpm2_nvwrite", "-T", tpm.tcti, "-C", "o", "-i", tmp_path / "data", f"{INDEX:#x}"],
        check=True,
        capture_output=True,
    )


def test_a_written_index_counts_before_it_is_locked(tpm: SoftwareTpm, tmp_path: Path) -> None:
    define(tpm)
    write(tpm, tmp_path, CONTENT.encode())
    reading = agree(tpm.tcti)
    assert (reading.state, reading.locked) == (MarkerState.COMPLETED, False)


@pytest.mark.parametrize(
    "made",
    [
        {"size": SIZE - 1},
        {"size": SIZE + 1},
        {"attributes": OURS.replace("|no_da", "")},
        {"attributes": OURS.replace("|writedefine", "")},
        {"attributes": f"{OURS}|authwrite"},
        {"attributes": f"{OURS}|read_stclear"},
        {"attributes": OURS.replace("ownerwrite", "ownerwrite|nt=counter")},
        {"extra": ("-p", "an authorisation")},
        {"extra": ("-g", "sha384")},
    ],
)
def test_row31_what_is_not_ours_is_left_to_the_library_which_refuses_it(
    tpm: SoftwareTpm, made: dict[str, object]
) -> None:
    if "nt=counter" in str(made):
        made["size"] = 8
    define(tpm, **made)  # type: ignore[arg-type]  # the rows above
    assert quick_marker.read(tpm.tcti) is None
    with Measurer(tpm.tcti) as measurer, pytest.raises(DeviceRefusal) as caught:
        measurer.marker()
    assert caught.value.code == "marker-foreign"


@pytest.mark.parametrize("data", [bytes(SIZE), b"\x02" + CONTENT.encode()[1:], b"\xff" * SIZE])
def test_row31_content_that_is_no_marker_is_left_to_the_library(
    tpm: SoftwareTpm, tmp_path: Path, data: bytes
) -> None:
    define(tpm)
    write(tpm, tmp_path, data)
    assert quick_marker.read(tpm.tcti) is None
    with Measurer(tpm.tcti) as measurer, pytest.raises(DeviceRefusal) as caught:
        measurer.marker()
    assert caught.value.code == "marker-foreign"


def _busy(reply: bytes) -> bytes:
    del reply
    return struct.pack(">HII", 0x8001, 10, 0x922)  # TPM_RC_RETRY


@pytest.mark.parametrize(
    "change",
    [
        _busy,
        lambda reply: reply[:-1],
        lambda _reply: b"",
        lambda reply: reply[:2] + b"\xff\xff\xff\xff" + reply[6:],
        lambda reply: reply[:10] + bytes(len(reply) - 10),
        lambda _reply: struct.pack(">HII", 0x8001, 10, 0x101),
    ],
)
def test_row19_a_reply_that_is_odd_decides_nothing(
    tpm: SoftwareTpm, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    define(tpm)
    write(tpm, tmp_path, CONTENT.encode())
    home = tmp_path / "bus"
    home.mkdir()
    with Interposer(tpm, home) as bus:
        bus.on_reply = change
        assert quick_marker.read(bus.tcti) is None


@pytest.mark.parametrize(
    "tcti", ["device:/nowhere", "device:/dev/null", "swtpm:path=/nowhere", "swtpm:port=1", ""]
)
def test_an_address_without_a_tpm_decides_nothing(tcti: str) -> None:
    assert quick_marker.read(tcti) is None


def test_the_mode_is_known_before_the_library_is_loaded(tpm: SoftwareTpm) -> None:
    """The child's first word needs no library: it comes although there is none."""
    import sys

    kept = sys.modules.get("tpm2_pytss")
    sys.modules["tpm2_pytss"] = None  # type: ignore[assignment]  # importing it now fails
    try:
        with Measurer(tpm.tcti) as measurer:
            assert measurer.marker().state is MarkerState.ABSENT
    finally:
        if kept is None:
            del sys.modules["tpm2_pytss"]
        else:
            sys.modules["tpm2_pytss"] = kept
