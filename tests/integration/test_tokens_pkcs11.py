# SPDX-License-Identifier: Apache-2.0
"""The PKCS#11 token against SoftHSM2, with OpenSC's pkcs11-tool as the oracle."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from pkcs11 import Attribute, ObjectClass, TokenFlag

from tests.unit.tokens import kit
from tests.unit.tokens.kit import CANARY
from trustme_init.errors import Refusal, TokenRefusal
from trustme_init.tokens import kind, pkcs11_token, wrapping
from trustme_init.tokens.pkcs11_token import Hardware, Pkcs11Token
from trustme_init.tokens.place import ATTEMPTS_NAME, PKCS11, TOKEN_FILES, TokenStatus
from trustme_init.tokens.store import DEVELOPMENT_PIN

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
LIMIT = 10
PIN = "847213"
NEW = "5923-another"
KEY = os.urandom(96)
CONTEXT = b"a container's UUID"
LABEL = "device"
UUID = "4c4c4544-0051-3610-8052-b4c04f4a3232"
NAME = TOKEN_FILES[PKCS11]
HARDWARE = Hardware(MODULE, LABEL)


def run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plug_in(label: str, pin: str = PIN) -> None:
    """Have one more token."""
    run("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", "12345678")


@pytest.fixture(autouse=True)
def slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for the tokens of one test; the module reads where it is each time it is initialised."""
    (tmp_path / "softhsm").mkdir()
    configuration = tmp_path / "softhsm.conf"
    configuration.write_text(f"directories.tokendir = {tmp_path}/softhsm\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(configuration))
    plug_in(LABEL)
    return tmp_path / "softhsm"


@pytest.fixture
def token(tmp_path: Path) -> Pkcs11Token:
    made = Pkcs11Token(tmp_path / "token", LIMIT, HARDWARE)
    made.create(PIN, common_name=UUID)
    return made


def wrapped(token: Pkcs11Token, pin: str = PIN) -> bytes:
    with token.open(pin) as opened:
        return wrapping.wrap(opened.public_key, KEY, context=CONTEXT)


def unwrapped(token: Pkcs11Token, blob: bytes, pin: str = PIN) -> bytes:
    with token.open(pin) as opened:
        return wrapping.unwrap(opened, blob, context=CONTEXT)


def check(token: Pkcs11Token, pin: str) -> None:
    with token.open(pin):
        pass


def code(action: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as caught:
        action()
    assert caught.value.remedy
    return caught.value.code


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def as_user(work: Callable[[Any], object], label: str = LABEL) -> None:
    """Do what the owner does with other software."""
    library = pkcs11.lib(str(MODULE))
    try:
        with library.get_token(token_label=label).open(rw=True, user_pin=PIN) as session:
            work(session)
    finally:
        library.finalize()


def test_from_none_to_one_and_back(tmp_path: Path) -> None:
    place = tmp_path / "token"
    token = Pkcs11Token(place, LIMIT, HARDWARE)
    assert token.status() == TokenStatus("none", LIMIT, LIMIT)
    assert code(lambda: check(token, PIN)) == "token-missing"
    token.remove()
    assert not place.exists()
    token.create(PIN, common_name=UUID)
    assert token.status() == TokenStatus("pkcs11", LIMIT, LIMIT, default_pin=False)
    assert kind.kind_in(place) == "pkcs11"
    before = tree(place)
    assert code(lambda: token.create(PIN, common_name=UUID)) == "token-already-there"
    assert tree(place) == before
    assert unwrapped(token, wrapped(token)) == KEY
    token.remove()
    assert tree(place) == {}
    assert code(lambda: check(token, PIN)) == "token-missing"


def test_another_implementation_sees_a_key_that_cannot_be_read(token: Pkcs11Token) -> None:
    seen = run(
        *("pkcs11-tool", "--module", str(MODULE), "--token-label", LABEL),
        *("--login", "--pin", PIN, "--list-objects", "--type", "privkey"),
    )
    assert f"{pkcs11_token.KEY_LABEL} {UUID}" in seen
    assert "EC" in seen
    assert "Usage:      derive" in seen
    access = seen.partition("Access:")[2].splitlines()[0]
    assert {each.strip() for each in access.split(",")} == {
        *("sensitive", "always sensitive", "never extractable", "local")
    }


def test_from_softtoken_to_hardware_and_back(token: Pkcs11Token) -> None:
    soft = kit.token(kit.rsa_key())
    begun = wrapping.wrap(soft.public_key, KEY, context=CONTEXT)
    with token.open(PIN) as opened:
        moved = kind.rewrap(begun, soft, opened, context=CONTEXT)
        back = kind.rewrap(moved, opened, soft, context=CONTEXT)
        assert code(lambda: kind.rewrap(begun, opened, soft, context=CONTEXT)) == "wrapped-key-damaged"
    assert wrapping.unwrap(soft, back, context=CONTEXT) == KEY
    assert unwrapped(token, moved) == KEY


def test_another_pin_same_key(token: Pkcs11Token) -> None:
    blob = wrapped(token)
    token.change_pin(PIN, NEW)
    assert code(lambda: check(token, PIN)) == "token-wrong-pin"
    assert unwrapped(token, blob, NEW) == KEY
    token.change_pin(NEW, DEVELOPMENT_PIN)
    assert token.status().default_pin is True
    assert unwrapped(token, blob, DEVELOPMENT_PIN) == KEY


def test_the_hardware_has_rules_for_pins_of_its_own(token: Pkcs11Token) -> None:
    assert code(lambda: token.change_pin(PIN, "1")) == "token-bad-pin"  # SoftHSM wants four
    assert code(lambda: token.change_pin(PIN, "")) == "token-bad-pin"
    assert token.status().default_pin is False
    assert token.status().tries_left == LIMIT
    check(token, PIN)


# Wrong PINs.


@pytest.mark.parametrize("wrong", ["wrong", "", "1", "x" * 300, "\ud800"])
def test_a_wrong_pin_is_counted(token: Pkcs11Token, wrong: str) -> None:
    with pytest.raises(TokenRefusal) as caught:
        check(token, wrong)
    assert (caught.value.code, caught.value.evidence) == (
        "token-wrong-pin",
        f"{LIMIT - 1} of {LIMIT} tries left",
    )
    assert token.status().tries_left == LIMIT - 1
    check(token, PIN)
    assert token.status().tries_left == LIMIT


@pytest.mark.parametrize("wrong", ["", "\ud800"])
def test_what_cannot_be_a_pin_does_not_reach_the_module(wrong: str) -> None:
    """An empty one means "ask at the pin pad" to some modules, which would be a login without our PIN."""
    tried = []

    class Token:
        def open(self, **options: Any) -> None:
            tried.append(options)

    assert code(lambda: pkcs11_token._login(Token(), wrong, write=False)) == "token-wrong-pin"
    assert tried == []


def test_row21_one_counter_for_all_paths(token: Pkcs11Token, tmp_path: Path) -> None:
    fresh = Pkcs11Token(tmp_path / "fresh", LIMIT, HARDWARE)
    codes, creating = [], []
    for number in range(100):
        device = Pkcs11Token(tmp_path / "token", LIMIT, HARDWARE)
        action = (lambda: check(device, "wrong")) if number % 2 else (lambda: device.change_pin("wrong", NEW))  # noqa: B023
        codes.append(code(action))
        if number < 2 * LIMIT:
            creating.append(code(lambda: fresh.create("wrong", common_name=UUID)))
    assert codes == ["token-wrong-pin"] * LIMIT + ["token-locked"] * (100 - LIMIT)
    assert creating == ["token-wrong-pin"] * LIMIT + ["token-locked"] * LIMIT
    assert code(lambda: check(token, PIN)) == "token-locked"
    assert code(lambda: token.change_pin(PIN, NEW)) == "token-locked"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (TokenFlag.USER_PIN_FINAL_TRY, "token-final-try"),
        (TokenFlag.USER_PIN_LOCKED, "token-hardware-locked"),
        (TokenFlag.USER_PIN_LOCKED | TokenFlag.USER_PIN_FINAL_TRY, "token-hardware-locked"),
    ],
)
def test_the_last_try_is_not_taken(
    token: Pkcs11Token, monkeypatch: pytest.MonkeyPatch, flag: TokenFlag, expected: str
) -> None:
    """SoftHSM sets neither flag; a token that does is this one with its flags changed."""
    tried = []
    find = pkcs11_token._find

    class Flagged:
        def __init__(self, real: Any) -> None:
            self._real = real
            self.flags = real.flags | flag
            self.serial = real.serial

        def open(self, **options: Any) -> Any:
            tried.append(options)
            return self._real.open(**options)

    monkeypatch.setattr(pkcs11_token, "_find", lambda *arguments: Flagged(find(*arguments)))
    assert code(lambda: check(token, PIN)) == expected
    assert code(lambda: token.change_pin(PIN, NEW)) == expected
    assert tried == []
    assert token.status().tries_left == LIMIT
    flag = TokenFlag.USER_PIN_COUNT_LOW
    check(token, PIN)


