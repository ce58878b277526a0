# SPDX-License-Identifier: Apache-2.0
"""Sets of bytes, as extents that are in order and apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Extent(NamedTuple):
    """A run of bytes."""

    first: int
    size: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.first + self.size


def union(*sets: Iterable[Extent]) -> list[Extent]:
    """Return the bytes that are in any of `sets`, whose extents may overlap and be in any order."""
    result: list[Extent] = []
    for each in sorted(extent for extents in sets for extent in extents if extent.size > 0):
        if result and each.first <= result[-1].end:
            last = result.pop()
            result.append(Extent(last.first, max(last.end, each.end) - last.first))
        else:
            result.append(each)
    return result


def minus(left: Iterable[Extent], right: Iterable[Extent]) -> list[Extent]:
    """Return the bytes that are in `left` and not in `right`."""
    result: list[Extent] = []
    taken = union(right)
    for each in union(left):
        first = each.first
        for other in taken:
            if other.end <= first or other.first >= each.end:
                continue
            if other.first > first:
                result.append(Extent(first, other.first - first))
            first = max(first, other.end)
        if first < each.end:
            result.append(Extent(first, each.end - first))
    return result


def common(left: Iterable[Extent], right: Iterable[Extent]) -> list[Extent]:
    """Return the bytes that are in both."""
    left = union(left)
    return minus(left, minus(left, right))
