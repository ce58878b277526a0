# SPDX-License-Identifier: Apache-2.0
"""The whole boot, natively: the product's PID 1 in namespaces, against swtpm, a disk image and efivars files.

`Device` is one device: its disk, firmware variables and TPM persist over boots. `Device.boot()` gives a
`Boot`, whose console is read like a serial line. What the host kernel lacks (device mapper, cgroup
controllers, partitions on loop devices) comes from `adapters.py` and `loopblock.py`.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.serialization import Encoding

from tests.integration import core_root
from tests.integration.software_tpm import SoftwareTpm, die_with_parent
from trustme_init.compartments.spec import CORE_UUID
from trustme_init.control.client import ControlClient
from trustme_init.firmware import siglist
from trustme_init.proto.control_pb2 import ControllerToDaemon, DaemonToController
from trustme_init.storage import layout
from trustme_tools.guestos import recipe as recipes
from trustme_tools.guestos.build import build_guestos
from trustme_tools.guestos.signing import pki_signer
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.directory import PkiDirectory

HERE = Path(__file__).resolve().parent
GLOBAL_VARIABLE = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
SECURITY_DATABASE = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
MIB = 1024 * 1024
OWNER = "5f1b5b0e-9d6e-4a57-8f6f-0d5a5d6b1a11"
RUNNING = "core container RUNNING"

POLICY = """version = 1
development = {development}
build_date = 2026-01-01T00:00:00Z
hardware = "x86"
[core]
guest_os = "trustme-coreos"
start_timeout_s = {start_timeout}
memory_max_mib = 512
pids_max = 256
[platform]
allow_insecure_boot = {insecure}
allow_missing_tpm = {no_tpm}
[devices]
timeout_s = 1
modules = []
[provisioning]
require = {require}
device_key = "{device_key}"
pin_tries = 10
self_provisioning = {self_provisioning}
[containers]
allow_unsigned_configs = {unsigned_configs}
start_timeout_s = {container_start_timeout}
pids_max = 256
"""


@dataclass(frozen=True)
class Factory:
    """Made once per session: development keys, and a store with one signed core GuestOS."""

    directory: Path
    pki: PkiDirectory
    store: Path
    root: Path

    @classmethod
    def make(cls, directory: Path) -> Factory:
        """Build everything a device is made from."""
        pki = create(directory / "pki", algorithm=Algorithm.P384, development=True)
        root = directory / "root"
        root.mkdir()
        core_root.build(root)
        factory = cls(directory, pki, directory / "store", root)
        factory.build_core(factory.store, version=10)
        return factory

    def certificate(self, name: str) -> bytes:
        """Return a certificate of the PKI, DER."""
        return self.pki.certificate(name).public_bytes(Encoding.DER)

    def build_core(self, store: Path, *, version: int, root: Path | None = None) -> None:
        """Add a version of the core GuestOS to `store`."""
        recipe = recipes.load(core_root.RECIPE / "guestos.toml")
        build_guestos(
            recipe,
            root or self.root,
            store,
            signer=pki_signer(self.pki),
            version=version,
            epoch=1_770_000_000,
        )


def efi_variable(attributes: int, data: bytes) -> bytes:
    """Return a variable as efivarfs shows it."""
    return struct.pack("<I", attributes) + data


@dataclass
class Device:
    """One device; change its parts between boots."""

    factory: Factory
    directory: Path
    policy: dict[str, Any] = field(default_factory=dict)
    with_core_console: bool = False
    tcti: str | None = None
    """Another address than the device's own swtpm."""
    init: tuple[str | Path, ...] = (sys.executable, "-X", "faulthandler", HERE / "sandbox_init.py")
    """What is started as PID 1, with the JSON file of places as its argument."""

    def __post_init__(self) -> None:
        self.efivars = self.directory / "efivars"
        self.efivars.mkdir(parents=True)
        self.disk = self.directory / "disk.img"
        self.policy_file = self.directory / "policy.toml"
        self.set_firmware()
        self.write_policy()

    def write_policy(self, **changes: Any) -> None:
        """Write the policy file the signed boot image would carry."""
        self.policy |= changes
        values = {
            "development": "false",
            "insecure": "false",
            "no_tpm": "false",
            "start_timeout": 60,
            "require": json.dumps(["device-certificate", "device-anchor", "guest-anchor", "token"]),
            "device_key": "ecc-p256",
            "self_provisioning": "false",
            "unsigned_configs": "false",
            "container_start_timeout": 60,
        }
        self.policy_file.write_text(POLICY.format(**{**values, **self.policy}))

    def set_firmware(
        self, *, secure_boot: int = 1, setup_mode: int = 0, db: bytes | None = None, dbx: bytes = b""
    ) -> None:
        """Write what the firmware would report; `db` defaults to the software-signing sub CA."""
        if db is None:
            db = x509_list(self.factory.certificate("ssig_subca"))
        write = self._write_variable
        write("SecureBoot", GLOBAL_VARIABLE, 0x6, bytes([secure_boot]))
        write("SetupMode", GLOBAL_VARIABLE, 0x6, bytes([setup_mode]))
        write("db", SECURITY_DATABASE, 0x27, db)
        write("dbx", SECURITY_DATABASE, 0x27, dbx)

    def _write_variable(self, name: str, guid: str, attributes: int, data: bytes) -> None:
        (self.efivars / f"{name}-{guid}").write_bytes(efi_variable(attributes, data))

    def make_disk(self, store: Path | None = None, *, size_mib: int = 640, store_mib: int = 192) -> None:
        """Partition a disk image and fill the store: 16 MiB ESP, store, the rest free."""
        content = store or self.factory.store
        partition = self.directory / "store.ext4"
        partition.unlink(missing_ok=True)
        with partition.open("wb") as file:
            file.truncate(store_mib * MIB)
        subprocess.run(
            ["mke2fs", "-q", "-t", "ext4", "-L", "trustme-store", "-d", content, partition], check=True
        )
        self.disk.unlink(missing_ok=True)
        with self.disk.open("wb") as file:
            file.truncate(size_mib * MIB)
        script = (
            "label: gpt\n"
            f"start=1MiB, size=16MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=boot\n"
            f"size={store_mib}MiB, type={layout.STORE_TYPE}, name={layout.STORE_NAME}\n"
        )
        subprocess.run(["sfdisk", "-q", self.disk], input=script, text=True, check=True)
        with self.disk.open("r+b") as disk, partition.open("rb") as source:
            disk.seek(17 * MIB)
            shutil.copyfileobj(source, disk, MIB)
        partition.unlink()

    def boot(self) -> Boot:
        """Start the device; use as a context manager."""
        if not self.disk.exists():
            self.make_disk()
        return Boot(self)


