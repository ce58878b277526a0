# SPDX-License-Identifier: Apache-2.0
"""One device's provisioning, from the first answer to the closed door.

Rules:
- Each step looks first and does only what is missing, so a walk that was interrupted is simply begun again.
- Each step ends with a look at who the device is (`identity`); the first that finds another one is the last.
- Nothing is completed that the report could not call good: what the settings file asks for is compared with
  what the device says before the point of no return, not after it.
- A device that was completed before is not changed: it is compared, and its door is tried.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from trustme_init.errors import Refusal
from trustme_init.provisioning.mode import FROM_TPM
from trustme_tools.errors import ToolError, from_os_error
from trustme_tools.provision import token
from trustme_tools.provision.certify import Certifier
from trustme_tools.provision.device import PURPOSES, Authority, Device, Status
from trustme_tools.provision.identity import DEVICE_KEY, UUID_NAME, Identity, Registry
from trustme_tools.provision.plan import Plan
from trustme_tools.provision.report import DONE, THERE, Report, Step
from trustme_tools.provision.settings import TargetSettings
from trustme_tools.provision.transport import Scratch

POLL: Final = 0.5
DOWN_TIME: Final = 120.0
"""Seconds until a device that was told to reboot stops answering."""
_NOT_YET: Final = frozenset({"unreachable", "not-prepared"})

Tell = Callable[[str], None]
Done = tuple[str, str]
"""How a step ended, and what it did."""


class Walk:
    """The walk of one device; `run` may be called once. `stop` ends waiting."""

    def __init__(
        self,
        plan: Plan,
        target: TargetSettings,
        device: Device,
        registry: Registry,
        *,
        tell: Tell,
        stop: threading.Event,
    ) -> None:
        self._plan = plan
        self._device = device
        self._tell = tell
        self._stop = stop
        self._identity = Identity(target.name, registry, expected_uuid=target.uuid)
        self._wanted_token = plan.token(target.name)
        self.report = Report(target.name)
        self._certifier = Certifier(plan, self._identity, self.report, expected_ek=target.endorsement_key)

    def run(self) -> Report:
        """Walk; whatever ends it early is in the report's `error`."""
        try:
            self._walk()
        except (ToolError, Refusal) as exc:
            self.report.error = exc.as_dict()
        except OSError as exc:
            self.report.error = from_os_error(exc).as_dict()
        finally:
            self._device.close()
        if self.report.error is not None:
            self._tell(f"{self.report.target}: FAILED: {self.report.error['cause']}")
        return self.report

    def _walk(self) -> None:
        self._step("prepared", self._wait_prepared)
        if self._look().completed:
            self._compare()
        else:
            self._step("anchors", self._anchors)
            self._step("certificate", self._certificate)
            self._step("token", self._token)
            self._step("completion", self._complete)
        self._step("closed door", self._closed)
        self._fill(self._look())

    def _step(self, name: str, do: Callable[[], Done]) -> None:
        started = time.monotonic()
        outcome, detail = do()
        seconds = time.monotonic() - started
        self.report.steps.append(Step(name, outcome, detail, round(seconds, 2)))
        self._tell(f"{self.report.target}: {name}: {outcome}{f', {detail}' if detail else ''}")

    def _look(self) -> Status:
        return self._identity.see(self._device.status())

    # Beginning

    def _wait_prepared(self) -> Done:
        """Wait for the first status with a UUID, and refuse what the settings file does not allow."""
        status = self._wait(lambda _: True, "the device does not become ready to be provisioned")
        self.report.device_uuid = str(status.uuid)
        settings = self._plan.settings
        if status.development and not settings.development_builds:
            raise ToolError(
                "this device runs a development build: its keys are public",
                "put a release image on it, or say `development_builds: allow`",
                code="development-build",
                evidence=f"device {status.uuid}",
            )
        if status.marker != FROM_TPM and not settings.software_keys:
            raise ToolError(
                "no TPM keeps the marker of this device",
                "say `software_keys: allow` under tpm if it is a device without a TPM",
                code="no-tpm",
                evidence=f"marker: {status.marker}",
            )
        return DONE, f"device {status.uuid}"

    def _wait(self, enough: Callable[[Status], bool], cause: str) -> Status:
        deadline = time.monotonic() + self._plan.settings.wait
        last = ""
        while not self._stop.is_set():
            try:
                if enough(status := self._look()):
                    return status
            except ToolError as exc:
                if exc.code not in _NOT_YET:
                    raise
                last = exc.evidence or exc.cause
            if time.monotonic() > deadline:
                raise ToolError(
                    cause,
                    "look at the boot console: a device that stops says why",
                    code="not-ready",
                    evidence=f"after {self._plan.settings.wait} s; {last}",
                )
            self._stop.wait(POLL)
        raise ToolError("interrupted", code="interrupted")

    # Steps

    def _anchors(self) -> Done:
        """Register what is missing, and settle what is there beside it."""
        registered = self._device.authorities()
        wanted = self._plan.anchors
        missing = [anchor for anchor in wanted if Authority(anchor.purpose, anchor.sha256) not in registered]
        others = self._others(registered)
        if others and self._plan.settings.other_anchors == "refuse":
            raise ToolError(
                "the device has anchors that nobody named",
                "find out whose they are; remove them with `other_anchors: remove` or leave them with `keep`",
                code="anchors-unexpected",
                evidence=", ".join(f"{each.purpose} {each.sha256}" for each in others),
            )
        if others and self._plan.settings.other_anchors == "remove":
            for each in others:
                self._device.remove_authority(each.sha256)
                self.report.notes.append(f"{each.purpose} anchor removed: {each.sha256}")
        for anchor in missing:
            self._look()
            self._device.register(anchor.purpose, anchor.pem)
        return DONE if missing else THERE, f"{len(missing)} of {len(wanted)} registered now"

    def _others(self, registered: frozenset[Authority]) -> list[Authority]:
        named = {Authority(anchor.purpose, anchor.sha256) for anchor in self._plan.anchors}
        return sorted(registered - named)

    def _certificate(self) -> Done:
        request, checked = self._certifier.prove(self._device)
        chain, kept = self._certifier.chain(request, checked)
        wanted = self._recorded_sha256()
        if self._look().certificate == wanted:
            return THERE, ""
        self._device.push_certificate(chain)
        found = self._look().certificate
        if found != wanted:
            raise ToolError(
                "the device says that it has another certificate than the one it was given",
                "treat the device as manipulated",
                code="certificate-not-taken",
                evidence=f"{found}, expected {wanted}",
            )
        proven = "the TPM proved its key" if self._plan.settings.activation and checked else "TPM NOT PROVEN"
        return DONE, f"{'of an earlier run' if kept else 'signed'}, {proven}"

    def _token(self) -> Done:
        done = token.settle(self._device, self._wanted_token)
        self._look()
        return done

    def _complete(self) -> Done:
        status = self._look()
        if missing := status.missing():
            raise ToolError(
                "the device's policy demands more than the settings file brings",
                "add what is missing to the settings file",
                code="provisioning-incomplete",
                evidence="; ".join(f"{each.name}: {each.detail}" for each in missing),
            )
        if differences := self._differences(status):
            raise ToolError(
                "the device is not as the settings file asks for, right before completion",
                "begin again; if it stays, treat the device as manipulated",
                code="not-as-asked",
                evidence="; ".join(differences),
            )
        if self._plan.settings.completion == "set_provisioned":
            self._device.complete()
        else:
            self._reboot()
        self._wait(lambda status: status.completed, "the device does not become operational")
        return DONE, f"by {self._plan.settings.completion}"

    def _reboot(self) -> None:
        try:
            self._device.reboot()
        except ToolError as exc:
            # The answer and the way down are a race; what the device has become is seen when it is back.
            if exc.code != "unreachable":
                raise
            self._device.close()
        else:
            self._wait_down()

    def _wait_down(self) -> None:
        """Return when the device has stopped answering: what answers after that has booted anew."""
        deadline = time.monotonic() + DOWN_TIME
        while not self._stop.is_set():
            try:
                self._look()
            except ToolError as exc:
                if exc.code == "unreachable":
                    self._device.close()
                    return
                if exc.code not in _NOT_YET:
                    raise
            if time.monotonic() > deadline:
                raise ToolError(
                    "the device was told to reboot and goes on", code="no-reboot", evidence=f"{DOWN_TIME:g} s"
                )
            self._stop.wait(POLL)

    def _closed(self) -> Done:
        """Try the door: nothing of provisioning is to be had any more."""
        tried: tuple[tuple[str | Scratch, ...], ...] = (("pull_csr", Scratch.FILE), ("set_provisioned",))
        open_still = [str(words[0]) for words in tried if not self._device.is_closed(*words)]
        if open_still or not self._device.is_provisioned():
            raise ToolError(
                "provisioning is still open on a device that says it was completed",
                "do not put this device into service",
                code="door-open",
                evidence=", ".join(open_still) or "get_provisioned",
            )
        self.report.closed = True
        return DONE, "provisioning commands are not offered any more"

    # A device that was completed before

    def _compare(self) -> None:
        self.report.looked_only = True
        status = self._look()
        self.report.mismatches += self._differences(status)
        self.report.mismatches += [f"{each.name}: {each.detail}" for each in status.missing()]
        self._certifier.compare(status.certificate)
        self.report.matches = not self.report.mismatches

    def _differences(self, status: Status) -> list[str]:
        """Return how the device differs from the settings file."""
        registered = self._device.authorities()
        found = [
            f"{anchor.purpose} anchor {anchor.sha256} is not registered"
            for anchor in self._plan.anchors
            if Authority(anchor.purpose, anchor.sha256) not in registered
        ]
        if self._plan.settings.other_anchors != "keep":
            found += [f"{each.purpose} anchor {each.sha256}" for each in self._others(registered)]
        if not status.completed and status.certificate != self._recorded_sha256():
            found.append(f"certificate {status.certificate}, expected {self._recorded_sha256()}")
        return found + token.differences(self._device.token(), self._wanted_token)

    def _recorded_sha256(self) -> str | None:
        recorded = self._certifier.recorded()
        return recorded.sha256 if recorded is not None else None

    def _fill(self, status: Status) -> None:
        """Write down what the device says of itself at the end."""
        report, state = self.report, self._device.token()
        report.completed = status.completed
        report.development = status.development
        report.marker = status.marker
        report.record_sha256 = status.record
        report.device_uuid = self._identity.name(UUID_NAME)
        report.device_key_sha256 = self._identity.name(DEVICE_KEY)
        report.certificate_sha256 = status.certificate
        if (facts := self._certifier.recorded()) is not None and facts.sha256 == status.certificate:
            report.certificate = facts
        registered = self._device.authorities()
        report.anchors = {
            purpose: sorted(each.sha256 for each in registered if each.purpose == purpose)
            for purpose in PURPOSES
        }
        report.token = {
            "kind": state.kind,
            "certificate_sha256": state.certificate,
            "default_pin": state.default_pin,
            "kdf_rounds": state.kdf_rounds,
        }
        if status.development:
            report.notes.append("DEVELOPMENT BUILD: its keys are public, never put it into service")
        if status.record is None:
            report.notes.append("the device names no provisioning record")
