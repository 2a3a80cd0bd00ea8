"""Chosen blocks over ranks: the rank that has read a block keeps it, and the others fetch what they have chosen.

    rank 0   its blocks and means  --+
    rank 1   its blocks and means  --+-- `fetching`: each rank asks once per layer, then all rows travel in runs
    rank 2   its blocks and means  --+

Shards end at blocks, so each block is in one shard; where a chunk ends inside one, the next chunk's first rank gets what
the others have of it. All ranks know the edges of all shards, so they know the owner of each block.

    enter    the last queries before a shard come from the ranks before it         one collective in a layer that chooses
    settle   means of the first blocks and of runs go to all ranks, and stay       one collective in a layer that chooses
    choose   finer means of blocks that remain after a stage, in long documents    two, and one per run, for each stage
    attend   the blocks that were chosen                                           two, and one per run

B batch, n tokens of a shard, H query heads, K key heads, D head_dim, P ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention.groups import stages
from longnet_cli.attention.merging import accumulator
from longnet_cli.attention.past import Blocks, Means, OfBlocks, Past, Wanted, one_each, run_means, taken
from longnet_cli.attention.pattern import RUN, RUNS, Pattern
from longnet_cli.attention.sinks import Turn
from longnet_cli.running.ranks.fetching import ROWS, Asked, Share

if TYPE_CHECKING:
    from longnet_cli.running.ranks.exchange import Exchange


def first_means(pattern: Pattern) -> int:
    """Return how many first blocks of a document all ranks have the means of: whole runs of them.

    A scan of fewer blocks has no stage of runs, and compares all of these.
    """
    first, *_ = stages(pattern)
    return (first.blocks // RUN + 1) * RUN if first.means == RUNS else 1 << 62


class NewBlocks(NamedTuple):
    """Blocks that this rank has read: the start of their document, their `first` block there, number, place and keys.

    place: that of the first one among the rank's blocks. keys: (B, tokens, K, D).
    """

    document: int
    first: int
    number: int
    place: int
    keys: Tensor


class RankMeans(Means):
    """The means of a document's first blocks, and of all of its runs. Those of other blocks are fetched."""

    def __init__(self, pattern: Pattern, share: Share, allocate: Callable[..., Tensor]) -> None:
        super().__init__(pattern, share.like, 0, allocate)
        self._share, self._first, self._long = share, first_means(pattern), False

    def of_wanted(self, number: int, wanted: Wanted) -> Iterator[tuple[int, slice, OfBlocks]]:
        if not self._long:  # on any rank
            yield from super().of_wanted(number, wanted)
            return
        asked = self._share.ask(number, wanted, self._share.directory.blocks)
        for run, rows in enumerate(self._share.runs(number, asked)):
            for index, some in asked.pieces[run] if run < len(asked.pieces) else ():
                keys, order = asked.keys[run].sort()
                means = rows.transpose(0, 1).index_select(1, order)
                yield index, some, partial(_among, means, keys, wanted[index][0] * asked.blocks)

    def extend(self, exchange: Exchange, new: Sequence[NewBlocks]) -> None:
        """Give all ranks the means of this rank's new blocks, and take those of its document. All ranks call this."""
        size, like, both = self._share.directory.size, self._share.like, dict[int, tuple[range, range]]()
        for start, stop in exchange.crossed:
            begin, end = ((min(max(edge, start), stop) - start) // size for edge in exchange.edges[:: exchange.ranks])
            first = range(min(begin, self._first), min(end, self._first))
            both[start] = first, range(max(begin, self._first) // RUN, max(end, self._first) // RUN)
            self._long |= end > self._first
        batch, _, heads, head_dim = like.shape
        numbers = (self.finest, 1)
        shapes = [
            (batch, heads, len(some), m, head_dim) for x in both.values() for some, m in zip(x, numbers, strict=True)
        ]
        of_all = torch.zeros(sum(map(prod, shapes)), dtype=accumulator(like.dtype), device=like.device)
        views = [x.view(shape) for x, shape in zip(of_all.split([*map(prod, shapes)]), shapes, strict=True)]
        into = {start: (*x, *views[2 * i : 2 * i + 2]) for i, (start, x) in enumerate(both.items())}
        begun = self._begun(new, both) if self._long else None
        for blocks in new:
            if blocks.document in into:
                self._put(blocks, begun, *into[blocks.document])
        if len(of_all):
            dist.all_reduce(of_all, group=self._share.group)  # each number is that of one rank, and 0 of the others
        if mine := into.get(exchange.document(exchange.edges[exchange.rank])[0]):
            first, runs, fine, of_runs = mine
            if first and (room := self.fine.shape[2]) < first.stop:
                self._move(self.of, first.start, max(first.stop, min(room * 3 // 2, self._first)))
            self.write_finest(slice(None), first.start, fine)
            if runs:
                self.of[RUNS] = torch.cat([self.of[RUNS][:, :, : runs.start], of_runs], 2)

    def _begun(self, new: Sequence[NewBlocks], both: dict[int, tuple[range, range]]) -> Tensor | None:
        """Return one mean (B, K, n, D) of each block of other ranks in the run that ends in this rank's first blocks."""
        kind, wanted = 1 if 1 in self._share.means.of else self.finest, list[tuple[int, Tensor]]()
        for blocks in new:
            begin = max(blocks.first // RUN, both[blocks.document][1].start) * RUN if blocks.document in both else 0
            if begin < blocks.first and (blocks.first + blocks.number) // RUN * RUN > begin:
                missing = torch.arange(begin, blocks.first, device=self._share.like.device)
                wanted += [(row, missing[None]) for row in range(len(self._share.like))]
        found = [of_blocks(wanted[index][1])[0] for index, _, of_blocks in self.of_wanted(kind, wanted)]
        return one_each(torch.stack(found)) if found else None

    def _put(
        self, blocks: NewBlocks, begun: Tensor | None, first: range, runs: range, fine: Tensor, of_runs: Tensor
    ) -> None:
        """Copy the means of new blocks to what is given to all: those of some first blocks, and of some runs."""
        own, stop, behind = self._share.means, blocks.first + blocks.number, blocks.place - blocks.first
        if some := range(max(blocks.first, first.start), min(stop, first.stop)):
            mine = own.fine[:, :, some.start + behind : some.stop + behind]
            fine[:, :, some.start - first.start : some.stop - first.start] = mine
        if some := range(max(blocks.first // RUN, runs.start), min(stop // RUN, runs.stop)):
            begin = max(some.start * RUN, blocks.first)
            ones = own.one_each(slice(None), slice(begin + behind, some.stop * RUN + behind))
            if begin > some.start * RUN:
                assert begun is not None
                ones = torch.cat([begun, ones], 2)
            of_runs[:, :, some.start - runs.start : some.stop - runs.start] = run_means(ones)


def _among(means: Tensor, keys: Tensor, of_row: int, blocks: Tensor) -> Tensor:
    """Return the means (slots, K, n, m, D) of blocks (slots, n) of a row, whose keys are ascending."""
    return taken(means, torch.searchsorted(keys, of_row + blocks))


class RankBlocks(Blocks):
    """The first `number` blocks of a document, over ranks. `take` has those of the present run."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share
        self._row = 0  # what a row of the batch adds to a key
        self._nothing = self._rows = self._keys = self._order = self._gradients = torch.empty(0)

    @property
    def nbytes(self) -> int:
        return self._share.nbytes

    def hold(self, rows: Tensor, keys: Tensor, blocks: int, *, backward: bool) -> None:
        """Hold a run: rows (n, k and v, tokens of a block, K, D) with keys (n,), row of the batch * blocks + block."""
        self._rows, self._row = rows, blocks
        self._keys, self._order = keys.sort()
        if backward:
            self._gradients = torch.zeros_like(rows, dtype=accumulator(rows.dtype))

    def release(self) -> Tensor:
        """Forget the run, and return the gradients that were added to it, in the order of its rows."""
        gradients, self._rows, self._gradients = self._gradients, self._nothing, self._nothing
        return gradients

    def take(self, row: int, blocks: Tensor, into: Tensor) -> None:
        places = self._places(row, blocks)
        for index, x in enumerate(into):
            torch.index_select(self._rows[:, index], 0, places, out=x)

    def add_gradients(self, row: int, index: int, blocks: Tensor, d: Tensor) -> None:
        """Add gradients d (n, tokens of a block, K, D) of blocks (n,) of k or v (`index` 0 or 1)."""
        self._gradients[:, index].index_add_(0, self._places(row, blocks), d)

    def _places(self, row: int, blocks: Tensor) -> Tensor:
        return self._order[torch.searchsorted(self._keys, row * self._row + blocks)]


class RankPast(Past):
    """The past of a document in one layer, over ranks. See `Past`; each rank keeps the blocks that end in its shards.

    For each shard, all ranks call `enter` with their tokens, and then `append`, if other shards follow. In between,
    `position` is that of the shard. All ranks choose and read together. `allocate_sums` makes memory for gradients.
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
        self._group, self._allocate_sums = group, allocate_sums
        self._kept = self.blocks  # this rank's own
        self._share: Share | None = None  # from the first shard on
        self._new: list[NewBlocks] = []  # whose means are not there yet
        self._means = 0  # blocks whose means there are, or will be
        self._entered: Exchange | None = None
        # after all shards: the position, and on the first rank the last queries and the rows that are no whole block
        self._end: tuple[int, Tensor | None, Tensor] | None = None

    @property
    def share(self) -> Share:
        assert self._share  # made by `enter`
        return self._share

    @torch.no_grad()
    def enter(self, exchange: Exchange, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Become the past of this rank's shard, with queries (B, n, H, D), keys and values (B, n, K, D).

        All ranks call this, each with its shard.
        """
        size, (mine, after), self._entered = self.pattern.chosen_block, exchange.mine, exchange
        if not self._share:
            like = k[:, :0].detach()
            means = Means(self.pattern, like, 0, self.allocate, runs=False)
            self._share = Share(self._group, exchange.directory, self._kept, means, like, self._allocate_sums)
            self.blocks, self._waiting = RankBlocks(self._share), [torch.stack([like, like])]
            if self.kind == "chooses":
                self.means = RankMeans(self.pattern, self._share, self.allocate)
        document, stop = exchange.document(mine)
        last, _ = exchange.document(after - 1) if mine < after else (document, stop)
        inside = [edge - exchange.document(edge)[0] for edge in exchange.edges]
        rows, queries = torch.stack([k, v]), None
        before, end = exchange.tails(rows, self.waiting, 2, [position % size for position in inside])
        if self.kind == "chooses":
            held, most = q[:, :0] if self.queries is None else self.queries, self.pattern.last_queries
            self.queries, queries = exchange.tails(q, held, 1, [min(position, most) for position in inside])
        self.position, self._waiting, self._end = mine - document, [before], (inside[-1], queries, end)
        if last != document:  # others read the last document; this rank's own, if it is another one, comes behind it
            self._keep(last, 0, rows[:, :, last - mine :])
        of_first = rows[:, :, : stop - mine]
        of_first = torch.cat([before, of_first], 2) if before.shape[2] else of_first
        self._keep(document, self.position // size, of_first, read=last == document)
        if exchange.cached:
            self.share.directory.add(exchange.edges)
        self.blocks.number = self.position // size

    def _keep(self, document: int, first: int, rows: Tensor, *, read: bool = True) -> None:
        """Keep what others will read of a document: whole blocks of rows (k and v, B, tokens, K, D), and their means."""
        size = self.pattern.chosen_block
        number = rows.shape[2] // size
        if self.kind == "first":
            number = max(0, min(number, self.pattern.chosen - first))
        whole = rows[:, :, : number * size]
        if self.kind == "chooses":
            self._new.append(NewBlocks(document, first, number, self._means, whole[0]))
            self._means += number
        if number and read:
            self._kept.append(whole.unflatten(2, (number, size)))

    @torch.no_grad()
    def settle(self, turn: Turn | None) -> None:
        """Store the means of new blocks, and share those that all ranks need. All ranks call this before they choose."""
        new, self._new[:] = [*self._new], []
        if not new:
            return
        for blocks in new:
            self.share.means.write(slice(None), blocks.place, blocks.keys, turn, blocks.first)
        assert isinstance(self.means, RankMeans)
        assert self._entered
        self.means.extend(self._entered, new)

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Go on behind the shards of all ranks."""
        assert self._end
        self.position, self.queries, waiting = self._end
        self._waiting = [waiting]

    def ask(self, wanted: Wanted) -> Asked:
        return self.share.ask(ROWS, wanted, self.blocks.number)

    def runs(
        self, wanted: Wanted, asked: Asked | None = None, *, backward: bool = False
    ) -> Iterator[tuple[int, slice]]:
        """Yield what is wanted, run by run, as `Past.runs` does. All ranks go through it together."""
        asked, blocks = asked or self.ask(wanted), self.blocks
        assert isinstance(blocks, RankBlocks)
        for run, rows in enumerate(self.share.runs(ROWS, asked)):
            keys = asked.keys[run] if run < len(asked.keys) else rows.new_empty(0).long()
            blocks.hold(rows, keys, asked.blocks, backward=backward)
            del rows
            yield from asked.pieces[run] if run < len(asked.pieces) else ()
            gradients = blocks.release()
            if backward:
                self.share.give(asked, run, gradients)

    def add_gradients(self, row: int, index: int, blocks: Tensor, d: Tensor) -> None:
        assert isinstance(self.blocks, RankBlocks)
        self.blocks.add_gradients(row, index, blocks, d)

    def fork(self) -> Past:
        """Raise ValueError: a fork would read where the other ranks do not."""
        raise ValueError("chosen blocks are shared by several ranks: only one process forks what it has read")

    def before(self, position: int, gradients: Tensor | None = None) -> Past:
        new = copy.copy(self)
        new.blocks = copy.copy(self.blocks)
        if position != self.position:
            new.position, new.queries, new.means, new._waiting = position, None, None, [self.waiting[:, :, :0]]
            new.blocks.number = position // self.pattern.chosen_block
        return new

    def forget_means(self) -> None:
        if self._share:
            self.means, self._share.means.of = None, {}

    def hand_back(self, exchange: Exchange, like: Tensor) -> Tensor:
        """Return the gradients (k and v, B, n, K, D) of this rank's shard that have come back since the last call.

        `like` has the shape (B, n, K, D) and the device of the shard's keys.
        """
        sums, (mine, after) = self.share.sums, exchange.mine
        total = torch.zeros(2, *like.shape, dtype=sums.dtype, device=like.device)
        document, _ = exchange.document(max(mine, after - 1))  # the one that others read
        size, begin = self.pattern.chosen_block, max(mine, document)
        first, stop = (begin - document) // size, (after - document) // size
        if first < stop:
            place = 0 if begin > mine else int(self.share.directory.find(torch.tensor([first]))[1])
            rows = sums[:, place : place + stop - first]
            own = rows.movedim(2, 0).flatten(2, 3)
            total[:, :, begin - mine : begin - mine + own.shape[2]] = own
            rows.zero_()
        return total

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield to the group's first rank what `restore` needs in one process. All ranks iterate over it to the end.

        It holds some blocks, or one layer's means, at a time. An open group chooses again.
        """
        batch, total = len(self.share.like), self.share.directory.blocks
        first = dist.get_rank(self._group) == 0
        counts = torch.zeros(batch, total, dtype=torch.int32, device=self.share.like.device)
        if self.counts is not None:
            counts[:, : self.counts.shape[1]] = self.counts[:, :total]
        dist.all_reduce(counts, group=self._group)
        if first:
            yield "waiting", self.waiting if self.kept == self.position else self.waiting[:, :, :0]
            yield "counts", counts
        limit = self.pattern.chosen if self.kind == "first" else total
        for index, piece in enumerate(self.share.gathered(ROWS, limit)):
            yield f"blocks.{index}", piece.movedim(2, 0)
        if self.kind != "chooses":
            return
        assert self.means
        fine = [piece.transpose(1, 2) for piece in self.share.gathered(self.means.finest, limit)]
        if first:
            assert self.queries is not None
            yield "queries", self.queries
            yield "fine", torch.cat([self.means.fine[:, :, :0], *fine], 2)
            nothing = torch.empty(0, dtype=torch.int64)
            yield from (("held_at", nothing), ("scanned_at", nothing))
            yield "held", torch.zeros(batch, 1, 0, dtype=torch.int32)
            yield "scanned", torch.zeros(batch, 0, dtype=torch.int32)
