"""The memory that a job needs: bytes by kind. What a forward pass holds is measured, all else is counted.

A job's peak is the sum of its kinds, as if everything were held at one time. The chunk that fits, `--dry-run`,
refusals, `bench` and `examples/cluster.py` count with these functions; tests compare them with real runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from longnet_cli.attention import Pattern, groups
from longnet_cli.attention.branches import branches
from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.groups import chosen_flops, past_bytes, transient_bytes
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.spans import SINKS, Layout, segment_rows
from longnet_cli.jobs.estimating.measuring import reading_bytes, training_bytes
from longnet_cli.nets.config import NetConfig, TransformersConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import LOGITS_LIMIT, Net
from longnet_cli.running.device import DTYPES, resolve_dtype
from longnet_cli.running.layerwise import fits_beside, kept_bytes
from longnet_cli.running.mapped import aligned
from longnet_cli.running.ranks.ranks import Ranks

if TYPE_CHECKING:
    from longnet_cli.jobs.estimating.reading import ReadingPlan


def itemsize_of(dtype: str, device: torch.device) -> int:
    """Return the bytes per number of matrix products."""
    return DTYPES[resolve_dtype(dtype, device)].itemsize


class CacheBytes(NamedTuple):
    """Bytes that a causal sequence keeps between its chunks; only `blocks` can be in a file (`--spill`).

    rows: keys and values of the segments that later tokens see, or of all tokens. blocks, choosing: of blocks that may
    be chosen, and of the mean keys that choose them.
    """

    rows: int
    blocks: int = 0
    choosing: int = 0


def cache_bytes(config: NetConfig, tokens: int, itemsize: int) -> CacheBytes:
    """Return what a stream has allocated after `tokens`. Training keeps more (`far_bytes`)."""
    number = 2 * config.head_dim * itemsize
    if isinstance(config, TransformersConfig) and config.memory != "segments":
        return CacheBytes((config.num_layers + 1) * config.kv_heads * tokens * number)  # one layer is being copied
    rows = config.num_layers * number * cached_rows(Layout(config.pattern, config.num_heads, config.kv_heads), tokens)
    blocks = choosing = 0
    for kind, layers in config.pattern.kinds(config.num_layers).items():
        of_layer = past_bytes(config.pattern, config.kv_heads, config.head_dim, tokens, itemsize, kind)
        blocks, choosing = (total + layers * n for total, n in zip((blocks, choosing), of_layer, strict=True))
    return CacheBytes(rows, blocks, choosing)


def transient_memory(pattern: Pattern, heads: int, head_dim: int, tokens: int, itemsize: int, device: str) -> int:
    """Return the bytes that one layer takes for a time for the chosen blocks of a document."""
    flops = chosen_flops(pattern, heads, head_dim, tokens)
    if not flops.attention:
        return 0
    most = groups.CPU if device == "cpu" else groups.GPU
    gathered = itemsize * flops.attention // (4 * pattern.chosen_every)  # once for each group
    sizes = most._replace(gathered=min(most.gathered, gathered), scores=min(most.scores, flops.votes // 2))
    return transient_bytes(sizes)


def forward_memory(
    net: Net, tokens: int, dtype: str, predicted: int = 0, transient: int = 0, *, once: bool = False
) -> dict[str, int]:
    """Return the bytes of weights, and of a forward pass without gradients of which some tokens have logits.

    Autocast copies the matrices. Logits take the place of the activations, which are gone by then. These include what
    is `transient` in a layer.
    """
    config = net.config
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    itemsize = itemsize_of(dtype, next(net.parameters()).device)
    cast_to = itemsize if itemsize < next(net.parameters()).itemsize else 0
    activations = tokens * reading_bytes(net, dtype) + transient
    return {
        "weights": weights + cast_to * config.layer_weights,
        "activations": activations,
        "logits": max(0, logits_bytes(config, predicted, 2 if once else 3) - activations),
    }


def attention_memory(
    shape: Sequence[int], pattern: Pattern | None, causal: bool, dtype: torch.dtype, device: torch.device, back: bool
) -> int:
    """Return the bytes of attention alone, forward or `back`; of q (B, N, H, D) or, if it is dense, (B, H, N, D).

    They are q, k, v, out and lse, in the backward pass the four gradients, float32 copies of narrower ones, and what
    the largest kernel call of a pattern needs beside its arguments (views).
    """
    wide = 0 if dtype == torch.float32 else 4
    number = 4 * dtype.itemsize + wide + (4 * dtype.itemsize + 3 * wide) * back
    size = math.prod(shape) * number + 4 * math.prod(shape[:-1])
    if pattern is None:
        return size
    (batch, tokens, heads, head_dim), largest = shape, 0
    kernel = select_kernel(device, dtype, head_dim)
    scores = kernel.name == "math"  # two matrices of scores; flash kernels need only (rows, head_dim) tensors
    for queries, keys, *_ in branches(Layout(pattern, heads, heads), 0, tokens, causal, "exact", ()):
        calls = min(kernel.max_batch(queries.heads, queries.rows, head_dim), batch * queries.segments)
        width = max(keys.rows, head_dim) if scores else head_dim
        largest = max(largest, calls * queries.heads * queries.rows * width)
    return size + 4 * largest * (8 if back and not scores else 2)


def gradient_memory(config: NetConfig, batch: int, seq_len: int, chunk: int, itemsize: int, device: str) -> int:
    """Return the bytes of weights and gradients, of a chunk's activations and logits, and of what chunks keep."""
    numbers = config.num_parameters() * (8 if itemsize == 4 else 8 + itemsize)  # autocast copies the weights
    saved = batch * chunk * activation_bytes(config, itemsize)
    saved += transient_memory(config.pattern, config.num_heads, config.head_dim, seq_len, itemsize, device)
    kept = batch * sum(far_bytes(config, seq_len, chunk, itemsize))
    return numbers + saved + kept + logits_bytes(config, batch * chunk)


