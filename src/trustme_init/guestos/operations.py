# SPDX-License-Identifier: Apache-2.0
"""What the vault does with GuestOSes: judge, stage, publish, list, remove, tidy up.

- Nothing is stored before the guest anchors vouch for it, the version is high enough, and there is room.
- The vault neither fetches nor hashes images: that takes long, and the network's bytes stay out of it. The
  manager has a checked installation published; here configuration, floor and sizes are judged once more, and
  whoever starts a container reads its images through dm-verity anyway.
- A version that a container is bound to, or that runs, is not removed. What nobody uses is removed only when
  a newer version of the same name is there and good.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

from trustme_init.errors import ControlRefusal, Refusal, StorageRefusal, TrustRefusal
from trustme_init.guestos.floors import Floors, version_taken
from trustme_init.guestos.plan import plan
from trustme_init.guestos.staging import Staging
from trustme_init.guestos.store import GuestOsStore, SignedFiles, missing
from trustme_init.trust.anchors import AnchorSet, Purpose
from trustme_init.trust.guestos import VerifiedGuestOs, verify_guestos
from trustme_init.trust.selection import GuestOsId, parse_stem

LIST_LIMIT: Final = 256
"""Versions in a list: far more than a disk holds, few enough for one message."""

Result = dict[str, Any]
Users = Callable[[], Iterable[tuple[str, int | None]]]
"""Of each container, the GuestOS's name and the version it is bound to; None where that is the newest."""


class Judge(Protocol):
    """By whose word, and when, GuestOSes are judged."""

    def anchors(self, purpose: Purpose) -> AnchorSet:
        """Return the anchors of a purpose; TrustRefusal("no-anchor") if there are none."""
        ...

    def now(self) -> datetime:
        """Return the time of judgement."""
        ...


def _nobody() -> Iterable[tuple[str, int | None]]:
    return ()


