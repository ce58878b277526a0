# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Never

import pytest

from trustme_init.errors import TokenRefusal
from trustme_init.linux import files
from trustme_init.tokens.attempts import Attempts

LIMIT = 3


class PowerCutError(BaseException):
    """Ends a try at once; nothing handles it."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "attempts.json"
    Attempts(path, LIMIT).reset()
    return path


def wrong() -> Never:
    raise TokenRefusal("token-wrong-pin", "no", remedy="x")


def malformed() -> Never:
    raise TokenRefusal("token-malformed", "no", evidence="as it was", remedy="x")


def cut() -> Never:
    raise PowerCutError


def refused(path: Path, action: Callable[[], object]) -> TokenRefusal:
    with pytest.raises(TokenRefusal) as caught:
        Attempts(path, LIMIT).try_pin(action)
    return caught.value


def test_row21_wrong_pins_are_counted_across_restarts(path: Path) -> None:
    for left in (2, 1, 0):
        refusal = refused(path, wrong)
        assert (refusal.code, refusal.evidence) == ("token-wrong-pin", f"{left} of 3 tries left")
    for action in (wrong, lambda: "right", cut, malformed):
        refusal = refused(path, action)
        assert (refusal.code, refusal.evidence) == ("token-locked", "0 of 3 tries left")
    assert Attempts(path, LIMIT).remaining == 0


def test_a_right_pin_begins_anew(path: Path) -> None:
    refused(path, wrong)
    refused(path, wrong)
    assert Attempts(path, LIMIT).try_pin(lambda: "right") == "right"
    assert Attempts(path, LIMIT).remaining == LIMIT


def test_row21_a_power_cut_costs_the_try(path: Path) -> None:
    for left in (2, 1, 0):
        with pytest.raises(PowerCutError):
            Attempts(path, LIMIT).try_pin(cut)
        assert Attempts(path, LIMIT).remaining == left
    assert refused(path, lambda: "right").code == "token-locked"


def test_row21_the_count_is_durable_before_the_try(path: Path) -> None:
    """As read from disk by somebody else at that moment."""
    seen = []
    Attempts(path, LIMIT).try_pin(lambda: seen.append(json.loads(path.read_bytes())))
    assert seen == [{"version": 1, "failed": 1}]


def test_other_refusals_give_the_try_back(path: Path) -> None:
    refused(path, wrong)
    for _ in range(5):
        refusal = refused(path, malformed)
        assert (refusal.code, refusal.evidence) == ("token-malformed", "as it was")
    assert Attempts(path, LIMIT).remaining == LIMIT - 1


def test_an_error_keeps_the_count(path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Attempts(path, LIMIT).try_pin(lambda: 1 // 0)
    assert Attempts(path, LIMIT).remaining == LIMIT - 1


def test_row21_a_lower_limit_locks(path: Path) -> None:
    refused(path, wrong)
    refused(path, wrong)
    with pytest.raises(TokenRefusal) as caught:
        Attempts(path, 1).try_pin(lambda: "right")
    assert caught.value.code == "token-locked"
    assert Attempts(path, 1).remaining == 0
    with pytest.raises(ValueError):
        Attempts(path, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"0",
        b"null",
        b"\0" * 24,
        b'{"version": 1}',
        b'{"failed": 0}',
        b'{"version": 2, "failed": 0}',
        b'{"version": true, "failed": 0}',
        b'{"version": 1.0, "failed": 0}',
        b'{"version": 1, "failed": -1}',
        b'{"version": 1, "failed": 0.0}',
        b'{"version": 1, "failed": false}',
        b'{"version": 1, "failed": "0"}',
        b'{"version": 1, "failed": null}',
        b'{"version": 1, "failed": 0, "more": 1}',
        b'{"version": 1, "failed": 0',
        b'{"version": 1, "failed": 0}' + b" " * 300,
        b'\xff\xfe{"version": 1, "failed": 0}',
        b"[" * 255,
    ],
)
def test_row21_a_damaged_count_locks(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert refused(path, lambda: "right").code == "token-attempts-damaged"
    with pytest.raises(TokenRefusal) as caught:
        _ = Attempts(path, LIMIT).remaining
    assert caught.value.code == "token-attempts-damaged"
    assert path.read_bytes() == content


def test_row21_a_missing_count_locks(path: Path) -> None:
    path.unlink()
    assert refused(path, lambda: "right").code == "token-attempts-damaged"
    assert not path.exists()


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
def test_row21_a_count_that_is_no_file_locks(path: Path, kind: str) -> None:
    other = path.with_name("other")
    path.rename(other)
    if kind == "symlink":
        path.symlink_to(other)
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert refused(path, lambda: "right").code == "token-attempts-damaged"


def test_row21_a_full_disk_allows_no_try(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Never:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tried = []
    monkeypatch.setattr(files, "write_all", full)
    refusal = refused(path, lambda: tried.append(1))
    assert (refusal.code, refusal.evidence) == ("token-not-stored", "attempts.json: No space left on device")
    assert not tried


def test_a_right_pin_is_right_though_the_count_cannot_fall(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Never:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def right() -> str:
        monkeypatch.setattr(files, "write_all", full)
        return "right"

    assert Attempts(path, LIMIT).try_pin(right) == "right"
    assert Attempts(path, LIMIT).remaining == LIMIT - 1


def test_row21_many_at_once(path: Path) -> None:
    """Sixteen processes try at the same time; three tries are made."""
    tried = path.with_name("tried")
    tried.touch()

    def slow() -> Never:
        with tried.open("a") as file:
            file.write("x")
        time.sleep(0.01)
        wrong()

    children = []
    for _ in range(16):
        if (child := os.fork()) == 0:
            try:
                Attempts(path, LIMIT).try_pin(slow)
            except TokenRefusal as refusal:
                os._exit({"token-wrong-pin": 10, "token-locked": 11}.get(refusal.code, 1))
            os._exit(2)
        children.append(child)
    ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert ends == [10] * 3 + [11] * 13
    assert len(tried.read_text()) == LIMIT


@pytest.mark.parametrize("umask", [0, 0o777])
def test_row30_mode(path: Path, umask: int) -> None:
    path.unlink()
    before = os.umask(umask)
    try:
        Attempts(path, LIMIT).reset()
        refused(path, wrong)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o600
