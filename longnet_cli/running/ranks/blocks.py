"""Chosen blocks over ranks: the rank that has read a block keeps it, and the others fetch what they have chosen.

    rank 0   its blocks and means  --+
    rank 1   its blocks and means  --+-- `fetching`: each rank asks once per layer, then all rows travel in runs
    rank 2   its blocks and means  --+

Shards end at blocks, so each block is in one shard; where a chunk ends inside one, the next chunk's first rank keeps
what there is of it. All ranks know the edges of all shards, so they know the owner of each block.

    in a layer that ..      what travels                                                         collectives
    chooses        enter    the last queries before a shard, from the ranks before it            1
                   settle   means of the first blocks and of runs, to all ranks, who keep them   1
                   choose   in long documents: finer means of what remains after a stage         2 a stage, 1 a run
    chooses        attend   the blocks that were chosen                                          2, 1 a run
    follows        attend   the same blocks of its own keys: nobody asks                         1 a run
    sees block 0   attend   block 0                                                              2, 1 a run

B batch, n tokens of a shard, H query heads, K key heads, D head_dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from longnet_cli.attention.groups import first_means
from longnet_cli.attention.past import Blocks, Means, OfBlocks, Past, Wanted, run_means, taken
from longnet_cli.attention.pattern import RUN, RUNS, Pattern
from longnet_cli.attention.sinks import Turn
from longnet_cli.running.ranks.edges import Shards
from longnet_cli.running.ranks.fetching import ROWS, Asked, RankShare

STATE_BLOCKS = 1 << 12  # of a piece of a saved state


class NewBlocks(NamedTuple):
    """Blocks that this rank has read: the start of their document, their first block there, number, place and keys.

    place: that of the first one among the rank's blocks. keys: (B, tokens, K, D).
    """

    document: int
    first_block: int
    number: int
    place: int
    keys: Tensor


class RankMeans(Means):
    """The means of a document's first blocks, and of all of its runs. Those of other blocks are fetched."""

    def __init__(self, pattern: Pattern, share: RankShare, allocate: Callable[..., Tensor]) -> None:
        super().__init__(pattern, share.like, 0, allocate)
        self._share, self._last, self._long = share, first_means(pattern), False

    def of_wanted(self, number: int, wanted: Wanted) -> Iterator[tuple[int, slice, OfBlocks]]:
        if not self._long:  # on any rank
            yield from super().of_wanted(number, wanted)
            return
        asked = self._share.ask(number, wanted, self._share.directory.blocks)
        for run, rows in enumerate(self._share.runs(number, asked)):
            for index, some in asked.pieces[run]:
                keys, order = asked.keys[run].sort()
                means = rows.transpose(0, 1).index_select(1, order)
                yield index, some, partial(_among, means, keys, wanted[index][0] * asked.blocks)

    def extend(self, shards: Shards, new: Sequence[NewBlocks]) -> None:
        """Give all ranks the means of this rank's new blocks, and take those of its document. All ranks call this."""
        like, last, begins, shapes = self._share.like, self._last, dict[int, int](), list[tuple[int, ...]]()
        for start, stop in shards.crossed:
            edges = shards.edges[0], shards.edges[-1]
            begin, end = ((min(max(edge, start), stop) - start) // shards.size for edge in edges)
            begins[start], self._long = begin, self._long or end > last
            for number, m in ((min(end, last) - begin, self.finest), (-(-end // RUN) - max(begin, last) // RUN, 1)):
                shapes.append((len(like), like.shape[2], max(0, number), m, like.shape[3]))
        sizes = [*map(prod, shapes)]
        together = self._share.means.fine.new_zeros(sum(sizes), device=like.device)
        parts = [x.view(shape) for x, shape in zip(together.split(sizes), shapes, strict=True)]
        of_documents = dict(zip(begins, zip(parts[::2], parts[1::2], strict=True), strict=True))
        for blocks in new:
            if blocks.document in begins:
                self._put(blocks, begins[blocks.document], *of_documents[blocks.document])
        if len(together):
            dist.all_reduce(together, group=self._share.group)
        document, _ = shards.document(shards.mine[0])
        if document in begins:
            self._take(begins[document], *of_documents[document])

    def _put(self, blocks: NewBlocks, begin: int, fine: Tensor, runs: Tensor) -> None:
        """Put the means of new blocks into those of their document from block `begin` on: of first blocks, of runs."""
        own, last, stop = self._share.means, self._last, blocks.first_block + blocks.number
        place = blocks.place - blocks.first_block
        if blocks.first_block < (end := min(stop, last)):
            fine[:, :, blocks.first_block - begin : end - begin] = own.fine[:, :, blocks.place : end + place]
        if (beyond := max(blocks.first_block, last)) < stop:  # of runs that others have parts of, a sum of these
            ones = own.one_each(slice(None), slice(beyond + place, stop + place))
            means = run_means(pad(ones, (0, 0, beyond % RUN, -stop % RUN)))
            at = beyond // RUN - max(begin, last) // RUN
            runs[:, :, at : at + means.shape[2]] = means

    def _take(self, begin: int, fine: Tensor, runs: Tensor) -> None:
        """Keep means of a document from block `begin` on: of first blocks, of runs."""
        if number := fine.shape[2]:
            if (room := self.fine.shape[2]) < begin + number:
                self._move(self.of, begin, max(begin + number, min(room * 3 // 2, self._last)))
            self.write_finest(slice(None), begin, fine)
        if number := runs.shape[2]:
            first_run = max(begin, self._last) // RUN
            self.of[RUNS] = pad(self.of[RUNS], (0, 0, 0, 0, 0, first_run + number - self.of[RUNS].shape[2]))
            self.of[RUNS][:, :, first_run:] += runs.to(self.fine.device)


def _among(means: Tensor, keys: Tensor, of_row: int, blocks: Tensor) -> Tensor:
    """Return the means (slots, K, n, m, D) of blocks (slots, n) of a row, whose keys are ascending."""
    return taken(means, torch.searchsorted(keys, of_row + blocks))


class RankBlocks(Blocks):
    """The first `number` blocks of a document, over ranks. `take` has those of the present run.

    gradients: in a backward pass, those of the run (n, k and v, tokens of a block, K, D), in fp32 or fp64.
    """

    def __init__(self, share: RankShare) -> None:
        super().__init__()
        self._share = share
        self._row = 0  # what a row of the batch adds to a key
        self._rows = self._keys = self._order = self.gradients = torch.empty(0)

    @property
    def nbytes(self) -> int:
        return self._share.nbytes

    def hold(self, rows: Tensor, keys: Tensor, blocks: int) -> None:
        """Hold a run: rows (n, k and v, tokens of a block, K, D) with keys (n,), row of the batch * blocks + block."""
        self._rows, self._row = rows, blocks
        self._keys, self._order = keys.sort()

    def release(self) -> None:
        self._rows = self.gradients = torch.empty(0)

    def take(self, row: int, blocks: Tensor, into: Tensor) -> None:
        places = self.places(row, blocks)
        for index, x in enumerate(into):
            torch.index_select(self._rows[:, index], 0, places, out=x)

    def places(self, row: int, blocks: Tensor) -> Tensor:
        """Return the places of some blocks (n,) of a row of the batch in the run."""
        return self._order[torch.searchsorted(self._keys, row * self._row + blocks)]


class RankPast(Past):
    """The past of a document in one layer, over ranks. See `Past`; each rank keeps the blocks that end in its shards.

    For each shard, all ranks call `enter` with their tokens, and then `append`, if other shards follow. In between,
    `position` is that of the shard. All ranks choose and read together.
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
        room: int | None = None,
    ) -> None:
        super().__init__(pattern, blocks, allocate, keep, layer, room)
        self._group, self._allocate_sums = group, allocate
        self._kept = self.blocks  # this rank's own
        self._share: RankShare | None = None  # from the first shard on
        self._new: list[NewBlocks] = []  # whose means are not there yet
        self._means = 0  # blocks whose means there are, or will be
        self._entered: Shards | None = None
        # after all shards: the position, and on the first rank the last queries and the rows that are no whole block
        self._end: tuple[int, Tensor | None, Tensor] | None = None

    @property
    def share(self) -> RankShare:
        assert self._share  # made by `enter`
        return self._share

    @torch.no_grad()
    def enter(self, shards: Shards, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Become the past of this rank's shard, with queries (B, n, H, D), keys and values (B, n, K, D).

        All ranks call this, each with its shard.
        """
        size, (mine, after), self._entered = self.pattern.chosen_block, shards.mine, shards
        if not self._share:
            like = k[:, :0].detach()
            means = Means(self.pattern, like, 0, self.allocate, runs=False)
            self._share = RankShare(self._group, shards.directory, self._kept, means, like, self._allocate_sums)
            self.blocks, self._waiting = RankBlocks(self._share), [torch.stack([like, like])]
            if self.kind == "chooses":
                self.means = RankMeans(self.pattern, self._share, self.allocate)
        document, stop = shards.document(mine)
        last, _ = shards.document(after - 1) if mine < after else (document, stop)
        inside = [edge - shards.document(edge)[0] for edge in shards.edges]
        rows, queries = torch.stack([k, v]), None
        before, end = _tails(shards, self._group, rows, self.waiting, 2, [position % size for position in inside])
        if self.kind == "chooses":
            held, most = q[:, :0] if self.queries is None else self.queries, self.pattern.last_queries
            self.queries, queries = _tails(
                shards, self._group, q, held, 1, [min(position, most) for position in inside]
            )
        self.position, self._waiting, self._end = mine - document, [before], (inside[-1], queries, end)
        if last != document:  # others read the last document; this rank's own, if it is another one, comes behind it
            self._keep(last, 0, rows[:, :, last - mine :])
        of_first = rows[:, :, : stop - mine]
        of_first = torch.cat([before, of_first], 2) if before.shape[2] else of_first
        self._keep(document, self.position // size, of_first, read=last == document)
        if shards.cached:
            self.share.directory.add(shards.edges)
        self.blocks.number = self.position // size

    def _keep(self, document: int, first_block: int, rows: Tensor, *, read: bool = True) -> None:
        """Keep whole blocks of a document, if others `read` it: rows (k and v, B, tokens, K, D); and their means."""
        size = self.pattern.chosen_block
        number = rows.shape[2] // size
        if self.kind == "sees_block_0":
            number = max(0, min(number, self.pattern.chosen - first_block))
        whole = rows[:, :, : number * size]
        if self.kind == "chooses":
            self._new.append(NewBlocks(document, first_block, number, self._means, whole[0]))
            self._means += number
        if number and read:
            self._kept.append(whole.unflatten(2, (number, size)))

    @torch.no_grad()
    def settle(self, turn: Turn | None) -> None:
        """Store the means of new blocks, and share those that all need. All ranks call this before they choose."""
        new, self._new[:] = [*self._new], []
        if not new:
            return
        for blocks in new:
            self.share.means.write(slice(None), blocks.place, blocks.keys, turn, blocks.first_block)
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
        asked, blocks, staying = asked or self.ask(wanted), self.blocks, None
        assert isinstance(blocks, RankBlocks)
        arriving = self.share.runs(ROWS, asked)
        for pieces, keys, leaving, given in zip(asked.pieces, asked.keys, asked.leaving, asked.given, strict=True):
            blocks.hold(next(arriving), keys, asked.blocks)
            if backward:
                blocks.gradients = self.share.sums.new_zeros(len(keys), *self.share.sums.shape[2:], device=keys.device)
            if staying:
                blocks.gradients[blocks.places(0, staying[0])] = staying[1]
            yield from pieces
            gradients = blocks.gradients
            blocks.release()
            if backward:
                staying = (keys[~leaving], gradients[~leaving]) if sum(given.of_owners) < len(keys) else None
                self.share.give(given, gradients[leaving] if staying else gradients)

    def add_gradients(self, row: int, index: int, blocks: Tensor, d: Tensor) -> None:
        assert isinstance(self.blocks, RankBlocks)
        self.blocks.gradients[:, index].index_add_(0, self.blocks.places(row, blocks), d)

    def fork(self) -> Past:
        """Raise ValueError: a fork would read where the other ranks do not."""
        raise ValueError("chosen blocks are shared by several ranks: only one process forks what it has read")

    def _rows_before(self, position: int, number: int) -> Tensor:
        return self.waiting[:, :, :0]  # each shard begins with a block

    def forget_means(self) -> None:
        if self._share:
            self.means, self._share.means.of = None, {}

    def hand_back(self, shards: Shards, like: Tensor) -> Tensor:
        """Return the gradients (k and v, B, n, K, D) of this rank's shard that have come back since the last call.

        `like` has the shape (B, n, K, D) and the device of the shard's keys.
        """
        sums, (mine, after) = self.share.sums, shards.mine
        total = torch.zeros(2, *like.shape, dtype=sums.dtype, device=like.device)
        document, _ = shards.document(max(mine, after - 1))  # the one that others read
        size, begin = self.pattern.chosen_block, max(mine, document)
        start, stop = (begin - document) // size, (after - document) // size
        if start < stop:
            place = 0 if begin > mine else int(self.share.directory.find(torch.tensor([start]))[1])
            rows = sums[:, place : place + stop - start]
            own = rows.movedim(2, 0).flatten(2, 3)
            total[:, :, begin - mine : begin - mine + own.shape[2]] = own
            rows.zero_()
        return total

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield to the group's first rank what `restore` needs in one process. All ranks iterate over it to the end.

        It holds some blocks, or one layer's means, at a time. An open group chooses again.
        """
        batch, total, like = len(self.share.like), self.share.directory.blocks, self.share.like
        self.blocks.number = min(total, self.pattern.chosen) if self.kind == "sees_block_0" else total
        every = torch.arange(self.blocks.number if dist.get_rank(self._group) == 0 else 0, device=like.device)
        counts = torch.zeros(batch, total, dtype=torch.int32, device=like.device)
        if self.counts is not None:
            counts[:, : self.counts.shape[1]] = self.counts[:, :total]
        dist.all_reduce(counts, group=self._group)
        yield "waiting", self.waiting if self.kept == self.position else self.waiting[:, :, :0]
        yield "counts", counts
        for number in range(-(-self.blocks.number // STATE_BLOCKS)):
            piece = every[number * STATE_BLOCKS :][:STATE_BLOCKS]
            into = like.new_empty(2, batch, len(piece), self.pattern.chosen_block, *like.shape[2:])
            for row, some in self.runs([(row, piece[:, None]) for row in range(batch)]):
                self.blocks.take(row, piece[some], into[:, row, some])
            yield f"blocks.{number}", into
        if self.kind == "chooses":
            assert self.means
            fine = self.means.fine.new_empty(batch, like.shape[2], len(every), self.means.finest, like.shape[3])
            wanted = [(row, every[:, None]) for row in range(batch)]
            for row, some, of_blocks in self.means.of_wanted(self.means.finest, wanted):
                fine[row, :, some] = of_blocks(every[some, None].T)[0]
            yield "queries", like.new_empty(batch, 0, 1, 1) if self.queries is None else self.queries
            yield "fine", fine
            yield from self.open_choices()


def _tails(
    shards: Shards, group: dist.ProcessGroup | None, x: Tensor, held: Tensor, axis: int, back: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the rows right before this rank's shard and, for a next chunk, the first rank those before the end.

    Before edge i, back[i] rows are wanted. x has the tokens of the shard along an axis; what the first rank has of
    tokens before all shards is `held`. All ranks call this.
    """
    wants = [(edge - number, edge) for edge, number in zip(shards.edges, back, strict=True)]
    begins = [wants[0][0], *shards.edges[1:-1]]
    readers = [wants[-1] if shards.cached else (0, 0), *wants[1:-1]]
    got, most = x.narrow(axis, 0, 0), max(back)
    if any(start < stop for start, stop in readers):
        own = x.narrow(axis, max(0, x.shape[axis] - most), min(most, x.shape[axis]))
        own = (torch.cat([held, own], axis) if shards.rank == 0 else own).movedim(axis, 0)
        start, stop = shards.mine[1] - len(own), shards.mine[1]
        parts = [own[max(a, start) - start : max(0, min(b, stop) - start)] for a, b in readers]
        a, b = readers[shards.rank]
        sizes = [max(0, min(b, stop) - max(a, begin)) for begin, stop in zip(begins, shards.edges[1:], strict=True)]
        rows = own.new_empty(sum(sizes), *own.shape[1:])
        dist.all_to_all_single(rows, torch.cat(parts), sizes, [len(part) for part in parts], group=group)
        got = rows.movedim(0, axis)
    return (held, got) if shards.rank == 0 else (got, held.narrow(axis, 0, 0))
