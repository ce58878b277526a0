# SPDX-License-Identifier: Apache-2.0
"""Taking ownership of swtpm: what may not be lost, and what may not be believed."""

from __future__ import annotations

import base64
import errno
import itertools
import json
import os
import shutil
import stat
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CC,
    TPM2_PT,
    TPM2_SE,
    TPM2B_AUTH,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPMT_SYM_DEF,
    TSS2_Exception,
)
from tpm2_pytss._libtpm2_pytss import lib

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer
from tests.integration.tpm_power import Bench
from trustme_init.errors import DeviceRefusal, StorageRefusal
from trustme_init.tpm import ownership
from trustme_init.tpm.connection import authorised, hmac_session, open_tpm
from trustme_init.tpm.marker_form import INDEX, MarkerState
from trustme_init.tpm.nv_marker import define_marker
from trustme_init.tpm.ownership import (
    FILE_NAME,
    LOCKOUT_RECOVERY,
    MAX_TRIES,
    RECOVERY_TIME,
    Authorisations,
    authorisations,
    clear,
    take_ownership,
)
from trustme_init.tpm.properties import permanent
from trustme_init.tpm.sealing import seal
from trustme_init.tpm.storage_key import ensure_storage_key

CANARY = Authorisations(
    owner=b"CANARY-OWNER-AUTHORISATION-VALUE", lockout=b"CANARY-LOCKOUT-AUTHORISATION-VAL"
)


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path) as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    return directory


def refused(code: str, call: Callable[[], object]) -> DeviceRefusal:
    with pytest.raises(DeviceRefusal) as caught:
        call()
    assert caught.value.code == code
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value


def set_auth(esapi: Any, hierarchy: ESYS_TR, auth: bytes) -> None:
    esapi.hierarchy_change_auth(hierarchy, TPM2B_AUTH(auth))
    esapi.tr_set_auth(hierarchy, b"")


def works(esapi: Any, ours: Authorisations) -> None:
    """The TPM takes both values; the lockout's proof is left to TPM2_Clear."""
    assert permanent(esapi).owner_auth_set
    assert permanent(esapi).lockout_auth_set
    assert define_marker(esapi, ours.owner).state is MarkerState.OPEN
    clear(esapi, ours.lockout)
    assert not permanent(esapi).owner_auth_set


def test_ownership_survives_a_reset(tmp_path: Path, data: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, data)
        assert take_ownership(esapi, data) == ours
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        assert authorisations(esapi, data) == ours
        assert take_ownership(esapi, data) == ours
        works(esapi, ours)


def test_both_authorisations_are_needed_afterwards(tpm: SoftwareTpm, data: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, data)
        refused("tpm-auth-refused", lambda: define_marker(esapi, b""))
        refused("tpm-auth-refused", lambda: define_marker(esapi, ours.lockout))
        refused("tpm-auth-refused", lambda: clear(esapi, ours.owner))


