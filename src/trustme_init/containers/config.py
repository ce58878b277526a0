# SPDX-License-Identifier: Apache-2.0
"""From the three parts of a container configuration to one that may be acted upon. Pure.

Rules:
- Size, signer's chain, signature, revocation, and only then the parser, as for a GuestOS. A text that nobody
  signed is parsed only where the policy of a development build takes such; it stays marked UNSIGNED.
- A signature that is given counts: a bad one is refused, never taken for none.
- What a signed text is good for stands in it: `uuid`, the one container, and `serial`, which rises with each
  configuration of that container (`ledger` keeps the floor). Both or none.
- What this version cannot do is refused by its name. A wish is never passed over in silence.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from trustme_init.compartments.spec import CORE_NAME, CORE_UUID
from trustme_init.errors import TrustRefusal
from trustme_init.trust.selection import NAME_PATTERN

if TYPE_CHECKING:
    from trustme_init.guestos.store import SignedFiles
    from trustme_init.proto.container_pb2 import ContainerConfig
    from trustme_init.trust.anchors import AnchorSet

CONFIG_LIMIT: Final = 32 * 1024
"""Bytes; those of the original's documentation have less than 1 KiB."""
ENTRY_LIMIT: Final = 64
"""Entries of any list."""
SIZE_LIMIT: Final = 2**20
"""MiB of a volume (1 TiB), and of memory."""
SERIAL_LIMIT: Final = 2**63 - 1
UUID_PATTERN: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"

_UUID: Final = re.compile(UUID_PATTERN)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_GUEST_OS: Final = re.compile(NAME_PATTERN)
_IMAGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENVIRONMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]{0,4000}", re.DOTALL)
_CPUS: Final = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?){0,63}")
_INTERFACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_MAC: Final = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_DEVICE: Final = re.compile(r"[abc] ([0-9]{1,7}|\*):([0-9]{1,7}|\*) [rwm]{1,3}")
_REMEDY: Final = "correct the configuration, raise its serial, and sign it again"


class Trust(IntEnum):
    """ContainerTrust (container.proto), the same numbers, without protobuf's import."""

    SIGNED = 1
    UNSIGNED = 3


class Token(IntEnum):
    """ContainerTokenType (container.proto), likewise."""

    NONE = 1
    SOFT = 2


@dataclass(frozen=True, slots=True)
class JudgedConfig:
    """A configuration that may be acted upon."""

    config: ContainerConfig
    """Treat as read-only."""
    trust: Trust
    sha256: str
    """Of the raw text, hex."""
    uuid: str | None
    """The one container that it is for; None if it does not say."""
    serial: int
    """0 if it is for no container in particular."""

    @property
    def token(self) -> Token:
        """What protects the container's key."""
        return Token(self.config.token_type)

    @property
    def version(self) -> int | None:
        """The GuestOS version that it is bound to; None where that is the newest."""
        return self.config.guestos_version if self.config.HasField("guestos_version") else None


def judge(
    files: SignedFiles, anchors: Callable[[], AnchorSet], *, at: datetime, unsigned: bool
) -> JudgedConfig:
    """Judge a configuration; `unsigned` says whether it may be without a signature.

    `anchors` gives those of GuestOSes, who vouch for containers too, or refuses (TrustRefusal "no-anchor").
    TrustRefusal: "container-config-size", "container-config-unsigned", those of `anchors`, `verify_chain` and
    `verify_signature`, "config-revoked", "bad-container-config", "container-config-unsupported".
    """
    if not 0 < len(files.config) <= CONFIG_LIMIT:
        raise TrustRefusal(
            "container-config-size",
            "the container's configuration is empty or too large",
            evidence=f"{len(files.config)} bytes, at most {CONFIG_LIMIT}",
            remedy=_REMEDY,
        )
    trust = Trust.UNSIGNED
    if files.signature or files.certificate or not unsigned:
        _require_signature(files)
        _verify(files, anchors(), at)
        trust = Trust.SIGNED
    message = parse(files.config)
    return JudgedConfig(
        config=message,
        trust=trust,
        sha256=hashlib.sha256(files.config).hexdigest(),
        uuid=message.uuid if message.HasField("uuid") else None,
        serial=message.serial,
    )


def _require_signature(files: SignedFiles) -> None:
    if not files.signature or not files.certificate:
        raise TrustRefusal(
            "container-config-unsigned",
            "the container's configuration is not signed, and this device takes only signed ones",
            evidence=f"signature {len(files.signature)} bytes, certificate {len(files.certificate)} bytes",
            remedy="give the configuration with its signature and the signer's certificate",
        )


def _verify(files: SignedFiles, anchors: AnchorSet, at: datetime) -> None:
    from trustme_init.trust.certificate import load
    from trustme_init.trust.chain import verify_chain
    from trustme_init.trust.signature import verify_signature

    signer = verify_chain(files.certificate, anchors, at=at)
    verify_signature(load(signer.leaf_der), files.signature, files.config)
    digest = hashlib.sha256(files.config).digest()
    if anchors.revocations.lists_digest(digest):
        raise TrustRefusal(
            "config-revoked",
            "the container's configuration is revoked in dbx",
            evidence=f"sha256 {digest.hex()}",
            remedy="sign another configuration for the container",
        )


