# SPDX-License-Identifier: Apache-2.0
"""What is said about a device at the end: for people, for programs, and kept in the records directory.

JSON, version 1 (`as_dict`): digests are SHA-256 in hex, times ISO 8601 in UTC, absent facts are null. There
is no secret in it and nothing that one could be computed from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

KIND: Final = "trustme.provisioning-report"
VERSION: Final = 1

DONE: Final = "done"
THERE: Final = "already there"
NOT_WANTED: Final = "left alone"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the walk; `seconds` is wall clock."""

    name: str
    outcome: str
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """The device's certificate."""

    sha256: str
    subject: str
    issuer: str
    serial: str
    not_before: str
    not_after: str


@dataclass(slots=True)
class Report:
    """One device. Filled while the walk goes on, so that a failed one says how far it came."""

    target: str
    completed: bool = False
    looked_only: bool = False
    """The device was completed before this run, and only compared."""
    matches: bool = True
    """False: a device that was completed before is not what the settings ask for."""
    device_uuid: str | None = None
    development: bool | None = None
    marker: str | None = None
    record_sha256: str | None = None
    ek_sha256: str | None = None
    """Of the endorsement key's SubjectPublicKeyInfo."""
    ek_vouched_for_by: str | None = None
    device_key_sha256: str | None = None
    certificate_sha256: str | None = None
    certificate: CertificateFacts | None = None
    anchors: dict[str, list[str]] = field(default_factory=dict)
    token: dict[str, Any] = field(default_factory=dict)
    closed: bool = False
    """Whether the provisioning commands were tried after completion and are no longer offered."""
    mismatches: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    error: dict[str, str] | None = None

    @property
    def good(self) -> bool:
        """Whether this device is provisioned as it was asked for."""
        return self.error is None and self.completed and self.closed and self.matches

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"kind": KIND, "version": VERSION, "good": self.good, **asdict(self)}


def as_text(report: Report) -> str:
    """Return the report for people."""
    head = "provisioned" if report.good else "NOT PROVISIONED" if report.error else "NOT AS ASKED FOR"
    facts = [
        ("device", report.device_uuid),
        ("endorsement key", report.ek_sha256),
        ("  vouched for by", report.ek_vouched_for_by),
        ("device key", report.device_key_sha256),
        ("certificate", report.certificate_sha256),
    ]
    if (certificate := report.certificate) is not None:
        facts += [
            ("  subject", certificate.subject),
            ("  issuer", certificate.issuer),
            ("  valid", f"{certificate.not_before[:10]} to {certificate.not_after[:10]}"),
        ]
    facts += [(f"{purpose} anchor", each) for purpose, found in report.anchors.items() for each in found]
    if report.token:
        facts.append(("token", _token_text(report.token)))
    facts += [("marker", report.marker), ("record", report.record_sha256)]
    if report.development is not None:
        facts.append(("build", "DEVELOPMENT" if report.development else "production"))
    if report.completed:
        facts.append(("door", "closed" if report.closed else "NOT SEEN CLOSED"))
    lines = [f"{report.target}: {head}"]
    lines += [f"  {name:<16} {value}" for name, value in facts if value]
    lines += [f"  differs: {text}" for text in report.mismatches]
    lines += [f"  not proven: {text}" for text in report.unproven]
    lines += [f"  note: {text}" for text in report.notes]
    if report.error is not None:
        lines.append(f"  {report.error['cause']} ({report.error['code']})")
        lines += [
            f"    {name}: {report.error[name]}" for name in ("evidence", "remedy") if report.error.get(name)
        ]
    return "\n".join(lines)


def _token_text(token: dict[str, Any]) -> str:
    pin = {False: "set by its owner", True: "THE PUBLISHED ONE", None: "not known"}[token.get("default_pin")]
    return str(token["kind"]) if token["kind"] == "none" else f"{token['kind']}, PIN {pin}"
