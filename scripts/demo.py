# SPDX-License-Identifier: Apache-2.0
"""What the device is for, told as a story on a virtual machine (`make demo`).

Everything that is shown happens: a new device boots under Secure Boot, gets an anchor for GuestOSes, takes
the example service, pairs a container's token with a PIN and starts it twice: its encrypted volume remembers.
Exit code 0, or 1 with the reason.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
EXAMPLE: Final = ROOT / "recipes/example-service"
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from trustme_tools.errors import ToolError  # noqa: E402 - a script finds its own tree first
from trustme_tools.guestos import content  # noqa: E402
from trustme_tools.guestos import recipe as recipes  # noqa: E402
from trustme_tools.guestos.build import BuiltGuestOs, build_guestos  # noqa: E402
from trustme_tools.guestos.signing import pki_signer  # noqa: E402
from trustme_tools.image.cache import Cache, default_root  # noqa: E402
from trustme_tools.machine import acceleration, firmware, images  # noqa: E402
from trustme_tools.machine.images import ImageDirectory  # noqa: E402
from trustme_tools.pki.directory import PkiDirectory  # noqa: E402
from trustme_tools.provision.console import ConsoleTransport  # noqa: E402
from trustme_tools.provision.simulate import SimulatedDevice  # noqa: E402
from trustme_tools.provision.transport import Output, Word  # noqa: E402

PUSHED: Final = "/data/push"
CONFIG: Final = b"""\
name: "example"
guest_os: "example-service"
token_type: SOFT
"""
TIMEOUT: Final = 240.0
"""Seconds for one command: deriving a key from a PIN takes 10-25 of them under emulation."""


class Story:
    """The device and what is said to it."""

    def __init__(self, transport: ConsoleTransport) -> None:
        self._transport = transport

    def control(self, *words: Word, stdin: bytes = b"", expect: int = 0) -> Output:
        """Run `control` in the core container, show it, and hold it to its exit code."""
        shown = " ".join(f"<{len(word)} bytes>" if isinstance(word, bytes) else str(word) for word in words)
        print(f"\n  core:~# control {shown}", flush=True)
        answer = self._transport.control(words, stdin=stdin, timeout=TIMEOUT)
        for line in (answer.stdout + answer.stderr).decode(errors="replace").rstrip().splitlines():
            print(f"  {line}", flush=True)
        if answer.code != expect:
            raise ToolError(
                "the device did not answer as it should",
                "read the lines above, and the boot console: `trustme run IMAGE_DIR --console`",
                code="demo-failed",
                evidence=f"control {shown}: exit code {answer.code}, not {expect}",
            )
        return answer

    def put(self, data: bytes, path: str) -> None:
        """Put a file into the core container, over its console too: half a minute for 3 MiB."""
        print(f"\n  (copying {path} to the core container: {len(data)} bytes)", flush=True)
        script = 'mkdir -p "$(dirname "$2")" && mv "$1" "$2"'
        answer = self._transport.run(["sh", "-c", script, "put"], [data, path], stdin=b"", timeout=TIMEOUT)
        if answer.code:
            raise ToolError(
                "the copy failed", code="demo-failed", evidence=answer.stderr.decode(errors="replace")
            )

    def wait(self, *words: str, until: Callable[[str], bool], what: str) -> None:
        """Ask until the answer is right; shows the last one."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            said = self._transport.control(words, stdin=b"", timeout=TIMEOUT).stdout.decode(errors="replace")
            if until(said):
                print("\n".join(f"  {line}" for line in said.rstrip().splitlines()), flush=True)
                return
            time.sleep(1)
        raise ToolError(f"{what} did not come about", code="demo-failed", evidence=said[-400:])


def main() -> int:
    """Tell the story about the image directory named on the command line."""
    image = images.load(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="trustme-demo-") as name:
        try:
            _story(image, Path(name))
        except ToolError as exc:
            print(f"\n{exc.cause} ({exc.code})\n  evidence: {exc.evidence}\n  remedy: {exc.remedy}")
            return 1
    return 0


def _example(image: ImageDirectory, directory: Path) -> BuiltGuestOs:
    recipe = recipes.load(EXAMPLE / "guestos.toml")
    cache = Cache(default_root())
    root = content.build_root(cache, recipe, EXAMPLE / "files", ROOT / "src/trustme_init")
    signer = pki_signer(PkiDirectory(image.pki), "guestos")
    return build_guestos(recipe, root, directory / "store", signer=signer, version=1)


def _story(image: ImageDirectory, directory: Path) -> None:
    _say("The example service is built and signed with the GuestOS key, which the device does not know yet.")
    guest = _example(image, directory)
    print(f"  {guest.name}-{guest.version}")
    _say(f"A new device is switched on: Secure Boot, a TPM ({acceleration.choose().upper()}).")
    firm = firmware.prepare(Cache(default_root()), image.pki)
    with SimulatedDevice("demo", image.disk, firm, directory / "device") as device:
        transport = ConsoleTransport(device.terminal)
        story = Story(transport)
        story.control("list")
        _install(story, image, guest)
        _run(story)
        transport.close()
        device.switch_off()
    _say("Switched off.")


def _install(story: Story, image: ImageDirectory, guest: BuiltGuestOs) -> None:
    config = guest.config_path
    signed = [config.with_suffix(suffix).read_bytes() for suffix in (".conf", ".sig", ".cert")]
    _say("Nobody on the device vouches for its signer: the push is refused.")
    story.control("push_guestos_config", *signed, expect=1)
    _say("An operator registers the anchor; now the same files are taken, and the images sent after them.")
    story.control("ca_register", (image.pki / "guestos_subca.cert").read_bytes())
    for name in ("root.img", "root.hash.img"):
        story.put((guest.image_directory / name).read_bytes(), f"{PUSHED}/{name}")
    story.control("push_guestos_config", *signed, "--stream", PUSHED)
    story.control("list_guestos")


def _run(story: Story) -> None:
    pin = f"{secrets.token_urlsafe(9)}\n".encode()
    _say("A container for it, with a token of its own.")
    story.control("create", CONFIG)
    story.control("start", "example", "--key=", stdin=pin, expect=1)
    story.control("change_pin", "example", stdin=b"\n" + pin + pin)
    _say("A wrong PIN is counted, the right one opens the key of its encrypted volume.")
    story.control("start", "example", "--key=", stdin=b"not-the-pin\n", expect=1)
    _start(story, pin)
    _say("It answers, from inside: a page, and how often it was started.")
    story.control("run", "example", "nopty", "/usr/bin/wget", "-q", "-O", "-", "http://127.0.0.1:8080/")
    _say("Stopping takes the PIN, too. The second start finds what the first one wrote.")
    story.control("stop", "example", "--key=", stdin=pin)
    story.wait("list", until=lambda text: "STOPPED" in text, what="STOPPED")
    _start(story, pin)
    starts = story.control("run", "example", "nopty", "/usr/bin/cat", "/data/starts").stdout.split()
    if starts != [b"2"]:
        raise ToolError("the volume did not remember", code="demo-failed", evidence=repr(starts))


def _start(story: Story, pin: bytes) -> None:
    story.control("start", "example", "--key=", stdin=pin)
    story.wait("list", until=lambda text: "RUNNING" in text.partition("example")[2], what="RUNNING")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
