# SPDX-License-Identifier: Apache-2.0
"""Keys, anchors and token of a device in operation, changed by statements; against a software TPM."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from tpm2_pytss import ESYS_TR

from tests.integration import power
from tests.integration.lifecycle_kit import (
    SIGNER,
    apply,
    certified,
    document,
    lifecycle_ca,
    make_operational,
    refused,
    replacement,
    sha256,
    signed,
    signer,
    tree,
)
from tests.integration.provisioning_rig import (
    NEW_PIN,
    PIN,
    TRIES,
    WRONG_PIN,
    Rig,
    authorities,
    light,
    operator_token,
)
from tests.integration.tpm_interposer import Interposer, code_of
from tests.unit.trust import pki
from trustme_init.provisioning import marker
from trustme_init.tpm import nv_history
from trustme_init.tpm.connection import open_tpm
from trustme_init.tpm.ownership import authorisations

NEW_CA = pki.issue(pki.ROOT.but(subject="new"))


@pytest.fixture(scope="module", autouse=True)
def _light() -> Iterator[None]:
    with light():
        yield


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Make a device in operation, once; it is switched off."""
    rig = Rig(tmp_path_factory.mktemp("origin") / "device")
    with rig.powered():
        make_operational(rig)
    return rig


@pytest.fixture
def rig(origin: Rig, tmp_path: Path) -> Iterator[Rig]:
    """Return a device in operation, switched on."""
    copy = origin.copy_to(tmp_path / "device")
    with copy.powered():
        copy.boot()
        yield copy


def history(rig: Rig) -> bytes:
    with open_tpm(rig.tcti) as tpm:
        return nv_history.read_history(tpm)


def anchors(rig: Rig, purpose: str) -> list[str]:
    return [each["sha256"] for each in rig.handle("authorities")["authorities"] if each["purpose"] == purpose]


def key(rig: Rig) -> str:
    return str(rig.handle("status")["device_key_sha256"])


def device_certificate(rig: Rig) -> bytes:
    return (rig.layout.tokens / "device.cert").read_bytes()


def restart(rig: Rig) -> None:
    """Be a new vault of the same boot."""
    rig.serve(marker.decide(rig.reading(), rig.data))


# What statements do


@pytest.mark.parametrize("by", ["guest", "lifecycle"])
def test_a_guestos_anchor_is_swapped(rig: Rig, by: str) -> None:
    known = authorities()
    status = apply(rig, by, 10, "replace-authority", **replacement(known.guest, NEW_CA, "guest"))
    assert anchors(rig, "guest") == [sha256(NEW_CA)]
    assert (status["last_serial"], status["applied"], status["in_tpm"]) == (10, 1, True)
    assert status["problem"] is None
    # The old one has nothing to say any more, the new one has.
    assert refused(rig, "guest", 11, "retire-authority", purpose="guest", sha256=sha256(NEW_CA)) == (
        "untrusted-signer"
    )
    back = pki.issue(SIGNER, NEW_CA)
    statement = document(rig, 11, "replace-authority", **replacement(NEW_CA, known.other_guest, "guest"))
    assert rig.handle("apply-statement", signed(back, statement))["applied"] == 2
    assert anchors(rig, "guest") == [sha256(known.other_guest)]


def test_row31_a_replaced_anchor_that_is_put_back_on_the_disk_is_not_believed(rig: Rig) -> None:
    """What is believed comes from record and history, which the TPM vouches for; not from a directory."""
    known = authorities()
    apply(rig, "guest", 10, "replace-authority", **replacement(known.guest, NEW_CA, "guest"))
    (rig.layout.tokens / "ca" / f"{sha256(known.guest)}.pem").write_bytes(known.guest.pem)
    restart(rig)
    listed = {each["sha256"]: each["source"] for each in rig.handle("authorities")["authorities"]}
    assert listed[sha256(known.guest)].startswith("NOT REGISTERED")
    assert not listed[sha256(NEW_CA)].startswith("NOT REGISTERED")
    assert refused(rig, "guest", 11, "retire-authority", purpose="guest", sha256=sha256(NEW_CA)) == (
        "untrusted-signer"
    )


