# SPDX-License-Identifier: Apache-2.0
"""The device's certificate: proof that its key is in its TPM, then the signature, then the record of both.

Rules:
- Before anything is signed: the request names the UUID the walk is bound to; the TPM's certification of its
  key meets every rule of `pki.tpm_certification`; its endorsement key is the one the device says it has (and
  the settings file, if it does); and the TPM has answered a challenge that only the TPM with both keys can.
- The challenge can be left out and a software key accepted only where the settings file says so; the report
  then says what is not proven.
- A certificate that is issued is kept under the device's UUID before it is pushed. A run that was interrupted
  goes on with it, if it is still good by the device's own rules.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from trustme_init.errors import Refusal
from trustme_init.trust.anchors import Purpose, Revocations, anchor_set
from trustme_init.trust.certificate import is_signed_by, public_key_der
from trustme_init.trust.device import verify_device_certificate
from trustme_tools.errors import ToolError
from trustme_tools.pki import tpm_certification
from trustme_tools.pki.device import sign_device
from trustme_tools.pki.request import DeviceRequest, read_request
from trustme_tools.pki.tpm_certification import Checked
from trustme_tools.provision.device import Device
from trustme_tools.provision.identity import DEVICE_KEY, UUID_NAME, Identity
from trustme_tools.provision.plan import Plan
from trustme_tools.provision.records import Records
from trustme_tools.provision.report import CertificateFacts, Report


class Certifier:
    """Works for one device. `expected_ek` is what the settings file says of its endorsement key."""

    def __init__(self, plan: Plan, identity: Identity, report: Report, *, expected_ek: str | None) -> None:
        self._plan = plan
        self._identity = identity
        self._report = report
        self._expected_ek = expected_ek
        self._records = Records(plan.settings.records)

    def prove(self, device: Device) -> tuple[DeviceRequest, Checked | None]:
        """Pull the request and have the device prove whose it is; nothing is signed yet.

        ToolError: those of `pki.request` and `pki.tpm_certification`, "software-key", "ek-not-expected",
        "ek-not-reported", "device-changed", "device-twice".
        """
        csr, certification = device.csr()
        uuid = self._identity.see(device.status()).uuid
        request = read_request(csr, uuid=uuid)
        self._identity.bind(DEVICE_KEY, hashlib.sha256(_spki(request)).hexdigest())
        if certification is None:
            self._require_software_key_allowed()
            return request, None
        now = datetime.now(UTC)
        read = tpm_certification.read_certification(certification)
        checked = tpm_certification.check(read, request, ek_cas=self._plan.ek_cas, at=now)
        self._compare_endorsement_key(checked, device)
        unproven = [text.replace("--ek-ca", "tpm.ek_cas") for text in checked.unproven]
        if self._plan.settings.activation:
            challenge = tpm_certification.make_challenge(checked)
            answer = device.activate(challenge.credential_blob, challenge.encrypted_secret)
            tpm_certification.confirm(challenge, answer)
            unproven.pop()
        self._report.unproven += unproven
        self._report.ek_sha256 = checked.ek.sha256
        self._report.ek_vouched_for_by = checked.ek_anchor
        return request, checked

    def chain(self, request: DeviceRequest, checked: Checked | None) -> tuple[bytes, bool]:
        """Return the device's certificate chain (PEM), and whether it was issued before.

        ToolError: those of `pki.device.sign_device`, and "anchors-do-not-vouch" if the device would not
        believe it by the anchors of the settings file.
        """
        kept = self._kept(request)
        if kept is not None:
            return kept, True
        settings = self._plan.settings
        issued = sign_device(
            request,
            self._plan.signer,
            certification=checked,
            allow_software_key=settings.software_keys,
            days=settings.device_ca.days,
            now=datetime.now(UTC),
        )
        try:
            self._judge(issued.pem, request)
        except Refusal as refusal:
            raise ToolError(
                "the device would refuse the certificate that the device CA issues",
                "name the device CA, or one above it, under device_anchors",
                code="anchors-do-not-vouch",
                evidence=str(refusal),
            ) from refusal
        self._report.notes += [f"asked for and not granted: {text}" for text in request.not_granted]
        self._records.keep_chain(str(request.uuid), issued.pem)
        return issued.pem, False

    def recorded(self) -> CertificateFacts | None:
        """Return the facts of the certificate in the records, None if there is none that can be read."""
        leaf = _leaf(self._records.chain(str(self._identity.name(UUID_NAME))))
        if leaf is None:
            return None
        return CertificateFacts(
            sha256=leaf.fingerprint(hashes.SHA256()).hex(),
            subject=leaf.subject.rfc4514_string(),
            issuer=leaf.issuer.rfc4514_string(),
            serial=f"{leaf.serial_number:x}",
            not_before=f"{leaf.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
            not_after=f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        )

    def _require_software_key_allowed(self) -> None:
        if not self._plan.settings.software_keys:
            raise ToolError(
                "no TPM vouches for the key of this device",
                "say `software_keys: allow` under tpm if this is a device without a TPM",
                code="software-key",
                evidence=f"device {self._identity.name(UUID_NAME)}",
            )
        self._report.unproven.append("that the device key is in a TPM: whoever copies it is this device")

    def _compare_endorsement_key(self, checked: Checked, device: Device) -> None:
        if self._expected_ek not in {None, checked.ek.sha256}:
            raise ToolError(
                "this is not the endorsement key that was announced for this device",
                "compare with the maker's list; see what the target's address leads to",
                code="ek-not-expected",
                evidence=f"endorsement key {checked.ek.sha256}, expected {self._expected_ek}",
            )
        said = self._identity.see(device.status()).endorsement_key
        if said != checked.ek.sha256:
            raise ToolError(
                "the certification is by another TPM than the one the device says it has",
                "treat the device as manipulated",
                code="ek-not-reported",
                evidence=f"status: {said}, certification: {checked.ek.sha256}",
            )

    def _kept(self, request: DeviceRequest) -> bytes | None:
        """Return the chain of an earlier run, if it is this CA's and the device would believe it now."""
        chain = self._records.chain(str(request.uuid))
        leaf = _leaf(chain)
        if chain is None or leaf is None or not is_signed_by(leaf, self._plan.signer.chain[0]):
            return None
        try:
            self._judge(chain, request)
        except Refusal:
            return None
        return chain

    def _judge(self, chain: bytes, request: DeviceRequest) -> None:
        ders = [anchor.der for anchor in self._plan.anchors if anchor.purpose == "device"]
        verify_device_certificate(
            chain,
            public_key=_spki(request),
            device_uuid=request.uuid,
            anchors=anchor_set(Purpose.DEVICE, ders, Revocations(), source="the settings file"),
            at=datetime.now(UTC),
        )

    def compare(self, certificate: str | None) -> None:
        """Compare a device that was completed before with its records, and take over what was proven then."""
        report, recorded = self._report, self.recorded()
        if recorded is None:
            report.unproven.append("that the certificate is the one that was issued: no record of it")
        elif recorded.sha256 != certificate:
            report.mismatches.append(f"certificate {certificate}, the record has {recorded.sha256}")
        before = self._records.report(str(self._identity.name(UUID_NAME))) or {}
        if recorded is None or before.get("certificate_sha256") != certificate:
            report.unproven.append("where its key is: a device that was completed before proves it no more")
            return
        report.ek_sha256, report.ek_vouched_for_by = before.get("ek_sha256"), before.get("ek_vouched_for_by")
        report.unproven += before.get("unproven", [])
        report.notes.append("completed before: what is proven of its keys is from the record of that run")


def _spki(request: DeviceRequest) -> bytes:
    return public_key_der(x509.load_der_x509_csr(request.der))


def _leaf(chain: bytes | None) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(chain) if chain is not None else None
    except ValueError:
        return None
