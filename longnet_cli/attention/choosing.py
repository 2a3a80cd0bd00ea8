"""The choice of blocks: beyond a window, the content decides which keys of the past a query sees.

A document's keys form blocks of B = `chosen_block`, its queries groups of `chosen_every`. The near keys of a group
start at n, and the blocks before n are candidates. Block 0 is always seen. Of the others, a group sees those that
its text names and those that its queries vote for:

    means    of neighbouring keys, un-rotated: what a block is compared by. At last, of MEAN_OF keys each
    voters   the VOTERS queries that end with the group's first, un-rotated, of every head
    scan     at the start of every SCAN tokens, every second voter compares coarse means of all blocks, in stages
             (`groups.stages`); those that remain are the candidates of all groups in these tokens
    votes    for each voter and head, the softmax of its scores with the means of all candidates. A block's score is the
             mean of its share; NEIGHBOUR of its predecessor's, if more
    finds    the same with the mean of the share's third power, where a few sure heads count more than many that guess,
             and CARRIED of what the layer that chose before has found besides: its best blocks are candidates, too
    names    blocks that come from outside, by `Names`: attention knows no text
    choice   up to a quarter of the blocks by names, a quarter by finds, the others by votes

With `chosen_exact`, the best so many candidates get new votes and finds, by all of their keys.

Only some layers choose (`Pattern.chosen_layers`). The layers after each of them see the same blocks, and those before
the first see block 0 alone.

N tokens, H query heads, K key heads, D head_dim, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import GroupedPart, slot_of, stages
from .past import Means, unrotated
from .pattern import CARRIED, FOUND, NEIGHBOUR, RUN, RUNS, SURE, VOTERS, Pattern
from .sinks import Turn

SCORES = 1 << 20  # scores of a scan that exist at a time

# (row of the batch, part) -> blocks (groups, n) that the text of each group names, the best first, and -1 for none
Names = Callable[[int, GroupedPart], Tensor]
# (blocks (n,), ascending) -> their keys (n, tokens of a block, K, D), as they are stored
KeysOf = Callable[[Tensor], Tensor]
Blocks = list[list[Tensor]]  # of each part, and of each of its rows: (groups, m) int32, ascending


class Finds(NamedTuple):
    """The blocks (groups, n) that a layer was surest of, for each group, and their finds (groups, n)."""

    blocks: Tensor
    scores: Tensor


class Choices:
    """The choices of all layers of a forward pass, and what the text names."""

    def __init__(self, named: Names | None = None) -> None:
        self.named = named
        self.made: dict[int, Blocks] = {}  # by layer
        self.finds: dict[int, dict[tuple[int, int, int], Finds]] = {}  # by layer, and row, first column and position


class LayerChoices(NamedTuple):
    """The choices of a forward pass of a net with a `pattern`, for one of its layers."""

    choices: Choices
    pattern: Pattern
    layer: int

    def followed(self) -> Blocks:
        """Return what the layer has chosen whose blocks this layer sees. Raises ValueError if it has not run."""
        source = self.pattern.source(self.layer)
        assert source is not None
        if source not in self.choices.made:
            raise ValueError(f"layer {self.layer} sees the blocks that layer {source} chooses, which has not run")
        return self.choices.made[source]

    def leave(self, blocks: Blocks) -> None:
        """Leave what this layer has chosen to the layers that follow it."""
        self.choices.made[self.layer] = blocks

    def earlier(self, row: int, part: GroupedPart) -> Finds | None:
        """Return what the layer that chose before has found for a part's groups, if there is one."""
        before = max((layer for layer in self.choices.finds if layer < self.layer), default=None)
        return None if before is None else self.choices.finds[before].get(_place(row, part))

    def leave_finds(self, row: int, part: GroupedPart, finds: Finds) -> None:
        """Leave what this layer has found for a part's groups to the next one that chooses."""
        self.choices.finds.setdefault(self.layer, {})[_place(row, part)] = finds

    def named(self, row: int, part: GroupedPart) -> Tensor | None:
        """Return what `Names` returns, or None without names."""
        return self.choices.named(row, part) if self.choices.named else None


def _place(row: int, part: GroupedPart) -> tuple[int, int, int]:
    return row, part.columns.start, part.groups.first


class Voting(NamedTuple):
    """All that the choice of a part's groups depends on, in one row of a batch: see `choose`.

    row: the row of `means`. queries: positions (n,) -> un-rotated, scaled queries (n, H, D). scanned: the candidates
    (C,) of the first group's slot, if they are known. named: what `Names` gives, if there is any. earlier: what the
    layer that chose before has found.
    """

    pattern: Pattern
    part: GroupedPart
    means: Means
    row: int
    queries: Callable[[Tensor], Tensor]
    keys: KeysOf
    turn: Turn | None
    scanned: Tensor | None
    named: Tensor | None
    earlier: Finds | None


