"""The votes of queries for blocks, and the scans that find the blocks for which all groups in a slot of tokens vote.

A scan goes through stages, from coarse means of all blocks to finer ones of those that remain. Neighbouring slots are
scanned together. What votes and scans are for is in `choosing`.

H query heads, K key heads, D head_dim, C blocks or candidates, m means of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import GroupedPart, limits_of, slot_of, stages
from .past import Means
from .pattern import NEIGHBOUR, VOTERS, Pattern


class Slot(NamedTuple):
    """Neighbouring groups that share a scan, made at position `start`: where they start, and the blocks before."""

    start: int
    starts: range
    blocks: int


class Unrotated(NamedTuple):
    """The queries and keys of a document, in one row of a batch, as votes compare them: un-rotated.

    voters: (first positions of n groups, step s) -> every s-th of their voters, scaled, (n, VOTERS / s, H, D).
    keys: blocks (groups, n), ascending in each group -> keys (groups, K, n, tokens of a block, D).
    block_numbers: numbers in the keys of one block.
    """

    voters: Callable[[range, int], Tensor]
    keys: Callable[[Tensor], Tensor]
    block_numbers: int


class Voting(NamedTuple):
    """All that the choice of neighbouring parts depends on, in one row of a batch, besides means: see `choose`.

    slots: those of the parts. row: the row of the means. heads: H. scanned: the candidates (C,) of the first slot, if
    they are known. named: what `Names` gives for all groups, if there is any. earlier: the blocks (groups, m) that the
    groups see in the layer that chose before.
    """

    pattern: Pattern
    slots: Sequence[Slot]
    row: int
    heads: int
    document: Unrotated
    scanned: Tensor | None
    named: Tensor | None
    earlier: Tensor | None


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


def group_starts(pattern: Pattern, part: GroupedPart) -> range:
    """Return the first position of each group of a part, also of tokens before the part."""
    every, groups = pattern.chosen_every, part.groups
    start = groups.start // every * every
    return range(start, start + groups.number * every, every)


def slots_of(pattern: Pattern, parts: Sequence[GroupedPart]) -> list[Slot]:
    """Return the slots of the groups of neighbouring parts."""
    every, slots = pattern.chosen_every, []
    groups = [(start, part.groups.near) for part in parts for start in group_starts(pattern, part)]
    for slot, some in groupby(groups, key=lambda group: slot_of(pattern, group[1], group[0])):
        (start, near), *others = some
        starts = range(start, start + (1 + len(others)) * every, every)
        slots.append(Slot(slot, starts, near // pattern.chosen_block))
    return slots


def batches(
    slots: Sequence[Slot], alike: Callable[[Slot], object], every: int, most: Callable[[Slot], int]
) -> Iterator[list[Slot]]:
    """Yield neighbouring slots that are alike and `every` tokens apart, as many at a time as `most` allows the last."""
    batch: list[Slot] = []
    for slot in slots:
        follows = batch and alike(slot) == alike(batch[0]) and slot.start == batch[-1].start + every
        if batch and (not follows or len(batch) >= most(slot)):
            yield batch
            batch = []
        batch.append(slot)
    if batch:
        yield batch


def scan(means: Means, voting: Voting) -> list[Tensor | None]:
    """Return the candidates (C,) of each slot, by the votes of its first group; None is all blocks but 0."""
    pattern, candidates, limit = voting.pattern, _known(voting), limits_of(means.fine).scores

    def most(slot: Slot) -> int:
        planned = stages(pattern, slot.blocks - 1)
        compared = planned[0].means * slot.blocks if planned else 0
        return limit // (VOTERS // 2 * voting.heads * compared) if compared else len(voting.slots)

    remaining = voting.slots[len(candidates) :]
    for slots in batches(remaining, lambda slot: stages(pattern, slot.blocks - 1), pattern.scan_every, most):
        candidates += _scanned(means, voting, slots)
    return candidates


def _scanned(means: Means, voting: Voting, slots: Sequence[Slot]) -> Sequence[Tensor | None]:
    """Return the candidates of neighbouring slots whose scans have the same stages."""
    planned = stages(voting.pattern, slots[0].blocks - 1)
    if not planned:
        return [None] * len(slots)
    first, *later = planned
    voters = voting.document.voters(range(slots[0].start, slots[-1].start + 1, voting.pattern.scan_every), 2)
    number, before = slots[-1].blocks, blocks_before(slots, means.fine.device)
    of_blocks, others = means.of_first(first.means, voting.row, number)[:, 1:], not_before(1, number, before)
    kept = 1 + best(votes_for(voters, of_blocks, others), first.blocks)
    for stage in later:
        step = max(1, limits_of(voters).scores // (kept.shape[1] * means.numbers(stage.means)))
        votes = [
            votes_for(of_slots[:, None], means.of_blocks(stage.means, voting.row, own), blocks=own[:, None])[:, 0]
            for of_slots, own in zip(voters.split(step), kept.split(step), strict=True)
        ]
        kept = kept.gather(1, best(torch.cat(votes), stage.blocks))
    return kept.unbind()


def _known(voting: Voting) -> list[Tensor | None]:
    """Return the candidates of the first slot, if they are known."""
    if voting.scanned is None:
        return []
    return [voting.scanned if stages(voting.pattern, voting.slots[0].blocks - 1) else None]


def blocks_before(slots: Sequence[Slot], device: torch.device) -> Tensor | int:
    """Return the number of blocks before each slot, (slots, 1), or one number if it is the same."""
    if slots[0].blocks == slots[-1].blocks:
        return slots[0].blocks
    return torch.tensor([[slot.blocks] for slot in slots], device=device)


def not_before(start: int, stop: int, before: Tensor | int) -> Tensor | None:
    """Return which of [start, stop) are not below each of the numbers `before` (n, 1): (n, C); None if all are."""
    return None if isinstance(before, int) else torch.arange(start, stop, device=before.device) >= before
