"""Bytes that a `Reader` takes for its forward passes and keeps between them, by arithmetic; nothing is allocated.

Compared with real runs in tests/test_estimating.py.
"""

from __future__ import annotations

from typing import cast

import torch

from longnet_cli.estimating.forwards import Forwards
from longnet_cli.model import LongNet
from longnet_cli.model.net import LOGITS_LIMIT, Net
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
    activations = round(config.forward_bytes(tokens) * (IN_CHUNKS if cut else WHOLE))
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
        kinds["cache"] = config.cache_bytes(forwards.longest, itemsize)
    elif cut and not spill:
        size = hidden_bytes(net, forwards, chunk, ranks)
        if device.type == "cpu" or fits_beside(config.forward_bytes(chunk), size, device):
            kinds["hidden"] += size
    return kinds


def hidden_bytes(net: Net, forwards: Forwards, chunk: int, ranks: Ranks) -> int:
    """Return the bytes that a bidirectional net keeps between its layers; 0 if no window is longer than a chunk."""
    if net.config.causal or forwards.longest <= chunk or not net.layer_by_layer:
        return 0
    return kept_bytes(cast(LongNet, net), forwards.longest, chunk, ranks)
