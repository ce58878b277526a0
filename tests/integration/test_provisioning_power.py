# SPDX-License-Identifier: Apache-2.0
"""Every operation of provisioning, cut at every persistent effect: old state or new state at the next boot.

Each operation is begun in a state of its own, from a copy, as often as it has effects, and once to its end.
The power goes at another effect each time (`power`); each disk that may then be there is booted with the TPM
as it was left. What a boot shows (`Rig.look`) is what it showed before the operation, or what it shows after
it; once the operation has answered, it is the latter. From the old state, it can then be done as ever.

The same for a disk that is full from any effect on: a refusal with a name and the old state, or the new one.

That this finds what it is made to find is shown with saves and orders that are wrong in one way each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn
from uuid import UUID

import pytest
from tpm2_pytss import TPM2_CC

from tests.integration import power
from tests.integration.power import Survivor
from tests.integration.provisioning_rig import (
    NEW_PIN,
    PIN,
    TRIES,
    WRONG_PIN,
    Look,
    Rig,
    authorities,
    light,
    operator_token,
    policy,
    relative,
)
from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer
from trustme_init.errors import DeviceRefusal, Refusal, TokenRefusal
from trustme_init.linux import files
from trustme_init.linux.files import sync_directory
from trustme_init.provisioning import destruction, record, states
from trustme_init.provisioning.states import State
from trustme_init.tokens.attempts import Attempts
from trustme_init.tpm import nv_marker

DESTROYED: Final = "device-destroyed"


@dataclass(frozen=True)
class Operation:
    """What is cut: in which state it begins, what it is given, and with which refusal it ends."""

    name: str
    start: str
    work: Callable[[Rig], object]
    code: str = ""
    best_effort: bool = False
    """Whether what it changes is beside the point, so that it succeeds without."""

    @property
    def is_boot(self) -> bool:
        """Whether the next boot does the same again, so that there is no old state to be in."""
        return self.work is Rig.boot


def operation(name: str, start: str, code: str = "", **arguments: str | bytes) -> Operation:
    def work(rig: Rig) -> None:
        rig.start()
        rig.handle(name, arguments)

    return Operation(name, start, work, code)


def push_certificate(rig: Rig) -> None:
    rig.start()
    rig.handle("push-certificate", {"certificate": (rig.directory / "pushed.pem").read_bytes()})


def remove_authority(rig: Rig) -> None:
    rig.start()
    first, *_ = rig.handle("authorities")["authorities"]
    rig.handle("remove-authority", {"sha256": first["sha256"]})


def add_authority(name: str, purpose: str, start: str) -> Operation:
    return operation("add-authority", start, purpose=purpose, certificate=getattr(authorities(), name).pem)


OPERATIONS: Final[dict[str, Operation]] = {
    "first-boot": Operation("prepare", "empty", Rig.boot),
    "boot-that-provisions-itself": Operation("prepare", "prepared-development", Rig.boot),
    "csr": operation("csr", "prepared"),
    "first-certificate": Operation("push-certificate", "signed", push_certificate),
    "another-certificate": Operation("push-certificate", "stocked", push_certificate),
    "first-guest-anchor": add_authority("guest", "guest", "prepared"),
    "another-device-anchor": add_authority("other_device", "device", "stocked"),
    "local-ca": add_authority("local", "local", "prepared"),
    "another-local-ca": add_authority("stranger", "local", "with-local-ca"),
    "remove-authority": Operation("remove-authority", "stocked", remove_authority),
    "remove-local-ca": Operation("remove-authority", "with-local-ca", remove_authority),
    "token-create": operation("token-create", "prepared", pin=PIN),
    "first-token": operation("token-replace", "prepared", token=operator_token(PIN), pin=PIN),
    "token-change-pin": operation("token-change-pin", "stocked", pin=PIN, new_pin=NEW_PIN),
    "token-change-pin-in-operation": operation("token-change-pin", "operational", pin=PIN, new_pin=NEW_PIN),
    "token-replace": operation("token-replace", "stocked", token=operator_token(NEW_PIN), pin=NEW_PIN),
    "token-replace-by-a-weak-one": operation(
        "token-replace", "stocked", token=operator_token(NEW_PIN, weak=True), pin=NEW_PIN
    ),
    "token-remove": operation("token-remove", "stocked"),
    "token-unlock": operation("token-unlock", "one-wrong-pin", pin=PIN),
    "token-unlock-and-upgrade": replace(
        operation("token-unlock", "with-weak-token", pin=PIN), best_effort=True
    ),
    "wrong-pin-to-unlock": operation("token-unlock", "stocked", "token-wrong-pin", pin=WRONG_PIN),
    "wrong-pin-to-change": operation(
        "token-change-pin", "stocked", "token-wrong-pin", pin=WRONG_PIN, new_pin=NEW_PIN
    ),
    "wrong-pin-to-replace": operation(
        "token-replace", "stocked", "token-wrong-pin", token=operator_token(NEW_PIN), pin=WRONG_PIN
    ),
    "wipe": operation("wipe", "with-user-data"),
    "complete": operation("complete", "stocked"),
    "boot-that-settles": Operation("settle", "not-locked", Rig.boot),
    "destroy-in-provisioning": operation("destroy", "stocked"),
    "destroy-in-operation": operation("destroy", "operational"),
    "boot-that-finishes-destruction": Operation("destroy", "half-destroyed", Rig.boot, DESTROYED),
    "boot-that-finishes-wiping": Operation("prepare", "half-wiped", Rig.boot),
}
READING: Final = {
    *("status", "authorities", "token-status", "activate", "verify-certificate", "verify-guestos"),
    "lifecycle-status",
    *("containers", "container", "guestos-list", "guestos-config", "guestos-examine"),
}
"""Operations that change nothing."""
ELSEWHERE: Final = {
    "apply-statement",  # in test_lifecycle
    # In test_containers_power; what a PIN that is checked changes is the counter of test_tokens_store.
    *("container-create", "container-update", "container-remove", "container-wipe", "container-open"),
    *("container-change-pin", "container-check-pin"),
    # In test_guestos_store; to discard is what tidying does to everything that was left.
    *("guestos-stage", "guestos-publish", "guestos-remove", "guestos-tidy", "guestos-discard"),
}
"""Operations that are cut by tests of their own."""


def issue(rig: Rig, serial: int) -> None:
    pem = rig.certificate(authorities().device, serial)
    (rig.directory / "pushed.pem").write_bytes(pem)


def make_signed(rig: Rig) -> None:
    rig.handle("add-authority", {"purpose": "device", "certificate": authorities().device.pem})
    issue(rig, 1)


def make_stocked(rig: Rig) -> None:
    rig.fill()
    issue(rig, 2)


def replace_by_local_ca(rig: Rig) -> None:
    for each in rig.handle("authorities")["authorities"]:
        rig.handle("remove-authority", {"sha256": each["sha256"]})
    rig.handle("add-authority", {"purpose": "local", "certificate": authorities().local.pem})


def put_weak_token(rig: Rig) -> None:
    """Be the operator with openssl."""
    (rig.layout.tokens / "testuser.p12").write_bytes(operator_token(PIN, weak=True))


_BASES: Final = {"prepared": "empty", "signed": "prepared", "stocked": "prepared"}
_MAKE: Final[dict[str, Callable[[Rig], object]]] = {
    "prepared": Rig.look,
    "signed": make_signed,
    "stocked": make_stocked,
    "with-local-ca": replace_by_local_ca,
    "one-wrong-pin": lambda rig: rig.attempt("token-unlock", {"pin": WRONG_PIN}),
    "with-weak-token": put_weak_token,
    "with-user-data": Rig.leave_user_data,
}
"""What is done to a booted device, of the state in `_BASES` or else "stocked"."""


SOUND: Final[dict[str, Look]] = {
    "provisioning": {"marker": ("open", False, False), "record": ""},
    "operational": {"marker": ("completed", True, True)},
    DESTROYED: {"left": ["destroyed"], "owned": False, "lockout": False},
}
"""What a device shows in each mode, after any boot."""


class Bench:
    """Devices in every state that something begins in; each is made once, and copied."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[str, Rig] = {}
        self._looks: dict[str, Look] = {}
        self._copies = 0

    def copy(self, rig: Rig, survivor: Survivor | None = None) -> Rig:
        self._copies += 1
        copy = rig.copy_to(self._directory / f"copy-{self._copies}", survivor)
        pushed = rig.directory / "pushed.pem"
        if pushed.exists():
            (copy.directory / "pushed.pem").write_bytes(pushed.read_bytes())
        return copy

    def get(self, state: str) -> Rig:
        if state not in self._made:
            self._made[state] = self._make(state)
        return self._made[state]

    def look(self, state: str) -> Look:
        """Return what a boot shows of a device in this state."""
        if state not in self._looks:
            copy = self.copy(self.get(state))
            with copy.powered():
                self._looks[state] = copy.boot_and_look()
        return self._looks[state]

    def _make(self, state: str) -> Rig:
        match state:
            case "empty":
                rig = Rig(self._directory / state)
                with SoftwareTpm(rig.directory):
                    return rig
            case "prepared-development":
                rig = self.copy(self.get("prepared"))
                rig.policy = policy(provisions_itself=True)
                return rig
            case "not-locked":
                return self._cut("complete", "nv_write_lock")
            case "half-destroyed":
                return self._cut("destroy-in-operation", "clear")
            case "half-wiped":
                return self._cut("wipe", "rmdir")
            case "operational":
                return self._after("complete")
        rig = self.copy(self.get(_BASES.get(state, "stocked")))
        with rig.powered():
            rig.boot()
            _MAKE[state](rig)
        return rig

    def _after(self, name: str) -> Rig:
        rig = self.copy(self.get(OPERATIONS[name].start))
        with rig.powered():
            OPERATIONS[name].work(rig)
        return rig

    def _cut(self, name: str, effect: str) -> Rig:
        """Return a device that lost its power right before an effect, named by kind or TPM command."""
        rig = self.copy(self.get(OPERATIONS[name].start))
        with rig.powered():
            whole = power.run(partial(OPERATIONS[name].work, rig), rig.data)
        number = next(
            number for number, each in enumerate(whole.outcome.effects) if effect in (each.kind, each.name)
        )
        rig = self.copy(self.get(OPERATIONS[name].start))
        with rig.powered():
            power.run(partial(OPERATIONS[name].work, rig), rig.data, cut=number)
        return rig

    # The two judgements.

    def violations(self, operation: Operation, *, enough: int = sys.maxsize) -> list[str]:
        """Cut an operation everywhere; return what was neither the old state nor the new one."""
        trial = _Trial(self, operation)
        for cut in range(trial.count + 1):
            trial.cut_at(cut)
            if len(trial.found) >= enough:
                break
        return trial.found

    def violations_when_full(self, operation: Operation) -> list[str]:
        """Let the disk be full from every effect on that takes room; return what was wrong then."""
        trial = _Trial(self, operation)
        for number, effect in enumerate(trial.effects):
            if effect.kind in power.ROOM:
                trial.full_from(number)
        return trial.found


