"""Dilated attention by a dense mask: slow, and short enough to check by eye. Every fast path is tested against it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import exp

import torch
from torch import Tensor

from .groups import stages
from .pattern import CARRIED, FOUND, NEIGHBOUR, SURE, VOTERS, Padding, Pattern
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
    finds: Scores | None = None,
) -> Tensor:
    """Return dilated attention of (batch, tokens, heads, head_dim) tensors, in O(tokens^2) memory; differentiable.

    A key counts once for every level at which the query sees it (a multiset, paper Eq. 9-10), or e^bias times if the
    level has a bias. k and v may have fewer heads. Sinks are the first rows given, and blocks are chosen among the rows
    given, so `start` must be 0 with sinks or chosen blocks. A choice has no gradient.
    """
    if lengths is not None:
        out = q * 0  # zeros, and in the graph even where every length is 0
        for b, n in enumerate(torch.as_tensor(lengths).tolist()):
            if n:
                q_, k_, v_ = (x[b : b + 1, :n] for x in (q, k, v))
                alone = dilated_attention_reference(
                    q_, k_, v_, pattern, causal=causal, start=start, padding=padding, scale=scale, turn=turn,
                )  # fmt: skip
                out = out.index_put((torch.tensor(b), torch.arange(n)), alone[0])
        return out
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = chosen_blocks(q, k, pattern, scale, turn, finds) if pattern.chosen else []
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
    counts = counts.expand(len(q), -1, -1, -1)
    if choice:
        places, of_blocks = [], []
        for row, queries, blocks in choice:
            near, size = queries.start // w * w - b * w, pattern.chosen_block
            for place, block in enumerate(blocks):
                keys = range(block * size, (block + 1) * size)
                moved = k[row, keys]
                if turn:  # the block's first key is seen as if it stood so many blocks before the near keys
                    distance = near - (len(blocks) - place) * size - keys.start
                    moved = turn(moved[None, None], torch.tensor([distance]))[0, 0]
                places.append(torch.cartesian_prod(*map(torch.tensor, ([row], queries, keys))))
                of_blocks.append(torch.einsum("nhd,mhd->nmh", q[row, queries], moved).flatten(0, 1))
        seen = torch.cat(places).unbind(1)  # rows of the batch, queries, keys
        scores = scores.movedim(1, 3).index_put(seen, torch.cat(of_blocks)).movedim(3, 1)
        counts = counts.movedim(1, 3).index_put(seen, counts.new_ones(())).movedim(3, 1)
    unseen = (counts == 0).to(q.device)
    logits = scores * scale + counts.to(q).masked_fill(unseen, 1).log().masked_fill(unseen, float("-inf"))
    logits = torch.cat([logits, zeros.to(q).log().expand(*scores.shape[:3], 1)], dim=-1)
    covered = counts.any(dim=-1, keepdim=True)  # (batch, heads, tokens, 1): queries that take part in some level
    weights = torch.where(covered, logits, 0.0).softmax(-1) * covered
    return torch.einsum("bhnm,bmhd->bnhd", weights[..., :-1], v)


Scores = dict[tuple[int, int], dict[int, float]]  # by row and first query of a group: finds, by candidate


@torch.no_grad()
def chosen_blocks(
    q: Tensor, k: Tensor, pattern: Pattern, scale: float, turn: Turn | None, finds: Scores | None = None
) -> list[tuple[int, range, list[int]]]:
    """Return (row of the batch, its queries, the blocks that they see) for each group of queries that sees blocks.

    q (B, N, H, D) and k (B, N, K, D) are rotated, if at all, by `turn`. `finds` are those of the layer before, and
    become those of this layer.
    """
    finds = {} if finds is None else finds
    w, b, every, size = pattern.segment_lengths[0], pattern.look_backs[0], pattern.chosen_every, pattern.chosen_block
    tokens = q.shape[1]
    if turn:  # un-rotated: by minus the position
        q, k = (turn(x[:, :, None], -torch.arange(tokens))[:, :, 0] for x in (q, k))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    choices = []
    for row, start in itertools.product(range(len(q)), range(0, tokens, every)):
        near = max(0, (start // w - b) * w)
        blocks = list(range(near // size))
        if len(blocks) > pattern.chosen:
            voters, keys = q[row, start - VOTERS + 1 : start + 1], k[row, size:near]
            voted, finds[row, start] = _voted(voters, keys, pattern, scale, finds.get((row, start), {}))
            blocks = [0, *voted]
        if blocks:
            choices.append((row, range(start, min(start + every, tokens)), blocks))
    return choices


def _voted(
    voters: Tensor, keys: Tensor, pattern: Pattern, scale: float, before: Mapping[int, float]
) -> tuple[list[int], dict[int, float]]:
    """Return the blocks that voters (VOTERS, H, D) choose among those of keys (n, H, D), from block 1 on, in order.

    Also the finds for the next layer; `before` has those of the layer before.
    """

    def votes(candidates: list[int], number: int, every: int, power: int = 1) -> list[float]:
        """Return a score for each block: `number` means of each, compared by the last of `every` voters in a row.

        Those that are no candidates get no vote.
        """
        means = keys.unflatten(0, (len(blocks), number, -1)).mean(2)[candidates]
        scores = torch.einsum("vhd,cmhd->vhcm", voters[every - 1 :: every], means) * scale
        shares = scores.logsumexp(-1).softmax(-1).pow(power).mean((0, 1)) ** (1 / power)
        own = torch.zeros(len(blocks)).to(shares).index_put((torch.tensor(candidates),), shares).tolist()
        return [max(score, NEIGHBOUR * before) for before, score in zip([0.0, *own][:-1], own, strict=True)]

    def best(scores: list[float], number: int) -> list[int]:
        return sorted(sorted(blocks, key=lambda block: -scores[block])[:number])  # stable: the earlier one of equals

    blocks = [*range(len(keys) // pattern.chosen_block)]
    *coarse, last = stages(pattern, len(blocks))
    candidates = blocks
    for stage in coarse:
        candidates = best(votes(candidates, stage.means, VOTERS // stage.voters), stage.blocks)
    scores, finds = votes(candidates, last.means, 1), votes(candidates, last.means, 1, SURE)
    for block, score in before.items():
        finds[block] += CARRIED * score
    left = {block: finds[block] for block in best(finds, 2 * last.blocks)}
    more = pattern.chosen // FOUND
    own = best(scores, last.blocks - more)
    others = best([-1.0 if block in own else score for block, score in enumerate(finds)], more)
    return [1 + block for block in sorted([*own, *others])], left


def key_counts(
    pattern: Pattern,
    heads: int,
    tokens: int,
    causal: bool,
    start: int,
    padding: Padding,
) -> tuple[Tensor, Tensor]:
    """Return how often each query sees each key, (heads, tokens, tokens), and zero keys, (heads, tokens, 1).

    A key of a level with a bias counts e^bias times.
    """
    position = torch.arange(start, start + tokens)
    query, key = position[:, None], position[None, :]
    parts: list[list[Tensor]] = [[] for _ in range(heads)]  # of each head, by level
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
            parts[head].append(seen.double() * exp(pattern.biases[level]))
            if padding == "zero_key" and not causal:  # each segment is padded to ceil(w / r) rows per head
                zeros[head, :, 0] += asks * (-(-w // r) - seen.sum(-1))
    w, b = pattern.segment_lengths[0], pattern.look_backs[0]
    counts = torch.stack([torch.stack(of_head).sum(0) for of_head in parts])
    return counts + ((query // w > b) & (key < pattern.sinks)), zeros
