# SPDX-License-Identifier: Apache-2.0
"""The certificate store: nothing unjudged gets in, nothing damaged gets out, nothing is half there."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from tests.unit.trust.pki import (
    CLIENT_AUTH,
    CODE_SIGNING,
    DAY,
    LEAF,
    NOW,
    ROOT,
    SUB,
    Issued,
    bundle,
    issue,
)
from tests.unit.trust.test_anchors import ORDERS, with_signature
from trustme_init.errors import Refusal, StorageRefusal, TrustRefusal
from trustme_init.provisioning.certstore import (
    AUTHORITY_LIMIT,
    BASE_SOURCE,
    DEVICE_CERTIFICATE,
    LOCAL_CA,
    LOCAL_SOURCE,
    STORE_SOURCE,
    CertificateStore,
    Entry,
)
from trustme_init.trust.anchors import AnchorSet, Purpose, Revocations
from trustme_init.trust.authority import AUTHORITY_BYTES
from trustme_init.trust.chain import BUNDLE_LIMIT, verify_chain

GUEST, DEVICE = Purpose.GUEST, Purpose.DEVICE
NONE = Revocations()
PURPOSES = pytest.mark.parametrize("purpose", [GUEST, DEVICE], ids=lambda each: each.value)
FOLDERS = {GUEST: "ca", DEVICE: "device_ca"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.mkdir()
    return path


@pytest.fixture
def store(place: Path) -> CertificateStore:
    return CertificateStore(place)


def add(store: CertificateStore, made: Issued, purpose: Purpose = GUEST) -> Entry:
    return store.add(purpose, made.pem, at=NOW, revocations=NONE)


def set_local(store: CertificateStore, made: Issued) -> Entry:
    return store.set_local(made.pem, at=NOW, revocations=NONE)


def anchors(
    store: CertificateStore,
    purpose: Purpose = GUEST,
    *,
    at: datetime = NOW,
    revocations: Revocations = NONE,
    extra: Sequence[bytes] = (),
) -> AnchorSet:
    return store.anchors(purpose, at=at, revocations=revocations, extra=extra)


def code(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value.code


def name_of(made: Issued) -> str:
    return f"{hashlib.sha256(made.der).hexdigest()}.pem"


def tree(place: Path) -> dict[str, str]:
    """Everything below a place: kind, mode, time of change and content."""
    found = {}
    for path in sorted([place, *place.rglob("*")]):
        facts = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(facts.st_mode) else b""
        digest = hashlib.sha256(content).hexdigest()
        found[str(path)] = f"{facts.st_mode:o} {facts.st_ino} {facts.st_mtime_ns} {digest}"
    return found


# Storing, listing, removing


@PURPOSES
def test_stored_is_listed_believed_and_removed(
    store: CertificateStore, place: Path, purpose: Purpose
) -> None:
    assert store.entries(purpose) == ()
    assert code(anchors, store, purpose) == "no-anchor"
    root, sub = issue(ROOT), issue(SUB, issue(ROOT))
    entry = add(store, root, purpose)
    assert entry == Entry(name_of(root)[:-4], "CN=root", ROOT.not_after, STORE_SOURCE)
    add(store, sub, purpose)
    path = place / FOLDERS[purpose] / name_of(root)
    assert path.read_bytes() == root.pem
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = CertificateStore(place)
    assert again.entries(purpose) == store.entries(purpose)
    assert {each.sha256 for each in again.entries(purpose)} == {name_of(root)[:-4], name_of(sub)[:-4]}
    found = anchors(again, purpose)
    assert {anchor.certificate for anchor in found.anchors} == {root.der, sub.der}
    assert {anchor.source for anchor in found.anchors} == {STORE_SOURCE}
    assert (found.purpose, found.excluded) == (purpose, ())
    assert store.remove(purpose, entry.sha256) == entry.sha256
    assert [each.sha256 for each in again.entries(purpose)] == [name_of(sub)[:-4]]
    assert code(store.remove, purpose, entry.sha256) == "authority-unknown"


def test_a_guest_os_verifies_once_its_ca_is_there(store: CertificateStore) -> None:
    root = issue(ROOT)
    pem = bundle(issue(LEAF, root))
    add(store, issue(ROOT.but(subject="other")))
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(pem, anchors(store), at=NOW)
    assert caught.value.code == "untrusted-signer"
    add(store, root)
    verify_chain(pem, anchors(store), at=NOW)


def test_row08_the_purposes_are_apart(store: CertificateStore) -> None:
    guest, device = issue(ROOT), issue(ROOT.but(subject="devices", purpose=CLIENT_AUTH))
    add(store, guest, GUEST)
    add(store, device, DEVICE)
    assert [anchor.certificate for anchor in anchors(store, GUEST).anchors] == [guest.der]
    assert [anchor.certificate for anchor in anchors(store, DEVICE).anchors] == [device.der]
    assert code(store.remove, DEVICE, name_of(guest)[:-4]) == "authority-unknown"
    # The same CA for the other purpose, also in a new certificate for the same key.
    renewed = issue(ROOT.but(serial=2), key=guest.key)
    for made in (guest, renewed):
        assert code(add, store, made, DEVICE) == "authority-other-purpose"
    assert code(add, store, device, GUEST) == "ca-purpose"
    add(store, renewed, GUEST)


def test_anchors_of_the_core_are_elsewhere(store: CertificateStore) -> None:
    assert code(store.entries, Purpose.CORE) == "wrong-purpose"
    assert code(anchors, store, Purpose.CORE) == "wrong-purpose"
    assert code(add, store, issue(ROOT), Purpose.CORE) == "wrong-purpose"
    assert code(store.remove, Purpose.CORE, "0" * 64) == "wrong-purpose"


@PURPOSES
def test_the_same_ca_twice(store: CertificateStore, place: Path, purpose: Purpose) -> None:
    root = issue(ROOT)
    add(store, root, purpose)
    before = tree(place)
    assert code(add, store, root, purpose) == "authority-already-there"
    assert tree(place) == before


def test_the_same_ca_in_other_bytes(store: CertificateStore) -> None:
    """The other signature (r, n - s) needs no key; with both there, removing one would not help."""
    root = issue(ROOT)
    r, s = decode_dss_signature(root.certificate.signature)
    other = with_signature(root.certificate, encode_dss_signature(r, ORDERS["secp256r1"] - s))
    twin = Issued(other, root.key)
    assert twin.der != root.der
    add(store, root)
    assert code(add, store, twin) == "authority-already-there"
    assert code(set_local, store, twin) == "authority-already-there"


def test_a_renewed_ca_beside_the_old_one(store: CertificateStore) -> None:
    old = issue(ROOT)
    add(store, old)
    add(store, issue(ROOT.but(serial=2, not_after=ROOT.not_after + DAY), key=old.key))
    assert len(anchors(store).anchors) == 2


def test_more_files_than_were_ever_taken_are_no_store(store: CertificateStore, place: Path) -> None:
    (place / "ca").mkdir()
    made = [issue(ROOT.but(serial=number + 1)) for number in range(AUTHORITY_LIMIT + 1)]
    for each in made:
        (place / "ca" / name_of(each)).write_bytes(each.pem)
    assert code(anchors, store) == "too-many-authorities"
    assert code(store.entries, GUEST) == "too-many-authorities"
    store.remove(GUEST, name_of(made[0])[:-4])
    assert len(anchors(store).anchors) == AUTHORITY_LIMIT


def test_removing_by_a_beginning(store: CertificateStore, place: Path) -> None:
    root = issue(ROOT)
    sha256 = add(store, root).sha256
    twin = place / "ca" / f"{sha256[:20]}{'0' * 44}.pem"
    twin.write_bytes(b"damaged")
    for wrong in ("", "a", sha256[:7], f"{sha256}0", f"{sha256}.pem", "../device.cert", "*", f"{sha256}\n"):
        assert code(store.remove, GUEST, wrong) == "authority-unknown"
    for wrong in (sha256[:8], sha256[:20]):
        assert code(store.remove, GUEST, wrong) == "authority-ambiguous"
    assert store.remove(GUEST, twin.stem) == twin.stem
    assert store.remove(GUEST, sha256[:8].upper()) == sha256
    assert list((place / "ca").iterdir()) == []


def test_the_local_ca(store: CertificateStore, place: Path) -> None:
    first, second, other = issue(ROOT), issue(ROOT.but(subject="second")), issue(ROOT.but(subject="other"))
    entry = set_local(store, first)
    assert (entry.source, (place / LOCAL_CA).read_bytes()) == (LOCAL_SOURCE, first.pem)
    assert code(set_local, store, first) == "authority-already-there"
    assert code(add, store, first) == "authority-already-there"
    assert code(add, store, first, DEVICE) == "authority-other-purpose"
    add(store, other)
    assert code(set_local, store, other) == "authority-already-there"
    assert set_local(store, second).subject == "CN=second"
    assert [each.subject for each in store.entries(GUEST)] == ["CN=other", "CN=second"]
    assert {(anchor.subject, anchor.source) for anchor in anchors(store).anchors} == {
        ("CN=other", STORE_SOURCE),
        ("CN=second", LOCAL_SOURCE),
    }
    assert store.entries(DEVICE) == ()
    assert store.remove(GUEST, name_of(second)[:12]) == name_of(second)[:-4]
    assert not (place / LOCAL_CA).exists()
    assert code(store.remove_local) == "authority-unknown"
    (place / LOCAL_CA).write_bytes(b"damaged")
    assert code(store.remove, GUEST, "") == "authority-unknown"
    store.remove_local()
    assert [each.subject for each in store.entries(GUEST)] == ["CN=other"]


def test_more_anchors_from_the_base_system(store: CertificateStore) -> None:
    base, stored, leaf = issue(ROOT.but(subject="base")), issue(ROOT), issue(LEAF)
    assert [each.source for each in anchors(store, extra=[base.der]).anchors] == [BASE_SOURCE]
    add(store, stored)
    found = anchors(store, extra=[base.der, leaf.der])
    assert {(each.subject, each.source) for each in found.anchors} == {
        ("CN=base", BASE_SOURCE),
        ("CN=root", STORE_SOURCE),
    }
    assert [each.sha256_fingerprint for each in found.excluded] == [name_of(leaf)[:-4]]


# Row 4: what is refused leaves no trace


@pytest.fixture
def filled(store: CertificateStore) -> CertificateStore:
    add(store, issue(ROOT.but(subject="guests")))
    add(store, issue(ROOT.but(subject="devices")), DEVICE)
    set_local(store, issue(ROOT.but(subject="local")))
    store.set_device_certificate(b"this device's")
    return store


REVOKED = issue(ROOT.but(subject="revoked"))
REFUSED = {
    "nothing": (b"", "not-pem"),
    "DER": (issue(ROOT).der, "not-pem"),
    "text": (b"not a certificate\n", "not-pem"),
    "key": (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not-pem"),
    "large": (b"\n" * (AUTHORITY_BYTES + 1), "authority-too-large"),
    "two": (bundle(issue(ROOT), issue(ROOT)), "authority-several"),
    "leaf": (issue(LEAF).pem, "not-a-ca"),
    "expired": (issue(ROOT.but(not_after=NOW - DAY)).pem, "certificate-expired"),
    "early": (issue(ROOT.but(not_before=NOW + DAY)).pem, "certificate-not-yet-valid"),
    "weak": (issue(ROOT, key=ec.generate_private_key(ec.SECP256K1())).pem, "weak-key"),
    "revoked": (REVOKED.pem, "certificate-revoked"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("way", ["guest", "device", "local"])
@pytest.mark.parametrize("given", ["empty", "filled"])
def test_row04_a_refused_ca_leaves_the_store_as_it_was(
    request: pytest.FixtureRequest, place: Path, case: str, way: str, given: str
) -> None:
    store = CertificateStore(place)
    if given == "empty":
        place.rmdir()  # not even the store's own directory is made
    else:
        request.getfixturevalue("filled")
    pem, expected = REFUSED[case]
    call = store.set_local if way == "local" else partial(store.add, Purpose(way))
    before = tree(place.parent)
    with pytest.raises(TrustRefusal) as caught:
        call(pem, at=NOW, revocations=Revocations(certificates=(REVOKED.der,)))
    assert caught.value.code == expected
    assert tree(place.parent) == before


def test_row04_a_refused_removal_leaves_the_store_as_it_was(filled: CertificateStore, place: Path) -> None:
    before = tree(place)
    for purpose in (GUEST, DEVICE):
        assert code(filled.remove, purpose, "0" * 64) == "authority-unknown"
    assert tree(place) == before


# Judged again at every load


@pytest.mark.parametrize(
    "change",
    [
        lambda pem, other: other,
        lambda pem, other: pem + other,
        lambda pem, other: pem + b"\n",
        lambda pem, other: pem[:-1],
        lambda pem, other: pem.replace(b"M", b"N", 1),
        lambda pem, other: b"",
        lambda pem, other: b"\n" * (AUTHORITY_BYTES + 1),
    ],
    ids=["another", "two", "longer", "shorter", "flipped", "empty", "large"],
)
def test_row04_a_damaged_file_is_no_anchor(
    store: CertificateStore, place: Path, change: Callable[[bytes, bytes], bytes]
) -> None:
    root, good, other = issue(ROOT), issue(ROOT.but(subject="good")), issue(ROOT.but(subject="other"))
    add(store, root)
    path = place / "ca" / name_of(root)
    path.write_bytes(change(root.pem, other.pem))
    assert code(anchors, store) == "no-anchor"
    add(store, good)
    found = anchors(store)
    assert [anchor.certificate for anchor in found.anchors] == [good.der]
    assert [entry.sha256 for entry in store.entries(GUEST)] == [name_of(good)[:-4]]
    for excluded in (*found.excluded, *store.damaged(GUEST)):
        assert excluded.sha256_fingerprint == path.stem
        assert excluded.reason.startswith("authority-file-damaged")
        assert path.name in excluded.reason
    assert store.damaged(DEVICE) == ()
    # Whose signer is refused then is told why.
    with pytest.raises(TrustRefusal) as caught:
        verify_chain(bundle(issue(LEAF, root)), found, at=NOW)
    assert "authority-file-damaged" in caught.value.evidence
    add(store, root)
    assert (store.damaged(GUEST), len(anchors(store).anchors)) == ((), 2)


def test_row04_a_file_put_there_by_hand_is_judged(store: CertificateStore, place: Path) -> None:
    (place / "ca").mkdir()
    for made in (issue(LEAF), issue(ROOT.but(purpose=CLIENT_AUTH)), issue(ROOT.but(not_after=NOW - DAY))):
        (place / "ca" / name_of(made)).write_bytes(made.pem)
    with pytest.raises(TrustRefusal) as caught:
        anchors(store)
    assert caught.value.code == "no-anchor"
    for reason in ("not-a-ca", "ca-purpose", "certificate-expired"):
        assert reason in caught.value.evidence


@PURPOSES
def test_time_and_revocation_are_looked_at_again(store: CertificateStore, purpose: Purpose) -> None:
    root, lasting = issue(ROOT), issue(ROOT.but(subject="lasting", not_after=NOW + 90 * DAY))
    add(store, root, purpose)
    add(store, lasting, purpose)
    later = anchors(store, purpose, at=NOW + 30 * DAY)
    revoked = anchors(store, purpose, revocations=Revocations(certificates=(root.der,)))
    for found, reason in ((later, "certificate-expired"), (revoked, "certificate-revoked")):
        assert [anchor.certificate for anchor in found.anchors] == [lasting.der]
        assert [entry.sha256_fingerprint for entry in found.excluded] == [name_of(root)[:-4]]
        assert found.excluded[0].reason.startswith(reason)
    assert revoked.revocations.certificates == (root.der,)
    assert len(store.entries(purpose)) == 2
    assert len(anchors(store, purpose).anchors) == 2


def test_a_damaged_local_ca_is_no_anchor(store: CertificateStore, place: Path) -> None:
    root = issue(ROOT)
    set_local(store, root)
    (place / LOCAL_CA).write_bytes(root.pem[:-1])
    assert code(anchors, store) == "no-anchor"
    assert [LOCAL_CA in each.reason for each in store.damaged(GUEST)] == [True]
    set_local(store, root)
    assert len(anchors(store).anchors) == 1


# Nothing is followed


def plant(path: Path, kind: str, target: Path) -> None:
    match kind:
        case "link":
            path.symlink_to(target)
        case "dangling":
            path.symlink_to(target.with_name("nowhere"))
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")


KINDS = pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory", "device"])


@KINDS
def test_row24_no_link_or_device_is_read(store: CertificateStore, place: Path, kind: str) -> None:
    outside = issue(ROOT)
    target = place.parent / "outside.pem"
    target.write_bytes(outside.pem)
    (place / "ca").mkdir()
    plant(place / "ca" / name_of(outside), kind, target)
    plant(place / LOCAL_CA, kind, target)
    plant(place / DEVICE_CERTIFICATE, kind, target)
    assert code(anchors, store) == "no-anchor"
    assert store.entries(GUEST) == ()
    assert len(store.damaged(GUEST)) == 2
    assert code(store.device_certificate) == "device-certificate-unreadable"
    before = target.read_bytes()
    if kind == "directory":
        assert code(store.remove, GUEST, name_of(outside)[:-4]) == "certificate-store-unwritable"
        assert code(add, store, outside) == "certificate-store-unwritable"
        return
    # Replacing is of the link itself.
    add(store, outside)
    set_local(store, issue(ROOT.but(subject="local")))
    store.set_device_certificate(b"this device's")
    assert target.read_bytes() == before
    assert all(path.is_file() and not path.is_symlink() for path in place.iterdir() if path.name != "ca")
    assert len(anchors(store).anchors) == 2


@KINDS
def test_row24_no_linked_folder_is_used(store: CertificateStore, place: Path, kind: str) -> None:
    outside = place.parent / "outside"
    outside.mkdir()
    root = issue(ROOT)
    (outside / name_of(root)).write_bytes(root.pem)
    if kind == "directory":
        (place / "ca").write_bytes(b"a file in the place of the folder")
    else:
        plant(place / "ca", kind, outside)
    before = tree(outside)
    other = issue(ROOT.but(subject="other"))
    calls: list[Callable[[], object]] = [
        lambda: anchors(store),
        lambda: store.entries(GUEST),
        lambda: add(store, other),
        lambda: store.remove(GUEST, name_of(root)[:-4]),
    ]
    for call in calls:
        assert code(call) == "certificate-store-unreadable"
    assert tree(outside) == before


def test_row24_no_linked_store_is_used(tmp_path: Path, place: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    store = CertificateStore(tmp_path / "link")
    assert code(add, store, issue(ROOT)) == "certificate-store-unreadable"
    assert code(store.device_certificate) == "certificate-store-unreadable"
    assert code(store.set_device_certificate, b"x") == "certificate-store-unreadable"
    assert list(place.iterdir()) == []


def test_foreign_names_are_no_anchors(store: CertificateStore, place: Path) -> None:
    root = issue(ROOT)
    folder = place / "ca"
    folder.mkdir()
    sha1 = hashlib.sha1(root.pem, usedforsecurity=False).hexdigest()  # as upstream names it
    for name in (sha1, "root.pem", name_of(root).upper(), f"{name_of(root)}.bak", "x\n\x1b[2J", "ä.pem"):
        (folder / name).write_bytes(root.pem)
    os.link(folder / "root.pem", os.fsencode(folder) + b"/\xff\xfe.pem")
    assert code(anchors, store) == "no-anchor"
    assert len(store.damaged(GUEST)) == 7
    assert all(each.reason.isascii() and each.reason.isprintable() for each in store.damaged(GUEST))
    assert code(store.remove, GUEST, sha1) == "authority-unknown"
    for number in range(100):
        (folder / f"{number}.pem").write_bytes(b"")
    assert len(store.damaged(GUEST)) == 8
    add(store, root)
    assert len(anchors(store).anchors) == 1


# Old or new


class Cut(BaseException):
    """The power is gone: nothing of ours may handle it."""


STEPS = ("open", "mkdir", "unlink", "fchmod", "write", "fsync", "rename")


@contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, number: int, failure: BaseException) -> Iterator[list[str]]:
    """Let every call that may change the disk fail from the one with that number on; note those before."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for step in STEPS:
            patch.setattr(os, step, failing(step, getattr(os, step), seen, number, failure))
        yield seen


