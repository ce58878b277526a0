# SPDX-License-Identifier: Apache-2.0
"""Stage `core`: choose, verify and measure the core GuestOS.

`trust/` judges; this module opens. Every file is opened once, without following a symbolic link, read to
a limit, and the bytes that were read are the bytes that are judged and used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trustme_init.errors import TrustRefusal
from trustme_init.linux.files import openat2, read_limited
from trustme_init.tpm.measure import Measurement, Measurer
from trustme_init.trust.clock import ClockDecision, effective_time
from trustme_init.trust.guestos import CONFIG_LIMIT, VerifiedGuestOs, verify_guestos
from trustme_init.trust.selection import Candidate, choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trustme_init.boot.platform import PlatformFact
    from trustme_init.machine import Machine
    from trustme_init.policy import Policy
    from trustme_init.provisioning.mode import ModeFact
    from trustme_init.trust.anchors import AnchorSet

SIGNATURE_LIMIT: Final = 4096
CERTIFICATE_LIMIT: Final = 64 * 1024
_SUFFIXES: Final = {".conf": CONFIG_LIMIT, ".sig": SIGNATURE_LIMIT, ".cert": CERTIFICATE_LIMIT}
GUESTOS_DIR: Final = "operatingsystems"
IGNORED_LIMIT: Final = 32
"""Names in the boot report: a store can be written by others, and the report lives in memory."""


@dataclass(frozen=True, slots=True)
class CoreFact:
    """The verified core GuestOS; `directory` is an open descriptor of the folder that holds its images."""

    verified: VerifiedGuestOs
    config_text: bytes
    directory: int
    clock: ClockDecision
    ignored: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the boot report's form."""
        return {
            "core": {
                "name": self.verified.guest_os.name,
                "version": self.verified.guest_os.version,
                "config_sha256": self.verified.config_digest.hex(),
                "signer": {
                    "subject": self.verified.signer.subject,
                    "sha256": self.verified.signer.sha256_fingerprint,
                    "anchor": self.verified.signer.anchor.sha256_fingerprint,
                },
                "images": {image.image_file: image.root_hash.hex() for image in self.verified.images},
                "ignored_in_store": list(self.ignored[:IGNORED_LIMIT]),
            },
            "clock": {
                "at": self.clock.at.isoformat(),
                "why": self.clock.reason.value,
                "rtc": self.clock.rtc.isoformat(),
            },
        }


def verify(store: Path, policy: Policy, anchors: AnchorSet, *, rtc: datetime) -> CoreFact:
    """Return the highest complete version of the policy's core GuestOS, verified.

    There is no fall-back: when the highest complete version does not verify, that is the end. An older
    version is only ever started because somebody removed the newer one.

    Raises:
        TrustRefusal: "guestos-missing", "guestos-incomplete", "core-file-unreadable", or whatever
            `verify_guestos` finds.
    """
    clock = effective_time(rtc, policy.build_date)
    root = _open(store / GUESTOS_DIR, os.O_RDONLY | os.O_DIRECTORY)
    try:
        selection = choose(candidates(root), policy.core_guest_os)
        stem = selection.chosen.stem
        config, signature, certificate = (
            _read(root, f"{stem}{suffix}", limit) for suffix, limit in _SUFFIXES.items()
        )
        verified = verify_guestos(
            config,
            signature,
            certificate,
            anchors,
            at=clock.at,
            hardware=policy.hardware,
            file_stem=stem,
        )
        directory = _open(Path(stem), os.O_RDONLY | os.O_DIRECTORY, dirfd=root)
    finally:
        os.close(root)
    return CoreFact(verified, config, directory, clock, selection.ignored)


def candidates(root: int) -> list[Candidate]:
    """List the GuestOSes in the open directory `root`; complete means that no part is absent."""
    try:
        names = set(os.listdir(root))
    except OSError as exc:
        raise _unreadable(GUESTOS_DIR, exc) from exc
    found = []
    for name in sorted(names):
        stem, dot, suffix = name.rpartition(".")
        if not dot or suffix != "conf":
            continue
        complete = stem in names and all(f"{stem}{end}" in names for end in _SUFFIXES)
        found.append(Candidate(stem, complete))
    return found


def measure(machine: Machine, measurer: Measurer | None, events: Sequence[Measurement]) -> None:
    """Extend what is about to be used into the TPM; DeviceRefusal("tpm-failed") stops the boot."""
    if measurer is not None:
        with measurer:
            measurer.extend(events, machine.measurement_log)


def measurements(
    core: CoreFact, platform: PlatformFact, mode: ModeFact, *, development: bool
) -> tuple[Measurement, ...]:
    """Return the events of this boot in order: kind of build, mode, anchors, configuration, images."""
    anchors = "".join(sorted(anchor.sha256_fingerprint for anchor in platform.anchors.anchors))
    verified = core.verified
    return (
        Measurement("build", "development" if development else "production"),
        Measurement("mode", mode.measured),
        Measurement("core-anchors", hashlib.sha256(anchors.encode()).hexdigest()),
        Measurement("core-config", f"{verified.guest_os.stem} {verified.config_digest.hex()}"),
        *(
            Measurement("core-image", f"{image.image_file} {image.root_hash.hex()}")
            for image in verified.images
        ),
    )


def _open(path: Path, flags: int, *, dirfd: int | None = None) -> int:
    try:
        if dirfd is None:
            return openat2(path, flags)
        return openat2(path, flags, dirfd=dirfd)
    except OSError as exc:
        raise _unreadable(str(path), exc) from exc


def _read(root: int, name: str, limit: int) -> bytes:
    # O_NONBLOCK: a FIFO in the store must be refused, not waited for.
    fd = _open(Path(name), os.O_RDONLY | os.O_NONBLOCK, dirfd=root)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return read_limited(fd, limit)
    except OSError as exc:
        raise _unreadable(name, exc) from exc
    finally:
        os.close(fd)


def _unreadable(name: str, exc: OSError) -> TrustRefusal:
    return TrustRefusal(
        "core-file-unreadable",
        "a file of the core GuestOS cannot be read",
        evidence=f"{name}: {exc.strerror}",
        remedy="write the store partition anew from a complete image",
    )
