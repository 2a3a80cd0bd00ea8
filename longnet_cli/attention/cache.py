"""The keys and values that a causal sequence must remember: for each level, the rows of its open segment.

A level's later queries attend to the rows of their own segment alone, so nothing of a closed segment is ever read
again. The whole memory of a sequence is `sum of ceil(w / r)` rows a head, whatever its length: 40,960 for a billion
tokens of `Pattern.geometric(2**30)`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .dilated import FarKeys, strided_view
from .pattern import Pattern, common_span, rows_before, span_views


class KVCache:
    """One attention's cache over a causal sequence that comes in shards of any sizes, one token included.

        cache = KVCache(pattern, batch, heads, head_dim)
        for q, k, v in shards:
            out = dilated_attention(q, k, v, pattern, start=cache.position, far=cache.far())
            cache.append(k, v)

    `position` is the number of tokens so far, `nbytes` the bytes of all rows, allocated at once: batch * heads *
    head_dim * 2 * sum ceil(w / r) numbers. `keep` gives every new segment new memory instead of writing over the old
    one, so that far keys given out earlier stay true: a backward pass over all shards needs them.
    """

    def __init__(
        self,
        pattern: Pattern,
        batch: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keep: bool = False,
    ) -> None:
        self.pattern, self.num_heads, self.keep = pattern, num_heads, keep
        self.position = 0
        self._levels = [
            torch.empty(2, batch, -(-w // r), num_heads, head_dim, dtype=dtype, device=device)
            for w, r in pattern.levels
        ]  # k and v: (B, rows, H, D); row j of a head is its j-th in the open segment

    @property
    def nbytes(self) -> int:
        return sum(rows.numel() * rows.element_size() for rows in self._levels)

    def far(self) -> list[FarKeys]:
        """What the next shard attends to besides itself: views, valid until the next `append` (always, with `keep`)."""
        found = []
        for level, (w, r) in enumerate(self.pattern.levels):
            inside = self.position % w
            rows = max(rows_before(inside, offset, r) for offset in self.pattern.offsets(level, self.num_heads))
            if inside and rows:
                k, v = self._levels[level][:, :, :rows]
                found.append(FarKeys(level, self.position - inside, self.position, k, v))
        return found

    @torch.no_grad()
    def append(
        self, k: Tensor, v: Tensor, *, start: int | None = None, stop: int | None = None, others: Iterable[FarKeys] = ()
    ) -> None:
        """Take in the next shard's keys and values (batch, tokens, heads, head_dim); gradients do not flow.

        Where several hold shards of one chunk that ends at `stop`, each takes in its own, which begins at `start`, and
        the `others`' rows.
        """
        start = self.position if start is None else start
        stop = start + k.shape[1] if stop is None else stop
        for level, (w, _) in enumerate(self.pattern.levels):
            segment = stop // w * w  # the one that is open afterwards
            if self.keep and segment > self.position:
                self._levels[level] = torch.empty_like(self._levels[level])
            rows = self._levels[level]
            own = common_span(self.pattern, level, segment, start, start + k.shape[1])
            for views in span_views(self.pattern, own, self.num_heads, start):
                strided_view(rows[0], views.segment).copy_(strided_view(k, views.shard))
                strided_view(rows[1], views.segment).copy_(strided_view(v, views.shard))
            for keys in others:
                if keys.level == level and keys.start >= segment:
                    for views in span_views(self.pattern, keys.span, self.num_heads, start):
                        strided_view(rows[0], views.segment).copy_(strided_view(keys.k, views.packed))
                        strided_view(rows[1], views.segment).copy_(strided_view(keys.v, views.packed))
        self.position = stop