@pytest.mark.parametrize(
    ("error", "expected", "tries"),
    [
        (pkcs11.PinLocked, "token-hardware-locked", LIMIT),
        (pkcs11.UserAlreadyLoggedIn, "token-in-use", LIMIT),
        (pkcs11.DeviceRemoved, "pkcs11-failed", LIMIT - 1),
        (pkcs11.DeviceError, "pkcs11-failed", LIMIT - 1),
    ],
)
def test_what_the_hardware_answers_has_names(
    token: Pkcs11Token,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    expected: str,
    tries: int,
) -> None:
    """Where nothing was tried nothing is counted; where that is not known, it is."""
    login = pkcs11_token._login

    class Failing:
        def open(self, **_: Any) -> Any:
            raise error

    monkeypatch.setattr(pkcs11_token, "_login", lambda _, pin, write: login(Failing(), pin, write=write))
    assert code(lambda: check(token, PIN)) == expected
    assert token.status().tries_left == tries


def test_a_login_of_somebody_else_is_no_proof_of_the_pin(token: Pkcs11Token) -> None:
    """The module knows one login for the whole process."""

    session = pkcs11.lib(str(MODULE)).get_token(token_label=LABEL).open(user_pin=PIN)
    assert code(lambda: check(token, "wrong")) == "token-in-use"
    with pytest.raises(pkcs11.PKCS11Error):
        session.close()  # the module was finalised after our use, with every session of the process
    assert token.status().tries_left == LIMIT
    with token.open(PIN):
        assert code(lambda: check(token, "wrong")) == "token-in-use"
    check(token, PIN)


