"""The keys and values that a causal sequence must remember: for each level, the rows of its open segment.

A level's later queries attend to the rows of their own segment alone, so nothing of a closed segment is ever read
again. The whole memory of a sequence is `sum of ceil(w / r)` rows a head, whatever its length: 40,960 for a billion
tokens of `Pattern.geometric(2**30)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dilated import FarKeys, strided_view
from .pattern import Pattern, rows_before, segment_rows


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
    def append(self, k: Tensor, v: Tensor) -> None:
        """Take in the next shard's keys and values (batch, tokens, heads, head_dim); gradients do not flow."""
        tokens = k.shape[1]
        stop = self.position + tokens
        for level, (w, _) in enumerate(self.pattern.levels):
            segment = stop // w * w
            if self.keep and segment > self.position:
                self._levels[level] = torch.empty_like(self._levels[level])
            for taken, packed in segment_rows(self.pattern, level, self.num_heads, self.position, tokens, segment):
                for rows, x in zip(self._levels[level], (k, v), strict=True):
                    strided_view(rows, packed).copy_(strided_view(x, taken))
        self.position = stop
