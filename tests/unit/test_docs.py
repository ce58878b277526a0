# SPDX-License-Identifier: Apache-2.0
"""The generated documents are those of this tree."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import generate_docs
from scripts.threat_rows import ROWS
from trustme_tools.cli import main

GUIDES = sorted({*generate_docs.ROOT.glob("*.md"), *generate_docs.ROOT.glob("docs/**/*.md")})


def commands(path: Path) -> Iterator[str]:
    """Yield what a document says to type: lines of its blocks, and what stands between backticks."""
    parts = re.split(r"^```.*\n", path.read_text(), flags=re.MULTILINE)
    for number, part in enumerate(parts):
        # Outside a block a line may end within backticks.
        inside = part.splitlines() if number % 2 else re.findall(r"`([^`]+)`", part)
        for line in inside:
            for command in line.removeprefix("$ ").replace("\n", " ").split(" | "):
                yield command.strip().removeprefix(".venv/bin/")


@pytest.mark.parametrize("name", generate_docs.DOCUMENTS)
def test_a_generated_document_is_current(name: str) -> None:
    current = (generate_docs.ROOT / name).read_text()
    assert current == generate_docs.DOCUMENTS[name](), "run `make docs`"


def test_every_row_has_a_title_and_every_test_a_row() -> None:
    assert list(ROWS) == list(range(1, 35))
    generate_docs.threats()  # refuses a test that names a row there is none of


def test_the_codes_the_tests_know_best_are_found() -> None:
    text = generate_docs.refusals()
    for code in ("no-anchor", "secure-boot-off", "verity-mismatch", "already-running", "policy-malformed"):
        assert f"| `{code}` |" in text


def test_make_help_prints_what_the_readme_lists() -> None:
    printed = subprocess.run(
        ["make", "-s", "help"], cwd=generate_docs.ROOT, capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split(maxsplit=2)[1:] for line in printed.splitlines()]
    assert dict(lines) == generate_docs.make_targets()


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_commands_of_the_documents_exist(path: Path) -> None:
    targets = {*generate_docs.make_targets()}
    for command in commands(path):
        words = shlex.split(re.sub(r"\s\d?<.*", "", command), comments=True) if "make" in command else []
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, command
        if command.startswith("trustme ") and "…" not in command and "VERB" not in command:
            check_trustme(command)


def check_trustme(command: str) -> None:
    """Refuse verbs and options that the command does not have."""
    parser = main.build_parser()
    for word in shlex.split(re.sub(r"\s\d?<.*", "", command), comments=True)[1:]:
        option = word.partition("=")[0]
        verbs = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        if word.startswith("-"):
            assert option in parser._option_string_actions, command
        elif verbs:
            assert set(word.split("|")) <= set(verbs[0].choices), command
            parser = verbs[0].choices[word.partition("|")[0]]
