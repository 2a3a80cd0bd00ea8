"""Dilated attention by a dense mask: slow, and short enough to check by eye. Every fast path is tested against it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .pattern import Padding, Pattern
from .sinks import Turn


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
    turn: Turn | None = None,
) -> Tensor:
    """Return dilated attention of (batch, tokens, heads, head_dim) tensors, in O(tokens^2) memory; differentiable.

    A key counts once for every level at which the query sees it (a multiset, paper Eq. 9-10), or e^bias times if the
    level has a bias. k and v may have fewer heads. Sinks are the first rows given, so `start` must be 0 with sinks.
    """
    if lengths is not None:
        out = q * 0  # zeros, and in the graph even where every length is 0
        for b, n in enumerate(torch.as_tensor(lengths).tolist()):
            if n:
                q_, k_, v_ = (x[b : b + 1, :n] for x in (q, k, v))
                alone = dilated_attention_reference(
                    q_, k_, v_, pattern, causal=causal, start=start, padding=padding, scale=scale, turn=turn
                )
                out = out.index_put((torch.tensor(b), torch.arange(n)), alone[0])
        return out
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    counts, zeros = key_counts(pattern, q.shape[2], q.shape[1], causal, start, padding)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    n, w, b = pattern.sinks, pattern.segment_lengths[0], pattern.look_backs[0]
    late = torch.arange(min((b + 1) * w, q.shape[1]), q.shape[1])  # queries whose first level covers no sinks
    if n and turn and len(late):
        segments, of = (late // w).unique(return_inverse=True)
        sinks = k[:, None, :n].expand(-1, len(segments), -1, -1, -1)
        turned = turn(sinks, (segments - b) * w - n)[:, of]  # sink i is seen at (s - b) w - n + i
        scores[:, :, late, :n] = torch.einsum("bnhd,bnmhd->bhnm", q[:, late], turned)
    logits = scores * (q.shape[-1] ** -0.5 if scale is None else scale) + counts.to(q).log()
    logits = torch.cat([logits, zeros.to(q).log().expand(*scores.shape[:3], 1)], dim=-1)
    covered = counts.any(dim=-1, keepdim=True)  # (heads, tokens, 1): the queries that take part in some level
    weights = torch.where(covered, logits, 0.0).softmax(-1) * covered
    return torch.einsum("bhnm,bmhd->bnhd", weights[..., :-1], v)


def key_counts(
    pattern: Pattern, heads: int, tokens: int, causal: bool, start: int, padding: Padding
) -> tuple[Tensor, Tensor]:
    """Return how often each query sees each key, (heads, tokens, tokens), and zero keys, (heads, tokens, 1).

    A key of a level with a bias counts e^bias times.
    """
    position = torch.arange(start, start + tokens)
    query, key = position[:, None], position[None, :]
    counts = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    zeros = torch.zeros(heads, tokens, 1, dtype=torch.int64)
    covered = torch.zeros(tokens, tokens, dtype=torch.bool)  # by the level before
    for level, (w, r) in enumerate(pattern.levels):
        if padding == "zero_key":
            w = min(w, tokens)
        b, inside = pattern.look_backs[level], position % w
        covers = ((query // w - b) * w <= key) & (key < (query // w + b + 1) * w)
        may = covers & ~covered if pattern.overlap == "once" else covers
        may = may & (key >= pattern.sinks) if level else may
        may = may & (key <= query) if causal else may
        covered = covers
        for head, offset in enumerate(pattern.offsets(level, heads)):
            sampled = inside % r == offset
            asks = torch.ones_like(sampled) if pattern.queries == "all" else sampled
            seen = asks[:, None] & sampled[None, :] & may
            counts[head] += seen.double() * math.exp(pattern.biases[level])
            if padding == "zero_key" and not causal:  # each segment is padded to ceil(w / r) rows per head
                zeros[head, :, 0] += asks * (-(-w // r) - seen.sum(-1))
    w, b = pattern.segment_lengths[0], pattern.look_backs[0]
    return counts + ((query // w > b) & (key < pattern.sinks)), zeros
