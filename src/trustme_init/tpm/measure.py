# SPDX-License-Identifier: Apache-2.0
"""What the boot asks of the TPM: the provisioning marker, and to measure before use.

What will run is extended into a PCR and logged before it is read for use.

The TPM is driven by a child process until the core starts: it loads the TPM library (130-190 ms natively)
while the manager reads firmware and disks, and keeps that library out of the manager for good. The two speak
over a SOCK_SEQPACKET pair: one request, one reply, both JSON, at most `MESSAGE_LIMIT` bytes. The child's
first word comes unasked, before it loads the library: the marker, for the mode is decided before anything is
measured.

PCR 13 is extended with TPM2_PCR_Event (TPM 2.0 Part 3, section 22.3), so every active bank gets its own
digest of the same event data. Each digest the TPM reports must be the one we compute ourselves, and at least
one bank must be stronger than SHA-1: with none, nothing was measured. Which banks there are is asked for: the
command reports digests of every algorithm the TPM knows, also of those that have no register.
The log is a sequence of CEL-JSON records (TCG Canonical Event Log 1.0), appended to after the TPM has
answered. A crash in between leaves a register that the log does not explain, which no verifier accepts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from trustme_init.errors import DeviceRefusal, Refusal
from trustme_init.linux.files import write_all
from trustme_init.tpm import quick_marker
from trustme_init.tpm.marker_form import MarkerReading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tpm2_pytss import ESAPI

PCR: Final = 13
"""Firmware uses 0-7, the boot stub 11 and 12; 13 is the register for what the base system then starts."""
EVENT_LIMIT: Final = 1024
"""TPM2B_EVENT's size (TPM 2.0 Part 2, section 10.4.5)."""
MESSAGE_LIMIT: Final = 64 * 1024
REPLY_TIMEOUT: Final = 30.0
END_TIMEOUT: Final = 1.0
"""Seconds for the killed child to end. One inside the TPM's driver ends only when the command does."""
STRONG: Final = ("sha256", "sha384", "sha512")
_REMEDY: Final = "check that the TPM is enabled in the firmware set-up; a production build needs one"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One event: a short name and the text that is measured and logged."""

    event: str
    data: str


class Measurer:
    """The TPM's child process as the manager sees it."""

    def __init__(self, tcti: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(REPLY_TIMEOUT)
        self._hello: dict[str, Any] | None = None
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            _serve(theirs, tcti)
        theirs.close()

    def extend(self, measurements: Sequence[Measurement], log: Path) -> None:
        """Extend PCR 13 by each measurement and append it to `log`, in this order.

        Raises:
            DeviceRefusal: "tpm-failed" when any event could not be extended; nothing may then be used.
        """
        for measurement in measurements:
            reply = self._ask({"event": measurement.event, "data": measurement.data}, measurement.event)
            _record(measurement, reply, log)

    def marker(self) -> MarkerReading:
        """Return what the NV index of the provisioning marker says.

        Raises:
            DeviceRefusal: "tpm-failed", or what `nv_marker.read_marker` refuses ("marker-foreign").
        """
        reply = self._first_word()
        if reply.get("marker") is None:
            reply = self._ask({"ask": "marker"}, "its provisioning marker")
        try:
            return MarkerReading.from_dict(reply["marker"])
        except (KeyError, TypeError, ValueError) as exc:
            raise _failed("its provisioning marker", f"{type(exc).__name__}: {exc}") from exc

    def _first_word(self) -> dict[str, Any]:
        """Return what the child says before it loads the library: the marker, where that is plain."""
        if self._hello is None:
            self._hello = self._reply("its provisioning marker")
        return self._hello

    def _ask(self, request: dict[str, str], what: str) -> dict[str, Any]:
        """Return the child's reply to one request; what it refuses is raised here."""
        self._first_word()
        try:
            # A child that has ended still has its last word in the socket, which is the reason we want.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._socket.send(json.dumps(request).encode())
        except OSError as exc:
            raise _failed(what, f"{type(exc).__name__}: {exc}") from exc
        return self._reply(what)

    def _reply(self, what: str) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = json.loads(self._receive() or b'{"error": "the TPM process ended"}')
            if "refusal" in reply:
                said = reply["refusal"]
                raise DeviceRefusal(
                    said["code"], said["cause"], evidence=said["evidence"], remedy=said["remedy"]
                )
            if "error" in reply:
                raise _failed(what, str(reply["error"]))
        except (OSError, ValueError, TypeError, KeyError) as exc:
            raise _failed(what, f"{type(exc).__name__}: {exc}") from exc
        return reply

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(MESSAGE_LIMIT)
        except ConnectionResetError:
            # Said once, before what is still queued, when the child ended without having read our request.
            return self._socket.recv(MESSAGE_LIMIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, whatever it is waiting for; what does not end at once is left to PID 1."""
        self._socket.close()
        if self._pid == 0:
            return
        # What it was asked for is done or has failed; a TPM that hangs must not hang us.
        os.kill(self._pid, signal.SIGKILL)
        pidfd = os.pidfd_open(self._pid)
        try:
            if select.select([pidfd], [], [], END_TIMEOUT)[0]:
                os.waitpid(self._pid, 0)
        finally:
            os.close(pidfd)
        self._pid = 0


def extend_here(esapi: ESAPI, measurement: Measurement, log: Path) -> None:
    """Extend and log one event in the process that has the TPM open; refusals as `Measurer.extend`."""
    request = {"event": measurement.event, "data": measurement.data}
    reply = _extend(esapi, _active_banks(esapi), request)
    if "error" in reply:
        raise _failed(measurement.event, str(reply["error"]))
    _record(measurement, reply, log)


def _record(measurement: Measurement, reply: dict[str, Any], log: Path) -> None:
    """Judge what the TPM says it extended, and append it to the log."""
    digests = _digests(measurement, reply)
    if not digests:
        raise DeviceRefusal(
            "tpm-no-bank",
            "the TPM has no register bank stronger than SHA-1",
            evidence=f"PCR {PCR}: none of {', '.join(STRONG)} is active",
            remedy="activate the SHA-256 bank in the firmware set-up",
        )
    try:
        _append(log, measurement, digests)
    except OSError as exc:
        raise DeviceRefusal(
            "measurement-log-unwritable",
            "a measurement cannot be logged",
            evidence=f"{log}: {exc.strerror}",
            remedy="restart the device",
        ) from exc


def _digests(measurement: Measurement, reply: dict[str, Any]) -> list[dict[str, str]]:
    """Return the event's digest in every strong bank, each of which must be the one we compute."""
    try:
        digests = {str(each["hashAlg"]): str(each["digest"]) for each in reply["digests"]}
    except (TypeError, KeyError) as exc:
        raise _failed(measurement.event, f"{type(exc).__name__}: {exc}") from exc
    event = event_data(measurement.event, measurement.data)
    for name, digest in digests.items():
        if name not in STRONG or hashlib.new(name, event).hexdigest() != digest:
            raise _failed(measurement.event, f"the TPM reports another {name} digest than the event's")
    return [{"hashAlg": name, "digest": digest} for name, digest in digests.items()]


def _failed(what: str, evidence: str) -> DeviceRefusal:
    return DeviceRefusal(
        "tpm-failed",
        f"the TPM did not record or tell {what}",
        evidence=evidence,
        remedy=_REMEDY,
    )


def event_data(event: str, data: str) -> bytes:
    """Return the bytes that are hashed for an event: also what a verifier recomputes from the log."""
    return json.dumps({"data": data, "event": event}, sort_keys=True).encode()


def _append(log: Path, measurement: Measurement, digests: list[dict[str, str]]) -> None:
    record_number = log.read_bytes().count(b"\n") if log.exists() else 0
    record = {
        "recnum": record_number,
        "pcr": PCR,
        "digests": digests,
        "content_type": "trustme",
        "content": {"event": measurement.event, "data": measurement.data},
    }
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, json.dumps(record, sort_keys=True).encode() + b"\n")
    finally:
        os.close(fd)


def _serve(connection: socket.socket, tcti: str) -> NoReturn:
    """Serve the manager until it closes its end."""
    status = 0
    try:
        reading = quick_marker.read(tcti)
        connection.send(json.dumps({"marker": reading.as_dict() if reading is not None else None}).encode())
        from tpm2_pytss import ESAPI

        with ESAPI(tcti) as esapi:
            banks = _active_banks(esapi)
            while request := connection.recv(MESSAGE_LIMIT):
                connection.send(json.dumps(_answer(esapi, banks, json.loads(request))).encode())
    except Exception as exc:  # noqa: BLE001 - whatever the TPM library raises is the manager's evidence
        status = 1
        with contextlib.suppress(OSError):
            connection.send(json.dumps({"error": f"{type(exc).__name__}: {exc}"}).encode())
    finally:
        os._exit(status)


def _answer(esapi: Any, banks: dict[int, str], request: dict[str, str]) -> dict[str, Any]:
    if request.get("ask") != "marker":
        return _extend(esapi, banks, request)
    from trustme_init.tpm.nv_marker import read_marker

    try:
        return {"marker": read_marker(esapi).as_dict()}
    except Refusal as refusal:
        return {"refusal": refusal.as_dict()}


def _active_banks(esapi: Any) -> dict[int, str]:
    """Return the strong banks that have the register: TPM_ALG_ID to name (TPM 2.0 Part 2, section 10.6.2)."""
    from tpm2_pytss import TPM2_CAP

    names = {0x0B: "sha256", 0x0C: "sha384", 0x0D: "sha512"}
    _, answer = esapi.get_capability(TPM2_CAP.PCRS, 0, 1)
    return {
        int(bank.hash): names[int(bank.hash)]
        for bank in answer.data.assignedPCR
        if int(bank.hash) in names and bytes(bank.pcrSelect)[PCR // 8] >> (PCR % 8) & 1
    }


def _extend(esapi: Any, banks: dict[int, str], request: dict[str, str]) -> dict[str, Any]:
    data = event_data(request["event"], request["data"])
    if len(data) > EVENT_LIMIT:
        return {"error": f"event of {len(data)} bytes exceeds {EVENT_LIMIT}"}
    from tpm2_pytss import ESYS_TR, TPM2B_EVENT

    digests = esapi.pcr_event(getattr(ESYS_TR, f"PCR{PCR}"), TPM2B_EVENT(data))
    return {
        "digests": [
            {"hashAlg": banks[int(item.hashAlg)], "digest": bytes(item).hex()}
            for item in digests
            if int(item.hashAlg) in banks
        ]
    }