def reading_memory(
    net: Net, plan: ReadingPlan, chunk: int, dtype: str, ranks: Ranks, *, scores: bool, spill: bool
) -> dict[str, int]:
    """Return the bytes of one rank that reads windows as planned, in chunks of so many tokens.

    hidden: float32 hidden states that wait, in pieces and joined: of windows that are read together, or of two chunks
    of a longer one. In a bidirectional net also all that `spilled_bytes` counts, unless they are on a disk or, because
    a GPU has no room, in the host's memory. cache: of the longest window in a causal net, without what is on a disk.
    """
    config, device = net.config, next(net.parameters()).device
    in_chunks, spillable = plan.in_chunks(chunk), spilled_bytes(net, plan, chunk, dtype, ranks)
    tokens = min(plan.largest, chunk) if config.streams else plan.largest
    together = min(plan.together, 2 * chunk)
    itemsize = itemsize_of(dtype, device)
    sizes = config.num_heads, config.head_dim, plan.longest, itemsize
    transient = transient_memory(config.pattern, *sizes, device.type)
    kinds = forward_memory(net, tokens, dtype, max(tokens, together) * scores, transient, once=plan.read <= tokens)
    kinds["hidden"] = 2 * 4 * config.dim * (2 * chunk if in_chunks else together)
    if in_chunks and config.causal:
        cache = cache_bytes(config, plan.longest, itemsize)
        kinds["cache"] = sum(cache) - (spillable if spill else 0)
    elif not spill and (device.type == "cpu" or fits_beside(config.forward_bytes(chunk), spillable, device)):
        kinds["hidden"] += spillable
    return kinds


def spilled_bytes(net: Net, plan: ReadingPlan, chunk: int, dtype: str, ranks: Ranks) -> int:
    """Return the bytes of one rank's file of `--spill`; 0 if no window is read in chunks.

    A bidirectional net keeps hidden states there between its layers, a causal one the blocks that are chosen from.
    """
    if not plan.in_chunks(chunk):
        return 0
    if net.config.causal:
        itemsize = itemsize_of(dtype, next(net.parameters()).device)
        return cache_bytes(net.config, plan.longest, itemsize).blocks
    return kept_bytes(cast(LongNet, net), plan.longest, chunk, ranks) if net.layer_by_layer else 0


def logits_bytes(config: NetConfig, tokens: int, numbers: int = 3) -> int:
    """Return the bytes of so many float32 numbers for each logit.

    In training, three: the log-softmax, its gradient and the logits' gradient. Without gradients, two: the logits and
    the log-softmax; and one more for gaps in the heap if there is a pass after the first.
    """
    return 4 * numbers * min(tokens * config.vocab_size, LOGITS_LIMIT)


def activation_bytes(config: NetConfig, itemsize: int, again: bool = False, lora: dict | None = None) -> int:
    """Return the bytes per token that a forward and backward pass of all layers holds, as `training_bytes` measures."""
    layer, others = training_bytes(config, "fp32" if itemsize == 4 else "bf16", json.dumps(lora), again)
    return config.num_layers * layer + others


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
    pattern, size, cut = config.pattern, config.pattern.chosen_block, seq_len > chunk
    layout = Layout(pattern, config.num_heads, config.kv_heads)
    stored = passing = gradients = 0
    backs = dict(enumerate(pattern.look_backs)) if cut else {}
    for level in (SINKS, *backs) if pattern.sinks and cut else backs:
        held = len(layout.lanes(level).offsets)
        numbers = 2 * segment_rows(pattern, level, seq_len) * held * config.head_dim
        seen = at_once = 1
        if level != SINKS:
            w = pattern.segment_lengths[level]
            seen = seen_segments(w, backs[level], chunk, seq_len)
            at_once = min(seen, backs[level] + bool(chunk % w))
        sums = aligned(max(4, itemsize) * numbers)
        stored += config.num_layers * (aligned(itemsize * numbers) * seen + sums * at_once)
        passing += (itemsize + 4) * numbers * at_once
    if pattern.chosen and cut:
        last = seq_len - 1 - (seq_len - 1) % chunk
        whole, earlier = (n // size * size for n in (seq_len, last + size - 1))
        kinds, of_layer = pattern.kinds(config.num_layers), (pattern, config.kv_heads, config.head_dim)
        for kind, layers in kinds.items():
            kept, means = past_bytes(*of_layer, whole, itemsize, kind)
            sums, _ = past_bytes(*of_layer, earlier, max(4, itemsize), kind)
            gradients += layers * aligned(sums)
            stored += layers * (aligned(kept) + aligned(sums))
            passing += layers * means
        passing += kinds["chooses"] * 4 * pattern.chosen * -(-seq_len // pattern.chosen_every)
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
