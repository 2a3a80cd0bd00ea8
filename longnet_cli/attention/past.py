"""The past of a document, from which blocks are chosen: all keys and values, mean keys, and the last queries.

It grows with the document. Keys and values lie in pieces of memory, in whole blocks; mean keys, an eighth of that for
keys of four bytes, in one. Keys, values and queries are stored as they come, rotated; mean keys are un-rotated.

B batch, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .merging import accumulator
from .pattern import MEAN_OF, VOTERS, Pattern
from .sinks import Turn

FIRST_BLOCKS = 1 << 6  # blocks in the first piece of memory; each next piece is half of all before, if that is more
SLICE = 1 << 12  # keys that are un-rotated at a time


class Means:
    """The mean keys of a document's first blocks, for a batch, un-rotated, in fp32 or fp64.

    fine: (B, K, blocks, means, D), of MEAN_OF keys each. coarse: (B, K, blocks, D), of whole blocks.
    """

    def __init__(self, pattern: Pattern, like: Tensor, blocks: int) -> None:
        """Allocate memory for as many blocks of keys like (B, tokens, K, D)."""
        self._block = pattern.chosen_block
        batch, _, heads, head_dim = like.shape
        dtype = accumulator(like.dtype)
        self.fine = like.new_empty(batch, heads, blocks, self._block // MEAN_OF, head_dim, dtype=dtype)
        self.coarse = like.new_empty(batch, heads, blocks, head_dim, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.fine, self.coarse))

    def write(self, rows: slice, first: int, keys: Tensor, turn: Turn | None) -> None:
        """Write the means of blocks from `first` on, in some rows of the batch: keys (rows, tokens, K, D) of theirs."""
        have, needed, size = self.fine.shape[2], first + keys.shape[1] // self._block, self._block
        if have < needed:
            more = max(needed, have * 3 // 2) - have
            self.fine, self.coarse = (
                torch.cat([x, x.new_empty(*x.shape[:2], more, *x.shape[3:])], 2) for x in (self.fine, self.coarse)
            )
        for begin in range(first, needed, max(1, SLICE // size)):
            stop = min(begin + max(1, SLICE // size), needed)
            some = keys[:, (begin - first) * size : (stop - first) * size]
            some = unrotated(some, torch.arange(begin * size, stop * size), turn)
            fine = sum(some.unflatten(1, (-1, size // MEAN_OF, MEAN_OF)).unbind(3)) / MEAN_OF
            self.fine[rows, :, begin:stop] = fine.movedim(3, 1)
            self.coarse[rows, :, begin:stop] = (sum(fine.unbind(2)) / fine.shape[2]).movedim(2, 1)

    def select(self, index: Tensor) -> None:
        self.fine, self.coarse = (x.index_select(0, index) for x in (self.fine, self.coarse))


def unrotated(x: Tensor, positions: Tensor, turn: Turn | None) -> Tensor:
    """Return keys or queries (rows, n, heads, D), turned by minus their positions (n,), in fp32 or fp64."""
    x = x.to(accumulator(x.dtype))
    return x if turn is None else turn(x[:, :, None], -positions.to(x.device))[:, :, 0]


class Past:
    """The first `position` tokens of a document, for a batch: what later queries choose blocks from.

    A `KVCache` keeps one, and gives it out with its far keys. Shards are appended as they come; whole blocks are stored
    by `settle`, which needs `turn`. `queries` (B, n, H, D) are the last queries: an open group's, and its voters.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.pattern, self.position = pattern, 0
        self.queries: Tensor | None = None
        self.means: Means | None = None
        self.pieces: list[Tensor] = []  # (k and v, B, blocks, tokens of a block, K, D)
        self.stored = 0  # blocks
        self.held: tuple[int, list[Tensor]] | None = None  # the first position of the last open group, and its choice
        self._waiting: list[Tensor] = []  # (k and v, B, tokens, K, D), after the stored blocks

    @property
    def nbytes(self) -> int:
        found = [*self.pieces, *self._waiting] + ([] if self.queries is None else [self.queries])
        return sum(x.numel() * x.element_size() for x in found) + (self.means.nbytes if self.means else 0)

    @property
    def waiting(self) -> Tensor:
        """The keys and values after the stored blocks, (k and v, B, tokens, K, D)."""
        if len(self._waiting) > 1:
            self._waiting = [torch.cat(self._waiting, 2)]
        return self._waiting[0]

    @torch.no_grad()
    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Add the next tokens' queries (B, n, H, D), and keys and values (B, n, K, D)."""
        self._waiting.append(torch.stack([k, v]))
        self.position += k.shape[1]
        last = self.pattern.chosen_every + VOTERS - 2  # of the open group, the last token may be missing
        found = q if self.queries is None or q.shape[1] >= last else torch.cat([self.queries, q], 1)
        self.queries = found[:, -last:].clone()

    @torch.no_grad()
    def settle(self, turn: Turn | None) -> None:
        """Store the blocks that are whole, and their means."""
        size, rows = self.pattern.chosen_block, self.waiting
        if not (blocks := rows.shape[2] // size):
            return
        whole = rows[:, :, : blocks * size]
        if self.means is None:
            self.means = Means(self.pattern, whole[0], max(blocks, FIRST_BLOCKS))
        self.means.write(slice(None), self.stored, whole[0], turn)
        self._store(whole.unflatten(2, (blocks, size)))
        self._waiting = [rows[:, :, blocks * size :].clone()]

    def take(self, row: int, blocks: Tensor) -> Tensor:
        """Return stored blocks (n,) of one row of the batch: (k and v, n, tokens of a block, K, D)."""
        if len(self.pieces) == 1:
            return self.pieces[0][:, row].index_select(1, blocks)
        first, found = 0, None
        for piece in self.pieces:
            inside = ((blocks >= first) & (blocks < first + piece.shape[2])).nonzero()[:, 0]
            part = piece[:, row].index_select(1, blocks[inside] - first)
            found = part.new_empty(2, len(blocks), *part.shape[2:]) if found is None else found
            found[:, inside] = part
            first += piece.shape[2]
        assert found is not None
        return found

    def select(self, rows: Tensor) -> None:
        """Reorder the batch, in new memory: row i becomes what row `rows[i]` was."""
        self.pieces, self._waiting = ([x.index_select(1, rows) for x in xs] for xs in (self.pieces, self._waiting))
        self.queries = None if self.queries is None else self.queries.index_select(0, rows)
        self.held = None
        if self.means:
            self.means.select(rows)

    def _store(self, blocks: Tensor) -> None:
        """Write blocks (k and v, B, n, tokens of a block, K, D) after the stored ones."""
        done = 0
        while done < blocks.shape[2]:
            room = sum(piece.shape[2] for piece in self.pieces)
            if room == self.stored:
                number = max(FIRST_BLOCKS, room // 2)
                self.pieces.append(blocks.new_empty(*blocks.shape[:2], number, *blocks.shape[3:]))
                room += number
            piece = self.pieces[-1]
            n = min(room - self.stored, blocks.shape[2] - done)
            at = piece.shape[2] - (room - self.stored)
            piece[:, :, at : at + n] = blocks[:, :, done : done + n]
            done, self.stored = done + n, self.stored + n
