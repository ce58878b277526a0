# SPDX-License-Identifier: Apache-2.0
"""The checklist of provisioning: what is in place, and what the signed policy demands before completion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trustme_init.errors import ControlRefusal
from trustme_init.policy import REQUIREMENTS


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """One of policy.REQUIREMENTS."""
    met: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Requirement:
    """A finding beside what the policy says of it."""

    finding: Finding
    required: bool


def judge(findings: Iterable[Finding], required: frozenset[str]) -> tuple[Requirement, ...]:
    """Return the checklist in the order of REQUIREMENTS; ValueError if a thing was not looked at."""
    by_name = {finding.name: finding for finding in findings}
    if by_name.keys() != {*REQUIREMENTS}:
        raise ValueError(f"not everything was looked at: {sorted(by_name)}")
    return tuple(Requirement(by_name[name], name in required) for name in REQUIREMENTS)


def require_all(checklist: Sequence[Requirement]) -> None:
    """Return if nothing required is missing; ControlRefusal("provisioning-incomplete") names all that is."""
    missing = [each.finding for each in checklist if each.required and not each.finding.met]
    if missing:
        raise ControlRefusal(
            "provisioning-incomplete",
            "provisioning cannot be completed yet",
            evidence="; ".join(f"{finding.name}: {finding.detail}" for finding in missing),
            remedy="put in place what is missing (`control provisioning_status`), then reboot",
        )
