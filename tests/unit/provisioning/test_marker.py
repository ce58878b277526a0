# SPDX-License-Identifier: Apache-2.0
"""The mode: every combination of what the TPM says and what lies on the disk."""

from __future__ import annotations

import itertools
from pathlib import Path
from uuid import UUID

import pytest

from trustme_init.errors import StorageRefusal
from trustme_init.provisioning import identity, record
from trustme_init.provisioning.layout import Layout
from trustme_init.provisioning.marker import decide, set_cache
from trustme_init.provisioning.mode import FROM_FILE, FROM_TPM, Mode
from trustme_init.tpm.marker_form import MarkerContent, MarkerReading, MarkerState

OTHER = UUID("11111111-1111-4111-8111-111111111111")


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Layout:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    layout = Layout(tmp_path)
    layout.make()
    return layout


def completed(layout: Layout) -> MarkerReading:
    """Bring a disk to completion; return what its TPM then says."""
    device = identity.load_or_create(layout.identity)
    written = record.write(layout.record, device, {"token": "softtoken"})
    set_cache(layout)
    return MarkerReading(MarkerState.COMPLETED, MarkerContent(device, written.sha256), locked=True)


def record_of(reading: MarkerReading) -> bytes:
    assert reading.content is not None
    return reading.content.record_sha256


def refusal(reading: MarkerReading | None, layout: Layout) -> str:
    with pytest.raises(StorageRefusal) as caught:
        decide(reading, layout.data)
    assert caught.value.remedy
    return caught.value.code


@pytest.mark.parametrize("state", [MarkerState.ABSENT, MarkerState.OPEN])
def test_a_new_device_is_in_provisioning(layout: Layout, state: MarkerState) -> None:
    fact = decide(MarkerReading(state), layout.data)
    assert (fact.mode, fact.source) == (Mode.PROVISIONING, FROM_TPM)


def test_a_completed_device_is_operational(layout: Layout) -> None:
    reading = completed(layout)
    fact = decide(reading, layout.data)
    assert (fact.mode, fact.source, fact.locked) == (Mode.OPERATIONAL, FROM_TPM, True)
    assert fact.record_sha256.hex() in fact.measured
    layout.marker.unlink()
    assert decide(reading, layout.data).mode is Mode.OPERATIONAL, "the file is a cache"


def put(path: Path, kind: str, good: bytes, foreign: bytes) -> None:
    """Replace what is at `path`."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    match kind:
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("nowhere")
        case "good" | "empty" | "foreign":
            path.write_bytes({"good": good, "empty": b"", "foreign": foreign}[kind])


def test_row31_nothing_on_the_disk_reopens_provisioning(layout: Layout) -> None:
    """Each file as it was, absent, empty, another's, a directory, a dangling link: in every combination."""
    reading = completed(layout)
    files = (layout.marker, layout.record, layout.identity)
    good = {path: path.read_bytes() for path in files}
    other_record = record.write(layout.home / "other.json", OTHER, {})
    assert other_record.sha256 != record_of(reading)
    foreign = {
        layout.marker: b"x",
        layout.record: (layout.home / "other.json").read_bytes(),
        layout.identity: f'uuid: "{OTHER}"\n'.encode(),
    }

    kinds = ("good", "absent", "empty", "foreign", "directory", "link")
    operational = 0
    for combination in itertools.product(kinds, repeat=len(files)):
        for path, kind in zip(files, combination, strict=True):
            put(path, kind, good[path], foreign[path])
        try:
            fact = decide(reading, layout.data)
        except StorageRefusal:
            continue
        assert fact.mode is Mode.OPERATIONAL, combination
        assert combination[1:] == ("good", "good"), combination
        operational += 1
    assert operational == len(kinds), "whatever the marker file is"


@pytest.mark.parametrize("missing", ["record", "identity"])
def test_row31_a_completed_device_without_its_data_stops(layout: Layout, missing: str) -> None:
    reading = completed(layout)
    getattr(layout, missing).unlink()
    assert refusal(reading, layout) == "provisioned-data-missing"


