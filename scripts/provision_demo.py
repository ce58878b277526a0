# SPDX-License-Identifier: Apache-2.0
"""The walk of docs/provisioning.md on a virtual machine, told as a story (`make provision-demo`).

Everything that is shown happens: a new device boots under Secure Boot, `trustme provision` walks it over its
core console, it reboots, and the provisioning commands are tried in vain. Exit code 0, or 1 with the reason.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from trustme_tools.errors import ToolError  # noqa: E402 - a script finds its own tree first
from trustme_tools.image.cache import Cache, default_root  # noqa: E402
from trustme_tools.machine import acceleration, firmware, images  # noqa: E402
from trustme_tools.machine.images import ImageDirectory  # noqa: E402
from trustme_tools.provision import fleet, plan, report, settings  # noqa: E402
from trustme_tools.provision.console import ConsoleTransport  # noqa: E402
from trustme_tools.provision.simulate import SimulatedDevice  # noqa: E402
from trustme_tools.provision.transport import Scratch, Word  # noqa: E402

SETTINGS: Final = """\
version: 1
guest_anchors: [{pki}/guestos_subca.cert]
device_anchors: [{pki}/device_subca.cert]
device_ca: {{pki: {pki}}}
token: {{pin: "file:pin"}}
development_builds: allow
completion: reboot
"""
BEFORE: Final[tuple[tuple[Word, ...], ...]] = (("provisioning_status",), ("token_status",))
AFTER: Final[tuple[tuple[Word, ...], ...]] = (
    ("get_provisioned",),
    ("pull_csr", Scratch.FILE),
    ("ca_remove", "00000000"),
    ("token_remove", "--yes"),
    ("set_provisioned",),
    ("provisioning_status",),
)
TIMEOUT: Final = 120.0
UNSUPPORTED: Final = 4


def main() -> int:
    """Tell the story about the image directory named on the command line."""
    image = images.load(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="trustme-demo-") as name:
        try:
            return _story(image, Path(name))
        except ToolError as exc:
            print(f"\n{exc.cause} ({exc.code})\n  evidence: {exc.evidence}\n  remedy: {exc.remedy}")
            return 1


def _story(image: ImageDirectory, directory: Path) -> int:
    accelerator = acceleration.choose().upper()
    _say(f"A new device is switched on: Secure Boot, a TPM nobody has used yet ({accelerator}).")
    firm = firmware.prepare(Cache(default_root()), image.pki)
    with SimulatedDevice("demo", image.disk, firm, directory / "device") as device:
        transport = ConsoleTransport(device.terminal)
        for words in BEFORE:
            _show(transport, words)
        _say("`trustme provision` over its console; a development build has provisioned itself before.")
        done = _provision(image, transport, directory)
        if not done.good:
            print(report.as_text(done))
            return 1
        _say("It has rebooted: this is its second boot, and the door is closed.")
        print("\n".join(f"  {line}" for line in device.machine.boot.text.strip().splitlines()[-8:]))
        codes = [_show(transport, words) for words in AFTER]
        _say("The report:")
        print(report.as_text(done))
        transport.close()
        device.switch_off()
    if [code for code in codes if code == UNSUPPORTED] != [UNSUPPORTED] * 4:
        print("\nA provisioning command was answered after completion.")
        return 1
    _say("Switched off. Nothing but a cleared TPM and an erased disk makes this a new device again.")
    return 0


def _provision(image: ImageDirectory, transport: ConsoleTransport, directory: Path) -> report.Report:
    pin = directory / "pin"
    pin.touch(mode=0o600)
    pin.write_text(f"{secrets.token_urlsafe(12)}\n")
    path = directory / "station.yml"
    path.write_text(SETTINGS.format(pki=image.pki))
    read = settings.load(path)
    target = fleet.Target(fleet.named("console:demo"), lambda: nullcontext(transport))
    loaded = plan.load(read, (target.settings,))
    (done,) = fleet.provision(loaded, [target], parallel=1, tell=lambda line: print(f"  {line}", flush=True))
    return done


def _show(transport: ConsoleTransport, words: tuple[Word, ...]) -> int:
    """Run a command in the core container and show what its operator would see."""
    shown = " ".join(word if isinstance(word, str) else "device.csr" for word in words)
    answer = transport.control(words, stdin=b"", timeout=TIMEOUT)
    print(f"\n  core:~# control {shown}")
    for line in (answer.stdout + answer.stderr).decode(errors="replace").rstrip().splitlines():
        print(f"  {line}")
    print(f"  (exit code {answer.code})", flush=True)
    return answer.code


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
