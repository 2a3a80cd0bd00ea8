"""Dilated attention, exact in outputs and gradients, on any device. The package imports no other part of longnet.

Patterns load without torch. Torch is imported with the first name that computes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .pattern import Level, Pattern
from .spans import SINKS, FarSpan

if TYPE_CHECKING:
    from .cache import KVCache
    from .choosing import LayerChoices
    from .dilated import dilated_attention
    from .module import DilatedAttention
    from .outside import FarKeys, Outside, far_keys
    from .past import Past

__all__ = [
    "SINKS",
    "DilatedAttention",
    "FarKeys",
    "FarSpan",
    "KVCache",
    "LayerChoices",
    "Level",
    "Outside",
    "Past",
    "Pattern",
    "dilated_attention",
    "far_keys",
]

_MODULES = {
    "DilatedAttention": "module",
    "FarKeys": "outside",
    "KVCache": "cache",
    "LayerChoices": "choosing",
    "Outside": "outside",
    "Past": "past",
    "dilated_attention": "dilated",
    "far_keys": "outside",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value
