# SPDX-License-Identifier: Apache-2.0
"""Somebody on the bus between us and a TPM token, and what that, or anything else, shows of a secret."""

from __future__ import annotations

import os
import random
import stat
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tpm2_pytss import (
    TPM2_CC,
)

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer, code_of
from tests.integration.tpm_token_kit import (
    CONTEXT,
    FUZZ_ROUNDS,
    KEY,
    LIMIT,
    NAME,
    NEW,
    TRYING,
    check,
    code,
    flush,
    no_lockout,
    owned_tpm,
    refused,
    unwrapped,
    wrapped,
)
from tests.unit.tokens.kit import CANARY, PIN
from trustme_init.errors import Refusal, TokenRefusal
from trustme_init.tokens import wrapping
from trustme_init.tokens.attempts import Attempts
from trustme_init.tokens.place import ATTEMPTS_NAME
from trustme_init.tokens.tpm_token import TpmToken, authorisation
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.storage_key import HANDLE, ensure_storage_key

PASSWORD_SESSION = (0x40000009).to_bytes(4, "big")


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with owned_tpm(tmp_path) as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "token"


@pytest.fixture
def token(tpm: SoftwareTpm, place: Path) -> TpmToken:
    made = TpmToken(place, LIMIT, tpm.tcti)
    made.create(PIN)
    return made


# The bus.


def test_row18_nothing_that_opens_anything_is_on_the_bus(
    tpm: SoftwareTpm, place: Path, tmp_path: Path
) -> None:
    with Interposer(tpm, tmp_path) as bus:
        token = TpmToken(place, LIMIT, bus.tcti)
        token.create(PIN)
        blob = wrapped(token)
        old = authorisation(PIN, token._load().salt)
        token.change_pin(PIN, NEW)
        new = authorisation(NEW, token._load().salt)
        ephemeral = ec.generate_private_key(ec.SECP256R1())
        with token.open(NEW) as opened:
            shared = opened.agree(ephemeral.public_key())
            assert shared == ephemeral.exchange(ec.ECDH(), opened.public_key)
            assert wrapping.unwrap(opened, blob, context=CONTEXT) == KEY
        assert code(lambda: check(token, "wrong")) == "token-wrong-pin"
        wrong = authorisation("wrong", token._load().salt)
        traffic = b"|".join(bus.commands + bus.replies)
        for secret in (old, new, wrong, shared, KEY, PIN.encode(), NEW.encode(), b"wrong"):
            assert secret not in traffic
        for command in bus.commands:
            # The storage key has no authorisation value that could be shown.
            assert (PASSWORD_SESSION in command) == (code_of(command) == TPM2_CC.Load)
            if code_of(command) == TPM2_CC.StartAuthSession:
                assert command[10:14] == HANDLE.to_bytes(4, "big"), "not salted to the storage key"
        assert bus.codes.count(TPM2_CC.StartAuthSession) == 5
        assert set(TRYING) <= {*bus.codes}


@pytest.mark.parametrize("command", TRYING)
def test_row18_a_reply_that_was_changed_is_no_reply(
    token: TpmToken, tpm: SoftwareTpm, place: Path, tmp_path: Path, command: int
) -> None:
    """A flipped bit anywhere behind the header is found, and the lost try is the price."""
    blob = wrapped(token)
    flipped = random.Random(18)  # noqa: S311 - to be repeatable
    for _ in range(12):
        with Interposer(tpm, tmp_path) as bus:

            def flip(reply: bytes, bus: Interposer = bus) -> bytes:
                if code_of(bus.commands[-1]) != command or len(reply) == 10:
                    return reply
                data = bytearray(reply)
                data[flipped.randrange(14, len(reply))] ^= 1 << flipped.randrange(8)
                return bytes(data)

            bus.on_reply = flip
            device = TpmToken(place, LIMIT, bus.tcti)
            refusal = refused(lambda device=device: unwrapped(device, blob))  # type: ignore[misc]
            assert refusal.code == "tpm-failed"
            assert bus.codes.count(command) == 1, "tried again"
        flush(tpm)
        left = LIMIT - 1 if command == TPM2_CC.ObjectChangeAuth else LIMIT
        assert token.status().tries_left == left
        assert unwrapped(token, blob) == KEY


def test_row18_without_a_session_no_pin_is_tried(
    token: TpmToken, tpm: SoftwareTpm, place: Path, tmp_path: Path
) -> None:
    refusal = b"\x80\x01" + (10).to_bytes(4, "big") + (0x3D6).to_bytes(4, "big")
    with Interposer(tpm, tmp_path) as bus:
        bus.on_reply = lambda reply: (
            refusal if code_of(bus.commands[-1]) == TPM2_CC.StartAuthSession else reply
        )
        device = TpmToken(place, LIMIT, bus.tcti)
        fresh = TpmToken(tmp_path / "fresh", LIMIT, bus.tcti)
        for action in (
            lambda: check(device, PIN),
            lambda: device.change_pin(PIN, NEW),
            lambda: fresh.create(PIN),
        ):
            bus.forget()
            assert code(action) == "tpm-failed"
            assert {*TRYING, TPM2_CC.Create}.isdisjoint(bus.codes)
            assert bus.codes.count(TPM2_CC.StartAuthSession) == 1
    assert token.status().tries_left == LIMIT
    assert fresh.status().kind == "none"


