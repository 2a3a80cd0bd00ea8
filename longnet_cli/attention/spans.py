"""Rows that one strided view can show, and spans: rows outside a shard, by where they are seen and held. Integers only.

A span is one level's rows at consecutive positions of one segment. `far_spans` are those that a shard's queries see,
`open_spans` those that later queries can see. Sinks are spans too, of a level of their own.

Query heads that share a key head and keep the same rows share one *lane*, and a span holds every lane once. If every
query head has its own key head, lanes are heads. At rate 1, and for sinks, lanes are the key heads.

H heads, r dilation rate.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from .pattern import Pattern, ceil_div


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
        return Heads(self.number, others[self.first], self.growth(others))


class HeadRows(NamedTuple):
    """Rows of a segment, in some order of heads: the head that has them, the token of the first one, and their number.

    The rows of a head are `row_step` tokens apart, and those of the next segment `segment_step` tokens later.
    """

    heads: Sequence[int]
    first_tokens: Sequence[int]
    counts: Sequence[int]
    segment_step: int
    row_step: int

    @classmethod
    def at(
        cls,
        start: int,
        stop: int,
        heads: Sequence[int],
        offsets: Sequence[int],
        w: int,
        r: int,
        origin: int = 0,
    ) -> HeadRows:
        """Return the rows at positions [start, stop) of one segment. Tokens count from position `origin`."""
        segment = start // w * w
        first_tokens: list[int] = []
        counts: list[int] = []
        for offset in offsets:
            before = rows_before(start - segment, offset, r)
            first_tokens.append(segment - origin + offset + before * r)
            counts.append(rows_before(stop - segment, offset, r) - before)
        return cls(heads, first_tokens, counts, w, r)

    def view(self, places: Heads, segments: int = 1) -> Rows:
        """Return the view that shows the rows at some places in this order of heads, in so many segments."""
        of_heads = places.of(self.heads)
        return Rows(
            segments=segments,
            segment_step=self.segment_step,
            heads=of_heads.number,
            first_head=of_heads.first,
            head_step=of_heads.step,
            rows=self.counts[places.first],
            row_step=self.row_step,
            first_token=self.first_tokens[places.first],
            skew=places.growth(self.first_tokens),
        )


def rows_before(position: int, offset: int, dilation_rate: int) -> int:
    """Return the number of a segment's rows (at offset, offset + r, ...) that lie before its position `position`."""
    return max(0, -((offset - position) // dilation_rate))


def progressions(
    equal: Sequence[Hashable | None],
    even: Sequence[tuple[int, ...]],
    steps: Sequence[int],
) -> list[Heads]:
    """Divide all heads into few progressions, such that one strided view can show all heads of a progression.

    Heads can share a view if they have the same `equal` (None leaves a head out), and if their values in `even` grow by
    equal steps or stay the same. Both offset rules give long runs of such heads, either neighbours or a fixed step
    apart. Of `steps`, the one with the fewest views is taken.
    """
    fewest: list[Heads] = []
    for step in dict.fromkeys(steps):
        runs: list[Heads] = []
        for first in range(min(step, len(equal))):
            runs += _runs(equal, even, range(first, len(equal), step))
        if not fewest or len(runs) < len(fewest):
            fewest = runs
        if len(fewest) <= 1:
            break
    return fewest


def _runs(
    equal: Sequence[Hashable | None],
    even: Sequence[tuple[int, ...]],
    heads: range,
) -> Iterator[Heads]:
    """Yield these heads in runs that are as long as possible."""
    first = heads.start
    number = 0
    growth: list[int] | None = None  # of `even`, from each head of a run to the next
    for head in heads:
        if number and equal[head] == equal[first]:
            grown = [*map(operator.sub, even[head], even[head - heads.step])]
            if growth in (None, grown) and min(grown) >= 0:
                number += 1
                growth = grown
                continue
        if number:
            yield Heads(number, first, heads.step)
        first = head
        number = 0 if equal[head] is None else 1
        growth = None
    if number:
        yield Heads(number, first, heads.step)


def shared_views(theirs: HeadRows, mine: HeadRows) -> Iterator[tuple[Rows, Rows]]:
    """Yield views that show the same rows of the same lanes in two places, in few pairs."""
    equal = [count or None for count in theirs.counts]
    even = [*zip(theirs.first_tokens, theirs.heads, mine.first_tokens, strict=True)]
    lanes = len(equal)
    of_key_head = lanes // len({*theirs.heads})
    rate = theirs.row_step
    for places in progressions(equal, even, (1, rate, ceil_div(lanes, rate), of_key_head)):
        yield theirs.view(places), mine.view(places)


SINKS = -1  # the level of a span that holds a document's first positions, which every query sees


class FarSpan(NamedTuple):
    """Far keys of one level: its rows at positions [start, stop), which lie in one segment, outside the shard.

    An empty span (start = stop) also has far keys: they keep the operation that made them in the autograd graph. For
    level `SINKS`, positions lie in [0, pattern.sinks).
    """

    level: int
    start: int
    stop: int

    def part(self, start: int, stop: int) -> FarSpan:
        """Return the part of it at positions [start, stop); it may be empty."""
        first = max(self.start, start)
        return FarSpan(self.level, first, max(first, min(self.stop, stop)))


class LevelLanes(NamedTuple):
    """The distinct (key head, offset) pairs of a level, and the index of the pair that each query head reads."""

    kv_heads: tuple[int, ...]
    offsets: tuple[int, ...]
    of_head: tuple[int, ...]


def level_of(pattern: Pattern, level: int) -> tuple[int, int]:
    """Return the segment length and the dilation rate of a span's level; sinks lie in one segment, at rate 1."""
    if level == SINKS:
        return pattern.segment_lengths[0], 1
    return pattern.segment_lengths[level], pattern.dilation_rates[level]


def rows_per_lane(pattern: Pattern, level: int, tokens: int) -> int:
    """Return the most rows of a lane in one segment of a level, in a sequence of `tokens`; for `SINKS`, all sinks."""
    if level == SINKS:
        return pattern.sinks
    w, r = level_of(pattern, level)
    return ceil_div(min(w, tokens), r)


def far_spans(
    pattern: Pattern,
    start: int,
    stop: int,
    causal: bool,
    total: int | None = None,
) -> list[FarSpan]:
    """Return the spans that queries of the shard [start, stop) see outside it, by segment; sinks, not turned, are last.

    `total` is the length of the sequence; bidirectional attention needs it.
    """
    spans: list[FarSpan] = []
    last = stop - 1
    for level, w in enumerate(pattern.segment_lengths):
        look_back = pattern.look_backs[level]
        # The level shows the positions [low, before) that lie before the shard, and [after, high) that lie after it.
        first_key = pattern.first_key(level)
        low = max(first_key, (start // w - look_back) * w)
        before = start
        after = max(first_key, stop)
        high = (last // w + look_back + 1) * w
        if pattern.leaves_out(level):
            inner = pattern.segment_lengths[level - 1]
            inner_back = pattern.look_backs[level - 1]
            before = min(before, (last // inner - inner_back) * inner)
            after = max(after, (start // inner + inner_back + 1) * inner)
        spans += _by_segment(level, w, low, before)
        if not causal:
            assert total is not None
            spans += _by_segment(level, w, after, min(total, high))
    if pattern.sinks and start and sink_segments(pattern, start, stop):
        spans.append(FarSpan(SINKS, 0, min(pattern.sinks, start)))
    return spans


def open_spans(pattern: Pattern, start: int, own: int = 0) -> list[FarSpan]:
    """Return the spans of a causal sequence's first `start` positions that later queries can see, sinks last.

    The spans of levels, but not those of sinks, include the next `own` positions, too.
    """
    spans: list[FarSpan] = []
    for level, w in enumerate(pattern.segment_lengths):
        low = max(0, start // w - pattern.look_backs[level]) * w
        spans += _by_segment(level, w, low, start + own)
    if pattern.sinks and start + own:
        spans.append(FarSpan(SINKS, 0, min(pattern.sinks, start)))
    return spans


def spans_of_sinks(spans: Sequence[FarSpan], number: int, start: int) -> list[tuple[int, FarSpan]]:
    """Return the spans of level `SINKS` that hold the sinks [0, number) before a shard, in order, and their indices.

    Raises ValueError if they do not hold these, each once.
    """
    of_sinks = [(index, span) for index, span in enumerate(spans) if span.level == SINKS]
    of_sinks.sort(key=itemgetter(1))
    starts = [span.start for _, span in of_sinks]
    stops = [span.stop for _, span in of_sinks]
    if [*starts, number] != [0, *stops]:
        raise ValueError(
            f"the sinks [0, {number}) lie before the shard that starts at {start}: give them as far keys"
        )
    return of_sinks


def sink_segments(pattern: Pattern, start: int, stop: int) -> range:
    """Return the first level's segments in [start, stop) that need a call for sinks, as the level covers no sink."""
    if not pattern.sinks or start >= stop:
        return range(0)
    w = pattern.segment_lengths[0]
    first = max(start // w, pattern.look_backs[0] + 1)
    return range(first, (stop - 1) // w + 1)


def _by_segment(level: int, w: int, start: int, stop: int) -> list[FarSpan]:
    """Return the spans of the positions [start, stop), one for each segment of w; none if there is no position."""
    if start >= stop:
        return []
    segments = range(start // w * w, stop, w)
    return [FarSpan(level, max(start, segment), min(stop, segment + w)) for segment in segments]


def whole_segment(pattern: Pattern, span: FarSpan) -> FarSpan:
    """Return the span of all positions of a span's segment; sinks are a segment."""
    if span.level == SINKS:
        return FarSpan(SINKS, 0, pattern.sinks)
    w = pattern.segment_lengths[span.level]
    segment = span.start // w * w
    return FarSpan(span.level, segment, segment + w)


class Lanes(NamedTuple):
    """The lanes of all levels, and their rows: a pattern over `num_heads` query heads on `kv_heads` key heads."""

    pattern: Pattern
    num_heads: int
    kv_heads: int

    def of_level(self, level: int) -> LevelLanes:
        """Return the lanes of a level."""
        return _level_lanes(self, level)

    def number(self, level: int) -> int:
        """Return the number of lanes of a level."""
        return len(self.of_level(level).offsets)

    def in_shard(self, span: FarSpan, start: int) -> HeadRows:
        """Return the rows of `span` in each lane, in a shard that starts at position `start`."""
        w, r = level_of(self.pattern, span.level)
        lanes = self.of_level(span.level)
        return HeadRows.at(span.start, span.stop, lanes.kv_heads, lanes.offsets, w, r, start)

    def packed(self, span: FarSpan, first: int) -> HeadRows:
        """Return the rows of `span` in each lane, in rows that are packed from position `first` of its segment on."""
        first_rows = self.counts(FarSpan(span.level, first, span.start))
        counts = self.counts(span)
        return HeadRows(range(len(counts)), first_rows, counts, segment_step=0, row_step=1)

    def counts(self, span: FarSpan) -> Sequence[int]:
        """Return how many rows of `span` each lane has; lanes differ by at most one."""
        return self.in_shard(span, 0).counts

    def most_rows(self, span: FarSpan) -> int:
        """Return how many rows of `span` the lane has that has the most; 0 if the span is empty."""
        return _most_rows(self, span)


@lru_cache(maxsize=1 << 10)  # decoding asks several times per layer and token
def _level_lanes(lanes: Lanes, level: int) -> LevelLanes:
    heads = lanes.num_heads
    heads_of_key = heads // lanes.kv_heads
    offsets = (0,) * heads
    if level != SINKS:
        offsets = lanes.pattern.offsets(level, heads)
    index_of: dict[tuple[int, int], int] = {}
    of_head: list[int] = []
    for head, offset in enumerate(offsets):
        of_head.append(index_of.setdefault((head // heads_of_key, offset), len(index_of)))
    kv_heads, offsets = zip(*index_of, strict=True)
    return LevelLanes(kv_heads, offsets, tuple(of_head))


@lru_cache(maxsize=1 << 16)  # ranks ask for each pair of ranks
def _most_rows(lanes: Lanes, span: FarSpan) -> int:
    return max(lanes.counts(span)) if span.start < span.stop else 0
