"""Dilated attention, exact in outputs and gradients, on any device. The package imports no other part of longnet.

Patterns load without torch. Torch is imported with the first name that computes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .pattern import Level, Pattern
from .spans import SINKS, FarSpan

if TYPE_CHECKING:
    from .cache import FarKeys, KVCache, Outside, far_keys
    from .dilated import DilatedAttention, dilated_attention

__all__ = [
    "SINKS",
    "DilatedAttention",
    "FarKeys",
    "FarSpan",
    "KVCache",
    "Level",
    "Outside",
    "Pattern",
    "dilated_attention",
    "far_keys",
]

_MODULES = {
    "DilatedAttention": "dilated",
    "FarKeys": "cache",
    "KVCache": "cache",
    "Outside": "cache",
    "dilated_attention": "dilated",
    "far_keys": "cache",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value
