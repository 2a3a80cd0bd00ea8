"""The merging of branches by their log-sum-exp, in fp32 or fp64, and the sums of their gradients.

    LSE = log sum_i exp(lse_i)        out = sum_i exp(lse_i - LSE) out_i

The backward calls each branch's kernel with the merged out and LSE, and adds up dq, dk, dv.

B batch, N tokens of the shard, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log

import torch
from torch import Tensor

from .branches import Branch
from .pattern import ceil_div
from .plain_call import merge_into
from .spans import Rows
from .views import accumulator


class Merge:
    """The running out and LSE of all branches, in fp32 or fp64."""

    def __init__(self, q: Tensor, covered: bool) -> None:
        """Allocate out and LSE. `covered`: the branches that cover write every row, so out needs no zeros."""
        dtype = accumulator(q.dtype)
        self._dtype = q.dtype
        allocate = torch.empty if covered else torch.zeros
        self._out = allocate(q.shape, dtype=dtype, device=q.device)
        self._lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
        if not covered:
            self._lse.fill_(float("-inf"))

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        return self._out, self._lse[..., None]

    def add(
        self,
        branch: Branch,
        places: Sequence[Tensor],
        part: Tensor,
        lse: Tensor,
    ) -> None:
        """Merge one call in place into `places`, its views of out (.., rows, D) and lse (.., rows, 1)."""
        out, total = places
        lse = lse[..., None]
        if branch.zero_keys:
            # n keys with score 0 and value 0 are a branch with out 0 and lse log n, which is merged first.
            with_zeros = torch.logaddexp(lse, torch.full_like(lse, log(branch.zero_keys)))
            part = part * (lse - with_zeros).exp()
            lse = with_zeros
        if branch.covers:
            out.copy_(part)
            total.copy_(lse)
            return
        merge_into(out, total, part, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        return self._out.to(self._dtype), self._lse


def gradient_sum(x: Tensor) -> Tensor:
    """Return zeros of the shape of x, in fp32 or fp64, to which the parts of its gradient are added."""
    return torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device)


def add_gradient(total: Tensor, part: Tensor, rows: Rows) -> None:
    """Add the part of a call to `total`, its view of the sum."""
    for into, share in apart(total, part, rows):
        into.add_(share)


def apart(total: Tensor, part: Tensor, keys: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of `total` (batch, heads, rows, D) and the parts to add to them; no view shows a number twice."""
    if keys.heads > 1 and keys.head_step == keys.skew == 0:
        # All heads of the call read the same rows.
        total = total[:, :1]
        part = part.sum(1, keepdim=True)
    # If segments look back over each other, the rows of one segment come at a time.
    rows = keys.rows
    if keys.segments > 1:
        rows = min(rows, ceil_div(keys.segment_step, keys.row_step))
    yield from zip(total.split(rows, 2), part.split(rows, 2), strict=True)
