"""The same attention by a dense mask: slow, and short enough to check by eye. It is the oracle of every fast path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pattern import Padding, Pattern


def dilated_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    causal: bool = True,
    start: int = 0,
    lengths: Sequence[int] | Tensor | None = None,
    padding: Padding = "exact",
    scale: float | None = None,
) -> Tensor:
    """Dilated attention of (batch, tokens, heads, head_dim) tensors with O(tokens^2) memory; differentiable.

    A key counts as often as it shares a segment's rows with the query (a multiset, paper Eq. 9-10).
    """
    if lengths is not None:
        out = q * 0  # zeros, and in the graph even where every length is 0
        for b, n in enumerate(torch.as_tensor(lengths).tolist()):
            if n:
                q_, k_, v_ = (x[b : b + 1, :n] for x in (q, k, v))
                alone = dilated_attention_reference(
                    q_, k_, v_, pattern, causal=causal, start=start, padding=padding, scale=scale
                )
                out = out.index_put((torch.tensor(b), torch.arange(n)), alone[0])
        return out
    counts, zeros = _key_counts(pattern, q.shape[2], q.shape[1], causal, start, padding)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = torch.cat([scores + counts.to(q).log(), zeros.to(q).log().expand(*scores.shape[:3], 1)], dim=-1)
    covered = counts.any(dim=-1, keepdim=True)  # (heads, tokens, 1): the queries that take part in some level
    weights = torch.where(covered, logits, 0.0).softmax(-1) * covered
    return torch.einsum("bhnm,bmhd->bnhd", weights[..., :-1], v)


def _key_counts(
    pattern: Pattern, heads: int, tokens: int, causal: bool, start: int, padding: Padding
) -> tuple[Tensor, Tensor]:
    """How often each query sees each key, (heads, tokens, tokens), and zero keys, (heads, tokens, 1)."""
    position = torch.arange(start, start + tokens)
    counts = torch.zeros(heads, tokens, tokens, dtype=torch.int64)
    zeros = torch.zeros(heads, tokens, 1, dtype=torch.int64)
    for level, (w, r) in enumerate(pattern.levels):
        if padding == "zero_key":
            w = min(w, tokens)
        segment, inside = position // w, position % w
        for head, offset in enumerate(pattern.offsets(level, heads)):
            takes_part = inside % r == offset
            seen = takes_part[:, None] & takes_part[None, :] & (segment[:, None] == segment[None, :])
            if padding == "zero_key" and not causal:  # each segment is padded to ceil(w / r) rows a head
                zeros[head, :, 0] += takes_part * (-(-w // r) - seen.sum(-1))
            counts[head] += seen & (position[:, None] >= position[None, :]) if causal else seen
    return counts, zeros
