# SPDX-License-Identifier: Apache-2.0
"""What a verb of `control` is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trustme_init.control.cli.session import Session

Run = Callable[[Session, argparse.Namespace], int]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argparse argument."""

    name: str
    help: str
    options: dict[str, Any] = field(default_factory=dict)
    short: str | None = None


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing to do."""

    name: str
    help: str
    run: Run
    arguments: tuple[Argument, ...] = ()
    slow: bool = False
    """The device may have a key to derive or a TPM chip to wait for: it is given more time to answer."""
    destroys: str = ""
    """What is lost for good; asked about on a terminal unless --yes is given."""
