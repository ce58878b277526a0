# SPDX-License-Identifier: Apache-2.0
"""Which GuestOS version is started: the highest complete one, and that one or none.

Rules:
- A version is filed as `<name>-<version>`: `.conf`, `.sig`, `.cert`, and the directory of its images. Whoever
  lists the store says whether a version has all of them.
- A name that does not have exactly this form is not used; it is reported.
- The choice is made before anything is verified, and it is final: if the chosen version is refused, nothing
  older is started in its place. Otherwise whoever can damage one file of the newest version chooses an old
  one with known holes (rollback). A version that must go is removed, on purpose, by who manages the store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from trustme_init.errors import TrustRefusal

NAME_PATTERN: Final = r"[a-z0-9][a-z0-9._-]{0,63}"
VERSION_LIMIT: Final = 2**64 - 1
"""`version` is a uint64 in guestos.proto."""

_STEM: Final = re.compile(rf"({NAME_PATTERN})-([1-9][0-9]{{0,19}})")
_EVIDENCE: Final = 8


class GuestOsId(NamedTuple):
    """What a GuestOS is filed under; the signed configuration must say the same."""

    name: str
    version: int

    @property
    def stem(self) -> str:
        """The common part of its file names."""
        return f"{self.name}-{self.version}"


class Candidate(NamedTuple):
    """What was found in a store: a file name without suffix, and whether all parts are there."""

    stem: str
    complete: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """The version to start, and what was not looked at: malformed or incomplete, printable."""

    chosen: GuestOsId
    ignored: tuple[str, ...]


def parse_stem(stem: str) -> GuestOsId | None:
    """Return the identity that a file name without suffix stands for, None if it stands for none."""
    match = _STEM.fullmatch(stem)
    if match is None or int(match[2]) > VERSION_LIMIT:
        return None
    return GuestOsId(match[1], int(match[2]))


def choose(candidates: Iterable[Candidate], name: str) -> Selection:
    """Return the highest complete version of the GuestOS `name`.

    TrustRefusal: "guestos-missing" (no version at all), "guestos-incomplete" (none complete).
    """
    complete = []
    ignored = []
    incomplete = False
    for candidate in candidates:
        guest_os = parse_stem(candidate.stem)
        if guest_os is None:
            ignored.append(f"malformed name {ascii(candidate.stem)[:100]}")
        elif guest_os.name == name and candidate.complete:
            complete.append(guest_os)
        elif guest_os.name == name:
            ignored.append(f"incomplete {guest_os.stem}")
            incomplete = True
    if complete:
        return Selection(max(complete), tuple(ignored))
    evidence = "; ".join(ignored[:_EVIDENCE]) or "nothing like it in the store"
    if incomplete:
        raise TrustRefusal(
            "guestos-incomplete",
            f"no version of {name} is complete",
            evidence=evidence,
            remedy="copy the whole GuestOS (.conf, .sig, .cert and its images) to the store again",
        )
    raise TrustRefusal(
        "guestos-missing",
        f"the store has no version of {name}",
        evidence=evidence,
        remedy="install the GuestOS that the policy names, or rebuild the image",
    )
