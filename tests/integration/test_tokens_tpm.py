# SPDX-License-Identifier: Apache-2.0
"""The TPM token against swtpm: what it does, its own lockout, other TPMs, what it costs."""

from __future__ import annotations

import dataclasses
import json
import select
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss import (
    TPM2_CC,
    TPM2_SU,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPMS_SENSITIVE_CREATE,
)

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer
from tests.integration.tpm_token_kit import (
    CONTEXT,
    KEY,
    LIMIT,
    NAME,
    NEW,
    TRYING,
    check,
    code,
    code_or_key,
    owned_tpm,
    refused,
    unwrapped,
    wrapped,
    wrong_count,
)
from tests.unit.tokens.kit import NOW, PIN
from trustme_init.errors import DeviceRefusal, Refusal
from trustme_init.tokens import kind, tpm_token, wrapping
from trustme_init.tokens.place import TokenStatus
from trustme_init.tokens.store import DEVELOPMENT_PIN, TokenStore
from trustme_init.tokens.tpm_token import TpmToken, authorisation
from trustme_init.tpm import pin_key
from trustme_init.tpm.connection import open_tpm, salted_session
from trustme_init.tpm.ownership import MAX_TRIES, RECOVERY_TIME, authorisations, clear
from trustme_init.tpm.storage_key import ensure_storage_key, find_storage_key


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


# What it does.


def test_from_none_to_one_and_back(tpm: SoftwareTpm, place: Path) -> None:
    token = TpmToken(place, LIMIT, tpm.tcti)
    assert token.status() == TokenStatus("none", LIMIT, LIMIT)
    assert code(lambda: check(token, PIN)) == "token-missing"
    assert code(lambda: token.change_pin(PIN, NEW)) == "token-missing"
    token.remove()
    assert not place.exists()
    token.create(PIN)
    assert token.status() == TokenStatus("tpm", LIMIT, LIMIT, default_pin=False)
    assert kind.kind_in(place) == "tpm"
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert code(lambda: token.create(NEW)) == "token-already-there"
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert unwrapped(token, wrapped(token)) == KEY
    token.remove()
    assert list(place.iterdir()) == []
    assert code(lambda: check(token, PIN)) == "token-missing"