def test_dictionary_attack_parameters_are_set(tpm: SoftwareTpm, data: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
        _, answer = esapi.get_capability(6, TPM2_PT.MAX_AUTH_FAIL, 3)
        found = [int(each.value) for each in answer.data.tpmProperties]
    assert found == [MAX_TRIES, RECOVERY_TIME, LOCKOUT_RECOVERY]


@pytest.mark.parametrize("umask", [0, 0o777])
def test_row30_the_file_is_private_whatever_the_umask(tpm: SoftwareTpm, data: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with open_tpm(tpm.tcti) as esapi:
            take_ownership(esapi, data)
    finally:
        os.umask(before)
    assert stat.S_IMODE((data / FILE_NAME).stat().st_mode) == 0o600


def test_row07_two_devices_share_no_authorisation(tmp_path: Path) -> None:
    drawn: set[bytes] = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with SoftwareTpm(tmp_path / name) as tpm, open_tpm(tpm.tcti) as esapi:
            ours = take_ownership(esapi, tmp_path / name)
        drawn |= {ours.owner, ours.lockout}
    assert len(drawn) == 4
    assert {len(value) for value in drawn} == {32}


def test_what_does_not_come_back_is_not_set(
    tpm: SoftwareTpm, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "seal", lambda esapi, srk, secret: seal(esapi, srk, secret[::-1]))
    with open_tpm(tpm.tcti) as esapi:
        refused("tpm-authorisation-lost", lambda: take_ownership(esapi, data))
        assert not permanent(esapi).owner_auth_set


def test_row29_the_library_forgets_the_values(tpm: SoftwareTpm, data: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, data)
        define_marker(esapi, ours.owner)
        with pytest.raises(TSS2_Exception, match="authorization"):
            esapi.nv_undefine_space(esapi.tr_from_tpmpublic(INDEX))
        with pytest.raises(TSS2_Exception, match="authorization"):
            esapi.dictionary_attack_lock_reset()


# Power cuts.


def finish(esapi: Any, directory: Path) -> None:
    works(esapi, take_ownership(esapi, directory))


def test_row33_a_cut_at_any_instant_is_finished_by_the_next_call(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.prepare(lambda esapi, directory: None)
    cuts = 0
    for cut in bench.every_cut(take_ownership):
        try:
            bench.restart(finish)
        except DeviceRefusal as exc:
            raise AssertionError(f"cut at instant {cut}: {exc}") from exc
        cuts += 1
    assert cuts > 2 * 30  # commands alone


def test_the_bench_finds_a_file_that_is_written_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the save after TPM2_HierarchyChangeAuth there are instants that lose the TPM."""
    prepare = ownership._prepare

    def late(esapi: Any, directory: Path) -> None:
        aside = directory / "aside"
        aside.mkdir(exist_ok=True)
        monkeypatch.setattr(ownership, "_prepare", lambda esapi, _: prepare(esapi, aside))
        take_ownership(esapi, directory)
        shutil.move(aside / FILE_NAME, directory / FILE_NAME)

    bench = Bench(tmp_path)
    bench.prepare(lambda esapi, directory: None)
    codes: set[str] = set()
    for _ in bench.every_cut(late):
        monkeypatch.setattr(ownership, "_prepare", prepare)
        try:
            bench.restart(take_ownership)
        except DeviceRefusal as exc:
            codes.add(exc.code)
    assert codes == {"tpm-owned-by-another"}


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
def test_a_full_disk_leaves_the_tpm_alone(
    tpm: SoftwareTpm, data: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def with_full_disk(esapi: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, full)
            take_ownership(esapi, data)

    with open_tpm(tpm.tcti) as esapi:
        with pytest.raises(StorageRefusal) as caught:
            with_full_disk(esapi)
        assert caught.value.code == "authorisations-unwritable"
        assert not permanent(esapi).owner_auth_set
        assert not permanent(esapi).lockout_auth_set
        finish(esapi, data)


# Who was there before.


@pytest.mark.parametrize("hierarchy", ["OWNER", "LOCKOUT", "ENDORSEMENT"])
def test_a_tpm_that_somebody_owns_is_refused(tpm: SoftwareTpm, data: Path, hierarchy: str) -> None:
    with open_tpm(tpm.tcti) as esapi:
        ensure_storage_key(esapi)
        set_auth(esapi, getattr(ESYS_TR, hierarchy), b"somebody's")
        refused("tpm-owned-by-another", lambda: take_ownership(esapi, data))
    assert not list(data.iterdir())


@pytest.mark.parametrize("hierarchy", ["OWNER", "LOCKOUT"])
def test_an_authorisation_set_beside_our_file_is_not_ours(
    tpm: SoftwareTpm, data: Path, monkeypatch: pytest.MonkeyPatch, hierarchy: str
) -> None:
    """A power cut left our file; before the next call somebody set an authorisation."""
    with open_tpm(tpm.tcti) as esapi:
        ours = ownership._prepare(esapi, data)
        if hierarchy == "OWNER":
            set_auth(esapi, ESYS_TR.OWNER, b"somebody's")
        else:
            set_auth(esapi, ESYS_TR.OWNER, ours.owner)
            set_auth(esapi, ESYS_TR.LOCKOUT, b"somebody's")
        refused("tpm-owned-by-another", lambda: take_ownership(esapi, data))


def test_row31_a_file_found_beside_a_tpm_without_owner_is_not_believed(tpm: SoftwareTpm, data: Path) -> None:
    """Otherwise who prepares a disk would know the owner's authorisation, and could remove the marker."""
    with open_tpm(tpm.tcti) as esapi:
        srk = ensure_storage_key(esapi)
        planted = seal(esapi, srk, CANARY.owner + CANARY.lockout)
        ownership._prepare(esapi, data)
        document = json.loads((data / FILE_NAME).read_bytes())
        for name in ("public", "private"):
            document[name] = base64.b64encode(getattr(planted, name)).decode()
        (data / FILE_NAME).write_text(json.dumps(document))
        assert authorisations(esapi, data) == CANARY
        ours = take_ownership(esapi, data)
        assert ours.owner != CANARY.owner
        assert ours.lockout != CANARY.lockout
        works(esapi, ours)


def test_a_lie_about_the_owner_does_not_replace_the_file(
    tpm: SoftwareTpm, data: Path, tmp_path: Path
) -> None:
    """TPM2_GetCapability is not protected; what follows from it must be."""
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
    before = (data / FILE_NAME).read_bytes()
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        permanent(esapi)
        truth = bus.replies[-1]
        bus.on_reply = lambda reply: reply[:-4] + bytes(4) if reply == truth else reply
        refused("tpm-owned-by-another", lambda: take_ownership(esapi, data))
    assert (data / FILE_NAME).read_bytes() == before


def test_an_answer_to_another_question_is_refused(tpm: SoftwareTpm, data: Path, tmp_path: Path) -> None:
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        permanent(esapi)
        truth = bus.replies[-1]
        other = truth[:-5] + b"\x01" + truth[-4:]
        bus.on_reply = lambda reply: other if reply == truth else reply
        refused("tpm-failed", lambda: take_ownership(esapi, data))


@pytest.mark.parametrize("hierarchy", ["OWNER", "LOCKOUT"])
def test_row31_a_policy_left_by_somebody_is_taken_away(tpm: SoftwareTpm, data: Path, hierarchy: str) -> None:
    """A hierarchy's policy is a second key, which a new authorisation value does not change."""
    handle = getattr(ESYS_TR, hierarchy)

    def by_policy(esapi: Any) -> None:
        session = esapi.start_auth_session(
            ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL), TPM2_ALG.SHA256
        )
        try:
            esapi.policy_command_code(session, TPM2_CC.HierarchyChangeAuth)
            esapi.hierarchy_change_auth(handle, TPM2B_AUTH(b""), session1=session)
        finally:
            esapi.flush_context(session)

    with open_tpm(tpm.tcti) as esapi:
        session = esapi.start_auth_session(
            ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.TRIAL, TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL), TPM2_ALG.SHA256
        )
        esapi.policy_command_code(session, TPM2_CC.HierarchyChangeAuth)
        digest = esapi.policy_get_digest(session)
        esapi.flush_context(session)
        code = lib.Esys_SetPrimaryPolicy(
            esapi._ctx,
            handle,
            ESYS_TR.PASSWORD,
            ESYS_TR.NONE,
            ESYS_TR.NONE,
            digest._cdata,
            TPM2_ALG.SHA256,
        )
        assert code == 0
        by_policy(esapi)  # the planted key fits
        ours = take_ownership(esapi, data)
        with pytest.raises(TSS2_Exception):
            by_policy(esapi)
        works(esapi, ours)


# What cannot be unsealed.


def damage(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((data / FILE_NAME).read_bytes())
    change(document)
    (data / FILE_NAME).write_text(json.dumps(document))


def other_blob(document: dict[str, Any]) -> None:
    blob = bytearray(base64.b64decode(document["private"]))
    blob[-1] ^= 1
    document["private"] = base64.b64encode(blob).decode()


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(kind="other"),
        lambda document: document.update(version=2),
        lambda document: document.update(bank="sha1"),
        lambda document: document.update(bank="nonsense"),
        lambda document: document.update(filler=" " * 20_000),
        lambda document: document.update(storage_key="00"),
        lambda document: document.update(storage_key=5),
        lambda document: document.update(public="AAAA"),
        lambda document: document.update(public="not base64!"),
        lambda document: document.update(private=None),
        lambda document: document.pop("private"),
        other_blob,
    ],
)
def test_a_damaged_file_is_named(
    tpm: SoftwareTpm, data: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
        damage(data, change)
        refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))
        refused("tpm-authorisation-lost", lambda: take_ownership(esapi, data))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 10_000, b" " * 20_000])
