"""Attention to chosen blocks: gathered keys, in batches of groups of queries that see the same ones.

All heads see the same blocks, so a block is one piece of memory. The m blocks that a group sees stand right before its
near keys, at n, without gaps: block j as if its first key stood at n - (m - j) B. The shift is one per block, and
`turn` turns its keys.

The choice (`choosing`) is a constant in the backward pass. Everything else is a branch like any other. A call that is
computed again for a backward pass does not choose again, if its `Past` keeps the choice.

N tokens, H query heads, K key heads, D head_dim, B tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .branches import Branch
from .choosing import Blocks, LayerChoices, Unrotated, Voting, choose, votes_by_keys
from .groups import GroupedPart, Groups, slot_of
from .merging import GradientSum, Merge, accumulator, strided_view
from .past import Means, Past, Seen, unrotated
from .pattern import Pattern
from .plain_call import Kernel
from .sinks import Turn
from .spans import Rows

if TYPE_CHECKING:
    from .one_pass import OnePassGradientSum, OnePassMerge

GATHERED = 1 << 20  # numbers of gathered keys that exist at a time: 4 MiB in fp32, which a cache of a CPU holds


class Chosen:
    """The chosen blocks of one call of `dilated_attention`, for all `parts` of its batch.

    `choose` comes first; `merge` and `gradients` attend to what was chosen. `blocks` holds the choice for each part
    and row: (groups, m) int32, ascending. `past` holds the tokens before the shard, if there are any. `choices` is what
    the layers of a net choose; without it, the call chooses for itself.
    """

    def __init__(
        self,
        pattern: Pattern,
        parts: Sequence[GroupedPart],
        turn: Turn | None,
        past: Past | None = None,
        choices: LayerChoices | None = None,
    ) -> None:
        self.pattern, self.turn, self.past, self.choices = pattern, turn, past, choices
        self.kind = pattern.kind(choices.layer if choices else None)
        self.parts = [self._together(part) for part in parts] if self.kind == "first" else parts
        self.blocks: Blocks = []

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Choose blocks for queries q (B, N, H, D) among the keys k (B, N, K, D) and those of the past."""
        past, kept = self.past, None
        if past:
            past.settle(self.turn)
            kept = past.choices
            if kept is not None and past.position in kept:
                self.blocks = kept[past.position]
                self._leave()
                return
        if self.kind == "follows":
            assert self.choices
            self.blocks = self.choices.followed()
        else:
            means: dict[tuple[int, int], Means] = {}  # by first row and first token of a document
            self.blocks = [self._chosen(number, q, k, scale, means) for number in range(len(self.parts))]
        self._leave()
        if past and kept is not None:
            kept[past.position] = self.blocks
        if past and self.kind != "first":
            self._tell(past, q, k, scale)

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
        gradients = [torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) for x in keys]
        for call in self._calls(kernel, q, keys[0]):
            place, *queries = (call.queries(x) for x in (of_q.place, *tensors))
            dout_, q_, out_, lse_ = (_folded(x, keys[0]) for x in queries)
            k_, v_ = call.keys(*keys)
            k_ = call.turned(k_, self.turn)
            dq, dk, dv = kernel.backward(dout_, q_, k_, call.in_groups(v_), out_, lse_[..., 0], False, scale)
            of_q.add(place, dq.reshape(queries[1].shape), call.branch.queries, fresh=False)
            for index, d in enumerate((call.turned_back(dk, self.turn), call.in_blocks(dv))):
                call.add(gradients[index], d, index)
        return gradients

    def _tell(self, past: Past, q: Tensor, k: Tensor, scale: float) -> None:
        """Tell what was chosen to those who count it."""
        for index, (part, of_rows) in enumerate(zip(self.parts, self.blocks, strict=True)):
            group = part.groups.first // self.pattern.chosen_every * self.pattern.chosen_every
            chooses = part.groups.near > self.pattern.chosen_keys and not part.columns.start
            if chooses and group >= part.start:  # each group once
                past.count(part, of_rows, len(q))
            if past.on_choice:
                past.on_choice(Seen(part, of_rows, partial(self._votes, index, q, k, scale)))

    @torch.no_grad()
    def _votes(self, index: int, q: Tensor, k: Tensor, scale: float, groups: slice) -> list[Tensor]:
        """Return `Seen.votes`."""
        part = self.parts[index]
        rows = zip(range(part.rows.start, part.rows.stop), self.blocks[index], strict=True)
        return [
            votes_by_keys(self.pattern, part, self._document(part, row, q, k, scale), groups, blocks[groups])
            for row, blocks in rows
        ]

    def _leave(self) -> None:
        if self.choices and self.kind == "chooses":
            self.choices.leave(self.blocks)

    def _chosen(
        self, index: int, q: Tensor, k: Tensor, scale: float, means: dict[tuple[int, int], Means]
    ) -> list[Tensor]:
        """Return the blocks (groups, m) that a part's rows see. `means` has those of documents, by their places."""
        part = self.parts[index]
        rows, pattern = range(part.rows.start, part.rows.stop), self.pattern
        number = part.groups.near // pattern.chosen_block
        if number <= pattern.chosen or self.kind == "first":
            seen = torch.arange(number if number <= pattern.chosen else 1, dtype=torch.int32, device=q.device)
            return [seen[None]] * len(rows)
        past = self.past if not part.columns.start and len(rows) == len(q) else None  # which may keep what is chosen
        group = part.groups.first // pattern.chosen_every * pattern.chosen_every
        if past and past.held and past.held[0] == group and group < part.start:
            return past.held[1]
        place = rows.start, part.columns.start
        if place not in means:
            last = max(x.groups.near for x in self.parts if (x.rows.start, x.columns.start) == place)
            means[place] = self._means(k[part.rows, part.columns], part, last)
        first_slot = slot_of(pattern, part.groups.near, group)
        known = past.scanned[1] if past and past.scanned and past.scanned[0] == first_slot else [None] * len(rows)
        blocks, candidates = [], []
        for row, scanned in zip(rows, known, strict=True):
            choice = choose(self._voting(index, row, q, k, scale, means[place], scanned))
            blocks.append(choice.blocks)
            candidates.append(choice.candidates)
        if past:
            last_group = group + (part.groups.number - 1) * pattern.chosen_every
            past.held = last_group, [x[-1:] for x in blocks]
            past.scanned = slot_of(pattern, part.groups.near, last_group), candidates
        return blocks

    def _voting(
        self, index: int, row: int, q: Tensor, k: Tensor, scale: float, means: Means, scanned: Tensor | None
    ) -> Voting:
        part = self.parts[index]
        return Voting(
            pattern=self.pattern,
            part=part,
            means=means,
            row=row if self._past(part) else row - part.rows.start,
            document=self._document(part, row, q, k, scale),
            scanned=scanned,
            named=self.choices and self.choices.named(row, part),
            earlier=self.choices and self.choices.earlier(index, row - part.rows.start),
        )

    def _document(self, part: GroupedPart, row: int, q: Tensor, k: Tensor, scale: float) -> Unrotated:
        past, size = self._past(part), self.pattern.chosen_block
        stored = _Stored(size, part, past, row)

        def queries(positions: Tensor) -> Tensor:
            inside = (positions - part.start).to(q.device)
            rows = q[row, part.columns][inside.clamp(min=0)]
            if past and (positions < part.start).any():
                assert past.queries is not None
                before = inside < 0
                rows[before] = past.queries[row, inside[before]]  # counted from the end
            return unrotated(rows[None], positions, self.turn)[0] * scale

        def keys(blocks: Tensor) -> Tensor:
            rows = stored.gathered(blocks[None], k, k)[0].flatten(0, 1)
            positions = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
            return unrotated(rows[None], positions, self.turn)[0].unflatten(0, (len(blocks), size))

        return Unrotated(queries, keys)

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

    def _past(self, part: GroupedPart) -> Past | None:
        """Return the past of the document of a part; only the first document of a shard has any."""
        return self.past if part.start else None

    def _together(self, part: GroupedPart) -> GroupedPart:
        """Return the part as one group, if its groups see the first block alone."""
        first, number, queries, near = part.groups
        if near <= self.pattern.chosen_keys:
            return part
        return part._replace(groups=Groups(first, 1, number * queries, near))

    def _calls(self, kernel: Kernel, q: Tensor, k: Tensor) -> Iterator[_GroupCall]:
        heads, (kv_heads, head_dim) = q.shape[2], k.shape[2:]
        for part, of_rows in zip(self.parts, self.blocks, strict=True):
            for row, blocks in enumerate(of_rows, part.rows.start):
                queries, keys = part.groups.queries, blocks.shape[1] * self.pattern.chosen_block
                most = kernel.max_batch(kv_heads, max(heads // kv_heads * queries, keys), head_dim)
                step = max(1, min(most, GATHERED // (keys * kv_heads * head_dim)))
                stored = _Stored(self.pattern.chosen_block, part, self._past(part), row)
                for first in range(0, len(blocks), step):
                    yield _GroupCall.of(self.pattern, stored, first, blocks[first : first + step].long(), heads)


class _Stored(NamedTuple):
    """The blocks of a document, of `size` tokens, in one row of a batch: in the shard and in the past before it."""

    size: int
    part: GroupedPart
    past: Past | None
    row: int

    @property
    def first(self) -> int:
        """The first block of which the shard has all tokens."""
        return -(-self.part.start // self.size)

    def own(self, x: Tensor) -> Tensor:
        """View the whole blocks of a shard's x (B, N, K, D) as (blocks, tokens of a block, K, D)."""
        rows = x[self.row, self.part.columns][self.first * self.size - self.part.start :]
        number = len(rows) // self.size
        return rows[: number * self.size].unflatten(0, (number, self.size))

    def gathered(self, groups: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Gather blocks (groups, m), ascending, of k and v (B, N, K, D): (k and v, groups * m, tokens, K, D)."""
        gathered = k.new_empty(2, groups.numel(), self.size, *k.shape[2:])
        own, past = [self.own(x) for x in (k, v)], self.past
        if not past:
            for into, x in zip(gathered, own, strict=True):
                torch.index_select(x, 0, groups.flatten(), out=into)
            return gathered
        edges = groups.new_tensor([past.blocks.number, self.first]).expand(len(groups), 2).contiguous()
        places = torch.searchsorted(groups.contiguous(), edges).tolist()
        for blocks, group, (before, inside) in zip(
            groups, gathered.unflatten(1, groups.shape).unbind(1), places, strict=True
        ):
            past.blocks.take(self.row, blocks[:before], group[:, :before])
            for into, x, of_past, all_of in zip(group, own, past.waiting, (k, v), strict=True):
                if before < inside:
                    ends = all_of[self.row, self.part.columns][: self.size - of_past.shape[1]]
                    torch.cat([of_past[self.row], ends], out=into[before])
                if inside < len(blocks):
                    torch.index_select(x, 0, blocks[inside:] - self.first, out=into[inside:])
        return gathered

    def add(self, into: Tensor, d: Tensor, blocks: Tensor, index: int) -> None:
        """Add gradients (n, tokens, K, D) of the rows of blocks (n,) to those of the shard's rows (B, N, K, D).

        Gradients of k (`index` 0) or v (1) of the past go to its sum.
        """
        d = d.to(into.dtype)
        if not self.past:
            self.own(into).index_add_(0, blocks, d)
            return
        inside = blocks >= self.first
        cut = ~inside & (blocks >= self.past.blocks.number)  # the block that the shard's start cuts
        self.own(into).index_add_(0, blocks[inside] - self.first, d[inside])
        if cut.any():
            held = self.past.waiting.shape[2]
            into[self.row, self.part.columns][: self.size - held] += d[cut].sum(0)[held:]
        if self.past.gradients is not None:  # rows of the shard that are in the block it cuts are added, but never read
            into = self.past.gradients[index, self.row].unflatten(0, (-1, self.size))
            into.index_add_(0, blocks[~inside].to(into.device), d[~inside].to(into.device))


class _GroupCall(NamedTuple):
    """One call of attention: groups of one row of a batch on the tokens of their `blocks` (groups, m).

    distances (groups * m,): positions by which each block's keys are moved; None if they stay.
    """

    stored: _Stored
    branch: Branch
    blocks: Tensor
    distances: Tensor | None

    @classmethod
    def of(cls, pattern: Pattern, stored: _Stored, first: int, blocks: Tensor, heads: int) -> _GroupCall:
        """Make the call for groups from `first` on, with these blocks (groups, m)."""
        part, size, every = stored.part, pattern.chosen_block, pattern.chosen_every
        near, (groups, m) = part.groups.near, blocks.shape
        token = part.groups.first - part.start + first * every
        queries = Rows(groups, every, heads, 0, 1, part.groups.queries, 1, token, 0)
        distances = None
        if near > m * size:
            places = near - (m - torch.arange(m, device=blocks.device)) * size
            distances = (places - blocks * size).flatten()
        return cls(stored, Branch(queries, queries, causal=False), blocks, distances)

    def queries(self, x: Tensor) -> Tensor:
        """View the call's rows of x (B, N, H, D) as (groups, H, rows, D)."""
        row = self.stored.row
        return strided_view(x[row : row + 1, self.stored.part.columns], self.branch.queries)[0]

    def keys(self, k: Tensor, v: Tensor) -> Tensor:
        """Gather the call's blocks of k and v (B, N, K, D), and of the past: (k and v, blocks, tokens, K, D)."""
        return self.stored.gathered(self.blocks, k, v)

    def add(self, into: Tensor, d: Tensor, index: int) -> None:
        """Add gradients (blocks, tokens, K, D) of gathered rows, as `_Stored.add` does."""
        self.stored.add(into, d, self.blocks.flatten(), index)

    def in_groups(self, x: Tensor) -> Tensor:
        """Return gathered rows (blocks, tokens, K, D) as (groups, K, keys, D)."""
        return x.unflatten(0, self.blocks.shape).flatten(1, 2).transpose(1, 2)

    def in_blocks(self, x: Tensor) -> Tensor:
        """Return rows (groups, K, keys, D) as (blocks, tokens, K, D)."""
        return x.transpose(1, 2).flatten(0, 1).unflatten(0, (-1, self.stored.size))

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


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """Return x (groups, H, rows, D) as (groups, K, H / K * rows, D): heads that share a key head are rows of it."""
    return x.reshape(len(x), k.shape[2], -1, x.shape[-1])
