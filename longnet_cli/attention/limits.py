"""The sizes of what exists at a time while blocks are chosen and gathered. They depend on the device alone.

A CPU is fast with what its caches hold. A GPU is slow to start a call, and has memory for large ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # so that sizes of a pattern are known without torch
    from torch import Tensor


class Limits(NamedTuple):
    """The sizes for one kind of device.

    gathered: bytes of gathered keys. scores: scores of votes, and numbers of means that are compared with one slot's
    voters. unrotated: keys that are un-rotated. whole: neighbouring parts of a document are taken together, and the
    blocks of a past lie in one piece.
    """

    gathered: int
    scores: int
    unrotated: int
    whole: bool


CPU = Limits(gathered=4 << 20, scores=1 << 20, unrotated=1 << 12, whole=False)
GPU = Limits(gathered=1 << 26, scores=1 << 26, unrotated=1 << 20, whole=True)


def limits_of(x: Tensor) -> Limits:
    """Return the sizes for the device of x."""
    return CPU if x.is_cpu else GPU
