"""Bytes that chunks of a training sequence keep for each other: rows that later chunks see, and their gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from longnet_cli.attention.groups import past_bytes
from longnet_cli.attention.spans import SINKS, lanes, segment_rows
from longnet_cli.model.net import NetConfig
from longnet_cli.runtime.device import resolve_dtype
from longnet_cli.runtime.mapped import aligned
from longnet_cli.runtime.ranks import Ranks

if TYPE_CHECKING:
    import torch

    from longnet_cli.training.recipe import Recipe


class FarBytes(NamedTuple):
    """Bytes that chunks of one sequence keep for each other. `stored` can be spilled to a disk, `passing` cannot.

    `stored`: keys and values that later chunks see, until the backward pass is past them, and the sums of their
    gradients. `passing`: temporaries of one chunk and layer for its far rows and, on a GPU, copies of these rows; what
    chooses blocks, and the choices. `gradients`: of `stored`, the sums for blocks that later chunks may choose.
    """

    stored: int
    passing: int
    gradients: int = 0


def far_bytes(config: NetConfig, seq_len: int, chunk: int, itemsize: int) -> FarBytes:
    """Return the bytes for one sequence of `seq_len` tokens, with `itemsize` bytes per number of a key."""
    if seq_len <= chunk:
        return FarBytes(0, 0)
    pattern = config.pattern
    backs = dict(enumerate(pattern.look_backs))
    stored = passing = 0
    for level in (SINKS, *backs) if pattern.sinks else backs:
        held = len(lanes(pattern, level, config.num_heads, config.kv_heads).offsets)
        numbers = 2 * segment_rows(pattern, level, seq_len) * held * config.head_dim
        seen = at_once = 1
        if level != SINKS:
            w = pattern.segment_lengths[level]
            seen = seen_segments(w, backs[level], chunk, seq_len)
            at_once = min(seen, backs[level] + bool(chunk % w))
        sums = aligned(max(4, itemsize) * numbers)
        stored += config.num_layers * (aligned(itemsize * numbers) * seen + sums * at_once)
        passing += (itemsize + 4) * numbers * at_once
    gradients = 0
    if size := pattern.chosen_block if pattern.chosen else 0:
        whole, earlier = (n // size * size for n in (seq_len, seq_len - 1 - (seq_len - 1) % chunk + size - 1))
        kept, means = past_bytes(pattern, config.kv_heads, config.head_dim, whole, itemsize)
        sums = past_bytes(pattern, config.kv_heads, config.head_dim, earlier, max(4, itemsize))[0]
        gradients = config.num_layers * aligned(sums)
        stored += config.num_layers * aligned(kept) + gradients
        passing += config.num_layers * (means + 4 * pattern.chosen * -(-seq_len // pattern.chosen_every))
    return FarBytes(stored, passing, gradients)


def seen_segments(w: int, back: int, chunk: int, seq_len: int) -> int:
    """Return how many segments of w tokens later chunks see, in a sequence of `seq_len` tokens in chunks of `chunk`.

    A chunk sees the segment inside which it starts, if any, and the `back` segments before its own.
    """
    ends = -(-seq_len // chunk) - 1
    if chunk >= (1 + back) * w:  # no segment is seen from two ends; an end on a segment's edge sees one fewer
        return ends * (1 + back) - ends // (w // math.gcd(w, chunk))
    # all segments, from the first one that the first end sees up to the last end
    return -(-ends * chunk // w) - max(0, chunk // w - back) if ends else 0


def stored_bytes(recipe: Recipe, device: torch.device, ranks: Ranks) -> int:
    """Return the bytes of far rows and their gradients that one rank stores, in memory or in `train.spill`'s file."""
    itemsize = 4 if resolve_dtype(recipe.train.dtype, device) == "fp32" else 2
    chunk = recipe.train.chunk * ranks.sp
    return max(far_bytes(recipe.model, stage.seq_len, chunk, itemsize).stored for stage in recipe.train.stages)
