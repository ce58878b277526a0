# SPDX-License-Identifier: Apache-2.0
"""Containers on a natively booted device: a GuestOS to run, configurations, and how to ask for things."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration import core_root
from tests.integration.sandbox import Boot, Device, Factory
from trustme_init.proto.container_pb2 import ContainerState, ContainerStatus
from trustme_init.proto.control_pb2 import ContainerStartParams, DaemonToController
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request
from trustme_tools.guestos import recipe as recipes
from trustme_tools.guestos.build import build_guestos
from trustme_tools.guestos.signing import pki_signer, signed

DEVELOPMENT = {
    "development": "true",
    "self_provisioning": "true",
    "unsigned_configs": "true",
    "require": '["device-certificate", "token"]',
}
"""Policy of a build that provisions itself."""
GUEST_OS = "exampleos"
VERSION = 7
VOLUME = "state"
"""Of the GuestOS, lasting, at /data."""
VOLUME_MIB = 12
PIN = "a pin for containers"

Reply = DaemonToController


def build_guest_os(factory: Factory, store: Path, *, version: int = VERSION, name: str = GUEST_OS) -> None:
    """Put a GuestOS into `store`, which will have `operatingsystems`: the core's, with a lasting volume."""
    core = recipes.load(core_root.RECIPE / "guestos.toml")
    mounts = (
        next(mount for mount in core.mounts if mount.mount_point == "/"),
        recipes.Mount(VOLUME, "/data", "ext4", "EMPTY", def_size=VOLUME_MIB, max_size=64),
    )
    build_guestos(
        dataclasses.replace(core, name=name, mounts=mounts, def_ram_limit=256),
        factory.root,
        store,
        signer=pki_signer(factory.pki),
        version=version,
        epoch=1_770_000_000,
    )


def config(name: str, *lines: str, token: str = "SOFT") -> bytes:  # noqa: S107 - a kind of token
    """Return the text of a container's configuration."""
    text = [f'name: "{name}"', f'guest_os: "{GUEST_OS}"', f"token_type: {token}", *lines]
    return "\n".join(text).encode() + b"\n"


