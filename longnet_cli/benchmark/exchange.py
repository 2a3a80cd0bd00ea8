"""The op `exchange`: what one layer of a sequence over several ranks sends, and how long that takes alone.

`dilated` is the exchange of far rows (`runtime/exchange.py`), `dense` what dense attention needs in its place: the keys
and values of all ranks on each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.benchmark.attention import pattern_name
from longnet_cli.benchmark.measurement import Case, Measurement
from longnet_cli.benchmark.settings import Settings
from longnet_cli.model import LongNetConfig
from longnet_cli.runtime.device import DTYPES
from longnet_cli.runtime.exchange import Exchange, even_edges


def exchange(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Keys and values of a sequence of `seq` tokens over all ranks, forward; or their gradients, back.

    A row's `bytes` are those that the rank with the most of them receives.
    """
    pattern, dtype, ranks = s.pattern_for(seq), DTYPES[s.dtype], s.ranks
    edges = even_edges(0, seq, ranks.world)
    shape = (s.batch, -(-seq // ranks.world), s.heads, s.head_dim)
    row = Measurement(
        "exchange", impl, direction, seq,
        heads=s.heads, head_dim=s.head_dim, batch=s.batch, causal=s.causal, dtype=s.dtype, device=str(s.device),
        pattern=pattern_name(pattern) if impl == "dilated" else None, ranks=ranks.world,
    )  # fmt: skip

    def tensor() -> Tensor:
        return torch.randn(shape, dtype=dtype, device=s.device)

    keys_and_values = 2 * dtype.itemsize * s.batch * s.heads * s.head_dim  # of a row
    if impl == "dense":
        row = replace(row, bytes=keys_and_values * shape[1] * (ranks.world - 1))
        memory = keys_and_values * shape[1] * (ranks.world + 1)
        return Case(row, s.batch * seq, 0, 0, memory, lambda: _all_gather(tensor(), tensor(), direction, ranks.world))
    plan = Exchange(_config(s, pattern), edges)
    parcels = [[parcel for made in plan.parcels for parcel in made[reader]] for reader in range(ranks.world)]
    rows = max(sum(parcel.rows for parcel in found) for found in parcels)
    row = replace(row, bytes=keys_and_values * rows)
    memory = keys_and_values * (shape[1] + 2 * rows) * (3 if direction == "backward" else 1)

    def start() -> Callable[[], object]:
        k, v = (tensor()[:, : edges[ranks.rank + 1] - edges[ranks.rank]].requires_grad_() for _ in range(2))

        def run() -> list[Tensor]:
            far = plan.run(k, v)[0]
            for keys in far:
                if keys.ready:
                    keys.ready()
            return [x for keys in far for x in (keys.k, keys.v)]

        if direction == "forward":
            return torch.no_grad()(run)
        got = run()
        grads = [torch.ones_like(x) for x in got]
        return lambda: torch.autograd.grad(got, (k, v), grads, retain_graph=True) if got else None

    return Case(row, s.batch * seq, 0, 0, memory, start)


def _all_gather(k: Tensor, v: Tensor, direction: str, world: int) -> Callable[[], object]:
    mine = torch.stack((k, v))
    of_all = torch.ones(world, *mine.shape, dtype=mine.dtype, device=mine.device)
    if direction == "forward":
        return lambda: dist.all_gather(list(of_all), mine)
    return lambda: dist.reduce_scatter(mine, list(of_all))


def _config(s: Settings, pattern: Pattern) -> LongNetConfig:
    return LongNetConfig(
        vocab_size=0, dim=s.heads * s.head_dim, num_layers=1, num_heads=s.heads, ffn_dim=1, position="none",
        causal=s.causal, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
        head_offsets=pattern.head_offsets,
    )  # fmt: skip