class _Trial:
    """One operation, done again and again."""

    def __init__(self, bench: Bench, operation: Operation) -> None:
        self._bench = bench
        self._operation = operation
        self._origin = bench.get(operation.start)
        self._old = {} if operation.is_boot else bench.look(operation.start)
        self.found: list[str] = []
        self._seen: set[object] = set()
        rig, whole = self._run()
        ending = (whole.outcome.ended, whole.outcome.code)
        assert ending == (("refused", operation.code) if operation.code else ("returned", "")), whole.outcome
        assert whole.outcome.effects
        self.effects = whole.outcome.effects
        self.count = len(self.effects)
        with rig.powered():
            self._new = relative(rig.boot_and_look(), self._old)
        self._before = relative(self._old, self._old)
        assert self._new != self._before, "it changes nothing"

    def _run(self, **how: int) -> tuple[Rig, power.Run]:
        rig = self._bench.copy(self._origin)
        with rig.powered():
            return rig, power.run(partial(self._operation.work, rig), rig.data, **how)

    def cut_at(self, cut: int) -> None:
        """Let the power go right before the effect `cut`; at the end when there is none of that number."""
        rig, run = self._run(cut=cut)
        assert (run.outcome.ended == "cut") == (cut < self.count), run.outcome
        tried = len(run.outcome.notes)
        for survivor in run.volume.survivors():
            # What the same effects made is in the same state.
            key = (survivor.made_by, run.tpm_effects, run.outcome.ended, tried)
            if key in self._seen:
                continue
            self._seen.add(key)
            after = self._bench.copy(rig, survivor)
            with after.powered():
                told = self._judge(after, finished=run.outcome.ended != "cut", tried=tried)
            effect = self.effects[cut] if cut < self.count else None
            self._add(f"cut before {_text(effect)} with {survivor.how}", told)

    def full_from(self, number: int) -> None:
        """Let there be no room from the effect `number` on."""
        rig, run = self._run(full_from=number)
        outcome = run.outcome
        told = []
        if outcome.ended == "failed" or (outcome.ended == "refused" and not _explains(outcome.code)):
            told.append(f"ended by {outcome.text}")
        with rig.powered():
            told += self._judge(
                rig,
                finished=outcome.ended == "returned" and not self._operation.best_effort,
                tried=len(outcome.notes),
                full=True,
                undone=outcome.ended == "refused" and outcome.code != self._operation.code,
            )
        self._add(f"disk full from {_text(self.effects[number])} on", told)

    def _add(self, where: str, told: list[str]) -> None:
        self.found += [
            f"{self._operation.name} in the state {self._operation.start}, {where}: {each}" for each in told
        ]

    def _judge(
        self, rig: Rig, *, finished: bool, tried: int, full: bool = False, undone: bool = False
    ) -> list[str]:
        look = relative(rig.boot_and_look(), self._old)
        told = []
        shown = self._without_tries(look)
        old, new = self._without_tries(self._before), self._without_tries(self._new)
        is_new = shown == new and not (undone and not self._operation.is_boot)
        if not is_new and (finished or shown != old or self._operation.is_boot):
            told.append(f"neither old, by {_difference(shown, old)}, nor new, by {_difference(shown, new)}")
        elif not finished and shown == old and not self._operation.is_boot:
            told += self._again(rig)
        told += _unsound(look)
        # What is right stays right on a full disk, but the count may not fall (`tokens.attempts`).
        return told + self._judge_tries(look, tried, finished=finished and not full)

    def _again(self, rig: Rig) -> list[str]:
        """Do the operation once more, in the old state that the cut left."""
        try:
            self._operation.work(rig)
            code = ""
        except Refusal as refusal:
            code = refusal.code
        if code != self._operation.code:
            return [f"cannot be done again: {code}"]
        shown = self._without_tries(relative(rig.boot_and_look(), self._old))
        new = self._without_tries(self._new)
        return [] if shown == new else [f"done again it has led to {_difference(shown, new)}"]

    def _judge_tries(self, look: Look, tried: int, *, finished: bool) -> list[str]:
        """Return what is wrong: a try with a wrong PIN costs one for good, and nothing costs more."""
        if "tries" not in look or self._operation.is_boot:
            return []
        left, before, after = look["tries"], self._before["tries"], self._new.get("tries", 0)
        allowed = {after} if finished else {before, before - 1, after}
        if tried and self._operation.code == "token-wrong-pin":
            allowed = {before - 1}
        return [] if left in allowed else [f"{left} tries are left, which is none of {sorted(allowed)}"]

    def _without_tries(self, look: Look) -> Look:
        return {name: value for name, value in look.items() if name != "tries"}


