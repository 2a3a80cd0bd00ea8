"""Rows outside a shard, packed: what caches keep, chunks collect, ranks send, and gradients of far rows are summed in.

A shard has rows spread over its tokens and heads. Packed, the rows of each lane are neighbours, and far keys are views
of them. `SegmentRows.put` packs rows, and `add_to` gives them back, as a backward pass does with their gradients.

B batch, N tokens of a shard, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .spans import FarSpan, Lanes, Rows, shared_views
from .views import of_level, strided_view


class SegmentRows(NamedTuple):
    """Packed rows of one segment of a level, such as keys and values: tensors whose batches follow each other.

    `packed` is (n B, rows, lanes, D) for n tensors. Row j of a lane is its j-th row from position `span.start` on.
    Memory for the last rows of `span` may be missing as long as nobody puts them or asks for them.
    """

    lanes: Lanes
    span: FarSpan
    packed: Tensor

    def put(self, tensors: Sequence[Tensor], start: int) -> None:
        """Copy the rows that a shard has which starts at `start`, from its tensors (B, N, K, D)."""
        stop = start + tensors[0].shape[1]
        for theirs, mine in self._shared(tensors, start, stop):
            mine.copy_(theirs)

    def add_to(self, tensors: Sequence[Tensor], start: int) -> None:
        """Add the rows that a shard has which starts at `start` to its tensors (B, N, K, D)."""
        stop = start + tensors[0].shape[1]
        for theirs, mine in self._shared(tensors, start, stop):
            theirs.add_(mine.to(theirs.device))

    def put_packed(self, tensors: Sequence[Tensor], span: FarSpan) -> None:
        """Copy the rows that both spans have, from the packed rows of `span`, (B, rows, lanes, D)."""
        for theirs, mine in self._shared(tensors, span.start, span.stop, packed=True):
            mine.copy_(theirs)

    def of(self, span: FarSpan) -> Tensor:
        """Return the packed rows of a part of these: a view, if it starts with them, otherwise a copy."""
        rows = self.lanes.most_rows(span)
        if span.start == self.span.start:
            return self.packed[:, :rows]
        batch, _, lanes, head_dim = self.packed.shape
        packed = self.packed.new_empty(batch, rows, lanes, head_dim)
        part = SegmentRows(self.lanes, span, packed)
        part.put_packed([self.packed], self.span)
        return packed

    def _shared(
        self,
        tensors: Sequence[Tensor],
        start: int,
        stop: int,
        packed: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of the rows at [start, stop), in a shard or packed rows that start there, and in these rows."""
        span = self.span.part(start, stop)
        for theirs, mine in _views(self.lanes, span, start, self.span.start, packed):
            for index, tensor in enumerate(tensors):
                batch = len(tensor)
                here = strided_view(self.packed, mine, index * batch, batch)
                there = strided_view(of_level(tensor, span.level), theirs)
                yield there, here


@lru_cache(maxsize=64)  # all layers of a step ask for the same
def _views(
    lanes: Lanes,
    span: FarSpan,
    start: int,
    first: int,
    packed: bool,
) -> tuple[tuple[Rows, Rows], ...]:
    """Return views of the rows of `span` in a shard that starts at `start`, and packed from position `first` on.

    With `packed`, the rows from `start` on are packed as well.
    """
    if span.start >= span.stop:
        return ()
    mine = lanes.packed(span, first)
    theirs = lanes.in_shard(span, start)
    if packed:
        theirs = lanes.packed(span, start)
    return tuple(shared_views(theirs, mine))
