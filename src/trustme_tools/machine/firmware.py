# SPDX-License-Identifier: Apache-2.0
"""UEFI firmware for virtual machines: OVMF with Secure Boot, and variable stores with a PKI's keys.

OVMF comes from Debian trixie whatever the host is: it boots in half the time of bookworm's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trustme_tools.image import packages
from trustme_tools.image.cache import Cache
from trustme_tools.pki.directory import PkiDirectory
from trustme_tools.uefi import keys, store

_CODE: Final = "usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
_TEMPLATE: Final = "usr/share/OVMF/OVMF_VARS_4M.fd"


@dataclass(frozen=True, slots=True)
class Firmware:
    """Code (read only, shared) and the variable store a machine starts with (copied for each)."""

    code: Path
    variables: Path


def prepare(
    cache: Cache,
    pki: Path,
    *,
    dbx: Sequence[str] = (),
    extra_db: Sequence[Path] = (),
    default_db: bool = True,
    secure_boot: bool = True,
    setup_mode: bool = False,
) -> Firmware:
    """Return firmware that has the public keys of `pki` enrolled; options as `trustme uefi vars`."""
    tree = packages.fetch(cache, "ovmf", ("ovmf",))
    lists = keys.key_lists(
        PkiDirectory(pki), dbx=dbx, extra_db=extra_db, default_db=default_db, setup_mode=setup_mode
    )

    def build(target: Path) -> None:
        store.write_store(tree / _TEMPLATE, target / "vars.fd", lists, secure_boot=secure_boot)

    digests = {name: hashlib.sha256(data).hexdigest() for name, data in lists.items()}
    entry = cache.get("ovmf-variables", [tree.name, digests, secure_boot], build)
    return Firmware(tree / _CODE, entry / "vars.fd")
