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

With `chosen_exact`, each group has a scan of its own, and the best so many of its candidates get new votes, by all of
their keys.

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
from .past import Means
from .pattern import NEIGHBOUR, RUN, RUNS, SURE, VOTERS, Pattern

SCORES = 1 << 20  # scores of a scan that exist at a time

# (row of the batch, part) -> blocks (groups, n) that the text of each group names, the best first, and -1 for none
Names = Callable[[int, GroupedPart], Tensor]
Blocks = list[list[Tensor]]  # of each part, and of each of its rows: (groups, m) int32, ascending


class Choices:
    """The choices of all layers of a forward pass, and what the text names."""

    def __init__(self, named: Names | None = None) -> None:
        self.named = named
        self.made: dict[int, Blocks] = {}  # by layer


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

    def earlier(self, part: int, row: int) -> Tensor | None:
        """Return the blocks (groups, m) that a part's row sees in the layer that chose before, if there is one."""
        before = max((layer for layer in self.choices.made if layer < self.layer), default=None)
        return None if before is None else self.choices.made[before][part][row]

    def named(self, row: int, part: GroupedPart) -> Tensor | None:
        """Return what `Names` returns, or None without names."""
        return self.choices.named(row, part) if self.choices.named else None


class Unrotated(NamedTuple):
    """The queries and keys of a document, in one row of a batch, as votes compare them: un-rotated.

    queries: positions (n,) -> scaled queries (n, H, D).
    keys: blocks (n,), ascending -> keys (n, tokens of a block, K, D).
    """

    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]

    def voters(self, firsts: Sequence[int]) -> Tensor:
        """Return the voters (groups, VOTERS, H, D) of groups with these first positions."""
        positions = torch.tensor(firsts)[:, None] + torch.arange(1 - VOTERS, 1)
        return self.queries(positions.flatten()).unflatten(0, positions.shape)


class Voting(NamedTuple):
    """All that the choice of a part's groups depends on, in one row of a batch: see `choose`.

    row: the row of `means`. scanned: the candidates (C,) of the first group's slot, if they are known. named: what
    `Names` gives, if there is any. earlier: the blocks (groups, m) that the groups see in the layer that chose before.
    """

    pattern: Pattern
    part: GroupedPart
    means: Means
    row: int
    document: Unrotated
    scanned: Tensor | None
    named: Tensor | None
    earlier: Tensor | None


class Choice(NamedTuple):
    """The blocks (groups, m) that a part's groups see, the candidates (C,) of the last group's slot, both ascending."""

    blocks: Tensor
    candidates: Tensor


def choose(voting: Voting) -> Choice:
    """Return the choice of a part's groups: they have the same near keys, and more blocks before than they may see."""
    pattern, groups = voting.pattern, voting.part.groups
    firsts = _firsts(pattern, voting.part)
    slots = [(slot, [*some]) for slot, some in groupby(firsts, lambda first: slot_of(pattern, groups.near, first))]
    candidates = _scan(voting, [slot for slot, _ in slots])
    seen, done = [], 0
    for (_, some), own in zip(slots, candidates, strict=True):
        mine = slice(done, done + len(some))
        named, earlier = (None if x is None else x[mine] for x in (voting.named, voting.earlier))
        seen.append(_seen(voting, some, own, named, earlier))
        done += len(some)
    return Choice(torch.cat(seen).int(), candidates[-1])


def votes_by_keys(pattern: Pattern, part: GroupedPart, document: Unrotated, some: slice, blocks: Tensor) -> Tensor:
    """Return the votes (groups, m) of some groups of a part for blocks (groups, m), block 0 and others, ascending."""
    voters = document.voters(_firsts(pattern, part)[some])
    votes = [_exact_votes(document, v[None], own[1:].long()) for v, own in zip(voters, blocks, strict=True)]
    return torch.nn.functional.pad(torch.cat(votes), (1, 0))


def _firsts(pattern: Pattern, part: GroupedPart) -> range:
    """Return the first position of each group of a part, also of tokens before the part."""
    every, groups = pattern.chosen_every, part.groups
    first = groups.first // every * every
    return range(first, first + groups.number * every, every)


