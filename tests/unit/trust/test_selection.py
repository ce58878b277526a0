# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.errors import TrustRefusal
from trustme_init.trust.selection import (
    NAME_PATTERN,
    VERSION_LIMIT,
    Candidate,
    GuestOsId,
    choose,
    parse_stem,
)

NAME = "trustme-coreos"


def complete(*stems: str) -> list[Candidate]:
    return [Candidate(stem, complete=True) for stem in stems]


def refusal(candidates: list[Candidate]) -> TrustRefusal:
    with pytest.raises(TrustRefusal) as caught:
        choose(candidates, NAME)
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value


def test_highest_version_by_number_not_by_text() -> None:
    found = choose(complete(f"{NAME}-9", f"{NAME}-10", f"{NAME}-1"), NAME)
    assert found.chosen == GuestOsId(NAME, 10)
    assert found.chosen.stem == f"{NAME}-10"
    assert found.ignored == ()


def test_incomplete_versions_are_passed_over_and_reported() -> None:
    found = choose([*complete(f"{NAME}-1"), Candidate(f"{NAME}-2", complete=False)], NAME)
    assert found.chosen.version == 1
    assert found.ignored == (f"incomplete {NAME}-2",)


def test_other_guestoses_do_not_count() -> None:
    found = choose(complete(f"{NAME}-1", "trustme-3", f"{NAME}-debug-7", f"x{NAME}-8"), NAME)
    assert found.chosen == GuestOsId(NAME, 1)


def test_row3_nothing_there() -> None:
    assert refusal([]).code == "guestos-missing"
    assert refusal(complete("other-1")).code == "guestos-missing"
    assert refusal([Candidate(f"{NAME}-2", complete=False)]).code == "guestos-incomplete"


@pytest.mark.parametrize(
    "stem",
    [
        NAME,
        f"{NAME}-",
        f"{NAME}-0",
        f"{NAME}-01",
        f"{NAME}-+1",
        f"{NAME}--1x",
        f"{NAME}-1 ",
        f"{NAME}-1\n",
        f"{NAME}-\u0661",
        f"{NAME}-{VERSION_LIMIT + 1}",
        f"{NAME}-999999999999999999999",
        "-1",
        "../trustme-coreos-1",
        "Trustme-1",
        ".hidden-1",
        "a" * 65 + "-1",
        "esc\x1b[2J-1",
        "",
    ],
)
def test_malformed_names_are_evidence_only(stem: str) -> None:
    assert parse_stem(stem) is None
    found = choose(complete(stem, f"{NAME}-1"), NAME)
    assert found.chosen.version == 1
    (evidence,) = found.ignored
    assert evidence.isprintable()
    assert "malformed" in refusal(complete(stem)).evidence


def test_largest_version() -> None:
    assert parse_stem(f"{NAME}-{VERSION_LIMIT}") == GuestOsId(NAME, VERSION_LIMIT)


@given(st.from_regex(NAME_PATTERN, fullmatch=True), st.integers(1, VERSION_LIMIT))
def test_stems_are_parsed_back(name: str, version: int) -> None:
    assert parse_stem(GuestOsId(name, version).stem) == GuestOsId(name, version)


@given(st.text(max_size=40))
def test_arbitrary_names_are_identities_or_nothing(stem: str) -> None:
    found = parse_stem(stem)
    assert found is None or found.stem == stem