def test_a_guestos_anchor_with_overlap_and_its_retirement(rig: Rig) -> None:
    known = authorities()
    apply(rig, "guest", 1, "replace-authority", **replacement(known.guest, NEW_CA, "guest", overlap=True))
    assert {*anchors(rig, "guest")} == {sha256(known.guest), sha256(NEW_CA)}
    apply(rig, "guest", 2, "retire-authority", purpose="guest", sha256=sha256(known.guest))
    assert anchors(rig, "guest") == [sha256(NEW_CA)]
    assert refused(rig, "lifecycle", 3, "retire-authority", purpose="guest", sha256=sha256(NEW_CA)) == (
        "authority-last"
    )
    assert anchors(rig, "guest") == [sha256(NEW_CA)]


def test_row33_the_device_anchor_is_rotated_without_the_device_losing_its_identity(rig: Rig) -> None:
    """The old one is valid until the new one is proven: swap and retirement wait for the new certificate."""
    known = authorities()
    swap = replacement(known.device, NEW_CA, "device")
    before = device_certificate(rig)
    assert refused(rig, "device", 1, "replace-authority", **swap) == "device-certificate-orphaned"
    apply(rig, "device", 1, "replace-authority", **swap | {"overlap": True})
    retirement = {"purpose": "device", "sha256": sha256(known.device)}
    assert refused(rig, "device", 2, "retire-authority", **retirement) == "device-certificate-orphaned"
    assert device_certificate(rig) == before
    request = (rig.layout.tokens / "device.csr").read_text()
    renewed = certified(rig, request, NEW_CA)
    apply(rig, "lifecycle", 2, "device-certificate", certificate=renewed)
    assert device_certificate(rig) == renewed.encode()
    apply(rig, "device", 3, "retire-authority", **retirement)
    assert anchors(rig, "device") == [sha256(NEW_CA)]
    assert "device-certificate" in rig.look()["met"]


def test_the_device_anchor_is_swapped_for_one_that_vouches_for_the_same_certificate(rig: Rig) -> None:
    """The same CA, issued anew."""
    known = authorities()
    again = pki.issue(pki.ROOT.but(subject="device", serial=4712), key=known.device.key)
    apply(rig, "device", 1, "replace-authority", **replacement(known.device, again, "device"))
    assert anchors(rig, "device") == [sha256(again)]
    assert "device-certificate" in rig.look()["met"]


def test_row33_the_device_key_is_renewed(rig: Rig) -> None:
    old_key, old_certificate = key(rig), device_certificate(rig)
    status = apply(rig, "device", 1, "renew-device-key")
    assert status["next_key_sha256"]
    assert status["next_key_sha256"] != old_key
    assert (key(rig), device_certificate(rig)) == (old_key, old_certificate), "not yet"
    request = x509.load_pem_x509_csr(status["csr"].encode())
    assert request.is_signature_valid
    assert '"ek_public"' in status["certification"]
    assert rig.handle("lifecycle-status")["csr"] == status["csr"], "as often as asked"
    again = apply(rig, "device", 2, "renew-device-key")
    assert again["csr"] == status["csr"], "a next key that is there stays"
    pem = certified(rig, status["csr"], authorities().device)
    done = apply(rig, "device", 3, "device-certificate", certificate=pem)
    assert key(rig) == status["next_key_sha256"]
    assert device_certificate(rig) == pem.encode()
    assert (done["next_key_sha256"], done["csr"]) == ("", "")
    assert not list(rig.layout.home.rglob("*next*"))
    assert (rig.layout.tokens / "device.csr").read_text() == status["csr"]
    assert "device-certificate" in rig.look()["met"]
    rig.boot()
    assert key(rig) == status["next_key_sha256"]


