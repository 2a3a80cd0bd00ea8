"""The scans of a choice: for all groups in a slot of tokens, one scan finds the blocks that they compare.

A scan goes through stages, from coarse means of all blocks to finer ones of those that remain. Neighbouring slots are
scanned together. What scans are for is in `choosing`.

H query heads, K key heads, D head_dim, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .groups import ChoiceStage, GroupedPart, slot_of, stages
from .limits import limits_of
from .past import Means, OfBlocks
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


class Scan:
    """The scan of neighbouring slots that are alike: the blocks (slots, n) that are `kept` so far, or None for all."""

    def __init__(self, voting: Voting, slots: Sequence[Slot]) -> None:
        self.row, self.slots = voting.row, slots
        self.kept: Tensor | None = None
        self.planned = stages(voting.pattern, slots[0].blocks - 1)
        firsts = range(slots[0].first, slots[-1].first + 1, voting.pattern.scan_every)
        self._voters = voting.document.voters(firsts, 2) if self.planned else torch.empty(0)

    def compare_all(self, stage: ChoiceStage, means: Means) -> None:
        """Keep the best blocks of all by the first stage: of blocks before the slots but 0, or of their runs."""
        number, before = self.slots[-1].blocks, blocks_before(self.slots, means.fine.device)
        if stage.means != RUNS:
            of_blocks, others = means.first(self.row, number, stage.means)[:, 1:], not_before(1, number, before)
            self.kept = 1 + best(votes_for(self._voters, of_blocks, others), stage.blocks)
            return
        # the first run, whose keys are like no others, and the blocks after the last whole one always stay
        whole, own = number // RUN, torch.arange(RUN, device=self._voters.device)
        of_runs, others = means.first(self.row, whole, RUNS)[:, 1:], not_before(1, whole, before // RUN)
        runs = 1 + best(votes_for(self._voters, of_runs, others), stage.blocks // RUN - 1)
        rest = before // RUN * RUN + own[: number % RUN]
        kept = own[1:], (runs[..., None] * RUN + own).flatten(1), rest
        self.kept = torch.cat([x.expand(len(self._voters), -1) for x in kept], 1)

    def candidates(self) -> Sequence[Tensor | None]:
        """Return what is kept for each slot."""
        return [None] * len(self.slots) if self.kept is None else self.kept.unbind()

    def best_of(self, some: slice, of_blocks: OfBlocks, numbers: int, most: int) -> Tensor:
        """Return the `most` best (n, most) of the blocks that some slots keep, each with so many `numbers` of means."""
        assert self.kept is not None
        voters, kept = self._voters[some], self.kept[some]
        step = max(1, limits_of(voters).scores // (kept.shape[1] * numbers))
        votes = [
            votes_for(of_slots[:, None], of_blocks(own), blocks=own[:, None])[:, 0]
            for of_slots, own in zip(voters.split(step), kept.split(step), strict=True)
        ]
        return kept.gather(1, best(torch.cat(votes), most))


def scan(pattern: Pattern, means: Means, votings: Sequence[Voting]) -> list[list[Tensor | None]]:
    """Return the candidates (C,) of each slot of some votings, by the votes of its first group.

    None is all blocks but 0. Stages come one after the other, each for all slots: ranks fetch means together.
    """
    of_votings = [[*_scans(means, voting)] for voting in votings]
    scans = [*chain(*of_votings)]
    for stage in stages(pattern):
        planned = [each for each in scans if stage in each.planned]
        for each in planned:
            if stage == each.planned[0]:
                each.compare_all(stage, means)
        if stage.means == RUNS:
            continue
        later = [each for each in planned if stage != each.planned[0]]
        found: list[list[Tensor]] = [[] for _ in later]
        wanted = [(each.row, each.kept) for each in later if each.kept is not None]
        for index, some, of_blocks in means.of_wanted(stage.means, wanted):
            found[index].append(later[index].best_of(some, of_blocks, means.numbers(stage.means), stage.blocks))
        for each, parts in zip(later, found, strict=True):
            each.kept = torch.cat(parts)
    return [
        [*_known(voting), *chain(*(each.candidates() for each in some))]
        for voting, some in zip(votings, of_votings, strict=True)
    ]


def _scans(means: Means, voting: Voting) -> Iterator[Scan]:
    """Yield scans of a voting's slots, those left out whose candidates are known."""
    pattern, limit = voting.pattern, limits_of(means.fine).scores

    def alike(slot: Slot) -> tuple[object, int]:
        planned = stages(pattern, slot.blocks - 1)
        return planned, slot.blocks % RUN if planned and planned[0].means == RUNS else 0

    def most(slot: Slot) -> int:
        planned = stages(pattern, slot.blocks - 1)
        compared = planned[0].compared(slot.blocks) if planned else 0
        return limit // (VOTERS // 2 * voting.heads * compared) if compared else len(voting.slots)

    slots = voting.slots[len(_known(voting)) :]
    yield from (Scan(voting, some) for some in batches(slots, alike, pattern.scan_every, most))


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


def not_before(first: int, stop: int, before: Tensor | int) -> Tensor | None:
    """Return which of [first, stop) are not below each of the numbers `before` (n, 1): (n, C); None if all are."""
    return None if isinstance(before, int) else torch.arange(first, stop, device=before.device) >= before
