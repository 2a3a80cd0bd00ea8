"""Chosen blocks over ranks: the same blocks as in one process, fetched from the ranks that have them, and no others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many_ranks import run_ranks
from pattern_nets import net
from strategies import turn
from torch import Tensor

from longnet_cli.attention import Pattern, dilated_attention, groups
from longnet_cli.attention.outside import Outside
from longnet_cli.attention.past import Past, Seen
from longnet_cli.running.ranks import blocks as rank_blocks
from longnet_cli.running.ranks.blocks import FINISHED, GRADIENTS, ROWS, Directory, Owned
from longnet_cli.running.ranks.exchange import Exchange, even_edges

PATTERN = Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)
FUNNEL = ((groups.RUNS, 96), (1, 40), (2, 12))  # so that short documents are scanned in all stages
Blocks = dict[tuple[int, int], tuple[int, ...]]  # (row, token) -> what it sees


def watching(past: Past, into: Blocks, first: int) -> Past:
    """A past that tells what the tokens of a shard see, the first of which is token `first` of the sequence."""

    def tell(seen: Seen) -> None:
        part, (group, _, queries, _) = seen.part, seen.part.groups
        begin = first + part.columns.start + group - part.start
        for row, of_row in enumerate(seen.blocks, part.rows.start):
            for index, of_group in enumerate(of_row.tolist()):
                for token in range(begin + index * queries, begin + (index + 1) * queries):
                    into[row, token] = tuple(of_group)

    past.on_choice = tell
    return past


def in_shards(problems: range) -> None:
    """Blocks, outputs and gradients, with documents, partial blocks, empty shards, batches and exact votes."""
    groups.FUNNEL = FUNNEL  # this process ends with the test
    rank, world = dist.get_rank(), dist.get_world_size()
    scanned = False
    for seed in problems:
        pick = random.Random(seed)
        pattern = replace(PATTERN, chosen_exact=pick.choice([0, 0, 6]), chosen_every=pick.choice([2, 4, 8]))
        kv_heads, batch, tokens = pick.randint(1, 2), pick.choice([1, 1, 2]), pick.choice([90, 700, 1900])
        heads, rotary = kv_heads * pick.randint(1, 2), {"turn": turn} if pick.random() < 0.5 else {}
        edges = even_edges(0, tokens, world)
        if pick.random() < 0.7:  # uneven, some of them empty
            edges = [0, *sorted(pick.randint(0, tokens) for _ in range(world - 1)), tokens]
        cuts = sorted({pick.randint(0, tokens - 1) for _ in range(pick.choice([0, 0, 1, 3]))} | {0})
        documents = [b - a for a, b in zip(cuts, [*cuts[1:], tokens], strict=True)]
        generator = torch.Generator().manual_seed(seed)
        q, k, v, dout = torch.randn(4, batch, tokens, heads, 8, generator=generator, dtype=torch.float64)
        k, v = k[:, :, :kv_heads], v[:, :, :kv_heads]
        wanted, found = Blocks(), Blocks()
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        alone = Outside(past=watching(Past(pattern), wanted, 0))
        out = dilated_attention(*whole, pattern, documents=documents, far=alone, **rotary)
        expected = [out.detach(), *torch.autograd.grad(out, whole, dout)]

        first, last = edges[rank], edges[rank + 1]
        mine = [x[:, first:last].clone().requires_grad_() for x in (q, k, v)]
        exchange = Exchange(net(pattern, heads=heads, layers=1).config, edges, cuts=cuts)
        far = exchange(0, *mine)
        watching(far.past, found, first)
        out = dilated_attention(*mine, pattern, start=exchange.start, documents=exchange.documents, far=far, **rotary)
        assert found == {(row, token): seen for (row, token), seen in wanted.items() if first <= token < last}, seed
        got = [out.detach(), *torch.autograd.grad(out, mine, dout[:, first:last])]
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
            torch.testing.assert_close(a, b[:, first:last], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        scanned |= any(stage.means == groups.RUNS for stage in groups.stages(pattern, max(documents) // 8 - 3))
    assert scanned


@pytest.mark.parametrize(
    ("world", "problems"),
    [(3, range(24)), *(pytest.param(n, range(200), marks=pytest.mark.slow) for n in (2, 4))],
)
def test_the_blocks_of_one_process_are_chosen(world: int, problems: range, tmp_path: Path) -> None:
    run_ranks(world, tmp_path, in_shards, problems)
