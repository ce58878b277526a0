# SPDX-License-Identifier: Apache-2.0
"""One virtual machine: QEMU, OVMF with Secure Boot, a software TPM, our image.

The machine's shape is fixed: PCRs 0 to 7 depend on it, and a saved state only fits an equal machine.

    ttyS0  firmware (and a kernel panic)   → serial.log
    hvc0   the boot console                → boot.log
    hvc1   the core container's console    → unix socket, and core.log
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from trustme_tools.errors import ToolError
from trustme_tools.machine import acceleration
from trustme_tools.machine.console import POLL, ConsoleLog, Terminal
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.processes import Child, connect
from trustme_tools.machine.qmp import QmpClient
from trustme_tools.machine.tpm import Tpm
from trustme_tools.tooling import run

MEMORY_MIB: Final = 1024
RUNNING: Final = re.compile(r"^trustme: core container RUNNING\r?\n", re.MULTILINE)
REFUSED: Final = re.compile(r"^trustme: REFUSED stage=(\S+) code=(\S+)", re.MULTILINE)
SCREEN_END: Final = re.compile(r"^trustme: rebooting in", re.MULTILINE)
FIRMWARE_DENIED: Final = re.compile(r"failed to load .*: (Access Denied|Security Violation)")
FIRMWARE_NOTHING: Final = re.compile(r"failed to load .*: Not Found|No bootable option or device was found")

BOOT_TIMEOUT: Final = 240.0
"""Seconds; a boot under TCG takes about 30 on an idle machine."""
SCREEN_TIMEOUT: Final = 5.0
SAVE_TIMEOUT: Final = 60.0
RESTORE_TIMEOUT: Final = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a boot ended: `kind` is running, refused, firmware-denied, firmware-nothing, ended or timeout."""

    kind: str
    detail: str
    seconds: float
    """From power-on, wall clock."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """A machine stopped in the middle: memory and devices, disk, variables and TPM."""

    directory: Path

    @property
    def memory(self) -> Path:
        """QEMU's migration stream; TPM state travels in it."""
        return self.directory / "machine.state"


