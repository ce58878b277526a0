# SPDX-License-Identifier: Apache-2.0
"""The store of GuestOSes: what gets in, what stays out, and what a power cut leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration import power
from tests.integration import store_kit as kit
from tests.unit.trust import pki
from trustme_init.errors import Refusal, StorageRefusal, TrustRefusal
from trustme_init.guestos import floors, staging
from trustme_init.guestos.check import check_file
from trustme_init.guestos.operations import GuestOsOperations
from trustme_init.guestos.plan import ImageFile, Plan, plan, tree_size
from trustme_init.guestos.staging import Staging
from trustme_init.guestos.store import GuestOsStore, SignedFiles, list_names
from trustme_init.linux.files import statfs
from trustme_init.trust.selection import GuestOsId


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as caught:
        work()
    assert caught.value.remedy
    return caught.value.code


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "cml"
    path.mkdir()
    return path


@pytest.fixture
def vault(home: Path) -> GuestOsOperations:
    return kit.operations(home)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def names(home: Path) -> list[str]:
    return listed(home / "operatingsystems")


# What is installed


def test_installed_versions_lie_side_by_side_in_the_interop_layout(
    vault: GuestOsOperations, home: Path
) -> None:
    first, second = kit.make(1), kit.make(2, hashed={"extra": b"12345"})
    for made in (first, second):
        kit.install(vault, made)
    assert names(home) == [
        *("exampleos-1", "exampleos-1.cert", "exampleos-1.conf", "exampleos-1.sig"),
        *("exampleos-2", "exampleos-2.cert", "exampleos-2.conf", "exampleos-2.sig"),
    ]
    store = GuestOsStore(home)
    assert store.newest(kit.NAME) == GuestOsId(kit.NAME, 2)
    assert store.newest("another") is None
    assert store.read(GuestOsId(kit.NAME, 1)) == first.signed
    folder = store.directory(GuestOsId(kit.NAME, 2))
    try:
        assert list_names(folder) == ["extra.img", "root.hash.img", "root.img"]
    finally:
        os.close(folder)
    told = vault.list()
    assert [(each["version"], each["why"]) for each in told["guestos"]] == [(1, ""), (2, "")]
    assert all(each["size"] >= kit.BLOCK for each in told["guestos"])
    assert vault.read(GuestOsId(kit.NAME, 2)).guest_os.version == 2


def test_what_lies_in_the_store_is_judged_at_every_use(vault: GuestOsOperations, home: Path) -> None:
    kit.install(vault, kit.make(1))
    config = home / "operatingsystems/exampleos-1.conf"
    config.write_bytes(config.read_bytes() + b"\n")
    assert [each["why"] for each in vault.list()["guestos"]] == ["bad-signature"]
    assert refused(lambda: vault.config("exampleos-1")) == "bad-signature"
    for stem in ("exampleos-2", "exampleos", "../exampleos-1", ""):
        assert refused(lambda stem=stem: vault.config(stem)) == "guestos-missing"  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "huge"])
def test_row24_the_store_follows_no_link_and_waits_for_no_pipe(
    vault: GuestOsOperations, home: Path, kind: str
) -> None:
    kit.install(vault, kit.make(1))
    path = home / "operatingsystems/exampleos-1.sig"
    content = path.read_bytes()
    path.unlink()
    match kind:
        case "link":
            (home / "elsewhere").write_bytes(content)
            path.symlink_to(home / "elsewhere")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.write_bytes(bytes(1024 * 1024))
    assert refused(lambda: vault.config("exampleos-1")) == "guestos-unreadable"
    shutil.rmtree(home / "operatingsystems")
    (home / "other").mkdir()
    (home / "operatingsystems").symlink_to(home / "other")
    assert refused(vault.store.installed) == "guestos-unreadable"


# What is refused leaves nothing


def flips(data: bytes) -> list[bytes]:
    return [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]


@pytest.mark.parametrize("in_stage", [False, True])
def test_row2_row4_every_flipped_byte_of_a_configuration_is_refused_and_nothing_is_stored(
    vault: GuestOsOperations, home: Path, *, in_stage: bool
) -> None:
    kit.install(vault, kit.make(1))
    before = kit.snapshot(home)
    made = kit.make(2)
    for config in flips(made.signed.config):
        files = replace(made.signed, config=config)
        with pytest.raises(TrustRefusal) as caught:
            vault.stage(files, repair=False) if in_stage else vault.examine(files)
        assert caught.value.code == "bad-signature"
    assert kit.snapshot(home) == before


def broken_triples() -> dict[str, SignedFiles]:
    one, other = kit.make(2).signed, kit.make(3).signed
    stranger = pki.issue(pki.LEAF, pki.issue(pki.ROOT.but(subject="stranger")))
    signature, chain = kit.sign(one.config, stranger)
    parts = ("config", "signature", "certificate")
    return {
        **{f"no {part}": replace(one, **{part: b""}) for part in parts},
        **{f"{part} twice": replace(one, **{part: getattr(one, part) * 2}) for part in parts},
        "config of another": replace(one, config=other.config),
        "signature of another": replace(one, signature=other.signature),
        "signature and certificate swapped": replace(
            one, signature=one.certificate, certificate=one.signature
        ),
        "config and signature swapped": replace(one, config=one.signature, signature=one.config),
        "a stranger's": SignedFiles(one.config, signature, chain),
        "a stranger's signature": replace(one, signature=signature),
        "a stranger's certificate": replace(one, certificate=chain),
        "the anchor for the leaf": replace(one, certificate=kit.authority().pem),
        "a configuration that is too long": replace(one, config=b"#" * (256 * 1024 + 1)),
    }


@pytest.mark.parametrize("case", sorted(broken_triples()))
def test_row3_row4_dropped_empty_doubled_and_swapped_parts_are_refused(
    vault: GuestOsOperations, home: Path, case: str
) -> None:
    kit.install(vault, kit.make(1))
    before = kit.snapshot(home)
    files = broken_triples()[case]
    with pytest.raises(TrustRefusal):
        vault.examine(files)
    with pytest.raises(TrustRefusal):
        vault.stage(files, repair=False)
    assert kit.snapshot(home) == before


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**63, 2**64 - 1])
def test_row2_sizes_beyond_any_disk_are_refused_and_counted_right(
    vault: GuestOsOperations, home: Path, size: int
) -> None:
    digest = "0" * 64
    extra = (
        f'mounts {{ image_file: "x" mount_point: "/x" fs_type: "none" mount_type: STORE_ONLY'
        f' image_size: {size} image_sha2_256: "{digest}" }}'
    )
    made = kit.make(1, more=extra)
    code = refused(lambda: vault.stage(made.signed, repair=False)) if size >= 2**40 else ""
    if size > 2**40:
        assert code == "bad-config"
    elif size == 2**40:
        assert code == "guestos-no-space"
    else:
        needed = Plan.from_dict(vault.stage(made.signed, repair=False))
        assert next(file.size for file in needed.files if file.name == "x.img") == size
    if code:
        assert not (home / "operatingsystems").exists()


def test_what_does_not_fit_is_refused_before_anything_is_stored(
    vault: GuestOsOperations, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.install(vault, kit.make(1))
    before = kit.snapshot(home)
    made = kit.make(2)
    room = statfs(home)
    needed = plan(vault.verified(made.signed, None).config).size + staging.RESERVE
    monkeypatch.setattr(staging, "statfs", lambda _path: room._replace(available=needed - 1))
    assert refused(lambda: vault.stage(made.signed, repair=False)) == "guestos-no-space"
    assert kit.snapshot(home) == before
    monkeypatch.setattr(staging, "statfs", lambda _path: room._replace(available=needed))
    vault.stage(made.signed, repair=False)


def test_other_hardware_and_the_cores_name_are_refused(vault: GuestOsOperations, home: Path) -> None:
    assert refused(lambda: vault.examine(kit.make(1, hardware="arm").signed)) == "wrong-hardware"
    assert refused(lambda: vault.examine(kit.make(1, name=kit.CORE).signed)) == "guestos-is-core"
    assert refused(lambda: vault.remove(kit.CORE, ())) == "guestos-is-core"
    two = 'mounts_setup { image_file: "root" mount_point: "/" fs_type: "squashfs" mount_type: SHARED'
    ambiguous = kit.make(1, more=f'{two} image_size: 4096 image_verity_sha256: "{"0" * 64}" }}')
    assert refused(lambda: vault.stage(ambiguous.signed, repair=False)) == "image-ambiguous"
    assert not (home / "operatingsystems").exists()


def test_an_unfinished_image_is_not_published(vault: GuestOsOperations, home: Path) -> None:
    made = kit.make(1)
    vault.stage(made.signed, repair=False)
    images = home / "operatingsystems/.staging-exampleos-1/images"
    for name, data in made.files.items():
        (images / name).write_bytes(data)
    (images / "root.img").write_bytes(made.files["root.img"][:-1])
    assert refused(lambda: vault.publish("exampleos-1")) == "guestos-incomplete"
    (images / "root.img").unlink()
    assert refused(lambda: vault.publish("exampleos-1")) == "guestos-unwritable"
    assert vault.store.installed() == ()
    for stem in ("exampleos-2", "../x-1", "x"):
        assert refused(lambda stem=stem: vault.publish(stem)) == "guestos-missing"  # type: ignore[misc]


def test_what_is_published_is_judged_again(vault: GuestOsOperations, home: Path) -> None:
    made = kit.make(1)
    vault.stage(made.signed, repair=False)
    staged = home / "operatingsystems/.staging-exampleos-1"
    for name, data in made.files.items():
        (staged / "images" / name).write_bytes(data)
    (staged / "config").write_bytes(made.signed.config + b"\n")
    assert refused(lambda: vault.publish("exampleos-1")) == "bad-signature"
    other = kit.make(2).signed
    for part in ("config", "signature", "certificate"):
        (staged / part).write_bytes(getattr(other, part))
    assert refused(lambda: vault.publish("exampleos-1")) == "guestos-missing"
    assert vault.store.installed() == ()
    assert not (home / floors.FILE).exists()


# Versions do not go down


def test_row32_a_floor_outlives_removal_and_a_new_push(vault: GuestOsOperations, home: Path) -> None:
    for version in (3, 7):
        kit.install(vault, kit.make(version))
    assert refused(lambda: vault.stage(kit.make(3).signed, repair=False)) == "guestos-rolled-back"
    vault.remove(kit.NAME, ())
    assert vault.store.installed() == ()
    before = kit.snapshot(home)
    for version in (1, 3, 6):
        assert refused(lambda v=version: vault.examine(kit.make(v).signed)) == "guestos-rolled-back"  # type: ignore[misc]
    another = kit.make(7, verity={"root": kit.content(6)})
    assert refused(lambda: vault.examine(another.signed)) == "guestos-version-taken"
    assert kit.snapshot(home) == before
    kit.install(vault, kit.make(7))
    kit.install(vault, kit.make(1, name="another"))
    kit.install(vault, kit.make(2**64 - 1))
    assert refused(lambda: vault.examine(kit.make(8).signed)) == "guestos-rolled-back"
    shutil.rmtree(home / "operatingsystems")  # as wiping the device does
    assert refused(lambda: vault.examine(kit.make(8).signed)) == "guestos-rolled-back"


def test_the_floor_rises_only_with_what_is_published(vault: GuestOsOperations) -> None:
    vault.stage(kit.make(9).signed, repair=False)
    vault.discard("exampleos-9")
    kit.install(vault, kit.make(3))
    assert vault.store.newest(kit.NAME) == GuestOsId(kit.NAME, 3)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2, "floors": {}}',
        b'{"version": 1, "floors": {"exampleos": {"version": -1, "config_sha256": "%s"}}}' % (b"0" * 64),
        b'{"version": 1, "floors": {"exampleos": {"version": 1, "config_sha256": "0"}}}',
        b'{"version": 1, "floors": {"../x": {"version": 1, "config_sha256": "%s"}}}' % (b"0" * 64),
        b'{"version": 1, "floors": {"exampleos": {"version": true, "config_sha256": "%s"}}}' % (b"0" * 64),
        b"[" * 100_000,
    ],
)
def test_damaged_floors_stop_installations_and_nothing_else(
    vault: GuestOsOperations, home: Path, text: bytes
) -> None:
    kit.install(vault, kit.make(1))
    (home / floors.FILE).write_bytes(text)
    assert refused(lambda: vault.examine(kit.make(2).signed)) == "guestos-floors-damaged"
    assert [each["why"] for each in vault.list()["guestos"]] == [""]


def test_a_version_is_one_content(vault: GuestOsOperations) -> None:
    kit.install(vault, kit.make(1))
    kit.install(vault, kit.make(2))
    another = kit.make(1, verity={"root": kit.content(6)})
    assert refused(lambda: vault.examine(another.signed)) == "guestos-rolled-back"
    assert refused(lambda: vault.examine(kit.make(2, hashed={"x": b"1"}).signed)) == "guestos-version-taken"


# The same again


def test_the_same_push_again_changes_nothing(vault: GuestOsOperations, home: Path) -> None:
    made = kit.make(1)
    kit.install(vault, made)
    before = kit.snapshot(home)
    assert vault.stage(made.signed, repair=False)["installed"] is True
    assert kit.snapshot(home) == before


def test_a_damaged_installation_is_repaired_by_the_same_push(vault: GuestOsOperations, home: Path) -> None:
    made = kit.make(1)
    kit.install(vault, made)
    (home / "operatingsystems/exampleos-1/root.img").write_bytes(kit.content(5, "damaged"))
    assert vault.stage(made.signed, repair=True)["installed"] is False
    images = home / "operatingsystems/.staging-exampleos-1/images"
    assert listed(images) == []
    for name, data in made.files.items():
        (images / name).write_bytes(data)
    vault.publish(made.stem)
    assert (home / "operatingsystems/exampleos-1/root.img").read_bytes() == made.files["root.img"]


def test_a_version_signed_anew_keeps_its_images(home: Path) -> None:
    judge = kit.Judge()
    vault = kit.operations(home, judge=judge)
    made = kit.make(1)
    kit.install(vault, made)
    inode = (home / "operatingsystems/exampleos-1/root.img").stat().st_ino
    new_ca = pki.issue(pki.ROOT.but(subject="new"))
    judge.authorities = (new_ca,)
    assert [each["why"] for each in vault.list()["guestos"]] != [""]
    new = SignedFiles(made.signed.config, *kit.sign(made.signed.config, pki.issue(pki.LEAF, new_ca)))
    assert vault.stage(new, repair=False)["installed"] is False
    images = home / "operatingsystems/.staging-exampleos-1/images"
    assert listed(images) == ["root.hash.img", "root.img"]
    vault.publish("exampleos-1")
    assert (home / "operatingsystems/exampleos-1/root.img").stat().st_ino == inode
    assert vault.store.read(GuestOsId(kit.NAME, 1)) == new
    assert [each["why"] for each in vault.list()["guestos"]] == [""]


def test_what_an_earlier_attempt_fetched_stays_and_nothing_foreign_does(
    vault: GuestOsOperations, home: Path
) -> None:
    made = kit.make(1)
    vault.stage(made.signed, repair=False)
    images = home / "operatingsystems/.staging-exampleos-1/images"
    (images / "root.img").write_bytes(made.files["root.img"][:5000])
    (images / "root.img.etag").write_bytes(b'"x"')
    (images / "root.hash.img").write_bytes(bytes(len(made.files["root.hash.img"]) + 1))
    (images / "foreign").write_bytes(b"x")
    (images / "folder").mkdir()
    (images / "link").symlink_to("/etc/passwd")
    vault.stage(made.signed, repair=False)
    assert listed(images) == ["root.img", "root.img.etag"]
    assert (images / "root.img").stat().st_size == 5000
    # Another configuration of the same version begins anew, and so does another version.
    vault.stage(kit.make(1, hashed={"x": b"1"}).signed, repair=False)
    assert listed(images) == []
    vault.stage(kit.make(2).signed, repair=False)
    assert names(home) == [".staging-exampleos-2"]


# Removing


def test_what_a_container_needs_is_not_removed(home: Path) -> None:
    users: list[tuple[str, int | None]] = []
    vault = kit.operations(home, lambda: users)
    for version in (1, 2):
        kit.install(vault, kit.make(version))
    for user in ((kit.NAME, 1), (kit.NAME, None), (kit.NAME, 5)):
        users[:] = [user]
        assert refused(lambda: vault.remove(kit.NAME, ())) == "guestos-in-use"
    users[:] = [("another", None)]
    assert refused(lambda: vault.remove(kit.NAME, ["exampleos-1"])) == "guestos-in-use"
    assert len(vault.store.installed()) == 2
    vault.stage(kit.make(3).signed, repair=False)
    assert vault.remove(kit.NAME, ["another-1"])["removed"] == ["exampleos-1", "exampleos-2"]
    assert names(home) == []
    assert refused(lambda: vault.remove(kit.NAME, ())) == "guestos-missing"


def test_tidying_keeps_the_newest_good_version_and_what_is_used(home: Path) -> None:
    users: list[tuple[str, int | None]] = [(kit.NAME, 2)]
    vault = kit.operations(home, lambda: users)
    for version in range(1, 6):
        kit.install(vault, kit.make(version))
    kit.install(vault, kit.make(1, name="another"))
    (home / "operatingsystems/exampleos-5.sig").write_bytes(b"damaged")
    assert vault.tidy(["exampleos-1"])["removed"] == ["exampleos-3"]
    kept = [each.guest_os.stem for each in vault.store.installed()]
    assert kept == ["another-1", "exampleos-1", "exampleos-2", "exampleos-4", "exampleos-5"]
    assert vault.tidy(["exampleos-1"])["removed"] == []


def test_tidying_without_an_anchor_removes_no_version(home: Path) -> None:
    judge = kit.Judge()
    vault = kit.operations(home, judge=judge)
    for version in (1, 2):
        kit.install(vault, kit.make(version))
    judge.authorities = ()
    assert vault.tidy(())["removed"] == []
    assert len(vault.store.installed()) == 2


def test_tidying_removes_left_over_parts_and_stagings_that_lead_nowhere(
    vault: GuestOsOperations, home: Path
) -> None:
    kit.install(vault, kit.make(4))
    vault.stage(kit.make(1, name="another").signed, repair=False)
    store = home / "operatingsystems"
    (store / "exampleos-9").mkdir()
    (store / "exampleos-9/root.img").write_bytes(b"x")
    (store / "exampleos-8.sig").write_bytes(b"x")
    (store / "Not Ours").write_bytes(b"x")
    (store / ".staging-other-1").mkdir()
    shutil.copytree(store / ".staging-another-1", store / ".staging-exampleos-3")
    vault.tidy(())
    assert names(home) == [
        *(".staging-another-1", "Not Ours"),
        *("exampleos-4", "exampleos-4.cert", "exampleos-4.conf", "exampleos-4.sig"),
    ]


# Power cuts and a full disk


def work(home: Path, what: str) -> Callable[[], object]:
    made = kit.make(2)

    def do() -> None:
        vault = kit.operations(home)
        match what:
            case "install":
                kit.install(vault, made)
            case "sign anew":
                # The old signature is worth nothing any more; version 1 is already there.
                new = kit.make(1, signer=lambda config: kit.sign(config, NEW_LEAF))
                kit.install(kit.operations(home, judge=kit.Judge((NEW_CA,))), new)
            case "remove":
                vault.remove(kit.NAME, ())
            case _:
                vault.tidy(())

    return do


NEW_CA = pki.issue(pki.ROOT.but(subject="new"))
NEW_LEAF = pki.issue(pki.LEAF, NEW_CA)


def usable(home: Path) -> dict[int, str]:
    """Return the versions that every check lets pass, images included, by the CA that vouches for them."""
    found = {}
    for ca in (kit.authority(), NEW_CA):
        vault = kit.operations(home, judge=kit.Judge((ca,)))
        for each in vault.store.installed():
            try:
                verified = vault.read(each.guest_os)
            except TrustRefusal:
                continue
            folder = vault.store.directory(each.guest_os)
            for file in plan(verified.config).files:
                assert os.stat(file.name, dir_fd=folder).st_size == file.size, each
            data, tree = (os.open(name, os.O_RDONLY, dir_fd=folder) for name in ("root.img", "root.hash.img"))
            file = next(file for file in plan(verified.config).files if file.name == "root.img")
            check_file(file, data, tree, lambda _read: None)
            for fd in (folder, data, tree):
                os.close(fd)
            found[each.guest_os.version] = ca.certificate.subject.rfc4514_string()
    return found


@pytest.mark.parametrize("what", ["install", "sign anew", "remove", "tidy"])
def test_a_power_cut_at_any_effect_leaves_the_old_or_the_new(tmp_path: Path, what: str) -> None:
    def fresh(name: str) -> Path:
        home = tmp_path / name / "cml"
        shutil.copytree(tmp_path / "before", home)
        return home

    (tmp_path / "before").mkdir()
    vault = kit.operations(tmp_path / "before")
    kit.install(vault, kit.make(1))
    if what == "tidy":
        kit.install(vault, kit.make(2))
    old = usable(tmp_path / "before")
    whole = fresh("whole")
    outcome = power.run(work(whole, what), whole).outcome
    assert outcome.ended == "returned", outcome.text
    new = usable(whole)
    assert new != old
    # Between two versions of a signature, of which one is good by no anchor, there may be none.
    states = [old, new, {}] if what == "sign anew" else [old, new]
    partly = [{1: old[1]}] if what in ("remove", "tidy") else []
    # Once the new one is there, nobody needs the old one.
    tidied = [{2: new[2]}] if what == "install" else []
    seen: set[object] = set()
    for cut in range(len(outcome.effects) + 1):
        home = fresh(f"cut-{cut}")
        run = power.run(work(home, what), home, cut=cut)
        for survivor in run.volume.survivors():
            if survivor.made_by in seen:
                continue
            seen.add(survivor.made_by)
            disk = tmp_path / "disk"
            shutil.rmtree(disk, ignore_errors=True)
            disk.mkdir()
            survivor.put(disk)
            assert usable(disk) in states + partly, (cut, survivor.how)
            ca = (NEW_CA,) if what == "sign anew" else (kit.authority(),)
            kit.operations(disk, judge=kit.Judge(ca)).tidy(())
            assert usable(disk) in states + partly + tidied, (cut, survivor.how)
            if what == "install" and 2 in usable(disk):
                assert refused(lambda: kit.operations(disk).examine(kit.make(1).signed)) == (  # noqa: B023
                    "guestos-rolled-back"
                )
            # Whatever was left, the same work comes to its end.
            work(disk, what if what != "remove" else "tidy")()
            if what != "remove":
                assert usable(disk) in [new, *tidied], (cut, survivor.how)
        shutil.rmtree(home.parent)
    assert len(seen) > 5


def test_a_full_disk_at_any_effect_is_a_named_refusal(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    kit.install(kit.operations(before), kit.make(1))
    old = usable(before)
    count = 0
    while True:
        home = tmp_path / f"full-{count}"
        shutil.copytree(before, home)
        made = kit.make(2)
        vault = kit.operations(home)

        def do() -> None:
            vault.stage(made.signed, repair=False)  # noqa: B023
            # Images come from another process, which has a refusal of its own for a full disk.
            vault.publish(made.stem)  # noqa: B023

        outcome = power.run(do, home, full_from=count).outcome
        if outcome.code == "guestos-unwritable" and "No such file" in outcome.text:
            break  # there was room for all; only the images are missing
        assert outcome.code == "guestos-unwritable", outcome
        assert usable(home) == old
        count += 1
    assert count > 5


# What files are worth


def opened(path: Path, data: bytes) -> int:
    path.write_bytes(data)
    return os.open(path, os.O_RDONLY)


def judged(tmp_path: Path, file: ImageFile, data: bytes, tree: bytes | None) -> str:
    fds = [opened(tmp_path / "data", data)]
    if tree is not None:
        fds.append(opened(tmp_path / "tree", tree))
    counted: list[int] = []
    try:
        check_file(file, fds[0], fds[1] if tree is not None else None, counted.append)
    except TrustRefusal as refusal:
        return refusal.code
    finally:
        for fd in fds:
            os.close(fd)
    assert sum(counted) == file.size
    return ""


def verity_file(data: bytes, *, salted: bool = True) -> ImageFile:
    _, root_hash, salt = kit.tree(data)
    return ImageFile("root.img", len(data), "", root_hash, salt if salted else None, "root.hash.img")


@pytest.mark.parametrize("blocks", [1, 2, 127, 128, 129, 128 * 128, 128 * 128 + 1])
@pytest.mark.parametrize("salted", [False, True])
def test_hash_trees_of_every_depth_are_as_veritysetup_makes_them(
    tmp_path: Path, blocks: int, *, salted: bool
) -> None:
    data = kit.content(blocks)
    tree, _, _ = kit.tree(data)
    assert len(tree) == tree_size(len(data))
    assert judged(tmp_path, verity_file(data, salted=salted), data, tree) == ""
    wrong = bytearray(data)
    wrong[-1] ^= 1
    assert judged(tmp_path, verity_file(data, salted=salted), bytes(wrong), tree) == "verity-mismatch"


def test_row2_a_flipped_bit_in_any_block_of_image_or_tree_is_found(tmp_path: Path) -> None:
    data = kit.content(300)
    tree, _, _ = kit.tree(data)
    file = verity_file(data)
    for block in range(300):
        wrong = bytearray(data)
        wrong[block * kit.BLOCK + block] ^= 1
        assert judged(tmp_path, file, bytes(wrong), tree) == "verity-mismatch"
    for block in range(1, len(tree) // kit.BLOCK):
        for offset in (0, kit.BLOCK - 1):  # hashes, and the zeros after them
            wrong = bytearray(tree)
            wrong[block * kit.BLOCK + offset] ^= 1
            assert judged(tmp_path, file, data, bytes(wrong)) == "verity-mismatch"


def test_sizes_and_plain_hashes(tmp_path: Path) -> None:
    data = kit.content(3)
    tree, _, _ = kit.tree(data)
    file = verity_file(data)
    for wrong in (data[:-1], data + b"x", b"", data + bytes(kit.BLOCK)):
        assert judged(tmp_path, file, wrong, tree) == "image-size-mismatch"
    for wrong in (tree[:-1], tree + b"x", b""):
        assert judged(tmp_path, file, data, wrong) == "image-size-mismatch"
    both = replace(file, sha256="0" * 64)
    assert judged(tmp_path, both, data, tree) == "image-hash-mismatch"
    extra = ImageFile("x.img", 5, "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")
    assert judged(tmp_path, extra, b"hello", None) == ""
    assert judged(tmp_path, extra, b"Hello", None) == "image-hash-mismatch"
    assert judged(tmp_path, replace(file, salt=None), data, bytes(len(tree))) == "bad-superblock"


def test_the_floors_are_readable_by_people(vault: GuestOsOperations, home: Path) -> None:
    made = kit.make(5)
    kit.install(vault, made)
    document = json.loads((home / floors.FILE).read_bytes())
    assert document["floors"][kit.NAME]["version"] == 5
    assert (home / floors.FILE).stat().st_mode & 0o777 == 0o600


def test_a_store_that_cannot_be_made_is_a_refusal(tmp_path: Path) -> None:
    store = GuestOsStore(tmp_path / "missing")
    assert store.installed() == ()
    assert Staging(store).staged() == ()
    with pytest.raises(StorageRefusal) as caught:
        store.make()
    assert caught.value.code == "guestos-unwritable"


def test_looking_and_tidying_make_no_store(vault: GuestOsOperations, home: Path) -> None:
    assert vault.list() == {"guestos": [], "staged": []}
    assert vault.tidy(())["removed"] == []
    vault.discard("exampleos-1")
    assert refused(lambda: vault.remove(kit.NAME, ())) == "guestos-missing"
    assert kit.snapshot(home) == {}