def test_row21_a_lost_reply_costs_the_try(
    token: TpmToken, tpm: SoftwareTpm, place: Path, tmp_path: Path
) -> None:
    """Else whoever sits on the bus, and at the control interface, would have tries that nobody counts."""
    with Interposer(tpm, tmp_path) as bus:
        bus.on_reply = lambda reply: None if code_of(bus.commands[-1]) in TRYING else reply
        device = TpmToken(place, LIMIT, bus.tcti)
        for number in range(3):
            assert code(lambda: check(device, "wrong")) == "tpm-failed"
            assert token.status().tries_left == LIMIT - 1 - number
            flush(tpm)


def test_row19_malformed_replies_are_refused(
    token: TpmToken, tpm: SoftwareTpm, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = wrapped(token)
    # What is counted is not the subject, and would end the test early.
    monkeypatch.setattr(Attempts, "_store", lambda *_: None)
    chance = random.Random(19)  # noqa: S311 - to be repeatable
    codes = set()
    good = (place / NAME).read_bytes()
    with Interposer(tpm, tmp_path) as bus:
        device = TpmToken(place, LIMIT, bus.tcti)
        for number in range(FUZZ_ROUNDS):
            victim = chance.randrange(8)
            bus.forget()
            bus.on_reply = lambda reply, victim=victim: (  # type: ignore[misc]
                mangled(reply, chance) if len(bus.replies) == victim + 1 else reply
            )
            try:
                if number % 2:
                    assert unwrapped(device, blob) == KEY
                else:
                    device.change_pin(PIN, PIN)
            except Refusal as refusal:
                codes.add(refusal.code)
            if number % 20 == 0:
                flush(tpm)
                no_lockout(tpm, tmp_path / "owner")
        flush(tpm)
    assert "tpm-failed" in codes
    # Who changes the TPM's nonce makes our HMAC wrong, which the TPM counts: the bus can lock, and not open.
    assert codes <= {"tpm-failed", "token-foreign", "storage-key-foreign", "token-wrong-pin"}
    (place / NAME).write_bytes(good)
    assert unwrapped(token, blob) == KEY


def mangled(reply: bytes, chance: random.Random) -> bytes:
    """A reply as no TPM gives it; header codes stay, for the TPM's errors have tests of their own."""
    data = bytearray(reply)
    place = chance.randrange(len(data))
    match chance.randrange(5):
        case 0:
            return chance.randbytes(chance.randrange(64))
        case 1:
            return reply[:place]
        case 2:
            data[max(10, place) % len(data)] ^= 1 << chance.randrange(8)
        case 3:
            data[2:6] = chance.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
        case _:
            data += bytes(chance.randrange(1, 5000))
            data[2:6] = len(data).to_bytes(4, "big")
    return bytes(data)


# Secrets and files.


def test_row29_no_pin_and_no_key_in_anything_left_behind(
    tpm: SoftwareTpm, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = []
    with Interposer(tpm, tmp_path) as bus:
        token = TpmToken(place, 5, bus.tcti)
        token.create(CANARY)
        blob = wrapped(token, CANARY)
        (place / "key.wrapped").write_bytes(blob)
        for action in (
            lambda: check(token, CANARY + "x"),
            lambda: token.change_pin(CANARY + "x", CANARY),
            lambda: token.create(CANARY),
            lambda: unwrapped(token, blob[:-1], CANARY),
            *(lambda: check(token, CANARY + "x"),) * 4,
        ):
            with pytest.raises(TokenRefusal) as caught:
                action()
            said.append("".join(traceback.format_exception(caught.value)) + repr(caught.value.as_dict()))
        value = authorisation(CANARY, token._load().salt)
        said += [
            repr(token.status()),
            repr(token),
            *(map(repr, bus.commands + bus.replies)),
            *capfd.readouterr(),
        ]
        said += [command.hex() for command in bus.commands + bus.replies]
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (CANARY.encode(), value, KEY):
        assert secret not in files
        assert secret.hex() not in "".join(said)
        assert repr(secret)[2:-1] not in "".join(said)


def test_row07_two_devices_share_no_derived_bytes(tmp_path: Path) -> None:
    """The same PIN on two devices, and twice on one."""
    seen: list[bytes] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with SoftwareTpm(tmp_path / name) as tpm:
            with open_tpm(tpm.tcti) as esapi:
                ensure_storage_key(esapi)
            for number in range(2):
                token = TpmToken(tmp_path / name / f"token{number}", LIMIT, tpm.tcti)
                token.create(PIN)
                kept = token._load()
                with token.open(PIN) as opened:
                    point = opened.public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
                seen += [
                    kept.salt,
                    authorisation(PIN, kept.salt),
                    point[1:],
                    kept.private[2:],
                    wrapped(token)[8:],
                ]
                token.change_pin(PIN, NEW)
                token.change_pin(NEW, PIN)
                kept = token._load()
                seen += [kept.salt, authorisation(PIN, kept.salt)]
    windows = [{each[start : start + 8] for start in range(len(each) - 7)} for each in seen]
    # The head of a private blob has the length of its integrity value.
    common = {b"\x00\x20"}
    for number, one in enumerate(windows):
        for other in windows[number + 1 :]:
            assert not one & other - common


@pytest.mark.parametrize("umask", [0, 0o777])
def test_row30_files_are_private_whatever_the_umask(tpm: SoftwareTpm, place: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        token = TpmToken(place, LIMIT, tpm.tcti)
        token.create(PIN)
        token.change_pin(PIN, NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()}
    assert modes == {NAME: 0o600, ATTEMPTS_NAME: 0o600}