def test_a_file_that_is_none_is_named(tpm: SoftwareTpm, data: Path, content: bytes) -> None:
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
        (data / FILE_NAME).write_bytes(content)
        refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))


def test_a_missing_file_is_named(tpm: SoftwareTpm, data: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
        (data / FILE_NAME).unlink()
        refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))
        refused("tpm-owned-by-another", lambda: take_ownership(esapi, data))


def test_row05_another_secure_boot_state_unseals_nothing(tpm: SoftwareTpm, data: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
        esapi.pcr_event(ESYS_TR.PCR7, b"another db")
        lost = refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))
        assert "PCR 7 (sha512)" in lost.evidence
        refused("tpm-authorisation-lost", lambda: take_ownership(esapi, data))


def test_another_tpm_unseals_nothing(tpm: SoftwareTpm, data: Path, tmp_path: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
    (tmp_path / "other").mkdir()
    with SoftwareTpm(tmp_path / "other") as second, open_tpm(second.tcti) as esapi:
        refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))
        ensure_storage_key(esapi)
        refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))
        name = bytes(esapi.tr_get_name(ensure_storage_key(esapi))).hex()
        damage(data, lambda document: document.update(storage_key=name))
        lost = refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))
        assert "integrity check failed" in lost.evidence


