"""The branch of chosen blocks: beyond a window, the content decides which keys of the past a query sees.

A document's keys form blocks of B = `chosen_block`, its queries groups of `chosen_every`. The near keys of a group
start at n, and the blocks before n are candidates. Block 0 is always seen. The others get votes:

    means    of MEAN_OF neighbouring keys, un-rotated: what a block is compared by
    votes    of the VOTERS queries that end with the group's first, un-rotated, of every head: for each, the softmax of
             its scores with all means. A block's score is the mean of its share; 0.99 of its predecessor's, if more
    finds    the same with the mean of the share's third power, where a few sure heads count more than many that guess,
             and 0.8 of what the layer before has found besides (`LayerFinds`): so later layers see it, too
    choice   three quarters of the blocks by votes, the others by finds. If there are many candidates, coarser means and
             every second voter decide first which are compared

All heads see the same blocks, so a block is one piece of memory. The m blocks that a group sees stand right before n,
without gaps: block j as if its first key stood at n - (m - j) B. The shift is one per block, and `turn` turns its keys.

The choice is a constant in the backward pass. Everything else is a branch like any other, on gathered keys, in batches
of groups. A call that is computed again for a backward pass does not choose again, if its `Past` keeps the choice.

N tokens, H query heads, K key heads, D head_dim, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .branches import Branch
from .groups import ChoiceStage, GroupedPart, stages
from .merging import GradientSum, Merge, accumulator, strided_view
from .past import Means, Past, unrotated
from .pattern import CARRIED, FOUND, NEIGHBOUR, SURE, VOTERS, Pattern
from .plain_call import Kernel
from .sinks import Turn
from .spans import Rows

if TYPE_CHECKING:
    from .one_pass import OnePassGradientSum, OnePassMerge

GATHERED = 1 << 20  # numbers of gathered keys that exist at a time: 4 MiB in fp32, which a cache of a CPU holds
SCORES = 1 << 20  # and of scores of votes


class FoundBlocks(NamedTuple):
    """The candidates (groups, n) that the layers so far were surest of, ascending, and their scores (groups, n)."""

    candidates: Tensor
    scores: Tensor


Call = list[list[FoundBlocks] | None]  # of each part, the rows of the batch; None where nobody has voted


class Finds:
    """The finds of all layers of a forward pass: `calls`, by layer and place.

    It may serve many passes, one after the other, and layers that are computed again for gradients.
    """

    def __init__(self) -> None:
        self.calls: dict[tuple[int, int], Call] = {}


class LayerFinds(NamedTuple):
    """The finds of a forward pass, for one call of one layer.

    `place` tells the calls of a layer apart. Layers come in order; some may have none.
    """

    finds: Finds
    layer: int
    place: int = 0

    def before(self) -> Call | None:
        """Return what the layer before has found, if there is one."""
        keys = ((layer, self.place) for layer in reversed(range(self.layer)))
        key, calls = next((key for key in keys if key in self.finds.calls), None), self.finds.calls
        if key is None:
            return None
        return calls.pop(key) if torch.is_inference_mode_enabled() else calls[key]

    def leave(self, call: Call) -> None:
        """Leave what this layer has found to the next one. What later layers have left is of an earlier pass."""
        calls = self.finds.calls
        for key in [key for key in calls if key[0] > self.layer]:
            del calls[key]
        calls[self.layer, self.place] = call


class Chosen:
    """The chosen blocks of one call of `dilated_attention`, for all `parts` of its batch.

    `choose` comes first; `merge` and `gradients` attend to what was chosen. `blocks` holds the choice for each part
    and row: (groups, m) int32, ascending. `past` holds the tokens before the shard, if there are any, and `finds` what
    the layers before have found.
    """

    def __init__(
        self,
        pattern: Pattern,
        parts: Sequence[GroupedPart],
        turn: Turn | None,
        past: Past | None = None,
        finds: LayerFinds | None = None,
    ) -> None:
        self.pattern, self.parts, self.turn, self.past, self.finds = pattern, parts, turn, past, finds
        self.blocks: list[list[Tensor]] = []

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Choose blocks for queries q (B, N, H, D) among the keys k (B, N, K, D) and those of the past."""
        kept = None
        if self.past:
            self.past.settle(self.turn)
            kept = self.past.choices
            if kept is not None and self.past.position in kept:
                self.blocks = kept[self.past.position]
                return
        own: Call = [None] * len(self.parts)
        earlier = (self.finds and self.finds.before()) or own
        found: dict[tuple[int, int], Means] = {}  # by first row and first token of a document
        last = {(part.rows.start, part.columns.start): part.groups.near for part in self.parts}
        for number, part in enumerate(self.parts):
            rows = range(part.rows.start, part.rows.stop)
            blocks = part.groups.near // self.pattern.chosen_block
            group = part.groups.first // self.pattern.chosen_every * self.pattern.chosen_every
            if blocks <= self.pattern.chosen:
                self.blocks.append([torch.arange(blocks, dtype=torch.int32, device=q.device)[None]] * len(rows))
                continue
            open_group = self._past(part) if group < part.start else None  # all of its voters are in the past
            if open_group and open_group.held and open_group.held[0] == group:
                self.blocks.append(open_group.held[1][part.rows])
                continue
            place = rows.start, part.columns.start
            if place not in found:
                found[place] = self._means(k[part.rows, part.columns], part, last[place])
            before: Sequence[FoundBlocks | None] = earlier[number] or [None] * len(rows)
            voted = [
                self._voted(q[row, part.columns], row, part, found[place], scale, finds)
                for row, finds in zip(rows, before, strict=True)
            ]
            own[number] = [left for _, left in voted]
            chosen = [torch.cat([x.new_zeros(len(x), 1), x + 1], 1).int() for x, _ in voted]
            if open_group and len(rows) == len(q):
                open_group.held = group, chosen
            self.blocks.append(chosen)
            if self.past and not part.columns.start and group >= part.start:  # each group once
                self.past.count(part, chosen, len(q))
        if self.finds:
            self.finds.leave(own)
        if self.past and kept is not None:
            kept[self.past.position] = self.blocks
        if self.past and self.past.on_choice:
            for part, of_rows in zip(self.parts, self.blocks, strict=True):
                self.past.on_choice(part, of_rows)

    def merge(self, kernel: Kernel, scale: float, q: Tensor, k: Tensor, v: Tensor, merge: Merge | OnePassMerge) -> None:
        """Attend from q to the chosen rows of k and v, and merge the results."""
        for call in self._calls(kernel, q, k):
            q_, *places = (call.queries(x) for x in (q, *merge.places))
            k_, v_ = call.keys(k, v)
            part, lse = kernel.forward(_folded(q_, k), call.turned(k_, self.turn), call.in_groups(v_), False, scale)
            merge.add(call.branch, places, part.reshape(q_.shape), lse.reshape(q_.shape[:-1]))

    def gradients(
        self,
        kernel: Kernel,
        scale: float,
        tensors: Sequence[Tensor],
        keys: Sequence[Tensor],
        of_q: GradientSum | OnePassGradientSum,
    ) -> list[Tensor]:
        """Return the gradients of the chosen rows of k and v, in fp32 or fp64, and add those of q to `of_q`.

        `tensors` are dout, q, and the merged out and lse (B, N, H, 1); `keys` are k and v. Gradients of the past are
        added to `past.gradients`.
        """
        _, q, _, _ = tensors
        found = [torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) for x in keys]
        for call in self._calls(kernel, q, keys[0]):
            place, *queries = (call.queries(x) for x in (of_q.place, *tensors))
            dout_, q_, out_, lse_ = (_folded(x, keys[0]) for x in queries)
            k_, v_ = call.keys(*keys)
            k_ = call.turned(k_, self.turn)
            dq, dk, dv = kernel.backward(dout_, q_, k_, call.in_groups(v_), out_, lse_[..., 0], False, scale)
            of_q.add(place, dq.reshape(queries[1].shape), call.branch.queries, fresh=False)
            for index, d in enumerate((call.turned_back(dk, self.turn), call.in_blocks(dv))):
                call.add(found[index], d, index)
        return found

    def _past(self, part: GroupedPart) -> Past | None:
        """Return the past of the document of a part; only the first document of a shard has any."""
        return self.past if part.start else None

    def _calls(self, kernel: Kernel, q: Tensor, k: Tensor) -> Iterator[_GroupCall]:
        heads, (kv_heads, head_dim) = q.shape[2], k.shape[2:]
        for part, of_rows in zip(self.parts, self.blocks, strict=True):
            for row, blocks in enumerate(of_rows, part.rows.start):
                queries, keys = part.groups.queries, blocks.shape[1] * self.pattern.chosen_block
                most = kernel.max_batch(kv_heads, max(heads // kv_heads * queries, keys), head_dim)
                step = max(1, min(most, GATHERED // (keys * kv_heads * head_dim)))
                for first in range(0, len(blocks), step):
                    some = blocks[first : first + step].long()
                    yield _GroupCall.of(self.pattern, part, self._past(part), row, first, some, heads)

    def _means(self, k: Tensor, part: GroupedPart, stop: int) -> Means:
        """Return the means of a document's blocks before position `stop`, for keys k (rows, N, K, D) of the shard."""
        past, size = self._past(part), self.pattern.chosen_block
        if not past:
            means = Means(self.pattern, k, stop // size)
            means.write(slice(None), 0, k[:, :stop], self.turn)
            return means
        if past.means is None:
            past.means = Means(self.pattern, past.waiting[0], stop // size, past.allocate)
        if past.blocks.number * size < stop:  # written behind those of the past, until its own take their place
            keys = torch.cat([past.waiting[0, part.rows], k[:, : stop - part.start]], 1)
            past.means.write(part.rows, past.blocks.number, keys, self.turn)
        return past.means

    def _voted(
        self, q: Tensor, row: int, part: GroupedPart, means: Means, scale: float, earlier: FoundBlocks | None
    ) -> tuple[Tensor, FoundBlocks]:
        """Return what `_chosen` does for all groups, by the votes of q (N, H, D), tokens of the document."""
        number, every = part.groups.number, self.pattern.chosen_every
        start = part.groups.first // every * every
        step = min(every, VOTERS)  # groups that are closer share voters
        if every < VOTERS:
            positions = torch.arange(start + 1 - VOTERS, start + 1 + (number - 1) * every)
        else:
            places = torch.arange(1 - VOTERS, 1)
            positions = (torch.arange(start, start + number * every, every)[:, None] + places).flatten()
        inside = (positions - part.start).to(q.device)
        voters = q[inside.clamp(min=0)]
        if (past := self._past(part)) and (before := int((positions < part.start).sum())):
            assert past.queries is not None
            voters[:before] = past.queries[row, inside[:before]]  # counted from the end
        voters = unrotated(voters[None], positions, self.turn)[0] * scale
        own = row if past else row - part.rows.start
        candidates = part.groups.near // self.pattern.chosen_block - 1
        of_many, *_ = planned = stages(self.pattern, candidates)
        funnel = [(means.of[stage.means][own, :, 1 : 1 + candidates], stage) for stage in planned]
        size = max(1, SCORES // (of_many.voters * of_many.means * q.shape[1] * candidates))
        found = []
        for first in range(0, number, size):
            some = voters[first * step : (min(first + size, number) - 1) * step + VOTERS]
            carried = earlier and FoundBlocks(*(x[first : first + size] for x in earlier))
            found.append(_chosen(some, step, funnel, carried))
        chosen, left = zip(*found, strict=True)
        return torch.cat(chosen), FoundBlocks(*(torch.cat(x) for x in zip(*left, strict=True)))


def _chosen(
    voters: Tensor, step: int, funnel: Sequence[tuple[Tensor, ChoiceStage]], before: FoundBlocks | None
) -> tuple[Tensor, FoundBlocks]:
    """Return the candidates (groups, number) that are seen, ascending, and what the next layer gets to know.

    The voters (n, H, D) of a group are VOTERS rows, and each next group's start `step` rows later. Each stage of the
    funnel has mean keys of all candidates (K, C, means, D). The first candidate is 0.
    """
    (means, stage), *others = funnel
    votes = _votes(voters, step, means, stage.voters, not others)
    for means, finer in others:
        kept, stage = _best(votes[0], stage.blocks), finer
        every, last = VOTERS // stage.voters, finer is others[-1][1]
        votes = votes.new_zeros(1 + last, *votes.shape[1:])
        for group, own in enumerate(kept):  # one at a time stays in a cache
            some = means.new_empty(len(means), len(own), *means.shape[2:])
            for x, into in zip(means, some, strict=True):
                torch.index_select(x, 0, own, out=into)
            votes[:, group, own] = _shares(voters[group * step :][every - 1 : VOTERS : every], some, last).mean(1)
        votes = _scores(votes)
    scores, found = votes
    if before:
        found.scatter_add_(1, before.candidates, CARRIED * before.scores)
    best = _best(found, min(2 * stage.blocks, found.shape[1]))
    left = FoundBlocks(best, found.gather(1, best))
    more = (stage.blocks + 1) // FOUND
    own = _best(scores, stage.blocks - more)
    rest = _best(found.scatter(1, own, float("-inf")), more)
    return torch.cat([own, rest], 1).sort(1).values, left


def _votes(voters: Tensor, step: int, means: Tensor, number: int, last: bool) -> Tensor:
    """Return the scores (1 or 2, groups, C) by `number` of each group's voters, evenly spaced (see `_chosen`)."""
    groups, every = (len(voters) - VOTERS) // step + 1, VOTERS // number
    thin = gcd(step, every)  # those between are voters of no group
    shares = _shares(voters[thin - 1 :: thin], means, last)
    places = range(every // thin - 1, VOTERS // thin, every // thin)
    total = sum((shares[:, place :: step // thin][:, :groups] for place in places), shares.new_zeros(()))
    return _scores(total / number)


def _shares(voters: Tensor, means: Tensor, last: bool) -> Tensor:
    """Return the mean share of each block over the heads of voters (n, H, D), (1, n, C); means (K, C, m, D).

    In the `last` stage, add the mean of its powers: (2, n, C).
    """
    by_head = voters.unflatten(1, (len(means), -1)).transpose(0, 1)  # (K, n, H / K, D)
    scores = by_head.flatten(1, 2) @ means.flatten(1, 2).mT
    shares = scores.softmax(-1).unflatten(2, means.shape[1:3]).sum(3).unflatten(1, by_head.shape[1:3])
    found = [shares, shares**SURE] if last else [shares]
    return torch.stack([x.sum(2).sum(0) for x in found]) / voters.shape[1]


def _scores(votes: Tensor) -> Tensor:
    """Return scores for mean shares and powers (1 or 2, groups, C): the block after a good one is nearly as good."""
    scores = torch.cat([votes[:1], votes[1:] ** (1 / SURE)])
    return torch.cat([scores[..., :1], torch.maximum(scores[..., 1:], NEIGHBOUR * scores[..., :-1])], -1)


def _best(scores: Tensor, number: int) -> Tensor:
    """Return the indices (groups, number) of the highest scores (groups, C), ascending; of equals, the earlier ones."""
    if not number:
        return scores.new_empty(len(scores), 0, dtype=torch.int64)
    scores = scores.nan_to_num(0)  # what is not finite chooses the first blocks
    least = scores.topk(number, sorted=False).values.amin(1, keepdim=True)
    more, same = scores > least, scores == least
    seen = more | (same & (same.cumsum(1) <= number - more.sum(1, keepdim=True)))
    return seen.nonzero()[:, 1].view(-1, number)


class _GroupCall(NamedTuple):
    """One call of attention: groups of one row of a batch on the tokens of their `blocks` (groups * m,).

    distances (groups * m,): positions by which each block's keys are moved; None if they stay.
    """

    size: int
    part: GroupedPart
    past: Past | None
    row: int
    branch: Branch
    blocks: Tensor
    distances: Tensor | None

    @classmethod
    def of(
        cls, pattern: Pattern, part: GroupedPart, past: Past | None, row: int, first: int, blocks: Tensor, heads: int
    ) -> _GroupCall:
        """Make the call for groups from `first` on, with these blocks (groups, m)."""
        size, every, near = pattern.chosen_block, pattern.chosen_every, part.groups.near
        groups, m = blocks.shape
        token = part.groups.first - part.start + first * every
        queries = Rows(groups, every, heads, 0, 1, part.groups.queries, 1, token, 0)
        distances = None
        if near > m * size:
            places = near - (m - torch.arange(m, device=blocks.device)) * size
            distances = (places - blocks * size).flatten()
        return cls(size, part, past, row, Branch(queries, queries, causal=False), blocks.flatten(), distances)

    def queries(self, x: Tensor) -> Tensor:
        """View the call's rows of x (B, N, H, D) as (groups, H, rows, D)."""
        return strided_view(x[self.row : self.row + 1, self.part.columns], self.branch.queries)[0]

    def keys(self, k: Tensor, v: Tensor) -> Tensor:
        """Gather the call's blocks of k and v (B, N, K, D), and of the past: (k and v, blocks, tokens, K, D)."""
        found = k.new_empty(2, len(self.blocks), self.size, *k.shape[2:])
        own, past = [self._own(x) for x in (k, v)], self.past
        if not past:
            for into, x in zip(found, own, strict=True):
                torch.index_select(x, 0, self.blocks, out=into)
            return found
        groups = self.blocks.view(self.branch.queries.segments, -1)
        edges = groups.new_tensor([past.blocks.number, self._first]).expand(len(groups), 2).contiguous()
        places = torch.searchsorted(groups, edges).tolist()
        for blocks, group, (before, inside) in zip(
            groups, found.unflatten(1, groups.shape).unbind(1), places, strict=True
        ):
            past.blocks.take(self.row, blocks[:before], group[:, :before])
            for into, x, of_past, all_of in zip(group, own, past.waiting, (k, v), strict=True):
                if before < inside:
                    ends = all_of[self.row, self.part.columns][: self.size - of_past.shape[1]]
                    torch.cat([of_past[self.row], ends], out=into[before])
                if inside < len(blocks):
                    torch.index_select(x, 0, blocks[inside:] - self._first, out=into[inside:])
        return found

    @property
    def _first(self) -> int:
        """The first block of which the shard has all tokens."""
        return -(-self.part.start // self.size)

    def _own(self, x: Tensor) -> Tensor:
        """View the whole blocks of a shard's x (B, N, K, D) as (blocks, tokens of a block, K, D)."""
        rows = x[self.row, self.part.columns][self._first * self.size - self.part.start :]
        number = len(rows) // self.size
        return rows[: number * self.size].unflatten(0, (number, self.size))

    def _places(self, past: Past) -> tuple[Tensor, Tensor, Tensor]:
        """Return masks of the blocks in the shard, of the one that the shard's start cuts, and of those before."""
        inside, before = self.blocks >= self._first, self.blocks < past.blocks.number
        return inside, ~(inside | before), before

    def in_groups(self, x: Tensor) -> Tensor:
        """Return gathered rows (blocks, tokens, K, D) as (groups, K, keys, D)."""
        return x.unflatten(0, (self.branch.queries.segments, -1)).flatten(1, 2).transpose(1, 2)

    def in_blocks(self, x: Tensor) -> Tensor:
        """Return rows (groups, K, keys, D) as (blocks, tokens, K, D)."""
        return x.transpose(1, 2).flatten(0, 1).unflatten(0, (-1, self.size))

    def turned(self, k: Tensor, turn: Turn | None) -> Tensor:
        """Return gathered keys (blocks, tokens, K, D), moved to where the groups see them, as (groups, K, keys, D)."""
        if turn and self.distances is not None:
            k = turn(k[None], self.distances)[0].to(k.dtype)
        return self.in_groups(k)

    def turned_back(self, dk: Tensor, turn: Turn | None) -> Tensor:
        """Return the gradient of the argument of `turned`, given that of its result; `turn` is linear."""
        if turn is None or self.distances is None:
            return self.in_blocks(dk)
        with torch.enable_grad():
            leaf = self.in_blocks(dk).detach().contiguous().requires_grad_()
            return torch.autograd.grad(self.turned(leaf, turn), leaf, dk)[0]

    def add(self, into: Tensor, d: Tensor, index: int) -> None:
        """Add gradients (blocks, tokens, K, D) of gathered rows to those of the shard's rows (B, N, K, D).

        Gradients of k (`index` 0) or v (1) of the past go to its sum.
        """
        d = d.to(into.dtype)
        if not self.past:
            self._own(into).index_add_(0, self.blocks, d)
            return
        inside, cut, _ = self._places(self.past)
        self._own(into).index_add_(0, self.blocks[inside] - self._first, d[inside])
        if cut.any():
            held = self.past.waiting.shape[2]
            into[self.row, self.part.columns][: self.size - held] += d[cut].sum(0)[held:]
        if self.past.gradients is not None:  # rows of the shard that are in the block it cuts are added, but never read
            into = self.past.gradients[index, self.row].unflatten(0, (-1, self.size))
            into.index_add_(0, self.blocks[~inside].to(into.device), d[~inside].to(into.device))


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """Return x (groups, H, rows, D) as (groups, K, H / K * rows, D): heads that share a key head are rows of it."""
    return x.reshape(len(x), k.shape[2], -1, x.shape[-1])
