"""The rows that ranks fetch of a layer's past: they ask once, and then all rows travel in runs that all take together.

    a reader                                        the owners
    knows what its groups or slots want   -- ask -->   how many rows in how many runs, and which: two collectives
    waits for run 0                       <-- rows --  one collective for each run, of as many runs
    attends with run 0                    <-- rows --  run 1                     as the rank with most of them needs
    attends with run 1                    <-- rows --  run 2
    ...
    in a backward pass, after each run    -- give -->  add its gradients to their sums, in the order of ranks

A run has the distinct rows that neighbouring groups want, as many as its memory allows. Both sides keep what was
asked: a backward pass asks nothing, nor do layers that see the same blocks.

B batch, K key heads, D head_dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from math import ceil
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention.groups import Fetches, first_means, stages
from longnet_cli.attention.limits import limits_of
from longnet_cli.attention.merging import accumulator
from longnet_cli.attention.past import Blocks, Means, Wanted
from longnet_cli.attention.pattern import LayerKind, Pattern

RUN_BYTES = 1 << 28  # of the rows of a run; those of two runs are there at a time
PIECES = 8  # what is wanted is divided into runs by pieces, of which a run has so many or more
ROWS = -1  # the kind of rows that are blocks of keys and values; other kinds are means, so many of each block


class Directory:
    """The owners of a document's blocks of `size` tokens, and each block's place among those of its owner.

    blocks: their number. held: the number of each rank. spans: first block, owner, place of the first block.
    """

    def __init__(self, size: int, ranks: int) -> None:
        self.size, self.blocks, self.held = size, 0, [0] * ranks
        self.spans: list[tuple[int, int, int]] = []
        self._stop, self._table = 0, torch.empty(3, 0, dtype=torch.int64)

    def add(self, edges: Sequence[int]) -> None:
        """Add the blocks whose last tokens are in the shards with these P + 1 edges, unless they are there already."""
        if edges[-1] <= self._stop:
            return
        for rank, (first, stop) in enumerate(pairwise(edge // self.size for edge in edges)):
            if first < stop:
                self.spans.append((first, rank, self.held[rank]))
                self.held[rank] += stop - first
                self.blocks = stop
        self._stop, self._table = edges[-1], torch.tensor(self.spans, dtype=torch.int64).view(-1, 3).T.contiguous()

    def find(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the owners of blocks (n,), and their places there."""
        firsts, owners, places = self._table = self._table.to(blocks.device)
        at = torch.searchsorted(firsts, blocks, right=True) - 1
        return owners[at], places[at] + blocks - firsts[at]


