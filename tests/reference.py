"""Dilated attention by a dense mask: slow, and short enough to check by eye. Every fast path is tested against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longnet_cli.attention.pattern import Padding, Pattern
from longnet_cli.attention.sinks import Turn


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
    choice: Choice = (),
) -> Tensor:
    """Return dilated attention of (batch, tokens, heads, head_dim) tensors, in O(tokens^2) memory; differentiable.

    Or of (batch, tokens, levels, heads, head_dim), without sinks, chosen blocks and padding.

    A key counts once for every level at which the query sees it (a multiset, paper Eq. 9-10). k and v may have fewer
    heads. Sinks are the first rows given, and blocks are among the rows given, so `start` must be 0 with sinks or
    chosen blocks. `choice` says which blocks are seen.
    """
    if lengths is not None:
        # zeros, and in the graph even where every length is 0
        out = q.sum(2) * 0 if q.dim() == 5 else q * 0
        for b, n in enumerate(torch.as_tensor(lengths).tolist()):
            if n:
                q_, k_, v_ = (x[b : b + 1, :n] for x in (q, k, v))
                alone = dilated_attention_reference(
                    q_, k_, v_, pattern, causal=causal, start=start, padding=padding, scale=scale, turn=turn,
                    choice=[(0, queries, blocks) for row, queries, blocks in choice if row == b and queries.stop <= n],
                )  # fmt: skip
                out = out.index_put((torch.tensor(b), torch.arange(n)), alone[0])
        return out
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.dim() == 5:
        return _by_level(
            q, k, v, [*level_counts(pattern, q.shape[3], q.shape[1], causal, start, padding)], scale
        )
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    counts, zeros = key_counts(pattern, q.shape[2], q.shape[1], causal, start, padding)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    n, w, b = pattern.sinks, pattern.segment_lengths[0], pattern.look_backs[0]
    # queries whose first level covers no sinks
    late = torch.arange(min((b + 1) * w, q.shape[1]), q.shape[1])
    if n and turn and len(late):
        segments, of = (late // w).unique(return_inverse=True)
        sinks = k[:, None, :n].expand(-1, len(segments), -1, -1, -1)
        turned = turn(sinks, (segments - b) * w - n)[:, of]  # sink i is seen at (s - b) w - n + i
        scores[:, :, late, :n] = torch.einsum("bnhd,bnmhd->bhnm", q[:, late], turned)
    counts = counts.expand(len(q), -1, -1, -1)
    if choice:
        seen, of_blocks = _scores_of_blocks(q, k, pattern, choice, turn)
        scores = scores.movedim(1, 3).index_put(seen, of_blocks).movedim(3, 1)
        counts = counts.movedim(1, 3).index_put(seen, counts.new_ones(())).movedim(3, 1)
    unseen = (counts == 0).to(q.device)
    logits = scores * scale + counts.to(q).masked_fill(unseen, 1).log().masked_fill(
        unseen, float("-inf")
    )
    logits = torch.cat([logits, zeros.to(q).log().expand(*scores.shape[:3], 1)], dim=-1)
    # (batch, heads, tokens, 1): queries that take part in some level
    covered = counts.any(dim=-1, keepdim=True)
    weights = torch.where(covered, logits, 0.0).softmax(-1) * covered
    return torch.einsum("bhnm,bmhd->bnhd", weights[..., :-1], v)


def _scores_of_blocks(
    q: Tensor, k: Tensor, pattern: Pattern, choice: Choice, turn: Turn | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return rows of the batch, queries and keys, (n,) each, that see each other by choice, and scores (n, heads)."""
    w, b, size = pattern.segment_lengths[0], pattern.look_backs[0], pattern.chosen_block
    places, of_blocks = [], []
    for row, queries, blocks in choice:
        near = queries.start // w * w - b * w
        for place, block in enumerate(blocks):
            keys = range(block * size, (block + 1) * size)
            moved = k[row, keys]
            # the block's first key is seen as if it stood so many blocks before the near keys
            if turn:
                distance = near - (len(blocks) - place) * size - keys.start
                moved = turn(moved[None, None], torch.tensor([distance]))[0, 0]
            places.append(torch.cartesian_prod(*map(torch.tensor, ([row], queries, keys))))
            of_blocks.append(torch.einsum("nhd,mhd->nmh", q[row, queries], moved).flatten(0, 1))
    return torch.cat(places).unbind(1), torch.cat(of_blocks)


def _by_level(
    q: Tensor, k: Tensor, v: Tensor, of_levels: Sequence[tuple[Tensor, Tensor]], scale: float
) -> Tensor:
    """Return attention of (batch, tokens, levels, heads, head_dim) tensors to the keys of all levels."""
    k, v = (x.repeat_interleave(q.shape[3] // x.shape[3], 3) for x in (k, v))
    # (heads, queries, levels, keys)
    counts = torch.stack([of_level for of_level, _ in of_levels], -2)
    scores = torch.einsum("bnlhd,bmlhd->bhnlm", q, k) * scale
    logits = scores + counts.to(q).masked_fill(counts == 0, 1).log().masked_fill(
        counts == 0, float("-inf")
    )
    covered = counts.flatten(-2).any(-1, keepdim=True)
    weights = torch.where(covered, logits.flatten(-2), 0.0).softmax(-1) * covered
    return torch.einsum("bhnlm,bmlhd->bnhd", weights.unflatten(-1, scores.shape[-2:]), v)


# of each group: row of the batch, its queries, the blocks that they see
Choice = Sequence[tuple[int, range, Sequence[int]]]


def key_counts(
    pattern: Pattern,
    heads: int,
    tokens: int,
    causal: bool,
    start: int,
    padding: Padding,
) -> tuple[Tensor, Tensor]:
    """Return how often each query sees each key, (heads, tokens, tokens), and zero keys, (heads, tokens, 1)."""
    position = torch.arange(start, start + tokens)
    query, key = position[:, None], position[None, :]
    w, b = pattern.segment_lengths[0], pattern.look_backs[0]
    of_levels = zip(*level_counts(pattern, heads, tokens, causal, start, padding), strict=True)
    counts, zeros = (torch.stack(each).sum(0) for each in of_levels)
    return counts + ((query // w > b) & (key < pattern.sinks)), zeros


def level_counts(
    pattern: Pattern, heads: int, tokens: int, causal: bool, start: int, padding: Padding
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each level what `key_counts` sums, without sinks."""
    position = torch.arange(start, start + tokens)
    query, key = position[:, None], position[None, :]
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
        counts = torch.zeros(heads, tokens, tokens, dtype=torch.int64)
        zeros = torch.zeros(heads, tokens, 1, dtype=torch.int64)
        for head, offset in enumerate(pattern.offsets(level, heads)):
            sampled = inside % r == offset
            asks = torch.ones_like(sampled) if pattern.queries == "all" else sampled
            seen = asks[:, None] & sampled[None, :] & may
            counts[head] = seen
            # each segment is padded to ceil(w / r) rows per head
            if padding == "zero_key" and not causal:
                zeros[head, :, 0] = asks * (-(-w // r) - seen.sum(-1))
        yield counts, zeros
