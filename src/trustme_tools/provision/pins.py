# SPDX-License-Identifier: Apache-2.0
"""Where PINs and passphrases come from: a prompt, an open descriptor, or a file that only its owner reads.

Rules:
- A secret is never in the settings file, on a command line or in the environment, and no message shows it:
  also not the one about a settings file that has the secret itself where its source should stand.
- A source is read once: descriptors are used up, and a person is asked before the first device is touched.
"""

from __future__ import annotations

import getpass
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trustme_tools.errors import ToolError, UsageError

LIMIT: Final = 1024
"""Bytes of a secret."""
_DESCRIPTOR: Final = re.compile(r"fd:(\d{1,4})")
_FORMS: Final = "prompt, fd:N (an open descriptor) or file:PATH (mode 0600)"


class Secret:
    """A PIN or passphrase; only `reveal` gives it away."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the secret itself."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a secret is to be read; `purpose` is what it is, for prompts and messages."""

    purpose: str
    descriptor: int | None = None
    path: Path | None = None
    new: bool = False
    """Whether it is being chosen now: a prompt asks for it twice."""


def parse(text: object, purpose: str, *, base: Path, new: bool = False) -> Source:
    """Return the source that `text` names; UsageError("bad-secret-source") never shows `text`."""
    if text == "prompt":
        return Source(purpose, new=new)
    if isinstance(text, str) and (match := _DESCRIPTOR.fullmatch(text)):
        return Source(purpose, descriptor=int(match[1]))
    if isinstance(text, str) and text.startswith("file:") and text != "file:":
        return Source(purpose, path=base / text.removeprefix("file:"))
    raise UsageError(
        f"{purpose}: this is no place to read a secret from",
        f"give one of: {_FORMS}; never the secret itself",
        code="bad-secret-source",
    )


class Reader:
    """Reads each source once. Not for several threads: read everything before they start."""

    def __init__(self) -> None:
        self._read: dict[int | Path | str, Secret] = {}

    def read(self, source: Source) -> Secret:
        """Return the secret of a source.

        ToolError: "secret-unreadable", "secret-file-open-to-others", "bad-secret".
        UsageError: "bad-descriptor", "no-terminal", "entries-differ".
        """
        key = source.descriptor if source.descriptor is not None else source.path or source.purpose
        if key not in self._read:
            if source.descriptor is not None:
                data = _descriptor(source.descriptor, source.purpose)
            elif source.path is not None:
                data = _file(source.path, source.purpose)
            else:
                data = _prompt(source)
            self._read[key] = _secret(data, source.purpose)
        return self._read[key]


def _prompt(source: Source) -> bytes:
    if not sys.stdin.isatty():
        raise UsageError(
            f"{source.purpose}: there is no terminal to ask at",
            "use fd:N or file:PATH where no person is",
            code="no-terminal",
        )
    first = getpass.getpass(f"{source.purpose}: ")
    if source.new and first != getpass.getpass("Again: "):
        raise UsageError(
            f"{source.purpose}: the two entries differ", "type the same twice", code="entries-differ"
        )
    return first.encode()


def _descriptor(number: int, purpose: str) -> bytes:
    try:
        return _first_line(number)
    except OSError as exc:
        raise UsageError(
            f"{purpose}: descriptor {number} cannot be read: {exc.strerror}",
            f"open it, for example: trustme provision … {number}< FILE",
            code="bad-descriptor",
        ) from exc


def _file(path: Path, purpose: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        raise ToolError(
            f"{purpose}: the file cannot be read",
            "name a file (no symbolic link) that you may read",
            code="secret-unreadable",
            evidence=f"{path}: {exc.strerror}",
        ) from exc
    try:
        facts = os.fstat(descriptor)
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISREG(facts.st_mode) or mode & 0o077 or facts.st_uid not in {os.geteuid(), 0}:
            raise ToolError(
                f"{purpose}: others than its owner can get at the file",
                f"make it yours alone: chmod 600 {path}",
                code="secret-file-open-to-others",
                evidence=f"{path}: mode {mode:04o}, owner {facts.st_uid}",
            )
        return _first_line(descriptor)
    finally:
        os.close(descriptor)


def _first_line(descriptor: int) -> bytes:
    data = b""
    while b"\n" not in data and len(data) <= LIMIT and (chunk := os.read(descriptor, LIMIT + 1)):
        data += chunk
    return data.split(b"\n", 1)[0]


def _secret(data: bytes, purpose: str) -> Secret:
    fault = "it is empty" if not data else f"longer than {LIMIT} bytes" if len(data) > LIMIT else ""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        # The exception has the bytes in it.
        text, fault = "", "not UTF-8"
    if not fault and not text.isprintable():
        fault = "it has unprintable characters"
    if fault:
        raise ToolError(
            f"{purpose}: this cannot be a PIN or passphrase",
            "it is the first line that is read; make it one line of text",
            code="bad-secret",
            evidence=fault,
        )
    return Secret(text)
