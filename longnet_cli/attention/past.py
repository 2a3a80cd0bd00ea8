"""The past of a document, from which blocks are chosen: all keys and values, mean keys, and the last queries.

It grows with the document. Keys and values lie in pieces of memory or elsewhere, in whole blocks; mean keys, a fifth
of that for keys of four bytes, in one, and only in layers that choose. Keys, values and queries are stored as they
come, rotated; mean keys are un-rotated.

B batch, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import GroupedPart, limits_of, stages
from .pattern import MEAN_OF, Pattern
from .sinks import Turn
from .views import accumulator

FIRST_BLOCKS = (
    1 << 6
)  # blocks in the first piece of memory; each next piece is half of all before, if that is more

Shape = tuple[int, ...]
GroupBlocks = list[
    list[Tensor]
]  # what groups see: of each part, and of each of its rows, (groups, m) int32, ascending


class Seen(NamedTuple):
    """The blocks that the groups of a part see in a layer: for each row, (groups, m) int32, ascending.

    votes: some of the groups -> for each row, the votes (groups, m) for their blocks by all keys, 0 for block 0. Only a
    layer that chooses has votes, and only during the call that gives them.
    """

    part: GroupedPart
    blocks: list[Tensor]
    votes: Callable[[slice], list[Tensor]]


class Means:
    """The mean keys of a document's first blocks, for a batch, un-rotated, in fp32 or fp64.

    of: by the number of means per block (`ChoiceStage.means`), the means (B, K, blocks, number, D).
    """

    def __init__(
        self,
        pattern: Pattern,
        like: Tensor,
        blocks: int,
        allocate: Callable[..., Tensor] = torch.empty,
    ) -> None:
        """Allocate memory for as many blocks of keys like (B, tokens, K, D)."""
        self._block, self.finest = pattern.chosen_block, pattern.chosen_block // MEAN_OF
        self._allocate = partial(allocate, dtype=accumulator(like.dtype), device=like.device)
        batch, _, heads, head_dim = like.shape
        self.of = {
            number: self._allocate((batch, heads, blocks, number, head_dim))
            for number in {*(stage.means for stage in stages(pattern)), self.finest}
        }

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.of.values())

    @property
    def fine(self) -> Tensor:
        """The means of MEAN_OF keys each."""
        return self.of[self.finest]

    def of_first(self, number: int, row: int, blocks: int) -> Tensor:
        """Return the means (K, blocks, m, D) of the first blocks of a row of the batch: `number` of each."""
        return self.of[number][row, :, :blocks]

    def of_blocks(self, number: int, row: int, blocks: Tensor) -> Tensor:
        """Return the means (slots, K, n, m, D) of some blocks (slots, n) of a row of the batch: `number` of each."""
        means = self.of[number][row]
        of_heads = torch.arange(0, means.shape[:2].numel(), means.shape[1], device=blocks.device)
        places = blocks[:, None] + of_heads[:, None]
        return (
            means.view(-1, *means.shape[2:])
            .index_select(0, places.flatten())
            .unflatten(0, places.shape)
        )

    def numbers(self, number: int) -> int:
        """Return the numbers in the means of one block, if there are `number` of each: K m D."""
        return self.of[number][0, :, :1].numel()

    def write(self, rows: slice, first_block: int, keys: Tensor, turn: Turn | None) -> None:
        """Write the means of blocks from `first_block` on, in some rows of the batch, of keys (rows, tokens, K, D)."""
        have, needed, size = (
            self.fine.shape[2],
            first_block + keys.shape[1] // self._block,
            self._block,
        )
        if (
            have < needed
        ):  # more room than is needed costs no memory as long as nothing is written there
            self._move(have, max(needed, have * 3 // 2))
        step = max(1, limits_of(keys).unrotated // size)
        for begin in range(first_block, needed, step):
            stop = min(begin + step, needed)
            some = keys[:, (begin - first_block) * size : (stop - first_block) * size]
            some = unrotated(
                some, torch.arange(begin * size, stop * size, device=keys.device), turn
            )
            fine = _mean(some.unflatten(1, (-1, self.finest, MEAN_OF)), 3)
            self.write_finest(rows, begin, fine.movedim(3, 1))

    def write_finest(self, rows: slice, first_block: int, fine: Tensor) -> None:
        """Write blocks from `first_block` on, given their finest means (rows, K, n, means, D)."""
        stop = first_block + fine.shape[2]
        for number, means in self.of.items():
            means[rows, :, first_block:stop] = _mean(fine.unflatten(3, (number, -1)), 4)

    def select(self, index: Tensor) -> None:
        self.of = {number: x.index_select(0, index) for number, x in self.of.items()}

    def fork(self, number: int) -> Means:
        """Return a copy of the means of the first `number` blocks."""
        new = copy.copy(self)
        new._move(number, max(number, FIRST_BLOCKS))
        return new

    def _move(self, number: int, room: int) -> None:
        """Move the means of the first `number` blocks to new memory, for `room` blocks."""
        earlier, self.of = self.of, {}
        for n, old in earlier.items():
            self.of[n] = self._allocate((*old.shape[:2], room, *old.shape[3:]))
            self.of[n][:, :, :number] = old[:, :, :number]


def _mean(x: Tensor, axis: int) -> Tensor:
    """Return the mean along an axis, summed one after the other: equal whatever other rows there are."""
    parts = x.unbind(axis)
    return sum(parts[1:], parts[0]) / len(parts)


def unrotated(x: Tensor, positions: Tensor, turn: Turn | None) -> Tensor:
    """Return keys or queries (rows, n, heads, D), turned by minus their positions (n,), in fp32 or fp64."""
    x = x.to(accumulator(x.dtype))
    return x if turn is None else turn(x[:, :, None], -positions.to(x.device))[:, :, 0]


class Blocks:
    """The blocks of keys and values of a document, for a batch, in memory that grows in pieces and is never copied.

    On a GPU, they move to one larger piece instead: a copy is fast there, and `take` is one call. Another class with
    these methods may keep them elsewhere (`running.memory_maps.BlockFile`).
    """

    def __init__(self, allocate: Callable[..., Tensor] = torch.empty, room: int = 0) -> None:
        """Allocate memory for `room` blocks at once, or else for FIRST_BLOCKS."""
        self.number, self._allocate, self._room = 0, allocate, room
        self._pieces: list[Tensor] = []  # (k and v, B, blocks, tokens of a block, K, D)

    @property
    def nbytes(self) -> int:
        """The bytes of memory that they take."""
        return sum(piece.nbytes for piece in self._pieces)

    def append(self, blocks: Tensor) -> None:
        """Add blocks (k and v, B, n, tokens of a block, K, D)."""
        done, whole = 0, limits_of(blocks).whole
        while done < blocks.shape[2]:
            room = sum(piece.shape[2] for piece in self._pieces)
            if room == self.number:
                number = (
                    max(FIRST_BLOCKS, room // 2, whole and blocks.shape[2])
                    if room or not self._room
                    else self._room
                )
                kept = [*self.pieces()] if whole else []
                shape = (
                    *blocks.shape[:2],
                    sum(x.shape[2] for x in kept) + number,
                    *blocks.shape[3:],
                )
                piece = self._allocate(shape, dtype=blocks.dtype, device=blocks.device)
                if kept:
                    torch.cat(kept, 2, out=piece[:, :, : self.number])
                    self._pieces = []
                self._pieces.append(piece)
                room += number
            piece = self._pieces[-1]
            n = min(room - self.number, blocks.shape[2] - done)
            at = piece.shape[2] - (room - self.number)
            piece[:, :, at : at + n] = blocks[:, :, done : done + n]
            done, self.number = done + n, self.number + n

    def take(self, row: int, blocks: Tensor, into: Tensor) -> None:
        """Copy blocks (n,), ascending, of one row of the batch to `into` (k and v, n, tokens of a block, K, D)."""
        starts = [0, *accumulate(piece.shape[2] for piece in self._pieces)]
        several = len(self._pieces) > 1
        places = (
            torch.searchsorted(blocks, blocks.new_tensor(starts)).tolist()
            if several
            else [0, len(blocks)]
        )
        for piece, first_block, (start, stop) in zip(
            self._pieces, starts[:-1], pairwise(places), strict=True
        ):
            if start < stop:
                index = (
                    blocks[start:stop] - first_block if first_block else blocks[start:stop]
                ).to(piece.device)
                for x, y in zip(into[:, start:stop], piece[:, row], strict=True):
                    if x.device == y.device:
                        torch.index_select(y, 0, index, out=x)
                    else:
                        x.copy_(y.index_select(0, index))

    def select(self, rows: Tensor) -> None:
        """Reorder the batch, in new memory: row i becomes what row `rows[i]` was."""
        self._pieces = [piece.index_select(1, rows) for piece in self._pieces]

    def pieces(self) -> Iterator[Tensor]:
        """Yield all blocks, some at a time, as `append` takes them."""
        first_block = 0
        for piece in self._pieces:
            yield piece[:, :, : self.number - first_block]
            first_block += piece.shape[2]

    def adopt(self, blocks: Tensor) -> None:
        """Add blocks as `append` does, but without a copy: their memory is only read. Call it before `append`."""
        self._pieces.append(blocks)
        self.number += blocks.shape[2]

    def fork(self) -> Blocks:
        """Return other blocks, which share these: what is appended to one is not in the other."""
        new = copy.copy(self)
        new._pieces = [
            *self.pieces()
        ]  # without room: the rest of the last piece is written to here
        return new


class Past:
    """The first `position` tokens of a document in one layer, for a batch: what later queries choose blocks from.

    A `KVCache` keeps one, and gives it out with its far keys. Shards are appended as they come; `settle`, which needs
    `turn`, moves whole blocks to `blocks`, and from then on `append` does. `counts` (B, blocks) int32 says how many
    groups have seen each block. If there is `on_choice`, it gets what each part of a shard sees.

    The `layer` of a net that chooses keeps `means` and the last `queries` (B, n, H, D) as well: those since the last
    scan, and its voters. `held` is what the last open group has chosen, and `scanned` what the last scan has found,
    each with the position that it was for. A layer that sees the first block alone keeps only the first blocks, those
    that all layers see in a short document.

    For a backward pass, `keep` is the length that the document may reach. Then `before` gives earlier pasts, `choices`
    has what the shards saw, by position, and a shard that is computed again sees the same. The backward pass of a shard
    adds the gradients of the past to `gradients` (k and v, B, tokens, K, D), whole blocks in fp32 or fp64, if not None.
    """

    def __init__(
        self,
        pattern: Pattern,
        blocks: Blocks | None = None,
        allocate: Callable[..., Tensor] = torch.empty,
        keep: int = 0,
        layer: int | None = None,
    ) -> None:
        """Keep blocks in `blocks`, by default in memory, at once for those of `keep` tokens."""
        self.pattern, self.position, self.kind = pattern, 0, pattern.kind(layer)
        self.allocate = (
            torch.empty if keep else allocate
        )  # which may take memory of the host, and means are needed
        self.choices: dict[int, GroupBlocks] | None = {} if keep else None  # by position
        self.gradients: Tensor | None = None
        self.counts: Tensor | None = None
        self.on_choice: Callable[[Seen], None] | None = None
        room = keep // pattern.chosen_block
        self._first_means = room or FIRST_BLOCKS
        self.queries: Tensor | None = None
        self.means: Means | None = None
        self.blocks = blocks or Blocks(
            allocate, min(room, pattern.chosen) if self.kind == "sees_block_0" else room
        )
        self.held: tuple[int, list[Tensor]] | None = (
            None  # a group's first position, and of each row the blocks (1, m)
        )
        self.scanned: tuple[int, list[Tensor]] | None = (
            None  # `groups.slot_of`, and of each row the candidates (C,)
        )
        self._waiting: list[Tensor] = []  # (k and v, B, tokens, K, D), after the stored blocks
        self._turn: tuple[Turn | None] | None = None  # once it is known

    @property
    def nbytes(self) -> int:
        rows = self._waiting + ([] if self.queries is None else [self.queries])
        return (
            sum(x.nbytes for x in rows)
            + self.blocks.nbytes
            + (self.means.nbytes if self.means else 0)
        )

    @property
    def waiting(self) -> Tensor:
        """The keys and values after the stored blocks, (k and v, B, tokens, K, D)."""
        if len(self._waiting) > 1:
            self._waiting = [torch.cat(self._waiting, 2)]
        return self._waiting[0]

    @property
    def kept(self) -> int:
        """The number of first tokens whose keys and values it keeps."""
        return (
            min(self.position, self.pattern.chosen_keys)
            if self.kind == "sees_block_0"
            else self.position
        )

    @torch.no_grad()
    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Add the next tokens' queries (B, n, H, D), and keys and values (B, n, K, D)."""
        before = self.kept
        self.position += k.shape[1]
        if self.kept > before or not self._waiting:
            self._waiting.append(torch.stack([k, v])[:, :, : self.kept - before])
        if self.kind == "chooses":
            last = self.pattern.last_queries
            all_queries = (
                q if self.queries is None or q.shape[1] >= last else torch.cat([self.queries, q], 1)
            )
            self.queries = all_queries[:, -last:].clone()
        if self._turn:
            self.settle(*self._turn)

    @torch.no_grad()
    def settle(self, turn: Turn | None) -> None:
        """Store the blocks that are whole, and their means."""
        self._turn = (turn,)
        size = self.pattern.chosen_block
        if not self._waiting or not (blocks := self.waiting.shape[2] // size):
            return
        rows = self.waiting
        whole = rows[:, :, : blocks * size]
        if self.kind == "chooses":
            if self.means is None:
                self.means = Means(
                    self.pattern, whole[0], max(blocks, self._first_means), self.allocate
                )
            self.means.write(slice(None), self.blocks.number, whole[0], turn)
        self.blocks.append(whole.unflatten(2, (blocks, size)))
        self._waiting = [rows[:, :, blocks * size :].clone()]

    def means_before(self, stop: int, part: GroupedPart, k: Tensor) -> Means:
        """Return the means of the blocks before position `stop`: the shard, of which k (rows, N, K, D), has some."""
        size = self.pattern.chosen_block
        if self.means is None:
            self.means = Means(self.pattern, self.waiting[0], stop // size, self.allocate)
        if (
            self.blocks.number * size < stop
        ):  # written behind those of the past, until its own take their place
            keys = torch.cat([self.waiting[0, part.rows], k[:, : stop - part.start]], 1)
            self.means.write(
                part.rows, self.blocks.number, keys, self._turn[0] if self._turn else None
            )
        return self.means

    def add_gradients(self, row: int, index: int, blocks: Tensor, d: Tensor) -> None:
        """Add gradients d (n, tokens of a block, K, D) of blocks (n,) of k or v (`index` 0 or 1) to those of the past.

        The last block may be the one that the shard's start cuts: then the shard's rows in it have none.
        """
        if self.gradients is not None:
            into = self.gradients[index, row].unflatten(0, (-1, self.pattern.chosen_block))
            into.index_add_(0, blocks.to(into.device), d.to(into.device))

    def count(self, rows: slice, near: int, chosen: Sequence[Tensor], batch: int) -> None:
        """Count the blocks (groups, m) before position `near` that groups have chosen in each of the `rows`.

        There are `batch` rows in all.
        """
        have, blocks = self.counts, near // self.pattern.chosen_block
        if have is None or have.shape[1] < blocks:
            self.counts = chosen[0].new_zeros(batch, blocks * 3 // 2)
            if have is not None:
                self.counts[:, : have.shape[1]] = have
        assert self.counts is not None
        for row, found in zip(self.counts[rows], chosen, strict=True):
            row.index_add_(0, found.flatten(), torch.ones_like(found.flatten()))

    def convert_counts(self, every: int) -> None:
        """Convert `counts` from groups of `every` tokens to the pattern's groups, which divide them."""
        if self.counts is not None:
            self.counts = self.counts * (
                every // self.pattern.chosen_every
            )  # new: it may be an inference tensor

    def select(self, rows: Tensor) -> None:
        """Reorder the batch, in new memory: row i becomes what row `rows[i]` was."""
        self.blocks.select(rows)
        self.counts = None if self.counts is None else self.counts.index_select(0, rows)
        self._waiting = [x.index_select(1, rows) for x in self._waiting]
        self.queries = None if self.queries is None else self.queries.index_select(0, rows)
        self.held = self.scanned = None
        if self.means:
            self.means.select(rows)

    def fork(self) -> Past:
        """Return another past, with the same tokens so far; blocks are shared."""
        new = copy.copy(self)
        new.blocks, new._waiting = self.blocks.fork(), [*self._waiting]
        new.means = self.means and self.means.fork(self.blocks.number)
        new.counts = None if self.counts is None else self.counts.clone()
        return new

    def before(self, position: int, gradients: Tensor | None = None) -> Past:
        """Return the past of the shard at `position`, with other `gradients`. It shares rows and choices.

        An earlier shard than the next one must have chosen already: its past has no means.
        """
        new = copy.copy(self)
        new.gradients, new.blocks = gradients, copy.copy(self.blocks)
        if position != self.position:
            new.position, new.queries, new.means = position, None, None
            new.blocks.number = min(position // self.pattern.chosen_block, self.blocks.number)
            number, rows = new.blocks.number, self.waiting
            if number < self.blocks.number:  # the block that is cut at `position`
                rows = rows.new_empty(*rows.shape[:2], self.pattern.chosen_block, *rows.shape[3:])
                for row in range(rows.shape[1]):
                    self.blocks.take(
                        row, torch.tensor([number], device=rows.device), rows[:, row : row + 1]
                    )
            new._waiting = [rows[:, :, : new.kept - number * self.pattern.chosen_block]]
        return new

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that `restore` needs, by name; a part that there is not yet has no numbers."""
        yield "waiting", self.waiting
        no_blocks = torch.zeros(self.waiting.shape[1], 0, dtype=torch.int32)
        yield "counts", no_blocks if self.counts is None else self.counts
        for number, piece in enumerate(self.blocks.pieces()):
            yield f"blocks.{number}", piece
        if self.kind != "chooses":
            return
        assert self.queries is not None
        yield "queries", self.queries
        batch, heads, head_dim = self.waiting.shape[1], *self.waiting.shape[3:]
        means = self.pattern.chosen_block // MEAN_OF
        none = self.waiting.new_empty(
            (batch, heads, 0, means, head_dim), dtype=accumulator(self.waiting.dtype)
        )
        yield "fine", self.means.fine[:, :, : self.blocks.number] if self.means else none
        # chosen again, in another shape, other blocks might win where scores nearly tie
        for name, kept, empty in (
            ("held", self.held, no_blocks[:, None]),
            ("scanned", self.scanned, no_blocks),
        ):
            yield f"{name}_at", torch.tensor([kept[0]] if kept else [], dtype=torch.int64)
            yield name, torch.stack(kept[1]).int() if kept else empty

    def shapes(
        self, position: int, saved: Mapping[str, Tensor], like: tuple[int, int, int, int]
    ) -> dict[str, Shape]:
        """Return the shapes of the `state` of `position` tokens; what it may have more or less of, as `saved` has.

        `like` are B, H, K and D.
        """
        (batch, heads, kv_heads, head_dim), size = like, self.pattern.chosen_block
        pieces = [
            len_at(saved, f"blocks.{n}", 2)
            for n in range(sum(name.startswith("blocks.") for name in saved))
        ]
        kept = min(position, self.pattern.chosen_keys) if self.kind == "sees_block_0" else position
        shapes: dict[str, Shape] = {
            "waiting": (2, batch, kept - sum(pieces) * size, kv_heads, head_dim),
            "counts": (batch, len_at(saved, "counts", 1)),
            **{
                f"blocks.{n}": (2, batch, number, size, kv_heads, head_dim)
                for n, number in enumerate(pieces)
            },
        }
        if self.kind != "chooses":
            return shapes
        held, scanned = (min(1, len_at(saved, name, 0)) for name in ("held_at", "scanned_at"))
        queries = len_at(saved, "queries", 1)  # more than these, if groups were longer
        return shapes | {
            "queries": (
                batch,
                min(position, max(queries, self.pattern.last_queries)),
                heads,
                head_dim,
            ),
            "fine": (batch, kv_heads, sum(pieces), size // MEAN_OF, head_dim),
            "held_at": (held,),
            "held": (batch, 1, self.pattern.chosen if held else 0),
            "scanned_at": (scanned,),
            "scanned": (batch, len_at(saved, "scanned", 1) if scanned else 0),
        }

    def restore(self, position: int, saved: Mapping[str, Tensor]) -> None:
        """Become the past of `position` tokens whose `state` was saved. Whole blocks are only read, not copied.

        Raises ValueError for a choice of blocks that there are not.
        """
        self.position, self._waiting = position, [saved["waiting"]]
        if saved["counts"].numel():
            self.counts = saved["counts"].clone()
        for piece in range(sum(name.startswith("blocks.") for name in saved)):
            self.blocks.adopt(saved[f"blocks.{piece}"])
        if self.kind != "chooses":
            return
        self.queries, number = saved["queries"], saved["fine"].shape[2]
        if number:
            self.means = Means(
                self.pattern, saved["waiting"][0], max(number, FIRST_BLOCKS), self.allocate
            )
            self.means.write_finest(slice(None), 0, saved["fine"])
        for name in ("held", "scanned"):
            if (blocks := saved[name]).numel():
                if blocks.min() < 0 or blocks.max() >= number or (blocks.diff() <= 0).any():
                    raise ValueError(f"{name} is no choice of blocks")
                kept = blocks if name == "held" else blocks.long()
                setattr(self, name, (int(saved[f"{name}_at"]), [*kept]))


def len_at(saved: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Return the length of a saved tensor along an axis; 0 without it, whose absence is told elsewhere."""
    found = saved.get(name)
    return found.shape[axis] if found is not None and found.dim() > axis else 0