def _scan(voting: Voting, slots: Sequence[int]) -> list[Tensor]:
    """Return the candidates (C,) of each slot, by the votes of its first group."""
    number = voting.part.groups.near // voting.pattern.chosen_block
    planned = stages(voting.pattern, number - 1)
    if not planned:
        return [torch.arange(1, number, device=voting.means.fine.device)] * len(slots)
    candidates = [] if voting.scanned is None else [voting.scanned]
    unknown = slots[len(candidates) :]
    while unknown:
        voters = voting.document.voters(unknown[:1])[:, 1::2]
        step = max(1, SCORES // (voters.shape[1:3].numel() * planned[0].compared(number)))
        some, unknown = unknown[:step], unknown[step:]
        voters, kept = voting.document.voters(some)[:, 1::2], None
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
    best = 1 + _best(_with_neighbours(shares_of(voters, runs[:, 1:whole]).mean((0, 2))), most // RUN - 1)
    blocks = (best[..., None] * RUN + own).flatten(1)
    rest = torch.arange(whole * RUN, number, device=runs.device)
    return torch.cat([own[1:].expand(len(best), -1), blocks, rest.expand(len(best), -1)], 1)


def _best_blocks(voters: Tensor, means: Tensor, kept: Tensor | None, number: int, most: int) -> Tensor:
    """Return the `most` best (slots, most) of the blocks that are `kept` (slots, n), or of all from 1 to `number`."""
    if kept is None:
        scores = _with_neighbours(shares_of(voters, means[:, 1:number]).mean((0, 2)))
        return 1 + _best(scores, most)
    shares = [shares_of(v[None], _taken(means, own)).mean((0, 2)) for v, own in zip(voters, kept, strict=True)]
    return kept.gather(1, _best(_with_neighbours(torch.cat(shares), kept), most))


def _seen(
    voting: Voting, firsts: Sequence[int], candidates: Tensor, named: Tensor | None, earlier: Tensor | None
) -> Tensor:
    """Return the blocks (groups, m) that the groups of one slot see."""
    pattern, voters = voting.pattern, voting.document.voters(firsts)
    compared, own = candidates, None
    if earlier is not None:  # each group has its own ones besides: what a later group sees must not matter
        earlier = earlier[:, 1:].long()
        compared = torch.cat([candidates, earlier.flatten()]).unique()
        own = torch.isin(compared, candidates) | (compared[:, None] == earlier[:, None]).any(2)
    blocks = compared.expand(len(firsts), -1)
    votes = _votes(voters, _taken(voting.means.fine[voting.row], compared), blocks, own)
    if pattern.chosen_exact:
        best = _best(votes, min(pattern.chosen_exact, len(candidates)))
        exact = [_exact_votes(voting.document, v[None], x) for v, x in zip(voters, blocks.gather(1, best), strict=True)]
        votes = torch.zeros_like(votes).scatter(1, best, torch.cat(exact))
    return _picked(pattern, blocks, votes, named)


def _exact_votes(document: Unrotated, voters: Tensor, blocks: Tensor) -> Tensor:
    """Return the votes (1, n) for blocks (n,) of one group, by all of their keys."""
    return _votes(voters, document.keys(blocks).permute(2, 0, 1, 3), blocks[None])


def _picked(pattern: Pattern, blocks: Tensor, votes: Tensor, named: Tensor | None) -> Tensor:
    """Return the blocks (groups, m) that are seen: block 0, those that are named, and the best by votes.

    blocks and votes are (groups, C).
    """
    if named is not None:  # a named block has the best vote, whether it is a candidate or not
        same = named[:, :, None] == blocks[:, None]
        votes = votes.masked_fill(same.any(1), torch.inf)
        more = votes.new_full(named.shape, -torch.inf).masked_fill((named > 0) & ~same.any(2), torch.inf)
        blocks, votes = torch.cat([blocks, named], 1), torch.cat([votes, more], 1)
    seen = blocks.gather(1, _best(votes, pattern.chosen - 1)).sort(1).values
    return torch.cat([seen.new_zeros(len(seen), 1), seen], 1)


def _votes(voters: Tensor, means: Tensor, blocks: Tensor, own: Tensor | None = None) -> Tensor:
    """Return the votes (groups, C) of voters (groups, n, H, D) for blocks (groups, C) with means (K, C, m, D).

    A group compares its `own` blocks (groups, C) alone, if not all; the others get -1.
    """
    votes = (shares_of(voters, means, own) ** SURE).mean((0, 2)) ** (1 / SURE)
    votes = _with_neighbours(votes, blocks)
    return votes if own is None else votes.where(own, -1)


def shares_of(voters: Tensor, means: Tensor, own: Tensor | None = None) -> Tensor:
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
