"""One plain attention call, (q, k, v) -> (out, log-sum-exp), and its backward: the interface, and plain math.

Shapes: q, out (batch, heads, rows, head_dim); k, v (batch, heads, keys, head_dim); lse (batch, heads, rows), natural
log, fp32 (fp64 for fp64 inputs). All are strided views whose last stride is 1. A causal call has rows == keys.

Each backward takes the *merged* out and lse of all branches, which makes the sum of the branches' gradients exact:
the probabilities are exp(score - lse) and the correction is rowsum(dout * out), whatever keys the softmax ran over.

Kernels have traps. Empty q or k kills the process on the CPU. A last stride other than 1 silently gives garbage. A
fully masked row has no defined lse (no branch has one). Batch and element counts have limits (`max_batch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv


class Kernel:
    """The interface of every kernel. `max_batch` bounds the first dimension of a call; callers split larger ones.

    The tensors of a backward are dout, q, k, v, and the merged out and lse.
    """

    name = ""
    device: str | None = None  # the type of device that it runs on, if only one has it
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    # whether both take `log_counts` (heads, rows, keys), too: the log of how often a key counts, or -inf
    takes_counts = False

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Return why this kernel cannot serve such tensors, or None."""
        if self.device and device.type != self.device:
            return f"it runs on a {self.device.upper()} device"
        return None if dtype in self.dtypes else f"it has no {dtype}"

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward(self, tensors: Sequence[Tensor], causal: bool, scale: float) -> Gradients:
        raise NotImplementedError


class MathKernel(Kernel):
    """Plain torch on any device, in any dtype, computed in fp32 or wider. Other kernels are probed against it.

    Long rows take their keys in blocks, so that at most `_MAX_SCORES` scores are in memory at a time. Calls with
    `log_counts` are short.
    """

    name = "math"
    takes_counts = True
    _MAX_SCORES = 1 << 26

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        return max(1, self._MAX_SCORES // (heads * rows * rows))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
        log_counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        for rows, keys, scores in self._blocks(q, k, causal, scale, log_counts):
            part_lse = scores.logsumexp(-1)
            weights = scores.sub_(part_lse[..., None]).exp_()
            part = weights @ wide(v[:, :, keys])
            if keys.start == 0:
                out, lse = part, part_lse
                continue
            merge_into(out[:, :, rows], lse[:, :, rows, None], part, part_lse[..., None])
        return out, lse

    def backward(
        self,
        tensors: Sequence[Tensor],
        causal: bool,
        scale: float,
        log_counts: Tensor | None = None,
    ) -> Gradients:
        dout, q, k, v, out, lse = map(wide, tensors)
        delta = (dout * out).sum(-1, keepdim=True)
        dq = torch.zeros_like(q)
        dk: list[Tensor] = []
        dv: list[Tensor] = []
        for rows, keys, scores in self._blocks(q, k, causal, scale, log_counts):
            weights = scores.sub_(lse[:, :, rows, None]).exp_()
            dout_of_rows = dout[:, :, rows]
            dv.append(weights.mT @ dout_of_rows)
            dweights = dout_of_rows @ v[:, :, keys].mT
            dscores = dweights.sub_(delta[:, :, rows]).mul_(weights).mul_(scale)
            dq[:, :, rows] += dscores @ k[:, :, keys]
            dk.append(dscores.mT @ q[:, :, rows])
        return dq, torch.cat(dk, 2), torch.cat(dv, 2)

    def _blocks(
        self,
        q: Tensor,
        k: Tensor,
        causal: bool,
        scale: float,
        log_counts: Tensor | None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the rows that see some keys of a block, these keys, and the scores, block by block."""
        size = k.shape[2]
        if log_counts is None:
            size = max(1, self._MAX_SCORES // q.shape[:3].numel())
        for first in range(0, k.shape[2], size):
            rows = slice(first if causal else 0, None)
            keys = slice(first, first + size)
            scores = (wide(q[:, :, rows]) @ wide(k[:, :, keys]).mT).mul_(scale)
            if log_counts is not None:
                scores += log_counts
            elif causal:
                unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
                scores.masked_fill_(unseen, float("-inf"))
            yield rows, keys, scores


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention to other keys, `part`, into `out` (.., D) and its `lse` (.., 1), in place."""
    sums = torch.logaddexp(lse, part_lse)
    out.lerp_(part.to(out.dtype), (part_lse - sums).exp_())
    lse.copy_(sums)


def wide(x: Tensor) -> Tensor:
    """Return x in fp32 or fp64, without a copy if it is already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
