# SPDX-License-Identifier: Apache-2.0
"""Runs `control` on the device: this module's source is sent to the core container's Python (`python3 -Ic`).

Rules:
- Nothing but the standard library: the core container has no more.
- A request says what to run, with which standard input and files; the answer has exit code and both outputs.
  Both travel as base64 in short lines and end with their SHA-256, so that a console that loses, adds or
  changes a byte is noticed and never believed. A request that does not arrive whole is not run.
- Files of a request exist for one call only, in a directory that nobody else reads. Secrets come by standard
  input or file, never in a command line or the environment.
- Whatever is no line of a request ends the program, and so does silence: a console is never kept for ever.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PIECE = 1024
"""Characters of base64 in a line: well below the 4096 that terminals take at once."""
IDLE = 900
"""Seconds of silence after which a console is given back to its shell."""
REQUEST, END = "+", "="


def perform(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command and return `code`, `stdout`, `stderr` (base64), or `error`: why it did not run.

    `request`: `program` and `words` (a word is a text, {"file": base64} for the path of a file with that
    content, or {"scratch": true} for a path that may be written), `stdin` (base64), `timeout` in seconds.
    """
    directory = Path(tempfile.mkdtemp(prefix="trustme-provision-"))  # made with mode 0700
    try:
        words = [_word(word, directory / str(number)) for number, word in enumerate(request["words"])]
        done = subprocess.run(
            [*request["program"], *words],
            input=base64.b64decode(request["stdin"]),
            capture_output=True,
            timeout=request["timeout"],
            check=False,
        )
    except OSError as exc:
        return {"error": f"{exc.filename or 'control'}: {exc.strerror}"}
    except subprocess.TimeoutExpired:
        # Not the exception's own text: it is long, and names the command.
        return {"error": f"no answer in {request['timeout']:g} s"}
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return {
        "code": done.returncode,
        "stdout": base64.b64encode(done.stdout).decode(),
        "stderr": base64.b64encode(done.stderr).decode(),
    }


def _word(word: Any, path: Path) -> str:
    if isinstance(word, str):
        return word
    if "file" in word:
        path.write_bytes(base64.b64decode(word["file"]))
    return str(path)


def lines(document: dict[str, Any], mark: str = "") -> list[str]:
    """Return a document as lines, each with `mark` in front; the last one has the SHA-256 of all."""
    data = json.dumps(document).encode()
    text = base64.b64encode(data).decode()
    pieces = [f"{mark}{REQUEST}{text[start : start + PIECE]}" for start in range(0, len(text), PIECE)]
    return [*pieces, f"{mark}{END}{hashlib.sha256(data).hexdigest()}"]


def joined(pieces: list[str], digest: str) -> dict[str, Any]:
    """Return the document that `lines` made these of; ValueError if a byte is not as it was."""
    data = base64.b64decode("".join(pieces), validate=True)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError("a byte was lost or changed on the way")
    document = json.loads(data)
    if not isinstance(document, dict):
        raise TypeError("not a document")
    return document


def serve(mark: str) -> None:
    """Answer requests from standard input until it ends or holds something else."""
    pieces: list[str] = []
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(IDLE)
    for line in sys.stdin.buffer:
        signal.alarm(IDLE)
        text = line.strip().decode("ascii", "replace")
        if text.startswith(REQUEST):
            pieces.append(text[1:])
            _say(f"{mark}.")
        elif text.startswith(END):
            try:
                answer = perform(joined(pieces, text[1:]))
            except (ValueError, TypeError, KeyError) as exc:
                answer = {"error": f"the request did not arrive whole: {type(exc).__name__}"}
            pieces = []
            for each in lines(answer, mark):
                _say(each)
        else:
            return


def _stop(*_: object) -> None:
    raise SystemExit(0)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
