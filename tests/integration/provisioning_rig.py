# SPDX-License-Identifier: Apache-2.0
"""A device as far as provisioning goes: a data volume, a software TPM, and what a boot does with the two.

No firmware, no core container and no control socket: `Rig.boot` decides the mode by the boot's own stage,
makes the service as the vault does, and has it do what the manager asks for at the start. Key derivation is
made cheap, and the data volume is a directory that passes for a mount point (`light`); the rest is product.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509

from tests.integration import power
from tests.integration.software_tpm import SoftwareTpm
from tests.unit.test_policy import PRODUCTION
from tests.unit.tokens import kit
from tests.unit.trust import pki
from trustme_init import policy as policies
from trustme_init.boot import mode as stage
from trustme_init.boot.storage import StorageFact
from trustme_init.errors import Refusal, TokenRefusal
from trustme_init.machine import Machine, VolumeBackend
from trustme_init.policy import Policy
from trustme_init.provisioning.destruction import USER_DATA
from trustme_init.provisioning.layout import Layout
from trustme_init.provisioning.mode import Mode, ModeFact
from trustme_init.provisioning.service import ProvisioningService, Surroundings
from trustme_init.tokens import softtoken
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.marker_form import MarkerReading
from trustme_init.tpm.nv_marker import read_marker
from trustme_init.tpm.properties import permanent
from trustme_init.trust.anchors import Purpose

PIN: Final = "correct horse"
NEW_PIN: Final = "battery staple"
WRONG_PIN: Final = "incorrect horse"
PINS: Final = (PIN, NEW_PIN, WRONG_PIN, "trustme")
TRIES: Final = 5
_REAL_OPEN: Final = softtoken.open_token
_WEAK_ROUNDS: Final = 2

Arguments = Mapping[str, str | bytes]
Look = dict[str, Any]
"""What can be seen of a device; equal for devices in the same state but for random numbers (`relative`)."""


@dataclass
class Counted:
    """How often a PIN was tried, in this process."""

    tries: int = 0


COUNTED: Final = Counted()


@contextmanager
def light() -> Iterator[None]:
    """Make key derivation and key making cheap, count PINs, and let `data` directories be mount points."""

    def open_token(data: bytes, pin: str) -> softtoken.Token:
        power.note("try")
        COUNTED.tries += 1
        return _REAL_OPEN(data, pin)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softtoken, "ROUNDS", kit.FEW)
        patch.setattr(softtoken, "KEY_BITS", 2048)
        patch.setattr(softtoken, "open_token", open_token)
        patch.setattr(Path, "is_mount", lambda path: path.name == "data")
        yield


@dataclass(frozen=True)
class Authorities:
    """CAs, each with its key."""

    core: pki.Issued
    guest: pki.Issued
    other_guest: pki.Issued
    device: pki.Issued
    other_device: pki.Issued
    local: pki.Issued
    stranger: pki.Issued


@cache
def authorities() -> Authorities:
    """Return the CAs of all tests."""
    names = ("core", "guest", "other guest", "device", "other device", "local", "stranger")
    return Authorities(*(pki.issue(pki.ROOT.but(subject=name)) for name in names))


def certificate(request: bytes, issuer: pki.Issued, device_uuid: str, serial: int = 1) -> bytes:
    """Be the signer of a device certificate; PEM."""
    wish = pki.Wish(
        device_uuid,
        key_usage=pki.usage("digital_signature"),
        purpose=pki.CLIENT_AUTH,
        more=((x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"UUID:{device_uuid}")]), False),),
        serial=serial,
    )
    return pki.issue(wish, issuer, x509.load_pem_x509_csr(request)).pem


@cache
def operator_token(pin: str, *, weak: bool = False) -> bytes:
    """Return a PKCS#12 file with an EC key; a weak one is cheap to guess even by these tests' measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softtoken, "ROUNDS", _WEAK_ROUNDS if weak else kit.FEW)
        return kit.encoded(pin=pin)


@cache
def policy(*, provisions_itself: bool = False) -> Policy:
    """Return a production policy, or that of a build that provisions itself."""
    every = {"device-certificate", "device-anchor", "guest-anchor", "token"}
    return replace(
        policies.parse(PRODUCTION.encode()),
        development=provisions_itself,
        self_provisioning=provisions_itself,
        build_date=pki.NOW - pki.DAY,
        requirements=frozenset({"device-certificate", "token"} if provisions_itself else every),
        pin_tries=TRIES,
    )


