# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import hashlib
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Never

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.tokens import kit
from tests.unit.tokens.kit import CANARY, FEW, NOW, PIN
from trustme_init.errors import TokenRefusal
from trustme_init.tokens import pkcs12, softtoken
from trustme_init.tokens.place import TokenStatus
from trustme_init.tokens.store import DEVELOPMENT_PIN, TokenStore

LIMIT = 10
NEW = "another PIN"
UUID = "4c4c4544-0051-3610-8052-b4c04f4a3232"
CALLS = ("open", "fchmod", "write", "fsync", "rename", "unlink", "mkdir", "chmod")
"""What the room changes the disk with, and what it opens for that."""

pytestmark = pytest.mark.usefixtures("few_rounds")


class PowerCutError(BaseException):
    """Nothing handles it, so nothing is done after it."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def store(directory: Path) -> TokenStore:
    return TokenStore(directory, LIMIT)


def with_token(directory: Path, pin: str = PIN) -> Path:
    store(directory).replace(kit.encoded(pin=pin), pin)
    return directory


def code(action: Callable[[], object]) -> str:
    with pytest.raises(TokenRefusal) as caught:
        action()
    assert caught.value.remedy
    return caught.value.code


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_from_none_to_one_and_back(directory: Path) -> None:
    device = store(directory)
    assert device.status() == TokenStatus("none", LIMIT, LIMIT)
    assert code(lambda: device.unlock(PIN)) == "token-missing"
    assert code(lambda: device.change_pin(PIN, NEW)) == "token-missing"
    device.remove()
    assert not directory.exists()
    device.create(PIN, common_name=UUID, now=NOW)
    token = store(directory).unlock(PIN)
    assert device.status() == TokenStatus(
        "softtoken",
        LIMIT,
        LIMIT,
        certificate_sha256=hashlib.sha256(token.certificate.public_bytes(Encoding.DER)).hexdigest(),
        rounds=FEW,
        default_pin=False,
    )
    assert sorted(tree(directory)) == ["attempts.json", "testuser.p12", "token.json"]
    before = tree(directory)
    assert code(lambda: device.create(NEW, common_name=UUID, now=NOW)) == "token-already-there"
    assert tree(directory) == before
    device.remove()
    assert tree(directory) == {}
    assert device.status().kind == "none"
    assert code(lambda: device.unlock(PIN)) == "token-missing"


def test_another_pin_same_key(directory: Path) -> None:
    with_token(directory)
    before = store(directory).unlock(PIN)
    store(directory).change_pin(PIN, NEW)
    assert store(directory).unlock(NEW).certificate == before.certificate
    assert code(lambda: store(directory).unlock(PIN)) == "token-wrong-pin"


def test_the_operators_own_token(directory: Path) -> None:
    with_token(directory)
    made = kit.token()
    strong = kit.encoded(made, NEW)
    store(directory).replace(strong, NEW)
    assert tree(directory)["testuser.p12"] == strong
    assert store(directory).unlock(NEW).certificate == made.certificate


def test_a_weak_token_is_encoded_anew(directory: Path) -> None:
    """Where it is brought in, and where it is found: as after `openssl pkcs12 -export -out testuser.p12`."""
    made = kit.token()
    file = pkcs12.parse(kit.encoded(made))
    weak = pkcs12.assemble(file._open_safes, PIN, hash_name="sha1", rounds=FEW)
    store(directory).replace(weak, PIN)
    assert store(directory).status().rounds == FEW
    assert not softtoken.inspect(tree(directory)["testuser.p12"]).weak_kdf

    (directory / "testuser.p12").write_bytes(weak)
    (directory / "testuser.p12").chmod(0o644)
    assert store(directory).status().default_pin is None
    assert not store(directory).unlock(PIN).weak_kdf
    found = tree(directory)["testuser.p12"]
    assert not softtoken.inspect(found).weak_kdf
    assert (directory / "testuser.p12").stat().st_mode & 0o7777 == 0o600
    assert store(directory).status().default_pin is False
    assert store(directory).unlock(PIN).certificate == made.certificate
    assert tree(directory)["testuser.p12"] == found


def test_a_weak_token_opens_on_a_full_disk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_token(directory)
    file = pkcs12.parse(kit.encoded())
    weak = pkcs12.assemble(file._open_safes, PIN, hash_name="sha1", rounds=FEW)
    (directory / "testuser.p12").write_bytes(weak)

    def full(*_: object) -> Never:
        raise TokenRefusal("token-not-stored", "no")

    monkeypatch.setattr(TokenStore, "_write", full)
    assert store(directory).unlock(PIN).weak_kdf
    assert tree(directory)["testuser.p12"] == weak


def test_whether_the_pin_is_the_development_one_is_known(directory: Path) -> None:
    device = store(directory)
    device.replace(kit.encoded(pin=DEVELOPMENT_PIN), DEVELOPMENT_PIN)
    assert device.status().default_pin is True
    device.change_pin(DEVELOPMENT_PIN, PIN)
    assert device.status().default_pin is False
    device.change_pin(PIN, DEVELOPMENT_PIN)
    assert device.status().default_pin is True
    # Somebody else's file: not known until it is unlocked.
    (directory / "testuser.p12").write_bytes(kit.encoded(pin=DEVELOPMENT_PIN))
    assert device.status().default_pin is None
    assert code(lambda: device.unlock(PIN)) == "token-wrong-pin"
    assert device.status().default_pin is None
    device.unlock(DEVELOPMENT_PIN)
    assert device.status().default_pin is True


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"version": 1, "default_pin": 1}',
        b'{"version": 1, "default_pin": {"SHA": 1}}',
        b'{"version": 2, "default_pin": {"SHA": true}}',
        b"\xff",
        b"x" * 2000,
    ],
)
def test_a_damaged_description_knows_nothing(directory: Path, content: bytes) -> None:
    with_token(directory)
    digest = hashlib.sha256(tree(directory)["testuser.p12"]).hexdigest()
    (directory / "token.json").write_bytes(content.replace(b"SHA", digest.encode()))
    assert store(directory).status().default_pin is None
    store(directory).unlock(PIN)
    assert store(directory).status().default_pin is False


@pytest.mark.parametrize(
    ("put", "expected"),
    [
        (lambda path: path.write_bytes(b"junk"), "token-malformed"),
        (lambda path: path.write_bytes(bytes(70_000)), "token-too-large"),
        (lambda path: path.write_bytes(bytes(7_000_000)), "token-too-large"),
        (lambda path: path.mkdir(), "token-unreadable"),
        (os.mkfifo, "token-unreadable"),
        (lambda path: path.symlink_to("/etc/hostname"), "token-unreadable"),
    ],
    ids=["junk", "large", "huge", "directory", "fifo", "symlink"],
)
def test_a_token_that_cannot_be_read(directory: Path, put: Callable[[Path], object], expected: str) -> None:
    path = with_token(directory) / "testuser.p12"
    path.unlink()
    put(path)
    device = store(directory)
    assert device.status() == TokenStatus("softtoken", LIMIT, LIMIT, fault=expected)
    assert code(lambda: device.unlock(PIN)) == expected
    assert code(lambda: device.change_pin(PIN, NEW)) == expected
    assert code(lambda: device.create(PIN, common_name=UUID, now=NOW)) == "token-already-there"
    assert device.status().tries_left == LIMIT


def test_row21_one_counter_for_all_paths(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred wrong PINs on every path, the device cut off after each and also in between."""
    with_token(directory)
    own = kit.encoded(pin="operator's")
    tries = []
    is_password = pkcs12.Pkcs12.is_password

    def counting(self: pkcs12.Pkcs12, password: str) -> bool:
        tries.append(password)
        return is_password(self, password)

    def cut_off(*_: object) -> Never:
        raise PowerCutError

    codes, evidence = [], []
    for number in range(100):
        monkeypatch.setattr(pkcs12.Pkcs12, "is_password", counting)
        if number % 4 == 1:
            monkeypatch.setattr(softtoken, "open_token", cut_off)
        device = store(directory)
        try:
            if number % 3 == 0:
                device.unlock("wrong")
            elif number % 3 == 1:
                device.change_pin("wrong", NEW)
            else:
                device.replace(own, "wrong")
        except TokenRefusal as refusal:
            codes.append(refusal.code)
            evidence.append(refusal.evidence)
        except PowerCutError:
            codes.append("cut")
        monkeypatch.undo()
        monkeypatch.setattr(softtoken, "ROUNDS", FEW)
    assert len(tries) <= LIMIT
    assert all(text.endswith(f"of {LIMIT} tries left") for text in evidence)
    assert codes.count("token-wrong-pin") == len(tries)
    assert len(tries) + codes.count("cut") == LIMIT
    assert set(codes[LIMIT:]) == {"token-locked"}
    device = store(directory)
    for action in (
        lambda: device.unlock(PIN),
        lambda: device.change_pin(PIN, NEW),
        lambda: device.replace(own, "operator's"),
    ):
        assert code(action) == "token-locked"
    assert device.status().fault == "token-locked"
    assert device.status().tries_left == 0
    device.remove()
    device.create(PIN, common_name=UUID, now=NOW)
    assert device.unlock(PIN)