def parse(text: bytes) -> ContainerConfig:
    """Parse and validate a text that was **verified**, or that the policy takes without.

    TrustRefusal: "bad-container-config", "container-config-unsupported"; the evidence names the field.
    """
    from trustme_init.proto.container_pb2 import ContainerConfig
    from trustme_init.trust.textform import parse as parse_text

    message = ContainerConfig()
    try:
        parse_text(text, message)
    except ValueError as exc:
        raise _bad(str(exc)) from exc
    for name in ("color", "type", "token_type"):
        # Texts for the original leave these out (its parser takes the default), and a reply must have them.
        if not message.HasField(name):
            setattr(message, name, getattr(message, name))
    if not message.IsInitialized():
        raise _bad("a required field is missing")
    _validate(message)
    return message


def _validate(message: ContainerConfig) -> None:
    _refuse_unsupported(message)
    _identity(message)
    _match("guest_os", message.guest_os, _GUEST_OS)
    if message.HasField("guestos_version") and not message.guestos_version:
        raise _bad("guestos_version: 0")
    _few("image_sizes", message.image_sizes)
    for size in message.image_sizes:
        _match("image_sizes.image_name", size.image_name, _IMAGE)
        if not 1 <= size.image_size <= SIZE_LIMIT:
            raise _bad(f"image_sizes.image_size: {size.image_size} is outside 1..{SIZE_LIMIT} MiB")
    _unique("image_sizes.image_name", (size.image_name for size in message.image_sizes))
    if message.ram_limit > SIZE_LIMIT:
        raise _bad(f"ram_limit: {message.ram_limit} MiB")
    _each("init_env", message.init_env, _ENVIRONMENT)
    _unique("init_env", (entry.partition("=")[0] for entry in message.init_env))
    if message.assign_cpus:
        _match("assign_cpus", message.assign_cpus, _CPUS)
    _each("allow_dev", message.allow_dev, _DEVICE)
    _each("assign_dev", message.assign_dev, _DEVICE)
    _network(message)


def _identity(message: ContainerConfig) -> None:
    _match("name", message.name, _NAME)
    if message.name == CORE_NAME:
        raise _bad(f"name: {CORE_NAME} is the core container")
    if message.HasField("uuid") != message.HasField("serial"):
        raise _bad("uuid and serial: one without the other")
    if message.HasField("uuid"):
        _match("uuid", message.uuid, _UUID)
        if message.uuid == CORE_UUID:
            raise _bad("uuid: that is the core container")
        if not 1 <= message.serial <= SERIAL_LIMIT:
            raise _bad(f"serial: {message.serial} is outside 1..{SERIAL_LIMIT}")


def _network(message: ContainerConfig) -> None:
    if message.dns_server:
        try:
            ipaddress.ip_address(message.dns_server)
        except ValueError as exc:
            raise _bad(f"dns_server: {ascii(message.dns_server)[:100]}") from exc
    _few("net_ifaces", message.net_ifaces)
    for physical in message.net_ifaces:
        if not _MAC.fullmatch(physical.netif):
            _match("net_ifaces.netif", physical.netif, _INTERFACE)
        _each("net_ifaces.mac_filter", physical.mac_filter, _MAC)
    _unique("net_ifaces.netif", (each.netif.lower() for each in message.net_ifaces))
    _few("vnet_configs", message.vnet_configs)
    for virtual in message.vnet_configs:
        _match("vnet_configs.if_name", virtual.if_name, _INTERFACE)
        if virtual.HasField("if_rootns_name"):
            _match("vnet_configs.if_rootns_name", virtual.if_rootns_name, _INTERFACE)
        if virtual.HasField("if_mac"):
            _match("vnet_configs.if_mac", virtual.if_mac, _MAC)
    _unique("vnet_configs.if_name", (each.if_name for each in message.vnet_configs))


def _refuse_unsupported(message: ContainerConfig) -> None:
    """Refuse what would be another container than the one that was signed for, were it passed over."""
    from trustme_init.proto import container_pb2 as proto

    wishes = {
        "type": message.type != proto.CONTAINER,
        "userns: false": not message.userns,
        "netns: false": not message.netns,
        "token_type: USB": message.token_type == proto.USB,
        "allow_system_time": message.allow_system_time,
        "allow_module": bool(message.allow_module),
        "usb_configs": bool(message.usb_configs),
        "fifos": bool(message.fifos),
        "usb_pin_entry": message.usb_pin_entry,
        "enable_xorg_compat": message.enable_xorg_compat,
    }
    asked = [name for name, wished in wishes.items() if wished]
    if asked:
        raise TrustRefusal(
            "container-config-unsupported",
            "the configuration asks for something that this version does not offer",
            evidence=", ".join(asked),
            remedy="leave it out; every container has a user and a network namespace of its own",
        )


def _match(field: str, value: str, pattern: re.Pattern[str]) -> None:
    if not pattern.fullmatch(value):
        raise _bad(f"{field}: {ascii(value)[:100]}")


def _few(field: str, values: Iterable[object]) -> None:
    count = sum(1 for _ in values)
    if count > ENTRY_LIMIT:
        raise _bad(f"{field}: {count} entries, at most {ENTRY_LIMIT}")


def _each(field: str, values: Iterable[str], pattern: re.Pattern[str]) -> None:
    texts = tuple(values)
    _few(field, texts)
    for value in texts:
        _match(field, value, pattern)


def _unique(field: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise _bad(f"{field}: {ascii(value)[:100]} twice")
        seen.add(value)


def _bad(evidence: str) -> TrustRefusal:
    return TrustRefusal(
        "bad-container-config",
        "the container's configuration is not acceptable",
        evidence=evidence[:400],
        remedy=_REMEDY,
    )
