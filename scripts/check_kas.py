# SPDX-License-Identifier: Apache-2.0
"""Refuse a kas configuration that could fetch anything but the commits we looked at.

Every repository comes from its upstream address over https and is pinned to a whole commit hash, in every
file and in the lock file alike. A tag, a branch or a short hash can be moved by who owns the repository.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

FOLDER: Final = Path(__file__).resolve().parents[1] / "kas"
UPSTREAM: Final[Mapping[str, str]] = {
    "bitbake": "https://github.com/openembedded/bitbake.git",
    "meta-openembedded": "https://github.com/openembedded/meta-openembedded.git",
    "meta-secure-core": "https://github.com/Wind-River/meta-secure-core.git",
    "meta-security": "https://git.yoctoproject.org/meta-security",
    "meta-yocto": "https://git.yoctoproject.org/meta-yocto",
    "openembedded-core": "https://github.com/openembedded/openembedded-core.git",
}
"""Where each repository comes from. Another address is a decision of its own: it is written here too."""
OURS: Final = "trustme-py"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_REPOSITORY_KEYS: Final = frozenset(
    {"url", "branch", "commit", "layers", "name", "signed", "allowed_signers"}
)
"""`tag` and `refspec` can be moved, `path` is a folder of one machine, `patches` change what is pinned."""


def problems(name: str, document: Any) -> Iterator[str]:
    """Yield what is wrong with one configuration file, one line each."""
    if not isinstance(document, dict):
        yield f"{name}: not a kas configuration"
        return
    repositories = document.get("repos") or {}
    for repository, entry in repositories.items():
        yield from _repository(f"{name}: {repository}", repository, entry or {})
    defaults = (document.get("defaults") or {}).get("repos") or {}
    for key in sorted({"branch", "tag", "commit", "refspec"} & {*defaults}):
        yield f"{name}: defaults.repos.{key} stands in for a pin"
    for repository, entry in ((document.get("overrides") or {}).get("repos") or {}).items():
        if {*(entry or {})} != {"commit"} or not _is_commit(entry["commit"]):
            yield f"{name}: overrides.{repository} is not a whole commit hash and nothing else"
    for include in (document.get("header") or {}).get("includes") or []:
        if not isinstance(include, str):
            yield f"{name}: includes {include}, which is not a file of this repository"


def _repository(where: str, repository: str, entry: Mapping[str, Any]) -> Iterator[str]:
    if repository == OURS:
        if {*entry} - {"layers"}:
            yield f"{where} is this checkout: only layers may be named"
        return
    for key in sorted({*entry} - _REPOSITORY_KEYS):
        yield f"{where}: {key} is not allowed"
    if repository not in UPSTREAM:
        yield f"{where} is no repository that scripts/check_kas.py knows"
    elif entry.get("url") != UPSTREAM[repository]:
        yield f"{where}: the address is {entry.get('url')}, not {UPSTREAM[repository]}"
    if not _is_commit(entry.get("commit")):
        yield f"{where}: commit is {entry.get('commit')!r}, not 40 hexadecimal digits"


def _is_commit(value: object) -> bool:
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None


def pins(document: Mapping[str, Any]) -> dict[str, str]:
    """Return repository → commit of a configuration or of a lock file."""
    found = {
        name: entry["commit"]
        for name, entry in (document.get("repos") or {}).items()
        if "commit" in (entry or {})
    }
    locked = ((document.get("overrides") or {}).get("repos")) or {}
    return found | {name: entry["commit"] for name, entry in locked.items()}


def check(folder: Path = FOLDER) -> list[str]:
    """Return every problem of the configurations in `folder`; a lock file must say what its file says."""
    documents = {path.name: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yml"))}
    found = [line for name, document in documents.items() for line in problems(name, document)]
    if not documents:
        found.append(f"{folder}: no configuration")
    for name, document in documents.items():
        if found or not name.endswith(".lock.yml"):
            continue
        locked, said = pins(document), pins(documents[name.replace(".lock.yml", ".yml")])
        found += [
            f"{name}: {key} is {locked.get(key)}, the configuration says {said.get(key)}"
            for key in sorted(locked.keys() | said.keys())
            if locked.get(key) != said.get(key)
        ]
    return found


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    found = check()
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
