# SPDX-License-Identifier: Apache-2.0
"""Put an image onto a device, so that it holds the whole image or none.

Rules:
- Both ends of the image (its partition tables) are zeroed first and written last. Whatever ends the work
  early leaves a disk without a partition table, never half an image that looks like one.
- Every byte of every partition becomes what the image has: data is written, the rest is made zero. File
  systems trust that what they once zeroed is zero.
- Nothing of an earlier installation stays to be found (threats, row 11): the last bytes of the device (an
  older backup table there would be believed if the new table were lost, and could name an older data volume),
  and the beginning and end of each older partition and of the space where the device makes its data
  volume (file system, LUKS and RAID headers). The rest is discarded where the disk can do that.
- All that was written or zeroed is read back from the medium and hashed before this is called done.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from trustme_init.storage import gpt
from trustme_init.storage.layout import DATA_TYPE, ESP_NAME, ESP_TYPE, MIB, STORE_NAME, STORE_TYPE
from trustme_tools.errors import ToolError
from trustme_tools.flash.bmap import Range
from trustme_tools.flash.extents import Extent, common, minus, union
from trustme_tools.flash.source import CHUNK, ENDS, Image
from trustme_tools.flash.target import Target

SECTOR: Final = 512
"""Images are made for disks of such sectors: a partition table counts in them."""
HEADERS: Final = 16 * MIB
"""What LUKS2 keeps in front of its data by default; other formats keep less."""
TRAILERS: Final = MIB
"""At the end: the backup partition table, and RAID formats that keep their header there."""

Tell = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be where on the device, in bytes."""

    data: tuple[Range, ...]
    zeros: tuple[Extent, ...]
    """Parts of partitions without data, and what is wiped."""
    ends: tuple[Extent, ...]
    """Written last."""
    unused: tuple[Extent, ...]
    """Discarded."""

    @property
    def total(self) -> int:
        """Bytes that are written, and read back."""
        return sum(each.size for each in self.parts)

    @property
    def parts(self) -> list[Range | Extent]:
        """All that is written: data with its hash, then zeros."""
        return [*self.data, *self.zeros]


@dataclass(slots=True)
class Outcome:
    """What was done, in bytes."""

    written: int = 0
    zeroed: int = 0
    verified: int = 0
    discarded: bool = False
    """The disk took the message that it may forget the rest."""
    held: list[tuple[int, bytes]] = field(default_factory=list, repr=False)


