# SPDX-License-Identifier: Apache-2.0
"""A control server in a process of its own: `python control_device.py DIRECTORY [JSON limits]`.

Serves `control` (privileged), `guest` (unprivileged) and `service` in DIRECTORY. Every effect and log line
is one line on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from tests.unit.control.fake_device import FakeDevice
from trustme_init.control.dispatch import Dispatcher
from trustme_init.control.loop import Loop
from trustme_init.control.server import CONTROL_LIMITS, ControlServer
from trustme_init.control.service import ServiceCallbacks, ServiceServer
from trustme_init.control.state import LogFile


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Device(FakeDevice):
    def request_reboot(self) -> None:
        say("effect: reboot")

    def remove_logs(self, names: object) -> None:
        say(f"effect: remove {names}")


def main() -> None:
    directory = Path(sys.argv[1])
    limits = replace(CONTROL_LIMITS, **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))
    loop = Loop()
    big = directory / "big.log"
    device = Device(log_files=[LogFile("boot", b"line 1\n\x1b[2Jline 2\n")])
    if big.exists():
        device.log_files.append(LogFile("big", big))
    dispatcher = Dispatcher(device, log=say)
    own = {"uid": os.getuid(), "gid": os.getgid(), "log": say}
    servers = [
        ControlServer(
            loop,
            directory / name,
            dispatcher,
            privileged=name == "control",
            limits=limits,
            **own,  # type: ignore[arg-type]
        )
        for name in ("control", "guest")
    ]
    callbacks = ServiceCallbacks(
        boot_completed=lambda: say("effect: boot completed"), name=lambda: "core0", dns=lambda: "192.0.2.1"
    )
    service = ServiceServer(loop, directory / "service", callbacks, **own)  # type: ignore[arg-type]
    loop.on_signal(signal.SIGTERM, lambda _number: loop.stop())
    loop.on_signal(signal.SIGUSR1, lambda _number: say(f"effect: shutdown told {service.shutdown()}"))
    say("ready")
    loop.run()
    for server in (*servers, service):
        server.close()
    loop.close()


if __name__ == "__main__":
    main()
