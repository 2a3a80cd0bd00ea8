"""The KV cache of a causal sequence: for each level, the rows that later queries can still see.

These are the rows of the level's open segment and of the `look_back` segments before it. Later queries read only these
rows and the sinks. So a sequence of any length needs `sum of (1 + look_back) ceil(w / r)` rows per lane, and the sinks:
40,960 rows per head for a billion tokens of `Pattern.geometric(2**30)`. With chosen blocks, the cache also keeps all
rows of the past, and grows with the document.

What a shard attends to outside itself is `Outside`: far keys of its levels, and chosen blocks.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .chosen import Chosen, ChosenCall, PastRows
from .pattern import Pattern
from .segment_rows import SegmentRows
from .spans import SINKS, FarSpan, Lanes, open_spans, rows_per_lane, sink_segments, whole_segment
from .views import of_level


class FarSource(Protocol):
    """The maker of far keys that is told when attention reads them, and gets their gradients.

    This is the whole contract between attention and those who bring keys from elsewhere. A call of `dilated_attention`
    does this, in this order:

        forward     near keys are attended to      `arrive`            far keys are attended to
        backward    gradients of far keys          `take_gradients`    gradients of near keys

    So one message between ranks may travel while near keys are attended to, and another one while near keys get their
    gradients. Both methods are called once for each of the far keys, also if no query sees it, since another rank may
    wait for its message. `take_gradients` is called in the order of the far keys, or not at all if nothing needs a
    gradient. With activation checkpointing, far keys are made twice and `take_gradients` is called once.
    """

    def arrive(self) -> object:
        """Wait until k and v of all far keys of this source hold their numbers. Later calls do nothing."""

    def take_gradients(self, span: FarSpan, dk: Tensor, dv: Tensor) -> object:
        """Take the gradients of k and v of the far keys of `span`, in fp32 or fp64. They flow into k and v as well."""


@dataclass(eq=False)  # a frozen one takes longer to make, and every layer makes some per token
class FarKeys:
    """Keys and values from outside the shard: one level's rows at positions [start, stop) of one segment.

    k, v: (batch, rows, lanes, head_dim). Row j of a lane is its j-th row in [start, stop). Lanes are heads, except that
    query heads which read the same rows of one key head share a lane (`spans.Lanes`). Two lanes differ by at most one
    row; a row that a lane lacks is never read. The caller may take k and v from a cache, another
    rank or a file; gradients flow into them.

    For level `SINKS`, positions are among the first `pattern.sinks`, and k is rotated for them like any other key.

    `turned` caches the turned sinks of the last call. Give it only with far keys that hold all sinks and never change.

    `source` is the maker of k and v, if it fills them later or takes their gradients before autograd does.
    """

    level: int
    start: int
    stop: int
    k: Tensor
    v: Tensor
    source: FarSource | None = None
    turned: dict[tuple[int, ...], tuple[Tensor, ...]] | None = None

    @property
    def span(self) -> FarSpan:
        return FarSpan(self.level, self.start, self.stop)


class Outside(NamedTuple):
    """All that a shard sees outside its own keys: far keys, and chosen blocks, which have no gradient.

    `KVCache.far` gives it. A `FarProvider` of `longnet_cli.nets` returns it for each layer.
    """

    keys: Sequence[FarKeys] = ()
    chosen: Chosen | None = None


def far_keys(
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    span: FarSpan,
    *,
    start: int = 0,
    num_heads: int | None = None,
    queries: range | None = None,
) -> FarKeys:
    """Take the rows of `span` from k and v (batch, tokens, key heads, head_dim) of a shard that starts at `start`.

    k and v may also be (batch, tokens, levels, key heads, head_dim). At rate 1, the rows are views. Of a dilated level,
    only the lanes are copied in which one of the positions `queries` takes part, by default all.
    `num_heads` is the number of query heads, by default that of key heads. Differentiable. Raises ValueError for a
    span that the shard does not hold in full.
    """
    if not start <= span.start < span.stop <= start + k.shape[1]:
        raise ValueError(
            f"the shard [{start}, {start + k.shape[1]}) does not hold [{span.start}, {span.stop})"
        )
    lanes = Lanes(pattern, num_heads or k.shape[-2], k.shape[-2])
    k, v = of_level(k, span.level), of_level(v, span.level)
    rows = lanes.in_shard(span, start)
    r = rows.row_step
    if r == 1:
        tokens = slice(span.start - start, span.stop - start)
        return FarKeys(*span, k[:, tokens], v[:, tokens])
    offsets = lanes.of_level(span.level).offsets
    asked = {*offsets}
    if queries and pattern.queries == "dilated":
        asked = {p % rows.segment_step % r for p in queries[: 2 * r]}  # the offsets of all of them
    packed = k.new_empty(2, k.shape[0], len(offsets), max(rows.counts), k.shape[-1])
    for lane, offset in enumerate(offsets):
        if offset in asked:
            first, count = rows.first_tokens[lane], rows.counts[lane]
            tokens = slice(first, first + count * r, r)
            packed[0, :, lane, :count] = k[:, tokens, rows.heads[lane]]
            packed[1, :, lane, :count] = v[:, tokens, rows.heads[lane]]
    return FarKeys(*span, *packed.transpose(2, 3))  # (B, rows, lanes, D)


FIRST_ROWS = 1 << 14  # of a segment that are allocated at first; their number doubles on demand


class KVCache:
    """The KV cache of one attention layer, for a causal sequence that comes in shards of any sizes, even single tokens.

        cache = KVCache(pattern, batch, heads, head_dim)
        for q, k, v in shards:
            start = cache.position
            out = dilated_attention(q, k, v, pattern, start=start, far=cache.append(k, v))

    `kv_heads` is the number of heads of k and v, by default `num_heads`. `position` is the number of tokens so far.
    `nbytes` is the size of the allocated rows, at most batch * head_dim * 2 * `cached_rows` numbers. Far keys are views
    of these rows, and stay what they are: a new segment gets new memory, and takes over no older segment's.

    Pass `keep`, the length that the sequence may reach, to get the memory of a segment at once, from `allocate`, which
    takes the arguments of torch.empty. Otherwise a segment starts with FIRST_ROWS rows, and gets others on demand.
    """

    def __init__(
        self,
        pattern: Pattern,
        batch: int,
        num_heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keep: int = 0,
        allocate: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self.pattern = pattern
        self.lanes = Lanes(pattern, num_heads, kv_heads or num_heads)
        self.batch = batch
        self.head_dim = head_dim
        self.dtype = dtype
        self.keep = keep
        self.position = 0
        self._allocate = partial(allocate, dtype=dtype, device=device)
        self.past: PastRows | None = None
        if pattern.chosen:
            shape = (2, batch, 0, self.lanes.kv_heads, head_dim)
            self.past = PastRows(torch.empty(shape, dtype=dtype, device=device))
        self._segments: dict[FarSpan, SegmentRows] = {}  # of keys and values, by their whole span
        # sinks as they were turned last
        self._turned: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    @property
    def nbytes(self) -> int:
        rows = sum(segment.packed.nbytes for segment in self._segments.values())
        return rows + (self.past.nbytes if self.past else 0)

    def far(self) -> Outside:
        """Return what any next shard sees of the past, but for chosen blocks."""
        return Outside(self._far_keys(self._open()))

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        start: int | None = None,
        stop: int | None = None,
        named: Sequence[ChosenCall] = (),
    ) -> Outside:
        """Store the next shard's keys and values (batch, tokens, key heads, head_dim); return what it sees of the past.

        A shard sees the segments that were open before it. The cache keeps the segments that are open after it. With
        segments of 8 and look_back 1, the tokens 10 to 17 come:

            visible       [0, 8)  [8, 10)
            still open            [8, 16)  [16, 18)

        The row of a single token is stored before the token sees these segments, as the last of its far keys. This
        saves a call per level. No gradient flows through stored rows, so a row that needs one is not stored first.
        `named` says which chosen blocks the shard sees. If several ranks hold shards of one chunk that ends at `stop`,
        each rank stores its own shard, which starts at `start`, and then those of the others (`store`).
        """
        needs_gradient = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        # nobody counts room for a segment of one token, which no later token sees
        lasting = min(self.pattern.segment_lengths) > 1
        with_own_row = k.shape[1] == 1 and stop is None and not needs_gradient and lasting
        start = self.position if start is None else start
        stop = start + k.shape[1] if stop is None else stop
        visible = _open_segments(self.lanes, self.position, int(with_own_row))
        still_open = _open_segments(self.lanes, stop, 0)
        # a single token finds its own row in the segments that it sees; later shards find rows in those that stay open
        stored_in = visible if with_own_row else still_open
        with torch.no_grad():
            tensors = (torch.cat((k, v)),) if with_own_row else (k, v)  # in fewer operations
            for segment in stored_in:
                self._rows(segment).put(tensors, start)
        if not sink_segments(self.pattern, self.position, stop):
            visible = tuple(segment for segment in visible if segment.span.level != SINKS)
        far_keys = self._far_keys(visible)
        self._segments = {segment.whole: self._segments[segment.whole] for segment in still_open}
        self.position = stop
        if self.past is None:
            return Outside(far_keys)
        self.past.put(start, k, v)
        return Outside(far_keys, Chosen(named, self.past.rows))

    @torch.no_grad()
    def store(self, others: Sequence[FarKeys]) -> None:
        """Store rows of the last chunk that other ranks have made."""
        for keys in others:
            rows = self._segments.get(whole_segment(self.pattern, keys.span))
            if rows:
                rows.put_packed((keys.k, keys.v), keys.span)

    def _open(self) -> tuple[_OpenSegment, ...]:
        return _open_segments(self.lanes, self.position, 0)

    def _far_keys(self, segments: Sequence[_OpenSegment]) -> list[FarKeys]:
        far_keys = []
        for segment in segments:
            span = segment.span
            if span.start < span.stop:
                keys, values = self._rows(segment).of(span).chunk(2)
                turned = self._turned if span == (SINKS, 0, self.pattern.sinks) else None
                far_keys.append(FarKeys(*span, keys, values, turned=turned))
        return far_keys

    def _rows(self, segment: _OpenSegment) -> SegmentRows:
        """Return the rows of a segment, with room for those of its span."""
        rows = self._segments.get(segment.whole)
        if rows is None or rows.packed.shape[1] < segment.rows:
            level, _, stop = segment.span
            room = _room(self.pattern, level, stop)
            if self.keep:
                room = rows_per_lane(self.pattern, level, self.keep)
            # the rows of a lane are neighbours
            sizes = (2 * self.batch, self.lanes.number(level), room, self.head_dim)
            packed = self._allocate(sizes).transpose(1, 2)
            if rows is not None:
                packed[:, : rows.packed.shape[1]] = rows.packed
            rows = SegmentRows(self.lanes, segment.whole, packed)
            self._segments[segment.whole] = rows
        return rows

    def select(self, rows: Sequence[int]) -> None:
        """Reorder the batch, in new memory: row i becomes what row `rows[i]` was."""
        both = [*rows, *(self.batch + row for row in rows)]  # of keys, and of values
        for whole, segment in self._segments.items():
            index = torch.tensor(both, device=segment.packed.device)
            packed = segment.packed.transpose(1, 2).index_select(0, index).transpose(1, 2)
            self._segments[whole] = segment._replace(packed=packed)
        self.batch = len(rows)
        self._turned = {}
        if self.past:
            self.past = PastRows(self.past.rows[:, list(rows)])

    def fork(self) -> KVCache:
        """Return another cache, with the same rows so far: copies."""
        new = copy.copy(self)
        new._segments = {
            whole: segment._replace(packed=segment.packed.clone())
            for whole, segment in self._segments.items()
        }
        new._turned = {}
        new.past = self.past and PastRows(self.past.rows.clone())
        return new

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that `restore` needs, by name."""
        for number, segment in enumerate(self._open()):
            rows = torch.stack(self._rows(segment).of(segment.span).chunk(2))
            for lane, count in enumerate(self.lanes.counts(segment.span)):
                rows[:, :, count:, lane] = 0  # no key, but whatever was in memory
            yield f"rows.{number}", rows
        if self.past:
            yield "past", self.past.rows

    def restore(self, position: int, saved: Mapping[str, Tensor]) -> None:
        """Become, if new, the cache of `position` tokens whose `state` was saved.

        Raises LookupError for a missing tensor, RuntimeError for one of another shape.
        """
        self.position = position
        for number, segment in enumerate(self._open()):
            self._rows(segment).of(segment.span).copy_(saved[f"rows.{number}"].flatten(0, 1))
        if self.past:
            self.past = PastRows(saved["past"])


