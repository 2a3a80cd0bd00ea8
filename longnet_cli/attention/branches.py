"""Every attention call of a shard: rectangles of query rows and key rows, as strided views. Pure integers.

For a query at position p, level i covers the positions [lo_i, hi_i): the query's own segment and `look_back` segments
before it (in bidirectional attention, as many after it too). A level's queries come in blocks: its segments or, with
overlap="once", the segments of the previous level. Apart from causality, all queries of a block see the same keys. So
each segment needs one causal square, and full rectangles. Whole segments are evenly spaced, so one batched call
computes the same rectangle in all of them.

    causal, look_back 1, overlap "once", w_1 = 2 w_0           keys ->
                                                    queries    # 0 0
    0  level 0: its own segment and the one before             | # 0 0
    1  level 1: from lo_1 to lo_0                              v 1 # 0 0
    #  both level 0                                              1 1 # 0 0

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
from .pattern import Padding, Pattern
from .spans import SINKS, Heads, Rows, Span, lanes, level_of, progressions, rows_before, sink_segments

BACKWARD_FLOPS = 2.5  # times the forward's: five matrix products instead of two
UNION_LIMIT = 1 << 24  # numbers in the table of a `Union`: 64 MiB in float32


class Branch(NamedTuple):
    """One attention call: query rows of the shard against key rows of the shard (near) or of far keys.

    The heads of `queries` are query heads; the heads of `keys` are key heads, or lanes of far keys. Of a single token,
    all query heads of a key head are rows, if they see the same keys. `far` is the index of the far keys, None for near
    ones. `zero_keys` keys with logit 0 and value 0 join the softmax
    (`padding="zero_key"`). `first` marks the branches that reach every row of the shard before any other branch does.
    `bias` is added to all scores. A call with a `union` computes all levels at once.
    """

    queries: Rows
    keys: Rows
    causal: bool
    far: int | None = None
    zero_keys: int = 0
    first: bool = False
    bias: float = 0.0
    union: Union | None = None


class Union(NamedTuple):
    """All levels of a sequence from position 0 on, without far keys, as one softmax of `tokens` rows over as many keys.

    A key that three levels show to a query counts three times, so log 3 is added to its score.
    """

    pattern: Pattern
    num_heads: int
    kv_heads: int
    causal: bool
    tokens: int


class Turned(NamedTuple):
    """Sinks that were turned for each of the `sink_segments`: packed rows of far keys `far`, from row `row` on."""

    far: int
    row: int


# layers and repeated runs ask for the same calls again, chunks of a long sequence never do; a plan takes 40 KB
@lru_cache(maxsize=256)
def branches(
    pattern: Pattern,
    num_heads: int,
    start: int,
    tokens: int,
    causal: bool,
    padding: Padding,
    spans: tuple[Span, ...],
    total: int = 0,
    kv_heads: int = 0,
    turned: Turned | None = None,
) -> tuple[Branch, ...]:
    """Return every attention call of a shard: on near keys, level by level, then on far keys, then on sinks.

    `spans` are the spans of the far keys, in the caller's order. Only `padding="zero_key"` uses `total`, the length of
    the whole sequence, or 0 if the sequence ends with the shard. `kv_heads` 0 means `num_heads`. Sinks are the shard's
    own first rows and the spans of level `SINKS`, unless they are `turned`. Raises ValueError for far keys that the
    shard cannot attend to, and for sinks that are not given.
    """
    call = _Call(pattern, num_heads, kv_heads or num_heads, start, start + tokens, causal)
    covering = next((i for i, r in enumerate(pattern.dilation_rates) if r == 1), None)
    found: list[Branch] = []
    for level in range(len(pattern.levels)):
        zero_keys = (total or start + tokens) if padding == "zero_key" else 0
        if not any(span.level == level and call.holds(span) for span in spans):
            found += call.near(level, level == covering, zero_keys)
    for index, span in enumerate(spans):
        call.check(span)
        if span.level != SINKS:
            found += call.far(span, index, span.level == covering)
    found += call.sinks(spans, turned)
    return tuple(sorted(found, key=lambda branch: not branch.first))


@lru_cache(maxsize=256)
def united(pattern: Pattern, num_heads: int, tokens: int, causal: bool, kv_heads: int) -> tuple[Branch, ...] | None:
    """Return the attention calls of a sequence as the union of its levels, in place of `branches`, or None.

    The union is used only if some level shows every key to every query anyway, if the table of counts is within
    `UNION_LIMIT`, and if the union takes fewer products than the levels one by one. `Union` explains the numbers added
    to scores.
    """
    whole = any(w >= tokens > 1 and r == 1 for w, r in pattern.levels)
    if not whole or num_heads * _table_size(tokens) ** 2 > UNION_LIMIT:
        return None
    apart = branches(pattern, num_heads, 0, tokens, causal, "exact", (), 0, kv_heads)
    if num_heads * tokens**2 * (2 - causal) >= sum(map(_pairs, apart)):
        return None
    call = _Call(pattern, num_heads, kv_heads, 0, tokens, causal)
    union = Union(pattern, num_heads, kv_heads, causal, _table_size(tokens))
    rows = Rows(0, pattern.segment_lengths[0], 0, 0, 0, tokens, 1, 0, 0)
    calls = call._sink_rows(1, (0, tokens), rows, None)
    return tuple(found._replace(causal=causal, first=True, union=union) for found in calls)


def _table_size(tokens: int) -> int:
    """Return the size of the table of counts for a sequence: a power of two, so that few tables serve all lengths."""
    return max(256, 1 << (tokens - 1).bit_length())


def _pairs(branch: Branch) -> int:
    """Return twice the number of scores of a branch; a causal branch has half of its square, and so has one token."""
    half = branch.causal or (branch.far is None and branch.queries.row_heads)
    return branch.queries.segments * branch.queries.heads * branch.queries.rows * branch.keys.rows * (1 if half else 2)


def attention_flops(
    pattern: Pattern, heads: int, head_dim: int, tokens: int, causal: bool, batch: int = 1, kv_heads: int = 0
) -> int:
    """Return the executed FLOPs of a forward pass, summed over branches.

    Each head and segment takes 4 * rows * keys * head_dim; a causal square takes half.
    """
    return sum(level_flops(pattern, heads, head_dim, tokens, causal, batch, kv_heads))


def level_flops(
    pattern: Pattern, heads: int, head_dim: int, tokens: int, causal: bool, batch: int = 1, kv_heads: int = 0
) -> list[int]:
    """Return the share of each level in `attention_flops`, and last that of calls on sinks alone or chosen blocks."""
    call = _Call(pattern, heads, kv_heads or heads, 0, tokens, causal)
    parts = [*(call.near(level, False, 0) for level in range(len(pattern.levels))), call.sinks((), None)]
    flops = [2 * head_dim * batch * sum(map(_pairs, part)) for part in parts]
    flops[-1] += batch * sum(chosen_flops(pattern, heads, head_dim, tokens))
    return flops


def backward_flops(
    pattern: Pattern, heads: int, head_dim: int, tokens: int, causal: bool, batch: int = 1, kv_heads: int = 0
) -> float:
    """Return the executed FLOPs of a backward pass."""
    votes = batch * chosen_flops(pattern, heads, head_dim, tokens).votes
    return BACKWARD_FLOPS * (attention_flops(pattern, heads, head_dim, tokens, causal, batch, kv_heads) - votes)


def shard_flops(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    start: int,
    tokens: int,
    causal: bool,
    spans: tuple[Span, ...],
    total: int,
    kv_heads: int = 0,
) -> int:
    """Return the executed FLOPs of a shard's forward pass, on its own keys, far keys of `spans` and chosen blocks."""
    calls = branches(pattern, heads, start, tokens, causal, "exact", spans, total, kv_heads)
    before, after = (sum(chosen_flops(pattern, heads, head_dim, stop)) for stop in (start, start + tokens))
    return 2 * head_dim * sum(map(_pairs, calls)) + after - before


