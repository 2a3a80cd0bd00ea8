"""The votes of queries for blocks, and the best of them. What they are for is in `choosing`.

H query heads, K key heads, D head_dim, C blocks, m means of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pattern import NEIGHBOUR


def votes_for(
    voters: Tensor, means: Tensor, others: Tensor | None = None, blocks: Tensor | None = None, power: int = 1
) -> Tensor:
    """Return the votes (.., groups, C) of voters (.., groups, n, H, D) for blocks with means (.., K, C, m, D).

    Blocks (.., groups or 1, C) are ascending; without them, the blocks are all in a row. A group does not compare the
    `others` (.., groups, C), which get -1.
    """
    shares = shares_of(voters, means, others)
    votes = shares.mean((-4, -2)) if power == 1 else (shares**power).mean((-4, -2)) ** (1 / power)
    votes = _with_neighbours(votes, blocks)
    return votes if others is None else votes.masked_fill(others, -1)


def shares_of(voters: Tensor, means: Tensor, others: Tensor | None = None) -> Tensor:
    """Return the share of each block (.., K, groups, n * H / K, C) for voters (.., groups, n, H, D).

    means (.., K, C, m, D). Of the `others` of a group (.., groups, C), none has any.
    """
    by_head = voters.unflatten(-2, (means.shape[-4], -1)).movedim(-3, -5).flatten(-3, -2)
    scores = by_head.flatten(-3, -2) @ means.flatten(-3, -2).mT
    scores = scores.unflatten(-2, by_head.shape[-3:-1]).unflatten(-1, means.shape[-3:-1])
    if others is not None:
        scores.masked_fill_(others[..., None, :, None, :, None], -torch.inf)
    return scores.flatten(-2).softmax(-1).unflatten(-1, means.shape[-3:-1]).sum(-1)


def _with_neighbours(scores: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Return scores (.., C) where the block after a good one is nearly as good; `blocks` None is all in a row."""
    before = NEIGHBOUR * scores[..., :-1]
    if blocks is not None:
        before = before.where(blocks.diff() == 1, 0)
    return torch.cat([scores[..., :1], torch.maximum(scores[..., 1:], before)], -1)


def best(scores: Tensor, number: int) -> Tensor:
    """Return the indices (groups, number) of the highest scores (groups, C), ascending; of equals, the earlier ones."""
    if not number:
        return scores.new_empty(len(scores), 0, dtype=torch.int64)
    scores = scores.nan_to_num(0)  # what is not finite chooses the first blocks
    least = scores.topk(number, sorted=False).values.amin(1, keepdim=True)
    more, same = scores > least, scores == least
    best = more | (same & (same.cumsum(1) <= number - more.sum(1, keepdim=True)))
    places = (best.cumsum(1) - 1).where(best, number)  # the others go behind the last
    indices = torch.arange(scores.shape[1], device=scores.device).expand_as(places)
    return places.new_empty(len(scores), number + 1).scatter_(1, places, indices)[:, :number]