def _unsound(look: Look) -> list[str]:
    """Return what no device may show in any state, old or new."""
    wanted = SOUND.get(look["mode"])
    if wanted is None:
        return [f"stops with {look['mode']}"]
    found = {name: look[name] for name in wanted}
    told = [] if found == wanted else [f"shows {found}, not {wanted}"]
    return told if look.get("key", "there") else [*told, "has no key"]


def _explains(code: str) -> bool:
    """Whether a refusal says that the disk is the trouble."""
    words = ("not-stored", "unwritable", "not-writable")
    return code.endswith(words)


def _text(effect: power.Effect | None) -> str:
    return "nothing" if effect is None else f"{effect.kind} {effect.name} {effect.other}".strip()


def _difference(shown: Look, other: Look) -> dict[str, Any]:
    names = [name for name in {**other, **shown} if shown.get(name) != other.get(name)]
    return {name: (shown.get(name), other.get(name)) for name in names}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with light():
        yield Bench(tmp_path_factory.mktemp("bench"))


def test_every_operation_that_changes_something_is_cut() -> None:
    assert {each.name for each in OPERATIONS.values()} == states.TABLE.keys() - READING - ELSEWHERE


@pytest.mark.parametrize("name", OPERATIONS)
def test_row33_row31_row21_a_power_cut_at_any_effect_leaves_old_or_new(bench: Bench, name: str) -> None:
    assert bench.violations(OPERATIONS[name]) == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_row33_row04_a_full_disk_is_a_refusal_with_a_name_and_changes_nothing(
    bench: Bench, name: str
) -> None:
    assert bench.violations_when_full(OPERATIONS[name]) == []


