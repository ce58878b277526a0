# SPDX-License-Identifier: Apache-2.0
"""`control retrieve_logs`: show the logs, collect them for JSON, or write one file each as they arrive."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Protocol, TextIO

from trustme_init.control.cli.output import as_text
from trustme_init.control.cli.session import Format, LocalProblem, Session
from trustme_init.control.sanitise import visible
from trustme_init.proto.control_pb2 import DaemonToController as Reply


class _Sink(Protocol):
    """Where fragments go; `seen` is what the JSON envelope says about the logs."""

    seen: list[dict[str, Any]]

    def take(self, reply: Reply, *, first: bool, last: bool) -> None: ...

    def close(self) -> None: ...


def retrieve_logs(session: Session, options: argparse.Namespace) -> int:
    """Fetch all logs; LocalProblem when a file cannot be written."""
    directory: Path | None = options.directory
    sink: _Sink
    if directory is not None:
        sink = _Files(directory)
    elif session.format is Format.JSON:
        sink = _Collected()
    else:
        sink = _Shown(dump=session.format is Format.TEXT)
    try:
        return _retrieve(session, sink, remove=options.remove)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise LocalProblem(f"{directory or 'standard output'}: {exc.strerror}") from exc
    finally:
        sink.close()


def _retrieve(session: Session, sink: _Sink, *, remove: bool) -> int:
    first = True
    code = 0
    for reply in session.client.logs(remove=remove):
        if reply.HasField("log_message"):
            last = reply.code == Reply.LOG_MESSAGE_FINAL
            sink.take(reply, first=first, last=last)
            first = last
        else:
            code = session.show(reply, logs=sink.seen)
    return code


class _Shown:
    """On standard output, made visible; or every message as a dump."""

    def __init__(self, *, dump: bool) -> None:
        self.seen: list[dict[str, Any]] = []
        self._dump = dump

    def take(self, reply: Reply, *, first: bool, last: bool) -> None:
        if self._dump:
            sys.stdout.write(as_text(reply))
            return
        if first:
            print(f"==> {visible(reply.log_message.name)} <==")
        sys.stdout.write(visible(reply.log_message.msg, keep="\n\t"))
        if last:
            print()

    def close(self) -> None:
        pass


class _Collected:
    """In memory: a JSON document is one piece."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def take(self, reply: Reply, *, first: bool, last: bool) -> None:  # noqa: ARG002 - a sink's shape
        if first:
            self.seen.append({"name": visible(reply.log_message.name), "text": ""})
        self.seen[-1]["text"] += reply.log_message.msg

    def close(self) -> None:
        pass


class _Files:
    """In a directory, one file of mode 0600 each, bytes as the device sent them."""

    def __init__(self, directory: Path) -> None:
        self.seen: list[dict[str, Any]] = []
        self._directory = directory
        self._file: TextIO | None = None

    def take(self, reply: Reply, *, first: bool, last: bool) -> None:
        if first:
            self.close()
            self._directory.mkdir(parents=True, exist_ok=True)
            name = visible(reply.log_message.name)
            path = self._directory / _file_name(name)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8", newline="")
            self.seen.append({"name": name, "path": str(path)})
        if self._file is not None:
            self._file.write(reply.log_message.msg)
        if last:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _file_name(name: str) -> str:
    """A name from the device as a file name here: never a path, never hidden."""
    return name.replace("/", "_").lstrip(".") or "log"
