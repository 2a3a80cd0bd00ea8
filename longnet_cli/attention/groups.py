"""Groups of queries that see the same chosen blocks (`choosing`). Pure integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .pattern import Pattern


class Groups(NamedTuple):
    """Neighbouring groups of queries that see equally many blocks: `number` groups of `queries` rows each.

    first: position of the first query. near: position at which the near keys of all groups start.
    """

    first: int
    number: int
    queries: int
    near: int


class Part(NamedTuple):
    """Groups of one document: rows and tokens of the batch that hold it, and the position of the first such token."""

    rows: slice
    columns: slice
    start: int
    groups: Groups


def groups_of(pattern: Pattern, start: int, stop: int) -> Iterator[Groups]:
    """Yield the groups of queries at positions [start, stop) that see blocks; those that see all blocks are one."""
    w, back, every = pattern.segment_lengths[0], pattern.look_backs[0], pattern.chosen_every
    for segment in range(max(start // w, back + 1), (stop - 1) // w + 1):
        first, last, near = max(start, segment * w), min(stop, (segment + 1) * w), (segment - back) * w
        if near <= pattern.chosen_keys:
            yield Groups(first, 1, last - first, near)
            continue
        begin, end = -(-first // every) * every, last // every * every
        if first < begin:
            yield Groups(first, 1, min(begin, last) - first, near)
        if begin < end:
            yield Groups(begin, (end - begin) // every, every, near)
        if max(begin, end) < last:
            yield Groups(end, 1, last - end, near)