@pytest.mark.parametrize("pin", [PIN, "wrong"])
def test_no_session_is_left_and_nobody_is_logged_in(token: Pkcs11Token, pin: str) -> None:
    for _ in range(3):
        with nullcontext() if pin == PIN else pytest.raises(TokenRefusal):
            check(token, pin)
    library = pkcs11.lib(str(MODULE))
    try:
        with library.get_token(token_label=LABEL).open() as session:
            assert list(session.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY})) == []
    finally:
        library.finalize()
    assert not library.initialized


def test_the_hardware_is_logged_out_when_the_body_fails(token: Pkcs11Token) -> None:
    def fail() -> None:
        with token.open(PIN):
            raise RuntimeError("the body's")

    with pytest.raises(RuntimeError, match="body"):
        fail()
    test_no_session_is_left_and_nobody_is_logged_in(token, PIN)


# Other hardware, other keys.


def test_hardware_that_is_not_there(token: Pkcs11Token, slots: Path, tmp_path: Path) -> None:
    kept = tmp_path / "drawer"
    slots.rename(kept)
    slots.mkdir()
    assert code(lambda: check(token, PIN)) == "token-absent"
    plug_in("another label")
    assert code(lambda: check(token, PIN)) == "token-absent"
    plug_in(LABEL)
    assert code(lambda: check(token, PIN)) == "token-foreign"
    assert token.status().tries_left == LIMIT
    shutil.rmtree(slots)
    kept.rename(slots)
    check(token, PIN)


def test_of_two_with_one_label_the_serial_number_decides(token: Pkcs11Token, tmp_path: Path) -> None:
    blob = wrapped(token)
    plug_in(LABEL)
    assert unwrapped(token, blob) == KEY
    fresh = Pkcs11Token(tmp_path / "fresh", LIMIT, HARDWARE)
    assert code(lambda: fresh.create(PIN, common_name=UUID)) == "token-absent"


def test_keys_that_were_deleted_or_changed_are_foreign(token: Pkcs11Token) -> None:
    kept = token._load()
    other = dataclasses.replace(kept, key_id=bytes(16))
    token._store(other)
    assert code(lambda: check(token, PIN)) == "token-foreign"
    token._store(dataclasses.replace(kept, public_sha256="0" * 64))
    assert code(lambda: check(token, PIN)) == "token-foreign"
    token._store(kept)

    def delete(session: Any) -> None:
        for each in session.get_objects({Attribute.CLASS: ObjectClass.PUBLIC_KEY}):
            each.destroy()

    check(token, PIN)
    as_user(delete)
    assert code(lambda: check(token, PIN)) == "token-foreign"
    assert token.status().tries_left == LIMIT


def test_a_key_that_can_be_read_is_not_used(token: Pkcs11Token) -> None:
    """Somebody who knows the PIN puts a key of his own there, which he has a copy of."""
    kept = token._load()

    def put(session: Any) -> None:
        from pkcs11 import KeyType, Mechanism
        from pkcs11.util.ec import encode_named_curve_parameters

        curve = session.create_domain_parameters(
            KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
        )
        public, _ = curve.generate_keypair(
            store=True,
            id=bytes(16),
            mechanism=Mechanism.EC_KEY_PAIR_GEN,
            private_template={
                Attribute.EXTRACTABLE: True,
                Attribute.SENSITIVE: False,
                Attribute.DERIVE: True,
            },
        )
        points.append(pkcs11_token._sha256(pkcs11_token._point(public)))

    points: list[str] = []
    as_user(put)
    token._store(dataclasses.replace(kept, key_id=bytes(16), public_sha256=points[0]))
    assert code(lambda: check(token, PIN)) == "token-foreign"


