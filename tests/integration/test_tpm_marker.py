# SPDX-License-Identifier: Apache-2.0
"""The provisioning marker in swtpm: committed once, locked over resets, not mistaken for another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CC,
    TPM2_NT,
    TPM2B_NV_PUBLIC,
    TPMA_NV,
    TPMS_NV_PUBLIC,
    TSS2_Exception,
)

from tests.integration.software_tpm import SoftwareTpm
from tests.integration.tpm_interposer import Interposer, code_of
from tests.integration.tpm_power import Bench
from trustme_init.errors import DeviceRefusal
from trustme_init.tpm.connection import authorised, open_tpm, salted_session
from trustme_init.tpm.marker_form import INDEX, SIZE, MarkerContent, MarkerReading, MarkerState
from trustme_init.tpm.nv_marker import complete_marker, define_marker, ensure_locked, read_marker
from trustme_init.tpm.ownership import authorisations, clear, take_ownership
from trustme_init.tpm.storage_key import ensure_storage_key

CONTENT = MarkerContent(UUID("00112233-4455-6677-8899-aabbccddeeff"), bytes(range(32)))
OTHER = CONTENT._replace(record_sha256=bytes(32))
ABSENT = MarkerReading(MarkerState.ABSENT)
OPEN = MarkerReading(MarkerState.OPEN)
WRITTEN = MarkerReading(MarkerState.COMPLETED, CONTENT, locked=False)
LOCKED = MarkerReading(MarkerState.COMPLETED, CONTENT, locked=True)
OURS = TPMA_NV.OWNERWRITE | TPMA_NV.OWNERREAD | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA | TPMA_NV.WRITEDEFINE


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path) as running:
        yield running


def refused(code: str, call: Callable[[], object]) -> DeviceRefusal:
    with pytest.raises(DeviceRefusal) as caught:
        call()
    assert caught.value.code == code
    assert caught.value.evidence
    assert caught.value.remedy
    return caught.value


def define(esapi: Any, auth: bytes = b"", policy: bytes = b"", **changes: Any) -> Any:
    """Define the index as somebody else might, while the owner has no authorisation."""
    fields: dict[str, Any] = {
        "nvIndex": INDEX,
        "nameAlg": TPM2_ALG.SHA256,
        "attributes": OURS,
        "dataSize": SIZE,
        "authPolicy": policy,
    }
    return esapi.nv_define_space(auth, TPM2B_NV_PUBLIC(nvPublic=TPMS_NV_PUBLIC(**fields | changes)))


def remove(esapi: Any, owner: bytes) -> None:
    index = esapi.tr_from_tpmpublic(INDEX)
    with salted_session(esapi, ensure_storage_key(esapi)) as session, authorised(esapi, ESYS_TR.OWNER, owner):
        esapi.nv_undefine_space(index, session1=session)


def write(esapi: Any, owner: bytes, data: bytes) -> None:
    index = esapi.tr_from_tpmpublic(INDEX)
    with salted_session(esapi, ensure_storage_key(esapi)) as session, authorised(esapi, ESYS_TR.OWNER, owner):
        esapi.nv_write(index, data, auth_handle=ESYS_TR.OWNER, session1=session)


def test_the_whole_way(tmp_path: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        assert read_marker(esapi) == ABSENT
        assert define_marker(esapi, owner) == OPEN
        assert define_marker(esapi, owner) == OPEN
        assert ensure_locked(esapi, owner) == OPEN
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        assert read_marker(esapi) == OPEN
        assert complete_marker(esapi, owner, CONTENT) == LOCKED
        assert complete_marker(esapi, owner, CONTENT) == LOCKED
        assert define_marker(esapi, owner) == LOCKED
        refused("marker-already-completed", lambda: complete_marker(esapi, owner, OTHER))


def test_row31_the_lock_outlasts_resets_and_binds_the_owner_too(tmp_path: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        define_marker(esapi, owner)
        complete_marker(esapi, owner, CONTENT)
    for _ in range(3):
        with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
            assert read_marker(esapi) == LOCKED
            with pytest.raises(TSS2_Exception, match="locked"):
                write(esapi, owner, OTHER.encode())
            assert read_marker(esapi) == LOCKED


def test_row31_without_the_owner_nothing_moves(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        for wrong in (b"", b"wrong", owner[::-1]):
            refused("tpm-auth-refused", lambda wrong=wrong: define_marker(esapi, wrong))  # type: ignore[misc]
        define_marker(esapi, owner)
        refused("tpm-auth-refused", lambda: complete_marker(esapi, b"wrong", CONTENT))
        refused("marker-unprotected", lambda: complete_marker(esapi, b"", CONTENT))
        assert read_marker(esapi) == OPEN
        complete_marker(esapi, owner, CONTENT)
        for wrong in (b"", b"wrong"):
            with pytest.raises(TSS2_Exception):
                remove(esapi, wrong)
        assert read_marker(esapi) == LOCKED


def test_a_marker_is_not_completed_before_it_is_defined(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with open_tpm(tpm.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        refused("marker-undefined", lambda: complete_marker(esapi, owner, CONTENT))


def test_the_write_alone_completes_and_the_lock_follows(tmp_path: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        define_marker(esapi, owner)
        write(esapi, owner, CONTENT.encode())
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        assert read_marker(esapi) == WRITTEN
        refused("marker-already-completed", lambda: complete_marker(esapi, owner, OTHER))
        refused("tpm-auth-refused", lambda: ensure_locked(esapi, b"wrong"))
        assert read_marker(esapi) == WRITTEN
        assert ensure_locked(esapi, owner) == LOCKED
        assert ensure_locked(esapi, b"not even asked for") == LOCKED


def test_row33_a_cut_at_any_instant_leaves_open_or_completed(tmp_path: Path) -> None:
    def provision(esapi: Any, directory: Path) -> None:
        owner = authorisations(esapi, directory).owner
        define_marker(esapi, owner)
        complete_marker(esapi, owner, CONTENT)

    seen: list[MarkerReading] = []
    bench = Bench(tmp_path)
    bench.prepare(take_ownership)
    for cut in bench.every_cut(provision):
        bench.restart(lambda esapi, _: seen.append(read_marker(esapi)))
        assert seen[-1] in (ABSENT, OPEN, WRITTEN, LOCKED), f"cut at instant {cut}"
        bench.restart(provision)
        bench.restart(lambda esapi, _: seen.append(read_marker(esapi)))
        assert seen.pop() == LOCKED, f"cut at instant {cut}"
    order = [ABSENT, OPEN, WRITTEN, LOCKED]
    assert sorted(seen, key=order.index) == seen
    assert {reading.state for reading in seen} == set(MarkerState)
    assert WRITTEN in seen


def test_row31_a_cleared_tpm_has_no_marker_and_no_authorisation(tpm: SoftwareTpm, tmp_path: Path) -> None:
    """Clearing needs the lockout authorisation or the firmware; what is left on the disk no longer fits."""
    with open_tpm(tpm.tcti) as esapi:
        ours = take_ownership(esapi, tmp_path)
        define_marker(esapi, ours.owner)
        complete_marker(esapi, ours.owner, CONTENT)
        clear(esapi, ours.lockout)
        assert read_marker(esapi) == ABSENT
        refused("tpm-authorisation-lost", lambda: authorisations(esapi, tmp_path))


# Somebody was there before us.


@pytest.mark.parametrize(
    "changes",
    [
        {"attributes": OURS & ~TPMA_NV.WRITEDEFINE},
        {"attributes": OURS & ~TPMA_NV.WRITEDEFINE | TPMA_NV.WRITE_STCLEAR},
        {"attributes": OURS & ~TPMA_NV.NO_DA},
        {"attributes": OURS & ~TPMA_NV.AUTHREAD},
        {"attributes": OURS & ~TPMA_NV.OWNERREAD},
        {"attributes": OURS & ~TPMA_NV.OWNERWRITE | TPMA_NV.AUTHWRITE},
        {"attributes": OURS | TPMA_NV.AUTHWRITE},
        {"attributes": OURS | TPMA_NV.POLICYWRITE},
        {"attributes": OURS | TPMA_NV.WRITE_STCLEAR},
        {"attributes": OURS | TPMA_NV.WRITEALL},
        {"attributes": OURS | TPMA_NV.READ_STCLEAR},
        {"attributes": OURS | TPMA_NV.GLOBALLOCK},
        {"attributes": OURS | TPMA_NV.ORDERLY},
        {"attributes": OURS & ~TPMA_NV.WRITEDEFINE | TPMA_NV.ORDERLY | TPMA_NV.CLEAR_STCLEAR},
        {
            "attributes": OURS & ~TPMA_NV.WRITEDEFINE | (TPM2_NT.BITS << TPMA_NV.TPM2_NT_SHIFT),
            "dataSize": 8,
        },
        {"dataSize": SIZE - 1},
        {"dataSize": SIZE + 1},
        {"dataSize": 1},
        {"nameAlg": TPM2_ALG.SHA1},
        {"nameAlg": TPM2_ALG.SHA384},
        {"policy": bytes(32)},
        {"auth": b"somebody's"},
    ],
    ids=str,
)
def test_row31_an_index_of_another_form_is_foreign(
    tpm: SoftwareTpm, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with open_tpm(tpm.tcti) as esapi:
        define(esapi, **changes)
    with open_tpm(tpm.tcti) as esapi:  # another program, which does not know what the first one chose
        owner = take_ownership(esapi, tmp_path).owner
        refused("marker-foreign", lambda: read_marker(esapi))
        refused("marker-foreign", lambda: define_marker(esapi, owner))
        refused("marker-foreign", lambda: complete_marker(esapi, owner, CONTENT))
        refused("marker-foreign", lambda: ensure_locked(esapi, owner))


def test_row31_an_index_of_the_platform_is_foreign(tpm: SoftwareTpm) -> None:
    with open_tpm(tpm.tcti) as esapi:
        public = TPMS_NV_PUBLIC(
            nvIndex=INDEX,
            nameAlg=TPM2_ALG.SHA256,
            attributes=OURS | TPMA_NV.PPWRITE | TPMA_NV.PLATFORMCREATE,
            dataSize=SIZE,
        )
        esapi.nv_define_space(b"", TPM2B_NV_PUBLIC(nvPublic=public), auth_handle=ESYS_TR.PLATFORM)
        refused("marker-foreign", lambda: read_marker(esapi))


@pytest.mark.parametrize("data", [bytes(SIZE), b"\2" + CONTENT.encode()[1:], b"\xff" * SIZE])
def test_row31_content_that_is_no_marker_is_foreign(tpm: SoftwareTpm, data: bytes) -> None:
    with open_tpm(tpm.tcti) as esapi:
        ensure_storage_key(esapi)
        define(esapi)
        write(esapi, b"", data)
        refused("marker-foreign", lambda: read_marker(esapi))


def test_row31_a_part_of_a_marker_is_none(tpm: SoftwareTpm) -> None:
    with open_tpm(tpm.tcti) as esapi:
        ensure_storage_key(esapi)
        define(esapi)
        write(esapi, b"", CONTENT.encode()[:20])
        reading = read_marker(esapi)
    # swtpm fills the rest: it decodes, and names a record that is not ours. It never reads as open.
    assert reading.state is MarkerState.COMPLETED
    assert reading.content != CONTENT


def test_row31_a_valid_form_by_somebody_else_is_completed_and_never_ours(
    tpm: SoftwareTpm, tmp_path: Path
) -> None:
    """Whose record it names is for the caller to compare: it can stop a device, not open one."""
    with open_tpm(tpm.tcti) as esapi:
        ensure_storage_key(esapi)
        define(esapi)
        write(esapi, b"", OTHER.encode())
        assert read_marker(esapi) == MarkerReading(MarkerState.COMPLETED, OTHER, locked=False)
        owner = take_ownership(esapi, tmp_path).owner
        refused("marker-already-completed", lambda: complete_marker(esapi, owner, CONTENT))


def test_an_index_locked_before_it_is_written_opens_with_a_reset(tmp_path: Path) -> None:
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        index = define(esapi)
        esapi.nv_write_lock(index, auth_handle=ESYS_TR.OWNER)
        owner = take_ownership(esapi, tmp_path).owner
        assert read_marker(esapi) == OPEN._replace(locked=True)
        refused("tpm-failed", lambda: complete_marker(esapi, owner, CONTENT))
    with SoftwareTpm(tmp_path) as tpm, open_tpm(tpm.tcti) as esapi:
        assert complete_marker(esapi, owner, CONTENT) == LOCKED


# The bus.


def test_a_lock_that_does_not_hold_is_named(tpm: SoftwareTpm, tmp_path: Path) -> None:
    """A TPM that says it has locked, and whose index says it has not."""

    def unlocked(reply: bytes) -> bytes:
        if code_of(bus.commands[-1]) != TPM2_CC.NV_ReadPublic or TPM2_CC.NV_WriteLock not in bus.codes:
            return reply
        public = bytearray(reply[10 : 12 + int.from_bytes(reply[10:12], "big")])
        public[8:12] = (int.from_bytes(public[8:12], "big") & ~int(TPMA_NV.WRITELOCKED)).to_bytes(4, "big")
        name = int(TPM2_ALG.SHA256).to_bytes(2, "big") + hashlib.sha256(public[2:]).digest()
        return reply[:10] + bytes(public) + len(name).to_bytes(2, "big") + name

    with open_tpm(tpm.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        define_marker(esapi, owner)
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        bus.on_reply = unlocked
        refused("marker-not-locked", lambda: complete_marker(esapi, owner, CONTENT))


def test_reading_takes_at_most_three_commands(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        read_marker(esapi)
        assert len(bus.commands) == 1
        owner = take_ownership(esapi, tmp_path).owner
        define_marker(esapi, owner)
        complete_marker(esapi, owner, CONTENT)
        bus.forget()
        assert read_marker(esapi) == LOCKED
        assert len(bus.commands) == 3


@pytest.mark.parametrize("code", [0x101, 0x922, 0x18A, 0x084, 0x28B, 0x921, 0x30018B])
def test_only_no_such_handle_means_absent(tpm: SoftwareTpm, tmp_path: Path, code: int) -> None:
    """Any other failure must not let provisioning begin again."""
    with Interposer(tpm, tmp_path) as bus, open_tpm(bus.tcti) as esapi:
        bus.on_reply = lambda _: b"\x80\x01" + (10).to_bytes(4, "big") + code.to_bytes(4, "big")
        with pytest.raises(DeviceRefusal):
            read_marker(esapi)


def test_row18_a_lost_or_forged_answer_to_the_write_is_no_completion(
    tpm: SoftwareTpm, tmp_path: Path
) -> None:
    with open_tpm(tpm.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        define_marker(esapi, owner)
    forged = {TPM2_CC.NV_Write, TPM2_CC.NV_WriteLock}
    with Interposer(tpm, tmp_path) as bus:

        def complete() -> MarkerReading:
            with open_tpm(bus.tcti) as esapi:
                return complete_marker(esapi, owner, CONTENT)

        bus.on_command = lambda command: None if code_of(command) in forged else command
        refused("tpm-failed", complete)
        bus.on_command = lambda command: command
        bus.on_reply = lambda reply: (
            reply[:-1] + bytes([reply[-1] ^ 1]) if code_of(bus.commands[-1]) in forged else reply
        )
        refused("tpm-failed", complete)  # written, and the HMAC of the reply is wrong
        refused("tpm-failed", complete)  # locked, likewise
        bus.on_reply = lambda reply: reply
        assert complete() == LOCKED
