"""Rows of tokens that one strided view can show, and the heads that one view can show together. Pure integers.

H heads, r dilation rate.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """Rows that one strided view of a (batch, tokens, heads, head_dim) tensor can show.

    Axis by axis: `segments` of them `segment_step` tokens apart; `heads` of them, `first_head` and then every
    `head_step`-th (0: the same one for all); in each `rows` rows `row_step` tokens apart. The first row of the first
    head is token `first_token`, that of each next head `skew` tokens later.
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


class Heads(NamedTuple):
    """Heads first, first + step, ...: an arithmetic progression of `number`."""

    number: int
    first: int
    step: int

    def growth(self, values: Sequence[int]) -> int:
        """Return how much the value of each next head is larger, of values that grow evenly."""
        return values[self.first + self.step] - values[self.first] if self.number > 1 else 0

    def of(self, others: Sequence[int]) -> Heads:
        """The progression that `others` (a key head for each query head, say) make of these heads."""
        return Heads(self.number, others[self.first], self.growth(others) if self.number > 1 else self.step)


def rows_before(position: int, offset: int, dilation_rate: int) -> int:
    """Return how many rows of a segment lie before its position `position`: those at offset, offset + r, ..."""
    return max(0, -((offset - position) // dilation_rate))


def progressions(
    equal: Sequence[Hashable | None], even: Sequence[tuple[int, ...]], steps: Sequence[int]
) -> list[Heads]:
    """Cover all heads by few progressions in which one strided view shows every head.

    Heads of one view need the same `equal` (None leaves a head out) and values in `even` that grow evenly from head to
    head, or stay. Both offset rules make long runs of such heads, neighbours or a fixed step apart: of `steps`, the one
    with the fewest views wins.
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
    """Every head from `first` on, `step` apart, in as long runs as there are."""
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
