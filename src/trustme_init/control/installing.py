# SPDX-License-Identifier: Apache-2.0
"""What the control handlers and the manager's installations say to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from trustme_init.errors import Refusal
from trustme_init.guestos.pieces import Piece


@dataclass(frozen=True, slots=True)
class GuestOsPush:
    """A GuestOS to install: its signed configuration, not judged."""

    config: bytes
    signature: bytes
    certificate: bytes
    streamed: bool = False
    """The client sends the images."""


class GuestOsImage(NamedTuple):
    """A file of a GuestOS that is being installed; bytes."""

    name: str
    size: int
    have: int


@dataclass(frozen=True, slots=True)
class InstallWaiting:
    """An installation is to begin when others have ended."""


@dataclass(frozen=True, slots=True)
class InstallStarted:
    """An installation was judged and has begun; `images` that are needed, and how much of each is there."""

    stem: str
    images: tuple[GuestOsImage, ...]


@dataclass(frozen=True, slots=True)
class InstallProgress:
    """How far it is: of one file, and of all; bytes. `phase` is "fetch" or "check"."""

    stem: str
    phase: str
    file: str
    bytes: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class InstallCompleted:
    """It is installed, durably."""

    stem: str


@dataclass(frozen=True, slots=True)
class InstallFailed:
    """It is not."""

    refusal: Refusal


InstallEvent = InstallWaiting | InstallStarted | InstallProgress | InstallCompleted | InstallFailed
Heard = Callable[[InstallEvent], None]


class Installing(Protocol):
    """Installing and removing GuestOSes."""

    def push(self, push: GuestOsPush, caller: int, heard: Heard) -> None:
        """Install a GuestOS; `heard` is told how it goes, to the end. `caller`, a pidfd, is taken over."""
        ...

    def piece(self, stem: str, piece: Piece, caller: int, done: Callable[[Refusal | None], None]) -> None:
        """Hand a part of an image to a streamed installation; `done` when it takes the next one."""
        ...

    def remove(self, name: str, done: Callable[[Mapping[str, Any], Refusal | None], None]) -> None:
        """Remove every version of a GuestOS that nothing needs."""
        ...
