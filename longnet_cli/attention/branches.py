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
from math import lcm
from typing import NamedTuple

from .groups import chosen_flops
from .pattern import LayerKind, Padding, Pattern
from .spans import (
    SINKS,
    FarSpan,
    HeadRows,
    Heads,
    Layout,
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

    layout: Layout
    causal: bool
    tokens: int


class Turned(NamedTuple):
    """Sinks that were turned for each of the `sink_segments`: packed rows from `row` on, of far keys by their index."""

    far_index: int
    row: int


# layers and repeated runs ask for the same calls again, chunks of a long sequence never do; a plan takes 40 KB
@lru_cache(maxsize=256)
def branches(
    layout: Layout,
    start: int,
    tokens: int,
    causal: bool,
    padding: Padding,
    spans: tuple[FarSpan, ...],
    total: int = 0,
    turned: Turned | None = None,
) -> tuple[Branch, ...]:
    """Return every attention call of a shard: on near keys, level by level, then on far keys, then on sinks.

    `spans` are the spans of the far keys, in the caller's order. Only `padding="zero_key"` uses `total`, the length of
    the whole sequence, or 0 if the sequence ends with the shard. Sinks are the shard's own first rows and the spans of
    level `SINKS`, unless they are `turned`. Raises ValueError for far keys that the shard cannot attend to, and for
    sinks that are not given.
    """
    pattern, shard = layout.pattern, _ShardGeometry(layout, start, start + tokens, causal)
    covering = next((i for i, r in enumerate(pattern.dilation_rates) if r == 1), None)
    calls: list[Branch] = []
    for level in range(len(pattern.levels)):
        zero_keys = (total or start + tokens) if padding == "zero_key" else 0
        if not any(span.level == level and shard.holds(span) for span in spans):
            calls += shard.near_calls(level, level == covering, zero_keys)
    for index, span in enumerate(spans):
        shard.check(span)
        if span.level != SINKS:
            calls += shard.far_calls(span, index, span.level == covering)
    calls += shard.sink_calls(spans, turned)
    return tuple(sorted(calls, key=lambda branch: not branch.covers))


@lru_cache(maxsize=256)
def united(layout: Layout, tokens: int, causal: bool) -> tuple[Branch, ...] | None:
    """Return the attention calls of a sequence as the union of its levels, in place of `branches`, or None.

    The union is used only if some level shows every key to every query anyway, if the table of counts is within
    `UNION_LIMIT`, and if the union takes fewer products than the levels one by one. `Union` explains the numbers added
    to scores. On one CPU thread, 8 heads of the paper's pattern then take 1 / 1.6 of the time for 1,024 tokens, forward
    and backward, and 1 / 2.5 for 200.
    """
    whole = any(w >= tokens > 1 and r == 1 for w, r in layout.pattern.levels)
    if not whole or layout.num_heads * _table_size(tokens) ** 2 > UNION_LIMIT:
        return None
    apart = branches(layout, 0, tokens, causal, "exact", ())
    if layout.num_heads * tokens**2 * (2 - causal) >= sum(map(pairs, apart)):
        return None
    shard, union = (
        _ShardGeometry(layout, 0, tokens, causal),
        Union(layout, causal, _table_size(tokens)),
    )
    calls = shard.on_rows((0, tokens), 0, tokens)
    return tuple(branch._replace(causal=causal, covers=True, union=union) for branch in calls)


def _table_size(tokens: int) -> int:
    """Return the size of the table of counts for a sequence: a power of two, so that few tables serve all lengths."""
    return max(256, 1 << (tokens - 1).bit_length())


def pairs(branch: Branch) -> int:
    """Return twice the number of scores of a branch; a causal branch has half of its square, and so has one token."""
    half = branch.causal or (branch.far_index is None and branch.queries.row_heads)
    return (
        branch.queries.segments
        * branch.queries.heads
        * branch.queries.rows
        * branch.keys.rows
        * (1 if half else 2)
    )


def attention_flops(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    tokens: int,
    causal: bool,
    kind: LayerKind = "chooses",
) -> int:
    """Return the executed FLOPs of a forward pass over one document, summed over branches.

    Each head and segment takes 4 * rows * keys * head_dim; a causal square takes half. With chosen blocks, this depends
    on the `kind` of the layer.
    """
    return sum(level_flops(pattern, heads, head_dim, tokens, causal, kind))


def level_flops(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    tokens: int,
    causal: bool,
    kind: LayerKind = "chooses",
) -> list[int]:
    """Return the share of each level in `attention_flops`, and last that of calls on sinks alone or chosen blocks."""
    shard = _ShardGeometry(Layout(pattern, heads, heads), 0, tokens, causal)
    parts = [
        *(shard.near_calls(level, False, 0) for level in range(len(pattern.levels))),
        shard.sink_calls((), None),
    ]
    flops = [2 * head_dim * sum(map(pairs, part)) for part in parts]
    flops[-1] += sum(chosen_flops(pattern, heads, head_dim, tokens, kind))
    return flops


def backward_flops(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    tokens: int,
    causal: bool,
    kind: LayerKind = "chooses",
) -> float:
    """Return the executed FLOPs of a backward pass over one document."""
    votes = chosen_flops(pattern, heads, head_dim, tokens, kind).votes
    return BACKWARD_FLOPS * (
        attention_flops(pattern, heads, head_dim, tokens, causal, kind) - votes
    )


_Positions = tuple[int, int]  # [start, stop)


class _Zone(NamedTuple):
    """Queries of one block of each segment, and the keys they see; positions count from the start of the segment.

    Queries are [start, start + length), keys [low, high). `square`: attention is causal, with queries and keys at the
    same positions. `own`: the keys include those at the queries' own positions.
    """

    start: int
    length: int
    low: int
    high: int
    square: bool
    own: bool

    def at(self, start: int) -> _Rectangle:
        """Return the zone of the segment that starts at position `start`."""
        queries = start + self.start, start + self.start + self.length
        return _Rectangle(1, queries, (start + self.low, start + self.high), self.square, self.own)

    def touched(self, w: int, queries: _Positions, keys: _Positions) -> range:
        """Return the segments of w positions that have a query in `queries` and a key in `keys`."""
        after = max((queries[0] - self.start - self.length) // w, (keys[0] - self.high) // w)
        last = min((queries[1] - 1 - self.start) // w, (keys[1] - 1 - self.low) // w)
        return range(after + 1, last + 1)

    def whole(self, w: int, queries: _Positions, keys: _Positions) -> range:
        """Return the segments of w positions that have all of their queries in `queries`, and all keys in `keys`."""
        first_segment = max(-((self.start - queries[0]) // w), -((self.low - keys[0]) // w))
        last = min((queries[1] - self.start - self.length) // w, (keys[1] - self.high) // w)
        return range(first_segment, last + 1)


class _Rectangle(NamedTuple):
    """Queries and keys at positions [start, stop), repeated in `segments` consecutive segments."""

    segments: int
    queries: _Positions
    keys: _Positions
    square: bool
    own: bool

    def cut(self, queries: _Positions, keys: _Positions) -> _Rectangle | None:
        """Return the part with these queries and keys, of one segment; None if it has no query or no key."""
        queries, keys = _overlap(self.queries, queries), _overlap(self.keys, keys)
        if self.square:  # the positions that both have are a square again
            queries = keys = _overlap(queries, keys)
        if queries[0] >= queries[1] or keys[0] >= keys[1]:
            return None
        return _Rectangle(1, queries, keys, self.square, self.own)


class _ShardGeometry(NamedTuple):
    """The positions [start, stop) of a sequence, and the calls that their queries need."""

    layout: Layout
    start: int
    stop: int
    causal: bool

    @property
    def pattern(self) -> Pattern:
        return self.layout.pattern

    @property
    def num_heads(self) -> int:
        return self.layout.num_heads

    @property
    def kv_of(self) -> list[int]:
        """The key head of each query head."""
        return [h * self.layout.kv_heads // self.num_heads for h in range(self.num_heads)]

    def near_calls(self, level: int, covering: bool, zero_keys: int) -> Iterator[Branch]:
        """Yield a level's calls on near keys. `zero_keys`: length of a sequence whose segments get zero keys, or 0."""
        w, r = level_of(self.pattern, level)
        if zero_keys:
            w = min(w, zero_keys)  # in torchscale, no segment is longer than the sequence
        offsets = self.pattern.offsets(level, self.num_heads)
        low = max(self.start, self.pattern.sinks) if level else self.start
        for part in self._rectangles(
            _zones(self.pattern, level, w, self.causal), w, r, low, self.stop
        ):
            keys = self._level_rows(level, w, part.keys, self.kv_of)
            missing = [0] * self.num_heads  # rows that the segment lacks to have ceil(w / r)
            if zero_keys and not self.causal:
                missing = [
                    -(-w // r) - rows_before(min(w, zero_keys - part.keys[0] // w * w), o, r)
                    for o in offsets
                ]
            for branch in self._calls(
                part.segments, r, self._query_rows(level, w, part.queries), keys, missing
            ):
                causal = part.square and not branch.queries.row_heads
                yield branch._replace(causal=causal, covers=covering and part.own, level=level)

    def far_calls(self, span: FarSpan, index: int, covering: bool) -> Iterator[Branch]:
        """Yield the calls of the shard's queries on the rows of `span`: full attention, never causal."""
        w, r = level_of(self.pattern, span.level)
        segment, lane_of = span.start // w * w, self.layout.lanes(span.level).of_head
        low = max(span.start, self.pattern.sinks) if span.level else span.start
        zones = [
            zone._replace(square=False, own=zone.own and self.holds(span))
            for zone in _zones(self.pattern, span.level, w, self.causal)
        ]
        for part in self._rectangles(zones, w, r, low, span.stop, apart=True):
            edges = span.start, *part.keys
            before, start, stop = (
                self.layout.rows_before(span.level, edge - segment) for edge in edges
            )
            first_rows, counts = (
                [start[i] - before[i] for i in lane_of],
                [stop[i] - start[i] for i in lane_of],
            )
            keys = HeadRows(lane_of, first_rows, counts, w, 1)
            for branch in self._calls(1, r, self._query_rows(span.level, w, part.queries), keys):
                yield branch._replace(
                    far_index=index, covers=covering and part.own, level=span.level
                )

    def sink_calls(self, spans: Sequence[FarSpan], turned: Turned | None) -> Iterator[Branch]:
        """Yield the calls that show all sinks to the queries, of any residue, whose first level covers no sink."""
        w, n = self.pattern.segment_lengths[0], self.pattern.sinks
        segments = sink_segments(self.pattern, self.start, self.stop)
        if not segments:
            return
        begin = max(self.start, segments.start * w)
        if turned:
            zone = _Zone(start=0, length=w, low=0, high=w, square=True, own=False)
            for part in self._rectangles([zone], w, 1, begin, self.stop):
                row = turned.row + (part.queries[0] // w - segments.start) * n
                yield from self.on_rows(
                    part.queries, row, n, part.segments, segment_step=n, far_index=turned.far_index
                )
            return
        queries, own = (begin, self.stop), min(n, self.start)  # sinks [0, own) lie before the shard
        given = spans_of_sinks(spans, own, self.start)
        if own < n:
            yield from self.on_rows(queries, own - self.start, n - own)
        for index, span in given:
            yield from self.on_rows(queries, 0, span.stop - span.start, far_index=index)

    def holds(self, span: FarSpan) -> bool:
        """Return whether the row of the shard, which is a single token, is the last one of the far keys."""
        return self.causal and self.start + 1 == self.stop == span.stop

    def check(self, span: FarSpan) -> None:
        """Raise ValueError for far keys that the shard cannot attend to."""
        start, stop, where = span.start, span.stop, f"far keys [{span.start}, {span.stop})"
        if start == stop:
            return
        if span.level == SINKS:
            if not 0 <= start < stop <= min(self.pattern.sinks, self.start):
                raise ValueError(
                    f"{where} are not among the {self.pattern.sinks} sinks before {self.start}"
                )
            return
        w, r = level_of(self.pattern, span.level)
        if not start // w * w <= start < stop <= start // w * w + w:
            raise ValueError(f"{where} of level ({w}, {r}) leave their segment")
        if self.holds(span):
            return
        if start < self.stop and stop > self.start:
            raise ValueError(f"{where} overlap the shard [{self.start}, {self.stop})")
        if self.causal and start >= self.start:
            raise ValueError(f"{where} lie after a causal shard that starts at {self.start}")

    def _rectangles(
        self, zones: Iterable[_Zone], w: int, r: int, low: int, high: int, apart: bool = False
    ) -> list[_Rectangle]:
        """Cut the zones to the shard's queries and to keys in [low, high); return rectangles, own keys first.

        Whole segments that have all of their keys form one rectangle. Each other segment is one by itself; neighbours
        that see the same keys are joined if their rows stay evenly spaced. `apart`: keys are packed, so segments do not
        form one rectangle.
        """
        positions, seen = (self.start, self.stop), (low, high)
        together: list[_Rectangle] = []
        single: list[_Rectangle] = []
        for zone in zones:
            touched, whole = zone.touched(w, positions, seen), zone.whole(w, positions, seen)
            alone: Iterable[int] = touched
            if whole and not apart:
                together.append(zone.at(whole.start * w)._replace(segments=len(whole)))
                alone = chain(range(touched.start, whole.start), range(whole.stop, touched.stop))
            cut = (zone.at(segment * w).cut(positions, seen) for segment in alone)
            single += [part for part in cut if part]
        even = self.pattern.queries == "all" or w % r == 0
        return sorted(
            [*together, *(_joined(single) if even else single)], key=lambda part: not part.own
        )

    def on_rows(
        self,
        queries: _Positions,
        first_token: int,
        rows: int,
        segments: int = 1,
        segment_step: int = 0,
        far_index: int | None = None,
    ) -> Iterator[Branch]:
        """Yield the calls of the queries at positions `queries` on `rows` neighbouring keys from a token on.

        All heads see all of them. With several `segments`, the keys of the next one are `segment_step` tokens later.
        """
        n, w = self.num_heads, self.pattern.segment_lengths[0]
        of_queries = self._all_rows(w, queries)
        of_keys = HeadRows(self.kv_of, [first_token] * n, [rows] * n, segment_step or w, 1)
        for branch in self._calls(segments, 1, of_queries, of_keys):
            yield branch._replace(far_index=far_index)

    def _query_rows(self, level: int, w: int, queries: _Positions) -> HeadRows:
        """Return the rows at positions `queries` that query the keys of a level."""
        if self.pattern.queries == "all":
            return self._all_rows(w, queries)
        return self._level_rows(level, w, queries, range(self.num_heads))

    def _all_rows(self, w: int, positions: _Positions) -> HeadRows:
        n, (start, stop) = self.num_heads, positions
        return HeadRows(range(n), [start - self.start] * n, [stop - start] * n, w, 1)

    def _level_rows(
        self, level: int, w: int, positions: _Positions, heads: Sequence[int]
    ) -> HeadRows:
        """Return the rows that a level keeps at some positions, for each query head in one of the `heads`."""
        offsets, r = self.pattern.offsets(level, self.num_heads), self.pattern.dilation_rates[level]
        return HeadRows.at(*positions, heads, offsets, w, r, self.start)

    def _calls(
        self,
        segments: int,
        r: int,
        queries: HeadRows,
        keys: HeadRows,
        zero_keys: Sequence[int] | None = None,
    ) -> Iterator[Branch]:
        """Yield calls of query rows on key rows, in few views, with so many zero keys for each head.

        Query heads of one key head are neighbours. If a single token's see the same keys, they become rows of a call.
        """
        group, zeros = self.num_heads // self.layout.kv_heads, zero_keys or [0] * self.num_heads
        sizes = zip(queries.counts, keys.counts, zeros, strict=True)
        equal = [of_head if all(of_head[:2]) else None for of_head in sizes]
        even = list(zip(queries.first_tokens, keys.first_tokens, keys.heads, strict=True))
        steps = (1, r, -(-self.num_heads // r), group, lcm(r, group))
        heads = [*zip(equal, even, strict=True)]
        if self.start + 1 < self.stop or heads != [x for x in heads[::group] for _ in range(group)]:
            runs, folded = progressions(equal, even, steps), dict[str, int]()
        else:
            runs = progressions(equal[::group], even[::group], steps)
            runs = [Heads(number, first * group, step * group) for number, first, step in runs]
            folded = {"rows": group, "row_step": 0, "row_heads": 1} if group > 1 else {}
        for run in runs:
            of_queries = queries.view(run, segments)._replace(**folded)
            yield Branch(
                of_queries, keys.view(run, segments), causal=False, zero_keys=zeros[run.first]
            )


def _zones(pattern: Pattern, level: int, w: int, causal: bool) -> list[_Zone]:
    """Return the zones of a segment of w positions at a level, a causal square first."""
    b = pattern.look_backs[level]
    if pattern.overlap == "once" and level:
        u, near = pattern.segment_lengths[level - 1], pattern.look_backs[level - 1]
        firsts = range(0, w, u)
        zones = [
            _Zone(j, u, low=-b * w, high=j - near * u, square=False, own=False) for j in firsts
        ]
        if not causal:
            zones += [
                _Zone(j, u, low=j + (near + 1) * u, high=(b + 1) * w, square=False, own=False)
                for j in firsts
            ]
    elif causal:
        before = _Zone(0, w, low=-b * w, high=0, square=False, own=False)
        zones = [_Zone(0, w, low=0, high=w, square=True, own=True), before]
    else:
        zones = [_Zone(0, w, low=-b * w, high=(b + 1) * w, square=False, own=True)]
    if (
        w % pattern.dilation_rates[level]
    ):  # row spacing breaks between segments: no view shows rows of two
        zones = [
            zone._replace(low=max(zone.low, s), high=min(zone.high, s + w), own=zone.own and s == 0)
            for zone in zones
            for s in range(zone.low // w * w, zone.high, w)
        ]
    return [zone for zone in zones if zone.low < zone.high]


def _overlap(a: _Positions, b: _Positions) -> _Positions:
    return max(a[0], b[0]), min(a[1], b[1])


def _joined(parts: list[_Rectangle]) -> list[_Rectangle]:
    """Join neighbouring queries that see the same keys."""
    joined: list[_Rectangle] = []
    for part in sorted(parts, key=lambda part: (part.square, part.own, part.keys, part.queries)):
        last = joined[-1] if joined else part
        same = (last.keys, last.square, last.own, last.queries[1]) == (
            part.keys,
            False,
            part.own,
            part.queries[0],
        )
        if same:
            joined[-1] = last._replace(queries=(last.queries[0], part.queries[1]))
        else:
            joined.append(part)
    return joined
