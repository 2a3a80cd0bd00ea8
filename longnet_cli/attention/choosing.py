"""The choice of blocks: beyond a window, the content decides which keys of the past a query sees.

A document's keys form blocks of B = `chosen_block`, its queries groups of `chosen_every`. The near keys of a group
start at n, and the blocks before n are candidates. Block 0 is always seen. Of the others, a group sees those that
its text names and those that its queries vote for:

    means    of neighbouring keys, un-rotated: what a block is compared by. At last, of MEAN_OF keys each
    voters   the VOTERS queries that end with the group's first, un-rotated, of every head
    scan     at the start of every SCAN tokens, every second voter compares coarse means of all blocks, in stages
             (`groups.stages`); those that remain are the candidates of all groups in these tokens. A group also
             has the blocks that it sees in the layer that chose before: they often are the right ones
    votes    for each voter and head, the softmax of its scores with the means of all candidates. A block's vote is the
             mean of the third power of its shares, in which a few sure heads count more than many that guess; or
             NEIGHBOUR of its predecessor's, if more
    names    blocks that come from outside, by `Names`: attention knows no text
    choice   up to a quarter of the blocks by names, the others by votes

Only some layers choose (`Pattern.chosen_layers`). The layers after each of them see the same blocks, and those before
the first see block 0 alone. A scan is made for neighbouring slots of tokens together.

N tokens, H query heads, K key heads, D head_dim, C blocks or candidates, m means of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .groups import GroupedPart, limits_of, slot_of, stages
from .past import GroupBlocks, Means
from .pattern import NEIGHBOUR, SURE, VOTERS, Pattern


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
    voters: Tensor,
    means: Tensor,
    others: Tensor | None = None,
    blocks: Tensor | None = None,
    power: int = 1,
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
    for slots in batches(
        remaining, lambda slot: stages(pattern, slot.blocks - 1), pattern.scan_every, most
    ):
        candidates += _scanned(means, voting, slots)
    return candidates


def _scanned(means: Means, voting: Voting, slots: Sequence[Slot]) -> Sequence[Tensor | None]:
    """Return the candidates of neighbouring slots whose scans have the same stages."""
    planned = stages(voting.pattern, slots[0].blocks - 1)
    if not planned:
        return [None] * len(slots)
    first, *later = planned
    voters = voting.document.voters(
        range(slots[0].start, slots[-1].start + 1, voting.pattern.scan_every), 2
    )
    number, before = slots[-1].blocks, blocks_before(slots, means.fine.device)
    of_blocks, others = (
        means.of_first(first.means, voting.row, number)[:, 1:],
        not_before(1, number, before),
    )
    kept = 1 + best(votes_for(voters, of_blocks, others), first.blocks)
    for stage in later:
        step = max(1, limits_of(voters).scores // (kept.shape[1] * means.numbers(stage.means)))
        votes = [
            votes_for(
                of_slots[:, None],
                means.of_blocks(stage.means, voting.row, own),
                blocks=own[:, None],
            )[:, 0]
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
    return (
        None
        if isinstance(before, int)
        else torch.arange(start, stop, device=before.device) >= before
    )


# (row of the batch, part) -> blocks (groups, n) that the text of each group names, the best first, and -1 for none
Names = Callable[[int, GroupedPart], Tensor]


class Choices:
    """The choices of all layers of a forward pass, and what the text names."""

    def __init__(self, named: Names | None = None) -> None:
        self.named = named
        self.made: dict[int, GroupBlocks] = {}  # by layer


class LayerChoices(NamedTuple):
    """The choices of a forward pass of a net with a `pattern`, for one of its layers."""

    choices: Choices
    pattern: Pattern
    layer: int

    def followed(self) -> GroupBlocks:
        """Return what the layer has chosen whose blocks this layer sees. Raises ValueError if it has not run."""
        source = self.pattern.source(self.layer)
        assert source is not None
        if source not in self.choices.made:
            raise ValueError(
                f"layer {self.layer} sees the blocks that layer {source} chooses, which has not run"
            )
        return self.choices.made[source]

    def leave(self, blocks: GroupBlocks) -> None:
        """Leave what this layer has chosen to the layers that follow it."""
        self.choices.made[self.layer] = blocks

    def earlier(self, part: int, row: int) -> Tensor | None:
        """Return the blocks (groups, m) that a part's row sees in the layer that chose before, if there is one."""
        before = max((layer for layer in self.choices.made if layer < self.layer), default=None)
        return None if before is None else self.choices.made[before][part][row]

    def named(self, row: int, part: GroupedPart) -> Tensor | None:
        """Return what `Names` returns, or None without names."""
        return self.choices.named(row, part) if self.choices.named else None


