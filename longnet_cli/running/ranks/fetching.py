"""The rows that ranks fetch of a layer's past: they ask once, and then all rows travel in runs that all take together.

    a reader                                        the owners
    knows what its groups or slots want   -- ask -->   how many rows in how many runs, and which: two collectives
    waits for run 0                       <-- rows --  one collective for each run, of as many runs
    attends with run 0                    <-- rows --  run 1                     as the rank with most of them needs
    attends with run 1                    <-- rows --  run 2
    ...
    in a backward pass, after each run    -- give -->  add gradients to their sums, in the order of ranks

A run has the distinct rows that neighbouring groups want, as many as its memory allows. Both sides keep what was
asked: a backward pass asks nothing, nor do layers that see the same blocks. It gives the gradient of a block back
after the last of neighbouring runs that have it: that of block 0 once.

B batch, K key heads, D head_dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention.groups import limits_of
from longnet_cli.attention.past import Blocks, Means, Wanted
from longnet_cli.attention.views import accumulator
from longnet_cli.running.ranks.edges import Directory

RUN_BYTES = 1 << 28  # of the rows of a run; those of two runs are there at a time
PIECES = 8  # what is wanted is divided into runs by pieces, of which a run has so many or more
ROWS = -1  # the kind of rows that are blocks of keys and values; other kinds are means, so many of each block


class Route(NamedTuple):
    """Rows that travel in a run: how many between this rank and each owner, and between it and each reader.

    wanted: those of the readers, one reader after the other, (n, row of the batch and place).
    """

    of_owners: list[int]
    of_readers: list[int]
    wanted: Tensor

    @classmethod
    def of_runs(cls, owners: Tensor, readers: Tensor, wanted: Tensor, runs: int, ranks: int) -> list[Route]:
        """Return the routes of all runs, given run * ranks + owner, or reader, of each row that a rank wants."""
        counts, numbers = (x.bincount(minlength=runs * ranks).view(runs, ranks).tolist() for x in (owners, readers))
        rows = wanted[readers.argsort(stable=True)].split([*map(sum, numbers)])
        return [cls(*of_run) for of_run in zip(counts, numbers, rows, strict=True)]


class Asked(NamedTuple):
    """The rows that a rank gets in each run, and those that the others get from it: the same number of runs for all.

    pieces: indices of what it wants, and which of their n. keys: what comes, in that order: row of the batch *
    `blocks` + block. leaving: of these, which the next run does not have, so that a backward pass gives their gradients
    back after this one. fetched, given: the routes of rows, and of gradients.
    """

    pieces: list[list[tuple[int, slice]]]
    keys: Sequence[Tensor]
    leaving: Sequence[Tensor]
    blocks: int
    fetched: list[Route]
    given: list[Route]


class RankShare:
    """A rank's own blocks of a layer's past and, if the layer chooses, their means: what it answers others from.

    sums: for a backward pass, those of gradients (B, blocks, k and v, tokens of a block, K, D) in fp32 or fp64.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        directory: Directory,
        blocks: Blocks,
        means: Means,
        like: Tensor,
        allocate_sums: Callable[..., Tensor],
    ) -> None:
        """Take keys like (B, 0, K, D)."""
        self.group, self.directory, self.ranks = group, directory, dist.get_world_size(group)
        self.blocks, self.means, self.like, self._allocate_sums = blocks, means, like, allocate_sums
        self._sums: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.means.nbytes

    @property
    def sums(self) -> Tensor:
        """The sums of gradients, zeros at first. Call it when all blocks are there."""
        if self._sums is None:
            shape = len(self.like), self.blocks.number, *self.empty(ROWS, 0).shape[1:]
            self._sums = self._allocate_sums(shape, dtype=accumulator(self.like.dtype), device=self.like.device).zero_()
        return self._sums

    def empty(self, kind: int, number: int) -> Tensor:
        """Return memory for rows of a kind: (n, k and v, tokens of a block, K, D), or means (n, K, m, D)."""
        heads, head_dim = self.like.shape[2:]
        if kind == ROWS:
            return self.like.new_empty(number, 2, self.directory.size, heads, head_dim)
        return self.like.new_empty(number, heads, kind, head_dim, dtype=accumulator(self.like.dtype))

    def ask(self, kind: int, wanted: Wanted, before: int) -> Asked:
        """Ask the owners for the blocks below `before` that are wanted. All ranks call this together."""
        row, blocks, ranks = self.empty(kind, 1), self.directory.blocks, self.ranks
        most, pieces, nothing = max(1, RUN_BYTES // row.nbytes), list[tuple[int, slice]](), row.new_empty(0).long()
        all_keys, all_pieces = [nothing], [nothing]
        for index, (of_batch, some) in enumerate(wanted):
            step, here = max(1, most // (PIECES * some.shape[1])), some < before
            of_some = torch.arange(len(some), device=row.device)[:, None] // step + len(pieces)
            pieces += [(index, slice(start, min(start + step, len(some)))) for start in range(0, len(some), step)]
            all_keys.append((of_batch * blocks + some)[here])
            all_pieces.append(of_some.expand_as(some)[here])
        keys, runs, begins = _in_runs(torch.cat(all_keys), torch.cat(all_pieces), len(pieces), most)
        leaving = torch.ones_like(keys, dtype=torch.bool)
        leaving[:-1] = (keys.diff() != 0) | (runs.diff() != 1)
        owners, places = self.directory.find(keys % max(1, blocks))
        asks = torch.stack([runs, keys // max(1, blocks), places, leaving], 1)[owners.argsort(stable=True)]

        says = torch.stack([owners.bincount(minlength=ranks), owners.new_full((ranks,), len(begins) - 1)], 1)
        heard = torch.empty_like(says)
        dist.all_to_all_single(heard, says, group=self.group)
        got, of_ranks = heard.T.tolist()
        asked, every = asks.new_empty(sum(got), 4), max(of_ranks)
        dist.all_to_all_single(asked, asks, got, says[:, 0].tolist(), group=self.group)
        of_owners, of_asked = runs * ranks + owners, asked[:, 3].bool()
        of_readers = asked[:, 0] * ranks + torch.arange(ranks, device=row.device).repeat_interleave(heard[:, 0])
        by_run, sizes = of_owners.argsort(stable=True), runs.bincount(minlength=every).tolist()
        of_pieces = [_joined(pieces[start:stop]) for start, stop in pairwise(begins)]
        return Asked(
            of_pieces + [[]] * (every - len(of_pieces)),
            keys[by_run].split(sizes),
            leaving[by_run].split(sizes),
            blocks,
            Route.of_runs(of_owners, of_readers, asked[:, 1:3], every, ranks),
            Route.of_runs(of_owners[leaving], of_readers[of_asked], asked[of_asked, 1:3], every, ranks),
        )

    def runs(self, kind: int, asked: Asked) -> Iterator[Tensor]:
        """Yield what comes in each run, as `empty` gives it, while that of the next one travels."""
        flight = self._send(kind, asked.fetched[0]) if asked.fetched else None
        for route in [*asked.fetched[1:], None]:
            if not flight:
                return
            got, work, _ = flight
            work.wait()
            flight = self._send(kind, route) if route else None
            yield got
            del got

    def give(self, route: Route, gradients: Tensor) -> None:
        """Give the owners gradients of blocks, in fp32 or fp64, in the order in which these came."""
        got = gradients.new_empty(sum(route.of_readers), *gradients.shape[1:])
        dist.all_to_all_single(got, gradients, route.of_readers, route.of_owners, group=self.group)
        rows, places = route.wanted.unbind(1)
        into = self.sums.flatten(0, 1)
        into.index_add_(0, (rows * self.sums.shape[1] + places).to(into.device), got.to(into.device))

    def _send(self, kind: int, route: Route) -> tuple[Tensor, Any, Tensor]:
        """Return what is on its way to this rank, the work that ends with it, and what is sent meanwhile."""
        got, sent = (self.empty(kind, sum(sizes)) for sizes in route[:2])
        # in one piece of memory, blocks may be taken in any order; those that one reader wants are in order
        at_once = limits_of(sent).whole and len(self.like) == 1
        sizes = [len(sent)] if at_once else route.of_readers
        for wanted, into in zip(route.wanted.split(sizes), sent.split(sizes), strict=True):
            rows = [len(into)] if len(self.like) == 1 else wanted[:, 0].bincount(minlength=len(self.like)).tolist()
            for row, (places, some) in enumerate(zip(wanted[:, 1].split(rows), into.split(rows), strict=True)):
                self._take(kind, row, places, some)
        work = dist.all_to_all_single(got, sent, route.of_owners, route.of_readers, group=self.group, async_op=True)
        return got, work, sent

    def _take(self, kind: int, row: int, places: Tensor, into: Tensor) -> None:
        """Copy this rank's rows at some places (n,), ascending, to `into` (n, ..)."""
        if kind == ROWS and len(into):
            self.blocks.take(row, places.contiguous(), into.transpose(0, 1))
        elif len(into):
            means = self.means.of[kind][row].transpose(0, 1)
            into.copy_(means.index_select(0, places.to(means.device)))


def _in_runs(keys: Tensor, pieces: Tensor, number: int, most: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return the distinct keys (n,) of each run, ascending, the run of each, and the pieces with which runs begin.

    Of the `number` of pieces, each key has one. A run has at most so many keys, or one piece.
    """
    order = keys.argsort(stable=True)
    keys, pieces = keys[order], pieces[order]
    same = torch.zeros_like(keys, dtype=torch.bool)
    same[1:] = keys.diff() == 0
    last = pieces.roll(1).where(same, -1)  # the piece before that has the key
    begins = [0]
    while begins[-1] < number:
        new = (last < begins[-1]) & (pieces >= begins[-1])
        total = pieces[new].bincount(minlength=number).cumsum(0)
        begins.append(max(begins[-1] + 1, int((total <= most).sum())))
    starts = torch.tensor(begins, device=keys.device)
    runs = torch.searchsorted(starts, pieces, right=True) - 1
    new = last < starts[runs]
    return keys[new], runs[new], begins


def _joined(pieces: Sequence[tuple[int, slice]]) -> list[tuple[int, slice]]:
    """Return neighbouring pieces of the same index as one."""
    same = [[*some] for _, some in groupby(pieces, key=itemgetter(0))]
    return [(some[0][0], slice(some[0][1].start, some[-1][1].stop)) for some in same]