def table_of(image: Image) -> gpt.Table | None:
    """Return the image's partition table, None if it has none; ToolError("image-damaged")."""
    try:
        return gpt.load(image.read_ends, sectors=image.size // SECTOR, sector_size=SECTOR)
    except gpt.NoTableError:
        return None
    except gpt.TableError as exc:
        raise ToolError(
            "the image's partition table is damaged",
            "get the image again: it is perhaps not whole",
            code="image-damaged",
            evidence=f"{image.path}: {exc}",
        ) from exc


def check_ours(table: gpt.Table | None, sector_size: int) -> None:
    """Refuse what is no image of this system, or not for a disk of such sectors.

    ToolError: "not-our-image", "image-of-a-device", "sector-size".
    """
    found = [(each.type_guid, each.name) for each in table.partitions] if table is not None else []
    names = ", ".join(ascii(name) for _, name in found) or "no partition table"
    if any(kind == DATA_TYPE for kind, _ in found):
        raise ToolError(
            "this is a copy of a device's disk, with its data volume",
            "flash an image as it was built: two devices must never share a data volume",
            code="image-of-a-device",
            evidence=names,
        )
    ours = {(ESP_TYPE, ESP_NAME), (STORE_TYPE, STORE_NAME)} <= {*found}
    if table is None or not ours or not table.copies_agree:
        damage = "" if table is None else f"; {table.primary_error or table.backup_error or 'sound'}"
        raise ToolError(
            "this is not an image of trustme-py",
            f"it must have the partitions {ESP_NAME} and {STORE_NAME}; --any-image flashes it all the same",
            code="not-our-image",
            evidence=f"{names}{damage}",
        )
    if sector_size != SECTOR:
        raise ToolError(
            f"the device has sectors of {sector_size} bytes, the image is made for {SECTOR}",
            "use a disk with the usual sectors (many large ones can be switched: `nvme format`)",
            code="sector-size",
        )


def older_table(target: Target) -> gpt.Table | None:
    """Return the partition table that is on the device now; None if none can be read."""
    unit = target.sector_size
    try:
        return gpt.load(target.read, sectors=target.size // unit, sector_size=unit)
    except gpt.TableError:
        return None


def extents_of(table: gpt.Table | None) -> list[Extent]:
    """Return where the partitions of a table lie."""
    if table is None:
        return []
    return [Extent(table.first_byte(each), table.size_bytes(each)) for each in table.partitions]


def plan(image: Image, table: gpt.Table | None, device_size: int, older: Iterable[Extent]) -> Plan:
    """Say what becomes of each byte; `older` are the partitions that are on the device now.

    Without a `table`, of an image that is not ours, all of the image counts: nothing is known of its free
    space.
    """
    size = image.size
    data = [Extent(each.first, each.size) for each in image.bmap.ranges]
    behind = Extent(size, device_size - size)
    free = [] if table is None else _free(table)
    unused = minus([*free, behind], data)
    wiped = common(unused, [edge for each in (*unused, *older) for edge in _edges(each)])
    rest = minus([Extent(0, size)], [*data, *unused])
    return Plan(
        data=image.bmap.ranges,
        zeros=tuple(union(rest, wiped)),
        ends=tuple(union([Extent(0, min(ENDS, size)), Extent(max(size - ENDS, 0), min(ENDS, size))])),
        unused=tuple(unused),
    )


def _free(table: gpt.Table) -> list[Extent]:
    unit = table.sector_size
    return [Extent(each.first_lba * unit, each.sectors * unit) for each in table.free_extents()]


def _edges(each: Extent) -> tuple[Extent, Extent]:
    head, tail = min(HEADERS, each.size), min(TRAILERS, each.size)
    return Extent(each.first, head), Extent(each.end - tail, tail)


def flash(image: Image, plan: Plan, target: Target, tell: Tell) -> Outcome:
    """Write `image` to `target` as planned, and verify it.

    ToolError: "image-changed" (the image is not what it was when it was loaded), "verify-failed". Raises
    OSError. Whenever this raises, the device is left without a partition table.
    """
    outcome = Outcome()
    try:
        outcome.discarded = {target.discard(*each) for each in plan.unused} == {True}
        _zero_ends(plan, target)
        _write(image, plan, target, outcome, tell)
        for offset, data in outcome.held:
            target.write(offset, data)
        target.sync()
        _verify(plan, target, outcome, tell)
    except BaseException:
        with contextlib.suppress(OSError):
            _zero_ends(plan, target)
        raise
    target.announce()
    return outcome


def _zero_ends(plan: Plan, target: Target) -> None:
    for each in plan.ends:
        for _ in target.zero(*each):
            pass
    target.sync()


def _write(image: Image, plan: Plan, target: Target, outcome: Outcome, tell: Tell) -> None:
    def advance() -> None:
        tell("writing", outcome.written + outcome.zeroed, plan.total)

    for extent in plan.zeros:
        for count in target.zero(*extent):
            outcome.zeroed += count
            advance()
    with image.reader() as reader:
        for each in plan.data:
            digest = hashlib.sha256()
            for offset in range(each.first, each.end, CHUNK):
                data = reader.read(offset, min(CHUNK, each.end - offset))
                digest.update(data)
                _write_or_hold(offset, data, plan, target, outcome)
                outcome.written += len(data)
                advance()
            if digest.hexdigest() != each.sha256:
                raise ToolError(
                    "the image changed while it was written",
                    "get the image again, and begin anew: the device holds no system now",
                    code="image-changed",
                    evidence=f"{image.path}: bytes {each.first} to {each.end}",
                )
    target.sync()


def _write_or_hold(offset: int, data: bytes, plan: Plan, target: Target, outcome: Outcome) -> None:
    """Write what is not in one of the ends; keep the rest for later."""
    here = [Extent(offset, len(data))]
    for part in minus(here, plan.ends):
        target.write(part.first, memoryview(data)[part.first - offset : part.end - offset])
    for part in common(here, plan.ends):
        outcome.held.append((part.first, data[part.first - offset : part.end - offset]))


def _verify(plan: Plan, target: Target, outcome: Outcome, tell: Tell) -> None:
    """Read all back; ToolError("verify-failed")."""
    for each in plan.parts:
        digest = hashlib.sha256() if isinstance(each, Range) else None
        for data in target.read_back(each.first, each.size):
            if digest is not None:
                digest.update(data)
            elif data.count(0) != len(data):
                raise _bad_medium(each)
            outcome.verified += len(data)
            tell("verifying", outcome.verified, plan.total)
        if digest is not None and isinstance(each, Range) and digest.hexdigest() != each.sha256:
            raise _bad_medium(each)


def _bad_medium(each: Range | Extent) -> ToolError:
    return ToolError(
        "the device does not hold what was written to it",
        "use another one: it is worn out, or smaller than it says; it holds no system now",
        code="verify-failed",
        evidence=f"bytes {each.first} to {each.end}",
    )