class Choice(NamedTuple):
    """The blocks (groups, m) that the groups see, the candidates (C,) of the last group's slot, both ascending."""

    blocks: Tensor
    candidates: Tensor


def choose(means: Means, voting: Voting) -> Choice:
    """Return the choice of a voting, whose groups have more blocks before them than they may see."""
    candidates = scan(means, voting)
    blocks, votes = _side_by_side([*_votes(means, voting, candidates)])
    last = (
        torch.arange(1, voting.slots[-1].blocks, device=blocks.device)
        if candidates[-1] is None
        else candidates[-1]
    )
    return Choice(_picked(voting.pattern, blocks, votes, voting.named).int(), last)


def votes_by_keys(
    pattern: Pattern, part: GroupedPart, document: Unrotated, some: slice, blocks: Tensor
) -> Tensor:
    """Return the votes (groups, m) of some groups of a part for blocks (groups, m), block 0 and others, ascending."""
    others, voters = blocks[:, 1:].long(), document.voters(group_starts(pattern, part)[some], 1)
    step = max(1, limits_of(blocks).scores // max(1, others.shape[1] * document.block_numbers))
    votes = [
        votes_for(own[:, None], document.keys(of_groups), blocks=of_groups[:, None], power=SURE)[
            :, 0
        ]
        for own, of_groups in zip(voters.split(step), others.split(step), strict=True)
    ]
    return pad(torch.cat(votes), (1, 0))


def _vote_alike(pattern: Pattern, slot: Slot) -> object:
    """Return what is equal for slots that can vote together: they have all of their groups."""
    every = pattern.chosen_every
    cut = (
        len(slot.starts) * every < pattern.scan_every and slot.start
    )  # the shard begins or ends in it
    return bool(stages(pattern, slot.blocks - 1)), cut


def _votes(means: Means, voting: Voting, candidates: Sequence[Tensor | None]) -> Iterator[_Votes]:
    """Yield the votes of some groups at a time, whose slots have these candidates (C,), or None for all blocks."""
    pattern, slots, done, begin = voting.pattern, voting.slots, 0, 0
    starts = range(slots[0].starts[0], slots[-1].starts[-1] + 1, pattern.chosen_every)
    voters = voting.document.voters(starts, 1)  # (groups, VOTERS, H, D)
    for some in batches(
        slots, partial(_vote_alike, pattern), pattern.scan_every, lambda _: len(slots)
    ):
        stop = begin + sum(len(slot.starts) for slot in some)
        if candidates[done] is None:
            yield from _for_all(means, voting, some, voters[begin:stop])
        else:
            of_slots = torch.stack(
                [x for x in candidates[done : done + len(some)] if x is not None]
            )
            earlier = None if voting.earlier is None else voting.earlier[begin:stop, 1:].long()
            yield from _for_some(means, voting, _Compared.of(of_slots, earlier), voters[begin:stop])
        done, begin = done + len(some), stop


def _for_all(
    means: Means, voting: Voting, slots: Sequence[Slot], voters: Tensor
) -> Iterator[_Votes]:
    """Yield the votes of the groups of neighbouring slots, which compare all blocks but 0 before them."""
    number = slots[-1].blocks
    of_blocks = means.of_first(means.finest, voting.row, number)[:, 1:]
    before = blocks_before([slot for slot in slots for _ in slot.starts], of_blocks.device)
    others = not_before(1, number, before)
    step = max(
        1, limits_of(of_blocks).scores // (VOTERS * voting.heads * of_blocks[0, :, :, 0].numel())
    )
    for start in range(0, len(voters), step):
        some = slice(start, start + step)
        votes = votes_for(
            voters[some], of_blocks, None if others is None else others[some], power=SURE
        )
        yield _Votes(torch.arange(1, number, device=votes.device).expand_as(votes), votes)


def _for_some(
    means: Means, voting: Voting, compared: _Compared, voters: Tensor
) -> Iterator[_Votes]:
    """Yield the votes of the groups of neighbouring slots, which compare some blocks."""
    by_slot, finest = voters.unflatten(0, (len(compared.blocks), -1)), means.finest
    per_block = max(finest * by_slot[0, ..., 0].numel(), means.numbers(finest))
    step = max(1, limits_of(by_slot).scores // (compared.blocks.shape[1] * per_block))
    for start in range(0, len(by_slot), step):
        some = slice(start, start + step)
        width = max(compared.numbers[some])
        blocks = compared.blocks[some, :width]
        others = None if compared.others is None else compared.others[some, :, :width]
        of_blocks = means.of_blocks(finest, voting.row, blocks)
        votes = votes_for(by_slot[some], of_blocks, others, blocks[:, None], SURE).flatten(0, 1)
        yield _Votes(blocks[:, None].expand(-1, by_slot.shape[1], -1).flatten(0, 1), votes)


class _Votes(NamedTuple):
    """The votes (groups, C) of some groups for blocks (groups, C)."""

    blocks: Tensor
    votes: Tensor


def _side_by_side(votes: Sequence[_Votes]) -> _Votes:
    """Return the votes of all groups: those with fewer blocks than others get block 0, with a vote of -1."""
    if len(votes) == 1:
        return votes[0]
    groups, most = (
        sum(len(some.votes) for some in votes),
        max(some.votes.shape[1] for some in votes),
    )
    every = _Votes(
        votes[0].blocks.new_zeros(groups, most), votes[0].votes.new_full((groups, most), -1)
    )
    begin = 0
    for some in votes:
        number, width = some.votes.shape
        for into, x in zip(every, some, strict=True):
            into[begin : begin + number, :width] = x
        begin += number
    return every


class _Compared(NamedTuple):
    """The blocks (slots, C) that slots compare, ascending, and which of them each group does not (slots, groups, C).

    Without these `others`, each group compares all of them. A slot has `numbers` of them, and its last one repeated.
    """

    blocks: Tensor
    others: Tensor | None
    numbers: list[int]

    @classmethod
    def of(cls, candidates: Tensor, earlier: Tensor | None) -> _Compared:
        """Return the candidates (slots, n), which all groups compare, and `earlier` ones (slots * groups, e).

        Each group has its own earlier ones: what a later group sees must not matter.
        """
        if earlier is None:
            return cls(candidates, None, [candidates.shape[1]] * len(candidates))
        earlier = earlier.unflatten(0, (len(candidates), -1))
        both = torch.cat([candidates, earlier.flatten(1)], 1)
        ascending = both.sort(1).values
        places = pad(ascending.diff() != 0, (1, 0)).cumsum(1)  # of equals, one
        numbers = (places[:, -1] + 1).tolist()
        blocks = ascending[:, -1:].repeat(1, max(numbers)).scatter_(1, places, ascending)
        of_candidates, of_earlier = torch.searchsorted(blocks, both).split(
            [candidates.shape[1], earlier[0].numel()], 1
        )
        others = torch.ones(
            (*earlier.shape[:2], max(numbers)), dtype=torch.bool, device=blocks.device
        )
        others.scatter_(2, of_candidates[:, None].expand(-1, earlier.shape[1], -1), False)
        return cls(
            blocks, others.scatter_(2, of_earlier.unflatten(1, earlier.shape[1:]), False), numbers
        )


def _picked(pattern: Pattern, blocks: Tensor, votes: Tensor, named: Tensor | None) -> Tensor:
    """Return the blocks (groups, m) that are seen: block 0, those that are named, and the best by votes.

    blocks and votes are (groups, C).
    """
    if named is not None:  # a named block has the best vote, whether it is a candidate or not
        same = named[:, :, None] == blocks[:, None]
        votes = votes.masked_fill(same.any(1), torch.inf)
        more = votes.new_full(named.shape, -torch.inf).masked_fill(
            (named > 0) & ~same.any(2), torch.inf
        )
        blocks, votes = torch.cat([blocks, named], 1), torch.cat([votes, more], 1)
    seen = blocks.gather(1, best(votes, pattern.chosen - 1)).sort(1).values
    return torch.cat([seen.new_zeros(len(seen), 1), seen], 1)
