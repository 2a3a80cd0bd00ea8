"""FLOPs of a net's forward pass, from its configuration. A multiply and an add count as two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from longnet_cli.attention import branches
from longnet_cli.attention.branches import BACKWARD_FLOPS
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


_of_a_layer = lru_cache(maxsize=1 << 16)(branches.attention_flops)  # cached: many documents have the same length


def executed_flops(config: NetConfig, documents: Sequence[int], predicted: float = 1.0) -> float:
    """Return the FLOPs of a forward and a backward pass over documents of these lengths.

    A multiply and an add count as two. The share `predicted` of the tokens has logits.
    """
    attention = sum(attention_flops(config, length) for length in documents)
    matrices = layer_flops(config) + predicted * vocabulary_flops(config)
    passes = 2 if config.frozen else 3  # forward, gradients of activations, gradients of weights
    return passes * matrices * sum(documents) + (1 + BACKWARD_FLOPS) * attention