class _Zone(NamedTuple):
    """Queries of one block of each segment, and the keys they see; positions count from the start of the segment.

    Queries are [first, first + length), keys [low, high). `square`: attention is causal, with queries and keys at the
    same positions. `own`: the keys include those at the queries' own positions.
    """

    first: int
    length: int
    low: int
    high: int
    square: bool
    own: bool


class _Rectangle(NamedTuple):
    """Queries and keys at positions [first, stop), repeated in `segments` consecutive segments."""

    segments: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    square: bool
    own: bool


class _Call(NamedTuple):
    """One shard, the positions [start, stop) of a sequence."""

    pattern: Pattern
    num_heads: int
    kv_heads: int
    start: int
    stop: int
    causal: bool

    def near(self, level: int, covering: bool, zero_keys: int) -> Iterator[Branch]:
        """Yield a level's calls on near keys. `zero_keys`: length of a sequence whose segments get zero keys, or 0."""
        w, r = level_of(self.pattern, level)
        if zero_keys:
            w = min(w, zero_keys)  # in torchscale, no segment is longer than the sequence
        offsets = self.pattern.offsets(level, self.num_heads)
        kv_of = [h * self.kv_heads // self.num_heads for h in range(self.num_heads)]
        low = max(self.start, self.pattern.sinks) if level else self.start
        bias = self.pattern.biases[level]
        for part in self._rectangles(_zones(self.pattern, level, w, self.causal), w, r, low, self.stop):
            queries, counts = self._queries(level, w, part.queries)
            firsts, rows = queries, counts
            if part.keys != part.queries or self.pattern.queries == "all":
                firsts, rows = self._tokens(level, w, part.keys)
            missing = [0] * self.num_heads  # rows that the segment lacks to have ceil(w / r)
            if zero_keys and not self.causal:
                missing = [-(-w // r) - rows_before(min(w, zero_keys - part.keys[0] // w * w), o, r) for o in offsets]
            equal = [(*pair, zeros) if min(pair) else None for *pair, zeros in zip(counts, rows, missing, strict=True)]
            runs, group = self._runs(r, equal, queries, firsts, kv_of)
            for heads in runs:
                yield Branch(
                    self._query_rows(part.segments, w, heads, counts, r, queries, group),
                    Rows(
                        part.segments, w, *heads.of(kv_of), rows[heads.first], r, firsts[heads.first],
                        heads.growth(firsts),
                    ),
                    part.square and group == 1,
                    zero_keys=missing[heads.first],
                    first=covering and part.own,
                    bias=bias,
                )  # fmt: skip

    def far(self, span: Span, index: int, covering: bool) -> Iterator[Branch]:
        """Yield the calls of the shard's queries on the rows of `span`: full attention, never causal."""
        w, r = level_of(self.pattern, span.level)
        _, offsets, lane_of = lanes(self.pattern, span.level, self.num_heads, self.kv_heads)
        inside, segment = span.start % w, span.start // w * w
        low = max(span.start, self.pattern.sinks) if span.level else span.start
        bias = self.pattern.biases[span.level]
        zones = [
            zone._replace(square=False, own=zone.own and self.holds(span))
            for zone in _zones(self.pattern, span.level, w, self.causal)
        ]
        for part in self._rectangles(zones, w, r, low, span.stop, apart=True):
            queries, counts = self._queries(span.level, w, part.queries)
            skipped = [rows_before(inside, o, r) for o in offsets]
            firsts = [rows_before(part.keys[0] - segment, o, r) - b for o, b in zip(offsets, skipped, strict=True)]
            stops = [rows_before(part.keys[1] - segment, o, r) - b for o, b in zip(offsets, skipped, strict=True)]
            rows = [stop - first for first, stop in zip(firsts, stops, strict=True)]
            pairs = [(count, rows[lane]) for count, lane in zip(counts, lane_of, strict=True)]
            equal = [pair if min(pair) else None for pair in pairs]
            of_head = [firsts[lane] for lane in lane_of]
            runs, group = self._runs(r, equal, queries, of_head, lane_of)
            for heads in runs:
                lane = lane_of[heads.first]
                yield Branch(
                    self._query_rows(1, w, heads, counts, r, queries, group),
                    Rows(1, w, *heads.of(lane_of), rows[lane], 1, firsts[lane], heads.growth(of_head)),
                    causal=False,
                    far=index,
                    first=covering and part.own,
                    bias=bias,
                )

    def sinks(self, spans: Sequence[Span], turned: Turned | None) -> Iterator[Branch]:
        """Yield the calls that show all sinks to the queries, of any residue, whose first level covers no sink."""
        w, n = self.pattern.segment_lengths[0], self.pattern.sinks
        segments = sink_segments(self.pattern, self.start, self.stop)
        if not segments:
            return
        begin = max(self.start, segments.start * w)
        if turned:
            for part in self._rectangles([_Zone(0, w, 0, w, True, False)], w, 1, begin, self.stop):
                row = turned.row + (part.queries[0] // w - segments.start) * n
                yield from self._sink_rows(part.segments, part.queries, Rows(0, n, 0, 0, 0, n, 1, row, 0), turned.far)
            return
        queries, own = (begin, self.stop), min(n, self.start)  # sinks [0, own) lie before the shard
        given = [(index, span) for index, span in enumerate(spans) if span.level == SINKS]
        if sum(span.stop - span.start for _, span in given) != own:
            raise ValueError(
                f"the sinks [0, {own}) lie before the shard that starts at {self.start}: give them as far keys"
            )
        if own < n:
            yield from self._sink_rows(1, queries, Rows(0, w, 0, 0, 0, n - own, 1, own - self.start, 0), None)
        for index, span in given:
            keys = Rows(0, w, 0, 0, 0, span.stop - span.start, 1, 0, 0)
            yield from self._sink_rows(1, queries, keys, index)

    def holds(self, span: Span) -> bool:
        """Return whether the row of the shard, which is a single token, is the last one of the far keys."""
        return self.causal and self.start + 1 == self.stop == span.stop

    def check(self, span: Span) -> None:
        """Raise ValueError for far keys that the shard cannot attend to."""
        start, stop, where = span.start, span.stop, f"far keys [{span.start}, {span.stop})"
        if start == stop:
            return
        if span.level == SINKS:
            if not 0 <= start < stop <= min(self.pattern.sinks, self.start):
                raise ValueError(f"{where} are not among the {self.pattern.sinks} sinks before {self.start}")
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
        together: list[_Rectangle] = []
        single: list[_Rectangle] = []
        for zone in zones:
            q, a, z = self.start - zone.first, low - zone.low, high - zone.high
            # segments with at least one query and one key
            some = range(
                max((q - zone.length) // w, (a + zone.low - zone.high) // w) + 1,
                min((self.stop - 1 - zone.first) // w, (z + zone.high - 1 - zone.low) // w) + 1,
            )
            whole = range(max(-(-q // w), -(-a // w)), min((self.stop - zone.first - zone.length) // w, z // w) + 1)
            left: Iterable[int] = some
            if whole and not apart:
                first = whole.start * w
                queries = first + zone.first, first + zone.first + zone.length
                keys = first + zone.low, first + zone.high
                together.append(_Rectangle(len(whole), queries, keys, zone.square, zone.own))
                left = chain(range(some.start, whole.start), range(whole.stop, some.stop))
            for segment in left:
                first = segment * w
                queries = max(first + zone.first, self.start), min(first + zone.first + zone.length, self.stop)
                keys = max(first + zone.low, low), min(first + zone.high, high)
                if zone.square:  # the positions that both have are a square again
                    queries = keys = max(queries[0], keys[0]), min(queries[1], keys[1])
                if queries[0] < queries[1] and keys[0] < keys[1]:
                    single.append(_Rectangle(1, queries, keys, zone.square, zone.own))
        even = self.pattern.queries == "all" or w % r == 0
        return sorted([*together, *(_joined(single) if even else single)], key=lambda part: not part.own)

    def _queries(self, level: int, w: int, queries: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Return each head's first query row, as a token of the shard, and its number of query rows."""
        first, stop = queries
        if self.pattern.queries == "all":
            return [first - self.start] * self.num_heads, [stop - first] * self.num_heads
        return self._tokens(level, w, queries)

    def _tokens(self, level: int, w: int, positions: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Return each head's first row of a level, as a token of the shard, and the number of its rows."""
        base, r = positions[0] // w * w, self.pattern.dilation_rates[level]
        first, stop = positions[0] - base, positions[1] - base
        offsets = self.pattern.offsets(level, self.num_heads)
        before = [rows_before(first, o, r) for o in offsets]
        firsts = [base - self.start + o + b * r for o, b in zip(offsets, before, strict=True)]
        return firsts, [rows_before(stop, o, r) - b for o, b in zip(offsets, before, strict=True)]

    def _query_rows(
        self, segments: int, w: int, heads: Heads, counts: Sequence[int], r: int, firsts: Sequence[int], group: int
    ) -> Rows:
        rows, step = (counts[heads.first], 1 if self.pattern.queries == "all" else r) if group == 1 else (group, 0)
        skew = heads.growth(firsts)
        return Rows(segments, w, *heads, rows, step, firsts[heads.first], skew, row_heads=int(group > 1))

    def _runs(self, r: int, equal: Sequence[tuple[int, ...] | None], *even: Sequence[int]) -> tuple[list[Heads], int]:
        """Return runs of heads for one view each, and the number of neighbours that each head stands for.

        Query heads of one key head are neighbours. If a single token's see the same keys, they become rows of a call.
        """
        group, values = self.num_heads // self.kv_heads, list(zip(*even, strict=True))
        steps = (1, r, -(-self.num_heads // r), group, lcm(r, group))
        heads = [*zip(equal, values, strict=True)]
        if self.start + 1 < self.stop or heads != [x for x in heads[::group] for _ in range(group)]:
            return progressions(equal, values, steps), 1
        runs = progressions(equal[::group], values[::group], steps)
        return [Heads(number, first * group, step * group) for number, first, step in runs], group

    def _sink_rows(self, segments: int, queries: tuple[int, int], keys: Rows, far: int | None) -> Iterator[Branch]:
        w, (first, stop) = self.pattern.segment_lengths[0], queries
        kv_of = [h * self.kv_heads // self.num_heads for h in range(self.num_heads)]
        every = [first - self.start] * self.num_heads
        runs, group = self._runs(1, [()] * self.num_heads, kv_of)
        for heads in runs:
            number, head, step = heads.of(kv_of)
            yield Branch(
                self._query_rows(segments, w, heads, [stop - first] * self.num_heads, 1, every, group),
                keys._replace(segments=segments, heads=number, first_head=head, head_step=step),
                causal=False,
                far=far,
            )


def _zones(pattern: Pattern, level: int, w: int, causal: bool) -> list[_Zone]:
    """Return the zones of a segment of w positions at a level, a causal square first."""
    b = pattern.look_backs[level]
    if pattern.overlap == "once" and level:
        u, near = pattern.segment_lengths[level - 1], pattern.look_backs[level - 1]
        zones = [_Zone(j, u, -b * w, j - near * u, False, False) for j in range(0, w, u)]
        if not causal:
            zones += [_Zone(j, u, j + (near + 1) * u, (b + 1) * w, False, False) for j in range(0, w, u)]
    elif causal:
        zones = [_Zone(0, w, 0, w, True, True), _Zone(0, w, -b * w, 0, False, False)]
    else:
        zones = [_Zone(0, w, -b * w, (b + 1) * w, False, True)]
    if w % pattern.dilation_rates[level]:  # row spacing breaks between segments: no view shows rows of two
        zones = [
            zone._replace(low=max(zone.low, s), high=min(zone.high, s + w), own=zone.own and s == 0)
            for zone in zones
            for s in range(zone.low // w * w, zone.high, w)
        ]
    return [zone for zone in zones if zone.low < zone.high]


def _joined(parts: list[_Rectangle]) -> list[_Rectangle]:
    found: list[_Rectangle] = []
    for part in sorted(parts, key=lambda part: (part.square, part.own, part.keys, part.queries)):
        last = found[-1] if found else part
        same = (last.keys, last.square, last.own, last.queries[1]) == (part.keys, False, part.own, part.queries[0])
        if same:
            found[-1] = last._replace(queries=(last.queries[0], part.queries[1]))
        else:
            found.append(part)
    return found
