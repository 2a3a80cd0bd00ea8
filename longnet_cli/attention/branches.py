"""Every attention call of a shard: rectangles of query rows and key rows, as strided views. Pure integers.

For a query at position p, level i covers the positions [lo_i, hi_i): the query's own segment and `look_back` segments
before it (in bidirectional attention, as many after it too). A level's queries come in blocks: its segments or, with
overlap="once", the segments of the previous level. All queries of a block see the same keys, but for causality, which
only cuts the keys of their own segment. So a segment needs one causal square, its own keys, and full rectangles for
all others. Whole segments are evenly spaced, so one batched call computes the same rectangle in all of them.

    causal, look_back 1, overlap "once", w_1 = 2 w_0. A row of cells is the queries of one segment of w_0 positions, a
    column the keys of one; a cell says which level sees them. Level 0 sees its own segment and the one before. Level 1
    sees its own segment, of two cells, and the one before, without what level 0 sees:

        0
        0 0
        1 0 0
        1 1 0 0
            1 0 0
            1 1 0 0

A shard is the positions [start, start + tokens) of one sequence. Keys outside the shard are far keys (the packed rows
of a span) or sinks; each needs one more rectangle. A single token's own row may be among the far keys, which saves the
near call of that level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from .pattern import Padding, Pattern, ceil_div
from .spans import (
    SINKS,
    FarSpan,
    HeadRows,
    Heads,
    Lanes,
    Rows,
    level_of,
    progressions,
    rows_before,
    sink_segments,
    spans_of_sinks,
)

BACKWARD_FLOPS = 2.5  # times the forward's: five matrix products instead of two
UNION_LIMIT = 1 << 24  # numbers in the table of a `Union`: 64 MiB in float32


class Branch(NamedTuple):
    """One attention call: query rows of the shard against key rows of the shard (near) or of far keys.

    The heads of `queries` are query heads; the heads of `keys` are key heads, or lanes of far keys. Of a single token,
    all query heads of a key head are rows, if they see the same keys. `far_index` is the index of the far keys, None
    for near ones. `zero_keys` keys with logit 0 and value 0 join the softmax (`padding="zero_key"`). `covers` marks the
    branches that together reach every row of the shard, before any other branch does. A call with a `union` computes
    all levels at once; any other has a `level`, sinks and chosen blocks that of 0.
    """

    queries: Rows
    keys: Rows
    causal: bool
    far_index: int | None = None
    zero_keys: int = 0
    covers: bool = False
    union: Union | None = None
    level: int = 0


class Union(NamedTuple):
    """All levels of a sequence from position 0 on, without far keys, as one softmax of `tokens` rows over as many keys.

    A key that three levels show to a query counts three times, so log 3 is added to its score.
    """

    lanes: Lanes
    causal: bool
    tokens: int


class Turned(NamedTuple):
    """Sinks that were turned for each of the `sink_segments`: packed rows from `row` on, of far keys by their index."""

    far_index: int
    row: int


# layers and repeated runs ask for the same calls again, chunks of a long sequence never do; a plan takes 40 KB
@lru_cache(maxsize=256)
def branches(
    lanes: Lanes,
    start: int,
    tokens: int,
    causal: bool,
    padding: Padding,
    spans: tuple[FarSpan, ...],
    total: int | None = None,
    turned: Turned | None = None,
) -> tuple[Branch, ...]:
    """Return every attention call of a shard: on near keys, level by level, then on far keys, then on sinks.

    `spans` are the spans of the far keys, in the caller's order. Only `padding="zero_key"` uses `total`, the length of
    the whole sequence, or None if the sequence ends with the shard. Sinks are the shard's own first rows and the spans
    of level `SINKS`, unless they are `turned`. Raises ValueError for far keys that the shard cannot attend to, and for
    sinks that are not given.
    """
    shard = _ShardGeometry(lanes, start, start + tokens, causal)
    zero_keys = 0
    if padding == "zero_key" and not causal:
        zero_keys = total or shard.stop
    held_far = [span.level for span in spans if shard.holds(span)]
    calls: list[Branch] = []
    for level in range(len(lanes.pattern.levels)):
        if level not in held_far:
            calls += shard.near_calls(level, zero_keys)
    for index, span in enumerate(spans):
        shard.check(span)
        if span.level != SINKS:
            calls += shard.far_calls(span, index)
    calls += shard.sink_calls(spans, turned)
    return tuple(sorted(calls, key=lambda branch: not branch.covers))


@lru_cache(maxsize=256)
def united(lanes: Lanes, tokens: int, causal: bool) -> tuple[Branch, ...] | None:
    """Return the attention calls of a sequence as the union of its levels, in place of `branches`, or None.

    The union is used only if some level shows every key to every query anyway, if the table of counts is within
    `UNION_LIMIT`, and if the union takes fewer products than the levels one by one. `Union` explains the numbers added
    to scores. On one CPU thread, 8 heads of the paper's pattern then take 1 / 1.6 of the time for 1,024 tokens, forward
    and backward, and 1 / 2.5 for 200.
    """
    # A power of two, so that few tables serve all lengths.
    size = max(256, 1 << (tokens - 1).bit_length())
    whole = max((w for w, r in lanes.pattern.levels if r == 1), default=0)
    if not 1 < tokens <= whole or lanes.num_heads * size**2 > UNION_LIMIT:
        return None
    apart = branches(lanes, 0, tokens, causal, "exact", ())
    products = lanes.num_heads * tokens**2 * (1 if causal else 2)
    if products >= sum(map(pairs, apart)):
        return None
    shard = _ShardGeometry(lanes, 0, tokens, causal)
    union = Union(lanes, causal, size)
    calls: list[Branch] = []
    for call in shard.on_rows(range(tokens), 0, tokens):
        calls.append(call._replace(causal=causal, covers=True, union=union))
    return tuple(calls)


def pairs(branch: Branch) -> int:
    """Return twice the number of scores of a branch; a causal branch has half of its square, and so has one token."""
    queries = branch.queries
    scores = queries.segments * queries.heads * queries.rows * branch.keys.rows
    half = branch.causal or (branch.far_index is None and queries.row_heads)
    return scores if half else 2 * scores


def attention_flops(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    tokens: int,
    causal: bool,
) -> int:
    """Return the executed FLOPs of a forward pass over one document, summed over branches.

    Each head and segment takes 4 * rows * keys * head_dim; a causal square takes half.
    """
    return sum(level_flops(pattern, heads, head_dim, tokens, causal))


def level_flops(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    tokens: int,
    causal: bool,
) -> list[int]:
    """Return the share of each level in `attention_flops`, and last that of calls on what lies apart from them.

    Chosen blocks count as if the text names as many as it may."""
    shard = _ShardGeometry(Lanes(pattern, heads, heads), 0, tokens, causal)
    levels = [shard.near_calls(level) for level in range(len(pattern.levels))]
    beyond = max(0, tokens - (1 + pattern.look_backs[0]) * pattern.segment_lengths[0])
    apart = 4 * heads * head_dim * beyond * pattern.apart_keys
    return [*(2 * head_dim * sum(map(pairs, calls)) for calls in levels), apart]


class _Rectangle(NamedTuple):
    """Queries and keys at neighbouring positions: every query sees every key, but for causality.

    It is repeated in `segments` consecutive segments.
    """

    queries: range
    keys: range
    segments: int = 1

    @property
    def own(self) -> bool:
        """True where the queries' own positions are among the keys."""
        return self.queries.start in self.keys

    def moved(self, distance: int) -> _Rectangle:
        """Return the same rectangle, so many positions further on."""
        queries, keys = self.queries, self.keys
        return _Rectangle(
            range(queries.start + distance, queries.stop + distance),
            range(keys.start + distance, keys.stop + distance),
        )

    def by_segment(self, w: int) -> Iterator[_Rectangle]:
        """Yield a rectangle for each segment of w positions that has keys of this one."""
        for start in range(self.keys.start // w * w, self.keys.stop, w):
            yield self._replace(keys=_overlap(self.keys, range(start, start + w)))

    def in_segments(self, w: int, queries: range, keys: range) -> Iterator[_Rectangle]:
        """Yield this rectangle, of the first segment of w positions, in all segments, cut to these queries and keys.

        The segments in which it is whole go together; any other segment goes by itself. A square:

            segment       0     1     2     3
            queries    |  ...|.....|.....|.. ..|
            yielded        b |  a  |  a  | c
        """
        # the first and the last segment in which all of it lies in these queries and keys
        first_of_queries = ceil_div(queries.start - self.queries.start, w)
        first_of_keys = ceil_div(keys.start - self.keys.start, w)
        last_of_queries = (queries.stop - self.queries.stop) // w
        last_of_keys = (keys.stop - self.keys.stop) // w
        first = max(first_of_queries, first_of_keys)
        last = min(last_of_queries, last_of_keys)
        segments = range(queries.start // w, ceil_div(queries.stop, w))
        others: Iterable[int] = segments
        if first <= last:
            yield self.moved(first * w)._replace(segments=last + 1 - first)
            others = chain(range(segments.start, first), range(last + 1, segments.stop))
        for segment in others:
            moved = self.moved(segment * w)
            part = _Rectangle(_overlap(moved.queries, queries), _overlap(moved.keys, keys))
            if part.queries and part.keys:
                yield part


class _ShardGeometry(NamedTuple):
    """The positions [start, stop) of a sequence, and the calls that their queries need."""

    lanes: Lanes
    start: int
    stop: int
    causal: bool

    @property
    def pattern(self) -> Pattern:
        return self.lanes.pattern

    @property
    def num_heads(self) -> int:
        return self.lanes.num_heads

    @property
    def kv_of(self) -> list[int]:
        """The key head of each query head."""
        return [h * self.lanes.kv_heads // self.num_heads for h in range(self.num_heads)]

    @property
    def covering(self) -> int | None:
        """The level whose calls on the queries' own segments reach every row; None if no level has rate 1."""
        rates = self.pattern.dilation_rates
        return rates.index(1) if 1 in rates else None

    def near_calls(self, level: int, zero_keys: int = 0) -> Iterator[Branch]:
        """Yield a level's calls on near keys. `zero_keys`: length of a sequence whose segments get zero keys, or 0."""
        w, r = level_of(self.pattern, level)
        if zero_keys:
            w = min(w, zero_keys)  # in torchscale, no segment is longer than the sequence
        keys = range(max(self.start, self.pattern.first_key(level)), self.stop)
        # a causal query before the first key sees none, and without it a square stays one
        queries = keys if self.causal else range(self.start, self.stop)
        for part in self._rectangles(level, w, queries, keys):
            of_queries = self._query_rows(level, w, part.queries)
            of_keys = self._level_rows(level, w, part.keys, self.kv_of)
            missing = None
            if zero_keys:
                segment = part.keys.start // w * w
                missing = self._missing_rows(level, w, min(w, zero_keys - segment))
            for branch in self._calls(part.segments, r, of_queries, of_keys, missing):
                causal = self.causal and part.own and not branch.queries.row_heads
                covers = part.own and level == self.covering
                yield branch._replace(causal=causal, covers=covers, level=level)

    def far_calls(self, span: FarSpan, index: int) -> Iterator[Branch]:
        """Yield the calls of the shard's queries on the rows of `span`: full attention, never causal."""
        level = span.level
        w, r = level_of(self.pattern, level)
        queries = range(self.start, self.stop)
        keys = range(max(span.start, self.pattern.first_key(level)), span.stop)
        for part in self._rectangles(level, w, queries, keys):
            of_queries = self._query_rows(level, w, part.queries)
            covers = part.own and level == self.covering
            for branch in self._calls(1, r, of_queries, self._packed_rows(span, part.keys)):
                yield branch._replace(far_index=index, covers=covers, level=level)

    def sink_calls(self, spans: Sequence[FarSpan], turned: Turned | None) -> Iterator[Branch]:
        """Yield the calls that show all sinks to the queries, of any residue, whose first level covers no sink."""
        w = self.pattern.segment_lengths[0]
        sinks = self.pattern.sinks
        segments = sink_segments(self.pattern, self.start, self.stop)
        if not segments:
            return
        queries = range(max(self.start, segments.start * w), self.stop)
        if turned:
            square = _Rectangle(range(w), range(w))
            for part in square.in_segments(w, queries, queries):
                row = turned.row + (part.queries.start // w - segments.start) * sinks
                yield from self.on_rows(
                    part.queries,
                    row,
                    sinks,
                    part.segments,
                    sinks,
                    turned.far_index,
                )
            return
        before = min(sinks, self.start)  # sinks that lie before the shard
        given = spans_of_sinks(spans, before, self.start)
        if before < sinks:
            yield from self.on_rows(queries, before - self.start, sinks - before)
        for index, span in given:
            yield from self.on_rows(queries, 0, span.stop - span.start, far_index=index)

    def holds(self, span: FarSpan) -> bool:
        """Return whether the row of the shard, which is a single token, is the last one of the far keys."""
        return self.causal and self.start + 1 == self.stop == span.stop

    def check(self, span: FarSpan) -> None:
        """Raise ValueError for far keys that the shard cannot attend to."""
        start, stop = span.start, span.stop
        where = f"far keys [{start}, {stop})"
        if start == stop:
            return
        if span.level == SINKS:
            if not 0 <= start < stop <= min(self.pattern.sinks, self.start):
                raise ValueError(
                    f"{where} are not among the {self.pattern.sinks} sinks before {self.start}"
                )
            return
        w, r = level_of(self.pattern, span.level)
        segment = start // w * w
        if not segment <= start < stop <= segment + w:
            raise ValueError(f"{where} of level ({w}, {r}) leave their segment")
        if self.holds(span):
            return
        if start < self.stop and stop > self.start:
            raise ValueError(f"{where} overlap the shard [{self.start}, {self.stop})")
        if self.causal and start >= self.start:
            raise ValueError(f"{where} lie after a causal shard that starts at {self.start}")

    def on_rows(
        self,
        queries: range,
        first_token: int,
        rows: int,
        segments: int = 1,
        segment_step: int = 0,
        far_index: int | None = None,
    ) -> Iterator[Branch]:
        """Yield the calls of the queries at positions `queries` on `rows` neighbouring keys from a token on.

        All heads see all of them. With several `segments`, the keys of the next one are `segment_step` tokens later.
        """
        heads = self.num_heads
        w = self.pattern.segment_lengths[0]
        of_queries = self._all_rows(w, queries)
        of_keys = HeadRows(self.kv_of, [first_token] * heads, [rows] * heads, segment_step or w, 1)
        for branch in self._calls(segments, 1, of_queries, of_keys):
            yield branch._replace(far_index=far_index)

    def _rectangles(
        self,
        level: int,
        w: int,
        queries: range,
        keys: range,
    ) -> list[_Rectangle]:
        """Return all rectangles of a level, with segments of w positions, that have these queries and keys.

        Neighbouring queries that see the same keys are one rectangle, if their rows are evenly spaced.
        """
        zones = _zones(self.pattern, level, w, self.causal)
        evenly = w % self.pattern.dilation_rates[level] == 0
        if not evenly:
            # the spacing of rows breaks between segments, so no view shows rows of two
            zones = [part for zone in zones for part in zone.by_segment(w)]
        rectangles: list[_Rectangle] = []
        for zone in zones:
            rectangles += zone.in_segments(w, queries, keys)
        return _joined(rectangles) if evenly else rectangles

    def _query_rows(self, level: int, w: int, queries: range) -> HeadRows:
        """Return the rows at positions `queries` that query the keys of a level."""
        if self.pattern.queries == "all":
            return self._all_rows(w, queries)
        return self._level_rows(level, w, queries, range(self.num_heads))

    def _all_rows(self, w: int, positions: range) -> HeadRows:
        heads = self.num_heads
        first_token = positions.start - self.start
        return HeadRows(range(heads), [first_token] * heads, [len(positions)] * heads, w, 1)

    def _level_rows(
        self,
        level: int,
        w: int,
        positions: range,
        heads: Sequence[int],
    ) -> HeadRows:
        """Return the rows that a level keeps at some positions, for each query head in one of the `heads`."""
        offsets = self.pattern.offsets(level, self.num_heads)
        r = self.pattern.dilation_rates[level]
        return HeadRows.at(positions.start, positions.stop, heads, offsets, w, r, self.start)

    def _packed_rows(self, span: FarSpan, positions: range) -> HeadRows:
        """Return the rows at some positions of a span in its packed far keys, for each query head in its lane."""
        lane_of = self.lanes.of_level(span.level).of_head
        part = span.part(positions.start, positions.stop)
        packed = self.lanes.packed(part, span.start)
        first_rows = [packed.first_tokens[lane] for lane in lane_of]
        counts = [packed.counts[lane] for lane in lane_of]
        return packed._replace(heads=lane_of, first_tokens=first_rows, counts=counts)

    def _missing_rows(self, level: int, w: int, tokens: int) -> list[int]:
        """Return how many rows each head of a segment of `tokens` lacks, to have as many as one of w can have."""
        r = self.pattern.dilation_rates[level]
        most = ceil_div(w, r)
        offsets = self.pattern.offsets(level, self.num_heads)
        return [most - rows_before(tokens, offset, r) for offset in offsets]

    def _calls(
        self,
        segments: int,
        r: int,
        queries: HeadRows,
        keys: HeadRows,
        zero_keys: Sequence[int] | None = None,
    ) -> Iterator[Branch]:
        """Yield the calls of query rows on key rows, both given for each query head, in few views.

        A call has heads whose rows one view can show: with as many queries, keys and `zero_keys` each, and with rows
        that are evenly spaced from head to head. Heads without a query or a key are in no call. The query heads of one
        key head are neighbours: those of a single token become the rows of one head of a call, if they see the same
        keys.
        """
        heads = self.num_heads
        heads_of_key = heads // self.lanes.kv_heads
        zeros = zero_keys or [0] * heads
        counts = zip(queries.counts, keys.counts, zeros, strict=True)
        equal = [of_head if all(of_head[:2]) else None for of_head in counts]
        even = [*zip(queries.first_tokens, keys.first_tokens, keys.heads, strict=True)]
        folded = 1  # query heads that become the rows of one
        shapes = [*zip(equal, even, strict=True)]
        if self.start + 1 == self.stop and _in_groups(shapes, heads_of_key):
            folded = heads_of_key
        steps = (1, r, ceil_div(heads, r), heads_of_key)
        for places in progressions(equal[::folded], even[::folded], steps):
            of_heads = Heads(places.number, places.first * folded, places.step * folded)
            of_queries = queries.view(of_heads, segments)
            if folded > 1:
                of_queries = of_queries._replace(rows=folded, row_step=0, row_heads=1)
            of_keys = keys.view(of_heads, segments)
            yield Branch(of_queries, of_keys, causal=False, zero_keys=zeros[of_heads.first])


def _in_groups(values: Sequence[object], size: int) -> bool:
    """Return whether all values of each group of so many neighbours are equal."""
    return all(value == values[index - index % size] for index, value in enumerate(values))


def _zones(pattern: Pattern, level: int, w: int, causal: bool) -> list[_Rectangle]:
    """Return what the queries of the first segment, of w positions, see at a level, as if there were others before it.

    Causal, with segments of 4 and 8, look_back 1, overlap="once". At level 1, each block of 4 queries sees what level 0
    leaves to it:

        level 0    queries [0, 4)    keys [0, 4), a square, and keys [-4, 0)
        level 1    queries [0, 4)    keys [-8, -4)
                   queries [4, 8)    keys [-8, 0)
    """
    back = pattern.look_backs[level]
    low, high = -back * w, (back + 1) * w
    if pattern.leaves_out(level):
        inner = pattern.segment_lengths[level - 1]
        # positions on each side of a block that the level before covers
        covered = pattern.look_backs[level - 1] * inner
        zones = []
        for block in (range(start, start + inner) for start in range(0, w, inner)):
            zones.append(_Rectangle(block, range(low, block.start - covered)))
            if not causal:
                zones.append(_Rectangle(block, range(block.stop + covered, high)))
    elif causal:
        zones = [_Rectangle(range(w), range(w)), _Rectangle(range(w), range(low, 0))]
    else:
        zones = [_Rectangle(range(w), range(low, high))]
    return [zone for zone in zones if zone.keys]


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _joined(parts: list[_Rectangle]) -> list[_Rectangle]:
    """Join neighbouring queries that see the same keys, as those of several blocks see the same far keys.

    queries 0 .. 7     keys 40 .. 63
    queries 8 .. 15    keys 40 .. 63    are    queries 0 .. 15    keys 40 .. 63
    """
    joined: list[_Rectangle] = []
    for part in sorted(parts, key=lambda part: (*_edges(part.keys), *_edges(part.queries))):
        last = joined[-1] if joined else part
        alike = last == part._replace(queries=last.queries) and not last.own and not part.own
        if alike and last.queries.stop == part.queries.start:
            joined[-1] = part._replace(queries=range(last.queries.start, part.queries.stop))
        else:
            joined.append(part)
    return joined


def _edges(positions: range) -> tuple[int, int]:
    return positions.start, positions.stop