def failing(
    step: str, original: Callable[..., Any], seen: list[str], number: int, failure: BaseException
) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if len(seen) >= number:
            raise failure
        seen.append(step)
        return original(*arguments, **named)

    return call


OLD, NEW = issue(ROOT.but(subject="old")), issue(ROOT.but(subject="new"))
CHANGES: dict[str, Callable[[CertificateStore], object]] = {
    "add": lambda store: add(store, NEW),
    "first of a purpose": lambda store: add(store, NEW, DEVICE),
    "local": lambda store: set_local(store, NEW),
    "device": lambda store: store.set_device_certificate(b"new"),
    "remove": lambda store: store.remove(GUEST, name_of(OLD)[:-4]),
}


def state(store: CertificateStore) -> tuple[object, ...]:
    return (store.entries(GUEST), store.entries(DEVICE), store.device_certificate())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["cut", "full"])
def test_row33_old_or_new_wherever_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, kind: str
) -> None:
    failure: BaseException = Cut() if kind == "cut" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    outcomes = []
    for number in range(100):
        place = tmp_path / str(number)
        store = CertificateStore(place)
        add(store, OLD)
        set_local(store, issue(ROOT.but(subject="local")))
        store.set_device_certificate(b"old")
        before = state(store)
        done = False
        with failing_at(monkeypatch, number, failure) as seen, suppress(Cut, StorageRefusal):
            CHANGES[change](store)
            done = True
        after = state(CertificateStore(place))
        assert (store.damaged(GUEST), store.damaged(DEVICE)) == ((), ())
        outcomes.append(after != before)
        if done:
            assert after != before
            break
        # What was cut off is no hindrance, and is gone after the next change.
        if after == before:
            CHANGES[change](store)
        CertificateStore(place).set_device_certificate(b"next")
        assert not [path for path in place.rglob("*") if path.name.startswith(".")]
    else:
        pytest.fail("it never got to its end")
    # Once it is new it stays new: the steps after the one that counts do not undo it.
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert len(seen) == len(outcomes) - 1
    assert {"remove": {"unlink", "fsync"}}.get(change, {"write", "fsync", "rename"}) <= set(seen)


