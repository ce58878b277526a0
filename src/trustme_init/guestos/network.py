# SPDX-License-Identifier: Apache-2.0
"""The network of whoever asked for an installation, for the process that fetches.

The base system has no network of its own: interfaces belong to containers. The fetcher uses those of its
caller, with the name servers that are configured there, in namespaces that are its own: nothing of the caller
is run or loaded, and the device's own /etc is not touched.
"""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from trustme_init.errors import ControlRefusal
from trustme_init.guestos.sources import root_of
from trustme_init.linux.files import (
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    openat2,
    read_limited,
)
from trustme_init.linux.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC, mount
from trustme_init.linux.process import CLONE_NEWNET, CLONE_NEWNS, setns, unshare

RESOLVER: Final = Path("/etc/resolv.conf")
_LIMIT: Final = 16 * 1024
_SERVERS: Final = 3
"""The C library looks at no more (resolv.conf(5), MAXNS)."""


def enter(caller: int) -> None:
    """Move the calling process into the network of the process that a pidfd names.

    ControlRefusal("caller-gone").
    """
    servers = _name_servers(caller)
    try:
        setns(caller, CLONE_NEWNET)
    except OSError as exc:
        raise ControlRefusal(
            "caller-gone",
            "the network of whoever asked for the installation cannot be used",
            evidence=str(exc.strerror),
            remedy="keep the client running until the installation has begun",
        ) from exc
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE, "")
    mount("tmpfs", str(RESOLVER.parent), "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755,size=64k")
    RESOLVER.write_text("".join(f"nameserver {server}\n" for server in servers), encoding="ascii")
    RESOLVER.chmod(0o644)


def _name_servers(caller: int) -> list[str]:
    """Return the addresses in the caller's resolv.conf; whatever else it says is not looked at."""
    root = root_of(caller)
    text = b""
    try:
        # Links are fine here: they end inside the root, and only addresses are taken.
        fd = openat2(
            str(RESOLVER),
            os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY,
            dirfd=root,
            resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
        )
        try:
            text = read_limited(fd, _LIMIT)
        finally:
            os.close(fd)
    except OSError:
        pass  # then names are not found, and the download says so
    finally:
        os.close(root)
    return addresses(text)[:_SERVERS]


def addresses(text: bytes) -> list[str]:
    """Return the well-formed addresses of `nameserver` lines."""
    found = []
    for line in text.decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            with suppress(ValueError):
                found.append(str(ipaddress.ip_address(words[1])))
    return found
