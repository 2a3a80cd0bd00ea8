"""All that a shard attends to outside itself: far keys of its levels, and the past whose blocks it chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .past import Past
from .pattern import Pattern
from .spans import FarSpan, Layout
from .views import of_level


@dataclass(eq=False)  # a frozen one takes longer to make, and every layer makes some per token
class FarKeys:
    """Keys and values from outside the shard: one level's rows at positions [start, stop) of one segment.

    k, v: (batch, rows, lanes, head_dim). Row j of a lane is its j-th row in [start, stop). Lanes are heads, except that
    query heads which read the same rows of one key head share a lane (`spans.Layout`). Two lanes differ by at most one
    row; a row that a lane lacks is never read. The caller may take k and v from a cache, another
    rank or a file; gradients flow into them.

    For level `SINKS`, positions are among the first `pattern.sinks`, and k is rotated for them like any other key.

    `turned` caches the turned sinks of the last call. Give it only with far keys that hold all sinks and never change.

    `ready` is called after the calls on near keys, before k and v are read. `back` is called in the backward pass with
    the gradients of k and v, in fp32 or fp64, before the gradients of near keys are computed; gradients flow into k and
    v as well. Both let a message travel while near keys are attended to.
    """

    level: int
    start: int
    stop: int
    k: Tensor
    v: Tensor
    ready: Callable[[], object] | None = None
    back: Callable[[Tensor, Tensor], object] | None = None
    turned: dict[tuple[int, ...], tuple[Tensor, ...]] | None = None

    @property
    def span(self) -> FarSpan:
        return FarSpan(self.level, self.start, self.stop)


class Outside(NamedTuple):
    """All that a shard sees outside itself: far keys, and for chosen blocks the past before it, which has no gradient.

    `KVCache.far` gives it. A `FarProvider` of `longnet_cli.nets` returns it for each layer.
    """

    keys: Sequence[FarKeys] = ()
    past: Past | None = None


def far_keys(
    k: Tensor, v: Tensor, pattern: Pattern, span: FarSpan, *, start: int = 0, num_heads: int | None = None
) -> FarKeys:
    """Take the rows of `span` from k and v (batch, tokens, key heads, head_dim) of a shard that starts at `start`.

    k and v may also be (batch, tokens, levels, key heads, head_dim).
    `num_heads` is the number of query heads, by default that of key heads. Differentiable. Raises ValueError for a
    span that the shard does not hold in full.
    """
    if not start <= span.start < span.stop <= start + k.shape[1]:
        raise ValueError(f"the shard [{start}, {start + k.shape[1]}) does not hold [{span.start}, {span.stop})")
    layout = Layout(pattern, num_heads or k.shape[-2], k.shape[-2])
    k, v = (of_level(x, span.level) for x in (k, v))
    positions = layout.positions(span)
    rows = max(len(p) for p in positions)
    # a lane with one row fewer repeats a token of the shard there, which is never read
    index = torch.tensor([[*p, *[start] * (rows - len(p))] for p in positions], dtype=torch.int64).T - start
    heads = torch.tensor(layout.lanes(span.level).kv_heads, device=k.device)
    index = index.to(k.device)
    return FarKeys(*span, k[:, index, heads], v[:, index, heads])  # (B, rows, lanes, D)