@pytest.mark.parametrize("text", [b"", destruction.tombstone_text(b""), b"x" * 1000])
def test_row31_a_tombstone_of_another_s_making_does_not_clear_the_tpm(bench: Bench, text: bytes) -> None:
    """Else a file would do it, and another that is removed: after that the device is a new one."""
    rig = bench.copy(bench.get("operational"))
    before = bench.look("operational")
    rig.layout.tombstone.write_bytes(text)
    with rig.powered():
        look = rig.boot_and_look()
        assert (look["mode"], look["owned"]) == ("tombstone-forged", True)
    rig.layout.tombstone.unlink()
    with rig.powered():
        assert rig.boot_and_look() == before


def test_row21_a_hundred_wrong_pins_with_a_power_cut_in_each(bench: Bench) -> None:
    """Over every path and at every effect in turn: as many are tried as may be, and then none."""
    wrong = [OPERATIONS[name] for name in OPERATIONS if name.startswith("wrong-pin")]
    rig = bench.copy(bench.get("stocked"))
    tries = 0
    for number in range(100):
        operation = wrong[number % len(wrong)]
        with rig.powered():
            run = power.run(partial(operation.work, rig), rig.data, cut=number % 9)
        tries += len(run.outcome.notes)
        assert run.outcome.code in {"", "token-wrong-pin", "token-locked"}
        survivors = run.volume.survivors()
        rig = bench.copy(rig, survivors[number * 5 % len(survivors)])
    assert 0 < tries <= TRIES
    with rig.powered():
        rig.boot()
        assert rig.attempt("token-unlock", {"pin": PIN}) == "token-locked"