class VirtualMachine:
    """A machine in its own work directory. Use as a context manager: nothing outlives the block.

    `disk` is a raw image and never written: changes go to an overlay. With `state` the overlay, the
    firmware's variables and the TPM are kept there between runs, otherwise each run is a new device.
    """

    def __init__(
        self,
        disk: Path,
        firmware: Firmware,
        *,
        state: Path | None = None,
        tpm_state: Path | None = None,
        tpm: bool = True,
        cpu: str = "max",
        random_device: bool = True,
        clock: str | None = None,
        oem_strings: Sequence[str] = (),
        accelerator: str | None = None,
        saved: SavedState | None = None,
        spare_console: bool = False,
        name: str = "machine",
    ) -> None:
        self._disk = disk.resolve()
        self._firmware = firmware
        self._kept = state
        self._tpm_state = tpm_state
        self._with_tpm = tpm
        self._cpu = cpu
        self._random_device = random_device
        self._clock = clock
        self._oem_strings = oem_strings
        self._saved = saved
        self._spare_console = spare_console
        self.accelerator = accelerator or acceleration.choose()
        self.name = name
        # Socket paths are limited to 108 bytes: always below the system's short temporary directory.
        self.work = Path(tempfile.mkdtemp(prefix=f"trustme-{name}-"))
        self.boot = ConsoleLog(self.work / "boot.log")
        self.serial = ConsoleLog(self.work / "serial.log")
        self._qemu: Child | None = None
        self._tpm: Tpm | None = None
        self._qmp: QmpClient | None = None
        self._terminal: Terminal | None = None
        self._started = 0.0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether QEMU has not ended."""
        return self._qemu is not None and self._qemu.running

    @property
    def qmp(self) -> QmpClient:
        """QEMU's monitor."""
        if self._qmp is None:
            raise ToolError("the machine is off", code="machine-off")
        return self._qmp

    @property
    def core(self) -> Terminal:
        """The core container's console, attached on first use."""
        if self._terminal is None:
            self._terminal = Terminal(self.work / "core.sock", lambda: self.running)
        return self._terminal

    @property
    def spare_socket(self) -> Path:
        """The other end of hvc2, which the product does not use; there with `spare_console` only."""
        return self.work / "spare.sock"

    @property
    def core_socket(self) -> Path:
        """Where a person's terminal attaches."""
        return self.work / "core.sock"

    def start(self) -> None:
        """Switch on (or go on from the saved state)."""
        keep = self._kept or self.work
        keep.mkdir(parents=True, exist_ok=True)
        overlay, variables = keep / "disk.qcow2", keep / "vars.fd"
        if self._saved is not None:
            run(
                "cp",
                ["--sparse=always", self._saved.directory / "disk.qcow2", overlay],
                purpose="copy the disk",
            )
            shutil.copy(self._saved.directory / "vars.fd", variables)
        if not overlay.exists():
            run(
                "qemu-img",
                ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", self._disk, overlay],
                purpose="make the disk overlay",
            )
        if not variables.exists():
            shutil.copy(self._firmware.variables, variables)
        if self._with_tpm:
            # A saved state carries the TPM's own; the directory is then only where it lives.
            self._tpm = Tpm(self._tpm_state or keep / "tpm", self.work)
        self._started = time.monotonic()
        self._qemu = Child(acceleration.PROGRAM, self._arguments(overlay, variables), self.work / "qemu.log")
        # QEMU answers here only when all its other sockets listen.
        self._qmp = QmpClient(connect(self.work / "qmp.sock", self._qemu))
        if self._saved is not None:
            self.qmp.go_on(RESTORE_TIMEOUT)

    def _arguments(self, overlay: Path, variables: Path) -> list[str | Path]:
        work = self.work
        arguments: list[str | Path] = [
            *("-name", "trustme", "-machine", "q35,smm=on", "-accel", self.accelerator, "-cpu", self._cpu),
            *("-smp", "1", "-m", str(MEMORY_MIB), "-nodefaults", "-no-reboot", "-display", "none"),
            *("-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1"),
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={self._firmware.code}"),
            *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
            *("-drive", f"if=none,id=disk,format=qcow2,file={overlay}"),
            *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
            *("-chardev", f"file,id=serial,path={work}/serial.log", "-serial", "chardev:serial"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"file,id=boot,path={work}/boot.log", "-device", "virtconsole,chardev=boot"),
            "-chardev",
            f"socket,id=core,path={work}/core.sock,server=on,wait=off,logfile={work}/core.log",
            *("-device", "virtconsole,chardev=core"),
            *("-qmp", f"unix:{work}/qmp.sock,server=on,wait=off"),
        ]
        if self._tpm is not None:
            arguments += [
                *("-chardev", f"socket,id=tpm,path={self._tpm.socket}"),
                *("-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm"),
            ]
        if self._spare_console:
            arguments += [
                *("-chardev", f"socket,id=spare,path={self.spare_socket},server=on,wait=off"),
                *("-device", "virtconsole,chardev=spare"),
            ]
        if self._random_device:
            arguments += ["-device", "virtio-rng-pci"]
        if self._clock is not None:
            arguments += ["-rtc", f"base={self._clock}"]
        for text in self._oem_strings:
            arguments += ["-smbios", f"type=11,value={text.replace(',', ',,')}"]
        if self._saved is not None:
            arguments += ["-incoming", f"exec:cat {self._saved.memory}"]
        return arguments

    def wait_boot(self, timeout: float = BOOT_TIMEOUT) -> Outcome:
        """Return when the core runs, something refused, or nothing more is to be expected."""
        deadline = self._started + timeout
        while True:
            outcome = self.look()
            if outcome is not None:
                return outcome
            if time.monotonic() > deadline:
                return self._outcome("timeout", f"no result in {timeout:.0f} s")
            time.sleep(POLL)

    def look(self) -> Outcome | None:
        """Return how the boot ended, None while it goes on."""
        alive = self.running
        boot = self.boot.text
        if RUNNING.search(boot):
            return self._outcome("running", "")
        if refused := REFUSED.search(boot):
            limit = time.monotonic() + SCREEN_TIMEOUT
            while self.running and time.monotonic() < limit and not SCREEN_END.search(self.boot.text):
                time.sleep(POLL)
            return self._outcome("refused", refused[2])
        if "trustme:" not in boot:
            # OVMF speaks on every console it finds, the boot console included.
            serial = self.serial.text + boot
            if denied := FIRMWARE_DENIED.search(serial):
                return self._outcome("firmware-denied", denied[0])
            if nothing := FIRMWARE_NOTHING.search(serial):
                return self._outcome("firmware-nothing", nothing[0])
        if not alive:
            return self._outcome("ended", self._last_words())
        return None

    def _outcome(self, kind: str, detail: str) -> Outcome:
        return Outcome(kind, detail, time.monotonic() - self._started)

    def _last_words(self) -> str:
        panic = re.search(r"Kernel panic.*", self.serial.text + self.boot.text)
        if panic:
            return panic[0]
        return self._qemu.last_words() if self._qemu is not None else ""

    def wait_log(self, pattern: str, timeout: float, *, after: int = 0) -> re.Match[str]:
        """Return the first match in the boot log from offset `after`; ToolError("no-log-line")."""
        compiled = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + timeout
        while not (match := compiled.search(self.boot.text, after)):
            if time.monotonic() > deadline or not self.running:
                raise ToolError(
                    f"the boot console did not show {pattern!r}",
                    code="no-log-line",
                    evidence=self.boot.text[-600:],
                )
            time.sleep(POLL)
        return match

    def save(self, directory: Path) -> SavedState:
        """Stop the machine and write everything it is to `directory`; it does not go on afterwards."""
        directory.mkdir(parents=True)
        saved = SavedState(directory)
        self.qmp.execute("stop")
        # Without a limit the stream is throttled to what suits a network.
        self.qmp.execute("migrate-set-parameters", max_bandwidth=10**10)
        self.qmp.execute("migrate", uri=f"exec:cat > {saved.memory}")
        self.qmp.wait_migrated(SAVE_TIMEOUT)
        keep = self._kept or self.work
        self.qmp.execute("quit")
        if self._qemu is not None:
            self._qemu.wait(10)
        run("cp", ["--sparse=always", keep / "disk.qcow2", directory / "disk.qcow2"], purpose="copy the disk")
        shutil.copy(keep / "vars.fd", directory / "vars.fd")
        (directory / "shape.json").write_text(json.dumps({"cpu": self._cpu, "memory": MEMORY_MIB}))
        return saved

    def wait_off(self, timeout: float) -> None:
        """Return when the machine has switched itself off (a reboot counts); ToolError("still-running")."""
        if self._qemu is not None:
            self._qemu.wait(timeout)

    def cut_power(self) -> None:
        """End the machine at this instant."""
        if self._qemu is not None:
            self._qemu.kill()

    def keep_logs(self, directory: Path) -> None:
        """Copy the console logs to `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        for log in self.work.glob("*.log"):
            shutil.copy(log, directory / f"{self.name}-{log.name}")

    def close(self) -> None:
        """End everything and remove the work directory."""
        if self._terminal is not None:
            self._terminal.close()
            self._terminal = None
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._qemu is not None:
            self._qemu.kill()
        if self._tpm is not None:
            self._tpm.child.end()
        if os.environ.get("TRUSTME_KEEP_WORK") is None:
            shutil.rmtree(self.work, ignore_errors=True)
