# SPDX-License-Identifier: Apache-2.0
"""A TPM token at a power cut: what it was, or what it was to be."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration import power
from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_token_kit import (
    KEY,
    LIMIT,
    NEW,
    check,
    code_or_key,
    flush,
    no_lockout,
    owned_tpm,
    wrapped,
)
from tests.unit.tokens.kit import PIN
from trustme_init.tokens.place import TokenStatus
from trustme_init.tokens.tpm_token import TpmToken


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with owned_tpm(tmp_path) as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "token"


@pytest.fixture
def token(tpm: SoftwareTpm, place: Path) -> TpmToken:
    made = TpmToken(place, LIMIT, tpm.tcti)
    made.create(PIN)
    return made


def every_cut(
    tpm: SoftwareTpm, start: Path, work: Callable[[Path], object], root: Path
) -> Iterator[tuple[Path, bool]]:
    """Do `work` in a copy of `start`, cut at each effect; yield each disk that may then be there."""
    effects, cut = 1, 0
    while cut <= effects:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root)
        done = power.run(lambda: work(root), root, cut=cut)
        flush(tpm)
        assert done.outcome.ended in {"cut", "returned"}, done.outcome.text
        effects = len(done.outcome.effects) if done.outcome.ended == "returned" else cut + 1
        for survivor in done.volume.survivors():
            shutil.rmtree(root)
            root.mkdir()
            survivor.put(root)
            yield root, done.outcome.ended == "returned"
        cut += 1
    assert cut > 3


def pins_of(token: TpmToken, blob: bytes, *pins: str) -> set[str]:
    """Which of the PINs open the token."""
    opening = set()
    for pin in pins:
        found = code_or_key(token, blob, pin)
        assert found in {KEY, "token-wrong-pin"}
        if found == KEY:
            opening.add(pin)
    return opening


def test_row33_a_pin_change_cut_anywhere_is_old_or_new(
    token: TpmToken, tpm: SoftwareTpm, tmp_path: Path
) -> None:
    blob = wrapped(token)
    (tmp_path / "start").mkdir()
    shutil.copytree(tmp_path / "token", tmp_path / "start/token")
    outcomes = set()
    for disk, finished in every_cut(
        tpm,
        tmp_path / "start",
        lambda root: TpmToken(root / "token", LIMIT, tpm.tcti).change_pin(PIN, NEW),
        tmp_path / "disk",
    ):
        no_lockout(tpm, tmp_path / "owner")
        found = TpmToken(disk / "token", LIMIT, tpm.tcti)
        opening = pins_of(found, blob, NEW, PIN)
        assert opening == {NEW} if finished else opening in ({NEW}, {PIN})
        outcomes |= opening
    assert outcomes == {PIN, NEW}


def test_row33_a_creation_cut_anywhere_is_none_or_whole(tpm: SoftwareTpm, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    outcomes = set()
    for disk, finished in every_cut(
        tpm,
        tmp_path / "start",
        lambda root: TpmToken(root / "token", LIMIT, tpm.tcti).create(PIN),
        tmp_path / "disk",
    ):
        found = TpmToken(disk / "token", LIMIT, tpm.tcti)
        outcomes.add(found.status().kind)
        if found.status().kind == "none":
            assert not finished
            found.create(PIN)
        assert found.status() == TokenStatus("tpm", LIMIT, LIMIT, default_pin=False)
        check(found, PIN)
    assert outcomes == {"none", "tpm"}


def test_row33_a_removal_cut_anywhere_can_be_done_again(
    token: TpmToken, tpm: SoftwareTpm, tmp_path: Path
) -> None:
    check(token, PIN)
    (tmp_path / "start").mkdir()
    shutil.copytree(tmp_path / "token", tmp_path / "start/token")
    outcomes = set()
    for disk, finished in every_cut(
        tpm,
        tmp_path / "start",
        lambda root: TpmToken(root / "token", LIMIT, tpm.tcti).remove(),
        tmp_path / "disk",
    ):
        found = TpmToken(disk / "token", LIMIT, tpm.tcti)
        status = found.status()
        outcomes.add(status.kind)
        assert status.fault is None
        if status.kind == "tpm":
            assert not finished
            check(found, PIN)
        found.remove()
        assert list((disk / "token").iterdir()) == []
    assert outcomes == {"none", "tpm"}
