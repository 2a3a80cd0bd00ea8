"""Groups of queries that see the same chosen blocks (`choosing`), and what choosing costs. Pure integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import inf
from typing import NamedTuple

from .pattern import FUNNEL, MEAN_OF, VOTERS, Pattern


class Groups(NamedTuple):
    """Neighbouring groups of queries that see equally many blocks: `number` groups of `queries` rows each.

    first: position of the first query. near: position at which the near keys of all groups start.
    """

    first: int
    number: int
    queries: int
    near: int


class GroupedPart(NamedTuple):
    """Groups of one document: rows and tokens of the batch that hold it, and the position of the first such token."""

    rows: slice
    columns: slice
    start: int
    groups: Groups


class ChoiceStage(NamedTuple):
    """A stage of a choice: `means` mean keys of a block are compared by `voters` voters, and `blocks` blocks remain."""

    means: int
    blocks: int
    voters: int


def groups_of(pattern: Pattern, start: int, stop: int) -> Iterator[Groups]:
    """Yield the groups of queries at positions [start, stop) that see blocks; those that see all blocks are one."""
    w, back, every = pattern.segment_lengths[0], pattern.look_backs[0], pattern.chosen_every
    for segment in range(max(start // w, back + 1), (stop - 1) // w + 1) if start < stop else ():
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


def stages(pattern: Pattern, candidates: float = inf) -> list[ChoiceStage]:
    """Return the stages of a choice among so many blocks, the coarsest first."""
    finest = pattern.chosen_block // MEAN_OF
    some = [ChoiceStage(*stage) for stage in FUNNEL if stage[0] < finest and finest % stage[0] == 0]
    first = [stage for stage in some if candidates > stage.blocks >= pattern.chosen]
    return [*first, ChoiceStage(finest, pattern.chosen - 1, VOTERS)]


def comparisons(pattern: Pattern, stop: int) -> tuple[int, int]:
    """Return what the group that ends at position `stop` compares: its mean keys, and its pairs of a voter and one."""
    (w,), (back,) = pattern.segment_lengths, pattern.look_backs
    near = ((stop - 1) // w - back) * w
    if near <= pattern.chosen_keys:
        return 0, 0
    means, pairs, candidates = 0, 0, near // pattern.chosen_block - 1
    for stage in stages(pattern, candidates):
        means += candidates * stage.means
        pairs += candidates * stage.means * stage.voters
        candidates = stage.blocks
    return means, pairs


class ChosenFlops(NamedTuple):
    """FLOPs of chosen blocks in a forward pass. A backward pass does not vote again."""

    votes: int
    attention: int


def chosen_flops(pattern: Pattern, heads: int, head_dim: int, tokens: int) -> ChosenFlops:
    """Return the FLOPs of a layer's chosen blocks in a document of `tokens`."""
    if not pattern.chosen:
        return ChosenFlops(0, 0)
    (w,), (back,) = pattern.segment_lengths, pattern.look_backs

    def votes(segment: int, queries: int) -> int:
        _, pairs = comparisons(pattern, (segment + 1) * w)
        return 2 * -(-queries // pattern.chosen_every) * pairs

    def attention(segment: int, queries: int) -> int:
        return 4 * queries * min((segment - back) * w, pattern.chosen_keys)

    whole, rest = divmod(tokens, w)
    # between these segments, the numbers grow evenly
    many = [pattern.chosen_block * (stage.blocks + 1) // w for stage in stages(pattern)]
    edges = [0, pattern.chosen_keys // w, *many, whole - back - 1]
    steps = sorted(back + 1 + max(0, min(edge, whole - back - 1)) for edge in edges)

    def of_document(of_segment: Callable[[int, int], int]) -> int:
        total = of_segment(whole, rest) if whole > back else 0
        for first, stop in pairwise(steps):
            total += (stop - first) * (of_segment(first, w) + of_segment(max(first, stop - 1), w)) // 2
        return heads * head_dim * total

    return ChosenFlops(of_document(votes), of_document(attention))


def past_bytes(pattern: Pattern, kv_heads: int, head_dim: int, tokens: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes of one layer's past: of all keys and values, `itemsize` per number, and of the mean keys."""
    if not pattern.chosen:
        return 0, 0
    means = tokens // pattern.chosen_block * sum(stage.means for stage in stages(pattern))
    return kv_heads * head_dim * 2 * itemsize * tokens, kv_heads * head_dim * max(4, itemsize) * means
