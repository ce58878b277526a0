# SPDX-License-Identifier: Apache-2.0
"""Random walks: every operation with good and bad arguments, and everything else that happens to a device.

A step is an operation, which may be cut by the power (`power`), by the death of the vault, or by a full disk;
a boot, which may be cut, too; an orderly reboot, which completes first; a vault that is started anew; a reset
of the TPM; or somebody who writes to the disk while the device is off. A model (`provisioning_model`) says
what each step has to lead to. After every step what the device shows is what the model says, and:

- once completed, a device is never in provisioning again, and each operation of provisioning is refused by
  name;
- a refused operation has changed no file but the count of wrong PINs;
- wrong PINs are tried `TRIES` times at most until one was right, whatever happens in between;
- the device's certificate is the one that was pushed last and accepted;
- no file on the disk, removed, damaged, made up or put back from earlier, makes anything else of a device
  than itself or one that stops with a name. Put back the disk as it was, and it is the device it was.

`make test` walks 2,000 steps, the same at every run. The nightly profile walks 100,000, others each time:

    TRUSTME_PROFILE=nightly python -m pytest tests/integration/test_provisioning_states.py
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.integration import power
from tests.integration.provisioning_model import (
    CALLS,
    CLOSED,
    COMPLETE,
    DESTROYED,
    EXPECTED,
    SOME_REFUSAL,
    Call,
    D,
    Model,
    O,
    P,
)
from tests.integration.provisioning_rig import (
    COUNTED,
    PIN,
    TRIES,
    Look,
    Rig,
    light,
)
from tests.integration.software_tpm import SoftwareTpm
from trustme_init.errors import Refusal
from trustme_init.provisioning import states
from trustme_init.provisioning.mode import ModeFact
from trustme_init.tokens.place import ATTEMPTS_NAME

NIGHTLY: Final = os.environ.get("TRUSTME_PROFILE") == "nightly"
STEPS_PER_WALK: Final = 40
WALKS: Final = 3_200 if NIGHTLY else 64
STEPS: Final = 100_000 if NIGHTLY else 2_000


# Somebody who writes to the disk

FILES: Final = (
    *("cml", "cml/_cml_provisioned_", "cml/destroyed", "cml/wiping", "cml/device_id.conf"),
    *("cml/provisioning.json", "cml/tokens", "cml/tokens/attempts.json", "cml/tokens/token.json"),
    *("cml/tokens/testuser.p12", "cml/tokens/device.cert", "cml/tokens/device.csr", "cml/tokens/ca"),
    *("cml/tokens/device_ca", "cml/tpm", "cml/tpm/authorisations.json", "cml/tpm/device_key.json"),
    *("cml/tpm/attestation_key.json", "cml/lifecycle", "cml/lifecycle/history.json"),
)
TOMBSTONE: Final = "cml/destroyed"
WAYS: Final = ("remove", "empty", "garbage", "folder", "link", "earlier")


def tamper(data: Path, name: str, way: str, earlier: Path) -> None:
    """Do something to a file or a directory, which may not be there."""
    path = data / name
    if not path.parent.is_dir() or path.parent.is_symlink():
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match way:
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(b"\0garbage" * 40)
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to("/dev/null")
        case "earlier" if (earlier / name).is_dir():
            shutil.copytree(earlier / name, path)
        case "earlier" if (earlier / name).is_file():
            path.write_bytes((earlier / name).read_bytes())


def boot_mode(rig: Rig) -> str:
    """Boot, and return the mode, or why there is none."""
    try:
        return rig.boot().mode.value
    except Refusal as refusal:
        return refusal.code


# The machine


@dataclass
class Origins:
    """Devices to begin with; each is made once, and copied."""

    directory: Path
    rigs: dict[str, tuple[Rig, Model]] = field(default_factory=dict)
    copies: int = 0
    steps: int = 0
    """Of all walks together."""

    def prepare(self) -> None:
        empty = Rig(self.directory / "empty")
        with SoftwareTpm(empty.directory):
            pass
        self.rigs["empty"] = empty, Model()
        prepared = self.copy(empty)
        with prepared.powered():
            prepared.boot()
        self.rigs["prepared"] = prepared, Model()
        stocked = self.copy(prepared)
        with stocked.powered():
            stocked.boot()
            stocked.fill()
        pem = (stocked.layout.tokens / "device.cert").read_bytes()
        anchors = frozenset({("guest", "guest"), ("device", "device")})
        model = Model(anchors=anchors, certificate=pem, issuer="device", pin=PIN)
        self.rigs["stocked"] = stocked, model
        operational = self.copy(stocked)
        with operational.powered():
            operational.boot()
            operational.handle("complete")
        self.rigs["operational"] = operational, replace(model, state=O)

    def copy(self, rig: Rig) -> Rig:
        self.copies += 1
        return rig.copy_to(self.directory / f"copy-{self.copies}")


FATES: Final = st.one_of(
    st.just(("done", 0)),
    st.just(("done", 0)),
    st.just(("done", 0)),
    st.tuples(st.just("cut"), st.integers(0, 30)),
    st.tuples(st.just("dies"), st.integers(0, 30)),
    st.tuples(st.just("full"), st.integers(0, 30)),
)


class Walk(RuleBasedStateMachine):
    """One device, from somewhere in provisioning to wherever it comes."""

    def __init__(self, origins: Origins) -> None:
        super().__init__()
        self.origins = origins
        self.power = ExitStack()
        self.rig: Rig
        self.fact: ModeFact
        self.model = Model()
        self.wrong_tries = 0
        self.completed = False

    @initialize(origin=st.sampled_from(["empty", "prepared", "stocked", "stocked", "operational"]))
    def begin(self, origin: str) -> None:
        rig, self.model = self.origins.rigs[origin]
        self.rig = self.origins.copy(rig)
        self.earlier = rig.data
        self.switch_on()
        self.look()

    def teardown(self) -> None:
        self.power.close()
        if hasattr(self, "rig"):
            shutil.rmtree(self.rig.directory)

    def runs(self) -> bool:
        """Whether the device has come up: not where it was destroyed before."""
        return self.rig._service is not None

    # Steps

    @precondition(runs)
    @rule(name=st.sampled_from(sorted(CALLS)), fate=FATES)
    def operate(self, name: str, fate: tuple[str, int]) -> None:
        self.do(CALLS[name], *fate)

    @precondition(runs)
    @rule(fate=FATES)
    def reboot_in_an_orderly_way(self, fate: tuple[str, int]) -> None:
        self.do(COMPLETE, *fate)
        self.switch_off()
        self.switch_on()
        self.look()

    @rule(cut=st.one_of(st.none(), st.integers(0, 30)))
    def reboot(self, cut: int | None) -> None:
        self.origins.steps += 1
        self.switch_off()
        if cut is not None:
            with self.rig.powered():
                run = power.run(self.rig.boot, self.rig.data, cut=cut)
            survivors = run.volume.survivors()
            self.put(survivors[cut * 7 % len(survivors)])
        self.switch_on()
        self.look()

    @precondition(lambda self: self.model.state is not D)
    @rule()
    def let_the_vault_rest(self) -> None:
        self.origins.steps += 1
        self.rig.serve(self.fact)
        self.look()

    @rule()
    def reset_the_tpm(self) -> None:
        self.origins.steps += 1
        service = self.rig._service
        self.switch_off()
        self.power.enter_context(self.rig.powered())
        self.rig._service = service
        self.look()

    @precondition(lambda self: self.model.state is P and not self.model.user_data)
    @rule()
    def run_containers(self) -> None:
        self.origins.steps += 1
        self.rig.leave_user_data()
        self.model = replace(self.model, user_data=True)

    @precondition(lambda self: self.model.state is not D)
    @rule(changes=st.lists(st.tuples(st.sampled_from(FILES), st.sampled_from(WAYS)), min_size=1, max_size=4))
    def write_to_the_disk(self, changes: list[tuple[str, str]]) -> None:
        """Somebody has the disk for a while."""
        self.origins.steps += 1
        self.switch_off()
        kept = self.rig.directory / "kept"
        self.rig.data.rename(kept)
        shutil.copytree(kept, self.rig.data)
        for name, way in changes:
            tamper(self.rig.data, name, way, self.earlier)
        with self.rig.powered():
            mode = boot_mode(self.rig)
            if self.completed:
                assert mode != P.value, changes
            if mode == O.value:
                assert self.completed, changes
                for operation, row in EXPECTED.items():
                    if O not in row:
                        assert self.rig.attempt(operation) == CLOSED[O], (operation, changes)
        shutil.rmtree(self.rig.data)
        kept.rename(self.rig.data)
        self.switch_on()
        self.look()

    # What steps are made of

    def do(self, call: Call, kind: str, number: int) -> None:
        """Have an operation done or cut, and compare what becomes of it."""
        self.origins.steps += 1
        model = self.model
        arguments = call.arguments(self.rig) if model.state in EXPECTED.get(call.operation, {}) else {}
        code, after = call.judged(model)
        if code == "" and call.operation == "push-certificate":
            after = replace(after, certificate=bytes(arguments["certificate"]))  # type: ignore[arg-type]
        if kind == "done":
            before, tries = tree(self.rig.data), COUNTED.tries
            got = self.rig.attempt(call.operation, arguments)
            self.count(COUNTED.tries - tries, got)
            self.check_code(got, code)
            if code not in {"", "token-wrong-pin"}:
                assert tree(self.rig.data) == before, f"{call.operation}: a refusal changed files"
            self.model = after
            self.look()
            return
        run = power.run(
            partial(self.rig.handle, call.operation, arguments),
            self.rig.data,
            **{"full_from" if kind == "full" else "cut": number},
        )
        outcome = run.outcome
        self.count(len(outcome.notes), code if outcome.notes else "")
        match outcome.ended:
            case "returned":
                self.check_code("", code)
                allowed = [after]
            case "cut":
                allowed = [model, after]
            case "refused":
                if kind != "full" or code not in {"", "token-wrong-pin"}:
                    self.check_code(outcome.code, code)
                allowed = [after if outcome.code == code else model]
            case _:
                raise AssertionError(outcome)
        if kind == "cut":
            survivors = run.volume.survivors()
            self.switch_off()
            self.put(survivors[number * 7 % len(survivors)])
            self.power.enter_context(self.rig.powered())
        else:
            self.rig.serve(self.fact)  # the manager starts another vault
        self.settle_on(allowed, wrong=bool(outcome.notes) and code == "token-wrong-pin")

    def switch_off(self) -> None:
        self.power.close()

    def switch_on(self) -> None:
        self.power.enter_context(self.rig.powered())
        if self.model.state is not D:
            self.fact = self.rig.boot()
        else:
            assert self.rig.boot_and_look() == {
                "mode": DESTROYED,
                "left": ["destroyed"],
                "owned": False,
                "lockout": False,
            }

    def put(self, survivor: power.Survivor) -> None:
        shutil.rmtree(self.rig.data)
        self.rig.data.mkdir()
        survivor.put(self.rig.data)

    def settle_on(self, allowed: list[Model], *, wrong: bool) -> None:
        """Find out which of the models it is; the power is on, and there may be a vault."""
        before = self.model.failed
        shown = self.show()
        fitting = [each for each in allowed if _same(shown, each)]
        assert fitting, f"{shown} is none of {[each.look() for each in allowed]}"
        self.model = fitting[-1]
        if self.model.state is D:
            return
        # A cut or a full disk may cost one try for nothing; a try of a wrong PIN is never for nothing.
        least = before + 1 if wrong else min(each.failed for each in allowed)
        failed = TRIES - shown["tries"]
        assert least <= failed <= before + 1, (failed, before, allowed)
        self.model = replace(self.model, failed=failed)

    def show(self) -> Look:
        """Return what a device shows, which may have to be booted or may be destroyed."""
        if self.rig._service is not None and self.rig.attempt("status") != DESTROYED:
            return self.rig.look()
        self.switch_off()
        self.power.enter_context(self.rig.powered())
        try:
            self.fact = self.rig.boot()
        except Refusal as refusal:
            return {"mode": refusal.code, **self.rig._remains()}
        return self.rig.look()

    def look(self) -> None:
        """Compare a device with the model."""
        if self.model.state is D:
            assert self.rig._service is None or self.rig.attempt("status") == DESTROYED
            return
        shown = self.rig.look()
        wanted = self.model.look()
        assert {name: shown[name] for name in wanted} | {"containers": bool(shown["containers"])} == wanted
        self.completed |= shown["mode"] == O.value
        assert not self.completed or shown["mode"] == O.value

    def check_code(self, got: str, code: str) -> None:
        assert got == code or (got and code == SOME_REFUSAL), f"{got!r}, expected {code!r}"

    def count(self, tries: int, code: str) -> None:
        """Count tries of PINs, and what came of them."""
        if code == "token-wrong-pin":
            self.wrong_tries += tries
        elif tries and code == "":
            self.wrong_tries = 0
        assert self.wrong_tries <= TRIES


def _same(shown: Look, model: Model) -> bool:
    if model.state is D:
        return bool(shown["mode"] == DESTROYED)
    wanted = model.look()
    seen = {name: shown.get(name) for name in wanted} | {"containers": bool(shown.get("containers"))}
    return {**seen, "tries": 0} == {**wanted, "tries": 0}


def tree(data: Path) -> dict[str, bytes | None]:
    """Return every file but the count of wrong PINs and what interrupted writes left behind."""
    return {
        str(path.relative_to(data)): path.read_bytes() if path.is_file() else None
        for path in sorted(data.rglob("*"))
        if not (path.name.startswith(".") and path.name.endswith(".new")) and path.name != ATTEMPTS_NAME
    }


@pytest.fixture
def origins(tmp_path: Path) -> Iterator[Origins]:
    with light():
        made = Origins(tmp_path)
        made.prepare()
        yield made


def test_the_table_is_what_it_is_expected_to_be() -> None:
    assert states.TABLE == EXPECTED
    assert {call.operation for call in CALLS.values()} == {*EXPECTED, "no-such-operation"}


def completed_states(origins: Origins) -> Iterator[tuple[str, Rig]]:
    """Yield devices after the point of no return: as they should be, not locked yet, and destroyed."""
    rig, _ = origins.rigs["operational"]
    yield "operational", rig
    stocked, _ = origins.rigs["stocked"]
    for name, last in (("not locked", "nv_write"), ("no marker file", "nv_write_lock")):
        rig = origins.copy(stocked)
        with rig.powered():
            rig.boot()
            whole = power.run(lambda rig=rig: rig.handle("complete"), rig.data).outcome  # type: ignore[misc]
        rig = origins.copy(stocked)
        cut = next(number for number, each in enumerate(whole.effects) if each.name == last) + 1
        with rig.powered():
            rig.boot()
            power.run(lambda rig=rig: rig.handle("complete"), rig.data, cut=cut)  # type: ignore[misc]
        yield name, rig
    rig = origins.copy(rig)
    with rig.powered():
        rig.boot()
        rig.handle("destroy")
    yield "destroyed", rig


def test_row31_nothing_that_is_done_to_a_file_reopens_provisioning(origins: Origins) -> None:
    """Each file and directory there is, and each that has a meaning, in each way, in each completed state."""
    earlier = origins.rigs["stocked"][0].data
    tried = 0
    for state, origin in completed_states(origins):
        found = {str(path.relative_to(origin.data)) for path in origin.data.rglob("*")}
        for name, way in itertools.product(sorted(found | {*FILES}), WAYS):
            rig = origins.copy(origin)
            tamper(rig.data, name, way, earlier)
            with rig.powered():
                mode = boot_mode(rig)
                # A destroyed device has nothing left but its tombstone; without, it is a new one.
                assert mode != P.value or (state, name) in {("destroyed", "cml"), ("destroyed", TOMBSTONE)}, (
                    state,
                    name,
                    way,
                )
            shutil.rmtree(rig.directory)
            tried += 1
    assert tried > 400


def test_row31_row33_row21_row04_a_walk_leads_nowhere_else(origins: Origins) -> None:
    run_state_machine_as_test(
        partial(Walk, origins),  # type: ignore[arg-type]  # it is called, nothing else
        settings=settings(
            max_examples=WALKS,
            stateful_step_count=STEPS_PER_WALK,
            derandomize=not NIGHTLY,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[*HealthCheck],
        ),
    )
    assert origins.steps >= STEPS
