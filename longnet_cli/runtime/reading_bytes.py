"""Bytes that a `Reader` takes for its forwards and keeps between them, from their sizes; nothing is allocated.

Measured against real runs in tests/test_estimating.py.
"""

from __future__ import annotations

import torch

from longnet_cli.attention.cache import FIRST_ROWS
from longnet_cli.attention.pattern import lanes
from longnet_cli.model import LongNet
from longnet_cli.model.net import LOGITS_LIMIT, Net, NetConfig
from longnet_cli.runtime.chunks import forward_bytes
from longnet_cli.runtime.device import DTYPES, resolve_dtype
from longnet_cli.runtime.forwards import Forwards
from longnet_cli.runtime.layerwise import fits_beside, kept_bytes
from longnet_cli.runtime.ranks import Ranks

# Of `forward_bytes`, what the process grows by. Measured: 1.06 to 1.33; with far keys, 1.2 to 1.75.
WHOLE, IN_CHUNKS = 1.35, 1.75
REUSED = 2 / 3  # of memory in pieces of one size by pieces of another; measured: 0.64 to 0.95


def computing_bytes(forwards: Forwards, chunk: int, scores: bool, dtype: str, device: torch.device) -> dict[str, int]:
    """Bytes of a forward of `chunk` tokens at most, and what its logits take beyond that.

    One comes after the other, but of the memory that one frees the other takes no more than `REUSED`.
    """
    config = forwards.config
    cut = config.streams and forwards.longest > chunk
    tokens = min(forwards.largest, chunk) if config.streams else forwards.largest
    activations = round(forward_bytes(config, tokens) * (IN_CHUNKS if cut else WHOLE))
    if not scores:
        return {"activations": activations}
    most = max(tokens, min(forwards.together, 2 * chunk))
    wide = 8 if resolve_dtype(dtype, device) == "fp32" else 10  # float32 logits, logarithms; and those that are halves
    wide += 4 * cut  # keys and values that are kept lie between: the next logits find no room in that of the last
    logits = wide * min(most * config.vocab_size, LOGITS_LIMIT)
    return {"activations": activations, "logits": logits - round(REUSED * min(activations, logits))}


def waiting_bytes(
    net: Net, forwards: Forwards, chunk: int, dtype: str, spill: str | None, ranks: Ranks
) -> dict[str, int]:
    """Bytes of what is kept between forwards: keys and values, and hidden states that wait."""
    config, device = net.config, next(net.parameters()).device
    waiting = min(forwards.together, 2 * chunk)
    cut = config.streams and forwards.longest > chunk
    kinds = {"hidden": 2 * 4 * config.dim * max(waiting, 2 * chunk if cut else 0)}  # as they come, and joined
    if cut and config.causal:
        itemsize = DTYPES[resolve_dtype(dtype, device)].itemsize
        kinds["cache"] = cache_bytes(config, forwards.longest, itemsize)
    elif cut and not spill:
        size = hidden_bytes(net, forwards, chunk, ranks)
        if device.type == "cpu" or fits_beside(forward_bytes(config, chunk), size, device):
            kinds["hidden"] += size
    return kinds


def hidden_bytes(net: Net, forwards: Forwards, chunk: int, ranks: Ranks) -> int:
    """Bytes that a bidirectional net keeps between its layers; of a window that is no longer than a chunk, none."""
    if net.config.causal or forwards.longest <= chunk or not isinstance(net, LongNet):
        return 0
    return kept_bytes(net, forwards.longest, chunk, ranks)


def cache_bytes(config: NetConfig, tokens: int, itemsize: int) -> int:
    """Return what a causal stream remembers of `tokens`, keys and values of `itemsize` bytes a number."""
    kv_heads = config.kv_dim // config.head_dim
    if getattr(config, "memory", "segments") != "segments":  # a cache of transformers keeps all, and joins one layer's
        return 2 * (config.num_layers + 1) * config.kv_dim * tokens * itemsize
    rows = config.pattern.sinks * kv_heads
    for level, ((w, r), back) in enumerate(zip(config.pattern.levels, config.pattern.look_backs, strict=True)):
        whole, needed = -(-w // r), -(-min(w, tokens) // r)
        have = min(whole, FIRST_ROWS)
        while have < needed:
            have = min(whole, 2 * have)
        held = len(lanes(config.pattern, level, config.num_heads, kv_heads).offsets)
        rows += (1 + back) * have * held
    return 2 * config.num_layers * config.head_dim * rows * itemsize
