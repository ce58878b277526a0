# SPDX-License-Identifier: Apache-2.0
"""The vault's operations on GuestOSes: from the arguments of a request to `guestos.operations`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from trustme_init.guestos.operations import GuestOsOperations
from trustme_init.guestos.store import SignedFiles
from trustme_init.provisioning.arguments import Arguments, Result, octets, text

OPERATIONS: Final[Mapping[str, Callable[[GuestOsOperations, Arguments], Result]]] = {
    "guestos-examine": lambda guestos, given: guestos.examine(_files(given)),
    "guestos-stage": lambda guestos, given: guestos.stage(_files(given), repair=bool(text(given, "repair"))),
    "guestos-publish": lambda guestos, given: guestos.publish(text(given, "stem")),
    "guestos-discard": lambda guestos, given: guestos.discard(text(given, "stem")),
    "guestos-list": lambda guestos, _given: guestos.list(),
    "guestos-config": lambda guestos, given: guestos.config(text(given, "stem")),
    "guestos-remove": lambda guestos, given: guestos.remove(text(given, "name"), _lines(given, "running")),
    "guestos-tidy": lambda guestos, given: guestos.tidy(_lines(given, "running")),
}
"""What the names of `states.TABLE` do."""


def _files(given: Arguments) -> SignedFiles:
    return SignedFiles(octets(given, "config"), octets(given, "signature"), octets(given, "certificate"))


def _lines(given: Arguments, name: str) -> list[str]:
    return text(given, name).splitlines()
