# SPDX-License-Identifier: Apache-2.0
"""The lifecycle history in swtpm: only ever extended, only by the owner, not mistaken for another's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tpm2_pytss import ESYS_TR, TPM2_ALG, TPM2_NT, TPM2B_NV_PUBLIC, TPMA_NV, TPMS_NV_PUBLIC

from tests.integration.provisioning_rig import Rig, light
from tests.integration.software_tpm import SoftwareTpm
from trustme_init.errors import DeviceRefusal, Refusal
from trustme_init.provisioning.history import chain
from trustme_init.tpm import nv_history
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.ownership import take_ownership


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path) as running:
        yield running


def nv_refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(DeviceRefusal) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert caught.value.evidence
    assert caught.value.remedy


def define(esapi: Any, auth: bytes = b"", policy: bytes = b"", **changes: Any) -> None:
    fields: dict[str, Any] = {
        "nvIndex": nv_history.INDEX,
        "nameAlg": TPM2_ALG.SHA256,
        "attributes": OURS,
        "dataSize": nv_history.SIZE,
        "authPolicy": policy,
    }
    esapi.nv_define_space(auth, TPM2B_NV_PUBLIC(nvPublic=TPMS_NV_PUBLIC(**fields | changes)))


OURS = TPMA_NV(
    TPMA_NV.OWNERWRITE
    | TPMA_NV.OWNERREAD
    | TPMA_NV.AUTHREAD
    | TPMA_NV.NO_DA
    | (TPM2_NT.EXTEND << TPMA_NV.TPM2_NT_SHIFT)
)


def test_the_chain_is_what_the_tpm_computes(bare: SoftwareTpm, tmp_path: Path) -> None:
    with open_tpm(bare.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        nv_refused("history-undefined", lambda: nv_history.read_history(esapi))
        nv_refused("history-undefined", lambda: nv_history.extend_history(esapi, owner, bytes(32)))
        nv_history.define_history(esapi, owner)
        nv_history.define_history(esapi, owner)
        assert nv_history.read_history(esapi) == nv_history.EMPTY == chain(())
        value = nv_history.EMPTY
        for entry in (b"a" * 32, b"b" * 32):
            value = hashlib.sha256(value + entry).digest()
            assert nv_history.extend_history(esapi, owner, entry) == value
    with open_tpm(bare.tcti) as esapi:
        assert nv_history.read_history(esapi) == value


def test_row31_without_the_owner_the_history_stays(bare: SoftwareTpm, tmp_path: Path) -> None:
    with open_tpm(bare.tcti) as esapi:
        owner = take_ownership(esapi, tmp_path).owner
        nv_refused("tpm-auth-refused", lambda: nv_history.define_history(esapi, b"wrong"))
        nv_history.define_history(esapi, owner)
        for wrong in (b"", b"wrong"):
            nv_refused(
                "tpm-auth-refused",
                lambda wrong=wrong: nv_history.extend_history(esapi, wrong, bytes(32)),  # type: ignore[misc]
            )
        assert nv_history.read_history(esapi) == nv_history.EMPTY


@pytest.mark.parametrize(
    "changes",
    [
        {"attributes": OURS | TPMA_NV.AUTHWRITE},
        {"attributes": OURS | TPMA_NV.POLICYWRITE},
        {"attributes": OURS | TPMA_NV.CLEAR_STCLEAR},
        {"attributes": OURS & ~(TPM2_NT.EXTEND << TPMA_NV.TPM2_NT_SHIFT)},
        {"nameAlg": TPM2_ALG.SHA384, "dataSize": 48},
        {"auth": b"theirs"},
        {"policy": bytes(32)},
    ],
    ids=["authwrite", "policywrite", "stclear", "ordinary", "sha384", "auth", "policy"],
)
def test_row31_an_index_of_another_s_making_is_refused(
    bare: SoftwareTpm, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with open_tpm(bare.tcti) as esapi:
        define(esapi, **changes)
    with open_tpm(bare.tcti) as esapi:  # a library that has not seen the authorisation value
        owner = take_ownership(esapi, tmp_path).owner
        nv_refused("history-foreign", lambda: nv_history.define_history(esapi, owner))
        nv_refused("history-foreign", lambda: nv_history.read_history(esapi))


def test_row31_an_index_that_was_extended_before_us_is_refused_in_provisioning(
    bare: SoftwareTpm, tmp_path: Path
) -> None:
    with open_tpm(bare.tcti) as esapi:
        define(esapi)
        esapi.nv_extend(esapi.tr_from_tpmpublic(nv_history.INDEX), bytes(32), auth_handle=ESYS_TR.OWNER)
        owner = take_ownership(esapi, tmp_path).owner
        nv_refused("history-foreign", lambda: nv_history.define_history(esapi, owner))


def test_row31_provisioning_stops_before_its_end_with_such_an_index(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "device")
    with light(), rig.powered():
        with open_tpm(rig.tcti) as esapi:
            define(esapi, attributes=OURS | TPMA_NV.AUTHWRITE)
        with pytest.raises(Refusal) as caught:
            rig.boot()
        assert caught.value.code == "history-foreign"