def test_row21_a_count_that_is_gone_locks(directory: Path) -> None:
    with_token(directory)
    (directory / "attempts.json").unlink()
    device = store(directory)
    own = kit.encoded(pin="operator's")
    for action in (
        lambda: device.unlock(PIN),
        lambda: device.change_pin(PIN, NEW),
        lambda: device.replace(own, "operator's"),
    ):
        assert code(action) == "token-attempts-damaged"
    status = device.status()
    assert (status.tries_left, status.fault) == (0, "token-attempts-damaged")
    assert not (directory / "attempts.json").exists()


def test_row21_without_a_token_the_operators_password_is_counted_too(directory: Path) -> None:
    device = store(directory)
    own = kit.encoded(pin="operator's")
    assert code(lambda: device.replace(own, "wrong")) == "token-wrong-pin"
    assert device.status() == TokenStatus("none", LIMIT - 1, LIMIT)
    (directory / "attempts.json").write_bytes(b"junk")
    assert code(lambda: device.replace(own, "operator's")) == "token-attempts-damaged"
    assert device.status() == TokenStatus("none", 0, LIMIT, fault="token-attempts-damaged")
    device.remove()
    device.replace(own, "operator's")
    assert device.unlock("operator's")


def test_row21_a_refused_token_costs_no_try_and_changes_nothing(directory: Path) -> None:
    with_token(directory)
    for pin in ("wrong", "wrong"):
        code(lambda pin=pin: store(directory).unlock(pin))  # type: ignore[misc]
    before = tree(directory)
    for data, expected in (
        (b"junk", "token-malformed"),
        (bytes(70_000), "token-too-large"),
        (kit.encoded()[:-1], "token-malformed"),
        (pkcs12.assemble((), PIN, hash_name="sha256", rounds=FEW), "token-no-key"),
    ):
        assert code(lambda data=data: store(directory).replace(data, PIN)) == expected  # type: ignore[misc]
        assert tree(directory) == before
    assert code(lambda: store(directory).replace(kit.encoded(), "")) == "token-bad-pin"
    assert code(lambda: store(directory).change_pin(PIN, "")) == "token-bad-pin"
    assert tree(directory) == before


