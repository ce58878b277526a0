# SPDX-License-Identifier: Apache-2.0
"""The kas configurations: valid, pinned, and only what was looked at (scripts/check_kas.py)."""

from __future__ import annotations

import copy
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import check_kas

KAS = Path(__file__).resolve().parents[2] / "kas"
FILES = sorted(KAS.glob("*.yml"))
COMMIT = "fae9db3168dbff1b8c76fe9c6726a9687ff97514"


def document(**changes: Any) -> dict[str, Any]:
    """Return a configuration with one repository, changed; None takes a key away."""
    entry: dict[str, Any] = {"url": check_kas.UPSTREAM["bitbake"], "branch": "2.18", "commit": COMMIT}
    entry |= changes
    return {
        "header": {"version": 16},
        "repos": {"bitbake": {key: value for key, value in entry.items() if value is not None}},
    }


def test_row26_every_repository_of_ours_is_pinned() -> None:
    assert check_kas.check() == []
    assert len(check_kas.pins(yaml.safe_load((KAS / "base.yml").read_text()))) == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"commit": None}, "commit is None"),
        ({"commit": None, "tag": "yocto-6.0"}, "tag is not allowed"),
        ({"tag": "yocto-6.0"}, "tag is not allowed"),
        ({"commit": "wrynose"}, "commit is 'wrynose'"),
        ({"commit": COMMIT[:12]}, "not 40 hexadecimal digits"),
        ({"commit": COMMIT.upper()}, "not 40 hexadecimal digits"),
        ({"commit": COMMIT + "\n"}, "not 40 hexadecimal digits"),
        ({"commit": int("1" * 40)}, "not 40 hexadecimal digits"),
        ({"refspec": COMMIT}, "refspec is not allowed"),
        ({"path": "/srv/bitbake"}, "path is not allowed"),
        ({"patches": {"one": {"repo": "trustme-py", "path": "x.patch"}}}, "patches is not allowed"),
        ({"url": "https://github.com/somebody/bitbake.git"}, "the address is"),
        ({"url": "http://github.com/openembedded/bitbake.git"}, "the address is"),
        ({"url": None}, "the address is None"),
    ],
)
def test_row26_anything_but_a_pinned_commit_is_refused(changes: dict[str, Any], said: str) -> None:
    assert list(check_kas.problems("x.yml", document())) == []
    found = list(check_kas.problems("x.yml", document(**changes)))
    assert any(said in line for line in found), found


def test_row26_ways_around_a_pin_are_refused() -> None:
    for change, said in (
        ({"defaults": {"repos": {"branch": "master"}}}, "defaults.repos.branch"),
        ({"overrides": {"repos": {"bitbake": {"branch": "master"}}}}, "overrides.bitbake"),
        ({"overrides": {"repos": {"bitbake": {"commit": COMMIT[:7]}}}}, "overrides.bitbake"),
        ({"header": {"version": 16, "includes": [{"repo": "bitbake", "file": "x.yml"}]}}, "includes"),
    ):
        found = list(check_kas.problems("x.yml", copy.deepcopy(document()) | change))
        assert any(said in line for line in found), (change, found)
    unknown = document()
    unknown["repos"]["meta-stranger"] = unknown["repos"].pop("bitbake")
    assert any("no repository that" in line for line in check_kas.problems("x.yml", unknown))
    ours = document()
    ours["repos"]["trustme-py"] = {"url": "https://github.com/somebody/trustme-py.git"}
    assert any("this checkout" in line for line in check_kas.problems("x.yml", ours))


def test_row26_lock_file_and_configuration_say_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "kas"
    shutil.copytree(KAS, folder)
    assert check_kas.check(folder) == []
    lock = folder / "base.lock.yml"
    text = lock.read_text()
    lock.write_text(text.replace(COMMIT, "a" * 40))
    assert [line.partition(" is ")[0] for line in check_kas.check(folder)] == ["base.lock.yml: bitbake"]
    lock.write_text(text.replace(f"    bitbake:\n      commit: {COMMIT}\n", ""))
    assert [line.partition(" is ")[0] for line in check_kas.check(folder)] == ["base.lock.yml: bitbake"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_configurations_follow_the_schema_of_kas(path: Path) -> None:
    # The schema that kas itself judges by. Neither package has type information.
    validators, schema = import_module("jsonschema"), import_module("kas.configschema")
    judge = validators.Draft7Validator(schema.CONFIGSCHEMA)
    assert list(judge.iter_errors(yaml.safe_load(path.read_text()))) == []
    assert list(judge.iter_errors({"header": {"version": 16}, "repos": {"x": {"comit": COMMIT}}}))


def test_every_configuration_is_for_one_machine_or_an_overlay() -> None:
    machines = {path.stem for path in FILES if "machine" in yaml.safe_load(path.read_text())}
    assert machines == {"qemux86-64", "genericx86-64"}
    overlays = {path.stem for path in FILES} - machines - {"base", "base.lock", "genericx86-64.lock"}
    assert overlays == {"dev", "release", "ci", "prebuilt-cryptography"}
    for name in machines:
        assert yaml.safe_load((KAS / f"{name}.yml").read_text())["header"]["includes"] == ["kas/base.yml"]


def test_no_mirror_is_named_in_a_file() -> None:
    for path in FILES:
        text = path.read_text()
        assert "file://" not in text.replace("'file://.* %s/PATH", ""), path.name
