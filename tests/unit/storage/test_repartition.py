# SPDX-License-Identifier: Apache-2.0
"""Whatever a power cut leaves of a table write, the table read next is the old or the new one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trustme_init.errors import StorageRefusal
from trustme_init.storage import gpt, layout, repartition

SECTORS = 300 * 2048


def make_image(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(SECTORS * 512)
    script = f"label: gpt\nstart=2048, size=8MiB, type={layout.STORE_TYPE}, name=store\n"
    subprocess.run(["sfdisk", "--quiet", str(path)], input=script, text=True, check=True, timeout=60)
    return path


def load(fd: int) -> gpt.Table:
    return gpt.load(repartition.read_at(fd), sectors=SECTORS, sector_size=512)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    fd = os.open(make_image(tmp_path / "disk"), os.O_RDWR)
    yield fd
    os.close(fd)


def append(
    disk: int, table: gpt.Table
) -> tuple[gpt.Table, tuple[repartition.CopyWrite, repartition.CopyWrite]]:
    extent = gpt.Extent(20480, 40959)
    return repartition.plan_append(
        disk, table, extent, kind=layout.DATA_TYPE, name=layout.DATA_NAME_NEW, run=repartition.run_tool
    )


def test_planning_writes_nothing(disk: int) -> None:
    before = load(disk)
    new, _ = append(disk, before)
    assert load(disk) == before
    assert new.partitions[:1] == before.partitions
    assert new.partitions[1][3:6] == (20480, 40959, layout.DATA_NAME_NEW)


@pytest.mark.parametrize("lost", [None, 1, SECTORS - 1])
def test_the_copy_in_use_is_written_last(disk: int, lost: int | None) -> None:
    if lost is not None:
        os.pwrite(disk, bytes(512), lost * 512)
    table = load(disk)
    new, writes = append(disk, table)
    places = [max(offset // 512 for offset, _ in write.pieces) for write in writes]
    in_use = SECTORS - 1 if lost == 1 else 2
    assert places[1] == in_use
    for write in writes:
        repartition.apply(disk, write)
    assert load(disk).partitions == new.partitions
    assert load(disk).copies_agree


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_loss_of_sectors_in_flight_leaves_old_or_new(disk: int, data: st.DataObject) -> None:
    """Everything of the write in flight may be persisted or not, sector by sector, or become garbage."""
    places = ((0, 34 * 512), ((SECTORS - 33) * 512, 33 * 512))
    saved = [(offset, os.pread(disk, size, offset)) for offset, size in places]
    lost = data.draw(st.sampled_from([0, 1, SECTORS - 1]))
    if lost:
        os.pwrite(disk, bytes(512), lost * 512)
    before = load(disk)
    name = data.draw(st.sampled_from(["a", "b", "c"]))
    new, writes = repartition.plan_rename(disk, before, 1, name, repartition.run_tool)
    in_flight = data.draw(st.integers(0, 1))
    for write in writes[:in_flight]:
        repartition.apply(disk, write)
    for offset, piece in writes[in_flight].pieces:
        for start in range(0, len(piece), 512):
            fate = data.draw(st.sampled_from(["old", "new", "garbage"]))
            if fate != "old":
                content = piece[start : start + 512] if fate == "new" else b"\xa5" * 512
                os.pwrite(disk, content, offset + start)
    try:
        assert load(disk).partitions in {before.partitions, new.partitions}
    finally:
        for offset, content in saved:
            os.pwrite(disk, content, offset)


def test_a_missing_tool_is_a_refusal() -> None:
    with pytest.raises(StorageRefusal) as caught:
        repartition.run_tool(["no-such-tool"])
    assert caught.value.code == "storage-tool-failed"


def test_reading_past_the_end_is_a_table_error(disk: int) -> None:
    with pytest.raises(gpt.TableError):
        repartition.read_at(disk)(SECTORS * 512 - 10, 11)
