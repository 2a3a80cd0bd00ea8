"""Groups of queries that see the same chosen blocks (`choosing`), and what choosing costs. Pure integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from .pattern import FUNNEL, MEAN_OF, VOTERS, LayerKind, Pattern

if TYPE_CHECKING:  # so that sizes of a pattern are known without torch
    from torch import Tensor

CALL, VOTES = (
    8,
    4.5,
)  # of what exists at a time, the multiples of `Limits.gathered` and `Limits.scores` (a test counts)


class Limits(NamedTuple):
    """The sizes of what exists at a time while blocks are chosen and gathered, for one kind of device.

    A CPU is fast with what its caches hold. A GPU is slow to start a call, and has memory for large ones.

    gathered: bytes of gathered keys. scores: scores of votes, and numbers of means that are compared with one slot's
    voters. unrotated: keys that are un-rotated. whole: neighbouring parts of a document are taken together, and the
    blocks of a past lie in one piece.
    """

    gathered: int
    scores: int
    unrotated: int
    whole: bool


CPU = Limits(gathered=4 << 20, scores=1 << 20, unrotated=1 << 12, whole=False)
GPU = Limits(gathered=1 << 26, scores=1 << 26, unrotated=1 << 20, whole=True)


def limits_of(x: Tensor) -> Limits:
    """Return the sizes for the device of x."""
    return CPU if x.is_cpu else GPU


class Groups(NamedTuple):
    """Neighbouring groups of queries that see equally many blocks: `number` groups of `queries` rows each.

    start: position of the first query. near: position at which the near keys of all groups start.
    """

    start: int
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
    """A stage of a scan: of all candidates, those `blocks` remain that have the best votes for their means.

    means: mean keys per block.
    """

    means: int
    blocks: int


def groups_of(pattern: Pattern, start: int, stop: int) -> Iterator[Groups]:
    """Yield the groups of queries at positions [start, stop) that see blocks; those that see all blocks are one."""
    w, back, every = pattern.segment_lengths[0], pattern.look_backs[0], pattern.chosen_every
    for segment in range(max(start // w, back + 1), (stop - 1) // w + 1) if start < stop else ():
        begin, end, near = (
            max(start, segment * w),
            min(stop, (segment + 1) * w),
            (segment - back) * w,
        )
        if near <= pattern.chosen_keys:
            yield Groups(begin, 1, end - begin, near)
            continue
        first_edge, last_edge = -(-begin // every) * every, end // every * every
        if begin < first_edge:
            yield Groups(begin, 1, min(first_edge, end) - begin, near)
        if first_edge < last_edge:
            yield Groups(first_edge, (last_edge - first_edge) // every, every, near)
        if max(first_edge, last_edge) < end:
            yield Groups(last_edge, 1, end - last_edge, near)


def slot_of(pattern: Pattern, near: int, start: int) -> int:
    """Return the position at which the scan was made for the group that starts at `start`.

    Groups in the same SCAN tokens of a segment, whose near keys start at `near`, share one.
    """
    segment = near + pattern.look_backs[0] * pattern.segment_lengths[0]
    return segment + (start - segment) // pattern.scan_every * pattern.scan_every


def stages(pattern: Pattern, candidates: float = inf) -> list[ChoiceStage]:
    """Return the stages of a scan of so many blocks, the coarsest first; none if all of them are candidates."""
    finest = pattern.chosen_block // MEAN_OF
    fitting = [ChoiceStage(*stage) for stage in FUNNEL if finest % stage[0] == 0]
    fitting[-1] = ChoiceStage(fitting[-1].means, max(FUNNEL[-1][1], 2 * pattern.chosen))
    return [stage for stage in fitting if candidates > stage.blocks >= fitting[-1].blocks]


def transient_bytes(limits: Limits) -> int:
    """Return the most bytes that chosen blocks take for a time in one layer, beside its inputs and results.

    A call has its keys and values, the keys turned in fp32, and their product; votes have scores, shares, means and a
    power.
    """
    return max(CALL * limits.gathered, round(4 * VOTES * limits.scores))


class Comparisons(NamedTuple):
    """The mean keys that a scan compares, by half of the voters, and those that each group compares, by all of them."""

    scan: int
    group: int


def comparisons(pattern: Pattern, near: int) -> Comparisons:
    """Return what is compared for queries whose near keys start at `near`."""
    if near <= pattern.chosen_keys:
        return Comparisons(0, 0)
    scanned, left = 0, near // pattern.chosen_block - 1
    for stage in stages(pattern, left):
        scanned += stage.means * left
        left = stage.blocks
    return Comparisons(scanned, left * (pattern.chosen_block // MEAN_OF))


class ChosenFlops(NamedTuple):
    """FLOPs of chosen blocks in a forward pass. A backward pass does not vote again."""

    votes: int
    attention: int


def chosen_flops(
    pattern: Pattern, heads: int, head_dim: int, tokens: int, kind: LayerKind = "chooses"
) -> ChosenFlops:
    """Return the FLOPs of a layer's chosen blocks in a document of `tokens`."""
    if not pattern.chosen:
        return ChosenFlops(0, 0)
    (w,), (back,) = pattern.segment_lengths, pattern.look_backs

    def votes(segment: int, queries: int) -> int:
        scan, group = comparisons(pattern, (segment - back) * w)
        scans, groups = -(-queries // pattern.scan_every), -(-queries // pattern.chosen_every)
        return 2 * (scans * scan * VOTERS // 2 + groups * group * VOTERS)

    def attention(segment: int, queries: int) -> int:
        near = (segment - back) * w
        seen = (
            pattern.chosen_block
            if kind == "sees_block_0" and near > pattern.chosen_keys
            else pattern.chosen_keys
        )
        return 4 * queries * min(near, seen)

    whole, rest = divmod(tokens, w)
    # between these segments, the numbers grow evenly
    many = [pattern.chosen_block * (stage.blocks + 1) // w for stage in stages(pattern)]
    edges = [0, pattern.chosen_keys // w, *many, whole - back - 1]
    steps = sorted(back + 1 + max(0, min(edge, whole - back - 1)) for edge in edges)

    def of_document(of_segment: Callable[[int, int], int]) -> int:
        total = of_segment(whole, rest) if whole > back else 0
        for segment, stop in pairwise(steps):
            total += (
                (stop - segment)
                * (of_segment(segment, w) + of_segment(max(segment, stop - 1), w))
                // 2
            )
        return heads * head_dim * total

    return ChosenFlops(of_document(votes) if kind == "chooses" else 0, of_document(attention))


def past_bytes(
    pattern: Pattern,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    itemsize: int,
    kind: LayerKind = "chooses",
) -> tuple[int, int]:
    """Return the bytes of one layer's past: of keys and values, `itemsize` per number, and of the mean keys."""
    if not pattern.chosen:
        return 0, 0
    blocks, means = tokens // pattern.chosen_block, 0
    kept = min(tokens, pattern.chosen_keys) if kind == "sees_block_0" else tokens
    if kind == "chooses":
        means = blocks * (
            pattern.chosen_block // MEAN_OF + sum(stage.means for stage in stages(pattern))
        )
    return kv_heads * head_dim * 2 * itemsize * kept, kv_heads * head_dim * max(4, itemsize) * means
