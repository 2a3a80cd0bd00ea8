"""Bytes that a `Reader` takes for its forward passes and keeps between them, by arithmetic; nothing is allocated.

Compared with real runs in tests/test_estimating.py.
"""

from __future__ import annotations

import torch

from longnet_cli.attention.cache import FIRST_ROWS
from longnet_cli.attention.groups import past_bytes
from longnet_cli.attention.spans import lanes
from longnet_cli.estimating.forwards import Forwards
from longnet_cli.model import LongNet
from longnet_cli.model.net import LOGITS_LIMIT, Net, NetConfig
from longnet_cli.runtime.chunks import forward_bytes
from longnet_cli.runtime.device import DTYPES, resolve_dtype
from longnet_cli.runtime.layerwise import fits_beside, kept_bytes
from longnet_cli.runtime.ranks import Ranks

# Growth of the process in units of `forward_bytes`. Measured: 1.06 to 1.33; with far keys, 1.2 to 1.75.
WHOLE, IN_CHUNKS = 1.35, 1.75
REUSED = 2 / 3  # share of freed memory that pieces of another size reuse; measured: 0.64 to 0.95


def computing_bytes(forwards: Forwards, chunk: int, scores: bool, dtype: str, device: torch.device) -> dict[str, int]:
    """Return the bytes of a forward pass of at most `chunk` tokens, and the additional bytes of its logits.

    The logits come after the activations, but they reuse only the share `REUSED` of the memory that these free.
    """
    config = forwards.config
    cut = config.streams and forwards.longest > chunk
    tokens = min(forwards.largest, chunk) if config.streams else forwards.largest
    activations = round(forward_bytes(config, tokens) * (IN_CHUNKS if cut else WHOLE))
    if not scores:
        return {"activations": activations}
    most = max(tokens, min(forwards.together, 2 * chunk))
    wide = 8 if resolve_dtype(dtype, device) == "fp32" else 10  # logits, logarithms in float32; 16-bit logits
    wide += 4 * cut  # cached keys and values lie between: the next logits cannot reuse the memory of the last ones
    logits = wide * min(most * config.vocab_size, LOGITS_LIMIT)
    return {"activations": activations, "logits": logits - round(REUSED * min(activations, logits))}


def waiting_bytes(
    net: Net, forwards: Forwards, chunk: int, dtype: str, spill: str | None, ranks: Ranks
) -> dict[str, int]:
    """Return the bytes that are kept between forward passes: keys and values, and hidden states that wait."""
    config, device = net.config, next(net.parameters()).device
    waiting = min(forwards.together, 2 * chunk)
    cut = config.streams and forwards.longest > chunk
    kinds = {"hidden": 2 * 4 * config.dim * max(waiting, 2 * chunk if cut else 0)}  # in pieces, and joined
    if cut and config.causal:
        itemsize = DTYPES[resolve_dtype(dtype, device)].itemsize
        kinds["cache"] = cache_bytes(config, forwards.longest, itemsize)
    elif cut and not spill:
        size = hidden_bytes(net, forwards, chunk, ranks)
        if device.type == "cpu" or fits_beside(forward_bytes(config, chunk), size, device):
            kinds["hidden"] += size
    return kinds


def hidden_bytes(net: Net, forwards: Forwards, chunk: int, ranks: Ranks) -> int:
    """Return the bytes that a bidirectional net keeps between its layers; 0 if no window is longer than a chunk."""
    if net.config.causal or forwards.longest <= chunk or not isinstance(net, LongNet):
        return 0
    return kept_bytes(net, forwards.longest, chunk, ranks)


def cache_bytes(config: NetConfig, tokens: int, itemsize: int) -> int:
    """Return the bytes of keys and values that a causal stream caches of `tokens`, with `itemsize` bytes per number."""
    kv_heads = config.kv_dim // config.head_dim
    if getattr(config, "memory", "segments") != "segments":  # a transformers cache keeps all, and grows by copying
        return 2 * (config.num_layers + 1) * config.kv_dim * tokens * itemsize
    rows = config.pattern.sinks * kv_heads
    for level, ((w, r), back) in enumerate(zip(config.pattern.levels, config.pattern.look_backs, strict=True)):
        whole, needed = -(-w // r), -(-min(w, tokens) // r)
        have = min(whole, FIRST_ROWS)
        while have < needed:
            have = min(whole, 2 * have)
        held = len(lanes(config.pattern, level, config.num_heads, kv_heads).offsets)
        rows += (1 + back) * have * held
    past = past_bytes(config.pattern, kv_heads, config.head_dim, tokens, itemsize)
    return config.num_layers * (2 * config.head_dim * rows * itemsize + past)
