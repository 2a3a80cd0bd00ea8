"""Documents, or pieces of them, in portions of some size, each of which is worked on as if it were all there is.

So the numbers of a document depend on its portion alone: not on where a run was resumed, nor on which process reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Generic, TypeVar

T = TypeVar("T")


class Portion(Generic[T]):
    """Neighbouring items, to be read once. When they have been, the attributes tell of them.

    There were so many `items`, of together `length`. `ends_shard` is true for those that are the last of a shard.
    """

    def __init__(self, items: Iterator[T], is_full: Callable[[Portion[T], T], bool]) -> None:
        self._items, self._is_full = items, is_full
        self.items = self.length = 0
        self.ends_shard = False

    def __iter__(self) -> Iterator[T]:
        for item in self._items:
            full = self._is_full(self, item)
            yield item
            if full:
                return


def portions(
    items: Iterable[T],
    length: int,
    *,
    length_of: Callable[[T], int] = len,  # type: ignore[assignment]
    shard: int | None = None,
    size_of: Callable[[T], int] = lambda item: 1,
) -> Iterator[Portion[T]]:
    """Cut items into portions, each to be read to its end before the next.

    A portion ends with the item that brings it to `length` (each item takes 1 besides its own), or the shard to the sum
    `shard` of the `size_of` each.
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
        yield Portion(chain([first], remaining), is_full)
