# SPDX-License-Identifier: Apache-2.0
"""The device through and after the hand-off: event loop, core compartment, control interface.

Everything here happens between two turns of one loop. What the control handlers may see and ask is the
`DeviceState` of `control/state.py`, which `Device` implements.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trustme_init.boot.early import KernelMount, forbid_module_autoload, mount_kernel_filesystems
from trustme_init.boot.report import RESULT_RUNNING, RESULT_STARTED
from trustme_init.boot.stats import device_stats
from trustme_init.compartments import lifecycle
from trustme_init.compartments.lifecycle import KILL_TIMEOUT, STOP_TIMEOUT, Compartment, State
from trustme_init.compartments.spec import CORE_UUID, CompartmentSpec, from_config
from trustme_init.control.dispatch import Dispatcher
from trustme_init.control.loop import Loop, Timer
from trustme_init.control.server import ControlServer
from trustme_init.control.service import ServiceCallbacks, ServiceServer
from trustme_init.control.state import Answered, ContainerView, DeviceStatsView, GuestOsView, LogFile
from trustme_init.control.throttle import ThrottledLog
from trustme_init.errors import CompartmentRefusal, DeviceRefusal, Refusal
from trustme_init.linux.files import write_atomic
from trustme_init.linux.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, umount
from trustme_init.proto.container_pb2 import ContainerState
from trustme_init.provisioning.layout import Layout
from trustme_init.provisioning.marker import decide
from trustme_init.provisioning.mode import Mode, ModeFact
from trustme_init.provisioning.vault import Outcome, Vault
from trustme_init.trust.guestos import images_of, parse_config
from trustme_init.trust.selection import GuestOsId

if TYPE_CHECKING:
    from trustme_init.boot.console import Console
    from trustme_init.boot.core import CoreFact
    from trustme_init.boot.fleet import Fleet
    from trustme_init.boot.installation import Installations
    from trustme_init.boot.report import BootReport
    from trustme_init.machine import Machine, NetworkBackend
    from trustme_init.policy import Policy
    from trustme_init.proto.guestos_pb2 import GuestOSConfig
    from trustme_init.provisioning.service import ProvisioningService

CONTROL_SOCKET: Final = "cml-control"
SERVICE_SOCKET: Final = "cml-service"
CORE_CONFIG: Final = "core.conf"
"""The verified configuration, kept below `machine.run` for a manager that resumes."""
REBOOT: Final = "reboot"
CONTAINER_LOG_LIMIT: Final = 8 * 1024 * 1024
"""Bytes of what containers write to their standard output, all of them together."""


@dataclass(frozen=True, slots=True)
class HandoffFact:
    """The started core compartment; `phases` in milliseconds."""

    uuid: str
    pid: int
    phases: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the boot report's form."""
        return {"handoff": {"uuid": self.uuid, "pid": self.pid, "phases_ms": self.phases}}


def clean_slate(machine: Machine) -> None:
    """Undo what a manager left that died during the boot, so that the stages can run again."""
    lifecycle.clear(CORE_UUID, machine)
    for volume in (machine.data, machine.store):
        with suppress(OSError):
            umount(str(volume))


def bound_container_logs(machine: Machine) -> None:
    """Give the logs that containers write a file system of their own: a flood fills that and nothing else."""
    options = f"mode=0700,nr_inodes=256,size={CONTAINER_LOG_LIMIT}"
    table = (KernelMount("tmpfs", machine.compartment_log_dir, MS_NOSUID | MS_NODEV | MS_NOEXEC, options),)
    try:
        mount_kernel_filesystems(table)
    except OSError as exc:
        raise DeviceRefusal(
            "log-unavailable",
            "there is no place for the logs of containers",
            evidence=f"{exc.filename}: {exc.strerror}",
            remedy="the kernel of this base system lacks tmpfs; flash a complete image",
        ) from exc


