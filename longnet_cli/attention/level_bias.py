"""The learned biases of levels, one per head, and their gradients without an output per branch.

The bias b of a level is added to the lse of its branches when these merge. With p, the share of a level's keys in the
softmax of a query, and dV', what the level's branches add to dV,

    p = exp(lse_level + b - LSE)        db = sum over keys of v . dV' - sum over queries of p (dO . O)

so the backward needs the lse of each level from the forward, one number per query, head and level.

B batch, N tokens of the shard, H query heads, L levels after the first, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .branches import Branch
from .merging import accumulator
from .packing import Pack, PackedRows
from .plain_call import wide


class LevelBias:
    """The biases of one call, and their gradient."""

    def __init__(self, bias: Tensor, q: Tensor, *, keep: bool = False, lse: Tensor | None = None) -> None:
        """Take biases (L, H) for queries like q (B, N, H, D).

        `keep`: a forward keeps the lse of each level, with its bias, in `lse` (B, N, H, L), which the backward needs.
        """
        dtype = accumulator(q.dtype)
        self._bias = bias.detach().T.to(dtype)
        self._of_values = torch.zeros_like(self._bias)  # sum over keys of v . dV'
        self._shape = (*q.shape[:3], len(bias))
        self.lse = torch.full(self._shape, float("-inf"), dtype=dtype, device=q.device) if keep else lse

    @property
    def places(self) -> tuple[Tensor, ...]:
        """The biases (B, N, H, L) and, in a forward that keeps it, the lse, to be viewed like queries."""
        biases = self._bias.expand(self._shape)
        return (biases,) if self.lse is None else (biases, self.lse)

    def forward(self, branch: Branch, views: Sequence[Tensor], lse: Tensor) -> Tensor:
        """Return the lse of a branch with its bias, and keep it; `views` are those of `places`."""
        if not branch.learned:
            return lse
        bias, *kept = (x[..., branch.learned - 1] for x in views)
        lse = lse + bias
        for total in kept:
            total.copy_(torch.logaddexp(total, lse))
        return lse

    def forward_rows(self, pack: Pack, places: Tensor, lse: Tensor) -> Tensor:
        """Return the lse (rows,) of a pack with its biases, and keep it; `places` are the rows among all B N H."""
        if not pack.learned:
            return lse
        lse = lse + self.of_rows(pack, places)
        if self.lse is not None:
            total = self.lse.view(-1, self._shape[-1])[:, pack.learned - 1]
            total[places] = torch.logaddexp(total[places], lse)
        return lse

    def of_rows(self, pack: Pack, places: Tensor) -> Tensor:
        return self._bias[places % len(self._bias), pack.learned - 1]

    def backward(self, branch: Branch, v: Tensor, dv: Tensor) -> None:
        """Take what a branch adds to dV, dv (batch, heads, keys, D) like its v."""
        _, _, number, first, step, *_ = branch.queries
        heads = slice(first, first + (number - 1) * step + 1, max(step, 1))
        self._of_values[heads, branch.learned - 1] += (wide(dv) * v).sum((0, 2, 3))

    def backward_rows(self, pack: Pack, queries: PackedRows, keys: PackedRows, v: Tensor, dv: Tensor) -> None:
        """Take what a pack adds to dV, dv (rows, D) like its v; all queries of a sequence have the same head."""
        heads = queries.places[queries.edges[:-1].long()] % len(self._bias)
        of_rows = torch.repeat_interleave(heads, keys.edges.diff().long(), output_size=len(v))
        self._of_values[:, pack.learned - 1].index_add_(0, of_rows, (wide(dv) * v).sum(-1).to(self._bias.dtype))

    def gradient(self, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Return the gradient (L, H) after all branches, from dO, O (B, N, H, D) and LSE (B, N, H)."""
        assert self.lse is not None
        share = (self.lse - lse[..., None]).exp().masked_fill(self.lse.isinf(), 0)  # 0 where a level shows no key
        return (self._of_values - (share * (wide(dout) * out).sum(-1, keepdim=True)).sum((0, 1))).T
