# SPDX-License-Identifier: Apache-2.0
"""What each step of provisioning costs: seconds, and how many commands the TPM gets.

Measured on the vault's service with a software TPM, and again with the latency of a chip on the bus.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer, code_of
from trustme_init import policy as policies
from trustme_init.linux.mount import MNT_DETACH, mount, umount
from trustme_init.machine import Machine
from trustme_init.provisioning.mode import FROM_TPM, Mode, ModeFact
from trustme_init.provisioning.service import ProvisioningService, Surroundings
from trustme_init.tpm.marker_form import MarkerReading
from trustme_init.tpm.measure import Measurer
from trustme_init.trust.anchors import Purpose, Revocations, anchor_set
from trustme_tools.guestos.signing import pki_signer
from trustme_tools.pki import tpm_certification
from trustme_tools.pki.create import Algorithm, create
from trustme_tools.pki.device import sign_device
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.pki.request import read_request

# TPM_CC (TPM 2.0 Part 2, section 6.5.2). The first two were measured on chips (design.md, known facts); the
# others are our estimate from them: one asymmetric operation, or none.
_CREATE_PRIMARY, _UNSEAL = 0x131, 0x15E
_ASYMMETRIC: Final = {
    0x153: "Create",
    0x15D: "Sign",
    0x148: "Certify",
    0x157: "Load",
    0x176: "StartAuthSession",
}
CHIP_SECONDS: Final = {_CREATE_PRIMARY: 0.25, _UNSEAL: 1.3, **dict.fromkeys(_ASYMMETRIC, 0.15)}
CHIP_OTHER: Final = 0.02
PIN: Final = "a pin for the bench"

POLICY: Final = f"""version = {policies.POLICY_VERSION}
development = false
build_date = 2026-01-01T00:00:00Z
hardware = "x86"
[core]
guest_os = "trustme-coreos"
start_timeout_s = 60
memory_max_mib = 512
pids_max = 256
[platform]
allow_insecure_boot = false
allow_missing_tpm = false
[devices]
timeout_s = 1
modules = []
[provisioning]
require = ["device-certificate", "device-anchor", "guest-anchor", "token"]
device_key = "ecc-p256"
pin_tries = 10
self_provisioning = false
[containers]
allow_unsigned_configs = false
start_timeout_s = 300
pids_max = 1024
"""


def measure(directory: Path) -> dict[str, Any]:
    """Return steps in order, each with commands, and seconds with swtpm and with a chip's latency."""
    pki = create(directory / "pki", algorithm=Algorithm.P384, development=True)
    quick = _walk(directory / "swtpm", pki, chip=False)
    slow = _walk(directory / "chip", pki, chip=True)
    return {
        "steps": [
            {
                "name": name,
                "commands": commands,
                "swtpm_s": round(seconds, 3),
                "chip_s": round(slow[name][1], 2),
            }
            for name, (commands, seconds) in quick.items()
        ],
        "chip_latency_s": {"unseal": 1.3, "create_primary": 0.25, "asymmetric": 0.15, "other": CHIP_OTHER},
    }


def _walk(directory: Path, pki: PkiDirectory, *, chip: bool) -> dict[str, tuple[int, float]]:
    """Provision one device; return name → (TPM commands, seconds)."""
    data = directory / "data"
    data.mkdir(parents=True)
    # A mount point, as on a device: the mode is not decided from a directory that only looks like the volume.
    mount("tmpfs", str(data), "tmpfs", 0, "size=16m")
    found: dict[str, tuple[int, float]] = {}
    with ExitStack() as stack:
        stack.callback(umount, str(data), MNT_DETACH)
        bus = stack.enter_context(Interposer(stack.enter_context(SoftwareTpm(directory)), directory))
        if chip:
            bus.on_command = _with_a_chip_s_latency
        service = ProvisioningService(_surroundings(data, bus.tcti, pki))

        def timed(name: str, action: Callable[[], Any]) -> Any:
            bus.forget()
            started = time.monotonic()
            result = action()
            found[name] = (len(bus.commands), time.monotonic() - started)
            return result

        timed("boot: open, read the marker", lambda: _read_marker(bus.tcti))
        timed("prepare the device", lambda: service.handle("prepare", {}))
        timed("prepare it again", lambda: service.handle("prepare", {}))
        for purpose, name in ((Purpose.GUEST, "guestos_subca"), (Purpose.DEVICE, "device_subca")):
            pem = pki.certificate(name).public_bytes(Encoding.PEM)
            register = partial(
                service.handle, "add-authority", {"certificate": pem, "purpose": purpose.value}
            )
            timed(f"register a {purpose.value} anchor", register)
        answer = timed("pull the request", lambda: service.handle("csr", {}))
        certificate = _issue(pki, answer)
        timed(
            "push the certificate", lambda: service.handle("push-certificate", {"certificate": certificate})
        )
        timed("create the token", lambda: service.handle("token-create", {"pin": PIN}))
        timed("unlock the token", lambda: service.handle("token-unlock", {"pin": PIN}))
        timed("status", lambda: service.handle("status", {}))
        timed("complete", lambda: service.handle("complete", {}))
        timed("boot: open, read the completed marker", lambda: _read_marker(bus.tcti))
    return found


def _with_a_chip_s_latency(command: bytes) -> bytes:
    time.sleep(CHIP_SECONDS.get(code_of(command), CHIP_OTHER))
    return command


def _surroundings(data: Path, tcti: str, pki: PkiDirectory) -> Surroundings:
    core = pki.certificate("ssig_subca").public_bytes(Encoding.DER)
    return Surroundings(
        data=data,
        tcti=tcti,
        policy=policies.parse(POLICY.encode()),
        core_anchors=anchor_set(Purpose.CORE, [core], Revocations(), source="bench"),
        mode=ModeFact(Mode.PROVISIONING, "bench", FROM_TPM),
        measurement_log=data.parent / "measurements.cel",
        volumes=Machine().volumes,
    )


def _read_marker(tcti: str) -> MarkerReading:
    with Measurer(tcti) as measurer:
        return measurer.marker()


def _issue(pki: PkiDirectory, answer: dict[str, Any]) -> bytes:
    request = read_request(answer["csr"].encode())
    now = datetime.now(UTC)
    certification = tpm_certification.read_certification(answer["certification"].encode())
    checked = tpm_certification.check(certification, request, ek_cas=[], at=now)
    return sign_device(request, pki_signer(pki, "device_subca"), certification=checked, now=now).pem
