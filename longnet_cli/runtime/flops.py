"""FLOPs of a net's forward pass, from its configuration. A multiply and an add count as two."""

from __future__ import annotations

from functools import lru_cache

from longnet_cli.attention import pattern
from longnet_cli.model.net import NetConfig


def layer_flops(config: NetConfig) -> int:
    """Return the FLOPs of the matrices of all layers, per token."""
    return 2 * config.layer_weights


def vocabulary_flops(config: NetConfig) -> int:
    """Return the FLOPs of the logits, per token."""
    return 2 * config.dim * config.vocab_size


def attention_flops(config: NetConfig, tokens: int) -> float:
    """Return the FLOPs of the attention of all layers, over one document of `tokens` tokens."""
    c = config
    return c.num_layers * _of_a_layer(c.pattern, c.num_heads, c.head_dim, tokens, c.causal)


_of_a_layer = lru_cache(maxsize=1 << 16)(pattern.attention_flops)  # cached: many documents have the same length