# The vault dies and nothing else does


def first_only() -> list[str]:
    return [name for name, row in states.TABLE.items() if State.OPERATIONAL not in row]


@pytest.mark.parametrize(
    ("name", "commit", "code"),
    [("complete", "nv_write", "provisioning-closed"), ("destroy-in-operation", "destroyed", DESTROYED)],
)
def test_row31_a_vault_that_dies_in_the_end_of_a_state_does_not_bring_it_back(
    bench: Bench, name: str, commit: str, code: str
) -> None:
    """The manager starts another vault with the mode that it knows of, which is that of the boot."""
    operation = OPERATIONS[name]
    origin = bench.get(operation.start)
    whole = bench.copy(origin)
    with whole.powered():
        effects = power.run(partial(operation.work, whole), whole.data).outcome.effects
    committed = next(number for number, each in enumerate(effects) if commit in (each.name, each.other))
    closed = first_only() if code != DESTROYED else [*states.TABLE]
    for cut in range(len(effects) + 1):
        rig = bench.copy(origin)
        with rig.powered():
            fact = rig.start()
            power.run(partial(operation.work, rig), rig.data, cut=cut)
            rig.serve(fact)
            if cut > committed:
                assert {each: rig.attempt(each) for each in closed} == dict.fromkeys(closed, code), cut
                assert code == DESTROYED or rig.look()["marker"] == ("completed", True, True), cut
            else:
                assert rig.attempt("status") == ""
                operation.work(rig)


def test_row31_a_completion_whose_lock_fails_is_one_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> NoReturn:
        raise DeviceRefusal("tpm-failed", "the TPM did not lock the provisioning marker")

    rig = bench.copy(bench.get("stocked"))
    with rig.powered():
        rig.boot()
        with monkeypatch.context() as patch:
            patch.setattr(nv_marker, "ensure_locked", no_lock)
            assert rig.attempt("complete") == "tpm-failed"
        assert {each: rig.attempt(each) for each in first_only()} == dict.fromkeys(
            first_only(), "provisioning-closed"
        )
        assert rig.handle("status")["completed"]
    with rig.powered():
        assert rig.boot_and_look()["marker"] == ("completed", True, True)


# The harness finds what it is made to find


