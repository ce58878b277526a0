# SPDX-License-Identifier: Apache-2.0
"""Stage `platform`: what the firmware says, whether that is acceptable, and the anchors that follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trustme_init.firmware.efivars import EfiVars
from trustme_init.firmware.secureboot import FirmwareFacts, check_platform, read_platform
from trustme_init.trust.anchors import AnchorSet, core_anchors

if TYPE_CHECKING:
    from trustme_init.policy import Policy


@dataclass(frozen=True, slots=True)
class PlatformFact:
    """Firmware facts and the core anchors: `db` minus `dbx`."""

    firmware: FirmwareFacts
    anchors: AnchorSet

    def as_dict(self) -> dict[str, Any]:
        """Return the boot report's form."""
        return {
            "firmware": {
                "secure_boot": self.firmware.secure_boot,
                "setup_mode": self.firmware.setup_mode,
                "db_certificates": len(self.firmware.db.certificates),
                "dbx_certificates": len(self.firmware.dbx.certificates),
                "dbx_sha256": len(self.firmware.dbx.sha256),
                "ignored": sorted({*self.firmware.db.ignored, *self.firmware.dbx.ignored}),
            },
            "anchors": [
                {
                    "subject": anchor.subject,
                    "sha256": anchor.sha256_fingerprint,
                    "purpose": anchor.purpose.value,
                    "source": anchor.source,
                }
                for anchor in self.anchors.anchors
            ],
        }


def read(efivars: Path, policy: Policy) -> PlatformFact:
    """Read and judge the platform; FirmwareRefusal or TrustRefusal("no-anchor")."""
    firmware = read_platform(EfiVars(efivars))
    check_platform(firmware, allow_insecure=policy.allows_insecure_boot)
    return PlatformFact(firmware, core_anchors(firmware))