class Rig:
    """One device, in `directory`. Between `boot` and the end of its power it has a `service`."""

    def __init__(self, directory: Path, rules: Policy | None = None) -> None:
        self.directory = directory
        self.policy = rules or policy()
        self.data = directory / "data"
        self.data.mkdir(parents=True)
        self.layout = Layout(self.data)
        self.tcti = ""
        self.volumes: VolumeBackend = Machine().volumes
        self._service: ProvisioningService | None = None

    def copy_to(self, directory: Path, survivor: power.Survivor | None = None) -> Rig:
        """Return another device with this one's TPM, and its disk or what survived of it."""
        copy = Rig(directory, self.policy)
        shutil.copytree(self.directory / "tpm", directory / "tpm", ignore=shutil.ignore_patterns(".lock"))
        if survivor is None:
            shutil.copytree(self.data, copy.data, dirs_exist_ok=True)
        else:
            survivor.put(copy.data)
        return copy

    @contextmanager
    def powered(self) -> Iterator[None]:
        """Have the power on. When it goes, the TPM is not told; when it comes, the TPM is reset."""
        with SoftwareTpm(self.directory) as tpm:
            self.tcti = tpm.tcti
            yield
        self._service = None

    @property
    def service(self) -> ProvisioningService:
        """What the vault would run."""
        assert self._service is not None, "not booted"
        return self._service

    def reading(self) -> MarkerReading:
        """Ask the TPM for the marker, as the boot's first child does."""
        with open_tpm(self.tcti) as tpm:
            return read_marker(tpm)

    def start(self) -> ModeFact:
        """Boot as far as the vault; refusals as the stage `mode`."""
        storage = StorageFact(self.directory, self.data, data_created=False, marker=self.reading())
        machine = Machine(data=self.data, tcti=self.tcti)
        # The stage closes the measurer so that the TPM is free, and takes its presence for the TPM's.
        measurer: Any = _Nothing()
        fact = stage.decide(machine, storage, measurer)
        self.serve(fact)
        return fact

    def serve(self, fact: ModeFact) -> None:
        """Be a new vault of the same boot."""
        self._service = ProvisioningService(
            Surroundings(
                data=self.data,
                tcti=self.tcti,
                policy=self.policy,
                core_anchors=pki.anchors(authorities().core),
                mode=fact,
                measurement_log=self.directory / "measurements.cel",
                volumes=self.volumes,
            )
        )

    def boot(self) -> ModeFact:
        """Boot, with what the manager has the vault do once the core container runs."""
        fact = self.start()
        if fact.mode is Mode.PROVISIONING:
            self.handle("prepare")
        elif not fact.locked or not self.layout.marker.exists():
            self.handle("settle")
        return fact

    def handle(self, operation: str, arguments: Arguments | None = None) -> dict[str, Any]:
        """Have the vault do something."""
        return self.service.handle(operation, arguments or {})

    def attempt(self, operation: str, arguments: Arguments | None = None) -> str:
        """Have the vault do something; return the refusal's code, "" if there is none."""
        try:
            self.handle(operation, arguments)
        except Refusal as refusal:
            return refusal.code
        return ""

    def boot_and_look(self) -> Look:
        """Boot, and return what can be seen then, be it a refusal."""
        try:
            self.boot()
        except Refusal as refusal:
            return {"mode": refusal.code, **self._remains()}
        return self.look()

    def _remains(self) -> Look:
        left = sorted(path.name for path in self.layout.home.iterdir()) if self.layout.home.is_dir() else []
        with open_tpm(self.tcti) as tpm:
            state = permanent(tpm)
        return {"left": left, "owned": state.owner_auth_set, "lockout": state.lockout_auth_set}

    def look(self) -> Look:
        """Return everything that can be seen of a device that runs."""
        reading = self.reading()
        status, token = self.handle("status"), self.handle("token-status")
        return {
            "mode": Mode.OPERATIONAL.value if status["completed"] else Mode.PROVISIONING.value,
            "marker": (reading.state.value, reading.locked, self.layout.marker.exists()),
            "record": status["record_sha256"],
            "uuid": status["device_uuid"],
            "key": status.get("device_key_sha256", ""),
            "met": [each["name"] for each in status["requirements"] if each["met"]],
            "certificate": _sha256(self.layout.tokens / "device.cert"),
            "request": self._request(),
            "authorities": sorted(
                (each["purpose"], each["source"], each["subject"])
                for each in self.handle("authorities")["authorities"]
            ),
            "token": token["kind"],
            "token-certificate": token["certificate_sha256"],
            "default-pin": token["default_pin"],
            "pins": [pin for pin in PINS if self.opens(pin)],
            "tries": token["tries_left"],
            "containers": self.user_data(),
        }

    def _request(self) -> str:
        path = self.layout.device_csr
        if not path.exists():
            return ""
        try:
            request = x509.load_pem_x509_csr(path.read_bytes())
        except ValueError:
            return "damaged"
        return _sha256(path) if request.is_signature_valid else "damaged"

    def opens(self, pin: str) -> bool:
        """Whether a PIN fits the token's file; the count is not asked."""
        path = self.layout.tokens / "testuser.p12"
        try:
            _REAL_OPEN(path.read_bytes(), pin)
        except (TokenRefusal, FileNotFoundError):
            return False
        return True

    def user_data(self) -> list[str]:
        """Return the names of what containers left."""
        paths = (path for name in USER_DATA for path in (self.layout.home / name).rglob("*"))
        return sorted(str(path.relative_to(self.layout.home)) for path in paths)

    def fill(self) -> None:
        """Do all that an operator does before completion."""
        known = authorities()
        for purpose, issued in ((Purpose.GUEST, known.guest), (Purpose.DEVICE, known.device)):
            self.handle("add-authority", {"purpose": purpose.value, "certificate": issued.pem})
        self.handle("push-certificate", {"certificate": self.certificate(known.device)})
        self.handle("token-replace", {"token": operator_token(PIN), "pin": PIN})

    def certificate(self, issuer: pki.Issued, serial: int = 1) -> bytes:
        """Return a certificate for this device's key, PEM; the request is made if there is none."""
        request = self.handle("csr")["csr"].encode()
        return certificate(request, issuer, self.handle("status")["device_uuid"], serial)

    def leave_user_data(self) -> None:
        """Be a few containers."""
        for name in ("containers/one/image.img", "containers/two.conf", "keys/one.key", "shared/file"):
            path = self.layout.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("a container's")


class _Nothing:
    def close(self) -> None:
        """Have nothing to close."""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def relative(look: Look, origin: Look) -> Look:
    """Return a look in which random values are "as before" or "another", or "" where there is none."""
    random = ("record", "uuid", "key", "certificate", "request", "token-certificate")

    def word(name: str) -> str:
        value = look[name]
        return value if value in ("", "damaged") else "as before" if value == origin.get(name) else "another"

    return {name: word(name) if name in random else value for name, value in look.items()}
