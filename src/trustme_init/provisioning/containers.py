# SPDX-License-Identifier: Apache-2.0
"""The vault's operations on containers, by name: from a request's arguments to `containers.operations`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from trustme_init.containers.operations import ContainerOperations
from trustme_init.guestos.store import SignedFiles
from trustme_init.provisioning.arguments import Arguments, Result, octets, text


class HasContainers(Protocol):
    """The service that these are operations of."""

    @property
    def containers(self) -> ContainerOperations:
        """What does them."""
        ...


def _files(arguments: Arguments) -> SignedFiles:
    return SignedFiles(*(octets(arguments, name) for name in ("config", "signature", "certificate")))


def _pin(arguments: Arguments) -> str | None:
    return text(arguments, "pin") if "pin" in arguments else None


def _list(service: HasContainers, _arguments: Arguments) -> Result:
    return service.containers.list()


def _describe(service: HasContainers, arguments: Arguments) -> Result:
    return service.containers.describe(text(arguments, "uuid"))


def _create(service: HasContainers, arguments: Arguments) -> Result:
    return service.containers.create(_files(arguments))


def _update(service: HasContainers, arguments: Arguments) -> Result:
    return service.containers.update(text(arguments, "uuid"), _files(arguments))


def _remove(service: HasContainers, arguments: Arguments) -> Result:
    return service.containers.remove(text(arguments, "uuid"))


def _wipe(service: HasContainers, arguments: Arguments) -> Result:
    return service.containers.wipe(text(arguments, "uuid"))


def _open(service: HasContainers, arguments: Arguments) -> Result:
    return service.containers.open(text(arguments, "uuid"), _pin(arguments))


def _change_pin(service: HasContainers, arguments: Arguments) -> Result:
    return service.containers.change_pin(
        text(arguments, "uuid"), text(arguments, "pin"), text(arguments, "new_pin")
    )


def _check_pin(service: HasContainers, arguments: Arguments) -> Result:
    return service.containers.check_pin(text(arguments, "uuid"), _pin(arguments))


CONTAINER_OPERATIONS: Final[Mapping[str, Callable[[HasContainers, Arguments], Result]]] = {
    "containers": _list,
    "container": _describe,
    "container-create": _create,
    "container-update": _update,
    "container-remove": _remove,
    "container-wipe": _wipe,
    "container-open": _open,
    "container-change-pin": _change_pin,
    "container-check-pin": _check_pin,
}