def sign(factory: Factory, text: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the three parts of a signed configuration."""
    return (text, *signed(pki_signer(factory.pki), text))


@dataclass
class Operator:
    """Who gives orders to a booted device."""

    boot: Boot

    def install(self, store: Path) -> None:
        """Put GuestOSes onto the data volume, as an installation leaves them."""
        home = self.boot.data("cml/operatingsystems")
        shutil.copytree(store / "operatingsystems", home, dirs_exist_ok=True)

    def create(self, *parts: bytes) -> Reply:
        """CREATE_CONTAINER, with one part or three."""
        return self.boot.request(Request.CREATE_CONTAINER, **_triple(parts))

    def created(self, *parts: bytes) -> str:
        """Create a container; return its UUID."""
        reply = self.create(*parts)
        assert reply.code == Reply.CONTAINER_CONFIG, reply
        assert len(reply.container_uuids) == len(reply.container_configs) == 1, reply
        return reply.container_uuids[0]

    def update(self, uuid: str, *parts: bytes) -> Reply:
        """CONTAINER_UPDATE_CONFIG."""
        return self.boot.request(Request.CONTAINER_UPDATE_CONFIG, container_uuids=[uuid], **_triple(parts))

    def change_pin(self, uuid: str, old: str, new: str) -> str:
        """CONTAINER_CHANGE_TOKEN_PIN; the name of the response."""
        return self.said(Request.CONTAINER_CHANGE_TOKEN_PIN, uuid, device_pin=old, device_newpin=new)

    def start(self, uuid: str, pin: str | None = None) -> str:
        """CONTAINER_START; the name of the response."""
        return self.said(Request.CONTAINER_START, uuid, **_params(pin))

    def stop(self, uuid: str, pin: str | None = None) -> str:
        """CONTAINER_STOP; the name of the response."""
        return self.said(Request.CONTAINER_STOP, uuid, **_params(pin))

    def said(self, command: Request.Command.ValueType, uuid: str, **fields: Any) -> str:
        """Ask for something about one container; the name of the response."""
        reply = self.boot.request(command, container_uuids=[uuid], **fields)
        assert reply.code == Reply.RESPONSE, reply
        return Reply.Response.Name(reply.response)

    def status(self, uuid: str) -> ContainerStatus:
        """GET_CONTAINER_STATUS of one container."""
        (found,) = self.boot.request(Request.GET_CONTAINER_STATUS, container_uuids=[uuid]).container_status
        return found

    def names(self) -> list[str]:
        """Return the names of all containers."""
        return [each.name for each in self.boot.ask(Request.GET_CONTAINER_STATUS).container_status]

    def wait_state(self, uuid: str, state: str, timeout: float = 60) -> ContainerStatus:
        """Wait until a container is in a state."""
        deadline = time.monotonic() + timeout
        while ContainerState.Name((found := self.status(uuid)).state) != state:
            assert time.monotonic() < deadline, f"{found}\n{self.logs()}"
            time.sleep(0.02)
        return found

    def run(self, uuid: str, pin: str | None = None) -> None:
        """Start a container and wait until it runs."""
        assert self.start(uuid, pin) == "CONTAINER_START_OK", self.logs()
        self.wait_state(uuid, "RUNNING")

    def halt(self, uuid: str, pin: str | None = None) -> None:
        """Stop a container and wait until it has."""
        assert self.stop(uuid, pin) == "CONTAINER_STOP_OK", self.logs()
        self.wait_state(uuid, "STOPPED")

    def init_of(self, uuid: str) -> int:
        """Return the host's pid of a container's init."""
        groups = Path(f"/proc/{self.boot.init_pid()}/root/sys/fs/cgroup")
        (procs,) = groups.glob(f"*/trustme/{uuid}/cgroup.procs")
        wanted = set(self.boot.processes())
        return min(pid for pid in map(int, procs.read_text().split()) if pid in wanted)

    def root_of(self, uuid: str) -> Path:
        """Return the root directory of a running container, as seen from here."""
        return Path(f"/proc/{self.init_of(uuid)}/root")

    def write(self, uuid: str, path: str, text: str) -> None:
        """Write a file of a running container as its root: nobody else has an id there."""
        place = self.root_of(uuid) / path
        folder = os.open(place.parent, os.O_PATH)
        owner = os.fstat(folder).st_uid
        os.setegid(owner)
        os.seteuid(owner)
        try:
            fd = os.open(place.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=folder)
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.close(folder)
        with os.fdopen(fd, "w") as file:
            file.write(text)

    def read(self, uuid: str, path: str) -> str:
        """Return a file of a running container."""
        return (self.root_of(uuid) / path).read_text()

    def hostname(self, uuid: str) -> str:
        """Return the host name inside a running container."""
        command = ["nsenter", f"--uts=/proc/{self.init_of(uuid)}/ns/uts", "uname", "-n"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def wait_log(self, text: str, timeout: float = 30) -> None:
        """Wait until the device's log has a line with this text."""
        deadline = time.monotonic() + timeout
        while not any(text in path.read_text() for path in self.boot.path("/run/trustme/log").glob("*.log")):
            assert time.monotonic() < deadline, f"{text!r} not seen\n{self.logs()}"
            time.sleep(0.02)

    def reboot(self) -> None:
        """Have the device reboot in order, and wait until it has gone down."""
        assert self.boot.ask(Request.REBOOT_DEVICE).response == Reply.CMD_OK
        assert self.boot.wait_end(90) == signal.SIGHUP

    def logs(self) -> str:
        """Return the console and whatever else was said."""
        self.boot._read(0)
        texts = [path.read_text() for path in self.boot.path("/run/trustme/log").glob("*.log")]
        return "\n".join(["", *self.boot.lines[-40:], *texts, self.boot.stderr()])


@contextmanager
def booted(device: Device, store: Path | None = None) -> Iterator[Operator]:
    """Boot a device, put the GuestOSes of `store` on it, and wait until it can be used."""
    with device.boot() as boot:
        boot.wait_running()
        operator = Operator(boot)
        if store is not None:  # the first time: an orderly reboot completes provisioning
            boot.wait_prepared()
            operator.install(store)
        yield operator


def resources(boot: Boot) -> dict[str, object]:
    """Return what a start takes and an end gives back, as it is now."""
    manager = boot.manager_pid()
    init = boot.init_pid()
    cgroups = Path(f"/proc/{init}/root/sys/fs/cgroup").glob(f"{boot._cgroup}/trustme/*")
    return {
        "mounts": len(Path(f"/proc/{manager}/mountinfo").read_text().splitlines()),
        "processes": len([line for line in boot.processes().values() if "sandbox_init" not in line]),
        "cgroups": sorted(path.name for path in cgroups if path.is_dir()),
        "loop devices": sorted(_own_loops(boot)),
        "runtime directories": sorted(p.name for p in boot.path("/run/trustme/compartments").iterdir()),
    }


def descriptors(boot: Boot) -> int:
    """Return how many descriptors the manager has open; fewer when the vault has ended, being idle."""
    return len(list(Path(f"/proc/{boot.manager_pid()}/fd").iterdir()))


def _own_loops(boot: Boot) -> list[str]:
    """Return what the loop devices of this device are of."""
    files = (path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file"))
    return [text.strip() for text in files if str(boot.device.directory) in text]


def settle(condition: Callable[[], bool], told: Callable[[], str], timeout: float = 30) -> None:
    """Wait until a condition holds: what the kernel gives back, it gives back in its own time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def _triple(parts: tuple[bytes, ...]) -> dict[str, bytes]:
    names = ("container_config_file", "container_config_signature", "container_config_certificate")
    return dict(zip(names, parts, strict=False))


def _params(pin: str | None) -> dict[str, ContainerStartParams]:
    return {} if pin is None else {"container_start_params": ContainerStartParams(key=pin)}


MakeDevice = Callable[..., Device]
