# SPDX-License-Identifier: Apache-2.0
"""Containers from their configuration to their end, on natively booted devices (interop section 6.4)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import container_kit as kit
from tests.integration.container_kit import PIN, Operator, config
from tests.integration.sandbox import Factory
from trustme_init.proto.container_pb2 import ContainerState
from trustme_init.proto.control_pb2 import ControllerToDaemon as Request


@pytest.fixture(scope="session")
def guest_store(factory: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the GuestOS of these tests, made once."""
    store = tmp_path_factory.mktemp("guests")
    kit.build_guest_os(factory, store)
    return store


@pytest.fixture
def operator(device: kit.MakeDevice, guest_store: Path) -> Iterator[Operator]:
    """A development device that runs, with the GuestOS on it."""
    with kit.booted(device(policy=kit.DEVELOPMENT), guest_store) as operator:
        yield operator


def test_the_life_of_a_container(operator: Operator) -> None:
    uuid = operator.created(config("one"))
    assert operator.names() == ["core0", "one"]
    assert operator.start(uuid, PIN) == "CONTAINER_START_TOKEN_UNPAIRED"
    assert operator.change_pin(uuid, "", PIN) == "CONTAINER_CHANGE_PIN_SUCCESSFUL"
    assert operator.change_pin(uuid, "wrong", PIN) == "CONTAINER_CHANGE_PIN_FAILED"
    assert operator.start(uuid) == "CONTAINER_START_PASSWD_WRONG"
    assert operator.start(uuid, "wrong") == "CONTAINER_START_PASSWD_WRONG"
    operator.run(uuid, PIN)
    assert operator.start(uuid, PIN) == "CONTAINER_START_EEXIST"
    operator.write(uuid, "data/kept", "kept")
    assert operator.stop(uuid, "wrong") == "CONTAINER_STOP_PASSWD_WRONG"
    operator.halt(uuid, PIN)
    assert operator.stop(uuid, PIN) == "CONTAINER_STOP_FAILED_NOT_RUNNING"
    operator.run(uuid, PIN)
    assert operator.read(uuid, "data/kept") == "kept"
    assert operator.said(Request.REMOVE_CONTAINER, uuid) == "CMD_OK"
    assert operator.names() == ["core0"]
    assert operator.start(uuid, PIN) == "CONTAINER_START_EEXIST"
    assert operator.stop(uuid, PIN) == "CMD_FAILED"


def test_two_at_once_with_ranges_of_their_own_and_a_manager_that_dies(operator: Operator) -> None:
    uuids = [operator.created(config(name, token="NONE")) for name in ("one", "two")]
    for uuid in uuids:
        operator.run(uuid)
        operator.write(uuid, "data/name", uuid)
    inits = [operator.init_of(uuid) for uuid in uuids]
    ranges = [Path(f"/proc/{pid}/uid_map").read_text().split() for pid in inits]
    bases = sorted(int(base) for _inside, base, _count in ranges)
    assert [count for _inside, _base, count in ranges] == ["65536", "65536"]
    assert bases[1] - bases[0] >= 65536
    assert bases[0] - 65536 >= 524288  # the core's own range

    os.kill(operator.boot.manager_pid(), signal.SIGKILL)
    operator.boot.wait_for("manager resumed")
    for uuid in uuids:
        assert ContainerState.Name(operator.status(uuid).state) == "RUNNING"
    assert [operator.init_of(uuid) for uuid in uuids] == inits
    assert operator.start(uuids[0]) == "CONTAINER_START_EEXIST"
    operator.halt(uuids[0])
    operator.run(uuids[0])
    assert operator.read(uuids[0], "data/name") == uuids[0]
    operator.halt(uuids[1])


def test_what_ends_while_no_manager_is_there_is_cleared_away(operator: Operator) -> None:
    uuid = operator.created(config("one", token="NONE"))
    operator.run(uuid)
    init = operator.init_of(uuid)
    manager = operator.boot.manager_pid()
    os.kill(manager, signal.SIGSTOP)
    os.kill(init, signal.SIGKILL)
    os.kill(manager, signal.SIGKILL)
    operator.boot.wait_for("manager resumed")
    operator.wait_log(f"container {uuid} ended while no manager was there")
    operator.wait_state(uuid, "STOPPED")
    operator.run(uuid)


def test_a_new_configuration_counts_at_once_or_from_the_end_of_the_running_one_on(operator: Operator) -> None:
    uuid = operator.created(config("one", token="NONE"))
    assert [
        each.name for each in operator.update(uuid, config("renamed", token="NONE")).container_configs
    ] == ["renamed"]
    assert operator.names() == ["core0", "renamed"]
    operator.run(uuid)
    assert operator.hostname(uuid) == "renamed"
    assert operator.update(uuid, config("back", token="NONE")).container_configs
    assert operator.names() == ["core0", "renamed"]
    operator.halt(uuid)
    assert operator.names() == ["core0", "back"]
    other = operator.created(config("other", token="NONE"))
    taken = operator.update(other, config("back", token="NONE"))
    assert (list(taken.container_configs), taken.refusal.code) == ([], "container-name-taken")


