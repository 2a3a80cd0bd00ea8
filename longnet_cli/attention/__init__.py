"""Dilated attention, exact in outputs and gradients, on any device. Knows nothing of the rest of longnet."""

from . import compiled as compiled  # registers the operator that `dilated_attention` is inside a compiled graph
from .cache import KVCache
from .dilated import FarKeys, dilated_attention, far_keys
from .module import DilatedAttention
from .pattern import SINKS, Level, Pattern, Span

__all__ = [
    "SINKS",
    "DilatedAttention",
    "FarKeys",
    "KVCache",
    "Level",
    "Pattern",
    "Span",
    "dilated_attention",
    "far_keys",
]
