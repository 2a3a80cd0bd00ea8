"""Chosen blocks over ranks: the rank that has read a block keeps it, and the others fetch what they have chosen.

    rank 0   its blocks and means  --+
    rank 1   its blocks and means  --+-- rounds: each rank asks the owners for rows, and answers what others ask
    rank 2   its blocks and means  --+

A block belongs to the rank whose shard has its last token. Every rank knows the edges of all shards, so it knows the
owner of each block, and of each run of blocks. What crosses an edge is small: after each shard, all ranks get its last
queries, and the last keys and values, fewer than a block.

Means of runs, and of the blocks of short documents, are fetched once. Those of other blocks are fetched for the scans
of neighbouring slots, and blocks for FETCHED queries. The backward pass fetches blocks again, and gives their gradients
to the owners, which add them in the order of ranks.

B batch, n tokens of a shard, H query heads, K key heads, D head_dim, P ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention.groups import GroupedPart, stages
from longnet_cli.attention.past import Blocks, Means, Past, RowMeans, one_each, run_means, taken
from longnet_cli.attention.pattern import RUN, RUNS, Pattern
from longnet_cli.attention.sinks import Turn
from longnet_cli.running.ranks.rounds import ROWS, Directory, Owned, RankSource, Rounds

if TYPE_CHECKING:
    from longnet_cli.running.ranks.exchange import Exchange


STEP = 1 << 12  # blocks whose means are fetched at a time to be saved


class RankBlocks(Blocks):
    """The first `number` blocks of a document, over ranks. `take` has those that were fetched last."""

    def __init__(self, rounds: Rounds, directory: Directory) -> None:
        super().__init__()
        self._source, self._owned = RankSource(rounds, directory, ROWS), rounds.owned
        self._gradients: Tensor | None = None  # of the blocks that were fetched last

    @property
    def nbytes(self) -> int:
        return self._owned.nbytes + self._source.nbytes

    def fetch(self, row: int, blocks: Tensor) -> None:
        blocks = blocks[blocks < self.number].unique()
        if len(blocks):
            self._source.fetch(row, blocks)

    def take(self, row: int, blocks: Tensor, into: Tensor) -> None:
        fetched = self._source.last
        places, known = fetched.find(blocks) if fetched and fetched.row == row else (blocks, blocks < 0)
        if not known.all():
            fetched, places = self._source.fetch(row, blocks), torch.arange(len(blocks), device=blocks.device)
        assert fetched
        for x, y in zip(into, fetched.rows, strict=True):
            torch.index_select(y, 0, places, out=x)

    def add_gradients(self, row: int, index: int, blocks: Tensor, d: Tensor) -> None:
        """Add gradients d (n, tokens of a block, K, D) of fetched blocks (n,) of k or v (`index` 0 or 1)."""
        fetched = self._source.last
        assert fetched
        if self._gradients is None:
            self._gradients = torch.zeros_like(fetched.rows, dtype=d.dtype)
        self._gradients[index].index_add_(0, fetched.find(blocks)[0], d)

    def give_back(self) -> None:
        """Give what `add_gradients` has added to the owners."""
        gradients, self._gradients, fetched = self._gradients, None, self._source.last
        if gradients is not None and fetched:
            order, counts, places = self._source.owners(fetched.blocks)
            self._source.rounds.give(fetched.row, counts, places, gradients.index_select(1, order.to(gradients.device)))


class RankMeans(Means):
    """The means of a document's blocks over ranks, which fetch those that they compare."""

    def __init__(self, rounds: Rounds, directory: Directory, of_runs: Directory) -> None:
        self.rounds, self.of = rounds, rounds.owned.means.of
        self._finest = rounds.owned.means.fine.shape[3]
        self._sources = {kind: RankSource(rounds, directory, kind) for kind in self.of}
        self._sources[RUNS] = RankSource(rounds, of_runs, RUNS)
        # by kind and row of the batch, those that are kept: (K, room, m, D), and how many there are
        self._firsts: dict[tuple[int, int], tuple[Tensor, int]] = {}

    @property
    def nbytes(self) -> int:
        firsts = sum(means.nbytes for means, _ in self._firsts.values())
        return firsts + sum(source.nbytes for source in self._sources.values())

    def of_row(self, row: int, number: int | None = None) -> RowMeans:
        return _RankRow(self, row, self._finest if number is None else number)

    def some(self, kind: int, row: int, blocks: Tensor) -> Tensor:
        """Return means (K, n, m, D) of blocks (n,), ascending."""
        return self._sources[kind].fetch(row, blocks).rows

    def all_of_row(self, row: int, number: int) -> Tensor:
        """Return the finest means (K, number, m, D) of the first blocks, by rounds that other ranks only answer."""
        (means,) = self.rounds.owned.rooms([self._finest], [number]).views
        for blocks in torch.arange(number).split(STEP):
            self._sources[self._finest].ask(row, blocks, means, blocks.to(means.device))
        return means

    def some_of_all(self, kind: int, row: int, blocks: Tensor) -> Tensor:
        """Return what `some` returns, by a round that all ranks take."""
        (means,) = self.rounds.owned.rooms([kind], [len(blocks)]).views
        self._sources[kind].ask(row, blocks, means)
        return means

    def first(self, kind: int, row: int, number: int) -> Tensor:
        """Return the means (K, number, m, D) of the first blocks or runs. They are fetched once, and kept."""
        known, have = self._firsts.get((kind, row), (None, 0))
        if known is None or have < number:
            new = self.some_of_all(kind, row, torch.arange(have, number))
            if known is None or known.shape[1] < number:
                wider = new.new_empty(len(new), max(number, have * 3 // 2), *new.shape[2:])
                if known is not None:
                    wider[:, :have] = known[:, :have]
                known = wider
            known[:, have:number] = new
            self._firsts[kind, row] = known, number
        return known[:, :number]


class _RankRow(RowMeans):
    def __init__(self, means: RankMeans, row: int, kind: int) -> None:
        super().__init__(means.rounds.owned.runs[row] if kind == RUNS else means.of[kind][row])
        self._all, self._row, self._kind = means, row, kind

    def first(self, number: int) -> Tensor:
        return self._all.first(self._kind, self._row, number)

    def some(self, blocks: Tensor) -> Callable[[Tensor], Tensor]:
        distinct = blocks.unique()
        means = self._all.some(self._kind, self._row, distinct)
        return lambda own: taken(means, torch.searchsorted(distinct, own))


class RankPast(Past):
    """The past of a document in one layer, over ranks. See `Past`; each rank keeps the blocks that end in its shards.

    For each shard, all ranks call `enter` with their tokens, and then `append`, if other shards follow. In between,
    `position` is that of the shard. Reading takes rounds, until `finish`. `allocate_sums` makes memory for gradients.
    """

    shared = True

    def __init__(
        self,
        pattern: Pattern,
        group: dist.ProcessGroup | None,
        blocks: Blocks | None = None,
        allocate: Callable[..., Tensor] = torch.empty,
        keep: int = 0,
        layer: int | None = None,
        allocate_sums: Callable[..., Tensor] = torch.empty,
    ) -> None:
        super().__init__(pattern, blocks, allocate, keep, layer)
        self._allocate_sums = allocate_sums
        self._group, ranks, self._keeps = group, dist.get_world_size(group), bool(keep)
        self._directory = Directory(pattern.chosen_block, ranks)
        self._of_runs = Directory(pattern.chosen_block * RUN, ranks)
        self._kept = self.blocks  # this rank's own
        self._rounds: Rounds | None = None  # from the first shard on
        self._cut: dict[int, Tensor] = {}  # by position, if earlier shards are read again: what was waiting there
        self._new: list[_NewBlocks] = []  # whose means are not there yet
        self._end: tuple[int, Tensor | None, Tensor] | None = (
            None  # position, queries and waiting rows after all shards
        )

    @property
    def rounds(self) -> Rounds:
        assert self._rounds  # made by `enter`
        return self._rounds

    @torch.no_grad()
    def enter(self, exchange: Exchange, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Become the past of this rank's shard, with queries (B, n, H, D), keys and values (B, n, K, D).

        All ranks call this, each with its shard.
        """
        if not self._rounds:
            owned = Owned(self.pattern, k, self._kept, self.allocate, self._allocate_sums)
            self._rounds = Rounds(self._group, owned)
            self.blocks = RankBlocks(self._rounds, self._directory)
            if self.kind == "chooses":
                self.means = RankMeans(self._rounds, self._directory, self._of_runs)
        size, mine, rank = self.pattern.chosen_block, exchange.edges[exchange.rank], exchange.rank
        document, stop = exchange.document(mine)
        edges = [min(max(edge, document), stop) - document for edge in exchange.edges]
        last = exchange.document(exchange.edges[rank + 1] - 1)[0] if k.shape[1] else document
        tails = exchange.tails(q, k, v, queries=self.kind == "chooses")
        self._end = edges[-1], *self._until(edges, tails)
        self.queries, waiting = self._until(edges[: rank + 1], tails)
        self.position, self._waiting = edges[rank], [waiting]
        if self._keeps:
            self._cut[self.position] = waiting
        rows = torch.stack([k, v])
        if last != document:  # others read the last document; this rank's own, if it is another one, comes behind it
            number = self._keep(0, rows[:, :, last - mine :])
            self._directory.held[rank] += number
            self._of_runs.held[rank] += number // RUN
        if last == document or self.position:
            self._keep(self.position // size, torch.cat([waiting, rows[:, :, : stop - mine]], 2))
        self._directory.add(edges)
        self._of_runs.add(edges)
        self.blocks.number = self.position // size

    def _until(self, edges: Sequence[int], tails: Sequence[Tail]) -> tuple[Tensor | None, Tensor]:
        """Return the last queries before the last edge, and the keys and values there that are no whole block.

        The edges, in the document, are those of the shards with these tails.
        """
        lengths = [stop - first for first, stop in pairwise(edges)]
        queries, rows = self.queries, [*self._waiting]
        for length, tail in zip(lengths, tails, strict=False):  # of later shards, nothing counts
            if tail.queries is not None:
                new = tail.queries[:, max(0, tail.queries.shape[1] - length) :]
                queries = new if queries is None else torch.cat([queries, new], 1)
            rows.append(tail.rows[:, :, max(0, tail.rows.shape[2] - length) :])
        if queries is not None:
            queries = queries[:, -self.pattern.last_queries :].clone()
        both = torch.cat(rows or [tails[0].rows[:, :, :0]], 2)
        return queries, both[:, :, both.shape[2] - edges[-1] % self.pattern.chosen_block :].clone()

    def _keep(self, first: int, rows: Tensor) -> int:
        """Keep whole blocks of rows (k and v, B, tokens, K, D), from block `first` on; return how many."""
        size = self.pattern.chosen_block
        number = rows.shape[2] // size
        if self.kind == "first":
            number = max(0, min(number, self.pattern.chosen - first))
        whole = rows[:, :, : number * size]
        if number:
            self._kept.append(whole.unflatten(2, (number, size)))
        self._new.append(_NewBlocks(first, number, whole[0]))
        return number

    @torch.no_grad()
    def settle(self, turn: Turn | None) -> None:
        """Store the means of new blocks, and of runs. All ranks call this before they choose."""
        new, self._new[:] = [*self._new], []
        if self.kind != "chooses" or not new:
            return
        owned, place = self.rounds.owned, self._kept.number - sum(blocks.number for blocks in new)
        for blocks in new:
            owned.means.write(slice(None), place, blocks.keys, turn, blocks.first)
            place += blocks.number
        if RUNS in {stage.means for stage in stages(self.pattern)}:
            self._keep_runs(new)

    def _keep_runs(self, new: Sequence[_NewBlocks]) -> None:
        """Keep the means of the runs that end in new blocks. The first blocks of a run may be those of other ranks."""
        owned, place = self.rounds.owned, self._kept.number - sum(blocks.number for blocks in new)
        for blocks in new:
            begin, stop = blocks.first // RUN * RUN, (blocks.first + blocks.number) // RUN * RUN
            means = owned.means.one_each(slice(None), slice(place, place + max(0, stop - blocks.first)))
            if blocks is new[-1]:  # all ranks take these rounds, before any of them asks for runs
                missing = torch.arange(begin, blocks.first if begin < stop else begin)
                kind = 1 if 1 in owned.means.of else owned.means.fine.shape[3]
                of_rows = [one_each(self._all_means().some_of_all(kind, row, missing)) for row in range(len(means))]
                means = torch.cat([torch.stack(of_rows), means], 2)
            owned.runs = torch.cat([owned.runs, run_means(means)], 2)
            place += blocks.number

    def _all_means(self) -> RankMeans:
        assert isinstance(self.means, RankMeans)
        return self.means

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Go on behind the shards of all ranks."""
        assert self._end
        self.position, self.queries, waiting = self._end
        self._waiting = [waiting]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield to the group's first rank what `restore` needs in one process. All ranks iterate over it to the end.

        It holds one layer's means at a time. An open group chooses again.
        """
        batch, total = len(self.rounds.owned.like), self._directory.blocks
        number = min(total, self.pattern.chosen) if self.kind == "first" else total
        counts = torch.zeros(batch, total, dtype=torch.int32)
        if self.counts is not None:
            counts[:, : self.counts.shape[1]] = self.counts[:, :total].cpu()
        dist.all_reduce(counts, group=self._group)
        if dist.get_rank(self._group) == 0:
            yield "waiting", self.waiting if self.kept == self.position else self.waiting[:, :, :0]
            yield "counts", counts
            self.blocks.number = number
            owned = self.rounds.owned
            like = owned.like.new_empty(2, batch, 0, *owned.shape)
            for index, piece in enumerate(self.blocks.taken_pieces(like)):
                yield f"blocks.{index}", piece
            if self.kind == "chooses":
                yield from self._state_of_choice(batch, number)
        self.finish()

    def _state_of_choice(self, batch: int, number: int) -> Iterator[tuple[str, Tensor]]:
        assert self.queries is not None
        yield "queries", self.queries
        yield "fine", torch.stack([self._all_means().all_of_row(row, number) for row in range(batch)])
        nothing = torch.empty(0, dtype=torch.int64)
        yield from (("held_at", nothing), ("scanned_at", nothing))
        yield "held", torch.zeros(batch, 1, 0, dtype=torch.int32)
        yield "scanned", torch.zeros(batch, 0, dtype=torch.int32)

    def fork(self) -> Past:
        """Raise ValueError: a fork would read where the other ranks do not."""
        raise ValueError("chosen blocks are shared by several ranks: only one process forks what it has read")

    def before(self, position: int, gradients: Tensor | None = None) -> Past:
        new = copy.copy(self)
        if position != self.position:
            new.position, new.queries, new.means, new._waiting = position, None, None, [self._cut[position]]
            new.blocks = copy.copy(self.blocks)
            new.blocks.number = position // self.pattern.chosen_block
        return new

    def means_before(self, stop: int, part: GroupedPart, k: Tensor) -> Means:
        return self._all_means()

    def forget_means(self) -> None:
        if self._rounds:
            self.means = None
            self._rounds.owned.forget_means()

    def add_gradients(self, row: int, index: int, blocks: Tensor, d: Tensor) -> None:
        assert isinstance(self.blocks, RankBlocks)
        whole = int((blocks < self.blocks.number).sum())
        if whole:
            self.blocks.add_gradients(row, index, blocks[:whole], d[:whole])
        if whole < len(blocks):  # the block that the shard's start cuts ends in the shard
            _, places = self._directory.find(blocks[whole:].cpu())
            sums = self.rounds.owned.all_sums()[index, row]
            sums.index_add_(0, places.to(sums.device), d[whole:].to(sums.device))

    def give_back(self) -> None:
        assert isinstance(self.blocks, RankBlocks)
        self.blocks.give_back()

    def finish(self) -> None:
        self.rounds.finish()

    def hand_back(self, exchange: Exchange, like: Tensor) -> Tensor:
        """Return the gradients (k and v, B, n, K, D) of this rank's shard that have come back since the last call.

        `like` has the shape (B, n, K, D) and the device of the shard's keys. All ranks call this, with their shards.
        """
        sums, size, rank = self.rounds.owned.all_sums(), self.pattern.chosen_block, exchange.rank
        total, cuts = torch.zeros(2, *like.shape, dtype=sums.dtype, device=like.device), self._cut_blocks(exchange)
        mine, after = exchange.edges[rank : rank + 2]
        if mine == after:
            return total
        document, _ = exchange.document(after - 1)  # the one that others read
        first, stop, before = max(0, mine - document), after - document, max(0, document - mine)
        block = first // size
        place = 0 if before else self._directory.place(block, rank)
        if place is not None:
            rows = sums[:, :, place : place + stop // size - block].flatten(2, 3)
            own = rows[:, :, first % size :]
            total[:, :, before : before + own.shape[2]] = own
            rows[:, :, max(0, exchange.edges[0] - document - block * size) :] = 0
        if number := min(stop % size, stop - first):  # in a block that ends in another shard
            total[:, :, -number:] += cuts[rank + 1, :, :, stop % size - number : stop % size]
        return total

    def _cut_blocks(self, exchange: Exchange) -> Tensor:
        """Return the sums of the blocks that the P + 1 edges cut: (P + 1, k and v, B, tokens of a block, K, D)."""
        sums, size = self.rounds.owned.all_sums(), self.pattern.chosen_block
        shape = len(exchange.edges), *sums.shape[:2], *sums.shape[3:]
        cuts = torch.zeros(shape, dtype=sums.dtype, device=self.rounds.owned.like.device)
        document, _ = exchange.document(exchange.edges[exchange.rank])
        for index, edge in enumerate(exchange.edges[1:], 1):
            block, rest = divmod(edge - document, size)
            if not rest or exchange.document(edge)[0] != document:
                continue
            place = self._directory.place(block, exchange.rank)
            if place is not None and place < sums.shape[2]:
                cuts[index] = sums[:, :, place]
                if index == len(exchange.edges) - 1:  # other blocks end in these shards
                    sums[:, :, place, max(0, exchange.edges[0] - document - block * size) : rest] = 0
        dist.all_reduce(cuts, group=self._group)
        return cuts


class Tail(NamedTuple):
    """The end of a shard: its last queries (B, n, H, D), if they matter, and keys and values (k and v, B, m, K, D)."""

    queries: Tensor | None
    rows: Tensor


class _NewBlocks(NamedTuple):
    """A number of blocks, the first of them in their document, and their keys (B, tokens, K, D)."""

    first: int
    number: int
    keys: Tensor