def test_row04_row08_a_certificate_that_does_not_fit_leaves_the_old_one(rig: Rig) -> None:
    status = apply(rig, "device", 1, "renew-device-key")
    before = tree(rig.data), history(rig)
    known = authorities()
    stranger = x509.load_pem_x509_csr(status["csr"].encode())
    other = pki.issue(
        pki.Wish("x", key_usage=pki.usage("digital_signature"), purpose=pki.CLIENT_AUTH), known.device
    )
    good = certified(rig, status["csr"], known.device)
    assert stranger.is_signature_valid
    for certificate, code in (
        (certified(rig, status["csr"], known.stranger), "untrusted-signer"),
        (other.pem.decode(), "device-key-mismatch"),
        (good[:-40], "chain-malformed"),
        ("", "chain-malformed"),
        (known.device.pem.decode(), "leaf-is-ca"),
        (
            pki.issue(
                pki.Wish("x", key_usage=pki.usage("digital_signature"), purpose=pki.CLIENT_AUTH),
                known.device,
                stranger,
            ).pem.decode(),
            "device-uuid-mismatch",
        ),
    ):
        assert refused(rig, "device", 2, "device-certificate", certificate=certificate) == code
        assert (tree(rig.data), history(rig)) == before
    apply(rig, "device", 2, "device-certificate", certificate=good)


def test_a_new_device_key_that_does_not_sign_is_not_taken(rig: Rig) -> None:
    status = apply(rig, "device", 1, "renew-device-key")
    pem = certified(rig, status["csr"], authorities().device)
    file = rig.layout.tpm / "device_key.next.json"
    whole = file.read_bytes()
    present = (rig.layout.tpm / "device_key.json").read_bytes()
    # The public part of the new key beside the private part of another one.
    broken = json.loads(whole) | {"private": json.loads(present)["private"]}
    file.write_text(json.dumps(broken))
    old = key(rig)
    assert refused(rig, "device", 2, "device-certificate", certificate=pem) == "device-key-foreign"
    assert key(rig) == old
    file.write_bytes(whole)
    apply(rig, "device", 2, "device-certificate", certificate=pem)
    assert key(rig) == status["next_key_sha256"]


def test_the_token_is_replaced(rig: Rig) -> None:
    p12 = operator_token(NEW_PIN)
    statement = document(rig, 1, "replace-token", token_sha256=hashlib.sha256(p12).hexdigest())
    arguments = signed(signer("device"), statement) | {"token": p12, "pin": NEW_PIN}
    assert rig.handle("apply-statement", arguments)["applied"] == 1
    assert rig.opens(NEW_PIN)
    assert not rig.opens(PIN)
    assert rig.attempt("apply-statement", arguments) == "statement-replayed"


def test_row21_a_wrong_password_of_a_token_is_counted_and_nothing_else_happens(rig: Rig) -> None:
    p12 = operator_token(NEW_PIN)
    statement = document(rig, 1, "replace-token", token_sha256=hashlib.sha256(p12).hexdigest())
    arguments = signed(signer("device"), statement) | {"token": p12, "pin": WRONG_PIN}
    before = tree(rig.data), history(rig)
    for left in range(TRIES - 1, 0, -1):
        assert rig.attempt("apply-statement", arguments) == "token-wrong-pin"
        assert rig.handle("token-status")["tries_left"] == left
        after = tree(rig.data)
        assert after.pop("cml/tokens/attempts.json")
        assert ({k: v for k, v in before[0].items() if not k.endswith("attempts.json")}, before[1]) == (
            after,
            history(rig),
        )
    rig.attempt("apply-statement", arguments)
    assert rig.attempt("apply-statement", arguments | {"pin": NEW_PIN}) == "token-locked"
    assert rig.opens(PIN)


def test_a_token_that_the_statement_does_not_name(rig: Rig) -> None:
    statement = document(rig, 1, "replace-token", token_sha256="ab" * 32)
    arguments = signed(signer("device"), statement) | {"token": operator_token(NEW_PIN), "pin": NEW_PIN}
    assert rig.attempt("apply-statement", arguments) == "token-other-file"
    assert rig.opens(PIN)
    assert rig.handle("token-status")["tries_left"] == TRIES


# What is refused, and leaves disk and TPM as they were


def certificate_of(rig: Rig) -> dict[str, Any]:
    return {"certificate": device_certificate(rig).decode()}