class Choice(NamedTuple):
    """The blocks (groups, m) that a part's groups see, the candidates (C,) of the last group's slot, both ascending."""

    blocks: Tensor
    candidates: Tensor
    finds: Finds


def choose(voting: Voting) -> Choice:
    """Return the choice of a part's groups: they have the same near keys, and more blocks before than they may see."""
    pattern, groups = voting.pattern, voting.part.groups
    first = groups.first // pattern.chosen_every * pattern.chosen_every
    firsts = range(first, first + groups.number * pattern.chosen_every, pattern.chosen_every)
    slots = [(slot, [*some]) for slot, some in groupby(firsts, lambda first: slot_of(pattern, groups.near, first))]
    candidates = _scan(voting, [slot for slot, _ in slots])
    seen, done = [], 0
    for (_, some), own in zip(slots, candidates, strict=True):
        mine = slice(done, done + len(some))
        named = None if voting.named is None else voting.named[mine]
        earlier = voting.earlier and Finds(*(x[mine] for x in voting.earlier))
        seen.append(_seen(voting, some, own, named, earlier))
        done += len(some)
    blocks, best, scores = (torch.cat(x) for x in zip(*seen, strict=True))
    return Choice(blocks.int(), candidates[-1], Finds(best, scores))


def _scan(voting: Voting, slots: Sequence[int]) -> list[Tensor]:
    """Return the candidates (C,) of each slot, by the votes of its first group."""
    number = voting.part.groups.near // voting.pattern.chosen_block
    planned = stages(voting.pattern, number - 1)
    if not planned:
        return [torch.arange(1, number, device=voting.means.fine.device)] * len(slots)
    candidates = [] if voting.scanned is None else [voting.scanned]
    unknown = slots[len(candidates) :]
    while unknown:
        voters = _voters(voting, unknown[:1])[:, 1::2]
        step = max(1, SCORES // (voters.shape[1:3].numel() * planned[0].compared(number)))
        some, unknown = unknown[:step], unknown[step:]
        voters, kept = _voters(voting, some)[:, 1::2], None
        for stage in planned:
            means = voting.means.of[stage.means][voting.row]
            narrow = _best_runs if stage.means == RUNS else _best_blocks
            kept = narrow(voters, means, kept, number, stage.blocks)
        assert kept is not None
        candidates += kept.unbind()
    return candidates


def _best_runs(voters: Tensor, runs: Tensor, _: Tensor | None, number: int, most: int) -> Tensor:
    """Return the blocks (slots, n) of the best runs. The first run and blocks after the last whole one always stay.

    The first run holds block 0, whose keys are like no others. runs: means (K, runs, 1, D).
    """
    whole, own = number // RUN, torch.arange(RUN, device=runs.device)
    best = 1 + _best(_with_neighbours(_shares(voters, runs[:, 1:whole]).mean((0, 2))), most // RUN - 1)
    blocks = (best[..., None] * RUN + own).flatten(1)
    rest = torch.arange(whole * RUN, number, device=runs.device)
    return torch.cat([own[1:].expand(len(best), -1), blocks, rest.expand(len(best), -1)], 1)


def _best_blocks(voters: Tensor, means: Tensor, kept: Tensor | None, number: int, most: int) -> Tensor:
    """Return the `most` best (slots, most) of the blocks that are `kept` (slots, n), or of all from 1 to `number`."""
    if kept is None:
        scores = _with_neighbours(_shares(voters, means[:, 1:number]).mean((0, 2)))
        return 1 + _best(scores, most)
    shares = [_shares(v[None], _taken(means, own)).mean((0, 2)) for v, own in zip(voters, kept, strict=True)]
    return kept.gather(1, _best(_with_neighbours(torch.cat(shares), kept), most))


def _seen(
    voting: Voting, firsts: Sequence[int], candidates: Tensor, named: Tensor | None, earlier: Finds | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the blocks (groups, m) that the groups of one slot see, and the parts of their `Finds`."""
    pattern, voters = voting.pattern, _voters(voting, firsts)
    compared, own = candidates, None
    if earlier:  # each group has its own candidates besides: what a later group has found must not matter
        compared = torch.cat([candidates, earlier.blocks.flatten()]).unique()
        own = torch.isin(compared, candidates) | (compared[:, None] == earlier.blocks[:, None]).any(2)
    blocks = compared.expand(len(firsts), -1)
    votes, finds = votes_and_finds(voters, _taken(voting.means.fine[voting.row], compared), blocks, own)
    if pattern.chosen_exact:
        best = _best(torch.maximum(votes, finds), min(pattern.chosen_exact, len(candidates)))
        some = blocks.gather(1, best)
        exact = [_exact_votes(voting, v[None], own) for v, own in zip(voters, some, strict=True)]
        votes, finds = (torch.zeros_like(votes).scatter(1, best, torch.cat(x)) for x in zip(*exact, strict=True))
    if earlier:
        finds = finds.scatter_add(1, torch.searchsorted(compared, earlier.blocks), CARRIED * earlier.scores)
    surest = _best(finds, min(2 * (pattern.chosen - 1), len(candidates)))
    picked = _picked(pattern, blocks, votes, finds, named)
    return picked, blocks.gather(1, surest), finds.gather(1, surest)


def _exact_votes(voting: Voting, voters: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the votes and finds (1, n) for blocks (n,) of one group, by all of their keys."""
    keys = voting.keys(blocks)
    inside = torch.arange(keys.shape[1], device=blocks.device)
    positions = (blocks[:, None] * keys.shape[1] + inside).flatten()
    keys = unrotated(keys.flatten(0, 1)[None], positions, voting.turn)[0].unflatten(0, keys.shape[:2])
    return votes_and_finds(voters, keys.permute(2, 0, 1, 3), blocks[None])


def _picked(pattern: Pattern, blocks: Tensor, votes: Tensor, finds: Tensor, named: Tensor | None) -> Tensor:
    """Return the blocks (groups, m) that are seen: block 0, those that are named, and the best by votes and finds.

    blocks, votes and finds are (groups, C).
    """
    if named is not None:  # a named block has the best vote, whether it is a candidate or not
        same = named[:, :, None] == blocks[:, None]
        votes = votes.masked_fill(same.any(1), torch.inf)
        more = votes.new_full(named.shape, -torch.inf).masked_fill((named > 0) & ~same.any(2), torch.inf)
        blocks, votes = torch.cat([blocks, named], 1), torch.cat([votes, more], 1)
        finds = torch.cat([finds, torch.full_like(more, -torch.inf)], 1)
    of_finds = pattern.chosen // FOUND
    own = _best(votes, pattern.chosen - 1 - of_finds)
    others = _best(finds.scatter(1, own, -torch.inf), of_finds)
    seen = blocks.gather(1, torch.cat([own, others], 1)).sort(1).values
    return torch.cat([seen.new_zeros(len(seen), 1), seen], 1)


def _voters(voting: Voting, firsts: Sequence[int]) -> Tensor:
    """Return the voters (groups, VOTERS, H, D) of groups with these first positions."""
    positions = torch.tensor(firsts)[:, None] + torch.arange(1 - VOTERS, 1)
    return voting.queries(positions.flatten()).unflatten(0, positions.shape)


def votes_and_finds(voters: Tensor, means: Tensor, blocks: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return votes and finds (groups, C) of voters (groups, n, H, D) for blocks (groups, C), means (K, C, m, D).

    A group compares its `own` blocks (groups, C) alone, if not all; the others get -1.
    """
    shares = _shares(voters, means, own)
    finds = (shares**SURE).mean((0, 2)) ** (1 / SURE)
    votes, finds = (_with_neighbours(x, blocks) for x in (shares.mean((0, 2)), finds))
    return (votes, finds) if own is None else (votes.where(own, -1), finds.where(own, -1))


def _shares(voters: Tensor, means: Tensor, own: Tensor | None = None) -> Tensor:
    """Return the share of each block (K, groups, n * H / K, C) for voters (groups, n, H, D); means (K, C, m, D).

    Blocks that are not a group's `own` (groups, C) have none.
    """
    by_head = voters.unflatten(2, (len(means), -1)).permute(2, 0, 1, 3, 4).flatten(2, 3)
    scores = (by_head.flatten(1, 2) @ means.flatten(1, 2).mT).unflatten(1, by_head.shape[1:3])
    scores = scores.unflatten(-1, means.shape[1:3])
    if own is not None:
        scores = scores.masked_fill(~own[:, None, :, None], -torch.inf)
    return scores.flatten(-2).softmax(-1).unflatten(-1, means.shape[1:3]).sum(-1)


def _taken(means: Tensor, blocks: Tensor) -> Tensor:
    """Return the means (K, n, m, D) of some blocks (n,); means (K, blocks, m, D)."""
    taken = means.new_empty(len(means), len(blocks), *means.shape[2:])
    for of_head, into in zip(means, taken, strict=True):  # for all heads at once, index_select would copy them whole
        torch.index_select(of_head, 0, blocks, out=into)
    return taken


def _with_neighbours(scores: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Return scores (groups, C) where the block after a good one is nearly as good; `blocks` None is all in a row."""
    before = NEIGHBOUR * scores[:, :-1]
    if blocks is not None:
        before = before.where(blocks.diff() == 1, 0)
    return torch.cat([scores[:, :1], torch.maximum(scores[:, 1:], before)], 1)


def _best(scores: Tensor, number: int) -> Tensor:
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