def x509_list(*certificates: bytes) -> bytes:
    """Return one EFI_SIGNATURE_LIST per certificate (DER), as firmware keeps them."""
    return siglist.serialize_signature_lists(
        siglist.SignatureList(
            siglist.EFI_CERT_X509, b"", 16 + len(certificate), (siglist.Signature(OWNER, certificate),)
        )
        for certificate in certificates
    )


class Boot:
    """One boot of a sandboxed device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.lines: list[str] = []
        self._partial = b""
        self._cgroup = f"trustme-sandbox-{uuid.uuid4()}"

    def __enter__(self) -> Self:
        work = self.device.directory / "work"
        shutil.rmtree(work, ignore_errors=True)
        (work / "sysfs").mkdir(parents=True)
        (work / "data").mkdir()
        console = work / "console"
        os.mkfifo(console)
        self._console = os.open(console, os.O_RDONLY | os.O_NONBLOCK)
        self._core_master, core_slave = pty.openpty()
        self._tpm = SoftwareTpm(self.device.directory)
        self._tpm.__enter__()
        places = {
            "work": str(work),
            "efivars": str(self.device.efivars),
            "policy": str(self.device.policy_file),
            "console": str(console),
            "core_console": os.ttyname(core_slave) if self.device.with_core_console else "",
            "tcti": self.device.tcti or self._tpm.tcti,
            "disk": str(self.device.disk),
            "cgroup": self._cgroup,
        }
        os.close(core_slave)
        settings = work / "places.json"
        settings.write_text(json.dumps(places))
        self.started = time.monotonic()
        stderr = os.open(work / "stderr", os.O_WRONLY | os.O_CREAT)
        self.process = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--ipc", "--uts", "--net", "--fork", "--kill-child"),
                *(*self.device.init, settings),
            ],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, no threads
        )
        os.close(stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            pid = self.init_pid()
            if pid is not None:
                os.kill(pid, signal.SIGKILL)  # ends the PID namespace and with it every mount and process
            else:
                self.process.kill()
        self.process.wait(30)
        self._remove_cgroups()
        self._read(0)
        os.close(self._console)
        os.close(self._core_master)
        self._tpm.__exit__(kind, value, trace)

    def _remove_cgroups(self) -> None:
        """Remove what the sandbox made in the host's cgroup tree, where that is mounted here at all."""
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        for root in {Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"}:
            group = root / self._cgroup
            for directory in sorted(group.rglob("*/"), reverse=True):
                directory.rmdir()
            if group.exists():
                group.rmdir()

    @property
    def tpm(self) -> SoftwareTpm:
        """The device's TPM during this boot."""
        return self._tpm

    def stderr(self) -> str:
        """Return what the sandboxed processes said outside the console."""
        return (self.device.directory / "work/stderr").read_text()

    def init_pid(self) -> int | None:
        """Return the sandbox's PID 1 in the host's numbering."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def wait_for(self, pattern: str, timeout: float = 30) -> str:
        """Return the first console line that matches; AssertionError with all lines after `timeout` s."""
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            for line in self.lines[seen:]:
                if re.search(pattern, line):
                    return line
            seen = len(self.lines)
            left = deadline - time.monotonic()
            ended = self.process.poll() is not None
            if ended or left <= 0:
                self._read(0)
                if seen != len(self.lines):
                    continue
                text = "\n".join(self.lines)
                raise AssertionError(f"{pattern!r} not seen (ended: {ended})\n{text}\n{self.stderr()}")
            self._read(min(left, 0.2))

    def wait_running(self) -> None:
        """Wait until the core container reported that it is up."""
        self.wait_for(RUNNING)

    def refusal(self, timeout: float = 30) -> str:
        """Return the code of the failure screen, waiting for its last line."""
        line = self.wait_for("REFUSED stage=", timeout)
        self.wait_for("rebooting in 10 s", 5)
        return line.rpartition("code=")[2]

    def wait_end(self, timeout: float = 30) -> int:
        """Return how the sandbox ended: SIGHUP is a reboot, SIGINT a power-off (see reboot(2))."""
        status = self.process.wait(timeout)
        return status - 128 if status > 128 else -status

    def path(self, inside: str) -> Path:
        """Return a path of the sandbox as seen from here."""
        return Path(f"/proc/{self.init_pid()}/root{inside}")

    @property
    def report(self) -> dict[str, Any]:
        """The boot report as it is now."""
        report: dict[str, Any] = json.loads(self.path("/run/trustme/boot.json").read_bytes())
        return report

    def control(self) -> ControlClient:
        """Connect to the control socket from outside, as root."""
        return ControlClient(self.path(f"/run/trustme/compartments/{CORE_UUID}/socket/cml-control"))

    def ask(self, command: ControllerToDaemon.Command.ValueType) -> DaemonToController:
        """Send one command over a connection of its own and return the reply."""
        with self.control() as control:
            return control.request(ControllerToDaemon(command=command))

    def data(self, inside: str) -> Path:
        """Return a path of the data volume as seen from here."""
        return self.path(str(self.device.directory / "work/data")) / inside

    def wait_prepared(self) -> str:
        """Wait until the device is ready to be provisioned; return its UUID."""
        return self.wait_for(r"is ready to be provisioned").split()[2]

    def request(self, command: ControllerToDaemon.Command.ValueType, **fields: Any) -> DaemonToController:
        """Send one request over a connection of its own and return the reply."""
        with self.control() as control:
            return control.request(ControllerToDaemon(command=command, **fields))

    def processes(self) -> dict[int, str]:
        """Return host pid → command line of every process in the sandbox, containers included."""
        found = {}
        todo = [self.init_pid()]
        while todo:
            pid = todo.pop()
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if pid is not None:
                found[pid] = line
            todo += map(int, children)
        return found

    def core_pid(self) -> int:
        """Return the host's pid of the core container's init."""
        pid: int = next(pid for pid, line in self.processes().items() if "cservice" in line)
        return pid

    def manager_pid(self) -> int:
        """Return the manager's pid: PID 1's child in its own PID namespace (the core has another one)."""
        init = self.init_pid()
        own = Path(f"/proc/{init}/ns/pid").readlink()
        children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        return next(int(pid) for pid in children if Path(f"/proc/{pid}/ns/pid").readlink() == own)

    def _read(self, timeout: float) -> None:
        if timeout:
            select.select([self._console], [], [], timeout)
        try:
            while data := os.read(self._console, 65536):
                self._partial += data
        except BlockingIOError:
            pass
        *whole, self._partial = self._partial.split(b"\n")
        self.lines += [line.decode() for line in whole]
        if not self.lines and timeout:
            # A FIFO without a writer reads as end of file, at once: do not spin on it.
            time.sleep(0.005)
