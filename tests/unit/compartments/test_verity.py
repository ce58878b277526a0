# SPDX-License-Identifier: Apache-2.0
"""What DeviceMapperVerity asks of the kernel, and what it leaves behind; a real one is in tests/qemu."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from trustme_init.compartments import verity
from trustme_init.errors import Refusal
from trustme_init.linux import dm
from trustme_init.linux.dm import Mapping, VerityTable
from trustme_init.linux.loop import Loop
from trustme_init.trust.verity import VerityParameters

PARAMETERS = VerityParameters(root_hash=b"r" * 32, salt=b"s" * 32, data_blocks=4)


class Kernel:
    """Records the calls; any of them can be made to fail."""

    def __init__(self, node: Path, failing: str = "") -> None:
        self.calls: list[str] = []
        self.loops: list[Loop] = []
        self.tables: list[VerityTable] = []
        self.names: list[str] = []
        self._node = node
        self._failing = failing

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._failing:
            raise OSError(5, "injected", name)

    def attach(self, fd: int, *, size: int = 0) -> Loop:
        self._call(f"attach {size}")
        loop = Loop(Path("/dev/loopX"), os.open("/dev/null", os.O_RDONLY))
        self.loops.append(loop)
        return loop

    def create_verity(self, name: str, _uuid: str, *, table: VerityTable, **_devices: Any) -> Mapping:
        self._call("create")
        self.tables.append(table)
        self.names.append(name)
        return Mapping(name, self._node, 0)

    def remove(self, _name: str, *, deferred: bool) -> None:
        self._call(f"remove deferred={deferred}")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    path = tmp_path / "dm-0"
    path.write_bytes(bytes(4096))
    return path


def opened(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, name: str = "core0-root"
) -> verity.DeviceMapperVerityDevice:
    monkeypatch.setattr(verity, "attach", kernel.attach)
    monkeypatch.setattr(dm, "create_verity", kernel.create_verity)
    monkeypatch.setattr(dm, "remove", kernel.remove)
    return verity.DeviceMapperVerity().open(name, 0, 0, PARAMETERS)


def test_the_table_is_the_signed_one_and_nothing_is_held_after_close(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(node)
    device = opened(kernel, monkeypatch)
    assert device.path == node
    assert kernel.tables == [
        VerityTable(root_hash=PARAMETERS.root_hash, salt=PARAMETERS.salt, data_blocks=PARAMETERS.data_blocks)
    ]
    (given,) = kernel.tables
    for name in ("data_block_size", "hash_block_size", "hash_start_block", "algorithm", "version"):
        assert getattr(given, name) == getattr(PARAMETERS, name)
    assert given.options == ()
    assert kernel.calls == ["attach 16384", "attach 0", "create"]
    assert [loop.fd for loop in kernel.loops] == [-1, -1]
    device.close()
    device.close()
    assert kernel.calls[3:] == ["remove deferred=True"]


@pytest.mark.parametrize("failing", ["attach 16384", "attach 0", "create"])
def test_a_kernel_that_cannot_is_a_refusal_without_traces(
    node: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    kernel = Kernel(node, failing)
    with pytest.raises(Refusal) as caught:
        opened(kernel, monkeypatch)
    assert caught.value.code == "verity-unavailable"
    assert "injected" in caught.value.evidence
    assert all(loop.fd == -1 for loop in kernel.loops)


def test_a_first_block_that_does_not_fit_is_the_images_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "unreadable"  # pread of a directory fails as pread of a corrupt block does
    directory.mkdir()
    kernel = Kernel(directory)
    with pytest.raises(Refusal) as caught:
        opened(kernel, monkeypatch)
    assert caught.value.code == "verity-mismatch"
    assert kernel.calls[3:] == ["remove deferred=True"]
    assert all(loop.fd == -1 for loop in kernel.loops)


def test_the_longest_names_make_a_name_that_the_kernel_takes(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(node)
    for _ in range(2):
        opened(kernel, monkeypatch, f"{'c' * 63}-{'i' * 64}").close()
    for name in kernel.names:
        dm.pack(name)
    assert len(set(kernel.names)) == 2
