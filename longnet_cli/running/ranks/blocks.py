"""Chosen blocks over ranks: the rank that has read a block keeps it, and the others fetch what they have chosen.

    rank 0   its blocks and means  --+
    rank 1   its blocks and means  --+-- `fetching`: each rank asks once per layer, then all rows travel in runs
    rank 2   its blocks and means  --+

Shards end at blocks, so each block is in one shard; where a chunk ends inside one, the next chunk's first rank keeps
what there is of it. All ranks know the edges of all shards, so they know the owner of each block.

    in a layer that ..      what travels                                                         collectives
    chooses        enter    the last queries before a shard, from the ranks before it            1
                   settle   means of the first blocks and of runs, to all ranks, who keep them   1, in long documents 2
                   choose   in long documents: finer means of what remains after a stage         2 a stage, 1 a run
    chooses        attend   the blocks that were chosen                                          2, 1 a run
    follows        attend   the same blocks of its own keys: nobody asks                         1 a run
    sees block 0   attend   block 0                                                              2, 1 a run

B batch, n tokens of a shard, H query heads, K key heads, D head_dim, P ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from longnet_cli.attention.groups import first_means
from longnet_cli.attention.merging import accumulator
from longnet_cli.attention.past import Blocks, Means, OfBlocks, Past, Wanted, run_means, taken
from longnet_cli.attention.pattern import RUN, RUNS, Pattern
from longnet_cli.attention.sinks import Turn
from longnet_cli.running.ranks.fetching import ROWS, Asked, RankShare

if TYPE_CHECKING:
    from longnet_cli.running.ranks.exchange import Exchange


STATE_BLOCKS = 1 << 12  # of a piece of a saved state


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

    def __init__(self, pattern: Pattern, share: RankShare, allocate: Callable[..., Tensor]) -> None:
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
        share, last, spans, totals = self._share, self._first, dict[int, tuple[_Span, _Span]](), [0, 0]
        for start, stop in exchange.crossed:
            of_chunk = (min(max(edge, start), stop) - start for edge in (exchange.edges[0], exchange.edges[-1]))
            begin, end = (position // share.directory.size for position in of_chunk)
            ranges = range(min(begin, last), min(end, last)), range(max(begin, last) // RUN, -(-max(end, last) // RUN))
            fine, runs = (_Span(x.start, x.stop, total - x.start) for x, total in zip(ranges, totals, strict=True))
            spans[start], self._long = (fine, runs), self._long or end > last
            totals = [fine.stop + fine.offset, runs.stop + runs.offset]
        batch, heads, head_dim, own = len(share.like), *share.like.shape[2:], share.means
        sizes = [(totals[0], self.finest), (totals[1], 1)]
        of_fine, of_runs = (own.fine.new_zeros((batch, heads, *x, head_dim), device=share.like.device) for x in sizes)
        for blocks in new:
            if blocks.document not in spans:
                continue
            (fine, runs), place, stop = (
                spans[blocks.document],
                blocks.place - blocks.first,
                blocks.first + blocks.number,
            )
            begin, end = max(blocks.first, fine.start), min(stop, fine.stop)
            if begin < end:
                of_fine[:, :, begin + fine.offset : end + fine.offset] = own.fine[:, :, begin + place : end + place]
            if (begin := max(blocks.first, last)) < stop:  # of runs that others have parts of, a sum of these
                ones = pad(
                    own.one_each(slice(None), slice(begin + place, stop + place)), (0, 0, begin % RUN, -stop % RUN)
                )
                of_runs[:, :, begin // RUN + runs.offset :][:, :, : ones.shape[2] // RUN] = run_means(ones)
        for x in (of_fine, of_runs):
            if x.numel():
                dist.all_reduce(x, group=share.group)
        if mine := spans.get(exchange.document(exchange.mine[0])[0]):
            fine, runs = mine
            if (room := self.fine.shape[2]) < fine.stop:
                self._move(self.of, fine.start, max(fine.stop, min(room * 3 // 2, last)))
            self.write_finest(
                slice(None), fine.start, of_fine[:, :, fine.start + fine.offset : fine.stop + fine.offset]
            )
            if runs.start < runs.stop:
                more = of_runs[:, :, runs.start + runs.offset : runs.stop + runs.offset]
                self.of[RUNS] = pad(self.of[RUNS], (0, 0, 0, 0, 0, runs.stop - self.of[RUNS].shape[2]))
                self.of[RUNS][:, :, runs.start :] += more.to(self.fine.device)


class _Span(NamedTuple):
    """Blocks or runs of a document that a chunk has, whose means are `offset` further on in those of all documents."""

    start: int
    stop: int
    offset: int


def _among(means: Tensor, keys: Tensor, of_row: int, blocks: Tensor) -> Tensor:
    """Return the means (slots, K, n, m, D) of blocks (slots, n) of a row, whose keys are ascending."""
    return taken(means, torch.searchsorted(keys, of_row + blocks))


class RankBlocks(Blocks):
    """The first `number` blocks of a document, over ranks. `take` has those of the present run."""

    def __init__(self, share: RankShare) -> None:
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
        self._share: RankShare | None = None  # from the first shard on
        self._new: list[NewBlocks] = []  # whose means are not there yet
        self._means = 0  # blocks whose means there are, or will be
        self._entered: Exchange | None = None
        # after all shards: the position, and on the first rank the last queries and the rows that are no whole block
        self._end: tuple[int, Tensor | None, Tensor] | None = None

    @property
    def share(self) -> RankShare:
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
            self._share = RankShare(self._group, exchange.directory, self._kept, means, like, self._allocate_sums)
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
        """Keep whole blocks of a document, if others `read` it: rows (k and v, B, tokens, K, D); and their means."""
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
        """Store the means of new blocks, and share those that all need. All ranks call this before they choose."""
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
        batch, total, like = len(self.share.like), self.share.directory.blocks, self.share.like
        first = dist.get_rank(self._group) == 0
        counts = torch.zeros(batch, total, dtype=torch.int32, device=like.device)
        if self.counts is not None:
            counts[:, : self.counts.shape[1]] = self.counts[:, :total]
        dist.all_reduce(counts, group=self._group)
        self.blocks.number = min(total, self.pattern.chosen) if self.kind == "first" else total
        pieces = torch.arange(self.blocks.number, device=like.device)[:, None].split(STATE_BLOCKS) if first else ()
        wanted = [(row, piece) for piece in pieces for row in range(batch)]
        yield from (
            ("waiting", self.waiting if self.kept == self.position else self.waiting[:, :, :0]),
            ("counts", counts),
        )
        for index, some in self.runs(wanted):
            row, piece = index % batch, wanted[index][1]
            if not row and not some.start:
                into = like.new_empty(2, batch, len(piece), *self.share.empty(ROWS, 0).shape[2:])
            self.blocks.take(row, piece[some, 0], into[:, row, some])
            if row == batch - 1 and some.stop == len(piece):
                yield f"blocks.{index // batch}", into
        if self.kind == "chooses":
            assert self.means
            number = self.blocks.number if first else 0
            fine = self.means.fine.new_empty(*self.means.fine.shape[:2], number, *self.means.fine.shape[3:])
            for index, some, of_blocks in self.means.of_wanted(self.means.finest, wanted):
                blocks = wanted[index][1][some]
                fine[index % batch, :, blocks[:, 0]] = of_blocks(blocks.T)[0]
            yield "queries", like.new_empty(batch, 0, 1, 1) if self.queries is None else self.queries
            yield "fine", fine
            nothing = torch.empty(0, dtype=torch.int64)
            yield from (("held_at", nothing), ("scanned_at", nothing))
            yield "held", torch.zeros(batch, 1, 0, dtype=torch.int32)
            yield "scanned", torch.zeros(batch, 0, dtype=torch.int32)
