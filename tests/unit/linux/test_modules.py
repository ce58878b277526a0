# SPDX-License-Identifier: Apache-2.0
"""Module loading against a made-up sysfs, and a modprobe that only tells what it was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from trustme_init.errors import DeviceRefusal
from trustme_init.linux import modules


def device(sysfs: Path, bus: str, name: str, alias: str | None, *, bound: bool = False) -> None:
    directory = sysfs / "bus" / bus / "devices" / name
    directory.mkdir(parents=True)
    if alias is not None:
        (directory / "modalias").write_text(f"{alias}\n")
    if bound:
        (directory / "driver").mkdir()


def test_aliases_of_devices_without_a_driver(tmp_path: Path) -> None:
    device(tmp_path, "pci", "0", "pci:v1AF4")
    device(tmp_path, "pci", "1", "pci:v1AF4")
    device(tmp_path, "pci", "2", "pci:bound", bound=True)
    device(tmp_path, "virtio", "0", "virtio:d2")
    device(tmp_path, "usb", "0", None)
    device(tmp_path, "usb", "1", "")
    assert modules.coldplug_aliases(tmp_path) == ("pci:v1AF4", "virtio:d2")
    assert modules.coldplug_aliases(tmp_path / "none") == ()


def test_this_machines_own_sysfs() -> None:
    assert all(":" in alias for alias in modules.coldplug_aliases())


def test_what_is_there(tmp_path: Path) -> None:
    for name, state in (("virtio_blk", "live\n"), ("half", "coming\n"), ("built_in", None)):
        directory = tmp_path / "module" / name
        directory.mkdir(parents=True)
        if state:
            (directory / "initstate").write_text(state)
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/a/dm-verity.ko\n")
    found = {
        name: modules.is_there(name, sysfs=tmp_path, tree=tmp_path)
        for name in ("virtio_blk", "virtio-blk", "half", "built_in", "ext4", "dm_verity", "ext", "nothing")
    }
    assert found == {
        "virtio_blk": True, "virtio-blk": True, "half": False, "built_in": True, "ext4": True,
        "dm_verity": True, "ext": False, "nothing": False,
    }  # fmt: skip


@pytest.fixture
def modprobe(tmp_path: Path) -> Path:
    script = tmp_path / "modprobe"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$0.args"\necho "why not" >&2\nexit 1\n')
    script.chmod(0o755)
    return script


def asked(modprobe: Path) -> list[str]:
    return Path(f"{modprobe}.args").read_text().splitlines()


def test_one_call_for_all_and_the_missing_are_named(modprobe: Path) -> None:
    with pytest.raises(DeviceRefusal) as caught:
        modules.load(["no-such-a", "no_such_b"], required=True, modprobe=modprobe)
    assert caught.value.code == "module-missing"
    assert "no-such-a, no_such_b" in caught.value.cause
    assert caught.value.evidence == "why not"
    assert asked(modprobe) == ["--all", "--quiet", "--", "no-such-a", "no_such_b"]


def test_aliases_may_have_no_module(modprobe: Path) -> None:
    modules.load(["pci:v1AF4", "-option-like"], modprobe=modprobe)
    assert asked(modprobe) == ["--all", "--quiet", "--", "pci:v1AF4", "-option-like"]


def test_what_is_there_costs_no_call(modprobe: Path) -> None:
    names = [path.name for path in Path("/sys/module").iterdir() if not (path / "initstate").exists()][:2]
    modules.load(names, required=True, modprobe=modprobe)
    modules.load([], modprobe=modprobe)
    assert not Path(f"{modprobe}.args").exists()


def test_no_modprobe(tmp_path: Path) -> None:
    with pytest.raises(DeviceRefusal) as caught:
        modules.load(["no-such-a"], required=True, modprobe=tmp_path / "none")
    assert "none" in caught.value.evidence
    modules.load(["pci:v1AF4"], modprobe=tmp_path / "none")
