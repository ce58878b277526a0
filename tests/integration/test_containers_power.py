# SPDX-License-Identifier: Apache-2.0
"""What is kept of containers, by the vault's operations on a directory: power cuts, full disks, damage.

Each change is cut at every effect; each disk that may then be there shows what it showed before, or after;
and the change can be made again. Key derivation is made cheap, and volumes are only noted down; the rest is
product.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration import power, store_kit
from tests.integration.provisioning_rig import light
from tests.unit.trust import pki
from trustme_init.compartments.volumes import OpenVolume, VolumeRequest
from trustme_init.containers.keys import Surroundings
from trustme_init.containers.operations import ContainerOperations
from trustme_init.errors import DeviceRefusal, Refusal
from trustme_init.guestos.store import SignedFiles
from trustme_init.linux.files import write_atomic

UUID = "3f0c7f66-0a0b-4f9e-9d55-0123456789ab"
OTHER = "3f0c7f66-0a0b-4f9e-9d55-0123456789ac"
PIN, NEW_PIN = "correct horse", "battery staple"
GUEST_OS = store_kit.make(
    more='mounts { image_file: "state" mount_point: "/data" fs_type: "ext4" mount_type: EMPTY def_size: 16 }'
)


@dataclass
class Noted:
    """A VolumeBackend that notes down, durably, with which key volumes were used."""

    def prepare(self, uuid: str, directory: Path, key: bytes) -> None:
        pass

    def open(
        self, uuid: str, directory: Path, requests: Sequence[VolumeRequest], key: bytes
    ) -> tuple[OpenVolume, ...]:
        write_atomic(directory / "used", hashlib.sha256(key).hexdigest().encode(), 0o600)
        return tuple(OpenVolume(each.name, Path("/dev/null")) for each in requests)

    def release(self, uuid: str) -> None:
        pass


def operations(home: Path, *, unsigned: bool = False) -> ContainerOperations:
    around = Surroundings(home, None, pin_tries=5, development=False, now=lambda: pki.NOW)
    guest_oses = store_kit.operations(home)
    return ContainerOperations(guest_oses, Noted(), around, unsigned=unsigned, measure=lambda _: None)


def text(name: str, uuid: str | None = UUID, serial: int = 1, *, token: str = "NONE") -> bytes:  # noqa: S107
    binding = f'uuid: "{uuid}" serial: {serial}' if uuid is not None else ""
    return f'name: "{name}" guest_os: "{GUEST_OS.name}" token_type: {token} {binding}'.encode()


def files(config: bytes) -> SignedFiles:
    return SignedFiles(config, *store_kit.sign(config))


FIRST, SECOND = (files(text("one", serial=serial)) for serial in (1, 2))
WITH_TOKEN = files(text("one", token="SOFT"))
NEIGHBOUR = files(text("two", OTHER))


@pytest.fixture(autouse=True)
def _light() -> Iterator[None]:
    with light():
        yield


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data volume with a GuestOS and one container, which is not the one that is looked at."""
    place = tmp_path / "cml"
    place.mkdir()
    store_kit.install(store_kit.operations(place), GUEST_OS)
    operations(place).create(NEIGHBOUR)
    return place


def code(action: Callable[[], object]) -> str:
    """Return the code of the refusal of an action, empty if it was done."""
    try:
        action()
    except Refusal as refusal:
        return refusal.code
    return ""


def look(home: Path) -> dict[str, Any]:
    """Return what can be seen of the containers; the disk is used up by it."""
    ops = operations(home)
    seen: dict[str, Any] = {}
    for uuid in ops.list()["containers"]:
        said = ops.describe(uuid)
        assert said["problem"] is None, said["problem"]
        folder = home / "containers" / uuid
        seen[uuid] = {
            "config": said["config"],
            "token": said["token"].partition(" (")[0],
            "pins": [pin for pin in (PIN, NEW_PIN) if not code(partial(ops.check_pin, uuid, pin))]
            if said["needs_pin"]
            else [],
            "key": sorted(path.name for path in folder.glob("key.*")),
            "used": (folder / "used").exists(),
        }
    left = {path.name for path in (home / "containers").iterdir()}
    assert left == set(seen), "what was interrupted was tidied away"
    return seen


@dataclass(frozen=True)
class Change:
    before: Callable[[ContainerOperations], object]
    change: Callable[[ContainerOperations], object]


def created(ops: ContainerOperations) -> None:
    ops.create(FIRST)


