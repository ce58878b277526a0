# SPDX-License-Identifier: Apache-2.0
"""Put the GuestOSes of several builds into one store, as the disk image carries it.

Each build has a store of its own, so that builds do not meet; a name must come from one of them only. A
device starts the highest version of a name: two builds that use one name would take each other's place.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from trustme_init.trust.selection import GuestOsId, parse_stem
from trustme_tools.errors import ToolError
from trustme_tools.guestos.build import STORE_DIRECTORY
from trustme_tools.guestos.check import load_config
from trustme_tools.publish import PUBLIC, staged_directory


def collect(destination: Path, sources: Sequence[Path], *, force: bool = False) -> list[GuestOsId]:
    """Copy the GuestOSes of `sources` (stores) to the new store `destination`; return what it holds, sorted.

    ToolError("guestos-twice", "no-guestos", "bad-store", "exists"); nothing is verified but names.
    """
    owners: dict[str, Path] = {}
    found: list[tuple[GuestOsId, Path]] = []
    for source in sources:
        for identity, config in _guestoses(source):
            owner = owners.setdefault(identity.name, source)
            if owner.resolve() != source.resolve():
                raise ToolError(
                    f"two GuestOSes have the name {identity.name}",
                    "give one of them another name in its guestos.toml, or leave one out",
                    code="guestos-twice",
                    evidence=f"one in {owner}, one in {source}",
                )
            found.append((identity, config))
    with staged_directory(destination, force=force) as staging:
        for identity, config in found:
            _copy(identity, config, staging / STORE_DIRECTORY)
    return sorted({identity for identity, _ in found})


def _guestoses(store: Path) -> list[tuple[GuestOsId, Path]]:
    """Return the GuestOSes of a store; each must be complete and be what its file name says."""
    found = []
    for config in sorted((store / STORE_DIRECTORY).glob("*.conf")):
        content = load_config(config)
        identity = parse_stem(config.stem)
        if identity != GuestOsId(content.name, content.version):
            raise _bad(config, f"it is of {content.name} version {content.version}")
        beside = [config.with_suffix(suffix) for suffix in (".sig", ".cert")]
        if missing := [path.name for path in beside if not path.is_file()]:
            raise _bad(config, f"{missing[0]} is missing")
        if not config.with_suffix("").is_dir():
            raise _bad(config, f"the directory {config.stem} with its images is missing")
        found.append((identity, config))
    if not found:
        raise ToolError(
            f"{store} is no store with a GuestOS in it",
            "name the directory that `trustme guestos build --out` wrote to",
            code="no-guestos",
            evidence=f"no {STORE_DIRECTORY}/NAME-VERSION.conf",
        )
    return found


def _copy(identity: GuestOsId, config: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    directory = config.with_suffix("")
    files = [config.with_suffix(suffix) for suffix in (".conf", ".sig", ".cert")]
    files += sorted(path for path in directory.iterdir() if path.is_file())
    (target / identity.stem).mkdir(exist_ok=True)
    for path in files:
        copy = target / path.relative_to(config.parent)
        shutil.copyfile(path, copy)
        copy.chmod(PUBLIC)


def _bad(config: Path, evidence: str) -> ToolError:
    return ToolError(
        f"{config} is not in order",
        "build the GuestOS again",
        code="bad-store",
        evidence=evidence,
    )
