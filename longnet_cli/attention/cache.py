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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .chosen import Chosen, ChosenCall, PastRows
from .pattern import Pattern
from .spans import (
    SINKS,
    FarSpan,
    Layout,
    SpanViews,
    common_span,
    level_of,
    open_spans,
    segment_rows,
    segment_start,
    sink_segments,
)
from .views import of_level, strided_view


@dataclass(eq=False)  # a frozen one takes longer to make, and every layer makes some per token
class FarKeys:
    """Keys and values from outside the shard: one level's rows at positions [start, stop) of one segment.

    k, v: (batch, rows, lanes, head_dim). Row j of a lane is its j-th row in [start, stop). Lanes are heads, except that
    query heads which read the same rows of one key head share a lane (`spans.Layout`). Two lanes differ by at most one
    row; a row that a lane lacks is never read. The caller may take k and v from a cache, another
    rank or a file; gradients flow into them.

    For level `SINKS`, positions are among the first `pattern.sinks`, and k is rotated for them like any other key.

    `turned` caches the turned sinks of the last call. Give it only with far keys that hold all sinks and never change.

    `ready` is called after the calls on near keys, before k and v are read. `back` is called in the backward pass with
    the gradients of k and v, in fp32 or fp64, before the gradients of near keys are computed; gradients flow into k and
    v as well. Both let a message travel while near keys are attended to.
    """

    level: int
    start: int
    stop: int
    k: Tensor
    v: Tensor
    ready: Callable[[], object] | None = None
    back: Callable[[Tensor, Tensor], object] | None = None
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
    layout, (w, r) = (
        Layout(pattern, num_heads or k.shape[-2], k.shape[-2]),
        level_of(pattern, span.level),
    )
    k, v = (of_level(x, span.level) for x in (k, v))
    if r == 1:
        rows = slice(span.start - start, span.stop - start)
        return FarKeys(*span, k[:, rows], v[:, rows])
    (heads, offsets, _), positions = layout.lanes(span.level), layout.positions(span)
    asked = {*offsets}
    if queries and pattern.queries == "dilated":
        asked = {p % w % r for p in queries[: 2 * r]}  # the offsets of all of them
    packed = k.new_empty(2, k.shape[0], len(heads), max(map(len, positions)), k.shape[-1])
    for lane, places in enumerate(positions):
        if offsets[lane] in asked:
            for i, x in enumerate((k, v)):
                packed[i, :, lane, : len(places)] = x[
                    :, places.start - start : places.stop - start : r, heads[lane]
                ]
    return FarKeys(*span, *packed.transpose(2, 3))  # (B, rows, lanes, D)


FIRST_ROWS = (
    1 << 14
)  # rows of a segment that are allocated at first; their number doubles on demand