def test_row33_the_harness_notices_a_write_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(path: Path, data: bytes, mode: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        os.write(fd, data)
        os.close(fd)

    monkeypatch.setattr("trustme_init.provisioning.folder.write_atomic", in_place)
    with pytest.raises(AssertionError):
        test_row33_old_or_new_wherever_it_stops(tmp_path, monkeypatch, "local", "cut")


def test_what_was_left_behind_is_ignored_and_cleaned_up(store: CertificateStore, place: Path) -> None:
    add(store, OLD)
    (place / "device_ca").mkdir()
    left = [
        *(place / folder / f".{name_of(NEW)}.new" for folder in FOLDERS.values()),
        *(place / f".{name}.new" for name in (LOCAL_CA, DEVICE_CERTIFICATE)),
    ]
    for path in left:
        path.write_bytes(NEW.pem[:100])
    assert (len(store.entries(GUEST)), store.damaged(GUEST), store.damaged(DEVICE)) == (1, (), ())
    assert anchors(store).excluded == ()
    assert all(path.exists() for path in left)
    add(store, issue(ROOT.but(subject="third")))
    assert not any(path.exists() for path in left)


def test_new_directories_are_durable_before_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CertificateStore(tmp_path / "tokens")
    with failing_at(monkeypatch, 100, Cut()) as seen:
        add(store, OLD)
    directories = ["mkdir", "open", "fsync", "mkdir", "fsync"]
    assert seen == [*directories, "open", "unlink", "open", "fchmod", "write", "fsync", "rename", "fsync"]
    with failing_at(monkeypatch, 100, Cut()) as seen:
        store.remove(GUEST, name_of(OLD)[:-4])
    assert seen == ["unlink", "fsync"]


def one_operator(place: Path, number: int) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    store = CertificateStore(place)
    for serial in range(1, 41):
        made = issue(ROOT.but(subject=f"{number}", serial=serial), key=key)
        with suppress(TrustRefusal):
            add(store, made)


def test_two_operators_at_once(store: CertificateStore, place: Path) -> None:
    context = multiprocessing.get_context("spawn")
    operators = [context.Process(target=one_operator, args=(place, number)) for number in range(2)]
    for operator in operators:
        operator.start()
    for operator in operators:
        operator.join(60)
        assert operator.exitcode == 0
    # 80 were offered; without the lock both would count what the other is about to write.
    assert len(store.entries(GUEST)) == AUTHORITY_LIMIT
    assert store.damaged(GUEST) == ()


# The device's own certificate


def test_the_devices_certificate(store: CertificateStore, place: Path) -> None:
    assert store.device_certificate() is None
    pem = issue(LEAF).pem
    store.set_device_certificate(pem)
    assert store.device_certificate() == pem
    assert stat.S_IMODE((place / DEVICE_CERTIFICATE).stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="0 bytes"):
        store.set_device_certificate(b"")
    with pytest.raises(ValueError, match="no certificate chain"):
        store.set_device_certificate(b"x" * (BUNDLE_LIMIT + 1))
    assert store.device_certificate() == pem
    (place / DEVICE_CERTIFICATE).write_bytes(b"x" * (BUNDLE_LIMIT + 1))
    assert code(store.device_certificate) == "device-certificate-unreadable"


def test_a_store_that_is_not_there_yet(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path / "tokens")
    assert store.device_certificate() is None
    assert store.entries(DEVICE) == ()
    assert not (tmp_path / "tokens").exists()
    add(store, issue(ROOT.but(purpose=CODE_SIGNING)))
    assert stat.S_IMODE((tmp_path / "tokens").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "tokens/ca").stat().st_mode) == 0o700
    lost = CertificateStore(tmp_path / "nowhere/tokens")
    assert code(add, lost, issue(ROOT)) == "certificate-store-unwritable"


def test_a_subject_cannot_write_to_the_console(store: CertificateStore) -> None:
    assert add(store, issue(ROOT.but(subject="a\x1b[2Jb\nc"))).subject.isprintable()
    assert store.entries(GUEST)[0].subject.isprintable()


def test_a_stored_certificate_is_what_openssl_would_read(store: CertificateStore, place: Path) -> None:
    made = issue(ROOT)
    add(store, made)
    assert x509.load_pem_x509_certificate((place / "ca" / name_of(made)).read_bytes()) == made.certificate