class Asked(NamedTuple):
    """The rows that a rank gets in each run, and those that the others get from it.

    pieces: for each of this rank's runs, indices of what it wants, and which of their n. keys: for each, what comes, in
    that order: row of the batch * `blocks` + block. counts, numbers: for each of all runs, the rows from each owner and
    for each reader. wanted: those for the readers, (n, row of the batch and place).
    """

    pieces: list[list[tuple[int, slice]]]
    keys: Sequence[Tensor]
    blocks: int
    counts: list[list[int]]
    wanted: Sequence[Tensor]
    numbers: list[list[int]]


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
            pieces += [(index, slice(first, min(first + step, len(some)))) for first in range(0, len(some), step)]
            all_keys.append((of_batch * blocks + some)[here])
            all_pieces.append(of_some.expand_as(some)[here])
        keys, runs, begins = _in_runs(torch.cat(all_keys), torch.cat(all_pieces), len(pieces), most)
        owners, places = self.directory.find(keys % max(1, blocks))
        number, by_run = len(begins) - 1, (runs * ranks + owners).argsort(stable=True)
        counts = (runs * ranks + owners).bincount(minlength=number * ranks).view(number, ranks)
        asks = torch.stack([runs, keys // max(1, blocks), places], 1)[owners.argsort(stable=True)]

        says = torch.stack([counts.sum(0), counts.new_full((ranks,), number)], 1)
        heard = torch.empty_like(says)
        dist.all_to_all_single(heard, says, group=self.group)
        sent, (got, of_ranks) = says[:, 0].tolist(), heard.T.tolist()
        asked, every = asks.new_empty(sum(got), 3), max(of_ranks)
        dist.all_to_all_single(asked, asks, got, sent, group=self.group)
        of_run = asked[:, 0] * ranks + torch.arange(ranks, device=row.device).repeat_interleave(heard[:, 0])
        numbers = of_run.bincount(minlength=every * ranks).view(every, ranks).tolist()
        return Asked(
            [_joined(pieces[first:stop]) for first, stop in pairwise(begins)],
            keys[by_run].split(counts.sum(1).tolist()) if number else (),
            blocks,
            counts.tolist() + [[0] * ranks] * (every - number),
            asked[of_run.argsort(stable=True), 1:].split([*map(sum, numbers)]) if every else (),
            numbers,
        )

    def runs(self, kind: int, asked: Asked) -> Iterator[Tensor]:
        """Yield what comes in each run, as `empty` gives it, while that of the next one travels."""
        flight = self._send(kind, asked, 0) if asked.counts else None
        for run in range(len(asked.counts)):
            assert flight
            got, work, _ = flight
            work.wait()
            flight = self._send(kind, asked, run + 1) if run + 1 < len(asked.counts) else None
            yield got
            del got

    def give(self, asked: Asked, run: int, gradients: Tensor) -> None:
        """Give the owners the gradients of a run's blocks, in fp32 or fp64, in the order in which these came."""
        got = gradients.new_empty(sum(asked.numbers[run]), *gradients.shape[1:])
        dist.all_to_all_single(got, gradients, asked.numbers[run], asked.counts[run], group=self.group)
        rows, places = asked.wanted[run].unbind(1)
        into = self.sums.flatten(0, 1)
        into.index_add_(0, (rows * self.sums.shape[1] + places).to(into.device), got.to(into.device))

    def _send(self, kind: int, asked: Asked, run: int) -> tuple[Tensor, Any, Tensor]:
        """Return what is on its way to this rank, the work that ends with it, and what is sent meanwhile."""
        got, sent = (self.empty(kind, sum(sizes)) for sizes in (asked.counts[run], asked.numbers[run]))
        # in one piece of memory, blocks may be taken in any order; those that one reader wants are in order
        at_once = limits_of(sent).whole and len(self.like) == 1
        sizes = [len(sent)] if at_once else asked.numbers[run]
        for wanted, into in zip(asked.wanted[run].split(sizes), sent.split(sizes), strict=True):
            rows = [len(into)] if len(self.like) == 1 else wanted[:, 0].bincount(minlength=len(self.like)).tolist()
            for row, (places, some) in enumerate(zip(wanted[:, 1].split(rows), into.split(rows), strict=True)):
                self._take(kind, row, places, some)
        work = dist.all_to_all_single(got, sent, asked.counts[run], asked.numbers[run], group=self.group, async_op=True)
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


def collectives(
    pattern: Pattern, edges: Sequence[int], kv_heads: int, head_dim: int, itemsize: int, kind: LayerKind
) -> tuple[int, int, int]:
    """Return the collectives for a layer's chosen blocks: in a forward pass, again without asking, of gradients.

    The last rank, which fetches most, has runs of the expected blocks. A backward pass has those of the last two.
    """
    fetches = Fetches.expected(pattern, edges, len(edges) - 2, kind)
    blocks = fetches.blocks * 2 * pattern.chosen_block * kv_heads * head_dim * itemsize
    runs, asking = ceil(blocks / RUN_BYTES), 0 if kind == "follows" else 2
    if kind == "chooses":
        long = edges[-1] // pattern.chosen_block > first_means(pattern)
        scans = ceil(fetches.means * kv_heads * head_dim * max(4, itemsize) / RUN_BYTES) + 2 * len(stages(pattern))
        asking += 2 + (
            1 + scans if long else 0
        )  # the last queries and the first means; runs, and stages after the first
    return asking + runs, runs, runs