REFUSED: dict[str, tuple[str, str, Callable[[Rig], dict[str, Any]]]] = {
    "statement-other-device": (
        "lifecycle",
        "replace-authority",
        lambda _: (
            replacement(authorities().guest, NEW_CA, "guest")
            | {"device_uuid": "11111111-2222-4333-8444-555555555555"}
        ),
    ),
    "statement-not-entitled": (
        "guest",
        "replace-authority",
        lambda _: replacement(authorities().device, NEW_CA, "device"),
    ),
    "untrusted-signer": (
        "stranger",
        "replace-authority",
        lambda _: replacement(authorities().guest, NEW_CA, "guest"),
    ),
    "authority-unknown": (
        "lifecycle",
        "replace-authority",
        lambda _: replacement(authorities().other_guest, NEW_CA, "guest"),
    ),
    "authority-already-there": (
        "lifecycle",
        "replace-authority",
        lambda _: replacement(authorities().guest, authorities().guest, "guest"),
    ),
    "authority-other-purpose": (
        "lifecycle",
        "replace-authority",
        lambda _: replacement(authorities().guest, lifecycle_ca(), "guest"),
    ),
    "certificate-expired": (
        "lifecycle",
        "replace-authority",
        lambda _: replacement(
            authorities().guest,
            pki.issue(pki.ROOT.but(subject="late", not_after=pki.NOW - pki.DAY)),
            "guest",
        ),
    ),
    "not-a-ca": (
        "lifecycle",
        "replace-authority",
        lambda _: replacement(authorities().guest, pki.issue(pki.ROOT.but(ca=False)), "guest"),
    ),
    "authority-last": (
        "guest",
        "retire-authority",
        lambda _: {"purpose": "guest", "sha256": sha256(authorities().guest)},
    ),
    "statement-action-unknown": ("lifecycle", "reopen-provisioning", lambda _: {}),
    "statement-malformed": ("lifecycle", "renew-device-key", lambda _: {"comment": ""}),
    "statement-for-any-device": (
        "lifecycle",
        "device-certificate",
        lambda rig: certificate_of(rig) | {"device_uuid": None},
    ),
    "statement-replayed": (
        "lifecycle",
        "replace-authority",
        lambda _: replacement(authorities().guest, NEW_CA, "guest") | {"serial": 3},
    ),
}


@pytest.mark.parametrize("code", REFUSED)
def test_row04_a_refused_statement_leaves_disk_and_tpm_as_they_were(rig: Rig, code: str) -> None:
    apply(rig, "lifecycle", 3, "renew-device-key")
    by, action, fields = REFUSED[code]
    statement = document(rig, 4, action) | fields(rig)
    before = tree(rig.data), history(rig)
    assert rig.attempt("apply-statement", signed(signer(by), statement)) == code
    assert (tree(rig.data), history(rig)) == before
    restart(rig)
    assert rig.handle("lifecycle-status")["problem"] is None


def test_row04_an_ordinary_signer_of_guestoses_rotates_no_anchor(rig: Rig) -> None:
    ordinary = pki.issue(pki.LEAF.but(purpose=pki.CODE_SIGNING), authorities().guest)
    statement = document(rig, 4, "replace-authority", **replacement(authorities().guest, NEW_CA, "guest"))
    before = tree(rig.data), history(rig)
    assert rig.attempt("apply-statement", signed(ordinary, statement)) == "statement-purpose"
    good = signed(signer("guest"), statement)
    for name in ("statement", "signature", "certificate"):
        part = good[name]
        assert isinstance(part, bytes)
        assert rig.attempt("apply-statement", good | {name: part[:-1]})
    assert (tree(rig.data), history(rig)) == before


def test_in_provisioning_no_statement_is_obeyed(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "device")
    with rig.powered():
        rig.boot()
        assert rig.attempt("apply-statement") == "provisioning-open"
        status = rig.handle("lifecycle-status")
        assert (status["applied"], status["last_serial"], status["problem"]) == (0, 0, None)


def test_a_lifecycle_anchor_is_registered_in_provisioning_only(rig: Rig) -> None:
    assert anchors(rig, "lifecycle") == [sha256(lifecycle_ca())]
    assert rig.attempt("add-authority", {"purpose": "lifecycle", "certificate": NEW_CA.pem}) == (
        "provisioning-closed"
    )


# Replay and rollback


