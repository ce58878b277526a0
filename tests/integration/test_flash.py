# SPDX-License-Identifier: Apache-2.0
"""`trustme flash` on real loop devices: what ends up on the medium, and everything it refuses."""

from __future__ import annotations

import fcntl
import io
import json
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import pytest

from tests.integration.disks import MIB, STORE_FIRST, STORE_MIB, make_disk, run
from tests.integration.loopblock import LoopBlockLayer
from trustme_init.errors import StorageRefusal
from trustme_init.linux import block, loop
from trustme_init.linux.mount import MNT_DETACH, umount
from trustme_init.machine import Machine
from trustme_init.storage import layout, volumes
from trustme_init.storage.volumes import PlainExt4DataVolume, find_store
from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.flash import bmap, source, write
from trustme_tools.flash.target import Target

pytestmark = pytest.mark.root

IMAGE_MIB = 48
CARD_MIB = 64
LOOP_SET_CAPACITY = 0x4C07
Answer = dict[str, Any]


class Card:
    """A card in its reader: a loop device over a file, full of what an earlier owner left."""

    def __init__(self, medium: Path, *, size_mib: int = CARD_MIB, fill: bool = True, **options: Any) -> None:
        self.medium = medium
        with medium.open("wb") as file:
            file.truncate(size_mib * MIB)
            for _ in range(size_mib * fill):
                file.write(b"\xff" * MIB)
        fd = os.open(medium, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.loop = loop.attach(fd, read_only=False, **options)
        finally:
            os.close(fd)

    @property
    def node(self) -> Path:
        return self.loop.path

    def forbid_discard(self) -> None:
        """Be like the many cards that cannot forget: a discard would leave zeros here."""
        Path(f"/sys/block/{self.node.name}/queue/discard_max_bytes").write_text("0")

    @property
    def untouched(self) -> bool:
        data = self.medium.read_bytes()
        return data.count(0xFF) == len(data)

    @property
    def has_table(self) -> bool:
        data = self.medium.read_bytes()
        return b"EFI PART" in data

    def close(self) -> None:
        self.loop.close()


@pytest.fixture
def cards(tmp_path: Path) -> Iterator[Callable[..., Card]]:
    made: list[Card] = []

    def make(**options: Any) -> Card:
        made.append(Card(tmp_path / f"medium-{len(made)}", **options))
        return made[-1]

    yield make
    for card in made:
        card.close()
    backing = [entry.read_text() for entry in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert not [text for text in backing if str(tmp_path) in text]


@pytest.fixture
def card(cards: Callable[..., Card]) -> Card:
    return cards()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small image with the partitions of ours."""
    return make_disk(tmp_path / "image.img", size_mib=IMAGE_MIB)


@pytest.fixture
def flash(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Answer]]:
    """Run `trustme flash --json`; returns the exit code and the result or the error."""

    def call(*words: str | Path, yes: bool = True) -> tuple[int, Answer]:
        capsys.readouterr()
        code = main.main(["flash", "--json", *(["--yes"] if yes else []), *map(str, words)])
        answer = json.loads(capsys.readouterr().out)
        return code, answer.get("result") or answer["error"]

    return call


Flash = Callable[..., tuple[int, Answer]]


def refused(answer: tuple[int, Answer], code: str, exit_code: int = 1) -> Answer:
    assert (answer[0], answer[1].get("code")) == (exit_code, code), answer
    assert answer[1]["cause"]
    return answer[1]


# --- what ends up on the medium ----------------------------------------------------------------------------


def test_every_byte_of_every_partition_is_the_images(card: Card, image: Path, flash: Flash) -> None:
    card.forbid_discard()
    code, result = flash(image, card.node)
    assert code == 0, result
    assert not result["discarded"]
    assert result["verified"] == result["written"] + result["zeroed"] > 24 * MIB
    assert result["device_size"] == CARD_MIB * MIB
    expected, found = image.read_bytes(), card.medium.read_bytes()
    free = (STORE_FIRST + STORE_MIB) * MIB
    # Table, boot partition and store, where the image has holes too: the card was full of ones.
    assert found[:free] == expected[:free]
    assert found[(IMAGE_MIB - 1) * MIB : IMAGE_MIB * MIB] == expected[-MIB:], "the image's backup table"
    assert not any(found[free : free + 16 * MIB]), "where the data volume will begin"
    assert not any(found[-MIB:]), "where an older backup table would be"
    run("e2fsck", "-fn", f"{card.medium}?offset={STORE_FIRST * MIB}")


def test_a_card_as_large_as_the_image(cards: Callable[..., Card], image: Path, flash: Flash) -> None:
    card = cards(size_mib=IMAGE_MIB)
    assert flash(image, card.node)[0] == 0
    table = volumes.read_table(card.node)
    assert table.copies_agree
    assert [each.name for each in table.partitions] == [layout.ESP_NAME, layout.STORE_NAME]


def test_a_link_is_followed_and_an_image_directory_has_an_image(
    card: Card, image: Path, tmp_path: Path, flash: Flash
) -> None:
    link = tmp_path / "by-id"
    link.symlink_to(card.node)
    directory = tmp_path / "directory"
    (directory / "pki").mkdir(parents=True)
    (directory / "trustme-base.efi").touch()
    (directory / "manifest.json").write_text('{"version": 1}')
    image.rename(directory / "trustme-base.img")
    code, result = flash(directory, link)
    assert code == 0, result
    assert card.has_table


def test_a_plain_file_takes_an_image_only_if_that_is_said(tmp_path: Path, image: Path, flash: Flash) -> None:
    file = tmp_path / "disk.img"
    file.write_bytes(b"\xff" * CARD_MIB * MIB)
    refused(flash(image, file), "not-a-block-device")
    code, result = flash(image, file, "--file")
    assert code == 0, result
    assert file.read_bytes()[: 25 * MIB] == image.read_bytes()[: 25 * MIB]
    assert result["model"] is None


class Bench:
    """A device whose disk is a card's medium."""

    def __init__(self, home: Path, medium: Path) -> None:
        self.layer = LoopBlockLayer(medium)
        self.home = home
        nothing = cast("Any", None)
        self.machine = Machine(
            run=home / "run",
            store=home / "store",
            data=home / "data",
            block=self.layer,
            verity=nothing,
            controllers=nothing,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while (self.home / "data").is_mount():
            umount(str(self.home / "data"), MNT_DETACH)
        self.layer.close()

    def boot(self) -> volumes.MountedData:
        return PlainExt4DataVolume(self.machine).open_or_create(find_store(self.machine).disk)


@pytest.fixture
def large_image(tmp_path: Path) -> Path:
    """With enough free space for a data volume."""
    return make_disk(tmp_path / "large.img", size_mib=320)


def test_the_first_boot_takes_all_of_a_larger_disk(
    cards: Callable[..., Card], large_image: Path, flash: Flash, tmp_path: Path
) -> None:
    card = cards(size_mib=512, fill=False)
    assert flash(large_image, card.node)[0] == 0
    card.close()
    with Bench(tmp_path, card.medium) as bench:
        data = bench.boot()
        assert data.created
        table = volumes.read_table(bench.layer.disks()[0])
        assert table.copies_agree, "the backup table is at the disk's end now"
        assert table.header.alternate_lba == 512 * MIB // 512 - 1
        assert table.size_bytes(table.partitions[-1]) > 480 * MIB


def test_row11_an_older_data_volume_is_not_found_again(
    cards: Callable[..., Card], large_image: Path, flash: Flash, tmp_path: Path
) -> None:
    card = cards(size_mib=512, fill=False)
    assert flash(large_image, card.node)[0] == 0
    card.close()
    with Bench(tmp_path, card.medium) as bench:
        bench.boot()
        older = volumes.read_table(bench.layer.disks()[0])
        (bench.machine.data / "secret").write_text("of the earlier owner")
    data = older.partitions[-1]
    first, end = older.first_byte(data), older.first_byte(data) + older.size_bytes(data)

    fd = os.open(card.medium, os.O_RDWR)
    card.loop = loop.attach(fd, read_only=False)
    os.close(fd)
    card.forbid_discard()
    assert flash(large_image, card.node)[0] == 0
    card.close()

    with card.medium.open("r+b") as file:
        for start, size in ((first, 16 * MIB), (end - MIB, MIB)):
            file.seek(start)
            # No file system, no LUKS header with its key slots; no backup table that names the older volume.
            assert file.read(size).count(0) == size
        # The new table is lost: whatever is found then must not be the older volume.
        file.seek(512)
        header = file.read(512)
        file.seek(512)
        file.write(bytes(512))
    with Bench(tmp_path, card.medium) as bench, pytest.raises(StorageRefusal) as caught:
        bench.boot()
    assert caught.value.code == "store-missing"
    with card.medium.open("r+b") as file:
        file.seek(512)
        file.write(header)
    with Bench(tmp_path, card.medium) as bench:
        assert bench.boot().created
        assert not (bench.machine.data / "secret").exists()


def test_older_partitions_elsewhere_lose_their_headers(
    cards: Callable[..., Card], image: Path, flash: Flash
) -> None:
    card = cards(size_mib=128)
    other = f'start=90MiB, size=30MiB, type={layout.DATA_TYPE}, name="{layout.DATA_NAME}"\n'
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", card.medium, text=f"label: gpt\n{other}")
    card.forbid_discard()
    assert flash(image, card.node)[0] == 0
    content = card.medium.read_bytes()
    assert not any(content[90 * MIB : 106 * MIB])
    assert not any(content[119 * MIB : 120 * MIB])


# --- devices that are refused ------------------------------------------------------------------------------


def test_a_mounted_disk(card: Card, image: Path, flash: Flash, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", card.node)
    where = tmp_path / "mounted here"
    where.mkdir()
    run("mount", card.node, where)
    before = card.medium.read_bytes()
    try:
        error = refused(flash(image, card.node), "device-mounted")
        assert str(where) in error["evidence"]
    finally:
        umount(str(where), MNT_DETACH)
    assert card.medium.read_bytes()[8192:9000] == before[8192:9000]


def test_a_mounted_partition(card: Card, image: Path, flash: Flash, tmp_path: Path) -> None:
    block.blkpg_add_partition(card.loop.fd, 1, 8 * MIB, 16 * MIB)
    node = Path(f"{card.node}p1")
    run("mkfs.ext4", "-q", node)
    where = tmp_path / "mounted"
    where.mkdir()
    run("mount", node, where)
    try:
        error = refused(flash(image, card.node), "device-mounted")
        assert f"{node.name}: mount" in error["evidence"]
        refused(flash(image, node), "not-a-disk")
    finally:
        umount(str(where), MNT_DETACH)
        block.blkpg_del_partition(card.loop.fd, 1)


@pytest.fixture
def elsewhere(card: Card, tmp_path: Path) -> Iterator[None]:
    """The card is mounted where only another mount namespace sees it."""
    run("mkfs.ext4", "-q", card.node)
    where = tmp_path / "elsewhere"
    where.mkdir()
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"mount {card.node} {where} && echo mounted && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mounted\n"
        yield


def test_what_another_mount_namespace_uses(elsewhere: None, card: Card, image: Path, flash: Flash) -> None:
    assert str(card.node) not in Path("/proc/self/mountinfo").read_text()
    refused(flash(image, card.node), "device-in-use")
    assert not card.has_table


def test_swap(card: Card, image: Path, flash: Flash) -> None:
    run("mkswap", card.node)
    run("swapon", card.node)
    try:
        error = refused(flash(image, card.node), "device-in-use")
        assert "swap" in error["evidence"]
    finally:
        run("swapoff", card.node)


def test_a_disk_that_another_program_has(card: Card, image: Path, flash: Flash) -> None:
    fd = os.open(card.node, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        refused(flash(image, card.node), "device-in-use")
    finally:
        os.close(fd)
    assert card.untouched


def test_a_disk_without_the_images_sectors(cards: Callable[..., Card], image: Path, flash: Flash) -> None:
    card = cards(block_size=4096)
    refused(flash(image, card.node), "sector-size")
    assert card.untouched


def test_a_disk_that_is_too_small(cards: Callable[..., Card], image: Path, flash: Flash) -> None:
    card = cards(size_mib=IMAGE_MIB - 1)
    refused(flash(image, card.node), "device-too-small")
    assert card.untouched


def test_a_write_protected_disk(card: Card, image: Path, flash: Flash) -> None:
    run("blockdev", "--setro", card.node)
    try:
        refused(flash(image, card.node), "device-read-only")
    finally:
        # The kernel keeps this for the loop device's next user.
        run("blockdev", "--setrw", card.node)
    assert card.untouched


@pytest.mark.parametrize("kind", ["character", "directory", "pipe", "file"])
def test_what_is_no_block_device(tmp_path: Path, image: Path, flash: Flash, kind: str) -> None:
    place = tmp_path / "place"
    match kind:
        case "character":
            place = Path("/dev/null")
        case "directory":
            place.mkdir()
        case "pipe":
            os.mkfifo(place)
        case "file":
            place.write_bytes(b"important")
    refused(flash(image, place), "not-a-block-device")
    if kind == "character":
        refused(flash(image, place, "--file"), "not-a-file", 2)
    if kind == "file":
        assert place.read_bytes() == b"important"
    refused(flash(image, tmp_path / "never-there"), "os-error")


# --- the question, and what happens meanwhile --------------------------------------------------------------


class Person(io.StringIO):
    """Types an answer, after something happened."""

    def __init__(self, answer: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        super().__init__(f"{answer}\n")
        self._meanwhile = meanwhile

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]  # typeshed's, of StringIO too
        self._meanwhile()
        return super().readline(-1 if size is None else size)


def ask(monkeypatch: pytest.MonkeyPatch, person: Person, *words: str | Path) -> int:
    monkeypatch.setattr("sys.stdin", person)
    return main.main(["flash", *map(str, words)])


def test_a_person_types_the_devices_name(
    card: Card, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer in ("", "yes", "y", str(image)):
        assert ask(monkeypatch, Person(answer), image, card.node) == 2
    assert card.untouched
    assert ask(monkeypatch, Person(card.node.name), image, card.node) == 0
    said = capsys.readouterr()
    assert f"{card.node.name}: unknown model, no serial number, 0.07 GB" in said.err
    assert f"Type the name of the device ({card.node.name})" in said.err
    assert "written and verified" in said.out
    assert card.has_table
    ask(monkeypatch, Person(""), image, card.node)
    assert "it holds now: boot, trustme-store." in capsys.readouterr().err


def test_nobody_to_ask(card: Card, image: Path, flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{card.node.name}\n"))
    refused(flash(image, card.node, yes=False), "not-confirmed", 2)
    assert main.main(["flash", str(image), str(card.node)]) == 2
    assert card.untouched


def test_a_card_that_is_exchanged_during_the_question(
    card: Card, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exchange() -> None:
        with card.medium.open("r+b") as file:
            file.truncate(CARD_MIB * MIB // 2 + CARD_MIB * MIB)
        fcntl.ioctl(card.loop.fd, LOOP_SET_CAPACITY, 0)

    assert ask(monkeypatch, Person(card.node.name, exchange), image, card.node) == 1
    assert "is not the device any more" in capsys.readouterr().err
    assert not card.has_table


def test_a_name_that_leads_elsewhere_during_the_question(
    cards: Callable[..., Card], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = cards(), cards()
    link = tmp_path / "by-id"
    link.symlink_to(one.node)

    def exchange() -> None:
        link.unlink()
        link.symlink_to(other.node)

    assert ask(monkeypatch, Person(one.node.name, exchange), image, link) == 1
    assert one.untouched
    assert other.untouched


def test_a_node_that_becomes_another_between_look_and_open(
    cards: Callable[..., Card], image: Path, tmp_path: Path, flash: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is for another device just when it is opened, and is again what it was at each look."""
    one, other = cards(), cards()
    node = tmp_path / "node"
    opened = os.open

    def become(card: Card) -> None:
        node.unlink(missing_ok=True)
        os.mknod(node, 0o600 | stat.S_IFBLK, card.node.stat().st_rdev)

    def exchanging(path: Any, *arguments: Any, **options: Any) -> int:
        if path != node:
            return opened(path, *arguments, **options)
        become(other)
        fd = opened(path, *arguments, **options)
        become(one)
        return fd

    become(one)

    monkeypatch.setattr(os, "open", exchanging)
    refused(flash(image, node), "device-changed")
    assert one.untouched
    assert other.untouched


# --- images that are refused -------------------------------------------------------------------------------


def partitioned(path: Path, *lines: str) -> Path:
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    run("sfdisk", "--quiet", "--no-tell-kernel", path, text="\n".join(["label: gpt", *lines, ""]))
    return path


def test_what_is_no_image_of_ours(card: Card, tmp_path: Path, flash: Flash) -> None:
    esp = f'size=8MiB, type={layout.ESP_TYPE}, name="{layout.ESP_NAME}"'
    store = f'size=8MiB, type={layout.STORE_TYPE}, name="{layout.STORE_NAME}"'
    data = f'size=8MiB, type={layout.DATA_TYPE}, name="{layout.DATA_NAME}"'
    refused(flash(partitioned(tmp_path / "other", esp), card.node), "not-our-image")
    wrong_type = store.replace(str(layout.STORE_TYPE), str(layout.ESP_TYPE))
    refused(flash(partitioned(tmp_path / "named", esp, wrong_type), card.node), "not-our-image")
    refused(flash(partitioned(tmp_path / "used", esp, store, data), card.node), "image-of-a-device")
    one_copy = partitioned(tmp_path / "one-copy", esp, store)
    with one_copy.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes(512))
    refused(flash(one_copy, card.node), "not-our-image")
    text = tmp_path / "text"
    text.write_text("no image at all\n" * 100)
    refused(flash(text, card.node), "not-our-image")
    assert card.untouched


def test_any_image_is_written_whole_if_that_is_said(card: Card, tmp_path: Path, flash: Flash) -> None:
    image = tmp_path / "foreign"
    with image.open("wb") as file:
        file.truncate(5 * MIB + 512)
        file.seek(3 * MIB)
        file.write(b"foreign" * 1000)
    code, result = flash(image, card.node, "--any-image")
    assert code == 0, result
    assert card.medium.read_bytes()[: 5 * MIB + 512] == image.read_bytes()


def test_images_that_are_not_whole(card: Card, image: Path, tmp_path: Path, flash: Flash) -> None:
    short = tmp_path / "short.img"
    short.write_bytes(image.read_bytes()[: 30 * MIB])
    refused(flash(short, card.node), "image-damaged")
    empty = tmp_path / "empty.img"
    empty.touch()
    refused(flash(empty, card.node), "image-unreadable")
    refused(flash(tmp_path / "never-there", card.node), "os-error")
    refused(flash(Path("/dev/zero"), card.node), "image-not-a-file")
    refused(flash(tmp_path, card.node), "no-image")
    assert card.untouched


# --- block maps --------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(image: Path) -> Path:
    """The block map beside the image."""
    path = image.with_name("image.img.bmap")
    path.write_bytes(bmap.render(source.map_file(image)))
    return path


def test_the_map_beside_the_image_is_used(mapped: Path, card: Card, image: Path, flash: Flash) -> None:
    code, result = flash(image, card.node)
    assert (code, result["bmap"]) == (0, str(mapped))
    assert card.medium.read_bytes()[: 25 * MIB] == image.read_bytes()[: 25 * MIB]
    assert flash(image, card.node, "--no-bmap")[1]["bmap"] is None


def test_what_the_map_leaves_out_becomes_zero(card: Card, image: Path, flash: Flash, mapped: Path) -> None:
    """The file lost its holes on the way, and has something in one of them."""
    before = image.read_bytes()
    known = bmap.parse(mapped.read_bytes())
    gap = known.ranges[1].end
    assert gap < known.ranges[2].first
    with image.open("r+b") as file:
        file.seek(gap)
        file.write(b"not of the image")
    code, result = flash(image, card.node)
    assert code == 0, result
    assert card.medium.read_bytes()[: 25 * MIB] == before[: 25 * MIB]


def test_an_image_that_its_map_was_not_made_for(
    mapped: Path, card: Card, image: Path, flash: Flash, tmp_path: Path
) -> None:
    position = bmap.parse(mapped.read_bytes()).ranges[-1].end - 1
    with image.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
    refused(flash(image, card.node), "bmap-mismatch")
    with image.open("r+b") as file:
        file.seek(position)
        file.write(byte)
        file.truncate(IMAGE_MIB * MIB + 512)
    refused(flash(image, card.node), "bmap-mismatch")
    mapped.write_bytes(mapped.read_bytes().replace(b"<ImageSize>", b"<ImageSize>1"))
    refused(flash(image, card.node), "bad-bmap")
    mapped.unlink()
    refused(flash(image, card.node, "--bmap", tmp_path / "never-there"), "os-error")
    assert card.untouched


# --- compressed images -------------------------------------------------------------------------------------

PROGRAMS = {"gz": ["gzip", "-1k"], "xz": ["xz", "-0k"], "zst": ["zstd", "-qk"]}


def compress(image: Path, suffix: str) -> Path:
    run(*PROGRAMS[suffix], image)
    return image.with_name(f"{image.name}.{suffix}")


@pytest.mark.parametrize("suffix", PROGRAMS)
@pytest.mark.parametrize("with_map", [True, False])
def test_compressed_images(card: Card, image: Path, flash: Flash, suffix: str, with_map: bool) -> None:  # noqa: FBT001 - a parameter of the matrix
    if with_map:
        image.with_name("image.img.bmap").write_bytes(bmap.render(source.map_file(image)))
    code, result = flash(compress(image, suffix), card.node)
    assert code == 0, result
    assert (result["bmap"] is not None) == with_map
    found, expected = card.medium.read_bytes(), image.read_bytes()
    assert found[: 25 * MIB] == expected[: 25 * MIB]
    assert found[(IMAGE_MIB - 1) * MIB : IMAGE_MIB * MIB] == expected[-MIB:]


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_a_compressed_image_that_is_cut_short(card: Card, image: Path, flash: Flash, suffix: str) -> None:
    packed = compress(image, suffix)
    packed.write_bytes(packed.read_bytes()[:-9])
    refused(flash(packed, card.node), "image-unreadable")
    assert card.untouched


def test_a_compressed_image_that_never_ends(card: Card, tmp_path: Path, flash: Flash) -> None:
    bomb = tmp_path / "bomb"
    with bomb.open("wb") as file:
        file.truncate(1024 * MIB)
    refused(flash(compress(bomb, "zst"), card.node), "device-too-small")
    assert card.untouched


# --- failures on the way -----------------------------------------------------------------------------------


def flash_with(card: Card, image: Path, tell: write.Tell) -> write.Outcome:
    """Flash without the command, so that something can happen on the way."""
    loaded = source.load(image, limit=CARD_MIB * MIB)
    target = Target(card.loop.fd, size=CARD_MIB * MIB, sector_size=512, is_block=True)
    plan = write.plan(loaded, write.table_of(loaded), target.size, [])
    return write.flash(loaded, plan, target, tell)


def at(phase: str, do: Callable[[], object]) -> write.Tell:
    """Do something once, when `phase` has begun."""
    done = threading.Event()

    def tell(now: str, _done: int, _total: int) -> None:
        if now == phase and not done.is_set():
            done.set()
            do()

    return tell


def test_a_medium_that_lost_a_byte_is_found(card: Card, image: Path) -> None:
    """The medium itself is changed: what the page cache holds of the device is still right."""
    store = STORE_FIRST * MIB + 1024
    os.pread(card.loop.fd, 4096, store // 4096 * 4096)

    def damage() -> None:
        with card.medium.open("r+b") as file:
            file.seek(store)
            file.write(b"\xee")

    with pytest.raises(ToolError) as caught:
        flash_with(card, image, at("verifying", damage))
    assert caught.value.code == "verify-failed"
    assert not card.has_table, "it must not look like a system"


def test_a_zero_that_did_not_stay_is_found(card: Card, image: Path) -> None:
    loaded = source.load(image, limit=CARD_MIB * MIB)
    plan = write.plan(loaded, write.table_of(loaded), CARD_MIB * MIB, [])

    def damage() -> None:
        with card.medium.open("r+b") as file:
            file.seek(plan.zeros[-1].end - 1)
            file.write(b"\xee")

    with pytest.raises(ToolError) as caught:
        flash_with(card, image, at("verifying", damage))
    assert caught.value.code == "verify-failed"


def test_an_image_that_changes_while_it_is_written(card: Card, image: Path) -> None:
    last = source.map_file(image).ranges[-1].first

    def change() -> None:
        with image.open("r+b") as file:
            file.seek(last)
            file.write(b"changed")

    with pytest.raises(ToolError) as caught:
        flash_with(card, image, at("writing", change))
    assert caught.value.code == "image-changed"
    assert not card.has_table


@pytest.mark.parametrize("phase", ["writing", "verifying"])
def test_an_interrupted_flash_leaves_no_partition_table(card: Card, image: Path, phase: str) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flash_with(card, image, at(phase, interrupt))
    assert not card.has_table


def test_a_power_cut_while_writing_leaves_no_partition_table(card: Card, image: Path) -> None:
    """Nothing is mended afterwards: the card is looked at as it is at that moment."""
    seen: list[bool] = []

    def cut() -> None:
        os.fsync(card.loop.fd)
        seen.append(card.has_table)

    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", card.medium, text="label: gpt\nsize=20MiB\n")
    assert card.has_table, "of an earlier system"
    flash_with(card, image, lambda now, done, total: cut() if (now, done) == ("writing", total) else None)
    assert seen == [False]
    assert card.has_table
