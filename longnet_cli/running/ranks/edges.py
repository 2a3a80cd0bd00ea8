"""The contiguous shards of a sequence over ranks: their edges, the documents in them, and the owners of blocks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


class Shards:
    """The shards with these P + 1 `edges`, as seen by one `rank`: rank i holds [edges[i], edges[i + 1]), maybe nothing.

    `cuts` are the positions at which documents start. `cached` shards are a chunk of a document that started at 0, and
    others may follow. Edges between shards are those of blocks of `size` tokens: otherwise, raises ValueError.
    """

    def __init__(self, edges: Sequence[int], rank: int, size: int, cuts: Sequence[int] = (), *, cached: bool) -> None:
        self.edges, self.rank, self.size, self.cached = list(edges), rank, size, cached
        begin = 0 if cached else self.edges[0]
        self.starts = sorted({begin, *(cut for cut in cuts if self.edges[0] < cut < self.edges[-1])})
        for edge in self.edges[1:-1]:
            if (edge - self.document(edge)[0]) % size and edge not in (self.edges[0], self.edges[-1]):
                raise ValueError(f"the edge {edge} cuts a block of {size} tokens: see even_edges")

    @property
    def ranks(self) -> int:
        return len(self.edges) - 1

    @property
    def mine(self) -> tuple[int, int]:
        """The edges of this rank's shard."""
        return self.edges[self.rank], self.edges[self.rank + 1]

    @property
    def start(self) -> int:
        """Position of this rank's first token in its document."""
        return self.mine[0] - self.document(self.mine[0])[0]

    @property
    def shard(self) -> slice:
        """This rank's part of the chunk's tokens."""
        return slice(*(edge - self.edges[0] for edge in self.mine))

    @property
    def documents(self) -> list[int] | None:
        """Lengths of the documents in this rank's shard; None for a single document."""
        start, stop = self.mine
        inside = [start, *(cut for cut in self.starts if start < cut < stop), stop]
        return [b - a for a, b in pairwise(inside)] if len(inside) > 2 else None

    @property
    def crossed(self) -> list[tuple[int, int]]:
        """The starts and ends of documents that several ranks read, or later chunks."""
        inside = [self.edges[-1] - 1] if self.cached else [e for e in self.edges[1:-1] if e not in self.starts]
        return sorted({self.document(edge) for edge in inside if self.edges[0] <= edge < self.edges[-1]})

    @cached_property
    def directory(self) -> Directory:
        """The owners of the blocks of the document at this rank's start. If `cached`, chunks add theirs."""
        directory, (mine, after) = Directory(self.size, self.ranks), self.mine
        if self.cached:
            return directory
        start, stop = self.document(mine)
        if mine < after and (last := self.document(after - 1)[0]) != start:
            directory.held[self.rank] = (after - last) // self.size  # blocks that others read come first
        directory.add([min(max(edge, start), stop) - start for edge in self.edges])
        return directory

    def document(self, position: int) -> tuple[int, int]:
        """Return the start and the end of the document that holds a position."""
        index = bisect_right(self.starts, position)
        return self.starts[index - 1], self.starts[index] if index < len(self.starts) else self.edges[-1]


class Directory:
    """The owners of a document's blocks of `size` tokens, and each block's place among those of its owner.

    blocks: their number. held: the number of each rank.
    """

    def __init__(self, size: int, ranks: int) -> None:
        self.size, self.blocks, self.held = size, 0, [0] * ranks
        self._spans: list[tuple[int, int, int]] = []  # first block, owner, place of the first block
        self._stop, self._table = 0, torch.empty(3, 0, dtype=torch.int64)

    def add(self, edges: Sequence[int]) -> None:
        """Add the blocks whose last tokens are in the shards with these P + 1 edges, unless they are there already."""
        if edges[-1] <= self._stop:
            return
        for rank, (first_block, stop) in enumerate(pairwise(edge // self.size for edge in edges)):
            if first_block < stop:
                self._spans.append((first_block, rank, self.held[rank]))
                self.held[rank] += stop - first_block
                self.blocks = stop
        self._stop, self._table = edges[-1], torch.tensor(self._spans, dtype=torch.int64).view(-1, 3).T.contiguous()

    def find(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the owners of blocks (n,), and their places there."""
        first_blocks, owners, places = self._table = self._table.to(blocks.device)
        at = torch.searchsorted(first_blocks, blocks, right=True) - 1
        return owners[at], places[at] + blocks - first_blocks[at]


def most_owned(size: int, tokens: int, chunk: int, ranks: int) -> int:
    """Return the most blocks of `size` that a rank has of a sequence in chunks of `chunk` tokens, which ranks share."""
    directory = Directory(size, ranks)
    for start in range(0, tokens, chunk):
        directory.add(even_edges(start, min(chunk, tokens - start), ranks, size))
    return max(directory.held)


def even_edges(start: int, tokens: int, ranks: int, size: int = 1, cuts: Sequence[int] = ()) -> list[int]:
    """Return the P + 1 edges of shards whose lengths differ by at most one token, or by one block of `size`.

    Edges between shards are those of blocks, in the documents that start at 0 and at the `cuts`.
    """
    starts, stop, edges = [0, *sorted(cuts)], start + tokens, [start]
    for rank in range(1, ranks):
        edge = start + tokens * rank // ranks
        document, *after = starts[bisect_right(starts, edge) - 1 :]
        edge = document + (edge - document + (size - 1) // 2) // size * size
        edges.append(max(start, min(edge, stop, *after[:1])))
    return [*edges, stop]


def whole_blocks(chunk: int, size: int) -> int:
    """Return the longest chunk of at most so many tokens that has whole blocks of `size`, or one block."""
    return max(size, chunk // size * size)
