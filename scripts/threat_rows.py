# SPDX-License-Identifier: Apache-2.0
"""The kinds of flaw that every build is tested against; numbers are those in the names of the tests."""

from __future__ import annotations

from typing import Final

ROWS: Final = {
    1: "Image exchanged between verification and use",
    2: "Signature that covers only a part, or a length that overflows",
    3: "Check avoided by leaving out or repeating an element",
    4: "Input that failed its check is kept and trusted later",
    5: "Sealed to the wrong PCRs or to a weak bank",
    6: "Unmeasured configuration changes what runs",
    7: "Keys derived from a constant",
    8: "Certificate issued or accepted for another identity",
    9: "Peer's or attestation key's identity not checked",
    10: "Disk encryption header that can be altered",
    11: "Foreign volume taken for our own",
    12: "Secret still readable after the hand-off",
    13: "Shell or prompt when something fails",
    14: "Device-mapper table exchanged below a mount",
    15: "Kernel command line opens a door",
    16: "Revoked signer or image accepted",
    17: "Wrong clock lets expired things pass",
    18: "TPM traffic read or altered on its bus",
    19: "Malformed TPM replies",
    20: "Measured after it was used",
    21: "PIN found by trying",
    22: "Container overwrites what the system executes",
    23: "Descriptor or working directory leaks into a container",
    24: "Links and races while a root file system is prepared",
    25: "Container gains rights over the machine",
    26: "Build inputs that are not what was pinned",
    27: "Forged or unreadable log entries",
    28: "Interpreter cannot start as PID 1",
    29: "Secrets in dumps, logs or command lines",
    30: "Key file that others can read",
    31: "Provisioning opened again",
    32: "Signed configuration used where or when it was not meant",
    33: "Interrupted change leaves the device unusable",
    34: "Control client crashes or blocks the manager",
}
