"""Portions: groups of documents, or of pieces of documents, each worked on as if there were nothing else.

So the numbers of a document depend only on its portion, not on where a run was resumed or which process reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Generic, TypeVar

T = TypeVar("T")


class Portion(Generic[T]):
    """Neighbouring items, to be read once. The attributes are valid when all items have been read.

    `items` is the number of items, `length` their total length. `ends_shard` is true for the last portion of a shard,
    `ends_early` for one that a None among the items has ended.
    """

    def __init__(self, items: Iterator[T | None], is_full: Callable[[Portion[T], T], bool]) -> None:
        self._items, self._is_full = items, is_full
        self.items = self.length = 0
        self.ends_shard = self.ends_early = False

    def __iter__(self) -> Iterator[T]:
        for item in self._items:
            if item is None:
                self.ends_early = True
                return
            full = self._is_full(self, item)
            yield item
            if full:
                return


def portions(
    items: Iterable[T | None],
    length: int,
    *,
    length_of: Callable[[T], int] = len,  # type: ignore[assignment]
    shard: int | None = None,
    size_of: Callable[[T], int] = lambda item: 1,
) -> Iterator[Portion[T]]:
    """Cut items into portions. Read each portion to its end before the next.

    A portion ends with the item that brings it to `length`: an item counts for its own length plus 1. It also ends
    with the item that brings the sum of `size_of` over the shard to `shard`, and before a None: the items that follow
    are not there yet.
    """
    remaining = iter(items)
    in_shard = 0

    def is_full(portion: Portion[T], item: T) -> bool:
        nonlocal in_shard
        portion.items += 1
        portion.length += length_of(item)
        if shard is not None:
            in_shard += size_of(item)
            if in_shard >= shard:
                in_shard, portion.ends_shard = 0, True
        return portion.ends_shard or portion.length + portion.items >= length

    for first in remaining:
        if first is not None:
            yield Portion(chain([first], remaining), is_full)
