"""Show far keys at the positions of Self-Extend (arXiv 2401.01325), for dilation.py.

Self-Extend sees every key of the past. The distance of a key that is near is exact, and that of a far key is divided by
a group size. In a LongNet, these are levels of dilation rate 1 whose positions are those of other rates: with the
group sizes (1, 4, 16), the levels `512/1,2Ki/1,8Ki/1` see all keys at the distances at which `512/1,2Ki/4,8Ki/16` sees
some of them. So the two differ in the keys alone. Self-Extend itself has one group size, and rounds positions down to
whole groups.

No file of a net holds the group sizes: whoever opens a net that was trained with them has to give them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from longnet_cli.nets import positions
from longnet_cli.nets.config import LongNetConfig


@contextmanager
def grouped_positions(sizes: Sequence[int]) -> Iterator[None]:
    """Count one position for so many tokens of each level in this context; with no sizes, change nothing.

    It holds for every LongNet with positions by level that this process computes meanwhile.
    """
    by_rates = positions._levels

    def by_groups(config: LongNetConfig) -> list[tuple[float, float]]:
        return by_rates(config.model_copy(update={"dilation_rates": [*sizes]}))

    if sizes:
        positions._levels = by_groups
    try:
        yield
    finally:
        positions._levels = by_rates
