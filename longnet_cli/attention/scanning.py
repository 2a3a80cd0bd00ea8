"""The scans of a choice: for all groups in a slot of tokens, one scan finds the blocks that they compare.

A scan goes through stages, from coarse means of all blocks to finer ones of those that remain. Neighbouring slots are
scanned together. What scans are for is in `choosing`.

H query heads, K key heads, D head_dim, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .groups import GroupedPart, slot_of, stages
from .limits import limits_of
from .past import RowMeans
from .pattern import RUN, RUNS, VOTERS, Pattern
from .voting import best, votes_for

if TYPE_CHECKING:
    from .choosing import Voting


class Slot(NamedTuple):
    """Neighbouring groups that share a scan, made at position `first`: their first positions, and the blocks before."""

    first: int
    firsts: range
    blocks: int


def firsts_of(pattern: Pattern, part: GroupedPart) -> range:
    """Return the first position of each group of a part, also of tokens before the part."""
    every, groups = pattern.chosen_every, part.groups
    first = groups.first // every * every
    return range(first, first + groups.number * every, every)


def slots_of(pattern: Pattern, parts: Sequence[GroupedPart]) -> list[Slot]:
    """Return the slots of the groups of neighbouring parts."""
    every, groups = pattern.chosen_every, []
    for part in parts:
        near = part.groups.near
        groups += [(slot_of(pattern, near, first), first, near) for first in firsts_of(pattern, part)]
    slots = []
    for slot, some in groupby(groups, key=itemgetter(0)):
        (_, first, near), *_ = of_slot = [*some]
        firsts = range(first, first + len(of_slot) * every, every)
        slots.append(Slot(slot, firsts, near // pattern.chosen_block))
    return slots


def batches(
    slots: Sequence[Slot], alike: Callable[[Slot], object], every: int, most: Callable[[Slot], int]
) -> Iterator[list[Slot]]:
    """Yield neighbouring slots that are alike and `every` tokens apart, as many at a time as `most` allows the last."""
    batch: list[Slot] = []
    for slot in slots:
        follows = batch and alike(slot) == alike(batch[0]) and slot.first == batch[-1].first + every
        if batch and (not follows or len(batch) >= most(slot)):
            yield batch
            batch = []
        batch.append(slot)
    if batch:
        yield batch


def scan(voting: Voting, slots: Sequence[Slot]) -> list[Tensor | None]:
    """Return the candidates (C,) of each slot, by the votes of its first group; None if all blocks but 0 are."""
    pattern, heads = voting.pattern, voting.heads
    limit = limits_of(voting.means.fine).scores

    def alike(slot: Slot) -> tuple[object, int]:
        planned = stages(pattern, slot.blocks - 1)
        return planned, slot.blocks % RUN if planned and planned[0].means == RUNS else 0

    def most(slot: Slot) -> int:
        planned = stages(pattern, slot.blocks - 1)
        return limit // (VOTERS // 2 * heads * planned[0].compared(slot.blocks)) if planned else len(slots)

    known = voting.scanned is not None
    candidates = [voting.scanned if stages(pattern, slots[0].blocks - 1) else None] if known else []
    for some in batches(slots[known:], alike, pattern.scan_every, most):
        kept, before = None, blocks_before(some, voting.means.fine.device)
        planned = stages(pattern, some[0].blocks - 1)
        firsts = range(some[0].first, some[-1].first + 1, pattern.scan_every)
        voters = voting.document.voters(firsts, 2) if planned else None
        for stage in planned:
            assert voters is not None
            means = voting.means.of_row(voting.row, stage.means)
            narrow = _best_runs if stage.means == RUNS else _best_blocks
            kept = narrow(voters, means, kept, before, some[-1].blocks, stage.blocks)
        candidates += [None] * len(some) if kept is None else kept.unbind()
    return candidates


def blocks_before(slots: Sequence[Slot], device: torch.device) -> Tensor | int:
    """Return the number of blocks before each slot, (slots, 1), or one number if it is the same."""
    if slots[0].blocks == slots[-1].blocks:
        return slots[0].blocks
    return torch.tensor([[slot.blocks] for slot in slots], device=device)


def not_before(first: int, stop: int, before: Tensor | int, device: torch.device) -> Tensor | None:
    """Return which of [first, stop) are not below each of the numbers `before` (n, 1): (n, C); None if all are."""
    return None if isinstance(before, int) else torch.arange(first, stop, device=device) >= before


def _best_runs(
    voters: Tensor, runs: RowMeans, _: Tensor | None, before: Tensor | int, number: int, most: int
) -> Tensor:
    """Return the blocks (slots, n) of the best runs. The first run and blocks after the last whole one always stay.

    The first run holds block 0, whose keys are like no others. Of the blocks `before` the slots, there are at most
    `number`.
    """
    whole, own = number // RUN, torch.arange(RUN, device=voters.device)
    votes = votes_for(voters, runs.first(whole)[:, 1:], not_before(1, whole, before // RUN, voters.device))
    blocks = ((1 + best(votes, most // RUN - 1))[..., None] * RUN + own).flatten(1)
    rest = before // RUN * RUN + own[: number % RUN]
    return torch.cat([own[1:].expand(len(voters), -1), blocks, rest.expand(len(voters), -1)], 1)


def _best_blocks(
    voters: Tensor, means: RowMeans, kept: Tensor | None, before: Tensor | int, number: int, most: int
) -> Tensor:
    """Return the `most` best (slots, most) of the blocks that are `kept` (slots, n), or of all but 0 `before` them."""
    if kept is None:
        return 1 + best(
            votes_for(voters, means.first(number)[:, 1:], not_before(1, number, before, voters.device)), most
        )
    of_blocks, step = means.some(kept), max(1, limits_of(voters).scores // (kept.shape[1] * means.numbers))
    votes = [
        votes_for(some[:, None], of_blocks(own), blocks=own[:, None])[:, 0]
        for some, own in zip(voters.split(step), kept.split(step), strict=True)
    ]
    return kept.gather(1, best(torch.cat(votes), most))