def test_row32_a_statement_is_obeyed_once(rig: Rig) -> None:
    known = authorities()
    once = signed(
        signer("lifecycle"),
        document(rig, 5, "replace-authority", **replacement(known.guest, NEW_CA, "guest", overlap=True)),
    )
    rig.handle("apply-statement", once)
    apply(rig, "lifecycle", 6, "retire-authority", purpose="guest", sha256=sha256(NEW_CA))
    for _ in range(2):
        assert rig.attempt("apply-statement", once) == "statement-replayed"
        assert refused(rig, "lifecycle", 6, "renew-device-key") == "statement-replayed"
        restart(rig)
    assert anchors(rig, "guest") == [sha256(known.guest)]


def test_row31_row32_a_disk_from_before_a_statement_is_refused(rig: Rig, tmp_path: Path) -> None:
    known = authorities()
    before = tmp_path / "before"
    shutil.copytree(rig.data, before)
    apply(rig, "guest", 1, "replace-authority", **replacement(known.guest, NEW_CA, "guest"))
    after = tmp_path / "after"
    shutil.copytree(rig.data, after)
    shutil.rmtree(rig.data)
    shutil.copytree(before, rig.data)
    rig.boot()
    assert anchors(rig, "guest") == [sha256(known.guest)], "the anchor that was replaced is on this disk"
    for operation, arguments in (
        ("verify-guestos", {"config": b"", "signature": b"", "certificate": b""}),
        ("verify-certificate", {"certificate": b""}),
        ("token-unlock", {"pin": PIN}),
        ("token-change-pin", {"pin": PIN, "new_pin": NEW_PIN}),
        ("apply-statement", signed(signer("guest"), b"{}")),
    ):
        assert rig.attempt(operation, arguments) == "lifecycle-rolled-back", operation
    assert rig.handle("lifecycle-status")["problem"]["code"] == "lifecycle-rolled-back"
    assert rig.handle("status")["completed"]
    shutil.rmtree(rig.data)
    shutil.copytree(after, rig.data)
    rig.boot()
    assert rig.attempt("token-unlock", {"pin": PIN}) == ""


@pytest.mark.parametrize("change", ["drop", "serial", "action", "add", "empty", "damage", "foreign pending"])
def test_row31_row32_a_history_that_was_touched_is_refused(rig: Rig, change: str) -> None:
    apply(rig, "lifecycle", 5, "renew-device-key")
    path = rig.layout.home / "lifecycle/history.json"
    text = path.read_text()
    expected = "lifecycle-rolled-back"
    match change:
        case "drop":
            path.unlink()
        case "serial":
            path.write_text(text.replace('"serial": 5', '"serial": 1'))
        case "action":
            path.write_text(text.replace("renew-device-key", "replace-token"))
        case "add":
            more = ', {"serial": 6, "action": "renew-device-key", "sha256": "' + "ab" * 32 + '"}]'
            path.write_text(more.join(text.rsplit("]", 1)))
        case "empty":
            path.write_text('{"version": 1, "entries": []}')
        case "damage":
            path.write_text(text[:-20])
            expected = "lifecycle-history-damaged"
        case _:
            path.unlink()
            (path.parent / "pending.json").write_text('{"version": 1, "text": "e30="}')
            expected = "lifecycle-history-damaged"
    restart(rig)
    assert rig.attempt("token-unlock", {"pin": PIN}) == expected
    path.write_text(text)
    (path.parent / "pending.json").unlink(missing_ok=True)
    assert rig.attempt("token-unlock", {"pin": PIN}) == ""


def test_row31_without_the_tpm_s_history_nothing_is_done(rig: Rig) -> None:
    with open_tpm(rig.tcti) as tpm:
        owner = authorisations(tpm, rig.layout.tpm).owner
        index = tpm.tr_from_tpmpublic(nv_history.INDEX)
        tpm.tr_set_auth(ESYS_TR.OWNER, owner)
        tpm.nv_undefine_space(index)
    restart(rig)
    assert rig.attempt("token-unlock", {"pin": PIN}) == "history-undefined"
    assert refused(rig, "lifecycle", 1, "renew-device-key") == "history-undefined"


# Power cuts


@dataclass(frozen=True)
class Change:
    """A statement whose application is cut."""

    by: str
    action: str
    fields: Callable[[Rig], dict[str, Any]]
    token: bytes = b""
    pin: str = ""