@pytest.mark.parametrize("size", [1, 32, 63, 65])
def test_a_sealed_secret_of_another_size_is_not_ours(tpm: SoftwareTpm, data: Path, size: int) -> None:
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
        planted = seal(esapi, ensure_storage_key(esapi), bytes(size))
        damage(
            data,
            lambda document: document.update(
                public=base64.b64encode(planted.public).decode(),
                private=base64.b64encode(planted.private).decode(),
            ),
        )
        refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))


def test_the_sealed_object_has_no_other_way_out(tpm: SoftwareTpm, data: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        take_ownership(esapi, data)
        sealed, _ = ownership._load(data / FILE_NAME)
        public, _ = TPM2B_PUBLIC.unmarshal(sealed.public)
        private, _ = TPM2B_PRIVATE.unmarshal(sealed.private)
        handle = esapi.load(ensure_storage_key(esapi), private, public)
        with pytest.raises(TSS2_Exception):
            esapi.unseal(handle)
        esapi.flush_context(handle)


def test_row05_a_tpm_without_sha2_banks_is_refused(tmp_path: Path, data: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm:
        banks = "sha1:all+sha256:none+sha384:none+sha512:none"
        subprocess.run(["tpm2_pcrallocate", "-T", tpm.tcti, banks], check=True, capture_output=True)
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        refused("tpm-no-bank", lambda: take_ownership(esapi, data))
        assert not permanent(esapi).owner_auth_set


# Lockout, and the end.


def use_wrong_lockout_auth(esapi: Any) -> None:
    with (
        hmac_session(esapi) as session,
        authorised(esapi, ESYS_TR.LOCKOUT, b"wrong"),
        pytest.raises(TSS2_Exception),
    ):
        esapi.dictionary_attack_lock_reset(session1=session)


def test_a_tpm_in_lockout_is_named_and_finished_later(tmp_path: Path, data: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        esapi.dictionary_attack_parameters(5, 1, 0)
        use_wrong_lockout_auth(esapi)
        refused("tpm-lockout", lambda: take_ownership(esapi, data))
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        finish(esapi, data)


def test_after_a_wrong_lockout_authorisation_a_restart_helps(tmp_path: Path, data: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, data)
        refused("tpm-auth-refused", lambda: clear(esapi, b"wrong"))
        refused("tpm-lockout", lambda: clear(esapi, ours.lockout))
        assert authorisations(esapi, data) == ours
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        clear(esapi, ours.lockout)


def test_a_cleared_tpm_can_be_owned_anew(tpm: SoftwareTpm, data: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        before = take_ownership(esapi, data)
        clear(esapi, before.lockout)
        clear(esapi, before.lockout)  # as after a power cut
        refused("tpm-authorisation-lost", lambda: authorisations(esapi, data))
        after = take_ownership(esapi, data)
        assert after.owner != before.owner
        works(esapi, after)


def test_a_disabled_clear_is_named(tpm: SoftwareTpm, data: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, data)
        with authorised(esapi, ESYS_TR.LOCKOUT, ours.lockout), hmac_session(esapi) as session:
            esapi.clear_control(ESYS_TR.LOCKOUT, True, session1=session)
        refused("tpm-clear-disabled", lambda: clear(esapi, ours.lockout))


# Secrets.


def test_row29_no_refusal_tells_a_value(
    tpm: SoftwareTpm, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every refusal on the way, with its whole chain of causes, while the values are canaries."""
    values = itertools.cycle((CANARY.owner, CANARY.lockout))
    monkeypatch.setattr(os, "urandom", lambda _size: next(values))
    told = repr(CANARY)
    with open_tpm(tpm.tcti) as esapi:
        assert take_ownership(esapi, data) == CANARY
        for call in (
            lambda: define_marker(esapi, CANARY.lockout),
            lambda: clear(esapi, CANARY.owner),
            lambda: clear(esapi, CANARY.lockout),
            lambda: esapi.pcr_event(ESYS_TR.PCR7, b"another db") and authorisations(esapi, data),
            lambda: define_marker(esapi, CANARY.owner * 9),
        ):
            with pytest.raises(DeviceRefusal) as caught:
                call()
            told += "".join(traceback.format_exception(caught.value)) + str(caught.value.as_dict())
    told += "".join(path.read_text() for path in data.iterdir())
    for value in (CANARY.owner, CANARY.lockout):
        assert value.decode() not in told
        assert value.hex() not in told
        assert str(list(value))[1:-1] not in told


def test_row18_nothing_secret_crosses_the_bus(
    tpm: SoftwareTpm, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = itertools.cycle((CANARY.owner, CANARY.lockout))
    monkeypatch.setattr(os, "urandom", lambda _size: next(values))
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        take_ownership(esapi, data)
        take_ownership(esapi, data)
        define_marker(esapi, CANARY.owner)
        clear(esapi, CANARY.lockout)
        traffic = b"".join(bus.commands + bus.replies)
        assert b"CANARY" not in traffic
        assert not any(
            value[n : n + 4] in traffic for value in (CANARY.owner, CANARY.lockout) for n in range(29)
        )
        set_auth(esapi, ESYS_TR.OWNER, CANARY.owner)  # by a password session: the bus does see things
        assert CANARY.owner in b"".join(bus.commands)


def test_row18_a_changed_reply_is_refused_and_nothing_is_sent_again(
    tpm: SoftwareTpm, data: Path, tmp_path: Path
) -> None:
    with open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, data)
    protected = 0
    with Interposer(tpm, tmp_path) as bus:
        with open_tpm(bus.tcti) as esapi:
            assert authorisations(esapi, data) == ours
        replies = list(bus.replies)
        for number, reply in enumerate(replies):
            if reply[:2] != b"\x80\x02":  # TPM_ST_SESSIONS
                continue
            protected += _changed(bus, data, number, len(reply))
    assert protected >= 1


def _changed(bus: Interposer, data: Path, number: int, size: int) -> int:
    """Flip one bit in each byte behind the header of one reply; return 1 if that is refused each time."""
    usual = len(bus.commands)
    for place in range(14, size):
        bus.forget()
        bus.on_reply = (
            lambda reply, place=place: (  # type: ignore[misc]
                reply[:place] + bytes([reply[place] ^ 1]) + reply[place + 1 :]
                if len(bus.replies) == number + 1 and place < len(reply)
                else reply
            )
        )
        try:
            with open_tpm(bus.tcti) as esapi, pytest.raises(DeviceRefusal):
                authorisations(esapi, data)
        finally:
            bus.on_reply = lambda reply: reply
        assert len(bus.commands) <= usual
    return 1
