"""Exact training on causal sequences longer than memory: the same loss and gradients as one backward pass.

    forward    chunk 0 -> chunk 1 -> chunk 2      each layer's KVCache carries the rows of the open segments along
    backward   chunk 0 <- chunk 1 <- chunk 2      each chunk computed again, with its far rows as leaves whose
                                                  gradients are handed to the chunk that made them

B batch, N tokens, n tokens of a shard, H heads, K key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import FarKeys, FarSpan, Outside
from longnet_cli.attention.segment_rows import SegmentRows
from longnet_cli.attention.spans import Lanes, open_spans, rows_per_lane, whole_segment
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
    # Returns (n,), or (b, n) for a slice of rows
    def __getitem__(self, index: tuple[int | slice, slice], /) -> Tensor: ...


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
    on_chunk: Callable[[], None] = lambda: None,
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
    stream = CausalStream(model, keep=tokens.shape[1], allocate=allocate)
    starts = range(0, tokens.shape[1], chunk)
    chunks = [_Chunk(model, start, min(start + chunk, tokens.shape[1]), ranks) for start in starts]
    tape = []  # per chunk: the random state that its dropout draws from, its far keys
    for index, part in enumerate(chunks):
        tape.append((random_state(device), [outside.keys for outside in stream.far()]))
        if index < len(chunks) - 1:  # the last one is only computed with its gradient
            with precision(dtype, device):
                stream(tokens[:, part.mine], exchange=part.exchange)
            on_chunk()
    del stream
    total = torch.zeros((), dtype=torch.float64, device=device)
    gradients = []
    for _ in range(model.config.num_layers):
        gradients.append(FarGradients(model.config, tokens.shape[1], ranks, allocate))
    after: list[Tensor] = []
    while chunks:
        part = chunks.pop()
        state, far = tape.pop()
        set_random_state(state, device)
        final_backward(model, final and not chunks)
        total += part.backward(
            tokens[:, part.mine],
            targets[:, part.mine],
            far,
            gradients,
            scale,
            dtype,
        )
        if not after:
            after = random_state(device)  # after the last chunk, as one forward pass leaves it
        on_chunk()
    set_random_state(after, device)
    return total


class _Chunk:
    """The positions [start, stop) of a sequence, or with a group this rank's shard of them."""

    def __init__(
        self,
        model: Net,
        start: int,
        stop: int,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.start = start
        self.stop = stop
        self.exchange = None
        self.mine = slice(start, stop)
        if ranks.sp > 1:
            edges = ranks.edges(start, stop - start)
            self.exchange = Exchange(model.config, edges, group=ranks.group, cached=True)
            self.mine = slice(*self.exchange.mine)

    def backward(
        self,
        tokens: Tensor,
        targets: Tensor,
        far: Sequence[Sequence[FarKeys]],
        gradients: Sequence[FarGradients],
        scale: float,
        dtype: str,
    ) -> Tensor:
        """Compute the chunk again with `far`, run its backward pass, and return its loss."""
        keys_of_layers: list[tuple[Tensor, Tensor]] = []  # and values

        def provide(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
            if layer == len(keys_of_layers):  # otherwise activation checkpointing computes it again
                keys_of_layers.append((k, v))
            keys = [gradients[layer].collecting(x, k.device) for x in far[layer]]
            near = self.exchange.send(k, v) if self.exchange else []
            return Outside([*keys, *near])

        with precision(dtype, tokens.device):
            hidden = self.model(tokens, start=self.mine.start, far=provide)
            total = self.model.nll(hidden, targets).sum(dtype=torch.float64)
        roots = [total]
        root_gradients = [torch.full_like(total, scale)]
        for keys_of_layer, of_layer in zip(keys_of_layers, gradients, strict=True):
            k, _ = keys_of_layer
            from_later_chunks = of_layer.hand_over(self.start, self.stop, self.mine.start, k)
            if from_later_chunks is not None:
                for rows, gradient in zip(keys_of_layer, from_later_chunks, strict=True):
                    if rows.requires_grad:  # otherwise no trained weight made them
                        roots.append(rows)
                        root_gradients.append(gradient.to(rows.dtype))
        torch.autograd.backward(roots, root_gradients)
        return total.detach()


class FarGradients:
    """The gradients of a layer's far rows in one sequence, whose chunks come from last to first.

    There is one sum per segment, of keys and values, packed as in KVCache, in fp32 (fp64 for fp64). Those of a level
    have one size, that of the longest segment among `tokens`; `allocate` makes them, as torch.empty does. In a group,
    each rank sums the gradients of its own shards. These sums are added up over the ranks when the chunk that made the
    rows asks for them. It is a `FarSource` of rows that are there already.
    """

    def __init__(
        self,
        config: NetConfig,
        tokens: int,
        ranks: Ranks,
        allocate: Callable[..., Tensor],
    ) -> None:
        self.tokens = tokens
        self.lanes = Lanes(config.pattern, config.num_heads, config.kv_heads)
        self.ranks = ranks
        self.allocate = allocate
        self.sums: dict[FarSpan, SegmentRows] = {}  # by whole segment

    def collecting(self, keys: FarKeys, device: torch.device) -> FarKeys:
        """Return far keys of a chunk on `device`, whose gradients are added to their sums as soon as they are known."""
        return replace(keys, k=keys.k.to(device), v=keys.v.to(device), source=self)

    def arrive(self) -> None:
        """Do nothing: the rows are there."""

    def take_gradients(self, span: FarSpan, dk: Tensor, dv: Tensor) -> None:
        """Add gradients (B, rows, lanes, D) of the packed rows of a span to their sum."""
        batch, rows, lanes, head_dim = dk.shape
        whole = whole_segment(self.lanes.pattern, span)
        if whole not in self.sums:
            most = rows_per_lane(self.lanes.pattern, span.level, self.tokens)
            shape = (2 * batch, most, lanes, head_dim)
            packed = self.allocate(shape, dtype=dk.dtype, device=dk.device)
            packed.zero_()
            self.sums[whole] = SegmentRows(self.lanes, whole, packed)
        sums = self.sums[whole].packed
        of_keys, of_values = sums[:, :rows].chunk(2)
        of_keys += dk.to(sums.device)
        of_values += dv.to(sums.device)

    def hand_over(
        self,
        start: int,
        stop: int,
        shard_start: int,
        k: Tensor,
    ) -> Tensor | None:
        """Return what later chunks have added to the gradients of a shard: (k and v, B, n, K, D), or None for nothing.

        The shard starts at `shard_start`, in the chunk [start, stop), and has the shape and the device of `k`, which is
        (B, n, K, D) or (B, n, levels, K, D). Sums that no earlier chunk needs are freed. All ranks of a group must ask,
        once for each chunk.
        """
        gradients = None
        for span in open_spans(self.lanes.pattern, stop):
            whole = whole_segment(self.lanes.pattern, span)
            of_chunk = span.part(start, stop)
            if whole not in self.sums or of_chunk.start == of_chunk.stop:
                continue
            rows = self._over_ranks(self.sums[whole], of_chunk, k.device)
            if gradients is None:
                gradients = torch.zeros(2, *k.shape, dtype=rows.packed.dtype, device=k.device)
            rows.add_to(gradients.unbind(), shard_start)
            if span.start >= start:
                del self.sums[whole]  # no earlier chunk has rows of it
        return gradients

    def _over_ranks(self, segment: SegmentRows, span: FarSpan, device: torch.device) -> SegmentRows:
        """Return the rows that a chunk has of a segment, those of `span`, summed over the ranks.

        Each row of a segment is in one chunk, so no sum is used twice. Two ranks, a segment of three chunks:

            chunk            0    1    2                    chunk 2 takes its rows first, then chunk 1, then 0
            sum of rank 0  [ .... .... 2222 ]               each of them: rank 0's rows + rank 1's rows
            sum of rank 1  [ .... .... 2222 ]
        """
        packed = segment.of(span).to(device)
        if self.ranks.sp > 1:
            packed = packed.contiguous()
            dist.all_reduce(packed, group=self.ranks.group)
        return SegmentRows(self.lanes, span, packed)
