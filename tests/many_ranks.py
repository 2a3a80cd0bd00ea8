"""Work on several ranks, which are real processes; problems for them, and how far their results may be off."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from strategies import PAPER_64TH, pattern_with_options
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.running.ranks.ranks import Ranks

multiprocessing.set_forkserver_preload(["many_ranks", "torch._dynamo", "torch.distributed.fsdp"])
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-5)}  # outputs, gradients


def run_ranks(world: int, folder: Path, work: Callable[..., None], *args: Any) -> None:
    """`work(*args)` on every rank of a gloo group; an assertion that fails on one fails here.

    The ranks are forks of one server that has torch: eight would take half a minute to import it.
    """
    folder.mkdir(exist_ok=True)
    mp.start_processes(
        _enter,
        (world, str(folder / f"store-{uuid4()}"), work, args),
        nprocs=world,
        start_method="forkserver",
    )


def _enter(rank: int, world: int, store: str, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        work(*args)
    finally:
        dist.destroy_process_group()


def together() -> Ranks:
    """All ranks as one group, which shares every sequence."""
    world = dist.get_world_size()
    return Ranks(dist.get_rank(), world, world, dist.group.WORLD)


def mesh(dp: int) -> Ranks:
    """The ranks of this process, as `ranks.join` makes them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sp = world // dp
    groups = [dist.new_group(list(range(first, first + sp))) for first in range(0, world, sp)]
    return Ranks(rank, world, sp, groups[rank // sp] if sp > 1 else None)


def in_both_types(work: Callable[..., None], *args: Any) -> None:
    for dtype in TOLERANCE:
        work(dtype, *args)


def off(found: Tensor, expected: Tensor, floor: float) -> float:
    return (found - expected).double().norm().item() / max(
        expected.double().norm().item(), floor, 1e-30
    )


def random_pattern(
    pick: random.Random, kind: str | None = None, offsets: str | None = None, causal: bool = True
) -> Pattern:
    offsets = offsets or pick.choice(["modulo", "grouped"])
    kind = kind or pick.choice(["paper", "geometric", "tiled", "any", "options", "options"])
    if kind == "options":
        return pattern_with_options(pick, causal)
    if kind == "tiled":
        found = Pattern.geometric(pick.randint(1, 600), pick.randint(3, 32), pick.randint(2, 4))
        sinks = pick.choice([0, 3])
        return replace(
            found, head_offsets=offsets, look_back=1, overlap="once", queries="all", sinks=sinks
        )
    if kind == "paper":
        return Pattern(PAPER_64TH.segment_lengths, PAPER_64TH.dilation_rates, offsets)
    if kind == "geometric":
        found = Pattern.geometric(pick.randint(1, 600), pick.randint(1, 32), pick.randint(2, 4))
        return Pattern(found.segment_lengths, found.dilation_rates, offsets)
    levels = [(pick.randint(1, 300), pick.randint(1, 13)) for _ in range(pick.randint(1, 4))]
    return Pattern(tuple(w for w, _ in levels), tuple(r for _, r in levels), offsets)