def renewed(rig: Rig) -> dict[str, Any]:
    request = rig.handle("lifecycle-status")["csr"]
    return {"certificate": certified(rig, request, authorities().device)}


CHANGES = {
    "swap": Change("guest", "replace-authority", lambda _: replacement(authorities().guest, NEW_CA, "guest")),
    "overlap": Change(
        "device",
        "replace-authority",
        lambda _: replacement(authorities().device, NEW_CA, "device", overlap=True),
    ),
    "renew": Change("device", "renew-device-key", lambda _: {}),
    "certificate": Change("device", "device-certificate", renewed),
    "token": Change(
        "device",
        "replace-token",
        lambda _: {"token_sha256": hashlib.sha256(operator_token(NEW_PIN)).hexdigest()},
        operator_token(NEW_PIN),
        NEW_PIN,
    ),
}


def seen(rig: Rig) -> dict[str, Any]:
    """Return what tells old from new."""
    look = rig.look()
    status = rig.handle("lifecycle-status")
    assert status["problem"] is None
    names = ("authorities", "certificate", "key", "pins", "met", "request", "tries")
    return {
        **{name: look[name] for name in names},
        "applied": status["applied"],
        "next": bool(status["next_key_sha256"]),
    }


@pytest.mark.parametrize("name", CHANGES)
def test_row33_a_power_cut_at_any_effect_leaves_the_old_or_the_new(
    origin: Rig, tmp_path: Path, name: str
) -> None:
    change = CHANGES[name]
    start = origin.copy_to(tmp_path / "start")
    with start.powered():
        start.boot()
        if name == "certificate":
            apply(start, "device", 1, "renew-device-key")
        old = seen(start)
        statement = signed(signer(change.by), document(start, 2, change.action, **change.fields(start)))
    arguments = statement | {"token": change.token, "pin": change.pin}
    whole = start.copy_to(tmp_path / "whole")
    with whole.powered():
        run = power.run(lambda: attempt(whole, arguments), whole.data)
        assert run.outcome.ended == "returned", run.outcome
        whole.boot()
        new = seen(whole)
    assert new["applied"] == old["applied"] + 1
    outcomes = set()
    looked = set()
    for cut in range(len(run.outcome.effects)):
        victim = start.copy_to(tmp_path / f"cut-{cut}")
        with victim.powered():
            ended = power.run(lambda victim=victim: attempt(victim, arguments), victim.data, cut=cut)  # type: ignore[misc]
        for number, survivor in enumerate(ended.volume.survivors()):
            if (state := (ended.tpm_effects, survivor.made_by)) in looked:
                continue
            looked.add(state)
            found = victim.copy_to(tmp_path / f"cut-{cut}-{number}", survivor)
            with found.powered():
                found.boot()
                where = f"cut {cut} before {run.outcome.effects[cut]}, {survivor.how}"
                outcomes.add(judged(found, old, new, name, where))
                if seen(found)["applied"] == old["applied"]:
                    assert found.attempt("apply-statement", arguments) == "", where
                assert fits(seen(found), new, name), where
    assert outcomes == {"old", "new"}


@pytest.mark.parametrize("name", ["swap", "renew"])
def test_row33_a_disk_that_is_full_at_any_effect_leaves_the_old_or_the_new(
    origin: Rig, tmp_path: Path, name: str
) -> None:
    """A refusal has a name; a statement that was committed by then is finished once there is room."""
    change = CHANGES[name]
    start = origin.copy_to(tmp_path / "start")
    with start.powered():
        start.boot()
        old = seen(start)
        arguments = signed(signer(change.by), document(start, 2, change.action, **change.fields(start)))
    outcomes, full = set(), 0
    while True:
        victim = start.copy_to(tmp_path / f"full-{full}")
        with victim.powered():
            run = power.run(lambda victim=victim: attempt(victim, arguments), victim.data, full_from=full)  # type: ignore[misc]
            assert run.outcome.ended in {"refused", "returned"}, (full, run.outcome)
            assert run.outcome.code in {"", "disk-not-writable", "certificate-store-unwritable"}
            restart(victim)
            assert victim.attempt("token-unlock", {"pin": PIN}) == ""
            found = seen(victim)
            outcomes.add(found["applied"] - old["applied"])
            assert found == old or found["applied"] == old["applied"] + 1, (full, found)
            if found["applied"] == old["applied"]:
                assert victim.attempt("apply-statement", arguments) == "", full
            assert anchors(victim, "guest") == [sha256(NEW_CA if name == "swap" else authorities().guest)]
        if run.outcome.ended == "returned":
            break
        full += 1
    assert outcomes == {0, 1}


