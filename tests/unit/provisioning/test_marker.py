# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from trustme_init.errors import StorageRefusal
from trustme_init.provisioning.marker import FileMarker, Mode, decide


class Given:
    """A marker in a known state."""

    def __init__(self, *, completed: bool) -> None:
        self._completed = completed

    def completed(self) -> bool:
        return self._completed

    def complete(self) -> None:
        self._completed = True


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    return tmp_path


def test_the_mode_follows_the_marker_and_says_who_decided() -> None:
    fact = decide(Given(completed=False), "test")
    assert (fact.mode, fact.source) == (Mode.PROVISIONING, "test")
    assert decide(Given(completed=True), "test").mode is Mode.OPERATIONAL


def test_completion_is_found_again(mounted: Path) -> None:
    assert FileMarker(mounted).completed() is False
    FileMarker(mounted).complete()
    assert FileMarker(mounted).completed() is True
    FileMarker(mounted).complete()
    assert FileMarker(mounted).completed() is True


def test_row31_a_data_volume_that_is_not_there_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(StorageRefusal) as caught:
        FileMarker(tmp_path).completed()
    assert caught.value.code == "data-volume-not-mounted"


def test_row31_a_marker_that_cannot_be_read_is_no_answer(mounted: Path) -> None:
    (mounted / "cml").write_text("a file where the marker's directory should be")
    with pytest.raises(StorageRefusal) as caught:
        FileMarker(mounted).completed()
    assert caught.value.code == "marker-unreadable"


def test_row31_a_dangling_link_counts_as_completed(mounted: Path) -> None:
    (mounted / "cml").mkdir()
    (mounted / "cml/_cml_provisioned_").symlink_to("nowhere")
    assert FileMarker(mounted).completed() is True
