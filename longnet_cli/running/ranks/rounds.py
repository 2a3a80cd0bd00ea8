"""Rounds in which ranks ask each other for rows of a layer's past: who has them, what is asked, what is answered.

In a round, each rank says to each owner how many rows of which kind it asks for, then which ones, and then rows travel.
Ranks take rounds whenever they need rows. A rank that needs no more finishes: it answers until all have finished. So no
rank plans what another one asks for, and a rank from which nobody wants anything sends nothing.

B batch, K key heads, D head_dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention.merging import accumulator
from longnet_cli.attention.past import Blocks, Means
from longnet_cli.attention.pattern import RUNS, Pattern

# kinds of rows that a round carries; the others are means: their number per block, or RUNS
ROWS, GRADIENTS, FINISHED = -1, -2, -3


class Directory:
    """The owners of a document's blocks of `size` tokens, and each block's place among those of its owner.

    blocks: their number. held: the number of each rank.
    """

    def __init__(self, size: int, ranks: int) -> None:
        self.size, self.blocks, self.held = size, 0, [0] * ranks
        self._spans: list[tuple[int, int, int]] = []  # first block, owner, place of the first block

    def add(self, edges: Sequence[int]) -> None:
        """Add the blocks whose last tokens are in the shards with these P + 1 edges."""
        for rank, (first, stop) in enumerate(pairwise(edge // self.size for edge in edges)):
            if first < stop:
                self._spans.append((first, rank, self.held[rank]))
                self.held[rank] += stop - first
                self.blocks = stop
        self._table: Tensor | None = None

    def find(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the owners of blocks (n,), and their places there."""
        if self._table is None:
            self._table = torch.tensor(self._spans, dtype=torch.int64).view(-1, 3).T.contiguous()
        firsts, owners, places = self._table
        at = torch.searchsorted(firsts, blocks, right=True) - 1
        return owners[at], places[at] + blocks - firsts[at]

    def place(self, block: int, rank: int) -> int | None:
        """Return the place of a block at a rank, or None if that is not its owner."""
        if block >= self.blocks:
            return None
        owner, place = (x.item() for x in self.find(torch.tensor([block])))
        return int(place) if owner == rank else None


class Owned:
    """A rank's own part of a layer's past, from which it answers others.

    It has blocks, their means, the means of runs (B, K, runs, 1, D), and for a backward pass the sums of gradients
    (k and v, B, blocks, tokens of a block, K, D) in fp32 or fp64.
    """

    def __init__(
        self,
        pattern: Pattern,
        k: Tensor,
        blocks: Blocks,
        allocate: Callable[..., Tensor],
        allocate_sums: Callable[..., Tensor],
    ) -> None:
        self.blocks, self.like, self._allocate_sums = blocks, k[:, :0].detach(), allocate_sums
        self.shape = pattern.chosen_block, *k.shape[2:]
        self.means = Means(pattern, self.like, 0, allocate, runs=False)
        self.runs = self.means.fine.new_empty(k.shape[0], k.shape[2], 0, 1, k.shape[3])
        self.sums: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.means.nbytes + self.runs.nbytes

    def forget_means(self) -> None:
        """Free the means: everything has been chosen."""
        self.means.of, self.runs = {}, self.runs[:, :, :0].clone()

    def rooms(self, kinds: Sequence[int], counts: Sequence[int]) -> Rooms:
        """Return memory for rows of several kinds, `counts` of each."""
        heads, head_dim = self.shape[1:]
        shapes, dtypes = list[tuple[int, ...]](), []
        for kind, count in zip(kinds, counts, strict=True):
            shapes.append((heads, count, max(1, kind), head_dim) if kind >= 0 else (2, count, *self.shape))
            dtypes.append(self.like.dtype if kind == ROWS else accumulator(self.like.dtype))
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self.like.device)
        views = zip(memory.split(sizes), dtypes, shapes, strict=True)
        return Rooms(memory, sizes, [view.view(dtype).view(shape) for view, dtype, shape in views])

    def answer(self, kind: int, row: int, places: Tensor, into: Tensor) -> None:
        """Copy the rows of a kind at some places (n,), ascending, in one row of the batch."""
        if kind == ROWS:
            self.blocks.take(row, places, into)
        else:
            means = self.runs if kind == RUNS else self.means.of[kind]
            torch.index_select(means[row], 1, places.to(means.device), out=into)

    def accept(self, row: int, places: Tensor, gradients: Tensor) -> None:
        """Add gradients (k and v, n, tokens of a block, K, D) of the blocks at some places (n,)."""
        sums = self.all_sums()[:, row]
        sums.index_add_(1, places.to(sums.device), gradients.to(sums.device))

    def all_sums(self) -> Tensor:
        """Return the sums of gradients, zeros at first. Call it when all blocks are there."""
        if self.sums is None:
            batch, number = self.like.shape[0], self.blocks.number
            shape = 2, batch, number, *self.shape
            self.sums = self._allocate_sums(shape, dtype=accumulator(self.like.dtype), device=self.like.device).zero_()
        return self.sums


