# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.compartments.lifecycle import STATE_VERSION, TRANSITIONS, State, adopt, read_state
from trustme_init.machine import Machine
from trustme_init.proto.container_pb2 import ContainerState

UUID = "0badc0de-0000-4000-8000-000000000005"


def machine(tmp_path: Path) -> Machine:
    nothing: Any = object()
    return Machine(run=tmp_path, block=nothing, verity=nothing, controllers=nothing)


def test_states_are_the_protocols() -> None:
    assert {state.name: int(state) for state in State} == dict(ContainerState.items())


def test_every_state_has_its_successors_and_a_way_to_stopped() -> None:
    assert set(TRANSITIONS) == set(State)
    for start in State:
        reached, todo = {start}, [start]
        while todo:
            for following in TRANSITIONS[todo.pop()] - reached:
                reached.add(following)
                todo.append(following)
        assert State.STOPPED in reached, start.name
        assert start not in TRANSITIONS[start]


def test_only_starting_leads_out_of_stopped() -> None:
    assert TRANSITIONS[State.STOPPED] == {State.STARTING}
    assert all(
        State.RUNNING not in TRANSITIONS[state] for state in (State.STOPPED, State.STARTING, State.ZOMBIE)
    )


def write(tmp_path: Path, text: bytes) -> Machine:
    place = tmp_path / "compartments" / UUID
    place.mkdir(parents=True, exist_ok=True)
    (place / "state.json").write_bytes(text)
    return machine(tmp_path)


RECORD: dict[str, Any] = {
    "version": STATE_VERSION,
    "uuid": UUID,
    "name": "x",
    "state": 4,
    "pid": os.getpid(),
    "start_time": 1,
    "cgroup": f"/sys/fs/cgroup/trustme/{UUID}",
    "started_at": 1.5,
}


def test_a_record_is_read_back(tmp_path: Path) -> None:
    assert read_state(UUID, write(tmp_path, json.dumps(RECORD).encode())) == RECORD


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"state": 99},
        {"pid": 0},
        {"pid": True},
        {"pid": "1"},
        {"start_time": None},
        {"cgroup": 1},
    ],
)
def test_a_record_that_makes_no_sense_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    assert read_state(UUID, write(tmp_path, json.dumps({**RECORD, **change}).encode())) is None


@pytest.mark.parametrize("uuid", ["..", "../x", "", "/etc", UUID + "/..", UUID.upper()])
def test_only_a_uuid_names_a_record(tmp_path: Path, uuid: str) -> None:
    assert read_state(uuid, machine(tmp_path)) is None


def test_another_process_is_not_adopted(tmp_path: Path) -> None:
    assert adopt(UUID, write(tmp_path, json.dumps(RECORD).encode())) is None


@given(text=st.binary(max_size=200))
def test_any_bytes_are_a_record_or_none(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    read_state(UUID, write(tmp_path_factory.getbasetemp() / "any", text))