def test_row29_no_file_and_no_refusal_holds_the_pin(directory: Path) -> None:
    device = store(directory)
    texts = []

    def attempt(action: Callable[[], object]) -> None:
        with pytest.raises(TokenRefusal) as caught:
            action()
        texts.append("".join(traceback.format_exception(caught.value)) + repr(caught.value.as_dict()))

    device.replace(kit.encoded(pin=CANARY), CANARY)
    device.unlock(CANARY)
    device.change_pin(CANARY, f"{CANARY}2")
    attempt(lambda: device.unlock(CANARY))
    attempt(lambda: device.change_pin(CANARY, f"{CANARY}3"))
    attempt(lambda: device.change_pin(f"{CANARY}2", f"{CANARY}\n"))
    attempt(lambda: device.replace(kit.encoded(), CANARY))
    attempt(lambda: device.replace(b"junk", CANARY))
    attempt(lambda: device.create(CANARY, common_name=UUID, now=NOW))
    texts.append(repr(device.status()))
    for encoding in ("utf-8", "utf-16-be"):
        for content in (*tree(directory).values(), *(text.encode() for text in texts)):
            assert CANARY.encode(encoding) not in content


@pytest.mark.parametrize("umask", [0, 0o777])
def test_row30_every_file_is_for_the_owner_alone(directory: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        device = store(directory)
        device.create(PIN, common_name=UUID, now=NOW)
        device.change_pin(PIN, NEW)
        device.replace(kit.encoded(), PIN)
        code(lambda: device.unlock("wrong"))
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o7777 == 0o700
    assert {path.stat().st_mode & 0o7777 for path in directory.iterdir()} == {0o600}


@contextmanager
def failing_at(call: int, error: Callable[[], BaseException], *, after: bool = False) -> Iterator[list[str]]:
    """Make the `call`-th call that touches the disk fail, before or after it has had its effect."""
    made: list[str] = []

    def patched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) != call:
                return real(*arguments, **options)
            if after and name != "open":
                real(*arguments, **options)
            raise error()

        return function

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, patched(name, getattr(os, name)))
        yield made


class Cuts:
    """Let `action` fail at each of its calls in turn, from the state in `start`; iterate over the outcomes.

    An outcome is the store as the device finds it afterwards, and whether `action` had returned.
    """

    def __init__(
        self,
        start: Path,
        action: Callable[[TokenStore], object],
        error: Callable[[], BaseException] = PowerCutError,
        *,
        after: bool = False,
    ) -> None:
        self._start = start
        self._action = action
        self._error = error
        self._after = after
        self.calls = 0

    def __iter__(self) -> Iterator[tuple[TokenStore, bool]]:
        work = self._start.with_name("work")
        for call in range(1, 1000):
            if self._start.exists():
                shutil.copytree(self._start, work)
            finished = False
            with failing_at(call, self._error, after=self._after) as made:
                try:
                    self._action(store(work))
                    finished = True
                except (PowerCutError, TokenRefusal):
                    pass
            yield store(work), finished
            shutil.rmtree(work, ignore_errors=True)
            if len(made) < call:
                self.calls = call - 1
                return
        raise AssertionError("it never ends")


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


