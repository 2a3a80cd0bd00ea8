"""The exchange of many ranks on paper: every rank's plan is made as in a real job, and no process is started.

A rank that would send other rows than its reader expects ends the simulation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from longnet_cli.attention import Pattern
from longnet_cli.attention.branches import shard_flops
from longnet_cli.attention.notation import format_pattern
from longnet_cli.attention.spans import far_spans
from longnet_cli.basics.errors import LongNetError
from longnet_cli.running.device import DTYPES, peak_memory
from longnet_cli.running.ranks.exchange import Exchange, even_edges

from .cases import one_layer
from .settings import Settings


@dataclass(frozen=True)
class Simulation:
    """The exchange of one layer's forward pass, over all ranks.

    The backward pass sends the same bytes back. For chosen blocks, it adds up gradients over all ranks instead, and
    these are not counted. received, sent: bytes of the rank that has the most. peers: the most ranks from which a rank
    receives. far_bytes: the most bytes of far rows that a rank holds. formula: the bytes of `formula_rows`.
    flops_share: the attention FLOPs of the busiest rank, relative to the mean. plan_seconds: the CPU time of one plan,
    of the middle rank.
    """

    op: str
    pattern: str
    causal: bool
    seq: int
    ranks: int
    received: int
    received_mean: float
    sent: int
    sent_mean: float
    peers: int
    far_bytes: int
    formula: float
    flops_share: float
    plan_seconds: float
    seconds: float
    peak_rss_bytes: int


def simulate(s: Settings, on_rank: Callable[[int], None] = lambda count: None) -> Iterator[Simulation]:
    """Yield one row for each length of the settings, with `s.simulate` ranks.

    `on_rank` is called after each rank's plan. Raises LongNetError for ranks whose plans differ.
    """
    for seq in s.seq:
        yield _simulate(s, s.pattern_for(seq), seq, on_rank)


def formula_rows(pattern: Pattern, shard: float) -> float:
    """Return the rows of docs/ranks.md's formula: what levels wider than a shard (of so many tokens) make a rank see.

    The sum of (w / r) (1 - shard / w). Look-backs, sinks and the segments that a shard's edges cut come on top.
    """
    return sum(w / r * (1 - shard / w) for w, r in pattern.levels if w > shard)


def _simulate(s: Settings, pattern: Pattern, seq: int, on_rank: Callable[[int], None]) -> Simulation:
    assert s.simulate
    began, world, edges = time.perf_counter(), s.simulate, even_edges(0, seq, s.simulate)
    config, itemsize = one_layer(s, pattern), DTYPES[s.dtype].itemsize
    shape = s.batch, 0, s.heads, s.head_dim
    # [i, j]: what rank i says that it sends to rank j, and what rank j says that it gets from rank i
    sends, gets, sent_rows, got_rows = (np.zeros((world, world), np.int64) for _ in range(4))
    held, flops = np.zeros(world, np.int64), np.zeros(world)
    start = time.thread_time()
    plan = Exchange(config, edges, rank=world // 2)
    plan_seconds = time.thread_time() - start
    for rank in range(world):
        plan = plan.of_rank(rank)
        sends[rank], gets[:, rank] = plan.sizes(plan.sent, shape), plan.sizes(plan.received, shape)
        sent_rows[rank] = [hash(tuple(parcels)) for parcels in plan.sent]
        got_rows[:, rank] = [hash(tuple(parcels)) for parcels in plan.received]
        held[rank] = sum(plan.sizes([plan.joined], shape))
        first, last = edges[rank], edges[rank + 1]
        spans = tuple(far_spans(pattern, first, last, s.causal, seq)) if first < last else ()
        flops[rank] = shard_flops(pattern, s.heads, s.head_dim, first, last - first, s.causal, spans, seq)
        on_rank(1)
    gathered = plan.gathered(shape)
    for numbers in (sends, gets):
        numbers += gathered * (1 - np.eye(world, dtype=np.int64))
    held += gathered * (world - 1)
    for maker, reader in np.argwhere((sent_rows != got_rows) | (sends != gets))[:1]:
        raise LongNetError(
            f"the plans differ at {seq:,} tokens: rank {maker} sends {sends[maker, reader]:,} numbers to rank "
            f"{reader}, which expects {gets[maker, reader]:,}, or other rows"
        )
    received, sent = itemsize * gets.sum(0), itemsize * sends.sum(1)
    return Simulation(
        op="exchange",
        pattern=format_pattern(pattern),
        causal=s.causal,
        seq=seq,
        ranks=world,
        received=int(received.max()),
        received_mean=float(received.mean()),
        sent=int(sent.max()),
        sent_mean=float(sent.mean()),
        peers=int((gets > 0).sum(0).max()),
        far_bytes=int(itemsize * held.max()),
        formula=2 * itemsize * s.batch * s.heads * s.head_dim * formula_rows(pattern, seq / world),
        flops_share=float(flops.max() / flops.mean()),
        plan_seconds=plan_seconds,
        seconds=time.perf_counter() - began,
        peak_rss_bytes=peak_memory(s.device),
    )
