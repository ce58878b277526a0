# SPDX-License-Identifier: Apache-2.0
"""What can go wrong for the user of the host tools, and the exit code each kind has.

A `ToolError` carries what happened and what to do about it; everything else that reaches the command's
top level is a programming error and keeps its traceback. `trustme_init.errors.Refusal` (the device's
own judgement, which the tools reuse) is mapped beside it in `exit_code`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from enum import IntEnum
from typing import Final


class Exit(IntEnum):
    """Exit codes of `trustme`; part of its interface."""

    OK = 0
    FAILED = 1
    """Refused, failed, or verified as not good."""
    USAGE = 2
    MISSING_TOOL = 3
    """A program of the host is not installed."""
    INTERRUPTED = 130


class ToolError(Exception):
    """A user error or a failed step: `cause` says what happened, `remedy` what to do.

    `code` is a stable kebab-case name for scripts and tests; `evidence` never holds a secret.
    """

    exit = Exit.FAILED

    def __init__(self, cause: str, remedy: str = "", *, code: str = "failed", evidence: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.code = code
        self.evidence = evidence

    def as_dict(self) -> dict[str, str]:
        """Return the error as the JSON envelope carries it."""
        return {"code": self.code, "cause": self.cause, "evidence": self.evidence, "remedy": self.remedy}


class UsageError(ToolError):
    """Options that parse but do not fit together."""

    exit = Exit.USAGE


_REMEDIES: Final[Mapping[int, str]] = {
    errno.EACCES: "check owner and mode of the path, or run as a user who may",
    errno.EISDIR: "name a file; this is a directory",
    errno.ENOENT: "check the path; a relative one starts at the current directory",
    errno.ENOSPC: "free some space, or name another place (TRUSTME_CACHE moves the cache)",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EPERM: "check owner and mode of the path, or run as a user who may",
    errno.EROFS: "name a place that can be written to",
}


def from_os_error(error: OSError) -> ToolError:
    """Return what the kernel refused as an error for the user: the path, the reason, what to look at."""
    path = error.filename2 or error.filename
    where = f"{path}: " if path else ""
    remedy = _REMEDIES.get(error.errno or 0, "")
    return ToolError(f"{where}{error.strerror or error}", remedy, code="os-error")


class MissingToolError(ToolError):
    """A host program is not on the PATH."""

    exit = Exit.MISSING_TOOL

    def __init__(self, program: str, package: str | None) -> None:
        super().__init__(
            f"the program {program} is not installed",
            f"install it: apt-get install {package}" if package else "run `make setup` in the checkout",
            code="missing-tool",
            evidence=program,
        )
