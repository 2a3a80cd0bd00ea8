"""The keys and values that a causal sequence must remember: for each level, the rows that later queries can still see.

They are those of the level's open segment and of as many before it as it looks back; nothing else is ever read again,
but for the sinks. The whole memory of a sequence is `sum of (1 + look_back) ceil(w / r)` rows a lane and the sinks,
whatever its length: 40,960 rows per head for a billion tokens of `Pattern.geometric(2**30)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from .dilated import FarKeys
from .merging import strided_view
from .pattern import SINKS, Pattern, Span, common_span, lanes, open_spans, segment_rows, span_rows, span_views

FIRST_ROWS = 1 << 14  # of a segment, allocated at once; more of them come as they are needed, in doublings


class KVCache:
    """One attention's cache over a causal sequence that comes in shards of any sizes, one token included.

        cache = KVCache(pattern, batch, heads, head_dim)
        for q, k, v in shards:
            out = dilated_attention(q, k, v, pattern, start=cache.position, far=cache.far())
            cache.append(k, v)

    `kv_heads` are those of k and v, as many as q's unless given. `position` is the number of tokens so far, `nbytes`
    the bytes of all rows: batch * head_dim * 2 * `pattern.cached_rows` numbers. Of a segment with more than FIRST_ROWS
    rows, only so many are allocated at once, and the others when they come.

    `keep` is for a sequence of so many tokens at most: every segment gets memory of its own, once and for all its rows,
    instead of that of an old one, so that far keys given out earlier stay true. A backward pass over all shards needs
    them. `allocate` makes that memory where torch.empty would, of its arguments.
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
        self.pattern, self.num_heads, self.kv_heads, self.keep = pattern, num_heads, kv_heads or num_heads, keep
        self.position = 0
        self._sizes, self._allocate = (batch, head_dim), partial(allocate, dtype=dtype, device=device)
        # of each level its segments, segment s in place s mod (1 + look_back); row j of a lane is its j-th in there
        self._levels = [
            [self._new_rows(0 if keep else min(-(-w // r), FIRST_ROWS), level) for _ in range(1 + back)]
            for level, ((w, r), back) in enumerate(zip(pattern.levels, pattern.look_backs, strict=True))
        ]
        self._sinks = self._new_rows(pattern.sinks, SINKS)
        self._turned: dict[tuple[int, ...], tuple[Tensor, ...]] = {}  # sinks as one segment after the other sees them

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*chain(*self._levels), self._sinks))

    def far(self) -> list[FarKeys]:
        """Return what the next shard sees outside itself: views, valid until the next `append`, with `keep` always."""
        found = []
        for span in open_spans(self.pattern, self.position):
            rows = max(span_rows(self.pattern, span, self.num_heads, self.kv_heads))
            if rows:
                whole = span.level == SINKS and self.position >= self.pattern.sinks
                k, v = self._rows(span)[:, :, :rows]
                found.append(FarKeys(*span, k, v, turned=self._turned if whole else None))
        return found

    @torch.no_grad()
    def append(
        self, k: Tensor, v: Tensor, *, start: int | None = None, stop: int | None = None, others: Iterable[FarKeys] = ()
    ) -> None:
        """Take in the next shard's keys and values (batch, tokens, key heads, head_dim); gradients do not flow.

        Where several hold shards of one chunk that ends at `stop`, each takes in its own, which begins at `start`, and
        the `others`' rows.
        """
        start = self.position if start is None else start
        stop = start + k.shape[1] if stop is None else stop
        others = list(others)
        for span in open_spans(self.pattern, stop):
            w = self.pattern.segment_lengths[max(span.level, 0)]
            segment = span.start // w * w
            if self.keep and span.level != SINKS and segment >= self.position:
                places = self._levels[span.level]
                number = segment_rows(self.pattern, span.level, self.keep)
                places[segment // w % len(places)] = self._new_rows(number, span.level)
            rows = self._rows(span, grow=True)
            own = common_span(self.pattern, span.level, segment, start, start + k.shape[1])
            for views in span_views(self.pattern, own, self.num_heads, start, self.kv_heads):
                strided_view(rows[0], views.segment).copy_(strided_view(k, views.shard))
                strided_view(rows[1], views.segment).copy_(strided_view(v, views.shard))
            for keys in others:
                if keys.level == span.level and segment <= keys.start < span.stop:
                    for views in span_views(self.pattern, keys.span, self.num_heads, start, self.kv_heads):
                        strided_view(rows[0], views.segment).copy_(strided_view(keys.k, views.packed))
                        strided_view(rows[1], views.segment).copy_(strided_view(keys.v, views.packed))
        self.position = stop

    def select(self, rows: Sequence[int]) -> None:
        """Make row i of the batch what row `rows[i]` is, in new memory."""
        index = torch.tensor(rows, device=self._sinks.device)
        self._levels = [[x.index_select(1, index) for x in places] for places in self._levels]
        self._sinks = self._sinks.index_select(1, index)
        self._turned = {}

    def _new_rows(self, number: int, level: int) -> Tensor:
        """Make memory for so many rows, (k and v, B, rows, lanes, D)."""
        (batch, head_dim), held = self._sizes, len(lanes(self.pattern, level, self.num_heads, self.kv_heads).offsets)
        return self._allocate((2, batch, number, held, head_dim))

    def _rows(self, span: Span, *, grow: bool = False) -> Tensor:
        """Return where the rows of a span's segment are, (k and v, B, rows, lanes, D); `grow` makes room for all."""
        if span.level == SINKS:
            return self._sinks
        places, (w, r) = self._levels[span.level], self.pattern.levels[span.level]
        place = span.start // w % len(places)
        rows, have = places[place], places[place].shape[2]
        if grow and have < (needed := max(span_rows(self.pattern, span, self.num_heads, self.kv_heads))):
            wider = rows.new_empty(*rows.shape[:2], min(-(-w // r), max(needed, 2 * have)), *rows.shape[3:])
            wider[:, :, :have] = rows
            places[place] = wider
        return places[place]
