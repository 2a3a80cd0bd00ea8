"""The blocks that a text names: those in which rare n-grams of its last tokens stood before.

Attention chooses blocks by queries and keys (`attention.choosing`). Among many places of the same form, these often
rank the wrong one first. The text itself tells the places apart: a name that is asked for stood in the right one.

The last SPAN tokens of a group of queries, its first one included, have pairs and triples of tokens. Each of them that
stood in at most MOST_PLACES places before the group's near keys adds log(all blocks / blocks in which it stood) to the
scores of these blocks. Where it ends in the last quarter of a block, NEXT times that goes to the next block, where the
text goes on. The blocks with the highest scores are named; of equals, the earlier ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from longnet_cli.attention.groups import GroupedPart, Groups
from longnet_cli.attention.pattern import NAMED, Pattern

SPAN = 64
MOST_PLACES = 256
NEXT = 0.9
_FACTORS = np.int64(6364136223846793005), np.int64(1442695040888963407)


class ReadText:
    """The tokens of a text so far, and an index of their pairs and triples.

    The index takes 32 bytes per token, in sorted pieces of growing sizes: adding a token costs a logarithm of the
    length. It grows with the near keys of the groups that are asked for, which therefore come in order.
    """

    def __init__(self, ids: Iterable[Tensor] = ()) -> None:
        self.length = 0
        self._new: list[
            Tensor
        ] = []  # tokens (n,) that are not in `_tail` yet: asking a GPU for them would wait
        self._tail = np.zeros(
            0, np.int64
        )  # the last tokens, at least those that are not in the index
        self._indexed = 0
        self._pieces: list[
            tuple[np.ndarray, np.ndarray]
        ] = []  # hashes, ascending, and where each n-gram ends
        for some in ids:
            self.append(some)

    def append(self, ids: Tensor) -> None:
        """Add the next tokens (n,)."""
        self._new.append(ids)
        self.length += len(ids)

    def fork(self) -> ReadText:
        """Return another text with the same tokens so far; the index is shared."""
        new = copy.copy(self)
        new._new, new._pieces = [*self._new], [*self._pieces]
        return new

    def named(self, pattern: Pattern, groups: Groups) -> np.ndarray:
        """Return the blocks (groups, n) that each group names, the best first, and -1 for none; int64."""
        every, size = pattern.chosen_every, pattern.chosen_block
        blocks = np.full((groups.number, pattern.chosen // NAMED), -1)
        self._grow(groups.near)
        begin = groups.start // every * every - SPAN + 1  # of the first group's tokens
        stop = begin + SPAN + (groups.number - 1) * every
        hashes, ends = _ngrams(self._tokens(max(0, begin - 2), stop), min(2, max(0, begin)))
        ends += max(0, begin - 2)
        grams, inverse = np.unique(hashes, return_inverse=True)
        which, places = self._found(grams)
        which, worth, of = _worth(which, places, groups.near, size)
        firsts = np.searchsorted(which, np.arange(len(grams) + 1))
        for group in range(groups.number):
            last = begin + SPAN - 1 + group * every
            own = np.unique(inverse[(ends > last - SPAN) & (ends <= last)])
            rows = _ranges(firsts[own], firsts[own + 1])
            candidates, at = np.unique(of[rows], return_inverse=True)
            scores = np.bincount(at, worth[rows], len(candidates)).round(
                6
            )  # sums in another order stay equal
            best = np.argsort(-scores, kind="stable")[: blocks.shape[1]]
            best = best[scores[best] > 0]
            blocks[group, : len(best)] = candidates[best]
        return blocks

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens at positions [start, stop), which are in the tail."""
        if self._new:
            self._tail = np.concatenate(
                [self._tail, *(ids.cpu().numpy().astype(np.int64) for ids in self._new)]
            )
            self._new = []
        begin = self.length - len(self._tail)
        return self._tail[start - begin : stop - begin]

    def _grow(self, stop: int) -> None:
        """Put the tokens before position `stop` into the index."""
        if stop < self._indexed:
            raise ValueError(f"a text is asked in order: {stop} comes after {self._indexed}")
        if stop == self._indexed:
            return
        known = min(2, self._indexed)
        hashes, ends = _ngrams(self._tokens(self._indexed - known, stop), known)
        order = np.argsort(hashes, kind="stable")
        self._pieces.append((hashes[order], ends[order] + self._indexed - known))
        while len(self._pieces) > 1 and len(self._pieces[-2][0]) <= 2 * len(self._pieces[-1][0]):
            (old, older), (new, newer) = self._pieces[-2:]
            both = np.concatenate([old, new])
            order = np.argsort(
                both, kind="stable"
            )  # of equal hashes, the earlier place stays first
            self._pieces[-2:] = [(both[order], np.concatenate([older, newer])[order])]
        self._indexed = stop
        self._tail = self._tokens(max(self.length - len(self._tail), stop - SPAN - 2), self.length)

    def _found(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs (index of an n-gram, place) of all n-grams with at most MOST_PLACES places."""
        bounds = [
            (np.searchsorted(piece, grams), np.searchsorted(piece, grams, "right"))
            for piece, _ in self._pieces
        ]
        total = sum((stop - begin for begin, stop in bounds), np.zeros(len(grams), np.int64))
        rare = total <= MOST_PLACES
        which, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for (begin, stop), (_, ends) in zip(bounds, self._pieces, strict=True):
            stop = np.where(rare, stop, begin)
            which.append(np.repeat(np.arange(len(grams)), stop - begin))
            places.append(ends[_ranges(begin, stop)])
        return np.concatenate(which), np.concatenate(places)


def _ngrams(ids: np.ndarray, known: int) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes of the pairs and triples that end at ids (n,) from index `known` on, and these indices."""
    with np.errstate(over="ignore"):
        pairs = (ids[:-1] * _FACTORS[0] + ids[1:]) * _FACTORS[1]
        triples = (
            (ids[:-2] * _FACTORS[0] + ids[1:-1] + _FACTORS[1]) * _FACTORS[0] + ids[2:]
        ) * _FACTORS[1]
    hashes = np.concatenate([pairs, triples])
    ends = np.concatenate([np.arange(1, len(pairs) + 1), np.arange(2, len(triples) + 2)])
    return hashes[ends >= known], ends[ends >= known]


def _worth(
    which: np.ndarray, places: np.ndarray, near: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what n-grams add to blocks: n-grams (n,), ascending, worth (n,) and blocks (n,); each pair is there once.

    `which` n-gram ends at each of `places`. The first block is left out, which is seen anyway.
    """
    late = (places % size >= size - size // 4) & (places // size + 2 <= near // size)
    which = np.concatenate([which, which[late]])
    blocks = np.concatenate([places // size, places[late] // size + 1])
    worth = np.repeat([1.0, NEXT], [len(places), late.sum()])
    order = np.lexsort((-worth, blocks, which))
    which, blocks, worth = which[order], blocks[order], worth[order]
    once = np.r_[True, (which[1:] != which[:-1]) | (blocks[1:] != blocks[:-1])][: len(which)]
    which, blocks, worth = which[once], blocks[once], worth[once]
    stood = np.bincount(which)[which] if len(which) else which
    worth = worth * np.log(near // size / np.maximum(stood, 1))
    inside = blocks > 0
    return which[inside], worth[inside], blocks[inside]


def _ranges(firsts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the numbers of all ranges [first, stop), one range after the other."""
    lengths = stops - firsts
    return np.arange(lengths.sum()) + np.repeat(firsts - np.cumsum(lengths) + lengths, lengths)


class NamedBlocks:
    """The blocks that the text of a shard names: `choosing.Names` for one forward pass.

    tokens (B, N) are the shard's. `texts` are those of the rows' first documents, if these began before the shard; they
    hold the shard's tokens, too. All other documents begin in the shard.
    """

    def __init__(
        self, pattern: Pattern, tokens: Tensor, texts: Sequence[ReadText] | None = None
    ) -> None:
        self.pattern, self.tokens = pattern, tokens
        self._texts = {
            (row, 0): text for row, text in enumerate(texts or ())
        }  # by row and first column
        self._named: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, row: int, part: GroupedPart) -> Tensor:
        begin = row, part.columns.start
        if begin not in self._texts:
            self._texts[begin] = ReadText([self.tokens[row, part.columns]])
        key = *begin, part.groups.start
        if key not in self._named:
            blocks = self._texts[begin].named(self.pattern, part.groups)
            self._named[key] = torch.from_numpy(blocks).to(self.tokens.device)
        return self._named[key]


def named_blocks(
    pattern: Pattern, tokens: Tensor | None, texts: Sequence[ReadText] | None = None
) -> NamedBlocks | None:
    """Return the names of a shard's text; None for vectors, and if the pattern has no places for blocks by name."""
    if tokens is None or tokens.is_floating_point() or pattern.chosen < NAMED:
        return None
    return NamedBlocks(pattern, tokens, texts)