def paired(ops: ContainerOperations) -> None:
    ops.create(WITH_TOKEN)
    ops.change_pin(UUID, "", PIN)


def used(ops: ContainerOperations) -> None:
    ops.create(FIRST)
    ops.open(UUID, None)


CHANGES = {
    "create": Change(lambda _: None, lambda ops: ops.create(FIRST)),
    "update": Change(created, lambda ops: ops.update(UUID, SECOND)),
    "remove": Change(used, lambda ops: ops.remove(UUID)),
    "pair": Change(lambda ops: ops.create(WITH_TOKEN), lambda ops: ops.change_pin(UUID, "", PIN)),
    "change-pin": Change(paired, lambda ops: ops.change_pin(UUID, PIN, NEW_PIN)),
    "wipe": Change(used, lambda ops: ops.wipe(UUID)),
}


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def survived(survivor: power.Survivor, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    survivor.put(target)
    return target


@pytest.mark.parametrize("name", CHANGES)
def test_row33_a_power_cut_leaves_the_old_or_the_new(home: Path, tmp_path: Path, name: str) -> None:
    change = CHANGES[name]
    change.before(operations(home))
    before = look(copied(home, tmp_path / "look"))
    scratch = copied(home, tmp_path / "cut" / "cml")
    change.change(operations(scratch))
    after = look(scratch)
    assert before != after
    seen: set[object] = set()
    done = 0
    cut = 0
    while True:
        work = copied(home, tmp_path / "cut" / "cml")
        run = power.run(lambda work=work: change.change(operations(work)), work, cut=cut)  # type: ignore[misc]
        ended = run.outcome.ended
        for survivor in run.volume.survivors():
            if survivor.made_by in seen:
                continue
            seen.add(survivor.made_by)
            disk = survived(survivor, tmp_path / "found")
            found = look(copied(disk, tmp_path / "look"))
            assert found in (before, after), (cut, survivor.how)
            assert ended == "cut" or found == after, "it had answered"
            if found == before:
                change.change(operations(disk))
                assert look(disk) == after, (cut, survivor.how)
            done += 1
        if ended == "returned":
            break
        cut += 1
        assert cut < 500
    assert cut > 3
    assert done > 5


@pytest.mark.parametrize("name", ["create", "update", "pair", "change-pin"])
def test_a_full_disk_is_a_refusal_and_changes_nothing(home: Path, tmp_path: Path, name: str) -> None:
    change = CHANGES[name]
    change.before(operations(home))
    before = look(copied(home, tmp_path / "look"))
    number = 0
    while True:
        work = copied(home, tmp_path / "full" / "cml")
        run = power.run(lambda work=work: change.change(operations(work)), work, full_from=number)  # type: ignore[misc]
        if run.outcome.ended == "returned":
            break
        assert run.outcome.ended == "refused", run.outcome.text
        found = look(work)
        assert found == before, (number, run.outcome.text)
        number += 1
        assert number < 500
    assert number > 3


def test_row33_the_key_is_durable_before_anybody_uses_it(home: Path, tmp_path: Path) -> None:
    """Wherever the power goes: if volumes were used with a key, the same key is there afterwards."""
    paired(operations(home))
    cut = 0
    uses = 0
    while True:
        work = copied(home, tmp_path / "cut" / "cml")
        run = power.run(lambda work=work: operations(work).open(UUID, PIN), work, cut=cut)  # type: ignore[misc]
        for survivor in run.volume.survivors():
            disk = survived(survivor, tmp_path / "found")
            note = disk / "containers" / UUID / "used"
            key = note.read_bytes() if note.exists() else b""
            operations(disk).open(UUID, PIN)
            if key:
                uses += 1
                assert note.read_bytes() == key, (cut, survivor.how)
        if run.outcome.ended == "returned":
            break
        cut += 1
        assert cut < 500
    assert uses


def test_row20_what_will_run_is_measured_before_its_key_is_made_or_used(home: Path) -> None:
    ops = operations(home)
    ops.create(FIRST)
    folder = home / "containers" / UUID
    seen: list[tuple[str, str]] = []

    def refuses(events: Iterable[tuple[str, str]]) -> None:
        seen.extend(events)
        assert not (folder / "used").exists()
        raise DeviceRefusal("tpm-failed", "the TPM did not record it")

    assert code(partial(dataclasses.replace(ops, measure=refuses).open, UUID, None)) == "tpm-failed"
    assert not (folder / "used").exists()
    assert not list(folder.glob("key.*")), "a key was made for what was not measured"
    config_sha256 = hashlib.sha256(FIRST.config).hexdigest()
    assert seen[0] == ("container", f"{UUID} {config_sha256}")
    assert [name for name, _ in seen[1:]] == ["container-guestos", "container-image"]
    ops.open(UUID, None)
    assert (folder / "used").exists(), "this looks at the right place"


def test_what_gyroidos_left_and_nobody_can_read_is_a_refusal_with_a_name(home: Path) -> None:
    ops = operations(home)
    ops.create(WITH_TOKEN)
    left = home / "tokens" / f"{UUID}.p12"
    left.parent.mkdir(exist_ok=True)
    left.mkdir()
    assert code(partial(ops.change_pin, UUID, "", PIN)) == "container-key-lost"
    left.rmdir()
    ops.change_pin(UUID, "", PIN)
    key = home / "keys" / f"{UUID}.key"
    key.parent.mkdir()
    key.mkdir()
    assert code(partial(ops.open, UUID, PIN)) == "container-key-lost"
    assert not list((home / "containers" / UUID).glob("key.*")), "no other key is made in its place"


def test_row32_what_a_ledger_knows_outlives_removal_and_a_damaged_one_stops_everything(home: Path) -> None:
    ops = operations(home)
    ops.create(FIRST)
    ops.update(UUID, SECOND)
    assert code(lambda: ops.update(UUID, FIRST)) == "container-config-rolled-back"
    ops.remove(UUID)
    assert code(lambda: ops.create(FIRST)) == "container-config-rolled-back"
    ops.create(SECOND)
    ledger = home / "containers.json"
    kept = ledger.read_bytes()
    for damage in (b"", kept[:-20], kept.replace(b'"slot": 1', b'"slot": 2'), b"[]", b"{}"):
        ledger.write_bytes(damage)
        damaged = operations(home)
        for action in (
            lambda: damaged.create(files(text("three", "3f0c7f66-0a0b-4f9e-9d55-0123456789ad"))),  # noqa: B023
            lambda: damaged.update(UUID, files(text("one", serial=3))),  # noqa: B023
            lambda: damaged.open(UUID, None),  # noqa: B023
        ):
            assert code(action) == "container-ledger-damaged", damage
        assert damaged.describe(UUID)["problem"]["code"] == "container-ledger-damaged"
    ledger.unlink()
    assert code(lambda: ops.open(UUID, None)) == "container-ledger-damaged"
    ledger.write_bytes(kept)
    assert ops.open(UUID, None)["uuid"] == UUID


def test_uid_ranges_are_never_shared_and_free_again_only_without_any_data(home: Path) -> None:
    ops = operations(home)

    def base(uuid: str) -> int:
        bases: int = ops.open(uuid, None)["uid_base"]
        return bases

    def third(serial: int) -> SignedFiles:
        return files(text("three", "3f0c7f66-0a0b-4f9e-9d55-0123456789ad", serial))

    ops.create(FIRST)
    first, neighbour = base(UUID), base(OTHER)
    assert abs(first - neighbour) >= 65536
    assert min(first, neighbour) >= 524288 + 65536
    # A removal that was interrupted: its data is still there, and so is its range.
    (home / "containers" / UUID).rename(home / "containers" / f".removing-{UUID}")
    stuck = home / "containers" / f".removing-{UUID}"
    keeping = home / "containers.json"
    entries = json.loads(keeping.read_bytes())["containers"]
    assert entries[UUID]["slot"] == (first - 524288) // 65536
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", _refuse_to_remove)
        ops.create(third(1))
        assert stuck.exists()
        assert base("3f0c7f66-0a0b-4f9e-9d55-0123456789ad") not in (first, neighbour)
    ops.remove("3f0c7f66-0a0b-4f9e-9d55-0123456789ad")
    ops.list()
    assert not stuck.exists()
    ops.create(third(2))
    assert base("3f0c7f66-0a0b-4f9e-9d55-0123456789ad") == first


def _refuse_to_remove(path: Path) -> None:
    raise OSError(5, "Input/output error", str(path))


@pytest.mark.parametrize("name", ["record.json", "config.json"])
def test_a_damaged_file_is_one_containers_problem(home: Path, name: str) -> None:
    ops = operations(home)
    ops.create(FIRST)
    place = home / "containers" / UUID / name
    kept = place.read_bytes()
    for damage in (b"", b"{", kept[: len(kept) // 2], b"[]", b"{}", b"\0" * 65536 * 8, b'{"version": 2}'):
        place.write_bytes(damage)
        assert ops.describe(UUID)["problem"]["code"] == "container-damaged", damage
        assert code(lambda: ops.open(UUID, None)) == "container-damaged"
    place.unlink()
    for make in (Path.mkdir, lambda path: path.symlink_to("/etc/passwd")):
        make(place)
        assert ops.describe(UUID)["problem"]["code"] == "container-damaged"
        place.rmdir() if place.is_dir() else place.unlink()
    assert ops.describe(OTHER)["problem"] is None
    assert ops.open(OTHER, None)["uuid"] == OTHER
    ops.remove(UUID)
    assert ops.list()["containers"] == [OTHER]


def test_a_record_of_another_container_is_not_this_ones(home: Path) -> None:
    ops = operations(home)
    ops.create(FIRST)
    own = home / "containers" / UUID / "record.json"
    other = json.loads((home / "containers" / OTHER / "record.json").read_bytes())
    for forged in (other, {**other, "uuid": UUID}):
        own.write_bytes(json.dumps(forged).encode())
        assert code(lambda: ops.open(UUID, None)) == "container-damaged"


def test_a_container_moves_between_token_and_no_token_with_its_key(home: Path) -> None:
    ops = operations(home)
    ops.create(FIRST)
    folder = home / "containers" / UUID

    def key() -> bytes:
        return (folder / "used").read_bytes()

    ops.open(UUID, None)
    first = key()
    assert (folder / "key.plain").stat().st_mode & 0o777 == 0o600
    ops.update(UUID, files(text("one", serial=2, token="SOFT")))
    assert code(lambda: ops.open(UUID, PIN)) == "token-unpaired"
    ops.change_pin(UUID, "", PIN)
    assert code(lambda: ops.open(UUID, None)) == "token-pin-missing"
    assert code(lambda: ops.open(UUID, NEW_PIN)) == "token-wrong-pin"
    ops.open(UUID, PIN)
    assert key() == first
    assert sorted(path.name for path in folder.glob("key.*")) == ["key.wrapped"]
    ops.update(UUID, files(text("one", serial=3)))
    assert code(lambda: ops.open(UUID, None)) == "token-pin-missing"
    ops.open(UUID, PIN)
    assert key() == first
    assert sorted(path.name for path in folder.glob("key.*")) == ["key.plain"]
    ops.open(UUID, None)
    assert key() == first


def test_a_token_that_is_gone_is_uninitialised_and_not_made_anew(home: Path) -> None:
    ops = operations(home)
    paired(ops)
    ops.open(UUID, PIN)
    shutil.rmtree(home / "containers" / UUID / "token")
    assert code(lambda: ops.open(UUID, PIN)) == "token-uninitialised"
    assert code(lambda: ops.change_pin(UUID, "", PIN)) == "token-uninitialised"
    ops.wipe(UUID)
    ops.change_pin(UUID, "", PIN)
    ops.open(UUID, PIN)


def test_row32_a_text_put_back_onto_the_disk_is_not_the_containers(home: Path) -> None:
    ops = operations(home)
    ops.create(FIRST)
    place = home / "containers" / UUID / "config.json"
    old = place.read_bytes()
    ops.update(UUID, SECOND)
    new = place.read_bytes()
    place.write_bytes(old)
    assert code(lambda: ops.open(UUID, None)) == "container-config-rolled-back"
    assert ops.describe(UUID)["problem"]["code"] == "container-config-rolled-back"
    place.write_bytes(new)
    assert ops.open(UUID, None)["uuid"] == UUID


def test_row32_of_texts_that_name_no_container_only_the_accepted_one_counts(home: Path) -> None:
    """Both are signed and good by themselves; one is in the place of the other."""
    ops = operations(home)
    uuids = [ops.create(files(text(name, None)))["uuid"] for name in ("three", "four")]
    places = [home / "containers" / uuid / "config.json" for uuid in uuids]
    kept = places[0].read_bytes()
    places[0].write_bytes(places[1].read_bytes())
    assert code(lambda: ops.open(uuids[0], None)) == "container-config-exchanged"
    places[0].write_bytes(kept)
    assert ops.open(uuids[0], None)["uuid"] == uuids[0]
    assert code(lambda: ops.update(uuids[0], files(text("five", None)))) == "container-config-unbound"