def save_in_place(path: Path, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    files.write_all(fd, data)
    os.fsync(fd)
    os.close(fd)
    sync_directory(path.parent)


def save_beside(
    path: Path, data: bytes, mode: int, *, sync: bool = True, gap: bool = False, sync_names: bool = True
) -> None:
    beside = path.with_name(f".{path.name}.new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    files.write_all(fd, data)
    if sync:
        os.fsync(fd)
    os.close(fd)
    if gap:
        path.unlink(missing_ok=True)
        sync_directory(path.parent)
    beside.rename(path)
    if sync_names:
        sync_directory(path.parent)


Save = Callable[[Path, bytes, int], None]
BROKEN_SAVES: Final[dict[str, Save]] = {
    "in place": save_in_place,
    "renamed before it is synced": partial(save_beside, sync=False),
    "the directory not synced": partial(save_beside, sync_names=False),
    "the old one removed first": partial(save_beside, gap=True),
}


def replace_save(patch: pytest.MonkeyPatch, save: Save) -> None:
    for module in [each for name, each in sys.modules.items() if name.startswith("trustme_init.")]:
        if getattr(module, "write_atomic", None) is files.write_atomic and module is not files:
            patch.setattr(module, "write_atomic", save)


@pytest.mark.parametrize("name", ["another-certificate", "token-change-pin", "complete"])
def test_a_correct_save_of_this_test_is_not_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench.look(OPERATIONS[name].start)
    replace_save(monkeypatch, save_beside)
    assert bench.violations(OPERATIONS[name]) == []


@pytest.mark.parametrize("save", BROKEN_SAVES.values(), ids=BROKEN_SAVES)
@pytest.mark.parametrize("name", ["another-certificate", "token-change-pin"])
def test_a_broken_save_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, save: Save, name: str
) -> None:
    bench.look(OPERATIONS[name].start)
    replace_save(monkeypatch, save)
    assert bench.violations(OPERATIONS[name], enough=1) != []


def test_row31_a_marker_file_before_the_tpm_s_marker_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so the harness cuts between the disk and the TPM."""
    bench.look("stocked")
    write = record.write

    def write_both(path: Path, device_uuid: UUID, facts: dict[str, Any]) -> record.Record:
        files.write_atomic(path.with_name("_cml_provisioned_"), b"", 0o600)
        return write(path, device_uuid, facts)

    monkeypatch.setattr(record, "write", write_both)
    assert any("marker-contradiction" in each for each in bench.violations(OPERATIONS["complete"]))


def test_row21_a_try_that_is_counted_afterwards_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.look("stocked")

    def try_pin(self: Attempts, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except TokenRefusal:
            self._store(self._failed() + 1)
            raise

    monkeypatch.setattr(Attempts, "try_pin", try_pin)
    found = bench.violations(OPERATIONS["wrong-pin-to-unlock"])
    assert any(f"{TRIES} tries are left" in each for each in found)


def test_a_cut_comes_before_the_effect_and_after_the_one_before(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()

    def work() -> None:
        try:
            for name in ("one", "two", "three"):
                files.write_atomic(data / name, name.encode(), 0o600)
        finally:
            (data / "two").unlink(missing_ok=True)

    count = len(power.run(work, data).outcome.effects)
    assert sorted(path.name for path in data.iterdir()) == ["one", "three"]
    for cut in range(count):
        for path in data.iterdir():
            path.unlink()
        run = power.run(work, data, cut=cut)
        assert run.outcome.ended == "cut"
        assert len(run.outcome.effects) == cut, "no `finally` has had its way"


def test_an_effect_that_is_not_counted_fails_the_test(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(AssertionError, match="not counted"):
        power.run(lambda: (data / "aside").write_bytes(b"by io.open"), data)


HARMLESS: Final = {
    *("CreatePrimary", "Create", "Load", "ReadPublic", "FlushContext", "StartAuthSession", "Unseal"),
    *("PolicyPCR", "PolicyGetDigest", "PolicySecret", "GetCapability", "NV_ReadPublic", "NV_Read"),
    *("Sign", "Certify", "GetRandom", "PCR_Read", "PCR_Event", "PCR_Extend", "ActivateCredential"),
}
"""Commands that leave what a TPM keeps over a reset as it is."""


def test_row31_every_command_that_changes_the_tpm_is_counted(bench: Bench) -> None:
    """On the bus there is nothing that is neither harmless nor an effect, in the whole life of a device."""
    rig = bench.copy(bench.get("empty"))
    names = {int(code): name for name, code in vars(TPM2_CC).items() if isinstance(code, int)}

    def life() -> None:
        with Interposer(tpm, rig.directory) as bus:
            rig.tcti = bus.tcti
            rig.boot()
            rig.fill()
            rig.handle("complete")
            rig.handle("destroy")
            for code in bus.codes:
                power.note(names[code])

    with SoftwareTpm(rig.directory) as tpm:
        outcome = power.run(life, rig.data).outcome
    assert outcome.ended == "returned", outcome
    changing = [name.lower().replace("_", "") for _, name in outcome.notes if name not in {*HARMLESS, "try"}]
    counted = [effect.name.replace("_", "") for effect in outcome.effects if effect.kind == "tpm"]
    assert changing == counted
    assert {"nvwrite", "nvwritelock", "hierarchychangeauth", "clear"} <= {*counted}
