"""The branch of chosen blocks: beyond a window, the content decides which keys of the past a query sees.

A document's keys form blocks of B = `chosen_block`, its queries groups of `chosen_every`. The near keys of a group
start at n, and the blocks before n are candidates. Block 0 is always seen. The others get votes:

    means    of MEAN_OF neighbouring keys, un-rotated: what a block is compared by
    votes    of the VOTERS queries that end with the group's first, un-rotated, of every head: for each, the softmax of
             its scores with all means. A block's score is the mean of its share; 0.99 of its predecessor's, if more
    choice   the blocks with the highest scores. If there are many, their mean keys decide first which are compared

All heads see the same blocks, so a block is one piece of memory. The m blocks that a group sees stand right before n,
without gaps: block j as if its first key stood at n - (m - j) B. The shift is one per block, and `turn` turns its keys.

The choice is a constant in the backward pass. Everything else is a branch like any other, on gathered keys, in batches
of groups.

N tokens, H query heads, K key heads, D head_dim, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .branches import Branch
from .groups import Part
from .merging import GradientSum, Merge, accumulator, strided_view
from .pattern import MEAN_OF, NEIGHBOUR, PRESELECTED, VOTERS, Pattern
from .plain_call import Kernel
from .rows import Rows
from .sinks import Turn

if TYPE_CHECKING:
    from .one_pass import OnePassGradientSum, OnePassMerge

GATHERED = 1 << 24  # numbers of gathered keys, and of scores of votes, that exist at a time: 64 MiB in fp32
SLICE = 1 << 12  # keys that are un-rotated at a time


class Chosen:
    """The chosen blocks of one call of `dilated_attention`, for all `parts` of its batch.

    `choose` comes first; `merge` and `gradients` attend to what was chosen. `blocks` holds the choice for each part
    and row: (groups, m) int64, ascending.
    """

    def __init__(self, pattern: Pattern, parts: Sequence[Part], turn: Turn | None) -> None:
        self.pattern, self.parts, self.turn = pattern, parts, turn
        self.blocks: list[list[Tensor]] = []

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Choose blocks for queries q (B, N, H, D) among the keys k (B, N, K, D)."""
        found: dict[tuple[int, int], _Means] = {}  # by row and first token of a document
        last = {part.columns.start: part.groups.near for part in self.parts}
        for part in self.parts:
            blocks = part.groups.near // self.pattern.chosen_block
            if blocks <= self.pattern.chosen:
                every = torch.arange(blocks, device=q.device)[None]
                self.blocks.append([every] * (part.rows.stop - part.rows.start))
                continue
            chosen = []
            for row in range(part.rows.start, part.rows.stop):
                place = row, part.columns.start
                if place not in found:
                    found[place] = self._means(k[row, part.columns], last[part.columns.start])
                chosen.append(self._voted(q[row, part.columns], part, found[place], scale))
            self.blocks.append(chosen)

    def merge(self, kernel: Kernel, scale: float, q: Tensor, k: Tensor, v: Tensor, merge: Merge | OnePassMerge) -> None:
        """Attend from q to the chosen rows of k and v, and merge the results."""
        for call in self._calls(kernel, q, k):
            q_, *places = (call.queries(x) for x in (q, *merge.places))
            k_, v_ = (call.keys(x) for x in (k, v))
            part, lse = kernel.forward(_folded(q_, k), call.turned(k_, self.turn), v_.transpose(1, 2), False, scale)
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

        `tensors` are dout, q, and the merged out and lse (B, N, H, 1); `keys` are k and v.
        """
        _, q, _, _ = tensors
        found = [torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) for x in keys]
        for call in self._calls(kernel, q, keys[0]):
            place, *queries = (call.queries(x) for x in (of_q.place, *tensors))
            dout_, q_, out_, lse_ = (_folded(x, keys[0]) for x in queries)
            k_, v_ = (call.keys(x) for x in keys)
            k_ = call.turned(k_, self.turn)
            dq, dk, dv = kernel.backward(dout_, q_, k_, v_.transpose(1, 2), out_, lse_[..., 0], False, scale)
            of_q.add(place, dq.reshape(queries[1].shape), call.branch.queries, fresh=False)
            for into, d in zip(found, (call.turned_back(dk, self.turn), dv.transpose(1, 2)), strict=True):
                call.add(into, d)
        return found

    def _calls(self, kernel: Kernel, q: Tensor, k: Tensor) -> Iterator[_Call]:
        heads, (kv_heads, head_dim) = q.shape[2], k.shape[2:]
        for part, of_rows in zip(self.parts, self.blocks, strict=True):
            for row, blocks in enumerate(of_rows, part.rows.start):
                queries, keys = part.groups.queries, blocks.shape[1] * self.pattern.chosen_block
                most = kernel.max_batch(kv_heads, max(heads // kv_heads * queries, keys), head_dim)
                step = max(1, min(most, GATHERED // (keys * kv_heads * head_dim)))
                for first in range(0, len(blocks), step):
                    yield _Call.of(self.pattern, part, row, first, blocks[first : first + step], heads)

    def _means(self, k: Tensor, stop: int) -> _Means:
        """Return the means of a document's first `stop` keys, of k (N, K, D)."""
        (_, heads, head_dim), dtype = k.shape, accumulator(k.dtype)
        fine = torch.empty(heads, stop // MEAN_OF, head_dim, dtype=dtype, device=k.device)
        for first in range(0, stop, SLICE):
            keys = self._unrotated(k[first : min(first + SLICE, stop)], torch.arange(first, min(first + SLICE, stop)))
            mean = sum(keys.unflatten(0, (-1, MEAN_OF)).unbind(1)) / MEAN_OF
            fine[:, first // MEAN_OF :][:, : len(mean)] = mean.transpose(0, 1)
        return _Means.of(fine, self.pattern.chosen_block // MEAN_OF)

    def _unrotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return keys or queries (n, heads, D), turned by minus their positions (n,), in fp32 or fp64."""
        x = x.to(accumulator(x.dtype))
        return x if self.turn is None else self.turn(x[None, :, None], -positions.to(x.device))[0, :, 0]

    def _voted(self, q: Tensor, part: Part, means: _Means, scale: float) -> Tensor:
        """Return the blocks (groups, m) that each group sees, by the votes of q (N, H, D), tokens of the document."""
        number, every = part.groups.number, self.pattern.chosen_every
        start = part.groups.first // every * every
        step = min(every, VOTERS)  # groups that are closer share voters
        if every < VOTERS:
            positions = torch.arange(start + 1 - VOTERS, start + 1 + (number - 1) * every)
        else:
            places = torch.arange(1 - VOTERS, 1)
            positions = (torch.arange(start, start + number * every, every)[:, None] + places).flatten()
        voters = self._unrotated(q[(positions - part.start).to(q.device)], positions) * scale
        candidates = part.groups.near // self.pattern.chosen_block - 1
        size = max(1, GATHERED // (VOTERS * q.shape[1] * means.width(candidates)))
        found = []
        for first in range(0, number, size):
            last = min(first + size, number)
            found.append(
                means.choose(voters[first * step : (last - 1) * step + VOTERS], step, candidates, self.pattern)
            )
        chosen = torch.cat(found) + 1
        return torch.cat([chosen.new_zeros(number, 1), chosen], 1)


class _Means(NamedTuple):
    """The mean keys of a document's blocks: `fine` (K, blocks, means, D), `coarse` (K, blocks, D) of whole blocks."""

    fine: Tensor
    coarse: Tensor

    @classmethod
    def of(cls, fine: Tensor, per_block: int) -> _Means:
        fine = fine.unflatten(1, (-1, per_block))
        return cls(fine, sum(fine.unbind(2)) / per_block)  # type: ignore[arg-type]

    def width(self, candidates: int) -> int:
        """Return how many scores of a voter and head exist at a time."""
        return (
            candidates * self.fine.shape[2]
            if candidates <= PRESELECTED
            else max(candidates, PRESELECTED * self.fine.shape[2])
        )

    def choose(self, voters: Tensor, step: int, candidates: int, pattern: Pattern) -> Tensor:
        """Return the candidates (groups, chosen - 1) with the highest scores, in order; candidate 0 is block 1.

        The voters (n, H, D) of a group are VOTERS rows; each next group's start `step` rows later.
        """
        per_block, blocks = self.fine.shape[2], slice(1, 1 + candidates)
        if candidates <= PRESELECTED:
            shares = _shares(voters, self.fine[:, blocks].flatten(1, 2)).unflatten(1, (candidates, per_block)).sum(2)
            return _best(_next_too(_of_groups(shares, step)), pattern.chosen - 1)
        scores = _next_too(_of_groups(_shares(voters, self.coarse[:, blocks]), step))
        kept = _best(scores, PRESELECTED)
        scores.zero_()
        for group, (own, score) in enumerate(zip(kept, scores, strict=True)):
            fine = self.fine[:, 1:].index_select(1, own).flatten(1, 2)
            shares = _shares(voters[group * step :][:VOTERS], fine)
            score[own] = shares.sum(0).unflatten(0, (PRESELECTED, per_block)).sum(1) / VOTERS
        return _best(_next_too(scores), pattern.chosen - 1)


def _shares(voters: Tensor, means: Tensor) -> Tensor:
    """Return each voter's softmax over means (K, M, D), averaged over its heads: (n, M) for voters (n, H, D)."""
    by_head = voters.unflatten(1, (len(means), -1)).transpose(0, 1)  # (K, n, H / K, D)
    scores = by_head.flatten(1, 2) @ means.mT
    return scores.softmax(-1).unflatten(1, by_head.shape[1:3]).sum((0, 2)) / voters.shape[1]


def _of_groups(shares: Tensor, step: int) -> Tensor:
    """Return the mean (groups, C) over the voters of each group, of shares (n, C)."""
    number = (len(shares) - VOTERS) // step + 1
    return sum(shares[place::step][:number] for place in range(VOTERS)) / VOTERS  # type: ignore[return-value]


def _next_too(scores: Tensor) -> Tensor:
    """Return scores (groups, C) in which the block after a good block is nearly as good."""
    return torch.cat([scores[:, :1], torch.maximum(scores[:, 1:], NEIGHBOUR * scores[:, :-1])], 1)


def _best(scores: Tensor, number: int) -> Tensor:
    """Return the indices (groups, number) of the highest scores (groups, C), ascending; of equals, the earlier ones."""
    if not number:
        return scores.new_empty(len(scores), 0, dtype=torch.int64)
    scores = scores.nan_to_num(0)  # what is not finite chooses the first blocks
    least = scores.topk(number).values[:, -1:]
    more, same = scores > least, scores == least
    seen = more | (same & (same.cumsum(1) <= number - more.sum(1, keepdim=True)))
    return seen.nonzero()[:, 1].view(-1, number)


class _Call(NamedTuple):
    """One call of attention: groups of one row of a batch on the rows of their blocks.

    tokens (groups * keys,): tokens of the batch's row that hold the keys. distances (groups * m,): positions by which
    each block's keys are moved; None if they stay.
    """

    row: int
    columns: slice
    branch: Branch
    tokens: Tensor
    distances: Tensor | None

    @classmethod
    def of(cls, pattern: Pattern, part: Part, row: int, first: int, blocks: Tensor, heads: int) -> _Call:
        """Make the call for groups from `first` on, with these blocks (groups, m)."""
        size, every, near = pattern.chosen_block, pattern.chosen_every, part.groups.near
        groups, m = blocks.shape
        token = part.groups.first - part.start + first * every
        queries = Rows(groups, every, heads, 0, 1, part.groups.queries, 1, token, 0)
        inside = torch.arange(size, device=blocks.device)
        tokens = (blocks[..., None] * size + inside).flatten() - part.start
        distances = None
        if near > m * size:
            places = near - (m - torch.arange(m, device=blocks.device)) * size
            distances = (places - blocks * size).flatten()
        return cls(row, part.columns, Branch(queries, queries, causal=False), tokens, distances)

    def queries(self, x: Tensor) -> Tensor:
        """View the call's rows of x (B, N, H, D) as (groups, H, rows, D)."""
        return strided_view(x[self.row : self.row + 1, self.columns], self.branch.queries)[0]

    def keys(self, x: Tensor) -> Tensor:
        """Gather the call's rows of x (B, N, K, D): (groups, keys, K, D)."""
        found = x[self.row, self.columns].index_select(0, self.tokens)
        return found.unflatten(0, (self.branch.queries.segments, -1))

    def turned(self, k: Tensor, turn: Turn | None) -> Tensor:
        """Return keys (groups, keys, K, D), moved to where the groups see them, as (groups, K, keys, D)."""
        if turn and self.distances is not None:
            blocks = k.flatten(0, 1).unflatten(0, (len(self.distances), -1))
            k = turn(blocks[None], self.distances)[0].to(k.dtype).view(k.shape)
        return k.transpose(1, 2)

    def turned_back(self, dk: Tensor, turn: Turn | None) -> Tensor:
        """Return the gradient of the argument of `turned`, given that of its result; `turn` is linear."""
        if turn is None or self.distances is None:
            return dk.transpose(1, 2)
        with torch.enable_grad():
            leaf = dk.transpose(1, 2).detach().contiguous().requires_grad_()
            return torch.autograd.grad(self.turned(leaf, turn), leaf, dk)[0]

    def add(self, into: Tensor, d: Tensor) -> None:
        """Add gradients (groups, keys, K, D) of gathered rows to the gradient of all rows (B, N, K, D)."""
        into[self.row, self.columns].index_add_(0, self.tokens, d.flatten(0, 1).to(into.dtype))


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """Return x (groups, H, rows, D) as (groups, K, H / K * rows, D): heads that share a key head are rows of it."""
    return x.reshape(len(x), k.shape[2], -1, x.shape[-1])