def test_a_container_that_ends_by_itself_is_stopped_and_can_be_started_again(operator: Operator) -> None:
    uuid = operator.created(config("one", token="NONE"))
    operator.run(uuid)
    os.kill(operator.init_of(uuid), signal.SIGKILL)
    operator.wait_state(uuid, "STOPPED")
    operator.wait_log(f"container {uuid} ended, status -9")
    operator.run(uuid)


def test_row29_row21_one_counter_for_every_path_that_outlives_a_reboot(
    device: kit.MakeDevice, guest_store: Path
) -> None:
    """Ten tries are the policy's; the counter is shared, survives the power, and no PIN is written down."""
    device_ = device(policy=kit.DEVELOPMENT)
    with kit.booted(device_, guest_store) as operator:
        uuid = operator.created(config("one"))
        assert operator.change_pin(uuid, "", PIN) == "CONTAINER_CHANGE_PIN_SUCCESSFUL"
        operator.run(uuid, PIN)
        for _ in range(2):
            assert operator.stop(uuid, "wrong") == "CONTAINER_STOP_PASSWD_WRONG"
            assert operator.change_pin(uuid, "wrong", PIN) == "CONTAINER_CHANGE_PIN_FAILED"
        assert operator.status(uuid).token == "paired (6 of 10 tries left)"
        operator.halt(uuid, PIN)
        assert operator.status(uuid).token == "paired (10 of 10 tries left)"
        for _ in range(2):
            assert operator.start(uuid, "wrong") == "CONTAINER_START_PASSWD_WRONG"
            assert operator.change_pin(uuid, "wrong", PIN) == "CONTAINER_CHANGE_PIN_FAILED"
        operator.run(uuid, PIN)  # which was right, and makes the count fall
        for _ in range(9):
            assert operator.change_pin(uuid, "wrong", PIN) == "CONTAINER_CHANGE_PIN_FAILED"
        assert operator.stop(uuid, "wrong") == "CONTAINER_STOP_PASSWD_WRONG"
        assert operator.stop(uuid, PIN) == "CONTAINER_LOCKED_TILL_REBOOT"
        assert operator.status(uuid).token == "locked"
        report = operator.boot.path("/run/trustme").rglob("*")
        texts = [path.read_bytes() for path in report if path.is_file() and path.stat().st_size < 1 << 20]
        texts += [line.encode() for line in operator.boot.processes().values()]
        texts.append(operator.logs().encode())
        assert not any(PIN.encode() in text for text in texts)
        operator.reboot()
    with kit.booted(device_) as operator:
        assert operator.start(uuid, PIN) == "CONTAINER_LOCKED_TILL_REBOOT"


UUID = "3f0c7f66-0a0b-4f9e-9d55-0123456789ab"
OTHER_UUID = "3f0c7f66-0a0b-4f9e-9d55-0123456789ac"


def bound(name: str, uuid: str, serial: int) -> bytes:
    """Return a configuration for one container."""
    return config(name, f'uuid: "{uuid}"', f"serial: {serial}", token="NONE")


def refused(reply: kit.Reply) -> str:
    """Return the code of the refusal of a configuration."""
    assert reply.code == kit.Reply.CONTAINER_CONFIG
    assert not reply.container_configs
    assert not reply.container_uuids
    return reply.refusal.code


def test_row32_a_signed_configuration_is_good_for_one_container_and_never_again_once_replaced(
    device: kit.MakeDevice, guest_store: Path
) -> None:
    """A for B, older after newer, another text of the same serial, after removal, after a reboot."""
    device_ = device(policy=kit.DEVELOPMENT | {"unsigned_configs": "false"})
    factory = device_.factory
    old, new = (kit.sign(factory, bound("one", UUID, serial)) for serial in (3, 4))
    with kit.booted(device_, guest_store) as operator:
        assert refused(operator.create(bound("one", UUID, 3))) == "container-config-unsigned"
        text, signature, chain = old
        assert refused(operator.create(text + b"#", signature, chain)) == "bad-signature"
        assert operator.created(*old) == UUID
        assert refused(operator.create(*old)) == "container-exists"
        other = operator.created(*kit.sign(factory, bound("two", OTHER_UUID, 1)))
        assert refused(operator.update(other, *new)) == "container-config-foreign"
        assert operator.update(UUID, *new).container_configs
        assert refused(operator.update(UUID, *old)) == "container-config-rolled-back"
        same = kit.sign(factory, bound("another", UUID, 4))
        assert refused(operator.update(UUID, *same)) == "container-serial-taken"
        nobody = kit.sign(factory, config("nobody", token="NONE"))
        assert refused(operator.update(UUID, *nobody)) == "container-config-unbound"
        random = operator.created(*nobody)
        assert random not in {UUID, OTHER_UUID}
        operator.run(UUID)
        operator.run(random)
        # The file of one in the place of the other's, and an older one put back: neither starts.
        containers = operator.boot.data("cml/containers")
        kept = (containers / UUID / "config.json").read_bytes()
        for uuid in (UUID, random):
            operator.halt(uuid)
        for uuid, source in ((UUID, OTHER_UUID), (random, OTHER_UUID), (OTHER_UUID, random)):
            place = containers / uuid / "config.json"
            own = place.read_bytes()
            place.write_bytes((containers / source / "config.json").read_bytes())
            assert operator.start(uuid) == "CONTAINER_START_EINTERNAL"
            place.write_bytes(own)
        assert (containers / UUID / "config.json").read_bytes() == kept
        assert operator.said(Request.REMOVE_CONTAINER, UUID) == "CMD_OK"
        assert refused(operator.create(*old)) == "container-config-rolled-back"
        operator.reboot()
    with kit.booted(device_) as operator:
        assert sorted(operator.names()) == ["core0", "nobody", "two"]
        assert refused(operator.create(*old)) == "container-config-rolled-back"
        assert operator.created(*new) == UUID
        operator.run(UUID)


