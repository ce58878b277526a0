# SPDX-License-Identifier: Apache-2.0
"""Power cuts: a TPM command and a file operation of `write_atomic` have an instant before and one after.

The instants are numbered in the order in which they come. At the chosen one the power goes: the command is
not passed on, or its reply is lost; from then on no command and no file operation does anything at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer
from trustme_init.errors import Refusal
from trustme_init.linux import files
from trustme_init.tpm.connection import open_tpm

FILE_OPERATIONS = ("open", "fchmod", "write", "fsync", "rename", "unlink")


class PowerCut(BaseException):
    """No `except Exception` may go on when the power is gone."""


class Power:
    """Counts instants; at the instant `cut` it goes, and stays away."""

    def __init__(self, cut: int | None = None) -> None:
        self.instants = 0
        self._cut = cut
        self.gone = False

    def instant(self) -> bool:
        """Whether there still is power."""
        self.gone = self.gone or self.instants == self._cut
        self.instants += 1
        return not self.gone


class _Os:
    """What `linux.files` calls `os`."""

    def __init__(self, power: Power) -> None:
        self._power = power

    def __getattr__(self, name: str) -> Any:
        if name not in FILE_OPERATIONS:
            return getattr(os, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            if not self._power.instant():
                raise PowerCut
            result = getattr(os, name)(*arguments, **options)
            if not self._power.instant():
                raise PowerCut
            return result

        return operation


class Bench:
    """A TPM and a directory in a certain state, from which `run` starts again and again."""

    def __init__(self, directory: Path) -> None:
        self._origin = directory / "origin"
        self._work = directory / "work"
        self._origin.mkdir()

    @property
    def data(self) -> Path:
        return self._work / "data"

    def prepare(self, work: Callable[[Any, Path], object]) -> None:
        """Bring TPM and directory into the state that every run begins with."""
        (self._origin / "data").mkdir()
        with SoftwareTpm(self._origin) as tpm, open_tpm(tpm.tcti) as esapi:
            work(esapi, self._origin / "data")

    def run(self, work: Callable[[Any, Path], object], cut: int | None = None) -> int:
        """Do `work` until its end, or until the power goes at the instant `cut`; return the instants seen."""
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._origin, self._work, ignore=shutil.ignore_patterns("*.sock*"))
        power = Power(cut)
        with (
            SoftwareTpm(self._work) as tpm,
            Interposer(tpm, self._work) as bus,
            pytest.MonkeyPatch.context() as patch,
        ):
            bus.on_command = lambda command: command if power.instant() else None
            bus.on_reply = lambda reply: reply if power.instant() else None
            patch.setattr(files, "os", _Os(power))
            try:
                with open_tpm(bus.tcti) as esapi:
                    work(esapi, self.data)
            except (PowerCut, Refusal):
                assert power.gone, "refused with the power on"
                # `finally` and `except` may have asked for more, which must not have happened.
        return power.instants

    def restart(self, work: Callable[[Any, Path], object]) -> None:
        """Do `work` after the power is back."""
        with SoftwareTpm(self._work) as tpm, open_tpm(tpm.tcti) as esapi:
            work(esapi, self.data)

    def every_cut(self, work: Callable[[Any, Path], object]) -> Iterator[int]:
        """Run `work` once without a cut and then with one at each instant; yield after each of these."""
        instants = self.run(work)
        for cut in range(instants):
            self.run(work, cut)
            yield cut
