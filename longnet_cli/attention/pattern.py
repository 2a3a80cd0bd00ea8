"""Which rows take part: the geometry of dilated attention in pure integers (arXiv 2307.02486, Eq. 3-8, 11-15).

A level (w, r) cuts the sequence into segments of w positions and keeps, for head h, every r-th position of a
segment beginning at that head's offset. With w = 8, r = 2 and four heads, one segment looks like this:

    position   0 1 2 3 4 5 6 7
    head 0     x . x . x . x .      offset 0
    head 1     . x . x . x . x      offset 1
    head 2     x . x . x . x .      offset 2 mod 2 = 0
    head 3     . x . x . x . x

Queries are kept exactly as keys are, so the kept rows of a segment attend to each other: a plain, dense, square
attention. The classes here describe such calls as strided views of a shard (the positions [start, start + tokens) of
one sequence), so that nothing is ever gathered or padded.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

HeadOffsets = Literal["modulo", "grouped"]
Padding = Literal["exact", "zero_key"]

MAX_LEVELS = 64  # more than any doubling of an int64; every layer computes every level

BACKWARD_FLOPS = 2.5  # of the forward's: five matrix products to its two


class Level(NamedTuple):
    """One (segment length, dilation rate) pair, both in tokens."""

    segment_length: int
    dilation_rate: int


@dataclass(frozen=True)
class Pattern:
    """The levels of a dilated attention and the rule that gives each head its offset.

    `head_offsets="modulo"` is the paper's (h mod r, Eq. 13-15); `"grouped"` is torchscale's (h // ceil(H / r)) and
    belongs to weights trained with it. Raises ValueError for levels that no attention can have.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets = "modulo"

    def __post_init__(self) -> None:
        for name in ("segment_lengths", "dilation_rates"):
            try:
                object.__setattr__(self, name, tuple(map(operator.index, getattr(self, name))))
            except TypeError:
                raise ValueError(f"{name} needs whole numbers, got {getattr(self, name)!r}") from None
        if not self.segment_lengths or len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                "segment_lengths and dilation_rates need one entry a level, "
                f"got {len(self.segment_lengths)} and {len(self.dilation_rates)}"
            )
        if len(self.segment_lengths) > MAX_LEVELS:
            raise ValueError(f"a pattern has at most {MAX_LEVELS} levels, got {len(self.segment_lengths)}")
        if min(self.segment_lengths) < 1 or min(self.dilation_rates) < 1:
            raise ValueError(f"segment lengths and dilation rates must be at least 1, got {self}")
        if self.head_offsets not in ("modulo", "grouped"):
            raise ValueError(f'head_offsets must be "modulo" or "grouped", got {self.head_offsets!r}')

    @classmethod
    def paper(cls) -> Pattern:
        """The language models of the paper (section 4.1)."""
        return cls((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))

    @classmethod
    def geometric(cls, length: int, base: int = 2048, ratio: int = 2) -> Pattern:
        """Segment length and dilation rate both grow by `ratio` from (base, 1) until a segment covers `length`."""
        if length < 1 or base < 1 or ratio < 2:
            raise ValueError(f"need length >= 1, base >= 1, ratio >= 2, got {length}, {base}, {ratio}")
        levels = [Level(base, 1)]
        while levels[-1].segment_length < length:
            levels.append(Level(levels[-1].segment_length * ratio, levels[-1].dilation_rate * ratio))
        return cls(tuple(w for w, _ in levels), tuple(r for _, r in levels))

    @property
    def levels(self) -> tuple[Level, ...]:
        return tuple(Level(w, r) for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True))

    @property
    def keys_per_query(self) -> float:
        """Mean keys a query attends to in full segments, not causal: sum of w / r^2 (4267 for the paper)."""
        return sum(w / r**2 for w, r in self.levels)

    @property
    def cache_rows(self) -> int:
        """Rows of keys a decoder must keep for one head: sum of ceil(w / r) (11,606 for the paper)."""
        return sum(-(-w // r) for w, r in self.levels)

    def offsets(self, level: int, num_heads: int) -> tuple[int, ...]:
        """The offset of each head in a level, all below its dilation rate."""
        r = self.dilation_rates[level]
        group = -(-num_heads // r)
        return tuple(h % r if self.head_offsets == "modulo" else h // group for h in range(num_heads))


def rows_before(position: int, offset: int, dilation_rate: int) -> int:
    """How many rows of a segment lie before its position `position`: those at offset, offset + r, ..."""
    return max(0, -((offset - position) // dilation_rate))


class Rows(NamedTuple):
    """Rows that one strided view of a (batch, tokens, heads, head_dim) tensor can show.

    Axis by axis: `segments` of them `segment_step` tokens apart; `heads` of them, `first_head` and then every
    `head_step`-th; in each `rows` rows `row_step` tokens apart. The first row of the first head is token
    `first_token`, that of each next head `skew` tokens later.
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


class Branch(NamedTuple):
    """One attention call: query rows of the shard against key rows of the shard (near) or of far keys.

    `far` is the index of the far keys, None for near ones. `zero_keys` keys with logit 0 and value 0 join the softmax
    (`padding="zero_key"`). `first` marks the branches that reach every row of the shard before any other does.
    """

    queries: Rows
    keys: Rows
    causal: bool
    far: int | None = None
    zero_keys: int = 0
    first: bool = False


class Span(NamedTuple):
    """Far keys of one level: its rows at positions [start, stop), which lie in one segment, outside the shard.

    With start = stop it is none; such far keys still hold their maker's place in a graph.
    """

    level: int
    start: int
    stop: int


@lru_cache(
    maxsize=256
)  # layers and repeated runs ask again; the chunks of a long sequence never do, and a plan is 40 KB
def branches(
    pattern: Pattern,
    num_heads: int,
    start: int,
    tokens: int,
    causal: bool,
    padding: Padding,
    spans: tuple[Span, ...],
    total: int = 0,
) -> tuple[Branch, ...]:
    """Every attention call of a shard, near ones first, level by level.

    `spans` are the far keys, in the order in which the caller holds them. `total` is the length of the whole sequence,
    0 when it ends with the shard: only `padding="zero_key"` asks. Raises ValueError for far keys that the shard cannot
    attend to.
    """
    covering = next((i for i, level in enumerate(pattern.levels) if level.dilation_rate == 1), None)
    order = sorted(range(len(pattern.levels)), key=lambda i: i != covering)
    found = [
        branch._replace(first=i == covering)
        for i in order
        for branch in _near(pattern, i, num_heads, start, tokens, causal, padding, total or start + tokens)
    ]
    for index, span in enumerate(spans):
        found.extend(_far(pattern, span, index, num_heads, start, tokens, causal))
    return tuple(found)


def attention_flops(pattern: Pattern, heads: int, head_dim: int, tokens: int, causal: bool, batch: int = 1) -> int:
    """Executed FLOPs of a forward: 4 * rows * keys * head_dim a head and segment over all branches; causal, half."""
    found = branches(pattern, heads, 0, tokens, causal, "exact", ())
    pairs = sum(b.queries.segments * b.queries.heads * b.queries.rows * b.keys.rows for b in found)
    return 4 * head_dim * batch * pairs // (2 if causal else 1)


def _near(
    pattern: Pattern, level: int, num_heads: int, start: int, tokens: int, causal: bool, padding: Padding, total: int
) -> Iterator[Branch]:
    """Cut by its segments a shard is a partial one, a run of whole ones (one batched call) and a partial one."""
    w, r = pattern.levels[level]
    offsets = pattern.offsets(level, num_heads)
    if padding == "zero_key":
        w = min(w, total)  # torchscale cuts no segment longer than the sequence
    position, stop = start, start + tokens
    while position < stop:
        inside = position % w
        whole = (stop - position) // w if inside == 0 else 0
        end = position + whole * w if whole else min(stop, position - inside + w)
        length = w if whole else end - position  # positions of each segment that the shard has
        before = [rows_before(inside, o, r) for o in offsets]
        counts = [rows_before(inside + length, o, r) - b for o, b in zip(offsets, before, strict=True)]
        firsts = [position - start - inside + o + b * r for o, b in zip(offsets, before, strict=True)]
        missing = [0] * num_heads  # rows that the whole segment lacks to be full
        if padding == "zero_key" and not causal:
            missing = [-(-w // r) - rows_before(min(w, total - position + inside), o, r) for o in offsets]
        for heads in _progressions(firsts, counts, [m + 1 for m in missing], (1, r, -(-num_heads // r))):
            rows = Rows(max(whole, 1), w, *heads, counts[heads.first], r, firsts[heads.first], heads.skew(firsts))
            yield Branch(rows, rows, causal, zero_keys=missing[heads.first])
        position = end


def _far(
    pattern: Pattern, span: Span, index: int, num_heads: int, start: int, tokens: int, causal: bool
) -> Iterator[Branch]:
    """The shard's rows in the segment of `span` against all its far rows: one full, never causal, attention."""
    w, r = pattern.levels[span.level]
    segment = span.start // w * w
    if span.start == span.stop:
        return
    if not segment <= span.start < span.stop <= segment + w:
        raise ValueError(f"far keys [{span.start}, {span.stop}) of level ({w}, {r}) leave their segment")
    if span.start < start + tokens and span.stop > start:
        raise ValueError(f"far keys [{span.start}, {span.stop}) overlap the shard [{start}, {start + tokens})")
    if causal and span.start >= start:
        raise ValueError(f"far keys [{span.start}, {span.stop}) lie after a causal shard that starts at {start}")
    begin, end = max(start, segment), min(start + tokens, segment + w)
    if begin >= end:
        return
    offsets = pattern.offsets(span.level, num_heads)
    before = [rows_before(begin - segment, o, r) for o in offsets]
    counts = [rows_before(end - segment, o, r) - b for o, b in zip(offsets, before, strict=True)]
    firsts = [segment - start + o + b * r for o, b in zip(offsets, before, strict=True)]
    far_counts = span_rows(pattern, span, num_heads)
    for heads in _progressions(firsts, counts, far_counts, (1, r, -(-num_heads // r))):
        queries = Rows(1, w, *heads, counts[heads.first], r, firsts[heads.first], heads.skew(firsts))
        keys = Rows(1, w, *heads, far_counts[heads.first], 1, 0, 0)  # packed from row 0
        yield Branch(queries, keys, causal=False, far=index)


def span_rows(pattern: Pattern, span: Span, num_heads: int) -> list[int]:
    """How many rows of `span` each head has; heads differ by at most one."""
    w, r = pattern.levels[span.level]
    inside = span.start % w
    stop = inside + span.stop - span.start
    return [rows_before(stop, o, r) - rows_before(inside, o, r) for o in pattern.offsets(span.level, num_heads)]


def span_positions(pattern: Pattern, span: Span, num_heads: int) -> list[range]:
    """The positions that far keys of `span` hold, row by row, for each head."""
    w, r = pattern.levels[span.level]
    segment = span.start // w * w
    offsets = pattern.offsets(span.level, num_heads)
    firsts = [segment + o + rows_before(span.start - segment, o, r) * r for o in offsets]
    counts = span_rows(pattern, span, num_heads)
    return [range(first, first + count * r, r) for first, count in zip(firsts, counts, strict=True)]


class SpanViews(NamedTuple):
    """The rows of a span for some heads, as three views: in a shard, packed as far keys are, and in their segment.

    Row j of a head is, packed, its j-th in the span, and in the segment's packed rows its j-th of the whole segment.
    """

    shard: Rows
    packed: Rows
    segment: Rows


def span_views(pattern: Pattern, span: Span, num_heads: int, start: int) -> Iterator[SpanViews]:
    """The rows of `span` in a shard that begins at position `start` and holds them; nothing for an empty span."""
    w, r = pattern.levels[span.level]
    if span.start >= span.stop:
        return
    segment = span.start // w * w
    offsets = pattern.offsets(span.level, num_heads)
    before = [rows_before(span.start - segment, o, r) for o in offsets]
    counts = span_rows(pattern, span, num_heads)
    firsts = [segment - start + o + b * r for o, b in zip(offsets, before, strict=True)]
    # in its segment a view begins at one row for all its heads: they must agree on the rows before
    for heads in _progressions(firsts, counts, [b + 1 for b in before], (1, r, -(-num_heads // r))):
        number = counts[heads.first]
        yield SpanViews(
            Rows(1, w, *heads, number, r, firsts[heads.first], heads.skew(firsts)),
            Rows(1, w, *heads, number, 1, 0, 0),
            Rows(1, w, *heads, number, 1, before[heads.first], 0),
        )


def common_span(pattern: Pattern, level: int, segment: int, start: int, stop: int) -> Span:
    """What the segment that begins at `segment` and the positions [start, stop) have in common; it may be empty."""
    w = pattern.segment_lengths[level]
    return Span(level, max(segment, start), max(max(segment, start), min(segment + w, stop)))


class _Heads(NamedTuple):
    """Heads first, first + step, ...: an arithmetic progression of `number`."""

    number: int
    first: int
    step: int

    def skew(self, firsts: Sequence[int]) -> int:
        return firsts[self.first + self.step] - firsts[self.first] if self.number > 1 else 0


def _progressions(
    firsts: Sequence[int], counts: Sequence[int], others: Sequence[int], steps: Sequence[int]
) -> list[_Heads]:
    """Cover all heads that have rows by few progressions in which one strided view shows every head.

    Heads of one view need equal row counts, equal `others` (a second count, 0 for a head to leave out) and first rows
    that grow evenly. Both offset rules make long runs of such
    heads, either neighbours or a fixed step apart: the step with the fewest views wins.
    """

    def cover(step: int) -> list[_Heads]:
        found: list[_Heads] = []
        for residue in range(min(step, len(firsts))):
            run: list[int] = []
            for head in range(residue, len(firsts), step):
                if run and not _continues(run, head):
                    found.append(_Heads(len(run), run[0], step))
                    run = []
                if counts[head] and others[head]:
                    run.append(head)
            if run:
                found.append(_Heads(len(run), run[0], step))
        return found

    def _continues(run: list[int], head: int) -> bool:
        skew = firsts[head] - firsts[run[-1]]
        even = skew >= 0 if len(run) == 1 else skew == firsts[run[-1]] - firsts[run[-2]]
        return even and counts[head] == counts[run[0]] and others[head] == others[run[0]]

    return min((cover(step) for step in dict.fromkeys(steps)), key=len)
