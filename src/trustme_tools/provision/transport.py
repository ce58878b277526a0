# SPDX-License-Identifier: Apache-2.0
"""How a provisioning station reaches the `control` command of a device.

A transport does one thing: run `control` with words, standard input and files, and bring back what it said.
What runs on the device, and how bytes are kept whole on the way there, is in `remote`.

    unix:PATH       the control socket is on this host (a simulated device): our own `control` is run here
    command: [...]  anything like ssh: the words, then one shell command line; standard input passes through
    console:PATH    a shell on a terminal behind a unix socket (`console`)
"""

from __future__ import annotations

import base64
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from trustme_tools.errors import ToolError
from trustme_tools.provision import remote

GRACE: Final = 15.0
"""Seconds that a way to the device may take, on top of what `control` may take there."""
_SHOWN: Final = 300


class Scratch(Enum):
    """A word of a command line: the path of a file that may be written and is not kept."""

    FILE = "scratch file"


Word = str | bytes | Scratch
"""A word of a command line: a text; bytes: the path of a file with that content; or a scratch file."""


class Output(NamedTuple):
    """What a command left."""

    code: int
    stdout: bytes
    stderr: bytes


class Transport(Protocol):
    """One way to one device."""

    def control(self, words: Sequence[Word], *, stdin: bytes, timeout: float) -> Output:
        """Run `control` with `words`; `timeout` in seconds, for the command on the device.

        ToolError("unreachable") if that did not come about, or nobody knows whether it did.
        """
        ...

    def close(self) -> None:
        """Let go of the way; the next call opens it again."""
        ...


class UnixTransport:
    """Our own `control` against a control socket of this host."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def control(self, words: Sequence[Word], *, stdin: bytes, timeout: float) -> Output:
        """See Transport."""
        program = [sys.executable, "-I", "-m", "trustme_init.control.cli.main", "-s", str(self._path)]
        return output(remote.perform(request(program, words, stdin, timeout)))

    def close(self) -> None:
        """Nothing is held."""


class CommandTransport:
    """Anything like ssh: `prefix`, and as one more word a command line for a POSIX shell on the device."""

    def __init__(self, prefix: Sequence[str]) -> None:
        self._prefix = tuple(prefix)

    def control(self, words: Sequence[Word], *, stdin: bytes, timeout: float) -> Output:
        """See Transport."""
        mark = new_mark()
        line = shlex.join(["python3", "-Ic", f"{source()}\nserve({mark!r})"])
        asked = remote.lines(request(["control"], words, stdin, timeout))
        try:
            done = subprocess.run(
                [*self._prefix, line],
                input="\n".join([*asked, ""]).encode(),
                capture_output=True,
                timeout=timeout + GRACE,
                check=False,
            )
        except OSError as exc:
            raise unreachable(f"{self._prefix[0]}: {exc.strerror}") from exc
        except subprocess.TimeoutExpired:
            raise unreachable(f"{self._prefix[0]}: no answer in {timeout + GRACE:g} s") from None
        pieces = []
        for text in done.stdout.decode("ascii", "replace").splitlines():
            if text.startswith(f"{mark}{remote.REQUEST}"):
                pieces.append(text[len(mark) + 1 :])
            elif text.startswith(f"{mark}{remote.END}"):
                return output(answered(pieces, text[len(mark) + 1 :]))
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise unreachable(f"{self._prefix[0]}: exit code {done.returncode}: {said[-_SHOWN:]}")

    def close(self) -> None:
        """Nothing is held."""


def new_mark() -> str:
    """Return what this conversation's lines begin with, so that nothing else is taken for one."""
    return f"trustme-{secrets.token_hex(8)}"


def source() -> str:
    """Return the program that runs on the device."""
    return Path(remote.__file__).read_text(encoding="utf-8")


def request(program: Sequence[str], words: Sequence[Word], stdin: bytes, timeout: float) -> dict[str, Any]:
    """Return what `remote.perform` takes."""
    return {
        "program": list(program),
        "words": [_word(word) for word in words],
        "stdin": base64.b64encode(stdin).decode(),
        "timeout": timeout,
    }


def _word(word: Word) -> str | dict[str, Any]:
    if isinstance(word, bytes):
        return {"file": base64.b64encode(word).decode()}
    return {"scratch": True} if isinstance(word, Scratch) else word


def answered(pieces: list[str], digest: str) -> dict[str, Any]:
    """Return the device's answer; ToolError("unreachable") if it did not arrive whole."""
    try:
        return remote.joined(pieces, digest)
    except (ValueError, TypeError) as exc:
        raise unreachable(f"the answer did not arrive whole: {exc}") from exc


def output(answer: dict[str, Any]) -> Output:
    """Take an answer of `remote.perform` apart; ToolError("unreachable") for any other."""
    if isinstance(error := answer.get("error"), str):
        raise unreachable(error)
    try:
        code, out, err = answer["code"], answer["stdout"], answer["stderr"]
        if type(code) is not int:
            raise TypeError("exit code")
        return Output(code, base64.b64decode(out, validate=True), base64.b64decode(err, validate=True))
    except (KeyError, TypeError, ValueError) as exc:
        raise unreachable(f"not an answer: {exc}") from exc


def unreachable(evidence: str) -> ToolError:
    """Return the error of a way that does not reach the device's `control`."""
    return ToolError(
        "the device's `control` cannot be reached",
        "see that the device is on and its core container runs, then repeat: what is done stays done",
        code="unreachable",
        evidence=evidence,
    )
