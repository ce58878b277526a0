# SPDX-License-Identifier: Apache-2.0
"""The vault's process: one request at a time, no secret in what it says, and a manager that never waits."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from trustme_init.control.loop import Loop
from trustme_init.errors import Refusal, StorageRefusal
from trustme_init.provisioning import vault as vaults
from trustme_init.provisioning.vault import MESSAGE_LIMIT, Arguments, Outcome, Vault

CANARY = "canary-7731"


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Kept:
    """A service with one of everything."""

    def __init__(self) -> None:
        self.count = 0

    def handle(self, operation: str, arguments: Arguments) -> dict[str, Any]:
        self.count += 1
        match operation:
            case "count":
                return {"count": self.count, "pid": os.getpid()}
            case "echo":
                return {name: len(value) for name, value in arguments.items()} | {
                    "types": sorted(type(value).__name__ for value in arguments.values())
                }
            case "refuse":
                raise StorageRefusal("no-room", "it is full", evidence="0 bytes", remedy="buy a disk")
            case "fail":
                raise ValueError(f"the PIN {arguments['pin']!r} is odd")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)
            case "self":
                fds = sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
                return {
                    "core": resource.getrlimit(resource.RLIMIT_CORE),
                    "descriptors": len([fd for fd in fds if fd > 2]),
                    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
                }
        return {}


class Asker:
    """A vault on a loop, asked and waited for."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.vault = Vault(loop, Kept)

    def submit(self, operation: str, arguments: Mapping[str, str | bytes] | None = None) -> list[Outcome]:
        outcomes: list[Outcome] = []
        self.vault.submit(operation, arguments or {}, outcomes.append)
        return outcomes

    def wait(self, *waited: list[Outcome]) -> None:
        deadline = time.monotonic() + 10
        while not all(waited):
            assert time.monotonic() < deadline
            self.loop.turn(0.1)

    def ask(self, operation: str, **arguments: str | bytes) -> Outcome:
        outcomes = self.submit(operation, arguments)
        self.wait(outcomes)
        (outcome,) = outcomes
        return outcome

    def refusal(self, operation: str, **arguments: str | bytes) -> Refusal:
        refusal = self.ask(operation, **arguments).refusal
        assert refusal is not None
        return refusal


@pytest.fixture
def asker() -> Iterator[Asker]:
    loop = Loop()
    asker = Asker(loop)
    yield asker
    asker.vault.close()
    for _ in range(3):
        loop.turn(0.05)
    loop.close()


def test_one_process_answers_in_order(asker: Asker) -> None:
    waited = [asker.submit("count") for _ in range(5)]
    asker.wait(*waited)
    assert [outcome.result["count"] for (outcome,) in waited] == [1, 2, 3, 4, 5]
    assert {outcome.result["pid"] for (outcome,) in waited} == {asker.vault.pid}


def test_text_and_bytes_arrive_as_they_are(asker: Asker) -> None:
    outcome = asker.ask("echo", pin="ü" * 10, token=bytes(range(256)))
    assert outcome.result == {"pin": 10, "token": 256, "types": ["bytes", "str"]}


def test_the_largest_request_passes_and_a_larger_one_is_refused(asker: Asker) -> None:
    size = MESSAGE_LIMIT * 3 // 4 - 200
    assert asker.ask("echo", token=bytes(size)).result["token"] == size
    assert asker.refusal("echo", token=bytes(MESSAGE_LIMIT)).code == "request-too-large"
    assert asker.ask("count").result["count"] == 2


def test_a_refusal_keeps_its_words(asker: Asker) -> None:
    refusal = asker.refusal("refuse")
    assert refusal.as_dict() == {
        "kind": "Refusal",
        "code": "no-room",
        "cause": "it is full",
        "evidence": "0 bytes",
        "remedy": "buy a disk",
    }


def test_row29_an_unforeseen_failure_does_not_quote_its_arguments(asker: Asker) -> None:
    refusal = asker.refusal("fail", pin=CANARY)
    assert refusal.code == "vault-failed"
    assert "ValueError in handle" in refusal.evidence
    assert CANARY not in str(refusal.as_dict())
    assert asker.ask("count").refusal is None, "the process goes on"


def test_a_child_that_dies_fails_its_request_and_the_next_gets_another(asker: Asker) -> None:
    first = asker.ask("count").result["pid"]
    waited = [asker.submit("die"), asker.submit("count")]
    asker.wait(*waited)
    (died,), (answered,) = waited
    assert died.refusal is not None
    assert died.refusal.code == "vault-ended"
    assert answered.result["count"] == 1
    assert answered.result["pid"] != first


def test_what_takes_too_long_is_given_up(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaults, "REQUEST_TIMEOUT", 0.2)
    waited = [asker.submit("hang"), asker.submit("count")]
    asker.wait(*waited)
    (hung,), (answered,) = waited
    assert hung.refusal is not None
    assert hung.refusal.code == "vault-timed-out"
    assert answered.refusal is None


def test_an_idle_child_ends_and_leaves_nothing(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    monkeypatch.setattr(vaults, "IDLE_TIME", 0.1)
    pid = asker.ask("count").result["pid"]
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "not ended, or not reaped"
        asker.loop.turn(0.05)
    assert asker.vault.pid == 0
    assert open_descriptors() == before
    assert asker.ask("count").result["count"] == 1


def test_closing_tells_everybody_who_waits(asker: Asker) -> None:
    waited = [asker.submit("hang"), asker.submit("count")]
    asker.vault.close()
    codes = [outcome.refusal.code for (outcome,) in waited if outcome.refusal is not None]
    assert codes == ["vault-ended", "vault-ended"]


def test_row23_row29_the_child_holds_its_socket_only_and_leaves_no_dump(asker: Asker) -> None:
    result = asker.ask("self").result
    assert result["core"] == [0, 0]
    assert result["blocked"] == []
    assert result["descriptors"] == 2, "its socket, and the directory it is listing"
    # What is not dumpable belongs to root, whoever runs it (proc(5)); and nobody but root may look.
    status = Path(f"/proc/{asker.vault.pid}/status").read_text()
    assert "State:" in status
    assert asker.ask("echo", probe=_dumpable(asker.vault.pid)).refusal is None


def _dumpable(pid: int) -> str:
    """Return the kernel's word; AssertionError if the process can be dumped."""
    other = os.fork()
    if other == 0:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            Path(f"/proc/{pid}/maps").read_bytes()
        except PermissionError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    return "checked"


def test_a_manager_that_serves_many_is_told_in_order_of_asking(asker: Asker) -> None:
    order: list[int] = []

    def note(number: int) -> Callable[[Outcome], None]:
        return lambda _outcome: order.append(number)

    for number in range(4):
        asker.vault.submit("count", {}, note(number))
    deadline = time.monotonic() + 10
    while len(order) < 4:
        assert time.monotonic() < deadline
        asker.loop.turn(0.1)
    assert order == [0, 1, 2, 3]
