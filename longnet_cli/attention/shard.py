"""The shard that a call of attention computes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from .pattern import Padding


class Shard(NamedTuple):
    """Which tokens of which sequences a call computes, and what they see of them, as `dilated_attention` describes it.

    The operator of compiled graphs takes all fields by their names (`compiled`), so a new one cannot be left out there.
    """

    start: int = 0
    lengths: Sequence[int] | Tensor | None = None
    documents: Sequence[int] | None = None
    total: int | None = None
    padding: Padding = "exact"
    causal: bool = True

    def hashable(self) -> Shard:
        """Return the same shard with its lists of numbers as tuples. Raises ValueError for other than whole numbers."""
        if self.lengths is None and self.documents is None:
            return self
        return self._replace(
            lengths=None if self.lengths is None else _whole_numbers("lengths", self.lengths),
            documents=None if self.documents is None else _whole_numbers("documents", self.documents),
        )

    def places(self, batch: int, tokens: int) -> Iterator[Place]:
        """Yield the places of a batch with `tokens` per row, if `hashable`. Raises ValueError for wrong lengths."""
        if self.documents is not None:
            if min(self.documents, default=0) < 1 or sum(self.documents) != tokens:
                raise ValueError(
                    f"documents need lengths of at least 1 that make {tokens} tokens, got {[*self.documents]}"
                )
            stop = 0
            for length in self.documents:
                start, stop = stop, stop + length
                yield Place(slice(0, batch), slice(start, stop))
            return
        lengths = self.lengths
        if lengths is None:
            yield Place(slice(0, batch), slice(0, tokens))
            return
        assert isinstance(lengths, tuple)
        if len(lengths) != batch or not all(0 <= n <= tokens for n in lengths):
            why = ": -1 is a row with tokens after padding, which has to be on the right" if -1 in lengths else ""
            raise ValueError(f"lengths needs {batch} numbers from 0 to {tokens}, got {[*lengths]}{why}")
        for length, rows in groupby(range(batch), key=lengths.__getitem__):  # neighbours of equal length go together
            members = list(rows)
            if length:
                yield Place(slice(members[0], members[-1] + 1), slice(0, length))


class Place(NamedTuple):
    """Rows of a batch, and their tokens, that one set of calls serves: in each row, these tokens are one sequence."""

    rows: slice
    tokens: slice


def _whole_numbers(name: str, numbers: Sequence[int] | Tensor) -> tuple[int, ...]:
    try:
        return tuple(operator.index(n) for n in (numbers.tolist() if isinstance(numbers, Tensor) else numbers))
    except TypeError:
        raise ValueError(f"{name} needs whole numbers, in one dimension, got {numbers}") from None
