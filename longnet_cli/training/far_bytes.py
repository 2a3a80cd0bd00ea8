"""Bytes that chunks of a training sequence keep for each other: rows that later ones see, and their gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

from longnet_cli.attention.pattern import SINKS, lanes, segment_rows
from longnet_cli.model.net import NetConfig
from longnet_cli.runtime.mapped import aligned


class FarBytes(NamedTuple):
    """Bytes that chunks of one sequence keep for each other: `stored` is flat where it is spilled, `passing` is not.

    `stored`: keys and values that later chunks see, till the backward has passed them, and sums of their gradients, on
    their way back. `passing`: what one chunk and layer makes of its far rows beside those, and on a GPU copies of them.
    """

    stored: int
    passing: int


def far_bytes(config: NetConfig, seq_len: int, chunk: int, itemsize: int) -> FarBytes:
    """Those of one sequence of `seq_len` tokens, whose keys have `itemsize` bytes a number."""
    if seq_len <= chunk:
        return FarBytes(0, 0)
    pattern, kv_heads = config.pattern, config.kv_dim // config.head_dim
    backs = dict(enumerate(pattern.look_backs))
    stored = passing = 0
    for level in (SINKS, *backs) if pattern.sinks else backs:
        held = len(lanes(pattern, level, config.num_heads, kv_heads).offsets)
        numbers = 2 * segment_rows(pattern, level, seq_len) * held * config.head_dim
        seen = at_once = 1
        if level != SINKS:
            w = pattern.segment_lengths[level]
            seen = seen_segments(w, backs[level], chunk, seq_len)
            at_once = min(seen, backs[level] + bool(chunk % w))
        sums = aligned(max(4, itemsize) * numbers)
        stored += config.num_layers * (aligned(itemsize * numbers) * seen + sums * at_once)
        passing += (itemsize + 4) * numbers * at_once
    return FarBytes(stored, passing)


def seen_segments(w: int, back: int, chunk: int, seq_len: int) -> int:
    """Segments of w tokens of which a later chunk sees a part, in a sequence of `seq_len` that is cut by `chunk`.

    A chunk sees those inside which it starts, and `back` before its own.
    """
    ends = -(-seq_len // chunk) - 1
    if chunk >= (1 + back) * w:  # no segment for two ends; every so many-th end lies where a segment does
        return ends * (1 + back) - ends // (w // math.gcd(w, chunk))
    # all of them, from the first that the first end sees up to the last end
    return -(-ends * chunk // w) - max(0, chunk // w - back) if ends else 0
