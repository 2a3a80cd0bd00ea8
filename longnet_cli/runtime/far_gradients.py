"""Gradients on their way from the chunks that read far rows, or chose them, to the chunk that made them.

B batch, n tokens of a shard, K key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import FarKeys, Past
from longnet_cli.attention.dilated import strided_view
from longnet_cli.attention.rows import rows_before
from longnet_cli.attention.spans import common_span, lanes, level_of, open_spans, segment_rows, span_views
from longnet_cli.model.net import NetConfig

Key = tuple[int, int, int]  # layer, level, start of the segment


class FarGradients:
    """The gradients of far rows in one sequence of `tokens`, whose chunks come from last to first.

    There is one sum per layer, level and segment, (k and v, B, rows, lanes, D), packed as in KVCache, in fp32 (fp64 for
    fp64). With chosen blocks, there is one more per layer, for all tokens before the last chunk. `allocate` makes its
    memory, as torch.empty does. In a group, each rank sums the gradients of its own shards. These sums are reduced over
    the ranks when the chunk that made the rows asks for them.
    """

    def __init__(
        self, config: NetConfig, tokens: int, group: dist.ProcessGroup | None, allocate: Callable[..., Tensor]
    ) -> None:
        self.pattern, self.num_heads, self.tokens = config.pattern, config.num_heads, tokens
        self.group, self.allocate = group, allocate
        self.sums: dict[Key, Tensor] = {}
        self.of_pasts: dict[int, Tensor] = {}  # by layer: (k and v, B, tokens, K, D)

    def leaves(self, layer: int, keys: FarKeys, device: torch.device) -> FarKeys:
        """Return far keys of a chunk on `device`, as leaves of its graph.

        Each gradient is added to its sum and freed as soon as it is known: only one layer's exist beside the sums.
        """
        k, v = (x.to(device).detach().requires_grad_() for x in (keys.k, keys.v))
        for index, x in enumerate((k, v)):
            x.register_post_accumulate_grad_hook(partial(self._take, (layer, keys.level, keys.start), index))
        return replace(keys, k=k, v=v)

    def past(self, layer: int, past: Past, start: int, k: Tensor) -> Past:
        """Return the past of the chunk at `start`, which adds the gradients of its rows to their sum.

        `past` is that of a later chunk or of this one; k (B, n, K, D) is the chunk's.
        """
        if start and layer not in self.of_pasts:
            size, wide = self.pattern.chosen_block, torch.float64 if k.dtype is torch.float64 else torch.float32
            shape = (2, k.shape[0], -(-start // size) * size, *k.shape[2:])
            self.of_pasts[layer] = self.allocate(shape, dtype=wide, device=k.device).zero_()
        return past.before(start, self.of_pasts.get(layer))

    def _take(self, key: Key, index: int, leaf: Tensor) -> None:
        """Add the gradient of k or v (`index` 0 or 1), (B, rows, lanes, D), to its sum, and free it."""
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if key not in self.sums:  # the first chunk to come here, the last of the sequence, has the most rows
            batch, _, held, head_dim = leaf.shape
            wide = torch.float64 if leaf.dtype is torch.float64 else torch.float32
            shape = (2, batch, segment_rows(self.pattern, key[1], self.tokens), held, head_dim)
            self.sums[key] = self.allocate(shape, dtype=wide, device=leaf.device)
            self.sums[key][:, :, : leaf.shape[1]] = 0
        rows = self.sums[key][index, :, : leaf.shape[1]]
        rows.add_(gradient.to(rows.device))

    def of_shard(self, layer: int, start: int, stop: int, begin: int, k: Tensor) -> Tensor | None:
        """Return what later chunks add to the gradients of one shard's k and v: (k and v, B, n, K, D), or None.

        The shard starts at `begin`, in the chunk [start, stop), and has the shape and the device of `k` (B, n, K, D).
        """
        total, sizes = None, (self.num_heads, k.shape[2])
        if layer in self.of_pasts:
            rows = self.of_pasts[layer][:, :, begin : begin + k.shape[1]]
            total = torch.zeros(2, *k.shape, dtype=rows.dtype, device=k.device)
            total[:, :, : rows.shape[2]] = rows
        for span in open_spans(self.pattern, stop):
            key = (layer, span.level, span.start)
            if key not in self.sums or span.stop <= start:
                continue
            rows = self.sums[key] if span.start < start else self.sums.pop(key)  # no earlier chunk has rows of it
            if self.group is not None:
                _, r = level_of(self.pattern, span.level)
                offsets = lanes(self.pattern, span.level, *sizes).offsets
                first = min(rows_before(max(start - span.start, 0), offset, r) for offset in offsets)
                last = max(rows_before(span.stop - span.start, offset, r) for offset in offsets)
                of_chunk = rows[:, :, first:last].to(k.device).contiguous()
                dist.all_reduce(of_chunk, group=self.group)
                rows[:, :, first:last] = of_chunk
            if total is None:
                total = torch.zeros(2, *k.shape, dtype=rows.dtype, device=k.device)
            mine = common_span(self.pattern, span.level, span.start, begin, begin + k.shape[1])
            for views in span_views(self.pattern, mine, self.num_heads, begin, k.shape[2]):
                for into, out in zip(total, rows, strict=True):
                    strided_view(into, views.shard).add_(strided_view(out, views.segment).to(k.device))
            if self.group is not None and dist.get_rank(self.group):
                # some of these rows may belong to the chunk before: its all-reduce must add this sum once, from rank 0
                rows[:, :, first:last] = 0
        return total