def test_it_outlives_the_tpms_restart(tmp_path: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm:
        with open_tpm(tpm.tcti) as esapi:
            ensure_storage_key(esapi)
        token = TpmToken(tmp_path / "token", LIMIT, tpm.tcti)
        token.create(PIN)
        blob = wrapped(token)
    with SoftwareTpm(tmp_path) as tpm:
        assert unwrapped(TpmToken(tmp_path / "token", LIMIT, tpm.tcti), blob) == KEY


def test_another_pin_same_key(token: TpmToken) -> None:
    blob = wrapped(token)
    token.change_pin(PIN, NEW)
    assert code(lambda: check(token, PIN)) == "token-wrong-pin"
    assert unwrapped(token, blob, NEW) == KEY
    token.change_pin(NEW, DEVELOPMENT_PIN)
    assert token.status().default_pin is True
    assert unwrapped(token, blob, DEVELOPMENT_PIN) == KEY


def test_the_old_file_takes_the_old_pin(token: TpmToken, place: Path) -> None:
    """What the module says about copies: the TPM cannot forget a blob."""
    blob = wrapped(token)
    old = (place / NAME).read_bytes()
    token.change_pin(PIN, NEW)
    (place / NAME).write_bytes(old)
    assert unwrapped(token, blob) == KEY


@pytest.mark.parametrize("value", [b"x" * 31 + b"\0", b"\0" * 31 + b"x", b"x" + bytes(31)])
def test_zeros_in_the_authorisation_make_no_difference(
    token: TpmToken, monkeypatch: pytest.MonkeyPatch, value: bytes
) -> None:
    """A TPM drops zeros at the end of an authorisation value, and the library must do the same."""
    blob = wrapped(token)
    monkeypatch.setattr(
        tpm_token, "authorisation", lambda pin, salt: value if pin == NEW else authorisation(pin, salt)
    )
    token.change_pin(PIN, NEW)
    assert unwrapped(token, blob, NEW) == KEY
    token.change_pin(NEW, PIN)
    assert unwrapped(token, blob) == KEY


def test_a_shared_secret_that_begins_with_zeros_is_whole(token: TpmToken) -> None:
    """One x coordinate in 256 is shorter than 32 bytes, and a TPM may leave the zeros out."""
    with token.open(PIN) as opened:
        for number in range(2**12):
            private = ec.derive_private_key(number + 1, ec.SECP256R1())
            shared = private.exchange(ec.ECDH(), opened.public_key)
            if shared[0] == 0:
                assert opened.agree(private.public_key()) == shared
                return
    pytest.fail("no such point")


def test_from_softtoken_to_tpm_and_back(token: TpmToken, tmp_path: Path, few_rounds: None) -> None:
    soft = TokenStore(tmp_path / "soft", LIMIT)
    soft.create(NEW, common_name="device", now=NOW)
    with soft.open(NEW) as first, token.open(PIN) as second:
        begun = wrapping.wrap(first.public_key, KEY, context=CONTEXT)
        moved = kind.rewrap(begun, first, second, context=CONTEXT)
        back = kind.rewrap(moved, second, first, context=CONTEXT)
        assert wrapping.unwrap(first, back, context=CONTEXT) == KEY
        assert code(lambda: kind.rewrap(moved, second, first, context=b"x")) == "wrapped-key-damaged"
        assert code(lambda: kind.rewrap(begun, second, first, context=CONTEXT)) == "wrapped-key-damaged"
    assert unwrapped(token, moved) == KEY


# Wrong PINs.


def test_a_wrong_pin_is_counted_here_and_in_the_tpm(token: TpmToken, tpm: SoftwareTpm) -> None:
    blob = wrapped(token)
    for number in (1, 2):
        refusal = refused(lambda: unwrapped(token, blob, "wrong"))
        assert (refusal.code, refusal.evidence) == (
            "token-wrong-pin",
            f"{LIMIT - number} of {LIMIT} tries left",
        )
        assert wrong_count(tpm.tcti) == number
    assert token.status().tries_left == LIMIT - 2
    assert unwrapped(token, blob) == KEY
    assert token.status().tries_left == LIMIT
    assert wrong_count(tpm.tcti) == 2, "the TPM forgets with time only"


def test_a_damaged_key_costs_no_try(token: TpmToken, tpm: SoftwareTpm) -> None:
    blob = wrapped(token)
    for damaged in (b"", blob[:20], blob[:-1] + bytes([blob[-1] ^ 1]), blob[:8] + bytes(65) + blob[73:]):
        assert code(lambda damaged=damaged: unwrapped(token, damaged)) == "wrapped-key-damaged"  # type: ignore[misc]
        assert token.status().tries_left == LIMIT
    assert wrong_count(tpm.tcti) == 0


class Cut(BaseException):
    """Nothing handles it, so nothing is done after it."""


def test_row21_one_counter_for_all_paths(
    token: TpmToken, tpm: SoftwareTpm, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred wrong PINs on every path, the device cut off after each and also in between."""
    codes = []

    def cut_off(*_: object) -> None:
        raise Cut

    with Interposer(tpm, tmp_path) as bus:
        for number in range(100):
            device = TpmToken(place, LIMIT, bus.tcti)
            with monkeypatch.context() as patch:
                if number % 4 == 1:
                    patch.setattr(pin_key.PinKey, "change_auth", cut_off)
                try:
                    if number % 2:
                        check(device, "wrong")
                    else:
                        device.change_pin("wrong", NEW)
                except Refusal as refusal:
                    codes.append(refusal.code)
                except Cut:
                    codes.append("cut")
        tries = sum(code in TRYING for code in bus.codes)
    retried = 1  # the TPM notes the first use of such a key after its start, and asks for the command again
    assert codes.count("token-wrong-pin") + codes.count("cut") == LIMIT
    assert codes[LIMIT:] == ["token-locked"] * (100 - LIMIT)
    assert tries <= codes.count("token-wrong-pin") + retried
    assert wrong_count(tpm.tcti) == codes.count("token-wrong-pin")
    assert code(lambda: check(token, PIN)) == "token-locked"
    assert code(lambda: token.change_pin(PIN, NEW)) == "token-locked"
    assert token.status().fault == "token-locked"


def test_row21_past_our_count_the_tpm_counts(tpm: SoftwareTpm, token: TpmToken, tmp_path: Path) -> None:
    """Who copies the token, and resets our count each time, has the TPM's tries and no more."""
    blob = wrapped(token)
    codes = []
    for number in range(100):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "token", copy)
        thief = TpmToken(copy, LIMIT, tpm.tcti)
        codes.append(code(lambda thief=thief, number=number: check(thief, f"{number:04}")))  # type: ignore[misc]
    assert codes == ["token-wrong-pin"] * MAX_TRIES + ["token-tpm-lockout"] * (100 - MAX_TRIES)
    # The owner has to wait, too, and is told for how long; it costs no try.
    refusal = refused(lambda: unwrapped(token, blob))
    assert refusal.code == "token-tpm-lockout"
    assert f"{MAX_TRIES} wrong authorisations of {MAX_TRIES}" in refusal.evidence
    assert f"every {RECOVERY_TIME} s" in refusal.evidence
    assert code(lambda: token.change_pin(PIN, NEW)) == "token-tpm-lockout"
    assert token.status().tries_left == LIMIT
    # Keys without a PIN do not take part: the device goes on.
    with open_tpm(tpm.tcti) as esapi, salted_session(esapi, find_storage_key(esapi)):
        pass


def test_row21_a_restart_does_not_end_the_tpms_lockout_and_time_does(tmp_path: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm:
        with open_tpm(tpm.tcti) as esapi:
            ensure_storage_key(esapi)
            with salted_session(esapi, find_storage_key(esapi)) as session:
                esapi.dictionary_attack_parameters(3, 1000, 0, session1=session)
        token = TpmToken(tmp_path / "token", LIMIT, tpm.tcti)
        token.create(PIN)
        blob = wrapped(token)
        codes = [code(lambda: check(token, "wrong")) for _ in range(4)]
        assert codes == ["token-wrong-pin"] * 3 + ["token-tpm-lockout"]
    with SoftwareTpm(tmp_path) as tpm:
        assert code(lambda: unwrapped(token, blob)) == "token-tpm-lockout"
        with open_tpm(tpm.tcti) as esapi, salted_session(esapi, find_storage_key(esapi)) as session:
            esapi.dictionary_attack_parameters(3, 1, 0, session1=session)
        for _ in range(600):
            if code_or_key(token, blob) != "token-tpm-lockout":
                break
            select.select([], [], [], 0.1)
        assert unwrapped(token, blob) == KEY


def test_a_power_cut_after_use_counts_in_the_tpm(tmp_path: Path) -> None:
    """What the module says about the TPM's count; an orderly end, as the kernel makes one, costs nothing."""
    with SoftwareTpm(tmp_path) as tpm:
        with open_tpm(tpm.tcti) as esapi:
            ensure_storage_key(esapi)
        token = TpmToken(tmp_path / "token", LIMIT, tpm.tcti)
        token.create(PIN)
        check(token, PIN)
        with open_tpm(tpm.tcti) as esapi:
            esapi.shutdown(TPM2_SU.CLEAR)
    with SoftwareTpm(tmp_path) as tpm:
        assert wrong_count(tpm.tcti) == 0
        check(token, PIN)
    with SoftwareTpm(tmp_path) as tpm:
        assert wrong_count(tpm.tcti) == 1


# Other TPMs, other keys.


def test_another_tpm_does_not_open_it(token: TpmToken, place: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with SoftwareTpm(tmp_path / "other") as other:
        stranger = TpmToken(place, LIMIT, other.tcti)
        assert code(lambda: check(stranger, PIN)) == "storage-key-missing"
        with open_tpm(other.tcti) as esapi:
            ensure_storage_key(esapi)
        assert code(lambda: check(stranger, PIN)) == "token-foreign"
        assert code(lambda: stranger.change_pin(PIN, NEW)) == "token-foreign"
        assert wrong_count(other.tcti) == 0
    assert token.status().tries_left == LIMIT
    check(token, PIN)


def test_a_cleared_tpm_does_not_open_it(token: TpmToken, tpm: SoftwareTpm, tmp_path: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        clear(esapi, authorisations(esapi, tmp_path / "owner").lockout)
        ensure_storage_key(esapi)
    assert code(lambda: check(token, PIN)) == "token-foreign"
    assert token.status().tries_left == LIMIT


def test_no_tpm_is_no_wrong_pin(token: TpmToken, place: Path) -> None:
    gone = TpmToken(place, LIMIT, "swtpm:path=/nobody/here")
    assert code(lambda: check(gone, PIN)) == "tpm-failed"
    assert token.status().tries_left == LIMIT


def uncounted(public: TPM2B_PUBLIC) -> None:
    public.publicArea.objectAttributes |= TPMA_OBJECT.NODA


def movable(public: TPM2B_PUBLIC) -> None:
    public.publicArea.objectAttributes &= ~(TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT)


def signing(public: TPM2B_PUBLIC) -> None:
    public.publicArea.objectAttributes |= TPMA_OBJECT.SIGN_ENCRYPT
    public.publicArea.parameters.eccDetail.scheme.scheme = 0x10


def with_policy(public: TPM2B_PUBLIC) -> None:
    public.publicArea.authPolicy = bytes(32)


@pytest.mark.parametrize("change", [uncounted, movable, signing, with_policy])
def test_a_key_with_other_attributes_is_not_ours(
    token: TpmToken, tpm: SoftwareTpm, place: Path, tmp_path: Path, change: Callable[[TPM2B_PUBLIC], None]
) -> None:
    """The TPM made it, and whoever made it knows the PIN: it would still be opened by nobody."""
    document = json.loads((place / NAME).read_bytes())
    kept = tpm_token._decode((place / NAME).read_bytes())
    template = pin_key._template()
    change(template)
    sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=authorisation(PIN, kept.salt)))
    with open_tpm(tpm.tcti) as esapi:
        srk = find_storage_key(esapi)
        with salted_session(esapi, srk) as session:
            private, public, *_ = esapi.create(srk, sensitive, template, session1=session)
    made = dataclasses.replace(kept, public=public.marshal(), private=private.marshal())
    token._store(made)
    assert json.loads((place / NAME).read_bytes())["salt"] == document["salt"]
    with Interposer(tpm, tmp_path) as bus:
        assert code(lambda: check(TpmToken(place, LIMIT, bus.tcti), PIN)) == "token-foreign"
        assert TPM2_CC.Load not in bus.codes
    assert token.status().tries_left == LIMIT


def test_halves_of_two_keys_are_not_one(token: TpmToken, tmp_path: Path, tpm: SoftwareTpm) -> None:
    """Else a container's key would be wrapped for who has the other private half."""
    other = TpmToken(tmp_path / "other", LIMIT, tpm.tcti)
    other.create(PIN)
    mine, theirs = token._load(), other._load()
    token._store(dataclasses.replace(mine, public=theirs.public))
    assert code(lambda: check(token, PIN)) == "token-foreign"
    token._store(dataclasses.replace(mine, private=theirs.private))
    assert code(lambda: check(token, PIN)) == "token-foreign"
    assert token.status().tries_left == LIMIT
    token._store(dataclasses.replace(mine, private=mine.private + b"\0"))
    assert code(lambda: check(token, PIN)) == "token-foreign"
    token._store(dataclasses.replace(mine, public=b"\0"))
    assert code(lambda: check(token, PIN)) == "token-foreign"
    token._store(mine)
    check(token, PIN)


# What it costs.


def test_the_tpm_commands_of_each_operation(tpm: SoftwareTpm, place: Path, tmp_path: Path) -> None:
    """A chip takes 10 ms to 250 ms for each: these numbers are in docs/containers.md."""
    counts = {}
    with Interposer(tpm, tmp_path) as bus:
        token = TpmToken(place, LIMIT, bus.tcti)
        work: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("create", lambda: token.create(PIN)),
            ("first use after a start", lambda: check(token, PIN)),
            ("status", token.status),
            ("open", lambda: check(token, PIN)),
            ("open and unwrap", lambda: unwrapped(token, blob)),
            ("change_pin", lambda: token.change_pin(PIN, NEW)),
            ("remove", token.remove),
        )
        blob = b""
        for name, action in work:
            bus.forget()
            action()
            counts[name] = len(bus.commands)
            if name == "open":
                blob = wrapped(token)
    assert counts == {
        "create": 5,
        "first use after a start": 8,
        "status": 0,
        "open": 7,
        "open and unwrap": 8,
        "change_pin": 7,
        "remove": 0,
    }


def test_a_device_refusal_is_not_a_wrong_pin(token: TpmToken, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is lost after the PIN was sent costs the try; what fails before does not."""

    def broken(*_: object) -> None:
        raise DeviceRefusal("tpm-failed", "no", evidence="no", remedy="no")

    with monkeypatch.context() as patch:
        patch.setattr(pin_key, "find_storage_key", broken)
        assert code(lambda: check(token, PIN)) == "tpm-failed"
    assert token.status().tries_left == LIMIT