HOW = pytest.mark.parametrize(
    ("error", "after"),
    [(PowerCutError, False), (PowerCutError, True), (full_disk, False), (full_disk, True)],
    ids=["cut-before", "cut-after", "full-before", "full-after"],
)


def pin_of(device: TokenStore, *pins: str) -> str:
    """Return the one of these that opens the token, and see that the status knew whether it is "trustme"."""
    status = device.status()
    assert status.kind == "softtoken"
    opened = []
    for pin in pins:
        try:
            device.unlock(pin)
        except TokenRefusal as refusal:
            assert refusal.code == "token-wrong-pin"  # noqa: PT017 - any other is a failure of the test
        else:
            opened.append(pin)
    assert len(opened) == 1
    assert status.default_pin is (opened[0] == DEVELOPMENT_PIN)
    return opened[0]


@HOW
@pytest.mark.parametrize(("old", "new"), [(DEVELOPMENT_PIN, NEW), (PIN, DEVELOPMENT_PIN)])
def test_row33_change_pin_cut_anywhere(
    directory: Path, error: Callable[[], BaseException], old: str, new: str, *, after: bool
) -> None:
    with_token(directory, old)
    cuts = Cuts(directory, lambda device: device.change_pin(old, new), error, after=after)
    outcomes = []
    for device, finished in cuts:
        outcomes.append(pin_of(device, old, new))
        assert not finished or outcomes[-1] == new
    assert cuts.calls >= 4 * 7  # four files are written: the count, the description, the token, the count
    assert set(outcomes) == {old, new}


@HOW
def test_row33_replace_cut_anywhere(
    directory: Path, error: Callable[[], BaseException], *, after: bool
) -> None:
    with_token(directory)
    own = kit.encoded(pin=NEW)
    for device, finished in Cuts(directory, lambda device: device.replace(own, NEW), error, after=after):
        found = pin_of(device, PIN, NEW)
        assert not finished or found == NEW


@HOW
def test_row33_upgrade_cut_anywhere(
    directory: Path, error: Callable[[], BaseException], *, after: bool
) -> None:
    with_token(directory)
    file = pkcs12.parse(kit.encoded())
    weak = pkcs12.assemble(file._open_safes, PIN, hash_name="sha1", rounds=FEW)
    (directory / "testuser.p12").write_bytes(weak)
    for device, _ in Cuts(directory, lambda device: device.unlock(PIN), error, after=after):
        assert device.unlock(PIN)
        assert device.status().default_pin is False


@HOW
def test_row33_create_cut_anywhere(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], *, after: bool
) -> None:
    made = kit.encoded()
    monkeypatch.setattr(softtoken, "create", lambda *_, **__: made)

    def create(device: TokenStore) -> None:
        device.create(PIN, common_name=UUID, now=NOW)

    for device, finished in Cuts(directory, create, error, after=after):
        if device.status().kind == "none":
            assert not finished
            create(device)
        assert pin_of(device, PIN, NEW) == PIN


@HOW
def test_row33_remove_cut_anywhere(
    directory: Path, error: Callable[[], BaseException], *, after: bool
) -> None:
    with_token(directory)
    code(lambda: store(directory).unlock("wrong"))
    (directory / ".testuser.p12.new").write_bytes(kit.encoded())
    for device, finished in Cuts(directory, TokenStore.remove, error, after=after):
        assert not finished or device.status() == TokenStatus("none", LIMIT, LIMIT)
        if device.status().kind == "softtoken":
            assert device.unlock(PIN)
        device.remove()
        assert tree(device._directory) == {}


def test_row21_a_cut_while_replacing_gives_no_try_back(directory: Path) -> None:
    """Nobody resets the count of the old token by bringing in one whose password he knows."""
    with_token(directory)
    for _ in range(LIMIT - 1):
        code(lambda: store(directory).unlock("wrong"))
    own = kit.encoded(pin=NEW)
    old = tree(directory)["testuser.p12"]
    still = 0
    for device, _ in Cuts(directory, lambda device: device.replace(own, NEW)):
        if tree(device._directory)["testuser.p12"] == old:
            still += 1
            assert device.status().tries_left <= 1
    assert still > 10


def test_row33_the_cuts_find_an_unsafe_writer(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_token(directory)

    def in_place(_: TokenStore, path: Path, data: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(fd, data)
        os.fsync(fd)
        os.close(fd)

    monkeypatch.setattr(TokenStore, "_write", in_place)
    faults = set()
    for device, _ in Cuts(directory, lambda device: device.change_pin(PIN, NEW)):
        faults.add(device.status().fault)
    assert "token-malformed" in faults
