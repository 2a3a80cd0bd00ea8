"""Rows of tokens that one strided view can show, and the heads that one view can show together. Pure integers.

H heads, r dilation rate.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """Rows that one strided view of a (batch, tokens, heads, head_dim) tensor can show.

    The view has `segments` segments, `segment_step` tokens apart. Each segment has `heads` heads: `first_head`, then
    every `head_step`-th (0: the same head each time). Each head has `rows` rows, `row_step` tokens and
    `row_heads` heads apart. The first head's first row is token `first_token`; each next head starts `skew` tokens
    later.
    """

    segments: int
    segment_step: int
    heads: int
    first_head: int
    head_step: int
    rows: int
    row_step: int
    first_token: int
    skew: int
    row_heads: int = 0


class Heads(NamedTuple):
    """An arithmetic progression of `number` heads: first, first + step, ..."""

    number: int
    first: int
    step: int

    def growth(self, values: Sequence[int]) -> int:
        """Return the step from each head's value to the next head's, for values that grow evenly."""
        return values[self.first + self.step] - values[self.first] if self.number > 1 else 0

    def of(self, others: Sequence[int]) -> Heads:
        """Return the progression of the values of `others` at these heads, such as the key head of each query head."""
        return Heads(self.number, others[self.first], self.growth(others) if self.number > 1 else self.step)


def rows_before(position: int, offset: int, dilation_rate: int) -> int:
    """Return the number of a segment's rows (at offset, offset + r, ...) that lie before its position `position`."""
    return max(0, -((offset - position) // dilation_rate))


def progressions(
    equal: Sequence[Hashable | None], even: Sequence[tuple[int, ...]], steps: Sequence[int]
) -> list[Heads]:
    """Divide all heads into few progressions, such that one strided view can show all heads of a progression.

    Heads can share a view if they have the same `equal` (None leaves a head out), and if their values in `even` grow by
    equal steps or stay the same. Both offset rules give long runs of such heads, either neighbours or a fixed step
    apart. Of `steps`, the one with the fewest views is taken.
    """

    best: list[Heads] = []
    for step in dict.fromkeys(steps):
        found = [run for residue in range(min(step, len(equal))) for run in _runs(equal, even, residue, step)]
        if not best or len(found) < len(best):
            best = found
        if len(best) <= 1:
            break
    return best


def _runs(equal: Sequence[Hashable | None], even: Sequence[tuple[int, ...]], first: int, step: int) -> Iterator[Heads]:
    """Yield the heads first, first + step, ... in runs that are as long as possible."""
    begin, number = first, 0
    growth: tuple[int, ...] = ()
    for head in range(first, len(equal), step):
        grown = tuple(map(operator.sub, even[head], even[head - step])) if number else ()
        if number and equal[head] == equal[begin] and (grown == growth if number > 1 else min(grown) >= 0):
            number, growth = number + 1, grown
            continue
        if number:
            yield Heads(number, begin, step)
        begin, number = head, int(equal[head] is not None)
    if number:
        yield Heads(number, begin, step)