class Device:
    """What the manager serves. Refusals that end the boot leave `serve` as exceptions."""

    def __init__(self, machine: Machine, policy: Policy, console: Console, report: BootReport) -> None:
        self._machine = machine
        self._policy = policy
        self._console = console
        self._report = report
        self._loop = Loop()
        self._core: Compartment | None = None
        self._core_config: GuestOSConfig | None = None
        self._mode: ModeFact | None = None
        self._service: ServiceServer | None = None
        self._deadline: Timer | None = None
        self._outcome: str | None = None
        self._vault = Vault(self._loop, self._make_service)
        self._vault_log = ThrottledLog(console.note, "vault")
        self._dispatcher = Dispatcher(self, log=console.note)
        self._rebooting = False

    # The two ways in: a first hand-off, or a restarted manager.

    def hand_over(self, core: CoreFact, mode: ModeFact) -> HandoffFact:
        """Serve the core's sockets and start it from its verified images."""
        config = core.verified.config
        spec = from_config(config, core.verified.images, self._policy, self._machine)
        self._serve_sockets(spec, config, mode)
        bound_container_logs(self._machine)
        compartment = Compartment(spec, self._machine)
        running = compartment.start(core.directory)
        forbid_module_autoload()
        os.close(core.directory)
        write_atomic(self._machine.run / CORE_CONFIG, core.config_text, 0o600)
        self._report.result = RESULT_STARTED
        self._watch(compartment)
        return HandoffFact(spec.uuid, running.pid, running.phases)

    def resume(self) -> None:
        """Adopt the core that an earlier manager of this boot started.

        CompartmentRefusal("core-lost") if it is not there any more.
        """
        # Verified by the manager that wrote it, in a directory that only root of this namespace can write.
        config = parse_config((self._machine.run / CORE_CONFIG).read_bytes())
        spec = from_config(config, images_of(config.mounts), self._policy, self._machine)
        compartment = Compartment(spec, self._machine)
        if not compartment.adopt():
            raise CompartmentRefusal(
                "core-lost",
                "the core container ended while no manager was there",
                evidence=f"manager start {self._report.manager_starts}",
                remedy="read the core container's log of this boot",
            )
        self._serve_sockets(spec, config, self._mode_now())
        self._watch(compartment)
        self.guests.resume()

    def _mode_now(self) -> ModeFact:
        """Decide the mode anew, as the stages do: what an earlier manager knew may have changed since."""
        from trustme_init.boot.devices import start_measurer
        from trustme_init.boot.storage import read_marker

        measurer = start_measurer(self._machine)
        if measurer is None:
            if not self._policy.allows_missing_tpm:
                raise DeviceRefusal("tpm-missing", "the TPM is gone", remedy="restart the device")
            return decide(None, self._machine.data)
        with measurer:
            return decide(read_marker(measurer), self._machine.data)

    def serve(self) -> str:
        """Run until the device is to be rebooted; return REBOOT."""
        while self._outcome is None:
            self._loop.turn()
        self.installations.close()
        self._vault.close()
        self._report.write(self._machine.report)
        return self._outcome

    def _serve_sockets(self, spec: CompartmentSpec, config: GuestOSConfig, mode: ModeFact) -> None:
        """Bind both sockets before the core exists, so that its first connection finds them."""
        self._mode = mode
        self._core_config = config
        spec.socket_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        log = self._console.note
        ControlServer(
            self._loop,
            spec.socket_dir / CONTROL_SOCKET,
            self._dispatcher,
            uid=spec.uid_base,
            gid=spec.uid_base,
            privileged=True,
            log=log,
        )
        self._service = ServiceServer(
            self._loop,
            spec.socket_dir / SERVICE_SOCKET,
            ServiceCallbacks(boot_completed=self._booted, name=lambda: spec.name, dns=lambda: ""),
            uid=spec.uid_base,
            gid=spec.uid_base,
            log=log,
        )

    def _watch(self, compartment: Compartment) -> None:
        """Take the core over in the state it is in: just started, or as an earlier manager left it."""
        self._core = compartment
        running = compartment.running
        if running is None:
            raise CompartmentRefusal("core-lost", "the core container has no init to watch")
        self._loop.add_reader(running.pidfd, self._ended)
        if compartment.state is State.SHUTDOWN:
            self._stop_within(STOP_TIMEOUT)
            if self._service is not None:
                self._service.shutdown()  # told to the first who connects; twice does no harm
        elif compartment.state is not State.RUNNING:
            self._deadline = self._loop.call_later(self._policy.core_start_timeout, self._start_timed_out)

    # What happens to the core.

    def _booted(self) -> None:
        core = self._core
        if core is None or core.state not in (State.BOOTING, State.RUNNING):
            return
        core.booted()
        self._clear_deadline()
        self._announce()

    def _announce(self) -> None:
        """Say once in a boot that the core runs, also when the manager that learnt it did not get to it."""
        if self._report.result == RESULT_RUNNING:
            return
        self._report.result = RESULT_RUNNING
        self._report.facts["running_ms"] = round(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000, 1)
        self._report.write(self._machine.report)
        self._console.line("core container RUNNING")
        self._prepare()

    def _start_timed_out(self) -> None:
        if self._core is not None:
            self._core.kill()
        raise CompartmentRefusal(
            "core-start-timeout",
            "the core container did not report that it has booted",
            evidence=f"no BOOT_COMPLETED in {self._policy.core_start_timeout:.0f} s",
            remedy="read the core container's log; check that its init speaks the service protocol",
        )

    def _ended(self) -> None:
        core = self._core
        if core is None or core.running is None:
            return
        self._loop.remove(core.running.pidfd)
        expected = core.state is State.SHUTDOWN
        status = core.ended()
        self._clear_deadline()
        if not expected:
            raise CompartmentRefusal(
                "core-ended",
                "the core container ended by itself",
                evidence="exit status unknown" if status is None else f"exit status {status}",
                remedy="read the core container's log of this boot",
            )
        self._console.line("core container stopped")
        self._outcome = REBOOT

    def _stop_within(self, seconds: float) -> None:
        self._clear_deadline()
        self._deadline = self._loop.call_later(seconds, self._stop_expired)

    def _stop_expired(self) -> None:
        """Kill the core; if it survives even that, inside the kernel, the device reboots all the same."""
        if self._core is not None:
            self._core.expired()
        self._deadline = self._loop.call_later(KILL_TIMEOUT, self._reboot_anyway)

    def _reboot_anyway(self) -> None:
        self._console.line("core container does not end; rebooting all the same")
        self._outcome = REBOOT

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # Provisioning: what the vault is given to do.

    def _make_service(self) -> ProvisioningService:
        """Run in the vault's process: what it needs is imported and read there."""
        from trustme_init.boot import platform
        from trustme_init.provisioning.service import ProvisioningService, Surroundings

        mode = self._known_mode()
        return ProvisioningService(
            Surroundings(
                data=self._machine.data,
                tcti=self._machine.tcti if mode.from_tpm else None,
                policy=self._policy,
                core_anchors=platform.read(self._machine.efivars, self._policy).anchors,
                mode=mode,
                measurement_log=self._machine.measurement_log,
                volumes=self._machine.volumes,
            )
        )

    def _prepare(self) -> None:
        """Have made what a device in provisioning needs, or finished what a power cut came into."""
        provisioning = self._known_mode().mode is Mode.PROVISIONING
        # In operation this also compares the disk with the history that the TPM keeps: it shows at once.
        self.vault("prepare" if provisioning else "settle", {}, self._prepared)

    def _prepared(self, result: Mapping[str, Any], refusal: Refusal | None) -> None:
        if refusal is not None:
            self._console.line(f"provisioning: {refusal}")
        elif "device_uuid" in result:
            self._console.line(f"device {result['device_uuid']} is ready to be provisioned")
        if refusal is None:
            self.installations.tidy()
        self.guests.begin()

    def vault(self, operation: str, arguments: Mapping[str, str | bytes], done: Answered) -> None:
        """Have the vault do something; a completion changes the mode before anybody hears of it."""

        def answered(outcome: Outcome) -> None:
            if outcome.refusal is not None:
                self._vault_log(f"{operation}: {outcome.refusal}")
                if operation == "complete":
                    # It may have failed behind the point of no return: the vault asks the TPM how it stands.
                    self._vault.submit("status", {}, self._looked_again)
            elif operation == "complete":
                self._completed(outcome.result)
            done(outcome.result, outcome.refusal)

        self._vault.submit(operation, arguments, answered)

    def _looked_again(self, outcome: Outcome) -> None:
        said = outcome.result
        if outcome.refusal is None and said["completed"] and self.mode() is Mode.PROVISIONING:
            self._completed({"source": said["marker"], "record_sha256": said["record_sha256"]})

    def _completed(self, result: Mapping[str, Any]) -> None:
        self._mode = ModeFact(
            Mode.OPERATIONAL,
            "provisioning was completed",
            str(result["source"]),
            bytes.fromhex(result["record_sha256"]),
        )
        self._report.facts.update(self._mode.as_dict())
        self._report.write(self._machine.report)
        self._console.line("provisioning completed: operational mode")

    def _known_mode(self) -> ModeFact:
        if self._mode is None:
            raise DeviceRefusal("mode-unknown", "the mode was asked for before it was decided")
        return self._mode

    # DeviceState: what the control handlers see.

    def mode(self) -> Mode:
        """Return the present mode."""
        return self._known_mode().mode

    def containers(self) -> Sequence[ContainerView]:
        """Return the core, then the others."""
        core, config = self._core, self._core_config
        if core is None or config is None:
            return ()
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME) - core.started_at if core.started_at else 0
        return (
            ContainerView(
                uuid=core.spec.uuid,
                name=core.spec.name,
                state=ContainerState.ValueType(core.state),
                guest_os=config.name,
                created=int(time.time() - uptime),
                uptime=int(uptime),
                guestos_version=config.version,
                ram_limit=core.spec.memory_max // (1024 * 1024),
                init_env=tuple(config.init_env),
            ),
            *self.guests.views(),
        )

    def container(self, uuid: str) -> ContainerView | None:
        """Return one container."""
        return next((view for view in self.containers() if view.uuid == uuid), None)

    def compartment(self, uuid: str) -> Compartment | None:
        """Return the compartment of a container; None where none runs."""
        if self._core is not None and uuid == self._core.spec.uuid:
            return self._core
        return self.guests.compartment(uuid)

    @cached_property
    def guests(self) -> Fleet:
        """Return the containers beside the core. Imported here: the core starts without waiting for it."""
        from trustme_init.boot.fleet import Fleet
        from trustme_init.boot.fleet_guest import Around

        around = Around(
            loop=self._loop,
            machine=self._machine,
            dispatcher=self._dispatcher,
            start_timeout=self._policy.container_start_timeout,
            pids_max=self._policy.container_pids_max,
            log=ThrottledLog(self._console.note, "fleet"),
        )
        return Fleet(around, self.vault)

    @property
    def loop(self) -> Loop:
        """Return the loop of this process."""
        return self._loop

    @property
    def network(self) -> NetworkBackend:
        """Return what moves interfaces."""
        return self._machine.network

    @cached_property
    def installations(self) -> Installations:
        """Return what installs GuestOSes; imported here, as `guests`."""
        from trustme_init.boot.installation import Installations, Places

        home, anchors = Layout(self._machine.data).home, self._machine.download_anchors
        places = Places(home, anchors, development=self._policy.development)
        return Installations(self._loop, self.vault, places, self.guestos_running)

    def guestos_running(self) -> Iterable[GuestOsId]:
        """Return the versions that guests run now; the core's is not in the store."""
        return self.guests.guestos_running()

    def guestos_list(self) -> Sequence[GuestOsView]:
        """Return the GuestOSes that were verified in this boot."""
        return () if self._core_config is None else (GuestOsView(self._core_config),)

    def logs(self) -> Sequence[LogFile]:
        """Return the boot report, the measurement log and every log file."""
        named = [self._machine.report, self._machine.measurement_log]
        files = [path for path in named if path.exists()] + self._log_files()
        return [LogFile(path.name, path) for path in files]

    def remove_logs(self, names: Sequence[str]) -> None:
        """Empty the log files of this boot that were sent; report and measurements stay."""
        for path in self._log_files():
            if path.name in names:
                os.truncate(path, 0)

    def _log_files(self) -> list[Path]:
        homes = (self._machine.log_dir, self._machine.compartment_log_dir)
        return [path for home in homes for path in sorted(home.glob("*.log"))]

    def stats(self) -> DeviceStatsView:
        """Return disk and memory figures."""
        return device_stats(self._machine.store, self._machine.data)

    def request_reboot(self) -> None:
        """Stop the containers, then the core, in an orderly way; then reboot."""
        if self._core is None or self._rebooting or self._core.state is State.SHUTDOWN:
            return
        self._rebooting = True
        self._console.line("reboot requested")
        self.guests.stop_all(self._stop_core)

    def _stop_core(self) -> None:
        core, service = self._core, self._service
        if core is None or service is None or core.state is State.SHUTDOWN:
            return
        self._stop_within(STOP_TIMEOUT)  # first: whatever becomes of the request, the stop has an end
        self._stop_within(core.stop(service.shutdown))
