"""Exact training on causal sequences longer than memory: the same loss and gradients as one backward pass.

    forward    chunk 0 -> chunk 1 -> chunk 2      each layer's KVCache carries the rows of the open segments along
    backward   chunk 0 <- chunk 1 <- chunk 2      each chunk computed again, with its far rows as leaves whose
                                                  gradients are handed to the chunk that made them

B batch, N tokens, n tokens of a shard, H heads, K key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import FarKeys, FarSpan, Outside
from longnet_cli.attention.spans import Layout, common_span, open_spans, segment_rows
from longnet_cli.attention.views import accumulator, of_level, strided_view
from longnet_cli.nets.config import NetConfig
from longnet_cli.nets.net import Net
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.device import precision, random_state, set_random_state
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.fsdp import final_backward
from longnet_cli.running.ranks.ranks import ALONE, Ranks


class Tokens(Protocol):
    """Token ids (B, N) that can be sliced: a tensor, or ids that are read when they are indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def device(self) -> torch.device: ...
    def __getitem__(
        self, index: tuple[int | slice, slice], /
    ) -> Tensor: ...  # (n,), or (b, n) for a slice of rows


def backward_in_chunks(
    model: Net,
    tokens: Tokens,
    targets: Tokens,
    chunk: int,
    *,
    scale: float = 1.0,
    dtype: str = "fp32",
    ranks: Ranks = ALONE,
    final: bool = True,
    allocate: Callable[..., Tensor] = torch.empty,
    on_chunk: Callable[[], None] | None = None,
) -> Tensor:
    """Add the gradients of `scale * sum of nll` to the parameters' `.grad`; return the sum, in nats, float64.

    tokens, targets: (B, N) as for `Net.nll`, read one chunk at a time. Loss and gradients are the same as from one
    backward pass over all N tokens. Memory holds the activations of `chunk` tokens, and the far rows of the levels that
    chunks cut; the price is one more forward pass. Gradients of far rows are summed in fp32 (fp64 for fp64). `dtype` is
    as in `running.device`. `allocate` makes the memory of far rows and of these sums, as torch.empty does. That memory
    may be on the host while the net is on a GPU (`running.memory_maps`).

    The `ranks` of a group share every chunk; each rank adds and returns its part. `final` says that no other backward
    pass of the step follows, which sharded weights need to know (`running.ranks.fsdp`). `on_chunk` is called after each
    chunk, forward and backward.
    """
    device = tokens.device
    on_chunk = on_chunk or (lambda: None)
    stream = CausalStream(model, keep=tokens.shape[1], allocate=allocate)
    begins = range(0, tokens.shape[1], chunk)
    chunks = [_Chunk(model, start, min(start + chunk, tokens.shape[1]), ranks) for start in begins]
    tape = []  # per chunk: the random state that its dropout draws from, its far keys
    for index, part in enumerate(chunks):
        tape.append((random_state(device), [outside.keys for outside in stream.far()]))
        if index < len(chunks) - 1:  # the last one is only computed with its gradient
            with precision(dtype, device):
                stream(tokens[:, part.mine], exchange=part.exchange)
            on_chunk()
    del stream
    total = torch.zeros((), dtype=torch.float64, device=device)
    gradients = FarGradients(model.config, tokens.shape[1], ranks, allocate)
    after: list[Tensor] = []
    while chunks:
        part, (state, far) = chunks.pop(), tape.pop()
        set_random_state(state, device)
        final_backward(model, final and not chunks)
        total += part.backward(
            tokens[:, part.mine], targets[:, part.mine], far, gradients, scale, dtype
        )
        if not after:
            after = random_state(device)  # after the last chunk, as one forward pass leaves it
        on_chunk()
    set_random_state(after, device)
    return total