class KVCache:
    """The KV cache of one attention layer, for a causal sequence that comes in shards of any sizes, even single tokens.

        cache = KVCache(pattern, batch, heads, head_dim)
        for q, k, v in shards:
            out = dilated_attention(q, k, v, pattern, start=cache.position, far=cache.far(k, v))
            cache.append(k, v)

    `kv_heads` is the number of heads of k and v, by default `num_heads`. `position` is the number of tokens so far.
    `nbytes` is the size of the allocated rows, at most batch * head_dim * 2 * `cached_rows` numbers. A segment
    with more than FIRST_ROWS rows starts with FIRST_ROWS, and gets the others on demand.

    Pass `keep`, the length that the sequence may reach, if earlier far keys must stay valid, as for a backward pass
    over all shards. Then every segment gets new memory for all its rows at once, and takes over no older segment's.
    `allocate` makes the memory; it takes the arguments of torch.empty.
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
        self.pattern, self.keep = pattern, keep
        self.layout = Layout(pattern, num_heads, kv_heads or num_heads)
        self.position, self.dtype = 0, dtype
        self._sizes, self._allocate = (
            (batch, head_dim),
            partial(allocate, dtype=dtype, device=device),
        )
        # each level's segments, keys and values (2 B, rows, lanes, D): segment s is in place s mod (1 + look_back), and
        # row j of a lane is its j-th row there
        self._levels = [
            [
                self._new_rows(0 if keep else min(-(-w // r), FIRST_ROWS), level)
                for _ in range(1 + back)
            ]
            for level, ((w, r), back) in enumerate(
                zip(pattern.levels, pattern.look_backs, strict=True)
            )
        ]
        self._sinks = self._new_rows(pattern.sinks, SINKS)
        self._stored: Tensor | None = (
            None  # k of a token whose rows are there before it is appended
        )
        self._turned: dict[
            tuple[int, ...], tuple[Tensor, ...]
        ] = {}  # sinks as they were turned last
        self.past = PastRows() if pattern.chosen else None

    @property
    def batch(self) -> int:
        return self._sinks.shape[0] // 2

    @property
    def head_dim(self) -> int:
        return self._sizes[1]

    @property
    def nbytes(self) -> int:
        rows = sum(x.numel() * x.element_size() for x in (*chain(*self._levels), self._sinks))
        return rows + (self.past.nbytes if self.past else 0)

    def far(self, *shard: Tensor, named: Sequence[ChosenCall] = ()) -> Outside:
        """Return what the next shard sees of the past: views, valid until the next `append`, or always with `keep`.

        Its k and v may be given, to be appended later. The rows of a single token are then stored at once, unless they
        need a gradient, and are the last of the far keys, which saves a call per level. With chosen blocks, k and v
        must be given; `named` says which blocks the shard sees.
        """
        kept = self.keep or (torch.is_grad_enabled() and any(x.requires_grad for x in shard))
        own, position = int(not kept and bool(shard) and shard[0].shape[1] == 1), self.position
        held = _held(self.layout, position, own, position, position + own)
        if own:
            self._stored = shard[0]
            self._store((torch.cat(shard),), held)  # as one tensor, in fewer operations
        far_keys = []
        for span, rows, _ in held:
            if rows:
                whole = span.level == SINKS and self.position >= self.pattern.sinks
                turned = self._turned if whole else None
                far_keys.append(FarKeys(*span, *_halves(self._rows(span), rows), turned=turned))
        if self.past is None:
            return Outside(far_keys)
        if shard:
            self.past.put(position, *shard)
        return Outside(far_keys, Chosen(named, self.past.rows))

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        start: int | None = None,
        stop: int | None = None,
        others: Iterable[FarKeys] = (),
    ) -> None:
        """Store the next shard's keys and values (batch, tokens, key heads, head_dim); gradients do not flow.

        If several ranks hold shards of one chunk that ends at `stop`, each rank stores its own shard, which starts at
        `start`, and the rows of the `others`.
        """
        start = self.position if start is None else start
        stop = start + k.shape[1] if stop is None else stop
        if k is not self._stored:
            with torch.no_grad():
                held = _held(self.layout, stop, 0, start, start + k.shape[1])
                self._store((k, v), held, list(others))
        self.position, self._stored = stop, None

    def _store(
        self, shard: Sequence[Tensor], held: Sequence[_Held], others: Sequence[FarKeys] = ()
    ) -> None:
        """Store the rows of spans that a shard has, k and v apart or in one batch, or the `others` have."""
        for span, number, views in held:
            given = [(shard, each.shard, each.segment) for each in views]
            if self.keep or others:
                segment = segment_start(self.pattern, span)
                if self.keep and span.level != SINKS and segment >= self.position:
                    places = self._levels[span.level]
                    most, w = (
                        segment_rows(self.pattern, span.level, self.keep),
                        self.pattern.segment_lengths[span.level],
                    )
                    places[segment // w % len(places)] = self._new_rows(most, span.level)
                for keys in others:
                    if keys.level == span.level and segment <= keys.start < span.stop:
                        taken = self.layout.views(keys.span, 0)
                        given += [((keys.k, keys.v), each.packed, each.segment) for each in taken]
            for tensors, there, here in given:
                rows, batch = self._rows(span, number), tensors[0].shape[0]
                for i, x in enumerate(tensors):
                    strided_view(rows, here, i * batch, batch).copy_(
                        strided_view(of_level(x, span.level), there)
                    )

    def select(self, rows: Sequence[int]) -> None:
        """Reorder the batch, in new memory: row i becomes what row `rows[i]` was."""
        index = torch.tensor(rows, device=self._sinks.device)
        self._levels = [[_selected(x, index) for x in places] for places in self._levels]
        self._sinks = _selected(self._sinks, index)
        self._turned = {}
        if self.past:
            self.past = PastRows(self.past.rows[:, index])

    def fork(self) -> KVCache:
        """Return another cache, with the same rows so far: copies."""
        new = copy.copy(self)
        new._levels = [[rows.clone() for rows in places] for places in self._levels]
        new._sinks, new._turned = self._sinks.clone(), {}
        new.past = self.past and PastRows(self.past.rows.clone())
        return new

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that `restore` needs, by name: tensors that are valid until the next `append`."""
        for number, span in enumerate(open_spans(self.pattern, self.position)):
            counts = self.layout.counts(span)
            rows = torch.stack(_halves(self._rows(span), max(counts)))
            for lane, count in enumerate(counts):
                rows[:, :, count:, lane] = 0  # no key, but whatever was in memory
            yield f"rows.{number}", rows
        if self.past:
            yield "past", self.past.rows

    def restore(self, position: int, saved: Mapping[str, Tensor]) -> None:
        """Become, if new, the cache of `position` tokens whose `state` was saved.

        Raises ValueError for tensors that are no state of so many: another name, shape or type, or a missing one.
        """
        self._check(position, saved)
        self.position = position
        for number, span in enumerate(open_spans(self.pattern, position)):
            rows = saved[f"rows.{number}"]
            self._rows(span, rows.shape[2])[:, : rows.shape[2]] = rows.flatten(0, 1)
        if self.past:
            self.past = PastRows(saved["past"])

    def _check(self, position: int, saved: Mapping[str, Tensor]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for number, span in enumerate(open_spans(self.pattern, position)):
            counts = self.layout.counts(span)
            shapes[f"rows.{number}"] = (2, self.batch, max(counts), len(counts), self.head_dim)
        if self.past:
            shapes["past"] = (2, self.batch, position, self.layout.kv_heads, self.head_dim)
        if other := saved.keys() ^ shapes.keys():
            raise ValueError(
                f"{min(other)} is {'missing' if min(other) in shapes else 'not of it'}"
            )
        for name, shape in shapes.items():
            if tuple(saved[name].shape) != shape or saved[name].dtype != self.dtype:
                given = f"{tuple(saved[name].shape)} of {saved[name].dtype}"
                raise ValueError(
                    f"{name} is {given}, for {position} tokens and {shape} of {self.dtype}"
                )

    def _new_rows(self, number: int, level: int) -> Tensor:
        """Allocate memory for `number` rows, (2 B, rows, lanes, D), where the rows of a lane are neighbours."""
        (batch, head_dim), held = self._sizes, len(self.layout.lanes(level).offsets)
        return self._allocate((2 * batch, held, number, head_dim)).transpose(1, 2)

    def _rows(self, span: FarSpan, number: int = 0) -> Tensor:
        """Return the memory of a span's segment, (2 B, rows, lanes, D), with room for `number` rows or more."""
        if span.level == SINKS:
            return self._sinks
        places, w = self._levels[span.level], self.pattern.segment_lengths[span.level]
        place = span.start // w % len(places)
        rows, have = places[place], places[place].shape[1]
        if have < number:
            r = self.pattern.dilation_rates[span.level]
            sizes = (
                rows.shape[0],
                rows.shape[2],
                min(-(-w // r), max(number, 2 * have)),
                rows.shape[3],
            )
            places[place] = rows.new_empty(sizes).transpose(1, 2)
            places[place][:, :have] = rows
        return places[place]


class _Held(NamedTuple):
    """A span that a cache holds, the rows of its longest lane, and views of those rows that a shard has.

    If a single token does not need sinks apart, their `rows` are 0.
    """

    span: FarSpan
    rows: int
    views: tuple[SpanViews, ...]


@lru_cache(maxsize=16)  # all layers of a step ask for the same
def _held(layout: Layout, position: int, own: int, start: int, stop: int) -> tuple[_Held, ...]:
    """Return all spans of `open_spans(pattern, position, own)`, for the shard [start, stop)."""
    pattern, held = layout.pattern, list[_Held]()
    for span in open_spans(pattern, position, own):
        of_shard = common_span(pattern, span.level, segment_start(pattern, span), start, stop)
        views = tuple(layout.views(of_shard, start))
        unseen = own and span.level == SINKS and not sink_segments(pattern, start, stop)
        held.append(_Held(span, 0 if unseen else max(layout.counts(span)), views))
    return tuple(held)


def _halves(rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """View the first rows of keys and of values in rows (2 B, rows, lanes, D): (B, number, lanes, D) each."""
    batch, stride, begin = rows.shape[0] // 2, rows.stride(), rows.storage_offset()
    size = (batch, number, *rows.shape[2:])
    return rows.as_strided(size, stride, begin), rows.as_strided(
        size, stride, begin + batch * stride[0]
    )


def _selected(rows: Tensor, index: Tensor) -> Tensor:
    both = torch.cat([index, index + rows.shape[0] // 2])
    return rows.transpose(1, 2).index_select(0, both).transpose(1, 2)


def cached_rows(layout: Layout, tokens: int = sys.maxsize) -> int:
    """Return the rows of keys that a cache has allocated after `tokens`, by default the most that it ever allocates.

    That is `pattern.cache_rows` for each head, if no lane is shared.
    """
    pattern = layout.pattern
    rows = pattern.apart_rows(tokens) * layout.kv_heads
    for level, ((w, r), back) in enumerate(zip(pattern.levels, pattern.look_backs, strict=True)):
        whole = -(-w // r)
        have = min(whole, FIRST_ROWS)
        while have < segment_rows(pattern, level, tokens):
            have = min(whole, 2 * have)
        rows += (1 + back) * have * len(layout.lanes(level).offsets)
    return rows