def test_a_module_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.so", tmp_path, Path("/usr/lib/x86_64-linux-gnu/libz.so.1")):
        token = Pkcs11Token(tmp_path / "token", LIMIT, Hardware(path, LABEL))
        assert code(lambda token=token: token.create(PIN, common_name=UUID)) == "pkcs11-module-unusable"  # type: ignore[misc]
        assert token.status() == TokenStatus("none", LIMIT, LIMIT)


def test_a_base_system_without_the_library(token: Pkcs11Token, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    assert code(lambda: check(token, PIN)) == "pkcs11-library-missing"
    assert token.status() == TokenStatus("pkcs11", LIMIT, LIMIT, default_pin=False)


def test_a_damaged_file_is_refused_before_anything_is_tried(token: Pkcs11Token, tmp_path: Path) -> None:
    path = tmp_path / "token" / NAME
    good = json.loads(path.read_bytes())
    changes: list[dict[str, object]] = [
        {"kind": "trustme.tpm-token"},
        {"version": 2},
        {"serial": 1},
        {"serial": "*"},
        {"key_id": "00"},
        {"key_id": "zz" * 16},
        {"public_sha256": None},
        {"default_pin": "no"},
    ]
    for change in changes:
        path.write_text(json.dumps(good | change))
        assert code(lambda: check(token, PIN)) == "token-malformed"
        assert code(lambda: token.change_pin(PIN, NEW)) == "token-malformed"
        assert token.status().fault == "token-malformed"
    assert token.status().tries_left == LIMIT


# Secrets, files, power.


def test_row29_no_pin_and_no_key_in_anything_left_behind(
    tmp_path: Path, slots: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plug_in("canary", CANARY)
    token = Pkcs11Token(tmp_path / "token", 3, Hardware(MODULE, "canary"))
    token.create(CANARY, common_name=UUID)
    blob = wrapped(token, CANARY)
    said = []
    actions: tuple[Callable[[], object], ...] = (
        lambda: token.create(CANARY, common_name=UUID),
        lambda: unwrapped(token, blob[:-1], CANARY),
        lambda: token.change_pin(CANARY, CANARY * 100),
        *((lambda: check(token, CANARY + "\ud800x")),) * 2,
        *((lambda: check(token, CANARY + "x")),) * 2,
    )
    for action in actions:
        with pytest.raises(Refusal) as caught:
            action()
        said.append("".join(traceback.format_exception(caught.value)) + repr(caught.value.as_dict()))
    said += [repr(token.status()), repr(token), *capfd.readouterr()]
    assert CANARY not in "".join(said)
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert CANARY.encode() not in files
    assert KEY not in files


def test_row07_two_tokens_share_no_derived_bytes(token: Pkcs11Token, tmp_path: Path) -> None:
    plug_in("second")
    second = Pkcs11Token(tmp_path / "second", LIMIT, Hardware(MODULE, "second"))
    second.create(PIN, common_name=UUID)
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    secrets = set()
    for each in (token, second):
        with each.open(PIN) as opened:
            secrets.add(opened.agree(ephemeral.public_key()))
            assert opened.agree(ephemeral.public_key()) == ephemeral.exchange(ec.ECDH(), opened.public_key)
    assert len(secrets) == 2
    assert token._load().key_id != second._load().key_id


@pytest.mark.parametrize("umask", [0, 0o777])
def test_row30_files_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    token = Pkcs11Token(tmp_path / "token", LIMIT, HARDWARE)
    before = os.umask(umask)
    try:
        token.create(PIN, common_name=UUID)
    finally:
        os.umask(before)
    place = tmp_path / "token"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()}
    assert modes == {NAME: 0o600, ATTEMPTS_NAME: 0o600}


class Cut(BaseException):
    """Nothing handles it, so nothing is done after it."""


def test_row33_a_pin_change_cut_on_either_side_of_the_hardware(
    token: Pkcs11Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hardware changes its PIN in one step; what we say of it is never wrong before or after."""
    blob = wrapped(token)
    set_pin = pkcs11_token._set_pin

    def before(*_: object) -> None:
        raise Cut

    def after(*arguments: Any) -> None:
        set_pin(*arguments)
        raise Cut

    for cut, pin in ((before, PIN), (after, DEVELOPMENT_PIN)):
        monkeypatch.setattr(pkcs11_token, "_set_pin", cut)
        with pytest.raises(Cut):
            token.change_pin(PIN, DEVELOPMENT_PIN)
        assert token.status().default_pin is None
        assert unwrapped(token, blob, pin) == KEY
