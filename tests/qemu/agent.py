# SPDX-License-Identifier: Apache-2.0
"""A test agent inside the device's base system, for what can only be done or seen there.

It is no part of the product: a further initramfs archive, which replaces `/init` by a script that starts the
agent beside PID 1, is put into a copy of the UKI, which is then signed again. Works with any image.
"""

from __future__ import annotations

import base64
import json
import socket
import time
from pathlib import Path
from typing import Any

from trustme_tools.image import uki
from trustme_tools.image.cpio import Archive

AGENT_INIT = b"""\
#!/usr/bin/python3 -I
import os

if os.fork() == 0:
    import base64, json, termios, traceback

    port = os.open("/dev/hvc2", os.O_RDWR | os.O_NOCTTY)
    mode = termios.tcgetattr(port)
    mode[0] = mode[1] = mode[3] = 0
    termios.tcsetattr(port, termios.TCSANOW, mode)
    with os.fdopen(os.dup(port), "rb") as requests:
        for line in requests:
            names = {}
            try:
                exec(base64.b64decode(line), names)
                answer = {"value": names.get("value")}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            data = base64.b64encode(json.dumps(answer, default=str).encode()) + b"\\n"
            while data:
                data = data[os.write(port, data) :]
    os._exit(0)

from trustme_init.boot.pid1 import main

main()
"""


def add_to(tree: Path, signed: Path, target: Path) -> None:
    """Write an unsigned UKI like `signed`, with the agent, to `target`."""
    archive = Archive(0)
    archive.file("init", AGENT_INIT, 0o755)
    archive.directory("dev")
    archive.character_device("dev/hvc2", 229, 2)
    extra = target.with_suffix(".cpio")
    extra.write_bytes(archive.bytes())
    uki.rebuild(tree, signed, target, extra_initramfs=[extra])


class Agent:
    """Runs Python source in the device's base system as root."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))

    def close(self) -> None:
        self._socket.close()

    def run(self, source: str, timeout: float = 30.0) -> Any:
        """Return what `source` leaves in `value`; AssertionError with the device's traceback."""
        self._socket.sendall(base64.b64encode(source.encode()) + b"\n")
        deadline = time.monotonic() + timeout
        data = b""
        while not data.endswith(b"\n"):
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data += self._socket.recv(65536)
        answer = json.loads(base64.b64decode(data))
        assert "error" not in answer, answer["error"]
        return answer["value"]
