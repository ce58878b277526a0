# SPDX-License-Identifier: Apache-2.0
"""The store and the data volume on real loop devices, with a power cut at every step."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from tests.integration.disks import MIB, STORE_FIRST, STORE_MIB, make_disk, run
from tests.integration.disks import partition as make_partitions
from tests.integration.loopblock import LoopBlockLayer
from trustme_init.errors import DeviceRefusal, Refusal, StorageRefusal
from trustme_init.linux.mount import MNT_DETACH, MS_REMOUNT, mount, umount
from trustme_init.machine import Machine
from trustme_init.storage import gpt, layout, repartition, volumes
from trustme_init.storage.volumes import PlainExt4DataVolume, Step, find_store, mount_store

pytestmark = pytest.mark.root


class PowerCutError(Exception):
    """The power goes here."""


@dataclass
class Bench:
    """One device: an image, and as many boots of it as a test wants."""

    home: Path
    layers: list[LoopBlockLayer] = field(default_factory=list)
    tools: list[Sequence[str]] = field(default_factory=list)

    @property
    def image(self) -> Path:
        return self.home / "disk.img"

    def boot(self, **options: Any) -> Machine:
        self.power_off()
        layer = LoopBlockLayer(self.image, **options)
        self.layers.append(layer)
        return self.machine(layer)

    def machine(self, layer: Any) -> Machine:
        nothing = cast("Any", None)
        return Machine(
            run=self.home / "run",
            store=self.home / "store",
            data=self.home / "data",
            block=layer,
            verity=nothing,
            controllers=nothing,
        )

    def power_off(self) -> None:
        for name in ("store", "data"):
            while (self.home / name).is_mount():
                umount(str(self.home / name), MNT_DETACH)
        while self.layers:
            self.layers.pop().close()

    def run(self, argv: Sequence[str], text: str = "", inherit: Sequence[int] = ()) -> None:
        self.tools.append(argv)
        repartition.run_tool(argv, text, inherit)

    def open(self, machine: Machine, **options: Any) -> volumes.MountedData:
        self.tools.clear()
        options.setdefault("run", self.run)
        return PlainExt4DataVolume(machine, **options).open_or_create(machine.block.disks()[0])

    def table(self) -> gpt.Table:
        fd = os.open(self.image, os.O_RDONLY)
        try:
            return gpt.load(
                repartition.read_at(fd), sectors=self.image.stat().st_size // 512, sector_size=512
            )
        finally:
            os.close(fd)

    def overwrite(self, offset: int, data: bytes) -> None:
        with self.image.open("r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(data)


def digest(image: Path) -> str:
    """Hash of the data of a sparse file, and where it lies."""
    result, position = hashlib.sha256(), 0
    fd = os.open(image, os.O_RDONLY)
    try:
        while True:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return result.hexdigest()
            position = os.lseek(fd, start, os.SEEK_HOLE)
            result.update(b"%d %d" % (start, position) + os.pread(fd, position - start, start))
    finally:
        os.close(fd)


def loops_of(home: Path) -> list[str]:
    backing = [entry.read_text() for entry in Path("/sys/class/block").glob("loop*/loop/backing_file")]
    return [text for text in backing if str(home) in text]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    make_disk(bench.image)
    yield bench
    bench.power_off()
    assert loops_of(tmp_path) == []


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value.code


# --- store -------------------------------------------------------------------------------------------------


def test_the_store_is_found_and_mounted_strictly(bench: Bench) -> None:
    machine = bench.boot()
    store = find_store(machine)
    assert (store.number, store.first_byte, store.size_bytes) == (2, STORE_FIRST * MIB, STORE_MIB * MIB)
    path = mount_store(machine, store)
    assert (path / "operatingsystems/hello").read_text() == "from the store\n"
    line = next(text for text in Path("/proc/self/mountinfo").read_text().splitlines() if f" {path} " in text)
    mount_options, super_options = line.split()[5].split(","), line.split()[-1].split(",")
    assert {"ro", "nosuid", "nodev", "noexec", "nosymfollow"} <= set(mount_options)
    assert "ro" in super_options
    assert mount_store(machine, store) == path, "a restarted manager mounts again"


def test_reading_the_store_changes_no_byte(bench: Bench) -> None:
    before = digest(bench.image)
    machine = bench.boot()
    (mount_store(machine, find_store(machine)) / "operatingsystems/hello").read_text()
    bench.power_off()
    assert digest(bench.image) == before


def cut_off_writer(bench: Bench) -> None:
    """Leave the store as a writer leaves it that is cut off after an fsync."""
    machine = bench.boot()
    store = find_store(machine)
    node = machine.block.partition_device(store.disk, store.number, store.first_byte, store.size_bytes)
    machine.store.mkdir()
    mount(str(node), str(machine.store), "ext4", 0)
    (machine.store / "durable").write_text("durable\n")
    for name in ("durable", "."):
        fd = os.open(machine.store / name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    shutil.copy(bench.image, bench.home / "cut.img")
    bench.power_off()
    (bench.home / "cut.img").replace(bench.image)


def test_what_a_cut_off_writer_made_durable_is_seen(bench: Bench) -> None:
    cut_off_writer(bench)
    machine = bench.boot()
    assert (mount_store(machine, find_store(machine)) / "durable").read_text() == "durable\n"


def test_an_unclean_store_on_a_read_only_device_is_refused_not_half_seen(bench: Bench) -> None:
    cut_off_writer(bench)
    machine = bench.boot(read_only=True)
    assert code_of(lambda: mount_store(machine, find_store(machine))) == "store-damaged"


def test_a_damaged_store_is_refused(bench: Bench) -> None:
    bench.overwrite(STORE_FIRST * MIB, bytes(8192))
    machine = bench.boot()
    assert code_of(lambda: mount_store(machine, find_store(machine))) == "store-damaged"


def test_another_mount_in_the_stores_place_is_refused(bench: Bench) -> None:
    machine = bench.boot()
    machine.store.mkdir()
    mount("none", str(machine.store), "tmpfs", 0)
    assert code_of(lambda: mount_store(machine, find_store(machine))) == "mount-point-busy"


def test_a_store_that_became_writable_is_refused(bench: Bench) -> None:
    machine = bench.boot()
    mount_store(machine, find_store(machine))
    mount("none", str(machine.store), None, MS_REMOUNT)
    assert code_of(lambda: mount_store(machine, find_store(machine))) == "mount-point-busy"


def test_no_store(bench: Bench) -> None:
    make_disk(bench.image, store=False)
    machine = bench.boot()
    assert code_of(lambda: find_store(machine)) == "store-missing"


@pytest.mark.parametrize(
    "imposter",
    [
        f'size=8MiB, type={layout.STORE_TYPE}, name="something"',
        f'size=8MiB, type={layout.ESP_TYPE}, name="{layout.STORE_NAME}"',
    ],
)
def test_type_and_name_must_both_be_the_stores(bench: Bench, imposter: str) -> None:
    make_disk(bench.image, store=False, data=imposter)
    machine = bench.boot()
    assert code_of(lambda: find_store(machine)) == "store-missing"


def test_two_stores(bench: Bench) -> None:
    make_disk(bench.image, data=f'size=8MiB, type={layout.STORE_TYPE}, name="{layout.STORE_NAME}"')
    machine = bench.boot()
    assert code_of(lambda: find_store(machine)) == "store-ambiguous"


def test_a_lost_primary_table_is_no_obstacle_a_lost_pair_is_named(bench: Bench) -> None:
    bench.overwrite(512, bytes(512))
    assert find_store(bench.boot()).number == 2
    bench.overwrite(-512, b"EFI PART" + bytes(504))
    machine = bench.boot()
    assert code_of(lambda: find_store(machine)) == "partition-table-damaged"


class NodeLess(LoopBlockLayer):
    """Promises a node that is not there."""

    def partition_device(self, disk: Path, number: int, first_byte: int, size_bytes: int) -> Path:
        return Path("/dev/never-there")


def test_a_store_whose_node_is_gone_is_not_called_damaged(bench: Bench) -> None:
    with NodeLess(bench.image) as layer:
        machine = bench.machine(layer)
        store = find_store(machine)
        with pytest.raises(DeviceRefusal) as caught:
            mount_store(machine, store)
    assert caught.value.code == "partition-node-missing"


# --- data volume -------------------------------------------------------------------------------------------


def test_first_boot_creates_later_boots_open(bench: Bench) -> None:
    machine = bench.boot()
    mounted = bench.open(machine)
    assert (mounted.path, mounted.created, mounted.repaired) == (machine.data, True, False)
    assert [Path(argv[0]).name for argv in bench.tools] == ["sfdisk", "mkfs.ext4", "sfdisk"]
    flags = os.statvfs(mounted.path).f_flag
    assert flags & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC) == os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
    assert not flags & os.ST_RDONLY
    (mounted.path / "kept").write_text("kept")
    assert not bench.open(machine).created, "a restarted manager opens again"

    table = bench.table()
    assert table.copies_agree
    assert [(each.number, each.name) for each in table.partitions] == [
        (1, "boot"), (2, "trustme-store"), (3, "trustme-data"),
    ]  # fmt: skip
    assert table.partitions[2].type_guid == layout.DATA_TYPE
    assert run("sfdisk", "--verify", bench.image)

    machine = bench.boot()
    before = bench.table()
    mounted = bench.open(machine)
    assert (mounted.created, mounted.repaired, bench.tools) == (False, False, [])
    assert (mounted.path / "kept").read_text() == "kept"
    assert bench.table() == before


class TornFormat(Bench):
    """mkfs.ext4 runs, and then half of what it wrote is lost."""

    def run(self, argv: Sequence[str], text: str = "", inherit: Sequence[int] = ()) -> None:
        super().run(argv, text, inherit)
        if argv[0] == "mkfs.ext4":
            fd = os.open(argv[-1], os.O_RDWR)
            os.pwrite(fd, os.urandom(MIB), 0)
            os.close(fd)
            raise PowerCutError


def sound_afterwards(bench: Bench, *, created: bool) -> None:
    machine = bench.boot()
    mounted = bench.open(machine)
    assert mounted.created is created
    formats = [argv for argv in bench.tools if argv[0] == "mkfs.ext4"]
    assert len(formats) == created
    (mounted.path / "file").write_text("x")
    assert bench.table().copies_agree
    assert [each.name for each in bench.table().partitions].count(layout.DATA_NAME) == 1
    table = bench.table()
    partition = table.partitions[2]
    node = machine.block.partition_device(
        machine.block.disks()[0], 3, table.first_byte(partition), table.size_bytes(partition)
    )
    umount(str(mounted.path))
    run("e2fsck", "-f", "-n", node)


@pytest.mark.parametrize("step", list(Step))
def test_a_power_cut_before_any_step_leaves_a_good_volume_or_none(bench: Bench, step: Step) -> None:
    def cut(now: Step) -> None:
        if now is step:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        bench.open(bench.boot(), before=cut)
    names = {each.name for each in bench.table().partitions}
    committed = layout.DATA_NAME in names
    assert committed == (step >= Step.MOUNT)
    sound_afterwards(bench, created=not committed)


@pytest.mark.parametrize(
    "step", [Step.TABLE_ONE_COPY, Step.TABLE_BOTH_COPIES, Step.COMMIT_ONE_COPY, Step.COMMIT_BOTH_COPIES]
)
@pytest.mark.parametrize("keep", ["first", "last", "none"])
def test_a_power_cut_in_the_middle_of_a_table_write(
    bench: Bench, step: Step, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = None
    apply = repartition.apply

    def before(value: Step) -> None:
        nonlocal now
        now = value

    def torn(disk: int, write: repartition.CopyWrite) -> None:
        if now is not step:
            apply(disk, write)
            return
        for offset, data in write.pieces:
            for start in range(0, len(data), 512):
                lost = {"first": start >= 512, "last": start < len(data) - 512, "none": True}[keep]
                os.pwrite(disk, os.urandom(512) if lost else data[start : start + 512], offset + start)
        raise PowerCutError

    monkeypatch.setattr(repartition, "apply", torn)
    with pytest.raises(PowerCutError):
        bench.open(bench.boot(), before=before)
    monkeypatch.undo()
    bench.power_off()
    # The last step's first copy is the commit: what is torn afterwards is only the other copy.
    sound_afterwards(bench, created=step is not Step.COMMIT_BOTH_COPIES)


def test_a_power_cut_while_formatting(tmp_path: Path) -> None:
    bench = TornFormat(tmp_path)
    make_disk(bench.image)
    with pytest.raises(PowerCutError):
        bench.open(bench.boot())
    assert [each.name for each in bench.table().partitions][2] == layout.DATA_NAME_NEW
    again = Bench(tmp_path, layers=bench.layers)
    sound_afterwards(again, created=True)
    again.power_off()


def test_one_cut_after_the_other(bench: Bench) -> None:
    for step in (
        Step.TABLE_BOTH_COPIES,
        Step.SYNC,
        Step.COMMIT_BOTH_COPIES,
        Step.FORMAT,
        Step.COMMIT_ONE_COPY,
    ):

        def cut(now: Step, step: Step = step) -> None:
            if now is step:
                raise PowerCutError

        with pytest.raises(PowerCutError):
            bench.open(bench.boot(), before=cut)
    sound_afterwards(bench, created=True)


def complete(bench: Bench) -> gpt.Table:
    (bench.open(bench.boot()).path / "kept").write_text("kept")
    bench.power_off()
    return bench.table()


def stays(bench: Bench, *, repaired: bool) -> None:
    mounted = bench.open(bench.boot())
    assert (mounted.created, mounted.repaired) == (False, repaired)
    assert (mounted.path / "kept").read_text() == "kept"
    assert not [argv for argv in bench.tools if argv[0] == "mkfs.ext4"]
    assert bench.table().copies_agree


@pytest.mark.parametrize("lost", ["primary", "backup"])
def test_a_lost_copy_of_the_table_is_written_again(bench: Bench, lost: str) -> None:
    complete(bench)
    bench.overwrite(512 if lost == "primary" else -512, bytes(512))
    stays(bench, repaired=True)
    bench.power_off()
    stays(bench, repaired=False)


def test_a_stale_copy_that_calls_the_volume_unfinished_never_gets_to_decide(bench: Bench) -> None:
    """Cut between the copies, used, then the good copy is lost: the data must still be there."""

    def cut(now: Step) -> None:
        if now is Step.COMMIT_BOTH_COPIES:
            raise PowerCutError

    # With the primary lost beforehand, the backup is in use, so the primary is committed first.
    bench.overwrite(512, bytes(512))
    with pytest.raises(PowerCutError):
        bench.open(bench.boot(), before=cut)
    assert not bench.table().copies_agree
    (bench.open(bench.boot()).path / "kept").write_text("kept")
    bench.power_off()
    bench.overwrite(512, bytes(512))
    stays(bench, repaired=True)


def test_an_image_written_onto_a_larger_disk_uses_all_of_it(bench: Bench) -> None:
    make_disk(bench.image, size_mib=64)
    os.truncate(bench.image, 600 * MIB)
    sound_afterwards(bench, created=True)
    table = bench.table()
    assert table.size_bytes(table.partitions[2]) > 560 * MIB
    assert run("sfdisk", "--verify", bench.image)


def test_a_complete_volume_that_does_not_mount_is_never_formatted(bench: Bench) -> None:
    table = complete(bench)
    bench.overwrite(table.first_byte(table.partitions[2]), bytes(MIB))
    before = digest(bench.image)
    machine = bench.boot()
    assert code_of(lambda: bench.open(machine)) == "data-volume-damaged"
    assert bench.tools == []
    bench.power_off()
    assert digest(bench.image) == before


DATA = f'size=64MiB, type={layout.DATA_TYPE}, name="{layout.DATA_NAME}"'
NEW = f'size=64MiB, type={layout.DATA_TYPE}, name="{layout.DATA_NAME_NEW}"'


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (f"{DATA}\n{DATA}", "data-volume-ambiguous"),
        (f"{DATA}\n{NEW}", "data-volume-ambiguous"),
        (f'size=64MiB, type={layout.DATA_TYPE}, name="other"', "data-volume-foreign"),
        (f'size=64MiB, type={layout.ESP_TYPE}, name="{layout.DATA_NAME}"', "data-volume-foreign"),
        (f'size=64MiB, type={layout.ESP_TYPE}, name="{layout.DATA_NAME_NEW}"', "data-volume-foreign"),
        (DATA, "data-volume-damaged"),
        (f"size=200MiB, type={layout.ESP_TYPE}", "no-space-for-data-volume"),
    ],
)
def test_what_is_not_clearly_ours_is_refused_and_left_alone(bench: Bench, script: str, code: str) -> None:
    make_disk(bench.image, data=script)
    before = digest(bench.image)
    machine = bench.boot()
    assert code_of(lambda: bench.open(machine)) == code
    bench.power_off()
    assert digest(bench.image) == before


def test_a_write_protected_disk_is_named(bench: Bench) -> None:
    machine = bench.boot(read_only=True)
    assert code_of(lambda: bench.open(machine)) == "disk-not-writable"
    complete(bench)
    machine = bench.boot(read_only=True)
    assert code_of(lambda: bench.open(machine)) == "disk-not-writable"


def test_a_tool_that_fails_is_named_and_the_table_kept(bench: Bench) -> None:
    before = bench.table()

    def broken(argv: Sequence[str], text: str = "", inherit: Sequence[int] = ()) -> None:
        repartition.run_tool(["sfdisk", "--no-such-option"], "", ())

    machine = bench.boot()
    with pytest.raises(StorageRefusal) as caught:
        bench.open(machine, run=broken)
    assert caught.value.code == "storage-tool-failed"
    assert "no-such-option" in caught.value.evidence
    assert bench.table() == before


@pytest.mark.parametrize("lie", ["nothing", "other name", "extra partition", "moved"])
def test_a_table_other_than_asked_for_is_never_written(bench: Bench, lie: str) -> None:
    before = digest(bench.image)

    def lying(argv: Sequence[str], text: str = "", inherit: Sequence[int] = ()) -> None:
        if lie == "nothing":
            return
        if lie == "other name":
            text = text.replace(layout.DATA_NAME_NEW, layout.DATA_NAME)
        if lie == "extra partition":
            text = text.replace("size=", "size=204800, #").split("#", maxsplit=1)[0] + f"\n{text}"
        if lie == "moved":
            repartition.run_tool(
                ["sfdisk", "--quiet", "--part-type", argv[-1], "1", str(layout.STORE_TYPE)], "", inherit
            )
        repartition.run_tool(argv, text, inherit)

    machine = bench.boot()
    assert code_of(lambda: bench.open(machine, run=lying)) in {
        "partition-table-unexpected",
        "storage-tool-failed",
    }
    bench.power_off()
    assert digest(bench.image) == before


@pytest.mark.parametrize("lie", [("1", layout.DATA_NAME), ("3", "other")])
def test_a_commit_other_than_asked_for_is_never_written(bench: Bench, lie: tuple[str, str]) -> None:
    def lying(argv: Sequence[str], text: str = "", inherit: Sequence[int] = ()) -> None:
        label = "--part-label" in argv
        repartition.run_tool([*argv[:-2], *lie] if label else argv, text, inherit)

    machine = bench.boot()
    assert code_of(lambda: bench.open(machine, run=lying)) == "partition-table-unexpected"
    assert [each.name for each in bench.table().partitions][1:] == [layout.STORE_NAME, layout.DATA_NAME_NEW]
    sound_afterwards(bench, created=True)


def test_a_disk_with_4096_byte_sectors(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with bench.image.open("wb") as file:
        file.truncate(384 * MIB)
    layer = LoopBlockLayer(bench.image, block_size=4096)
    try:
        disk = layer.disks()[0]
        make_partitions(
            disk, f'start=2048, size=2048, type={layout.STORE_TYPE}, name="{layout.STORE_NAME}"\n'
        )
        machine = bench.machine(layer)
        store = find_store(machine)
        assert (store.first_byte, store.size_bytes) == (8 * MIB, 8 * MIB)
        assert bench.open(machine).created
        umount(str(machine.data))
        assert not bench.open(machine).created
        umount(str(machine.data))
        assert volumes.read_table(disk).copies_agree
    finally:
        layer.close()
    assert loops_of(tmp_path) == []
