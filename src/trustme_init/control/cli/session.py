# SPDX-License-Identifier: Apache-2.0
"""What every verb works with: the connection, the chosen output, names turned into UUIDs."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trustme_init.control.cli import output
from trustme_init.control.client import ControlClient
from trustme_init.errors import Refusal
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_init.proto.control_pb2 import DaemonToController as Reply

UNKNOWN_TEXT = "Container with provided uuid/name does not exist!"


class Format(enum.Enum):
    """The three ways to show a reply."""

    READABLE = "readable"
    JSON = "json"
    TEXT = "text"


class LocalProblem(Exception):  # noqa: N818 - a problem on this side, not an error of the device
    """Wrong usage, a local file that cannot be used, or an unknown container; `exit_code` says which."""

    def __init__(self, text: str, exit_code: int = output.USAGE) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(slots=True)
class Session:
    """One run of `control`."""

    client: ControlClient
    verb: str
    format: Format

    def ask(self, request: Request) -> int:
        """Send a request, show its reply, return the exit code."""
        return self.show(self.client.request(request))

    def show(self, reply: Reply, **parts: Any) -> int:
        """Print a reply; `parts` go into the JSON envelope. Return the exit code."""
        code = output.exit_code(reply)
        if self.format is Format.JSON:
            sys.stdout.write(output.as_json(self.verb, code, reply=output.as_dict(reply), **parts))
        elif self.format is Format.TEXT:
            sys.stdout.write(output.as_text(reply))
        else:
            sys.stdout.write(output.readable(reply))
        return code

    def complain(self, text: str, code: int, refusal: Refusal | None = None) -> int:
        """Print what went wrong on this side and return `code`."""
        if self.format is Format.JSON:
            error = refusal.as_dict() if refusal else {"cause": text}
            sys.stdout.write(output.as_json(self.verb, code, error=error))
        elif text == UNKNOWN_TEXT:
            print(text)  # on stdout, as the original: scripts look for it there
        else:
            print(f"control: {text}", file=sys.stderr)
        return code

    def replies_until_end(self, request: Request) -> Iterator[Reply]:
        """Yield the replies of an installation or execution, the closing one last."""
        self.client.send(request)
        while True:
            reply = self.client.receive()
            yield reply
            if reply.code not in {Reply.EXEC_OUTPUT, Reply.GUESTOS_PROGRESS} and not (
                reply.code == Reply.RESPONSE
                and reply.response in {Reply.GUESTOS_MGR_INSTALL_STARTED, Reply.GUESTOS_MGR_INSTALL_WAITING}
            ):
                return

    def uuid_of(self, name: str) -> str:
        """Return the UUID of the container with this name or UUID; LocalProblem if not exactly one."""
        reply = self.client.request(Request(command=Request.GET_CONTAINER_STATUS, system_services=True))
        if reply.code != Reply.CONTAINER_STATUS:
            self.show(reply)
            raise LocalProblem("", output.exit_code(reply))
        matches = {status.uuid for status in reply.container_status if name in {status.uuid, status.name}}
        if not matches:
            raise LocalProblem(UNKNOWN_TEXT, output.UNKNOWN_CONTAINER)
        if len(matches) > 1:
            raise LocalProblem(f"several containers are called {name!r}: give a UUID")
        return matches.pop()


def read_file(path: Path) -> bytes:
    """Return a local file; LocalProblem if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise LocalProblem(f"{path}: {exc.strerror}") from exc


def write_file(path: Path, data: bytes) -> None:
    """Write a local file; LocalProblem if it cannot be written."""
    try:
        path.write_bytes(data)
    except OSError as exc:
        raise LocalProblem(f"{path}: {exc.strerror}") from exc


def ask_secrets(*prompts: str) -> list[str]:
    """Return one line per prompt: from the terminal without echo, or from standard input."""
    if sys.stdin.isatty():
        from getpass import getpass

        return [getpass(prompt) for prompt in prompts]
    lines = [sys.stdin.readline() for _ in prompts]
    if not all(lines):
        raise LocalProblem(f"{len(prompts)} line(s) expected on standard input")
    return [line.rstrip("\n") for line in lines]
