"""Dilated attention, exact in outputs and gradients, on any device. Knows nothing of the rest of longnet."""

from .cache import KVCache
from .dilated import FarKeys, dilated_attention, far_keys
from .pattern import Level, Pattern, Span

__all__ = ["FarKeys", "KVCache", "Level", "Pattern", "Span", "dilated_attention", "far_keys"]