def attempt(rig: Rig, arguments: dict[str, str | bytes]) -> None:
    rig.boot()
    rig.handle("apply-statement", arguments)


def judged(rig: Rig, old: dict[str, Any], new: dict[str, Any], name: str, where: str) -> str:
    assert rig.attempt("token-unlock", {"pin": rig.look()["pins"][0]}) == "", where
    found = seen(rig)
    if found == old:
        return "old"
    if name == "token" and found == new | {"applied": old["applied"]}:
        return "old"  # the rule about tokens: the new one is there, and the statement as good as new
    assert fits(found, new, name), (where, found, new)
    assert not (rig.layout.home / "lifecycle/pending.json").exists(), where
    return "new"


def fits(found: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    """Whether a state is the new one; a key that is made is another one each time."""
    ignored = {"met"} if name != "renew" else {"met", "next"}
    return {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in new.items() if k not in ignored
    } and found["next"] == new["next"]


def test_row33_a_committed_statement_is_finished_whatever_has_expired_since(
    origin: Rig, tmp_path: Path
) -> None:
    """Cut right after the commit; at the next boot, every certificate in play has expired."""
    rig = origin.copy_to(tmp_path / "device")
    with rig.powered():
        rig.boot()
        statement = signed(
            signer("guest"),
            document(rig, 1, "replace-authority", **replacement(authorities().guest, NEW_CA, "guest")),
        )
        effects = power.run(lambda: attempt(rig, statement), rig.data)
        assert effects.outcome.ended == "returned"
        cut = next(i for i, each in enumerate(effects.outcome.effects) if each.name == "nv_extend") + 1
    victim = origin.copy_to(tmp_path / "victim")
    with victim.powered():
        power.run(lambda: attempt(victim, statement), victim.data, cut=cut)
        assert (victim.layout.home / "lifecycle/pending.json").exists()
        victim.policy = replace(victim.policy, build_date=pki.NOW + 400 * pki.DAY)
        victim.boot()
        status = victim.handle("lifecycle-status")
        assert (status["applied"], status["problem"]) == (1, None)
        assert anchors(victim, "guest") == [sha256(NEW_CA)]


@pytest.mark.parametrize("lost", ["command", "reply"])
def test_row18_a_commit_that_is_lost_on_the_bus(rig: Rig, tmp_path: Path, lost: str) -> None:
    """Whether the TPM did it, its history says: a lost reply is no lost statement."""
    extend = 0x136  # TPM_CC_NV_Extend
    known = authorities()
    with Interposer(tpm_of(rig), tmp_path) as bus:
        last = 0
        armed = True

        def on_command(command: bytes) -> bytes | None:
            nonlocal last, armed
            last = code_of(command)
            if last == extend and armed and lost == "command":
                armed = False
                return None
            return command

        def on_reply(reply: bytes) -> bytes | None:
            nonlocal armed
            if last == extend and armed and lost == "reply":
                armed = False
                return None
            return reply

        bus.on_command, bus.on_reply = on_command, on_reply
        rig.tcti = bus.tcti
        restart(rig)
        code = refused(rig, "guest", 1, "replace-authority", **replacement(known.guest, NEW_CA, "guest"))
        assert not armed
        assert code == ("tpm-failed" if lost == "command" else "")
        assert anchors(rig, "guest") == [sha256(NEW_CA if lost == "reply" else known.guest)]
        assert not (rig.layout.home / "lifecycle/pending.json").exists()


def tpm_of(rig: Rig) -> Any:
    """Return what an interposer wants to know of a TPM."""

    class _Tpm:
        tcti = rig.tcti

    return _Tpm()