class _Chunk:
    """The positions [start, stop) of a sequence, or with a group this rank's shard of them."""

    def __init__(self, model: Net, start: int, stop: int, ranks: Ranks) -> None:
        self.model, self.start, self.stop = model, start, stop
        self.exchange, self.mine = None, slice(start, stop)
        if ranks.sp > 1:
            edges = ranks.edges(start, stop - start)
            self.exchange = Exchange(model.config, edges, group=ranks.group, cached=True)
            self.mine = slice(*self.exchange.mine)

    def backward(
        self,
        tokens: Tensor,
        targets: Tensor,
        far: Sequence[Sequence[FarKeys]],
        gradients: FarGradients,
        scale: float,
        dtype: str,
    ) -> Tensor:
        """Compute the chunk again with `far` as leaves, run its backward pass, and return its loss."""
        made: list[tuple[Tensor, Tensor]] = []  # keys and values, per layer
        leaves: list[Outside] = []

        def provide(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
            if layer == len(made):  # otherwise activation checkpointing computes it again
                made.append((k, v))
                keys = [gradients.leaves(layer, x, k.device) for x in far[layer]]
                leaves.append(Outside(keys))
            if not self.exchange:
                return leaves[layer]
            return Outside([*leaves[layer].keys, *self.exchange.run(k, v)[0]])

        with precision(dtype, tokens.device):
            hidden = self.model(tokens, start=self.mine.start, far=provide)
            total = self.model.nll(hidden, targets).sum(dtype=torch.float64)
        roots, grads = [total], [torch.full_like(total, scale)]
        for layer, (k, v) in enumerate(made):
            from_later_chunks = gradients.hand_over(
                layer, self.start, self.stop, self.mine.start, k
            )
            if from_later_chunks is not None:
                for made_here, gradient in zip((k, v), from_later_chunks, strict=True):
                    if made_here.requires_grad:  # otherwise no trained weight made it
                        roots.append(made_here)
                        grads.append(gradient.to(made_here.dtype))
        torch.autograd.backward(roots, grads)
        return total.detach()


Key = tuple[int, int, int]  # layer, level, start of the segment


class FarGradients:
    """The gradients of far rows in one sequence of `tokens`, whose chunks come from last to first.

    There is one sum per layer, level and segment, (k and v, B, rows, lanes, D), packed as in KVCache, in fp32 (fp64 for
    fp64). `allocate` makes its
    memory, as torch.empty does. In a group, each rank sums the gradients of its own shards. These sums are reduced over
    the ranks when the chunk that made the rows asks for them.
    """

    def __init__(
        self, config: NetConfig, tokens: int, ranks: Ranks, allocate: Callable[..., Tensor]
    ) -> None:
        self.pattern, self.tokens = config.pattern, tokens
        self.layout = Layout(config.pattern, config.num_heads, config.kv_heads)
        self.ranks, self.allocate = ranks, allocate
        self.sums: dict[Key, Tensor] = {}

    def leaves(self, layer: int, keys: FarKeys, device: torch.device) -> FarKeys:
        """Return far keys of a chunk on `device`, as leaves of its graph.

        Each gradient is added to its sum and freed as soon as it is known: only one layer's exist beside the sums.
        """
        k, v = (x.to(device).detach().requires_grad_() for x in (keys.k, keys.v))
        for index, x in enumerate((k, v)):
            x.register_post_accumulate_grad_hook(
                partial(self._add, (layer, keys.level, keys.start), index)
            )
        return replace(keys, k=k, v=v)

    def _add(self, key: Key, index: int, leaf: Tensor) -> None:
        """Add the gradient of k or v (`index` 0 or 1), (B, rows, lanes, D), to its sum, and free it."""
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if (
            key not in self.sums
        ):  # the first chunk to come here, the last of the sequence, has the most rows
            batch, _, held, head_dim = leaf.shape
            shape = (2, batch, segment_rows(self.pattern, key[1], self.tokens), held, head_dim)
            self.sums[key] = self.allocate(shape, dtype=accumulator(leaf.dtype), device=leaf.device)
            self.sums[key][:, :, : leaf.shape[1]] = 0
        rows = self.sums[key][index, :, : leaf.shape[1]]
        rows.add_(gradient.to(rows.device))

    def hand_over(self, layer: int, start: int, stop: int, begin: int, k: Tensor) -> Tensor | None:
        """Return what later chunks have added to the gradients of a shard: (k and v, B, n, K, D), or None for nothing.

        The shard starts at `begin`, in the chunk [start, stop), and has the shape and the device of `k` (B, n, K, D),
        or (B, n, levels, K, D).
        Sums that no earlier chunk needs are freed. All ranks of a group must ask, once for each chunk.
        """
        total = None
        for span in open_spans(self.pattern, stop):
            key = (layer, span.level, span.start)
            if key not in self.sums or span.stop <= start:
                continue
            rows = (
                self.sums[key] if span.start < start else self.sums.pop(key)
            )  # no earlier chunk has rows of it
            of_chunk = self._sum_over_ranks(rows, span, start, k)
            if total is None:
                total = torch.zeros(2, *k.shape, dtype=rows.dtype, device=k.device)
            mine = common_span(self.pattern, span.level, span.start, begin, begin + k.shape[1])
            for views in self.layout.views(mine, begin):
                for into, out in zip(total, rows, strict=True):
                    mine_of_level = strided_view(of_level(into, span.level), views.shard)
                    mine_of_level.add_(strided_view(out, views.segment).to(k.device))
            if self.ranks.sp_rank:
                # some of these rows may belong to the chunk before: its all-reduce must add this sum once, from rank 0
                rows[:, :, of_chunk] = 0
        return total

    def _sum_over_ranks(self, rows: Tensor, span: FarSpan, start: int, k: Tensor) -> slice:
        """Sum the rows that a chunk from `start` on has of a span over the ranks, in place. Return their places."""
        if self.ranks.sp == 1:
            return slice(None)
        edges = max(start - span.start, 0), span.stop - span.start
        begins, ends = (self.layout.rows_before(span.level, edge) for edge in edges)
        places = slice(min(begins), max(ends))
        of_chunk = rows[:, :, places].to(k.device).contiguous()
        dist.all_reduce(of_chunk, group=self.ranks.group)
        rows[:, :, places] = of_chunk
        return places