def test_a_container_without_a_token_starts_by_itself_and_an_orderly_reboot_ends_all(
    device: kit.MakeDevice, guest_store: Path
) -> None:
    device_ = device(policy=kit.DEVELOPMENT)
    with kit.booted(device_, guest_store) as operator:
        auto = operator.created(config("auto", "allow_autostart: true", token="NONE"))
        other = operator.created(config("other", token="NONE"))
        for uuid in (auto, other):
            operator.run(uuid)
            operator.write(uuid, "data/name", uuid)
        assert operator.status(auto).token == "none (key sealed by the TPM)"
        operator.reboot()
    with kit.booted(device_) as operator:
        operator.wait_state(auto, "RUNNING")
        assert operator.read(auto, "data/name") == auto
        assert ContainerState.Name(operator.status(other).state) == "STOPPED"
        # The other's sealed key in the place of its own: a TPM opens both, and the wrong one is found out.
        containers = operator.boot.data("cml/containers")
        (containers / other / "key.sealed").write_bytes((containers / auto / "key.sealed").read_bytes())
        assert operator.start(other) == "CONTAINER_START_UNLOCK_FAILED"
        operator.wait_log("it is another container's")


def test_one_damaged_container_is_its_own_problem(operator: Operator) -> None:
    good = operator.created(config("good", token="NONE"))
    bad = operator.created(config("bad", token="NONE"))
    (operator.boot.data("cml/containers") / bad / "config.json").write_bytes(b"{")
    assert operator.said(Request.RELOAD_CONTAINERS, "") == "CMD_OK"
    assert operator.status(bad).problem.startswith("container-damaged: ")
    assert operator.start(bad) == "CONTAINER_START_EINTERNAL"
    assert operator.stop(bad) == "CONTAINER_STOP_FAILED_NOT_RUNNING"
    operator.run(good)
    assert operator.said(Request.REMOVE_CONTAINER, bad) == "CMD_OK"
    assert operator.names() == ["core0", "good"]


def test_wipe_removes_volumes_and_key_and_nothing_else(operator: Operator) -> None:
    uuid = operator.created(config("one"))
    assert operator.change_pin(uuid, "", PIN) == "CONTAINER_CHANGE_PIN_SUCCESSFUL"
    operator.run(uuid, PIN)
    operator.write(uuid, "data/kept", "kept")
    assert operator.said(Request.CONTAINER_WIPE, uuid) == "CMD_FAILED"
    operator.halt(uuid, PIN)
    folder = operator.boot.data("cml/containers") / uuid
    before = (folder / "key.wrapped").read_bytes()
    assert operator.said(Request.CONTAINER_WIPE, uuid) == "CMD_OK"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "record.json", "token"]
    operator.run(uuid, PIN)
    assert not (operator.root_of(uuid) / "data/kept").exists()
    assert (folder / "key.wrapped").read_bytes() != before


def test_a_lost_key_is_a_refusal_and_nothing_is_made_anew(operator: Operator) -> None:
    uuid = operator.created(config("one", token="NONE"))
    operator.run(uuid)
    operator.write(uuid, "data/kept", "kept")
    operator.halt(uuid)
    folder = operator.boot.data("cml/containers") / uuid
    key = (folder / "key.sealed").read_bytes()
    (folder / "key.sealed").unlink()
    volume = (folder / f"{kit.VOLUME}.img").read_bytes()
    assert operator.start(uuid) == "CONTAINER_START_EINTERNAL"
    assert (folder / f"{kit.VOLUME}.img").read_bytes() == volume
    assert not (folder / "key.sealed").exists()
    (folder / "key.sealed").write_bytes(key)
    operator.run(uuid)
    assert operator.read(uuid, "data/kept") == "kept"


def test_twenty_starts_and_stops_leave_nothing(operator: Operator) -> None:
    uuid = operator.created(config("one", token="NONE"))
    operator.run(uuid)
    operator.halt(uuid)
    before, open_before = kit.resources(operator.boot), kit.descriptors(operator.boot)
    for _ in range(20):
        operator.run(uuid)
        operator.halt(uuid)
    kit.settle(
        lambda: kit.resources(operator.boot) == before and kit.descriptors(operator.boot) <= open_before,
        lambda: f"{before}, {open_before}\n{kit.resources(operator.boot)}, {kit.descriptors(operator.boot)}",
    )