class _OpenSegment(NamedTuple):
    """A span that later queries can see, the span of its whole segment, and the rows of its longest lane."""

    span: FarSpan
    whole: FarSpan
    rows: int


@lru_cache(maxsize=16)  # all layers of a step ask for the same
def _open_segments(lanes: Lanes, position: int, own: int) -> tuple[_OpenSegment, ...]:
    """Return all of `open_spans`, with their segments."""
    segments = []
    for span in open_spans(lanes.pattern, position, own):
        whole = whole_segment(lanes.pattern, span)
        segments.append(_OpenSegment(span, whole, lanes.most_rows(span)))
    return tuple(segments)


def _room(pattern: Pattern, level: int, tokens: int) -> int:
    """Return how many rows a cache has allocated in each segment of a level after `tokens`."""
    whole = rows_per_lane(pattern, level, sys.maxsize)
    needed = rows_per_lane(pattern, level, tokens)
    room = min(whole, FIRST_ROWS)
    while room < needed:
        room = min(whole, 2 * room)
    return room


def cached_rows(lanes: Lanes, tokens: int = sys.maxsize, *, written: bool = False) -> int:
    """Return the rows of keys that a cache has allocated after `tokens`, by default the most that it ever allocates.

    That is `pattern.cache_rows` for each head, if no lane is shared. Of these, only some may be `written`.
    """
    pattern = lanes.pattern
    rows = pattern.apart_rows(tokens) * lanes.kv_heads
    for level, back in enumerate(pattern.look_backs):
        room = rows_per_lane(pattern, level, tokens) if written else _room(pattern, level, tokens)
        rows += (1 + back) * room * lanes.number(level)
    return rows