def test_row11_another_device_s_data_is_foreign(layout: Layout) -> None:
    reading = completed(layout)
    record.write(layout.record, OTHER, {})
    assert refusal(reading, layout) == "provisioned-data-foreign"
    completed(layout)
    layout.identity.write_text(f'uuid: "{OTHER}"\n')
    assert refusal(reading, layout) == "provisioned-data-foreign"


@pytest.mark.parametrize("state", [MarkerState.ABSENT, MarkerState.OPEN])
def test_row31_a_disk_that_claims_completion_beside_a_tpm_that_denies_it(
    layout: Layout, state: MarkerState
) -> None:
    completed(layout)
    assert refusal(MarkerReading(state), layout) == "marker-contradiction"


def test_a_completion_that_was_cut_before_the_tpm_is_none(layout: Layout) -> None:
    device = identity.load_or_create(layout.identity)
    record.write(layout.record, device, {})
    assert decide(MarkerReading(MarkerState.OPEN), layout.data).mode is Mode.PROVISIONING


def test_a_marker_that_is_not_locked_yet_counts_and_says_so(layout: Layout) -> None:
    reading = completed(layout)
    fact = decide(reading._replace(locked=False), layout.data)
    assert fact.mode is Mode.OPERATIONAL
    assert not fact.locked


def test_without_a_tpm_the_file_decides_and_says_so(layout: Layout) -> None:
    fact = decide(None, layout.data)
    assert (fact.mode, fact.source) == (Mode.PROVISIONING, FROM_FILE)
    assert not fact.from_tpm
    set_cache(layout)
    assert decide(None, layout.data).mode is Mode.OPERATIONAL


def test_row31_a_data_volume_that_is_not_there_is_no_answer(tmp_path: Path) -> None:
    assert refusal(None, Layout(tmp_path)) == "data-volume-not-mounted"


def test_row31_a_marker_that_cannot_be_read_is_no_answer(layout: Layout) -> None:
    for path in (layout.tokens, layout.tpm):
        path.rmdir()
    layout.home.rmdir()
    layout.home.write_text("a file where the marker's directory should be")
    assert refusal(None, layout) == "marker-unreadable"


def test_row31_a_dangling_link_counts_as_completed(layout: Layout) -> None:
    layout.marker.symlink_to("nowhere")
    assert decide(None, layout.data).mode is Mode.OPERATIONAL


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"state": "maybe", "content": None, "locked": False},
        {"state": "completed", "content": None, "locked": True},
        {"state": "completed", "content": "00" * 49, "locked": True},
        {"state": "completed", "content": "xy", "locked": True},
        {"state": "completed", "content": 1, "locked": True},
        {"state": "open", "content": MarkerContent(OTHER, bytes(32)).encode().hex(), "locked": True},
        {"state": "open", "content": None, "locked": "yes"},
    ],
)
def test_an_answer_of_the_tpm_that_makes_no_sense_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        MarkerReading.from_dict(said)


def test_a_reading_survives_the_way_to_the_manager() -> None:
    content = MarkerContent(OTHER, bytes(range(32)))
    for reading in (
        MarkerReading(MarkerState.ABSENT),
        MarkerReading(MarkerState.OPEN, locked=True),
        MarkerReading(MarkerState.COMPLETED, content, locked=True),
    ):
        assert MarkerReading.from_dict(reading.as_dict()) == reading


def test_row07_two_devices_share_no_identity(tmp_path: Path) -> None:
    made = [identity.load_or_create(tmp_path / str(number)) for number in range(50)]
    assert len({*made}) == 50


@pytest.mark.parametrize(
    "text", [b"", b"uuid: x", b'uuid: "11111111-1111-4111-8111-111111111111"\nmore', b"\xff"]
)
def test_a_damaged_identity_is_refused_and_kept(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "device_id.conf"
    path.write_bytes(text)
    with pytest.raises(StorageRefusal) as caught:
        identity.load_or_create(path)
    assert caught.value.code == "device-id-damaged"
    assert path.read_bytes() == text
