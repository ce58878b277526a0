# SPDX-License-Identifier: Apache-2.0
"""The certificate store on a file system that is really full, or read-only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.trust.pki import NOW, ROOT, issue
from trustme_init.errors import StorageRefusal, TrustRefusal
from trustme_init.linux.mount import MS_RDONLY, MS_REMOUNT, mount, umount
from trustme_init.provisioning.certstore import AUTHORITY_LIMIT, CertificateStore
from trustme_init.trust.anchors import Purpose, Revocations

pytestmark = pytest.mark.root
SIZE = 64 * 1024
NONE = Revocations()
OLD, NEW = issue(ROOT.but(subject="old")), issue(ROOT.but(subject="new"))
CHANGES: dict[str, Callable[[CertificateStore], object]] = {
    "add": lambda store: store.add(Purpose.GUEST, NEW.pem, at=NOW, revocations=NONE),
    "first of a purpose": lambda store: store.add(Purpose.DEVICE, NEW.pem, at=NOW, revocations=NONE),
    "local": lambda store: store.set_local(NEW.pem, at=NOW, revocations=NONE),
    "device": lambda store: store.set_device_certificate(NEW.pem),
}


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    mount("none", str(tmp_path), "tmpfs", 0, f"size={SIZE}")
    try:
        yield tmp_path
    finally:
        umount(str(tmp_path))


def content(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def filled(place: Path) -> CertificateStore:
    store = CertificateStore(place / "tokens")
    store.add(Purpose.GUEST, OLD.pem, at=NOW, revocations=NONE)
    store.set_local(issue(ROOT.but(subject="local")).pem, at=NOW, revocations=NONE)
    store.set_device_certificate(OLD.pem)
    return store


@pytest.mark.parametrize("change", CHANGES)
def test_row33_a_full_disk_leaves_what_was_there(small: Path, change: str) -> None:
    store = filled(small)
    with suppress(OSError), (small / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(512))
    before = content(small)
    with pytest.raises(StorageRefusal) as caught:
        CHANGES[change](store)
    assert (caught.value.code, "No space left" in caught.value.evidence) == (
        "certificate-store-unwritable",
        True,
    )
    assert content(small) == before
    (small / "ballast").unlink()
    CHANGES[change](store)
    assert NEW.pem in content(small).values()


@pytest.mark.parametrize("change", CHANGES)
def test_a_volume_that_became_read_only(small: Path, change: str) -> None:
    store = filled(small)
    before = content(small)
    mount("none", str(small), None, MS_REMOUNT | MS_RDONLY)
    with pytest.raises(StorageRefusal) as caught:
        CHANGES[change](store)
    assert caught.value.code == "certificate-store-unwritable"
    assert content(small) == before
    assert len(store.entries(Purpose.GUEST)) == 2


def test_a_thousand_cas(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())

    def offer(number: int, purpose: Purpose = Purpose.GUEST) -> None:
        made = issue(ROOT.but(subject=f"CA {number}", serial=number + 1), key=key)
        store.add(purpose, made.pem, at=NOW, revocations=NONE)

    for number in range(AUTHORITY_LIMIT):
        offer(number)
    before = content(tmp_path)
    for number in range(AUTHORITY_LIMIT, 1000):
        with pytest.raises(TrustRefusal) as caught:
            offer(number)
        assert caught.value.code == "too-many-authorities"
    assert content(tmp_path) == before
    anchors = store.anchors(Purpose.GUEST, revocations=NONE, at=NOW)
    assert len(store.entries(Purpose.GUEST)) == len(anchors.anchors) == AUTHORITY_LIMIT
    store.add(Purpose.DEVICE, issue(ROOT.but(subject="devices")).pem, at=NOW, revocations=NONE)
    store.remove(Purpose.GUEST, store.entries(Purpose.GUEST)[0].sha256)
    offer(1000)