@dataclass(frozen=True, slots=True)
class GuestOsOperations:
    """See the module. `home` is `/data/cml`."""

    home: Path
    judge: Judge
    hardware: str
    core: str
    """Name of the core GuestOS, which is not in this store and not managed here."""
    users: Users = _nobody
    store: GuestOsStore = field(init=False)
    _staging: Staging = field(init=False)
    _floors: Floors = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", GuestOsStore(self.home))
        object.__setattr__(self, "_staging", Staging(self.store))
        object.__setattr__(self, "_floors", Floors(self.home))

    def verified(self, files: SignedFiles, stem: str | None) -> VerifiedGuestOs:
        """Judge a signed configuration that is filed under `stem`; refusals as `verify_guestos`."""
        return verify_guestos(
            files.config,
            files.signature,
            files.certificate,
            self.judge.anchors(Purpose.GUEST),
            at=self.judge.now(),
            hardware=self.hardware,
            file_stem=stem,
        )

    def read(self, guest_os: GuestOsId) -> VerifiedGuestOs:
        """Return a version in the store, judged."""
        return self.verified(self.store.read(guest_os), guest_os.stem)

    # Installing

    def examine(self, files: SignedFiles) -> Result:
        """Judge what is pushed, and change nothing; its name and version, and what tells it from others."""
        verified = self._acceptable(files)
        return {"stem": verified.guest_os.stem, "config_sha256": verified.config_digest.hex()}

    def stage(self, files: SignedFiles, *, repair: bool) -> Result:
        """Judge what is pushed and make a place for its images; return the plan.

        `installed`: this very version is in the store and good. If its images are whole, nothing is to be
        done, and nothing was; `repair` says that they are not.
        ControlRefusal("guestos-is-core"); TrustRefusal: as `verify_guestos`, "image-ambiguous",
        "guestos-rolled-back", "guestos-version-taken"; StorageRefusal: as `staging`.
        """
        verified = self._acceptable(files)
        needed = plan(verified.config)
        there = self._same_is_there(verified.guest_os, files)
        if there and not repair:
            return {"installed": True, **needed.as_dict()}
        self._staging.require_space(needed)
        self._staging.begin(files, needed, reuse=not repair)
        return {"installed": False, **needed.as_dict()}

    def publish(self, stem: str) -> Result:
        """Make a staged version, whose images were checked, part of the store; durable with its floor."""
        files = self._staged(stem)
        verified = self._acceptable(files)
        needed = plan(verified.config)
        if needed.stem != stem:
            raise missing(stem)
        self._floors.rise(verified.guest_os, verified.config_digest.hex())
        self._staging.publish(needed)
        return {}

    def discard(self, stem: str) -> Result:
        """Remove what was staged and turned out to be something else than its configuration says."""
        if parse_stem(stem) is not None:
            self._staging.discard(stem)
        return {}

    def _acceptable(self, files: SignedFiles) -> VerifiedGuestOs:
        verified = self.verified(files, None)
        guest_os = verified.guest_os
        if guest_os.name == self.core:
            raise _is_core(guest_os.name)
        self._floors.require(guest_os, verified.config_digest.hex())
        if guest_os in self.store.versions(guest_os.name):
            installed = self.store.read(guest_os)
            # An installed one that is good keeps its number; one that is not has no say.
            if installed.config != files.config and self._is_good(installed, guest_os):
                raise version_taken(guest_os)
        return verified

    def _same_is_there(self, guest_os: GuestOsId, files: SignedFiles) -> bool:
        if guest_os not in self.store.versions(guest_os.name):
            return False
        installed = self.store.read(guest_os)
        return installed.config == files.config and self._is_good(installed, guest_os)

    def _is_good(self, files: SignedFiles, guest_os: GuestOsId) -> bool:
        try:
            self.verified(files, guest_os.stem)
        except TrustRefusal:
            return False
        return True

    def _staged(self, stem: str) -> SignedFiles:
        if parse_stem(stem) is None:
            raise missing(stem)
        try:
            return self._staging.read(stem)
        except OSError as exc:
            raise missing(stem) from exc

    # What is there

    def list(self) -> Result:
        """Return every version in the store: its name, version and size, and why it cannot be used."""
        listed = [
            {
                "name": each.guest_os.name,
                "version": each.guest_os.version,
                "size": each.size,
                "why": self._why_not(each.guest_os),
            }
            for each in self.store.installed()[:LIST_LIMIT]
        ]
        return {"guestos": listed, "staged": [each.stem for each in self._staging.staged()[:LIST_LIMIT]]}

    def config(self, stem: str) -> Result:
        """Return the text of a version's configuration, judged; base64."""
        guest_os = parse_stem(stem)
        if guest_os is None:
            raise missing(stem)
        files = self.store.read(guest_os)
        self.verified(files, stem)
        return {"config": base64.b64encode(files.config).decode()}

    def _why_not(self, guest_os: GuestOsId) -> str:
        try:
            self.read(guest_os)
        except Refusal as refusal:
            return refusal.code
        return ""

    # Removing

    def remove(self, name: str, running: Sequence[str]) -> Result:
        """Remove every version of a GuestOS that no container is bound to, or runs.

        ControlRefusal: "guestos-is-core", "guestos-in-use"; StorageRefusal("guestos-missing").
        """
        if name == self.core:
            raise _is_core(name)
        versions = self.store.versions(name)
        staged = [each for each in self._staging.staged() if each.name == name]
        if not versions and not staged:
            raise missing(name)
        used = self._used(running)
        bound = [each for each in versions if each in used]
        if bound or any(user == name for user, _ in self.users()):
            raise ControlRefusal(
                "guestos-in-use",
                "a container needs this GuestOS",
                evidence=", ".join(each.stem for each in bound) or name,
                remedy="remove the container first, or bind it to another GuestOS (`control update_config`)",
            )
        for each in staged:
            self._staging.discard(each.stem)
        for each in versions:
            self._staging.remove(each)
        return {"removed": [each.stem for each in versions]}

    def tidy(self, running: Sequence[str]) -> Result:
        """Remove what interrupted changes left, and unused versions that a newer good one replaces."""
        self._staging.remove_left_over()
        for each in self._staging.staged():
            if not self._can_go_on(each):
                self._staging.discard(each.stem)
        used = self._used(running)
        newest = self._newest_good()
        obsolete = [
            each.guest_os
            for each in self.store.installed()
            if each.guest_os not in used
            and (kept := newest.get(each.guest_os.name)) is not None
            and each.guest_os < kept
        ]
        for each in obsolete:
            self._staging.remove(each)
        return {"removed": [each.stem for each in obsolete]}

    def _can_go_on(self, staged: GuestOsId) -> bool:
        """Whether an interrupted installation could still be completed."""
        try:
            return self._acceptable(self._staged(staged.stem)).guest_os == staged
        except (TrustRefusal, ControlRefusal, StorageRefusal):
            return False

    def _newest_good(self) -> Mapping[str, GuestOsId]:
        found: dict[str, GuestOsId] = {}
        for each in self.store.installed():  # oldest first
            if not self._why_not(each.guest_os):
                found[each.guest_os.name] = each.guest_os
        return found

    def _used(self, running: Sequence[str]) -> frozenset[GuestOsId]:
        used = {each for each in map(parse_stem, running) if each is not None}
        for name, version in self.users():
            newest = self.store.newest(name)
            if version is not None:
                used.add(GuestOsId(name, version))
            elif newest is not None:
                used.add(newest)
        return frozenset(used)


def _is_core(name: str) -> ControlRefusal:
    return ControlRefusal(
        "guestos-is-core",
        "the core GuestOS is part of the base system and is not managed here",
        evidence=name,
        remedy="update the base system; give a GuestOS of its own another name",
    )