class Rounds:
    """The rounds in which the ranks of a group ask each other for what they have `owned`."""

    def __init__(self, group: dist.ProcessGroup | None, owned: Owned) -> None:
        self.group, self.owned, self.ranks = group, owned, dist.get_world_size(group)

    def ask(self, kind: int, row: int, counts: list[int], places: Tensor) -> list[Tensor]:
        """Return rows of a kind, in one row of the batch: from each owner, `counts` of them, at `places` (n,) there."""
        return self._take(kind, row, counts, places) or []

    def give(self, row: int, counts: list[int], places: Tensor, gradients: Tensor) -> None:
        """Give gradients (k and v, n, tokens of a block, K, D) to the owners of the blocks at `places` (n,)."""
        self._take(GRADIENTS, row, counts, places, gradients)

    def finish(self) -> None:
        """Answer until all ranks have finished."""
        while self._take(FINISHED, 0, [0] * self.ranks, torch.empty(0, dtype=torch.int64)) is not None:
            pass

    def _take(
        self, kind: int, row: int, counts: list[int], places: Tensor, given: Tensor | None = None
    ) -> list[Tensor] | None:
        """Take a round, and return what each owner answers; None if all ranks have finished."""
        says = torch.tensor([(kind, row, count) for count in counts])
        heard = torch.empty_like(says)
        dist.all_to_all_single(heard, says, group=self.group)
        kinds, rows, numbers = heard.T.tolist()
        if all(of_rank == FINISHED for of_rank in kinds):
            return None
        wanted = torch.empty(sum(numbers), dtype=torch.int64)
        dist.all_to_all_single(wanted, places, numbers, counts, group=self.group)
        readers, got = [*zip(kinds, rows, wanted.split(numbers), strict=True)], list[Tensor]()
        if any(of_rank not in (GRADIENTS, FINISHED) for of_rank in kinds):
            answers = self._rooms(kinds, numbers, gradients=False)
            for (of_reader, of_batch, at), into in zip(readers, answers.views, strict=True):
                if into.numel():
                    self.owned.answer(of_reader, of_batch, at, into)
            got = self._carry(answers, self._rooms([kind] * self.ranks, counts, gradients=False))
        if GRADIENTS in kinds:
            gifts = self._rooms([kind] * self.ranks, counts, gradients=True)
            if given is not None:
                for part, into in zip(given.split(counts, 1), gifts.views, strict=True):
                    into.copy_(part)
            come = self._carry(gifts, self._rooms(kinds, numbers, gradients=True))
            for (_, of_batch, at), gradients in zip(readers, come, strict=True):
                if gradients.numel():
                    self.owned.accept(of_batch, at, gradients)
        return got

    def _rooms(self, kinds: Sequence[int], counts: Sequence[int], *, gradients: bool) -> Rooms:
        """Return memory for rows of each rank's kind, of those kinds that are gradients or of the others."""
        carried = [(kind == GRADIENTS) == gradients for kind in kinds]
        return self.owned.rooms(kinds, [n if here else 0 for n, here in zip(counts, carried, strict=True)])

    def _carry(self, sent: Rooms, got: Rooms) -> list[Tensor]:
        dist.all_to_all_single(got.memory, sent.memory, got.sizes, sent.sizes, group=self.group)
        return got.views


class Rooms(NamedTuple):
    """Memory for rows of several ranks: bytes, how many there are of each rank, and views of them."""

    memory: Tensor
    sizes: list[int]
    views: list[Tensor]


class RankSource:
    """The blocks of a document over ranks, as rows of one kind, in all rows of a batch.

    Those that were fetched last are kept: the next queries want many of them again.
    """

    def __init__(self, rounds: Rounds, directory: Directory, kind: int) -> None:
        self.rounds, self.directory, self.kind = rounds, directory, kind
        self.last: Fetched | None = None

    @property
    def nbytes(self) -> int:
        return self.last.rows.nbytes if self.last else 0

    def fetch(self, row: int, blocks: Tensor) -> Fetched:
        """Return blocks (n,), ascending, of one row of the batch."""
        (rows,) = self.rounds.owned.rooms([self.kind], [len(blocks)]).views
        new = torch.ones(len(blocks), dtype=torch.bool, device=blocks.device)
        if self.last and self.last.row == row:
            places, known = self.last.find(blocks)
            rows.index_copy_(1, known.nonzero()[:, 0], self.last.rows.index_select(1, places[known]))
            new = ~known
        if new.any():
            self.ask(row, blocks[new], rows, new.nonzero()[:, 0])
        self.last = Fetched(row, blocks, rows)
        return self.last

    def ask(self, row: int, blocks: Tensor, into: Tensor, at: Tensor | None = None) -> None:
        """Take a round for blocks (n,), ascending, and write their rows to places of axis 1, by default in order."""
        order, counts, places = self.owners(blocks)
        parts = self.rounds.ask(self.kind, row, counts, places)
        for of_owner, part in zip(order.split(counts), parts, strict=True):
            if len(of_owner):
                of_owner = of_owner.to(into.device)
                into.index_copy_(1, of_owner if at is None else at[of_owner], part)

    def owners(self, blocks: Tensor) -> tuple[Tensor, list[int], Tensor]:
        """Return the order of blocks (n,) by owner, how many each owner has, and their places there, in this order."""
        owners, places = self.directory.find(blocks.cpu())
        order = owners.argsort(stable=True)
        return order, owners.bincount(minlength=self.rounds.ranks).tolist(), places[order]


class Fetched(NamedTuple):
    """Blocks (n,), ascending, of one row of the batch, and their rows (.., n, ..), on axis 1."""

    row: int
    blocks: Tensor
    rows: Tensor

    def find(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of blocks (m,) among these, and which of them are there."""
        places = torch.searchsorted(self.blocks, blocks).clamp(max=len(self.blocks) - 1)
        return places, self.blocks[places] == blocks
