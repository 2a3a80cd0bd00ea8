"""FLOPs of a net's forward, by its facts; a multiply and an add are two."""

from __future__ import annotations

from functools import lru_cache

from longnet_cli.attention import pattern
from longnet_cli.model.net import NetConfig


def layer_flops(config: NetConfig) -> int:
    """Those of the matrices of all layers, a token."""
    return 2 * config.layer_weights


def vocabulary_flops(config: NetConfig) -> int:
    """Those of the logits of a token."""
    return 2 * config.dim * config.vocab_size


def attention_flops(config: NetConfig, tokens: int) -> float:
    """Those of the attention of all layers, over a document of so many `tokens`."""
    c = config
    return c.num_layers * _of_a_layer(c.pattern, c.num_heads, c.head_dim, tokens, c.causal)


_of_a_layer = lru_cache(maxsize=1 << 16)(pattern.attention_flops)  # documents are many, of lengths that come again
