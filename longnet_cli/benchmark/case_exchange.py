"""The op `exchange`: the communication of one layer, for a sequence over several ranks, and nothing else.

`dilated` is the exchange of far rows (`runtime/exchange.py`). `dense` is the exchange that dense attention needs
instead: every rank gets the keys and values of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.model import LongNetConfig
from longnet_cli.model.config import parse_config
from longnet_cli.runtime.device import DTYPES
from longnet_cli.runtime.exchange import Exchange, even_edges

from .measurement import Case, Measurement
from .settings import Settings


def exchange(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of sending keys and values of a sequence of `seq` tokens over all ranks, or their gradients back.

    A row's `bytes` count for one rank: the rank that receives the most.
    """
    ranks, edges, dtype = s.ranks, even_edges(0, seq, s.ranks.world), DTYPES[s.dtype]
    tokens = -(-seq // ranks.world)  # of the longest shard
    token = 2 * dtype.itemsize * s.batch * s.heads * s.head_dim  # bytes of a token's keys and values
    backward, pattern = direction == "backward", s.pattern_for(seq) if impl == "dilated" else None
    if pattern is not None:
        plan = Exchange(one_layer(s, pattern), edges, rank=ranks.rank)
        plans = map(plan.of_rank, range(ranks.world))
        rows = max(sum(parcel.rows for made in each.received for parcel in made) for each in plans)
        memory = token * (tokens + 2 * rows) * (3 if backward else 1)
    else:
        rows = tokens * (ranks.world - 1)
        memory = token * tokens * (ranks.world + 1)

    def start() -> Callable[[], object]:
        shape = (s.batch, tokens, s.heads, s.head_dim)
        k, v = (torch.randn(shape, dtype=dtype, device=s.device) for _ in range(2))
        if pattern is None:
            return _all_gather(torch.stack((k, v)), backward, ranks.world)
        mine = edges[ranks.rank + 1] - edges[ranks.rank]
        return _far_rows(plan, k[:, :mine].requires_grad_(), v[:, :mine].requires_grad_(), backward)

    row = Measurement.of(s, impl, direction, seq, pattern, bytes=token * rows, ranks=ranks.world)
    return Case(row, lambda tokens: 0, memory, start)


def _far_rows(plan: Exchange, k: Tensor, v: Tensor, backward: bool) -> Callable[[], object]:
    def run() -> list[Tensor]:
        far = plan.run(k, v)[0]
        for keys in far:
            if keys.ready:
                keys.ready()
        return [x for keys in far for x in (keys.k, keys.v)]

    if not backward:
        return torch.no_grad()(run)
    got = run()
    grads = [torch.ones_like(x) for x in got]
    return lambda: torch.autograd.grad(got, (k, v), grads, retain_graph=True) if got else None


def _all_gather(mine: Tensor, backward: bool, world: int) -> Callable[[], object]:
    of_all = torch.ones(world, *mine.shape, dtype=mine.dtype, device=mine.device)
    if backward:
        return lambda: dist.reduce_scatter(mine, list(of_all))
    return lambda: dist.all_gather(list(of_all), mine)


def one_layer(s: Settings, pattern: Pattern) -> LongNetConfig:
    shape = {"vocab_size": 0, "dim": s.heads * s.head_dim, "num_layers": 1, "num_heads": s.heads, "ffn_dim": 1}
    return parse_config({**shape, "position": "none", "causal": s.causal}, "--pattern", pattern)
